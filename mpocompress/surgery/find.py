"""Find the weights of a model that can be converted, and account for everything else.

Two modules are tied if they hold the very same `nn.Parameter`, as in `model.parameters()`. Two
parameters that are merely views of one memory count twice there, and are separated by
`copy.deepcopy`; the same holds here.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mpocompress.errors import ConversionError
from mpocompress.layers.attention import OpenEncoderLayer
from mpocompress.layers.recurrent import layers_of_recurrences
from mpocompress.surgery.adapter import WeightAdapter, adapter_for
from mpocompress.surgery.inventory import RECURRENT, Inventory, KeptEntry, WeightSite, label
from mpocompress.surgery.kept import (
    BIAS_REASON,
    BUFFER_REASON,
    QUANTIZED_REASON,
    describe,
    is_packed,
    quantized_entries,
)
from mpocompress.surgery.references import held_values

# Entries looked at in one go by `check_finite`, so that no second matrix is needed in memory.
_BLOCK = 1 << 22


def find_weights(model: nn.Module) -> Inventory:
    """List every parameter and buffer of a model: convertible, or kept and why.

    Args:
        model: any module; it is only looked at. Modules that read weights without calling a layer
            have none that is convertible; `open_modules` gives a model that has.

    Returns:
        The inventory in model order. Parameters of all entries add up to those of
        `model.parameters()`, where a shared parameter counts once.
    """
    return _Survey(model).inventory()


def tied_names(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of qualified parameter names that stand for one `nn.Parameter`, in model order."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def check_finite(site: WeightSite) -> None:
    """Refuse a weight with NaN or Inf entries.

    Raises:
        ConversionError: with the layer, how many entries, and the first of them.
    """
    weight_OI = site.matrix()
    rows = max(1, _BLOCK // weight_OI.shape[1])
    count, first = 0, None
    for start in range(0, weight_OI.shape[0], rows):
        bad_OI = ~torch.isfinite(weight_OI[start : start + rows])
        found = int(bad_OI.sum())
        if found and first is None:
            row, column = (int(index) for index in bad_OI.nonzero()[0])
            first = (start + row, column)
        count += found
    if first is not None:
        raise ConversionError(
            f"layer {site.label}: {count} of {site.parameters} weights are NaN or Inf, the first "
            f"is {float(weight_OI[first])} at row {first[0]}, column {first[1]}. Repair the "
            "checkpoint, or leave the layer dense by excluding it."
        )


@dataclass(frozen=True, slots=True)
class _Use:
    """One place where a tensor is registered."""

    owner_name: str
    owner: nn.Module
    leaf: str
    tensor: Tensor
    is_buffer: bool

    @property
    def name(self) -> str:
        return f"{self.owner_name}.{self.leaf}" if self.owner_name else self.leaf


class _Survey:
    """One walk over a model; the maps that the questions below are answered from."""

    def __init__(self, model: nn.Module) -> None:
        # Under all names: a module used in two places has two parents to ask.
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names: dict[int, list[str]] = defaultdict(list)
        self.uses: dict[int, list[_Use]] = defaultdict(list)
        for name, module in self.modules.items():
            self.names[id(module)].append(name)
            for use in _registered(name, module):
                self.uses[id(use.tensor)].append(use)
        self.loose = self._loose_parameters()
        self.recurrent = layers_of_recurrences(model)
        self.refused = self._refusals()

    def _loose_parameters(self) -> dict[int, str]:
        """Parameters that a plain list or dict holds: id -> where."""
        found = {}
        for name, module in self.modules.items():
            for path, value in held_values(module):
                if isinstance(value, nn.Parameter):
                    found[id(value)] = f"{path} of {type(module).__name__} {label(name)}"
        return found

    def _refusals(self) -> dict[str, str]:
        """Reasons for the modules that an adapter knows but that must stay dense, by name."""
        reasons: dict[int, str] = {}
        groups: dict[int, list[nn.Module]] = defaultdict(list)
        for module in _distinct(self.modules.values()):
            adapter = adapter_for(module)
            if adapter is None:
                continue
            reason = self._place_refusal(module) or adapter.refusal(module)
            parameter = adapter.parameter(module)
            if parameter is not None:
                groups[id(parameter)].append(module)
                reason = reason or self._sharing_refusal(parameter)
            if reason:
                reasons[id(module)] = reason
        # All layers of a tie group are replaced together or not at all.
        for group in groups.values():
            culprit = next((module for module in group if id(module) in reasons), None)
            for module in group:
                if culprit is not None and id(module) not in reasons:
                    reasons[id(module)] = (
                        f"it shares its weight with {label(self.names[id(culprit)][0])}, of which: "
                        f"{reasons[id(culprit)]}"
                    )
        return {
            name: reasons[id(module)]
            for name, module in self.modules.items()
            if id(module) in reasons
        }

    def _place_refusal(self, module: nn.Module) -> str | None:
        """A parent that reads the weight without calling the module."""
        for own_name in self.names[id(module)]:
            for distance, (name, parent) in enumerate(self._ancestry(own_name)):
                if distance > 0 and isinstance(parent, nn.MultiheadAttention):
                    return (
                        f"it is part of nn.MultiheadAttention {label(name)}, which reads the "
                        "weight without calling the layer"
                    )
                # Only these two: what a subclass adds beside them is called like any layer.
                if (
                    distance == 1
                    and isinstance(parent, nn.TransformerEncoderLayer)
                    and not isinstance(parent, OpenEncoderLayer)
                    and own_name.rpartition(".")[2] in ("linear1", "linear2")
                ):
                    return (
                        f"it is part of nn.TransformerEncoderLayer {label(name)}, whose fast path "
                        "reads the weight without calling the layer"
                    )
        return None

    def _sharing_refusal(self, parameter: nn.Parameter) -> str | None:
        """Somebody else who holds the very parameter, and whom nobody would replace."""
        transposed = set()
        for use in self.uses[id(parameter)]:
            adapter = adapter_for(use.owner)
            if adapter is None or adapter.parameter(use.owner) is not parameter:
                return (
                    f"its weight is also the parameter '{use.name}' of {type(use.owner).__name__}, "
                    "which reads it as a dense matrix"
                )
            transposed.add(adapter.transposed)
        if len(transposed) > 1:
            return "it shares its weight with a layer that reads it transposed"
        if id(parameter) in self.loose:
            return f"its weight is also held by {self.loose[id(parameter)]}"
        return None

    def _ancestry(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of `name`, its parent, and so on up to the model."""
        while name:
            yield name, self.modules[name]
            name = name.rpartition(".")[0]
        yield "", self.modules[""]

    def inventory(self) -> Inventory:
        """All entries in model order, and every module that is refused."""
        entries: list[WeightSite | KeptEntry] = []
        refused = dict(self.refused)
        seen: set[int] = set()
        for name, module in self.modules.items():
            if is_packed(module):
                refused[name] = QUANTIZED_REASON
                if id(module) not in seen:
                    entries.extend(quantized_entries(name, module))
                    seen.add(id(module))
            adapter = adapter_for(module)
            for use in _registered(name, module):
                convertible = (
                    adapter is not None
                    and name not in self.refused
                    and use.tensor is adapter.parameter(module)
                )
                if id(use.tensor) not in seen:
                    seen.add(id(use.tensor))
                    if adapter is not None and convertible:
                        entries.append(self._site(module, adapter, use.tensor))
                    else:
                        entries.append(self._kept(use))
                if adapter is None and not use.is_buffer:
                    refused.setdefault(name, self._reason(use)[1])
        in_order = {name: refused[name] for name in self.modules if name in refused}
        return Inventory(entries=tuple(entries), refused=in_order)

    def _site(self, module: nn.Module, adapter: WeightAdapter, weight: Tensor) -> WeightSite:
        uses = self.uses[id(weight)]
        matrix_OI = adapter.matrix(module)
        return WeightSite(
            name=uses[0].owner_name,
            names=tuple(use.owner_name for use in uses),
            kind=RECURRENT if id(module) in self.recurrent else adapter.kind,
            shape=(matrix_OI.shape[0], matrix_OI.shape[1]),
            dtype=weight.dtype,
            device=weight.device,
            parameters=weight.numel(),
            modules=tuple(_distinct(use.owner for use in uses)),
            adapter=adapter,
        )

    def _kept(self, use: _Use) -> KeptEntry:
        tensor = use.tensor
        kind, reason = self._reason(use)
        # A lazy parameter has neither shape nor entries before the first forward.
        lazy = is_lazy(tensor)
        numel = 0 if lazy else tensor.numel()
        return KeptEntry(
            name=use.name,
            also_known_as=tuple(other.name for other in self.uses[id(tensor)][1:]),
            kind=kind,
            shape=() if lazy else tuple(tensor.shape),
            parameters=0 if use.is_buffer else numel,
            bytes=0 if lazy else numel * tensor.element_size(),
            reason=reason,
            is_buffer=use.is_buffer,
            persistent=use.leaf not in use.owner._non_persistent_buffers_set,
        )

    def _reason(self, use: _Use) -> tuple[str, str]:
        """Kind and reason of one kept tensor."""
        if use.is_buffer:
            return "buffer", BUFFER_REASON
        adapter = adapter_for(use.owner)
        if adapter is not None and use.owner_name not in self.refused:
            return "bias", BIAS_REASON
        kind, reason = describe(
            list(self._ancestry(use.owner_name)), use.leaf, use.tensor, self.refused
        )
        tied = [other for other in self.uses[id(use.tensor)] if other.owner is not use.owner]
        if tied and kind != "bias" and adapter_for(use.owner) is None:
            reason += f"; the same parameter as '{tied[0].name}' of {type(tied[0].owner).__name__}"
        return kind, reason


def _registered(name: str, module: nn.Module) -> Iterator[_Use]:
    """Parameters, then buffers, of this module without its children."""
    for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield _Use(name, module, leaf, parameter, False)
    for leaf, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        yield _Use(name, module, leaf, buffer, True)


def _distinct(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Every module once, in order."""
    seen: set[int] = set()
    for module in modules:
        if id(module) not in seen:
            seen.add(id(module))
            yield module
