"""`MPOLinear`: an `nn.Linear` whose weight is a matrix product operator."""

from collections.abc import Sequence
from math import inf, prod

import torch
from torch import Tensor, nn

from mpocompress.errors import ContractionError, DataError
from mpocompress.layers.gauged_cores import GaugedCores
from mpocompress.mpo import MPO, Layout, LayoutLike, apply_cores
from mpocompress.mpo.contract import ContractionPlans, plan_contractions
from mpocompress.mpo.dense import to_dense
from mpocompress.mpo.factors import resolve_layout
from mpocompress.mpo.identity_gauge import Gauge, IdentityGauge, check_gauge, fix_identity_gauge
from mpocompress.mpo.initialize import initial_cores

# nn.Linear draws its weights uniformly from +-in_features**-0.5: a third of that squared.
_GAIN_OF_LINEAR = 3**-0.5


def check_gain(gain: float | None) -> float:
    """The gain, or that of `nn.Linear` for None.

    Raises:
        DataError: it is not a finite number above 0.
    """
    if gain is None:
        return _GAIN_OF_LINEAR
    if isinstance(gain, bool) or not 0 < gain < inf:
        raise DataError(f"gain {gain!r}: it is above 0. Try 1, or 2**0.5 before a ReLU.")
    return gain


class MPOLinear(nn.Module):
    """y = x W^T + b with W stored as cores; made from scratch or from trained weights.

    Same call signature, leading dimensions and state as `nn.Linear`, except that the parameters
    are `cores.0`, `cores.1`, ... instead of `weight`. Every forward takes the contraction order
    with the fewest multiply-adds for its number of rows, or rebuilds W where that is cheaper.

    In the identity gauge (`fix_gauge_`, or `gauge="identity"` in `from_mpo`) the parameters are
    `cores.0.free`, `cores.1.free`, ... and the last core: as many as the layer has degrees of
    freedom. `cores` then gives ordinary cores that are rebuilt at each access; they are results,
    so what is written into them is lost.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias, as in `nn.Linear`.
        layout: "balanced" (two sites), "svd", (out, in) pairs, text or a `Layout`.
        bond_dim: bond dimension, for all bonds or one for each; clipped to the maximal one, which
            None stands for.
        gain: the weights start with the mean square gain^2 / in_features: then activations of
            mean square v come out with gain^2 v, whatever the number of sites and the bond
            dimension (`mpo.initialize` has the derivation, for gradients too). 1 keeps them, 2**0.5
            keeps them before a ReLU. None: 3**-0.5, which is what `nn.Linear` starts with.
        generator: of the start; torch's global one by default, as in `nn.Linear`.
        device: where the parameters live.
        dtype: of the parameters.

    Raises:
        LayoutError: the layout does not fit (out_features, in_features).
        BondDimError: a bond dimension below 1.
        DataError: a gain that is not above 0.
    """

    in_features: int
    out_features: int
    cores: nn.ParameterList | GaugedCores
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        layout: LayoutLike = "balanced",
        bond_dim: int | Sequence[int] | None = 16,
        gain: float | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sites = resolve_layout(layout, out_features, in_features)
        variance = check_gain(gain) ** 2 / in_features
        cores = initial_cores(
            sites, bond_dim, variance=variance, dtype=dtype, device=device, generator=generator
        )
        offset = None
        if bias:
            bound = in_features**-0.5
            offset = torch.empty(out_features, device=device, dtype=dtype)
            offset.uniform_(-bound, bound, generator=generator)
        self._set_up(MPO(cores, shape=(out_features, in_features)), offset)

    def _set_up(self, weight: MPO | IdentityGauge, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._set_cores(weight)
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.register_parameter("bias", nn.Parameter(bias.detach()))

    def _set_cores(self, weight: MPO | IdentityGauge) -> None:
        if isinstance(weight, IdentityGauge):
            self.cores = GaugedCores(weight)
        else:
            self.cores = nn.ParameterList(
                core if isinstance(core, nn.Parameter) else nn.Parameter(core.detach())
                for core in weight.cores
            )
        layout = weight.layout
        self._layout = layout
        # Planned once: looking it up again in every forward would cost more than small layers do.
        self._plans: ContractionPlans = plan_contractions(
            layout.out_dims, layout.in_dims, weight.bond_dims
        )

    @classmethod
    def from_mpo(
        cls,
        mpo: MPO | IdentityGauge,
        bias: Tensor | None = None,
        *,
        gauge: Gauge | None = None,
    ) -> "MPOLinear":
        """A layer with these cores and this bias.

        Args:
            mpo: its cores become the parameters: not copied; a core that already is an
                `nn.Parameter` is taken as it is, so that layers can share their cores.
            bias: (out,), treated likewise; None for no bias.
            gauge: "none" to store all entries of the cores, "identity" to store as many numbers
                as there are degrees of freedom, see `fix_gauge_`; default: as `mpo` is.

        Raises:
            ContractionError: the bias has another shape.
            LayoutError: no such gauge.
        """
        if gauge is not None:
            identity = check_gauge(gauge) == "identity"
            if identity and isinstance(mpo, MPO):
                mpo = fix_identity_gauge(mpo.cores, shape=mpo.shape)
            elif not identity and isinstance(mpo, IdentityGauge):
                mpo = MPO(mpo.cores(), shape=mpo.shape)
        if bias is not None and tuple(bias.shape) != (mpo.shape[0],):
            raise ContractionError(
                f"bias has shape {tuple(bias.shape)}, but the MPO has {mpo.shape[0]} outputs."
            )
        layer = cls.__new__(cls)
        layer._set_up(mpo, bias)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        layout: LayoutLike = "balanced",
        bond_dim: int | Sequence[int] | None = None,
        cutoff: float = 0.0,
    ) -> "MPOLinear":
        """Factorize a trained `nn.Linear` by sequential SVD; nothing is shared with it.

        Args:
            linear: the layer; its dtype, device, mode, `requires_grad` and lack of bias are kept.
            layout: as in the constructor.
            bond_dim: largest bond dimension; None for no limit.
            cutoff: largest truncation error at each bond (relative discarded weight, squared).

        Raises:
            LayoutError: the layout does not fit.
            BondDimError: a bond dimension below 1.
            DecompositionError: NaN or Inf weights.
        """
        weight_OI = linear.weight.detach()
        sites = resolve_layout(layout, weight_OI.shape[0], weight_OI.shape[1])
        mpo = MPO.from_matrix(weight_OI, sites, bond_dim=bond_dim, cutoff=cutoff)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = cls.from_mpo(mpo, bias)
        layer.cores.requires_grad_(linear.weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    @property
    def layout(self) -> Layout:
        """Out and in dims of the sites."""
        return self._layout

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """Dimensions of the inner bonds."""
        if isinstance(self.cores, GaugedCores):
            return self.cores.bond_dims
        return tuple(int(core.shape[3]) for core in list(self.cores)[:-1])

    @property
    def gauge(self) -> Gauge:
        """How the cores are stored: "none" (whole) or "identity" (free rows and pivots)."""
        return "identity" if isinstance(self.cores, GaugedCores) else "none"

    def fix_gauge_(self) -> "MPOLinear":
        """Store the weight in the identity gauge, in place; it does not change beyond rounding.

        A bond of dimension R then takes R^2 numbers fewer. The parameters are new ones: make the
        optimizer afterwards. A layer that shared its cores with another no longer does. Bonds that
        carry less than their dimension shrink. Every forward rebuilds the cores.

        Returns:
            The layer itself.

        Raises:
            DecompositionError: NaN or Inf in a core.
            ContractionError: the layer is on the meta device.
        """
        if isinstance(self.cores, GaugedCores):
            return self
        trained = [core.requires_grad for core in self.cores]
        self._set_cores(
            fix_identity_gauge(list(self.cores), shape=(self.out_features, self.in_features))
        )
        for parameter, flag in zip(self.cores.parameters(), _last_first(trained), strict=True):
            parameter.requires_grad_(flag)
        return self

    def free_gauge_(self) -> "MPOLinear":
        """Store all entries of all cores again, in place: the inverse of `fix_gauge_`.

        Returns:
            The layer itself.
        """
        if not isinstance(self.cores, GaugedCores):
            return self
        trained = [
            *(core.free.requires_grad for core in self.cores.gauged),
            self.cores.last.requires_grad,
        ]
        self._set_cores(
            MPO(
                [core.detach().clone() for core in self.cores],
                shape=(self.out_features, self.in_features),
            )
        )
        for core, flag in zip(self.cores, trained, strict=True):
            core.requires_grad_(flag)
        return self

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), rebuilt at each access and differentiable in the cores.

        For code that reads `.weight` of a layer; it cannot be assigned to.
        """
        return to_dense(list(self.cores), (self.out_features, self.in_features))

    def to_dense(self) -> Tensor:
        """The dense weight (out, in), detached."""
        return self.weight.detach()

    def to_mpo(self) -> MPO:
        """The weight as an MPO of detached cores; the storage is shared, unless in a gauge."""
        return MPO(
            (core.detach() for core in self.cores), shape=(self.out_features, self.in_features)
        )

    def set_cores_(self, cores: Sequence[Tensor]) -> None:
        """Put other cores in place; their bond dimensions may differ from the old ones.

        Parameters whose shape stays keep their identity, so optimizers and ties stay valid; the
        others are replaced by new ones. A core that is an `nn.Parameter` is taken as it is. In the
        identity gauge all parameters are new ones.

        Args:
            cores: a chain with the sites of this layer.

        Raises:
            ContractionError: the cores do not form a chain, or its sites are others.
        """
        mpo = MPO(cores, shape=(self.out_features, self.in_features))
        if mpo.layout.pairs != self._layout.pairs:
            raise ContractionError(
                f"cores with the sites {mpo.layout} in a layer with the sites {self._layout}; only "
                "bond dimensions may change. Make a new layer with MPOLinear.from_mpo."
            )
        if isinstance(self.cores, GaugedCores):
            self._set_cores(fix_identity_gauge(mpo.cores, shape=mpo.shape))
            return
        for site, core in enumerate(mpo.cores):
            old = self.cores[site]
            if isinstance(core, nn.Parameter):
                self.cores[site] = core
            elif core.shape == old.shape:
                old.data.copy_(core.detach())
            else:
                new = torch.empty(core.shape, dtype=old.dtype, device=old.device)
                new.copy_(core.detach())
                self.cores[site] = nn.Parameter(new, requires_grad=old.requires_grad)
        self._plans = plan_contractions(self._layout.out_dims, self._layout.in_dims, self.bond_dims)

    def to_linear(self) -> nn.Linear:
        """An ordinary `nn.Linear` with the dense weight; nothing is shared."""
        weight_OI = self.to_dense().clone(memory_format=torch.contiguous_format)
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device="meta",
        )
        trained = next(self.cores.parameters()).requires_grad
        linear.weight = nn.Parameter(weight_OI, requires_grad=trained)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear uses
        """Apply the layer: (..., in_features) to (..., out_features).

        Raises:
            ContractionError: the last dimension of the input is not `in_features`.
        """
        # An exported graph must not depend on the batch that it was traced with.
        exporting = torch.compiler.is_exporting()
        plan = self._plans.chain if exporting else self._plans.best(prod(input.shape[:-1]))
        output = apply_cores(
            list(self.cores), input, shape=(self.out_features, self.in_features), plan=plan
        )
        if self.bias is None:
            return output
        if self.bias.dtype != output.dtype:
            # Under autocast the product is of half width, and so is what nn.Linear returns.
            return output + self.bias.to(output.dtype)
        return output + self.bias

    def extra_repr(self) -> str:
        """Sizes, layout and bond dimensions, for `print(model)`."""
        gauge = "" if self.gauge == "none" else f", gauge={self.gauge!r}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, layout={self._layout}, "
            f"bond_dims={list(self.bond_dims)}{gauge}"
        )


def _last_first(flags: list[bool]) -> list[bool]:
    """In the order of the parameters of `GaugedCores`: its own comes before its children's."""
    return [flags[-1], *flags[:-1]]
