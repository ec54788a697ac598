"""What to keep of a Schmidt spectrum, apart from the SVD that made it.

At one bond, with Schmidt values s_1 >= s_2 >= ..., keeping D of them discards the weight
sum_{i > D} s_i^2. Divided by the total weight of that bond it is the *truncation error*: relative,
squared, in [0, 1]. Cores left of a cut are left canonical and cores right of it are not touched, so
one sequential pass over the bonds has a squared error that *equals* the sum of the discarded
weights. `cutoff` bounds the truncation error of each bond, here and everywhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import SupportsIndex

import torch
from torch import Tensor

from mpocompress.errors import BondDimError, DecompositionError
from mpocompress.scalars import as_integer, as_number, put_plain


def check_bond_dim(bond_dim: SupportsIndex, where: str = "") -> int:
    """`bond_dim` as a plain integer of at least 1.

    Raises:
        BondDimError: it is not; `where` says for which bond or layer.
    """
    number = as_integer(bond_dim)
    if number is None or number < 1:
        raise BondDimError(
            f"bond_dim {bond_dim!r}{where}: a bond dimension is an integer of at least 1 "
            "(1 gives a Kronecker product). Try 16."
        )
    return number


@dataclass(frozen=True, kw_only=True, slots=True)
class Truncation:
    """Limits for one bond.

    Attributes:
        bond_dim: keep at most so many Schmidt values; None for no limit.
        cutoff: largest truncation error (relative, squared); 0 drops only what is zero up to
            rounding.

    Raises:
        BondDimError: `bond_dim` below 1.
        DecompositionError: `cutoff` outside [0, 1).
    """

    bond_dim: int | None = None
    cutoff: float = 0.0

    def __post_init__(self) -> None:
        bond_dim = None if self.bond_dim is None else check_bond_dim(self.bond_dim)
        cutoff = as_number(self.cutoff)
        if not 0 <= cutoff < 1:
            raise DecompositionError(
                f"cutoff {self.cutoff!r}: it is a relative discarded weight and lies in [0, 1). "
                "Try 1e-6, which is a relative error of 1e-3."
            )
        put_plain(self, {"bond_dim": bond_dim, "cutoff": cutoff})


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What a truncation kept and lost at one bond.

    Attributes:
        bond_dim: Schmidt values kept.
        discarded_weight: sum of the squares of those cut away; absolute.
        total_weight: sum of all squares at that bond.
        clipped: fewer were there (up to rounding) than `Truncation.bond_dim` allows.
    """

    bond_dim: int
    discarded_weight: float
    total_weight: float
    clipped: bool

    @property
    def truncation_error(self) -> float:
        """Discarded weight relative to the total weight, in [0, 1]."""
        return self.discarded_weight / self.total_weight if self.total_weight > 0 else 0.0


def choose_bond_dim(
    spectrum_S: Tensor,
    limits: Truncation,
    *,
    rank_tolerance: float,
    total_weight: float | None = None,
) -> Cut:
    """Choose how many Schmidt values to keep: as few as `limits` allow, but at least one.

    Args:
        spectrum_S: descending, not squared, not normalized; float32 or float64.
        limits: bond dimension and cutoff.
        rank_tolerance: values at or below `rank_tolerance * spectrum_S[0]` count as zero.
        total_weight: total squared weight if `spectrum_S` is only its leading part.

    Raises:
        DecompositionError: the spectrum is empty or not finite.
    """
    values = spectrum_S.detach().to(torch.float64).cpu()
    if values.numel() == 0 or not bool(torch.isfinite(values).all()):
        raise DecompositionError(
            f"a spectrum of {values.numel()} values is empty or not finite. "
            "Check the matrix for NaN, Inf and entries near the largest float."
        )
    weights = values**2
    seen = float(weights.sum())
    total = seen if total_weight is None else max(total_weight, seen)
    # tail[d]: what is lost when d values are kept.
    tail = torch.cat((weights.flip(0).cumsum(0).flip(0), weights.new_zeros(1))) + (total - seen)
    numerical_rank = max(1, int((values > rank_tolerance * values[0]).sum()))
    enough = int((tail > limits.cutoff * total).sum()) if limits.cutoff > 0 else numerical_rank
    keep = max(1, min(enough, numerical_rank))
    clipped = False
    if limits.bond_dim is not None:
        clipped = numerical_rank < limits.bond_dim
        keep = min(keep, limits.bond_dim)
    return Cut(
        bond_dim=keep, discarded_weight=float(tail[keep]), total_weight=total, clipped=clipped
    )


def error_bound(cuts: Sequence[Cut]) -> float:
    """Absolute Frobenius error of one sequential pass: the root of the summed discarded weights.

    It is an equality for a single pass, and a bound for any further orthogonal projection.
    Source: Oseledets, SIAM J. Sci. Comput. 33 (2011) 2295, theorem 2.2.
    """
    return sqrt(sum(cut.discarded_weight for cut in cuts))
