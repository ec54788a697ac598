"""The chains of a model: MPO layers grouped by the cores they share; one core of them opened."""

# Shape suffixes: L left bond, O out, I in, R right bond of the open core; K the new bond.

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.errors import ConversionError, NoLayerMatched
from mpocompress.layers import MPOLayer, MPOLinear
from mpocompress.layers.recurrent import layers_of_recurrences
from mpocompress.mpo import linalg
from mpocompress.mpo.canonical import Center, move_center
from mpocompress.mpo.contract import merge_cores
from mpocompress.mpo.core_gradient import OpenCore
from mpocompress.mpo.cores import Cores, bond_dims_of
from mpocompress.mpo.spectra import entropy_nats, schmidt_spectra
from mpocompress.mpo.truncate import Truncation, choose_bond_dim
from mpocompress.surgery.match import select


class Chain:
    """Cores that one layer, or several tied ones, have as parameters; where the center is.

    Cores that are frozen (`requires_grad` off) when the chain is made keep their values. A move of
    the gauge would change them, so where there are any, the gauge of the chain stays as it is:
    there is no center, and only what is free can be opened.

    Args:
        name: of the first layer.
        layers: all that share the cores.
    """

    def __init__(self, name: str, layers: Sequence[MPOLinear]) -> None:
        self.name = name
        self.layers = tuple(layers)
        self.shape = (layers[0].out_features, layers[0].in_features)
        self.step_scale = 1.0
        self._free = tuple(core.requires_grad for core in layers[0].cores)
        self._cores: Cores = ()
        self._center: Center = (0, 0)
        self.read()

    def read(self) -> None:
        """Take the cores from the layers; nothing is known of their gauge."""
        self.put([core.detach().clone() for core in self.layers[0].cores], write=False)

    def put(
        self, cores: Sequence[Tensor], center: Center | None = None, *, write: bool = True
    ) -> None:
        """Make these the cores, in all layers too."""
        self._cores = tuple(cores)
        self._center = (0, len(self._cores) - 1) if center is None else center
        if write:
            first, *tied = self.layers
            first.set_cores_(self._cores)
            for layer in tied:
                layer.set_cores_(list(first.cores))

    @property
    def cores(self) -> Cores:
        """The cores as they stand."""
        return self._cores

    @property
    def center(self) -> Center:
        """Orthogonality center, first and last site."""
        return self._center

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """Dimensions of the inner bonds."""
        return bond_dims_of(self._cores)

    @property
    def has_frozen_cores(self) -> bool:
        """Whether some cores, and with them the gauge, are to stay as they are."""
        return not all(self._free)

    def windows(self, width: int) -> tuple[tuple[int, int], ...]:
        """First and last site of what is opened along a sweep, from left to right.

        Args:
            width: so many neighbours; or all cores if they are fewer, and beside frozen cores those
                that have no free neighbour by themselves.
        """
        sites = len(self._cores)
        width = min(width, sites)
        found = [
            (first, first + width - 1)
            for first in range(sites - width + 1)
            if all(self._free[first : first + width])
        ]
        covered = {site for first, last in found for site in range(first, last + 1)}
        alone = [(k, k) for k in range(sites) if self._free[k] and k not in covered]
        return tuple(sorted(found + alone))

    def move_center_(self, first: int, last: int) -> None:
        """Move the orthogonality center to these sites; the layers' function does not change.

        Nothing moves in a chain with frozen cores.
        """
        if not self.has_frozen_cores:
            self.put(*move_center(self._cores, self._center, first, last))

    def entropies_nats(self) -> tuple[float, ...]:
        """Entanglement entropy at every bond."""
        wide = [core.double() for core in self._cores]
        # The gauge holds to the rounding of the cores only, so nothing is taken for known.
        spectra = schmidt_spectra(wide, (0, len(wide) - 1))
        return tuple(entropy_nats(spectrum) for spectrum in spectra)

    def merged(self, first: int, last: int) -> Cores:
        """The chain with the sites `first` to `last` (one or two) as one core."""
        theta = self._cores[first] if first == last else merge_cores(self._cores, (first, last))
        return (*self._cores[:first], theta, *self._cores[last + 1 :])

    def with_core(self, first: int, theta_LOIR: Tensor) -> Cores:
        """The chain with one core exchanged."""
        return (*self._cores[:first], theta_LOIR, *self._cores[first + 1 :])

    def with_pair(
        self, first: int, theta_LOIR: Tensor, limits: Truncation, *, to_the_right: bool
    ) -> tuple[Cores, Center]:
        """The chain with two neighbours exchanged for a merged core, split by SVD.

        The center goes with the sweep, so the discarded weight is that of the whole matrix; in a
        chain with frozen cores, which has none, it is that of the pair.

        Raises:
            DecompositionError: the core is not finite.
        """
        (_, out_a, in_a, _), (_, out_b, in_b, _) = (
            self._cores[site].shape for site in (first, first + 1)
        )
        left, right = theta_LOIR.shape[0], theta_LOIR.shape[3]
        legs = theta_LOIR.reshape(left, out_a, out_b, in_a, in_b, right).permute(0, 1, 3, 2, 4, 5)
        matrix = legs.reshape(left * out_a * in_a, out_b * in_b * right)
        left_XK, values_K, right_KY = linalg.svd(matrix)
        tolerance = linalg.rank_tolerance(tuple(matrix.shape), matrix.dtype)
        bond = choose_bond_dim(values_K, limits, rank_tolerance=tolerance).bond_dim
        left_XK, values_K, right_KY = left_XK[:, :bond], values_K[:bond], right_KY[:bond]
        if to_the_right:
            right_KY = values_K[:, None] * right_KY
        else:
            left_XK = left_XK * values_K
        pair = (
            left_XK.reshape(left, out_a, in_a, bond),
            right_KY.reshape(bond, out_b, in_b, right),
        )
        center = first + 1 if to_the_right else first
        cores = (*self._cores[:first], *pair, *self._cores[first + 2 :])
        return cores, (0, len(cores) - 1) if self.has_frozen_cores else (center, center)


def find_chains(model: nn.Module, *, may_be_none: bool = False) -> dict[str, Chain]:
    """All chains of a model by the name of their first layer, in the order of its modules.

    Args:
        model: any module.
        may_be_none: whether it may have none.

    Raises:
        NoLayerMatched: the model has no MPO layer, or only those that recurrences read.
        ConversionError: half types, or layers that share some cores and not others.
    """
    # Cores are opened where vectors are multiplied; lookups and convolutions are not swept, nor is
    # what shares its cores with them.
    others = {
        id(core)
        for module in model.modules()
        if isinstance(module, MPOLayer) and not isinstance(module, MPOLinear)
        for core in module.cores.parameters()
    }
    # Nor those that recurrences read: rebuilt as dense weights, no core of them meets the data.
    recurrent = layers_of_recurrences(model)
    rebuilt = []
    groups: dict[tuple[int, ...], list[tuple[str, MPOLinear]]] = {}
    for name, module in model.named_modules():
        # In a gauge are only layers that are rounded, or frozen in part: no core can be moved.
        if not isinstance(module, MPOLinear) or module.gauge != "none":
            continue
        if id(module) in recurrent:
            rebuilt.append(name)
            continue
        key = tuple(id(core) for core in module.cores.parameters())
        if others.isdisjoint(key):
            groups.setdefault(key, []).append((name, module))
    if not groups and may_be_none:
        return {}
    if not groups and rebuilt:
        raise NoLayerMatched(
            "recurrent layers run on dense weights that are rebuilt, so that no core of "
            f"{', '.join(rebuilt[:3])} is met by data, and sweeps have nothing to do. Take "
            'distill, or train with method="adam".'
        )
    if not groups:
        raise NoLayerMatched(
            f"a {type(model).__name__} without an MPO layer has nothing to sweep. Compress it "
            "first: mpocompress.compress(model, bond_dim=16)."
        )
    owner: dict[int, str] = {}
    chains = {}
    for key, members in groups.items():
        name, layer = members[0]
        shared = [owner[core] for core in key if core in owner]
        if shared or len(set(key)) < len(key):
            raise ConversionError(
                f"layer {name!r} shares some of its cores, not all, with "
                f"{shared[0] if shared else name!r}; moving the gauge of one would change the "
                "other. Give each layer cores of its own."
            )
        owner |= dict.fromkeys(key, name)
        dtype = layer.cores[0].dtype
        if dtype not in (torch.float32, torch.float64):
            raise ConversionError(
                f"layer {name!r} has {dtype} cores; QR and SVD of a sweep need float32 or wider. "
                "Convert the model with .float() first."
            )
        chains[name] = Chain(name, [member for _, member in members])
    return chains


def trainable_chains(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    may_be_none: bool = False,
) -> list[Chain]:
    """Those of `find_chains` that the patterns mean and whose cores are not all frozen.

    Args:
        model: with MPO layers.
        include: patterns of layer names; default: all.
        exclude: likewise; they win.
        may_be_none: whether all of them may be frozen, or without patterns there may be none.

    Raises:
        NoLayerMatched: the model has no MPO layer, a pattern matches none, or all are frozen and
            that may not be.
        ConversionError: see `find_chains`.
    """
    found = find_chains(model, may_be_none=may_be_none and not include and not exclude)
    if not found:
        return []
    names = select(tuple(found), include, exclude)
    chains = [
        chain
        for name, chain in found.items()
        if name in names and any(core.requires_grad for core in chain.layers[0].cores)
    ]
    if not chains and not may_be_none:
        raise NoLayerMatched(
            f"all MPO layers ({', '.join(sorted(names)[:3])}) are frozen. Switch requires_grad on "
            "for the cores that may change."
        )
    return chains


class _ManualProduct(torch.autograd.Function):
    """y = W x whose backward is contracted by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, core_LOIR: Tensor, opened: OpenCore) -> Tensor:
        ctx.save_for_backward(x, core_LOIR)
        ctx.opened = opened
        return opened.apply(core_LOIR, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        x, core_LOIR = ctx.saved_tensors
        at_input = at_core = None
        if ctx.needs_input_grad[0]:
            at_input = ctx.opened.apply_transposed(core_LOIR, gradient)
        if ctx.needs_input_grad[1]:
            at_core = ctx.opened.gradient(x, gradient)
        return at_input, at_core, None


@contextmanager
def opened_layers(
    layers: Sequence[MPOLinear], opened: OpenCore, core_LOIR: Tensor, *, manual: bool
) -> Iterator[None]:
    """Within the block these layers compute with `core_LOIR` in the open place.

    Their parameters stay as they are; gradients reach the open core and, if it asks for them, the
    input.
    """

    def diverted(layer: MPOLinear) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            if manual:
                output: Tensor = _ManualProduct.apply(input, core_LOIR, opened)
            else:
                output = opened.apply(core_LOIR, input)
            return output if layer.bias is None else output + layer.bias.to(output.dtype)

        return forward

    own = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = diverted(layer)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward  # type: ignore[method-assign]
