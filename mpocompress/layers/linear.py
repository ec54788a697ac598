"""`MPOLinear`: an `nn.Linear` whose weight is a matrix product operator."""

from collections.abc import Sequence
from math import inf, prod

import torch
from torch import Tensor, nn

from mpocompress.errors import ContractionError, DataError
from mpocompress.layers.base import MPOLayer
from mpocompress.mpo import MPO, LayoutLike, apply_cores
from mpocompress.mpo.contract import ContractionPlans, plan_contractions
from mpocompress.mpo.factors import resolve_layout
from mpocompress.mpo.identity_gauge import Gauge
from mpocompress.mpo.initialize import initial_cores
from mpocompress.mpo.weight import Weight, in_gauge
from mpocompress.scalars import as_number

# nn.Linear draws its weights uniformly from +-in_features**-0.5: a third of that squared.
_GAIN_OF_LINEAR = 3**-0.5


def check_gain(gain: float | None) -> float:
    """The gain, or that of `nn.Linear` for None.

    Raises:
        DataError: it is not a finite number above 0.
    """
    if gain is None:
        return _GAIN_OF_LINEAR
    number = as_number(gain)
    if not 0 < number < inf:
        raise DataError(f"gain {gain!r}: it is above 0. Try 1, or 2**0.5 before a ReLU.")
    return number


class MPOLinear(MPOLayer):
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
            dimension (`mpocompress.mpo.initialize` has the derivation, for gradients too). 1 keeps
            them, 2**0.5 keeps them before a ReLU. None: 3**-0.5, which is what `nn.Linear` starts
            with.
        generator: of the start; torch's global one by default, as in `nn.Linear`.
        device: where the parameters live.
        dtype: of the parameters.

    Raises:
        LayoutError: the layout does not fit (out_features, in_features).
        BondDimError: a bond dimension below 1.
        DataError: a gain that is not above 0.
    """

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

    def _plan_forward(self) -> None:
        # Planned once: looking it up again in every forward would cost more than small layers do.
        layout = self._layout
        self._plans: ContractionPlans = plan_contractions(
            layout.out_dims, layout.in_dims, self.bond_dims
        )

    @classmethod
    def from_mpo(
        cls,
        mpo: Weight,
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
        mpo = in_gauge(mpo, gauge)
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
        plan = self._plans.for_call(prod(input.shape[:-1]))
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
