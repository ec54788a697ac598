"""C and M as the two halves of a chain see them: matrices from one half's legs to the other's.

At the cut C is a matrix ((A, A'), (B, B')), A the ins of one half and B those of the other. Its
symmetry, C(A', A; B', B) = C(A, A'; B, B'), lets the pairs A <= A' stand for all: half of the
numbers to keep and to read, which is what takes the time where few columns meet them. Absorbing a
half of bond D costs D² * in² / 2 multiply-adds and a little.
"""

# Shape suffixes: A, P all ins, outs of the left half, B, Q of the right; T pairs of the ins of
# one half in a triangle; a letter twice is the pair of an index and its primed copy.

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class CutMoment:
    """C at the cut, the pairs of the half with more ins in a triangle.

    Args:
        input_II: C, (in, in), symmetric, the ins of the sites in the order of the chain.
        ins: in dims of the sites.
        cut: bond at which they are divided. The sites right of it are read from the right end.
    """

    def __init__(self, input_II: Tensor, ins: Sequence[int], cut: int) -> None:
        self._input_II, self._ins = input_II, tuple(ins)
        self._order = _mirrored_right(len(ins), cut)
        self._sizes = (prod(ins[: cut + 1]), prod(ins[cut + 1 :]))
        self._folded = 0 if self._sizes[0] >= self._sizes[1] else 1
        legs = self._legs().transpose(1, 2)
        if self._folded == 1:
            legs = legs.permute(2, 3, 0, 1)
        size = legs.shape[0]
        rows, columns = torch.triu_indices(size, size, device=input_II.device)
        self._triangle_TX = legs[rows, columns].reshape(len(rows), -1)
        self._kept_T = rows * size + columns
        self._halving_T = torch.where(rows == columns, 0.5, 1.0).to(input_II.dtype)
        # Where each pair is found among those of the triangle, followed by their mirror images.
        self._unfolded_AA = torch.empty(size * size, dtype=torch.long, device=rows.device)
        positions = torch.arange(len(rows), device=rows.device)
        self._unfolded_AA[columns * size + rows] = len(rows) + positions
        self._unfolded_AA[self._kept_T] = positions

    def full(self) -> Tensor:
        """All of it, ((A, A'), (B, B')); made anew at each call."""
        a, b = self._sizes
        return self._legs().transpose(1, 2).reshape(a * a, b * b)

    def absorb(self, gram: Tensor, side: int) -> Tensor:
        """Contract the other half's ins.

        Args:
            gram: all of the other half with its copy, contracted over the outs, (R, R', B, B');
                unchanged when both pairs are exchanged.
            side: the half that is left, 0 the left one, 1 the right.

        Returns:
            (R, R', A, A').
        """
        bond, size = gram.shape[0], self._sizes[side]
        flat_NX = gram.reshape(bond * bond, -1)
        # Few vectors meet the triangle. As rows on its left they take a half more time than columns
        # on its right at worst (Intel); columns take two to six times as long on AMD.
        if side == self._folded:
            kept_NT = flat_NX @ self._triangle_TX.mT
            kept_TRR = kept_NT.mT.reshape(-1, bond, bond)
            both_TRR = torch.cat((kept_TRR, kept_TRR.mT))
            mixed_AARR = both_TRR.index_select(0, self._unfolded_AA)
            return mixed_AARR.reshape(size, size, bond, bond).permute(2, 3, 0, 1)
        kept_NT = flat_NX.index_select(1, self._kept_T) * self._halving_T
        half = (kept_NT @ self._triangle_TX).reshape(bond, bond, size, size)
        return half + half.permute(1, 0, 3, 2)

    def _legs(self) -> Tensor:
        """(A, B, A', B')."""
        a, b = self._sizes
        sites = len(self._ins)
        order = (*self._order, *(sites + k for k in self._order))
        return self._input_II.reshape(*self._ins, *self._ins).permute(order).reshape(a, b, a, b)


def linear_at_cut(linear_OI: Tensor, outs: Sequence[int], ins: Sequence[int], cut: int) -> Tensor:
    """M at the cut: (out, in) to ((P, A), (Q, B)), the right half read from the right end."""
    sites, inner = len(outs), cut + 1
    order = _mirrored_right(sites, cut)
    legs = linear_OI.reshape(*outs, *ins).permute(
        *(leg for half in (order[:inner], order[inner:]) for leg in half),
        *(sites + k for k in order),
    )
    a, b = prod(ins[:inner]), prod(ins[inner:])
    p, q = prod(outs[:inner]), prod(outs[inner:])
    return legs.reshape(p, q, a, b).transpose(1, 2).reshape(p * a, q * b)


def _mirrored_right(sites: int, cut: int) -> tuple[int, ...]:
    return (*range(cut + 1), *reversed(range(cut + 1, sites)))
