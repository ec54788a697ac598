"""Extrapolation of a chain along the last round trip of sweeps.

Alternating least squares creeps along narrow valleys: successive round trips take nearly the same,
small step. The step is therefore tried again, scaled, before the next round trip, and kept only if
it lowers the objective; the scale grows with every success and is halved with every failure.

Cores of successive round trips can only be subtracted once their gauges agree. Both chains are
right canonical, so what is left is an orthogonal matrix on each bond; the one that brings the new
chain closest to the old is the polar factor of their overlap.

Source: the "enhanced line search" of alternating least squares, Rajih, Comon, Harshman, SIAM J.
Matrix Anal. Appl. 30 (2008) 1128, here with the step adapted instead of solved for.
"""

# Shape suffixes: L left bond, O out, I in, R right bond.

from collections.abc import Sequence

import torch
from torch import Tensor

from mpocompress.mpo import linalg
from mpocompress.mpo.cores import Cores, bond_dims_of

_FIRST_STEP = 1.0
_GROW = 1.2
_SHRINK = 0.5


def align_gauge(cores: Sequence[Tensor], reference: Sequence[Tensor]) -> Cores:
    """Rotate the bonds of a chain so that its cores come closest to those of another.

    Args:
        cores: right canonical, the orthogonality center at site 0.
        reference: likewise, with the same bond dimensions.
    """
    aligned = list(cores)
    overlap_RR = cores[0].new_ones(1, 1)  # reference, aligned
    for site in range(len(cores) - 1, 0, -1):
        turned = torch.tensordot(aligned[site], overlap_RR, dims=([3], [1]))
        overlap_LL = torch.tensordot(reference[site], turned, dims=([1, 2, 3], [1, 2, 3]))
        left_LL, _, right_LL = linalg.svd(overlap_LL)
        rotation_LL = left_LL @ right_LL
        aligned[site] = torch.tensordot(rotation_LL, aligned[site], dims=1)
        aligned[site - 1] = torch.tensordot(aligned[site - 1], rotation_LL, dims=([3], [1]))
        overlap_RR = overlap_LL @ rotation_LL.mT
    return tuple(aligned)


class Extrapolation:
    """What the last two round trips ended with, and how far to go on."""

    def __init__(self) -> None:
        self._previous: Cores | None = None
        self._present: Cores | None = None
        self._step = _FIRST_STEP

    def observe(self, cores: Cores) -> None:
        """Take in the chain at the end of a round trip, the orthogonality center at site 0."""
        present = self._present
        if present is not None and bond_dims_of(present) == bond_dims_of(cores):
            self._previous, self._present = present, align_gauge(cores, present)
        else:
            self._previous, self._present = None, cores

    def propose(self) -> Cores | None:
        """A chain to go on from, if it has a lower objective; None while there is no history."""
        if self._previous is None or self._present is None:
            return None
        return tuple(
            new + self._step * (new - old)
            for new, old in zip(self._present, self._previous, strict=True)
        )

    def judge(self, accepted: bool) -> None:
        """Adapt the step to whether the proposal was kept."""
        self._step *= _GROW if accepted else _SHRINK
