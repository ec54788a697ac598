"""Counted cost of a sweep, and the cut of the chain that makes it smallest.

Every count follows one product of `environment` or `local_solve`. With D_k the bonds, a sweep
costs about

* about 1/2 D² in² at the cut D, where C meets one half, and out * in * D for M;
* n² o * 2 to apply the Gram matrix of a core, n = left * in * right, and n³ / 6 to factorize it;

so for two sites and moderate bonds the metric dominates, for large bonds the Cholesky factors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from mpocompress.errors import LayoutError
from mpocompress.mpo.cores import expand_bond_dims
from mpocompress.mpo.layout import Layout


@dataclass(frozen=True, slots=True)
class SweepMacs:
    """Multiply-adds of one sweep of one-site updates, environments kept from the sweep before.

    Attributes:
        contractions: matrix products of the environments and of the Gram matrices.
        factorizations: Cholesky factors and triangular solves.
        extrapolation: measuring another chain in full, as a fit does with the one that it
            extrapolates to, once in two sweeps; no part of the sweep itself.
    """

    contractions: int
    factorizations: int
    extrapolation: int

    @property
    def total(self) -> int:
        """Those of the sweep."""
        return self.contractions + self.factorizations

    @property
    def in_fit(self) -> int:
        """Those of one sweep of a fit, half of what is extrapolated after two sweeps included."""
        return self.total + self.extrapolation // 2


@dataclass(frozen=True, slots=True)
class _Site:
    """A core of one half, with all outs and ins outside of it."""

    left: int
    out: int
    in_: int
    right: int
    outs: int
    ins: int

    @property
    def size(self) -> int:
        return self.left * self.in_ * self.right

    def inward(self) -> int:
        """Growing the block over this core, and its Gram matrix."""
        merge = self.outs * self.ins * self.left * self.out * self.in_ * self.right
        return merge + self.outs * self.out * (self.ins * self.in_ * self.right) ** 2

    def outward(self) -> int:
        """Absorbing this core and its copy into C, and into M."""
        first = self.ins**2 * (self.in_ * self.right) ** 2 * self.out * self.left
        second = self.ins**2 * self.left**2 * self.in_ * self.right * self.out
        return first + second + self.outs * self.ins * self.out * self.size

    def problem(self) -> int:
        """The Gram matrix and the right-hand side, and two products with the Gram matrix."""
        gram = self.left**2 * self.ins**2 * (self.in_ * self.right) ** 2
        rhs = self.outs * self.ins * self.out * self.size
        return gram + rhs + 2 * self.size**2 * self.out

    def solve(self) -> int:
        return self.size**3 // 6 + self.size**2 * self.out


def sweep_macs(
    layout: Layout, bond_dims: int | Sequence[int], *, cut: int | None = None
) -> SweepMacs:
    """Multiply-adds of a one-site sweep: the mean of one to the right and one to the left.

    Args:
        layout: at least two sites.
        bond_dims: one number for all bonds or one for each, clipped to what the layout carries.
        cut: bond at which C is divided; default: the cheapest.

    Raises:
        LayoutError: a single site has nothing to sweep.
        BondDimError: a bond dimension below 1, or the wrong number of them.
    """
    bonds = _bonds(layout, bond_dims)
    return _count(layout, bonds, cheapest_cut(layout, bonds) if cut is None else cut)


def cheapest_cut(layout: Layout, bond_dims: int | Sequence[int]) -> int:
    """The bond at which to divide C, so that a sweep costs the fewest multiply-adds.

    Raises:
        LayoutError: a single site has no bond.
        BondDimError: a bond dimension below 1, or the wrong number of them.
    """
    bonds = _bonds(layout, bond_dims)
    return min(range(len(bonds)), key=lambda cut: _count(layout, bonds, cut).total)


def _bonds(layout: Layout, bond_dims: int | Sequence[int]) -> tuple[int, ...]:
    if layout.num_sites < 2:
        raise LayoutError(f"layout {layout} has a single site; a sweep needs at least two.")
    expanded = expand_bond_dims(bond_dims, layout.num_sites - 1)
    return layout.clip([bond for bond in expanded if bond is not None])


def _half(pairs: Sequence[tuple[int, int]], bonds: Sequence[int]) -> list[_Site]:
    outs = [1, *accumulate((out for out, _ in pairs), mul)]
    ins = [1, *accumulate((in_ for _, in_ in pairs), mul)]
    return [
        _Site(bonds[k], out, in_, bonds[k + 1], outs[k], ins[k])
        for k, (out, in_) in enumerate(pairs)
    ]


def _count(layout: Layout, bonds: Sequence[int], cut: int) -> SweepMacs:
    chain = (1, *bonds, 1)
    halves = (
        _half(layout.pairs[: cut + 1], chain[: cut + 2]),
        _half(layout.pairs[cut + 1 :][::-1], chain[cut + 1 :][::-1]),
    )
    bond = chain[cut + 1]
    # Over two sweeps each half is left and entered once, and each of its sites solved twice, but
    # for the outermost: there the sweep turns.
    other, folded = sorted(half[-1].ins * half[-1].in_ for half in halves)
    entering = bond**2 * (folded * (folded + 1) // 2) * other**2
    entering += layout.out_features * layout.in_features * bond
    contractions, factorizations = entering, 0
    for half in halves:
        environments = sum(site.inward() for site in half)
        environments += sum(site.outward() for site in half[1:])
        solves = [half[0], *(site for site in half[1:] for _ in range(2))]
        environments += sum(site.problem() for site in solves)
        factorizations += sum(site.solve() for site in solves)
        contractions += environments // 2
    # The objective of a chain is that of its first core, all others absorbed.
    (first, *more), others = halves
    whole = entering + first.problem() - first.size**2 * first.out
    whole += sum(site.inward() for site in others) + sum(site.outward() for site in more)
    return SweepMacs(contractions, factorizations // 2, whole)
