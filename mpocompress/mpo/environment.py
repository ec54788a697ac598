"""Environments of the open site or sites of a chain that is fitted to a matrix in a metric.

The objective of a fit is E(W) = tr(G (T − W) C (T − W)ᵀ), C the second moment of the inputs. Seen
from one core, all else fixed, it is a quadratic form: a Gram matrix on the core's (left bond, in,
right bond) and a right-hand side that is linear in M = G T C. Both are contractions of C and M with
the other cores; no sample appears. (G is taken as a Kronecker product over the sites here, the
identity by default: then it acts on the out leg of each core alone.)

C couples all in dims, so the order of contraction decides the cost. The chain is *cut* at one bond.
Each half keeps, from its outer end towards the cut,

* `block`: its outer cores merged, (P outs, A ins, L bond), and
* `gram`: two blocks contracted over their outs, (L, L', A, A'): all that C ever sees of them;

and, from the cut outwards, what C and M have become once the other half and the inner cores of this
one are absorbed: `mixed` (R, R', A, A') and `linear` (P, A, R). At the cut C is seen as a matrix
((A, A'), (B, B')), A the ins of one half and B those of the other, so that absorbing a half is one
matrix product of D (D + 1) / 2 * in² multiply-adds, D the bond at the cut. Every other step works
on tensors of about the size of one half. Whatever has been made is kept, and dropped only when a
core that enters it changes: a sweep computes each environment once.

The right half is treated as the left half of the mirrored chain: its sites, and their legs in C and
M, run from the right end to the cut.
"""

# Shape suffixes: L left (outer) bond, O out, I in, R right (inner) bond of a core; P all outs and A
# all ins of the cores outside of it, X = A*I; P and A, Q and B of the two halves at the cut. The
# pair of an index and its primed copy is the letter twice.

from collections.abc import Sequence
from copy import copy
from math import prod

import torch
from torch import Tensor

from mpocompress.mpo.cores import Cores
from mpocompress.mpo.cut import CutMoment, linear_at_cut


def mirror(core_LOIR: Tensor) -> Tensor:
    """The core with its bonds exchanged: that of the chain read from the other end."""
    return core_LOIR.permute(3, 1, 2, 0)


class _Half:
    """Cores of one half, numbered from the outer end towards the cut, and their environments."""

    def __init__(self, cores: Sequence[Tensor], out_weights: Sequence[Tensor] | None) -> None:
        self.cores = list(cores)
        self.out_weights = out_weights
        unit = cores[0].new_ones(1, 1, 1, 1)
        self.mixed: dict[int, Tensor] = {}
        self.linear: dict[int, Tensor] = {}
        self._blocks = [unit[0]]
        self._grams = [unit]

    @property
    def last(self) -> int:
        """Position of the core beside the cut."""
        return len(self.cores) - 1

    def set_core(self, position: int, core_LOIR: Tensor) -> None:
        self.cores[position] = core_LOIR
        del self._blocks[position + 1 :]
        del self._grams[position + 1 :]
        for cache in (self.mixed, self.linear):
            for outer in [key for key in cache if key < position]:
                del cache[outer]

    def forget_other_half(self) -> None:
        self.mixed.clear()
        self.linear.clear()

    def out_weight(self, position: int) -> Tensor | None:
        return None if self.out_weights is None else self.out_weights[position]

    def block(self, position: int) -> Tensor:
        """The cores outside of `position`, merged: (outs, ins, bond)."""
        while len(self._blocks) <= position:
            block_PAL, core = self._blocks[-1], self.cores[len(self._blocks) - 1]
            outs, ins, _ = block_PAL.shape
            _, out, in_, right = core.shape
            merged_PAOIR = torch.tensordot(block_PAL, core, dims=1)
            self._blocks.append(merged_PAOIR.transpose(1, 2).reshape(outs * out, ins * in_, right))
        return self._blocks[position]

    def gram(self, position: int) -> Tensor:
        """The block with its copy, contracted over the outs: (L, L', A, A')."""
        while len(self._grams) <= position:
            inner = len(self._grams)
            block_PAL = self.block(inner)
            outs, ins, bond = block_PAL.shape
            flat_PN = block_PAL.transpose(1, 2).reshape(outs, bond * ins)
            weighed_PN = flat_PN
            if self.out_weights is not None:
                for weight_OO in self.out_weights[:inner]:
                    # The out leg of one site is in front, and goes to the end of the outs; after
                    # the last site they are in their order again.
                    out = weight_OO.shape[0]
                    weighed = weight_OO @ weighed_PN.reshape(out, -1)
                    weighed_PN = weighed.reshape(out, outs // out, -1).transpose(0, 1)
                weighed_PN = weighed_PN.reshape(outs, bond * ins)
            gram_LALA = (flat_PN.mT @ weighed_PN).reshape(bond, ins, bond, ins)
            self._grams.append(gram_LALA.transpose(1, 2).contiguous())
        return self._grams[position]


class Environments:
    """A chain of at least two cores, what it is fitted to, and the environments of every site.

    Args:
        cores: the chain, in the dtype of the work.
        input_II: C, (in, in), symmetric.
        linear_OI: M = G T C, (out, in).
        cut: bond at which C is divided.
        out_weights: a metric (o, o) on the out leg of every site; None is the identity.
    """

    def __init__(
        self,
        cores: Sequence[Tensor],
        input_II: Tensor,
        linear_OI: Tensor,
        *,
        cut: int,
        out_weights: Sequence[Tensor] | None = None,
    ) -> None:
        outs = [int(core.shape[1]) for core in cores]
        ins = [int(core.shape[2]) for core in cores]
        self._moment = CutMoment(input_II, ins, cut)
        self._linear_PAQB = linear_at_cut(linear_OI, outs, ins, cut)
        self._cut = cut
        self._out_weights = None if out_weights is None else tuple(out_weights)
        self._halves = self._make_halves(cores)

    def _make_halves(self, cores: Sequence[Tensor]) -> tuple[_Half, _Half]:
        inner, weights = self._cut + 1, self._out_weights
        return (
            _Half(cores[:inner], None if weights is None else weights[:inner]),
            _Half(
                [mirror(core) for core in reversed(cores[inner:])],
                None if weights is None else weights[inner:][::-1],
            ),
        )

    def with_cores(self, cores: Sequence[Tensor]) -> "Environments":
        """The environments of another chain of the same layout; C and M are shared."""
        other = copy(self)
        other._halves = self._make_halves(cores)
        return other

    @property
    def num_sites(self) -> int:
        """Number of cores."""
        return sum(len(half.cores) for half in self._halves)

    @property
    def out_weights(self) -> tuple[Tensor, ...] | None:
        """Metric on the out leg of every site; None is the identity."""
        return self._out_weights

    @property
    def cores(self) -> Cores:
        """The chain as it stands."""
        left, right = self._halves
        return (*left.cores, *(mirror(core) for core in reversed(right.cores)))

    def core(self, site: int) -> Tensor:
        """The core at `site`."""
        side, position = self._locate(site)
        core_LOIR = self._halves[side].cores[position]
        return core_LOIR if side == 0 else mirror(core_LOIR)

    def set_core(self, site: int, core_LOIR: Tensor) -> None:
        """Put a core in place and drop the environments that it enters."""
        side, position = self._locate(site)
        self._halves[side].set_core(position, core_LOIR if side == 0 else mirror(core_LOIR))
        self._halves[1 - side].forget_other_half()

    def gram(self, first: int, last: int) -> Tensor:
        """Gram matrix of the open sites `first` to `last` (one, or two neighbours).

        Returns:
            (N, N), N = left bond * ins * right bond, with the ins of two sites merged.
        """
        if first <= self._cut < last:
            return self._gram_across()
        side, outer, inner = self._open(first, last)
        half = self._halves[side]
        gram = _close_gram(half.gram(outer), self._mixed(side, inner))
        if side == 1:
            in_, own = gram.shape[1], int(half.cores[outer].shape[2])
            left, right = gram.shape[0], gram.shape[2]
            # The ins of two mirrored sites come in the other order, too.
            legs = gram.reshape(left, own, in_ // own, right, left, own, in_ // own, right)
            gram = legs.permute(3, 2, 1, 0, 7, 6, 5, 4)
        return gram.reshape(round(gram.numel() ** 0.5), -1)

    def rhs(self, first: int, last: int) -> Tensor:
        """Right-hand side of the open sites: M contracted with all other cores.

        Returns:
            (left bond, outs, ins, right bond), legs of two sites merged.
        """
        if first <= self._cut < last:
            return self._rhs_across()
        side, outer, inner = self._open(first, last)
        half = self._halves[side]
        rhs_LOIR = _close_linear(half.block(outer), self._linear(side, inner))
        if side == 0:
            return rhs_LOIR
        left, outs, ins, right = rhs_LOIR.shape
        _, out, in_, _ = half.cores[outer].shape
        legs = rhs_LOIR.reshape(left, out, outs // out, in_, ins // in_, right)
        return legs.permute(5, 2, 1, 4, 3, 0).reshape(right, outs, ins, left)

    def marginals(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Partial traces of the Gram matrix, never forming it.

        The legs of the open sites fall in two groups: left bond and ins of the first site, ins of
        the second site and right bond. (The ins of a single site go with the smaller bond.) If the
        Gram matrix is a Kronecker product of the two, it is that of its partial traces, divided by
        its trace; otherwise this is a positive semidefinite approximation of it.

        Returns:
            (left bond * ins) squared and (ins * right bond) squared, of the same trace.
        """
        if first <= self._cut < last:
            return self._marginals_across()
        side, outer, inner = self._open(first, last)
        half = self._halves[side]
        outer_in, inner_in = (int(half.cores[k].shape[2]) for k in (outer, inner))
        if first == last:
            outward = half.cores[outer].shape[0] <= half.cores[inner].shape[3]
            outer_in, inner_in = (outer_in, 1) if outward else (1, inner_in)
        outer_LILI, inner_IRIR = _marginals(
            half.gram(outer), self._mixed(side, inner), outer_in, inner_in
        )
        if side == 1:
            outer_LILI, inner_IRIR = (t.permute(1, 0, 3, 2) for t in (inner_IRIR, outer_LILI))
        return _square(outer_LILI), _square(inner_IRIR)

    def _marginals_across(self) -> tuple[Tensor, Tensor]:
        left, right = self._halves
        sides = []
        input_AABB = self._moment.full()
        for half, other, c_AABB in ((left, right, input_AABB), (right, left, input_AABB.mT)):
            gram_LLAA, in_ = half.gram(half.last), half.cores[half.last].shape[2]
            ins = gram_LLAA.shape[2]
            seen = _trace_bonds(other.gram(other.last))
            unit = torch.eye(other.cores[other.last].shape[2], dtype=seen.dtype, device=seen.device)
            traced = (c_AABB @ torch.kron(seen, unit).reshape(-1)).reshape(ins, in_, ins, in_)
            sides.append(_close_outer(gram_LLAA, traced))
        return _square(sides[0]), _square(sides[1].permute(1, 0, 3, 2))

    def _locate(self, site: int) -> tuple[int, int]:
        return (0, site) if site <= self._cut else (1, self.num_sites - 1 - site)

    def _open(self, first: int, last: int) -> tuple[int, int, int]:
        """Half, and positions of the outer and the inner open site in it."""
        side, outer = self._locate(first)
        _, inner = self._locate(last)
        return side, min(outer, inner), max(outer, inner)

    def _mixed(self, side: int, position: int) -> Tensor:
        """C with the other half and the cores inside of `position` absorbed: (R, R', A, A')."""
        half, other = self._halves[side], self._halves[1 - side]
        for inner in range(half.last, position - 1, -1):
            if inner in half.mixed:
                continue
            if inner == half.last:
                half.mixed[inner] = self._moment.absorb(other.gram(other.last + 1), side)
            else:
                half.mixed[inner] = _absorb_core(
                    half.mixed[inner + 1], half.cores[inner + 1], half.out_weight(inner + 1)
                )
        return half.mixed[position]

    def _linear(self, side: int, position: int) -> Tensor:
        """M with the other half and the cores inside of `position` absorbed: (P, A, R)."""
        half, other = self._halves[side], self._halves[1 - side]
        for inner in range(half.last, position - 1, -1):
            if inner in half.linear:
                continue
            if inner == half.last:
                block_QBR = other.block(other.last + 1)
                right = block_QBR.shape[2]
                outs = prod(core.shape[1] for core in half.cores)
                m_PAQB = self._linear_PAQB if side == 0 else self._linear_PAQB.mT
                # Rows on the left of M, as in `CutMoment.absorb`; strided, they took twice as long.
                rows_RY = block_QBR.reshape(-1, right).mT.contiguous()
                half.linear[inner] = (rows_RY @ m_PAQB.mT).mT.reshape(outs, -1, right)
            else:
                linear_PXR, core = half.linear[inner + 1], half.cores[inner + 1]
                left, out, in_, right = core.shape
                outs, ins = linear_PXR.shape[0] // out, linear_PXR.shape[1] // in_
                legs = linear_PXR.reshape(outs, out, ins, in_, right).transpose(1, 2)
                absorbed = legs.reshape(outs * ins, -1) @ core.reshape(left, -1).mT
                half.linear[inner] = absorbed.reshape(outs, ins, left)
        return half.linear[position]

    def _gram_across(self) -> Tensor:
        """Gram matrix of the two sites at the cut: C meets the outer blocks of both halves."""
        left, right = self._halves
        gram_LLAA, gram_RRBB = left.gram(left.last), right.gram(right.last)
        a, i = gram_LLAA.shape[2], left.cores[left.last].shape[2]
        b, j = gram_RRBB.shape[2], right.cores[right.last].shape[2]
        bond, bond_right = gram_LLAA.shape[0], gram_RRBB.shape[0]
        legs = self._moment.full().reshape(a * i * a * i, b, j, b, j).permute(0, 2, 4, 1, 3)
        half = legs.reshape(-1, b * b) @ gram_RRBB.reshape(-1, b * b).mT
        half = half.reshape(a, i, a, i, -1).transpose(1, 2).reshape(a * a, -1)
        done = (gram_LLAA.reshape(-1, a * a) @ half).reshape(
            bond, bond, i, i, j, j, bond_right, bond_right
        )
        size = bond * i * j * bond_right
        return done.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(size, size)

    def _rhs_across(self) -> Tensor:
        left, right = self._halves
        block_PAL, block_QBR = left.block(left.last), right.block(right.last)
        p, a, bond = block_PAL.shape
        q, b, bond_right = block_QBR.shape
        _, o, i, _ = left.cores[left.last].shape
        _, u, j, _ = right.cores[right.last].shape
        legs = self._linear_PAQB.reshape(-1, q, u, b, j).permute(0, 2, 4, 1, 3)
        half = legs.reshape(-1, q * b) @ block_QBR.reshape(-1, bond_right)
        half = half.reshape(p, o, a, i, -1).transpose(1, 2).reshape(p * a, -1)
        done = (block_PAL.reshape(-1, bond).mT @ half).reshape(bond, o, i, u, j, bond_right)
        return done.transpose(2, 3).reshape(bond, o * u, i * j, bond_right)


def _absorb_core(mixed_RRXX: Tensor, core_LOIR: Tensor, weight_OO: Tensor | None) -> Tensor:
    """Absorb a core and its copy: (R, R', X, X') to (L, L', A, A')."""
    left, out, in_, right = core_LOIR.shape
    ins = mixed_RRXX.shape[2] // in_
    copy_ROIL = mirror(core_LOIR)
    if weight_OO is not None:
        copy_ROIL = torch.tensordot(copy_ROIL, weight_OO, dims=([1], [1])).permute(0, 3, 1, 2)
    # (A A' I R | R' I') times (R' I' | O L'), then (A A' L' | I R O) times the core.
    legs = mixed_RRXX.reshape(right, right, ins, in_, ins, in_).permute(2, 4, 3, 0, 1, 5)
    half = legs.reshape(-1, right * in_) @ copy_ROIL.transpose(1, 2).reshape(right * in_, -1)
    half = half.reshape(ins * ins, in_ * right * out, left).transpose(1, 2)
    done = half.reshape(ins * ins * left, -1) @ core_LOIR.permute(2, 3, 1, 0).reshape(-1, left)
    return done.reshape(ins, ins, left, left).permute(3, 2, 0, 1).contiguous()


def _close_gram(gram_LLAA: Tensor, mixed_RRXX: Tensor) -> Tensor:
    """Contract the outer ins: (L, I, R, L', I', R')."""
    left, ins = gram_LLAA.shape[0], gram_LLAA.shape[2]
    right, in_ = mixed_RRXX.shape[0], mixed_RRXX.shape[2] // ins
    legs = mixed_RRXX.reshape(right, right, ins, in_, ins, in_).permute(2, 4, 3, 0, 5, 1)
    closed = gram_LLAA.reshape(left * left, -1) @ legs.reshape(ins * ins, -1)
    return closed.reshape(left, left, in_, right, in_, right).permute(0, 2, 3, 1, 4, 5)


def _close_linear(block_PAL: Tensor, linear_PXR: Tensor) -> Tensor:
    """Contract the outer outs and ins: (L, O, I, R)."""
    outs, ins, left = block_PAL.shape
    out, in_ = linear_PXR.shape[0] // outs, linear_PXR.shape[1] // ins
    right = linear_PXR.shape[2]
    legs = linear_PXR.reshape(outs, out, ins, in_, right).transpose(1, 2)
    closed = block_PAL.reshape(outs * ins, left).mT @ legs.reshape(outs * ins, -1)
    return closed.reshape(left, out, in_, right)


def _trace_bonds(gram_LLAA: Tensor) -> Tensor:
    return torch.diagonal(gram_LLAA, dim1=0, dim2=1).sum(-1)


def _square(legs: Tensor) -> Tensor:
    size = round(legs.numel() ** 0.5)
    return legs.reshape(size, size)


def _close_outer(gram_LLAA: Tensor, traced_AIAI: Tensor) -> Tensor:
    """Contract the outer ins with a matrix that has no inner bond any more: (L, I, L', I')."""
    left, ins = gram_LLAA.shape[0], gram_LLAA.shape[2]
    in_ = traced_AIAI.shape[1]
    legs = traced_AIAI.transpose(1, 2).reshape(ins * ins, -1)
    closed = gram_LLAA.reshape(-1, ins * ins) @ legs
    return closed.reshape(left, left, in_, in_).transpose(1, 2)


def _marginals(
    gram_LLAA: Tensor, mixed_RRXX: Tensor, outer_in: int, inner_in: int
) -> tuple[Tensor, Tensor]:
    """Partial traces (L, I, L', I') and (I, R, I', R') of the Gram matrix of open legs."""
    ins, right = gram_LLAA.shape[2], mixed_RRXX.shape[0]
    shape = (ins, outer_in, inner_in)
    traced = _trace_bonds(mixed_RRXX).reshape(*shape, *shape)
    outer = _close_outer(gram_LLAA, torch.diagonal(traced, dim1=2, dim2=5).sum(-1))
    legs = mixed_RRXX.reshape(right, right, *shape, *shape)
    legs = torch.diagonal(legs, dim1=3, dim2=6).sum(-1).transpose(3, 4)  # R R' A A' I I'
    legs = legs.reshape(right * right, ins * ins, -1).transpose(1, 2)
    inner = legs @ _trace_bonds(gram_LLAA).reshape(-1)
    return outer, inner.reshape(right, right, inner_in, inner_in).permute(2, 0, 3, 1)
