"""`MPOLayer`: what layers of every kind have in common, a matrix that is stored as cores."""

import copy
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from mpocompress.errors import ContractionError
from mpocompress.layers.gauged_cores import GaugedCores
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.dense import to_dense
from mpocompress.mpo.identity_gauge import Gauge, IdentityGauge, fix_identity_gauge
from mpocompress.mpo.integers import Stored
from mpocompress.mpo.weight import Weight


class MPOLayer(nn.Module):
    """A matrix (out_features, in_features) as cores, and perhaps a bias; subclasses say what for.

    The parameters are `cores.0`, `cores.1`, ... or, in the identity gauge, `cores.0.free`, ... and
    the last core; see `MPOLinear`.

    Attributes:
        kind: of the weight that the cores stand for, such as "linear".
        dense_shape: of that weight; None if it is the matrix itself.
        dense_transposed: whether it is (in, out), seen as (first dimension, all others).
        stored: how a file holds the cores if they have been rounded, by the parameter's name below
            `cores`; what is trained afterwards is no longer what is stored.
    """

    kind: str = "linear"
    dense_shape: tuple[int, ...] | None = None
    dense_transposed: bool = False
    stored: Mapping[str, Stored] | None = None

    out_features: int
    in_features: int
    cores: nn.ParameterList | GaugedCores
    bias: nn.Parameter | None

    def _set_up(self, weight: Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._set_cores(weight)
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.register_parameter("bias", nn.Parameter(bias.detach()))

    def _set_cores(self, weight: Weight) -> None:
        if isinstance(weight, IdentityGauge):
            self.cores = GaugedCores(weight)
        else:
            self.cores = nn.ParameterList(
                core if isinstance(core, nn.Parameter) else nn.Parameter(core.detach())
                for core in weight.cores
            )
        self._layout = weight.layout
        self._plan_forward()

    def with_weight(self, weight: Weight) -> Self:
        """A copy with another weight of this shape, whatever its layout and bond dimensions."""
        layer = copy.deepcopy(self)
        layer._set_cores(weight)
        layer.stored = None
        return layer

    def _plan_forward(self) -> None:
        """Called when layout or bond dimensions have changed."""

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

    def fix_gauge_(self) -> Self:
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

    def free_gauge_(self) -> Self:
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
    def matrix(self) -> Tensor:
        """The matrix (out, in), rebuilt at each access and differentiable in the cores."""
        return to_dense(list(self.cores), (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        """The dense weight, rebuilt at each access and differentiable in the cores.

        For code that reads `.weight` of a layer; it cannot be assigned to.
        """
        return self.matrix

    def to_dense(self) -> Tensor:
        """The dense weight, detached."""
        return self.weight.detach()

    def to_mpo(self) -> MPO:
        """The weight as an MPO of detached cores; the storage is shared, unless in a gauge."""
        return MPO(
            (core.detach() for core in self.cores), shape=(self.out_features, self.in_features)
        )

    def to_weight(self) -> Weight:
        """The weight in the gauge that it is stored in, of detached tensors; storage is shared."""
        if not isinstance(self.cores, GaugedCores):
            return self.to_mpo()
        return IdentityGauge(
            tuple(core.free.detach() for core in self.cores.gauged),
            tuple(core.pivots for core in self.cores.gauged),
            self.cores.last.detach(),
            self._layout,
            (self.out_features, self.in_features),
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
                "bond dimensions may change. Make a new layer with from_mpo."
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
        self._plan_forward()


def _last_first(flags: list[bool]) -> list[bool]:
    """In the order of the parameters of `GaugedCores`: its own comes before its children's."""
    return [flags[-1], *flags[:-1]]
