"""A matrix as cores, stored whole or in the identity gauge."""

from mpocompress.mpo.identity_gauge import Gauge, IdentityGauge, check_gauge, fix_identity_gauge
from mpocompress.mpo.operator import MPO

Weight = MPO | IdentityGauge
"""Both have `cores`, `layout`, `shape`, `bond_dims`, `num_parameters`, `num_bytes` and `to`."""


def as_mpo(weight: Weight) -> MPO:
    """The weight as an ordinary chain; one that is none is rebuilt, differentiable."""
    return weight if isinstance(weight, MPO) else MPO(weight.cores, shape=weight.shape)


def index_bytes(weight: Weight) -> int:
    """Bytes of the pivots of a gauge; an ordinary chain has none."""
    return weight.index_bytes if isinstance(weight, IdentityGauge) else 0


def in_gauge(weight: Weight, gauge: Gauge | None) -> Weight:
    """The weight stored as the gauge says; None leaves it as it is.

    Raises:
        LayoutError: no such gauge.
        DecompositionError: NaN or Inf in a core that is to be put into a gauge.
    """
    if gauge is None:
        return weight
    if check_gauge(gauge) == "none":
        return as_mpo(weight)
    if isinstance(weight, IdentityGauge):
        return weight
    return fix_identity_gauge(weight.cores, shape=weight.shape)
