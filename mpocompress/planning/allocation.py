"""Bond dimensions of many layers under one budget of stored numbers.

Uniform: every layer gets smaller by the same factor, as nearly as whole bond dimensions allow.

By sensitivity: bond dimensions go, one at a time, to the layer where the next one lowers the loss
most for what it costs. The gain of the r-th is its squared singular value in the metric of the
loss (inputs and gradients at the outputs), in which layers are comparable; in weight space, or in
the metric of the inputs alone, they are not, and the same rule was measured to be worse than
uniform. Gains are a second-order prediction at the dense model, and errors interact: a floor for
every layer keeps the rule from starving one that only looks unimportant while all others are exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from torch import Tensor

from mpocompress.errors import BudgetError

# Share of the uniform bond dimension that every layer keeps, and the multiple of it that none
# exceeds. On a sentence encoder floors of 25 and 50 % gave the same quality, no floor was worse.
FLOOR = 0.25
CAP = 4.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Share:
    """One layer that takes part.

    Attributes:
        name: of the layer.
        dense: entries of its matrix.
        max_bond_dim: at which the layer no longer gets larger or more exact.
        stored: numbers that the layer takes at a bond dimension; rises strictly up to
            `max_bond_dim`.
        gains: (max_bond_dim,) float64, descending: by how much each further bond dimension lowers
            the loss, on one scale for all layers; None if that is not known.
    """

    name: str
    dense: int
    max_bond_dim: int
    stored: Callable[[int], int]
    gains: Tensor | None = None

    def within(self, numbers: float) -> int:
        """The largest bond dimension that takes no more than so many numbers; 0 if none does."""
        low, high = 0, self.max_bond_dim
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.stored(middle) <= numbers else (low, middle - 1)
        return low


def allocate_uniform(shares: Sequence[Share], budget: int) -> list[int]:
    """The same ratio for all layers; what whole bond dimensions leave over goes to the worst off.

    Args:
        shares: the layers.
        budget: numbers that all of them together may take.

    Returns:
        A bond dimension, at least 1, for each layer.

    Raises:
        BudgetError: it is less than what bond dimension 1 takes everywhere.
    """
    _check_budget(shares, budget)

    def at(fraction: float) -> list[int]:
        return [max(1, share.within(fraction * share.dense)) for share in shares]

    low, high = 0.0, 1.0 + max(share.stored(share.max_bond_dim) / share.dense for share in shares)
    for _ in range(50):  # halves the interval to the precision of a double
        middle = (low + high) / 2
        low, high = (middle, high) if _total(shares, at(middle)) <= budget else (low, middle)
    bonds = at(low)

    def worst_off(index: int, bond: int) -> float:
        return shares[index].stored(bond) / shares[index].dense

    return _fill(shares, bonds, budget, worst_off, [share.max_bond_dim for share in shares])


def allocate_by_sensitivity(
    shares: Sequence[Share], budget: int, *, floor: float = FLOOR, cap: float = CAP
) -> list[int]:
    """Each further bond dimension where it lowers the loss most for its cost.

    Args:
        shares: the layers, all with `gains`.
        budget: numbers that all of them together may take.
        floor: share of the uniform bond dimension that every layer keeps.
        cap: multiple of it that no layer exceeds, unless nothing else is left to spend on.

    Returns:
        A bond dimension, at least 1, for each layer.

    Raises:
        BudgetError: it is less than what bond dimension 1 takes everywhere.
    """
    uniform = allocate_uniform(shares, budget)
    bonds = [max(1, int(floor * bond)) for bond in uniform]
    gains = [[] if share.gains is None else share.gains.tolist() for share in shares]

    def loss_per_number(index: int, bond: int) -> float:
        share = shares[index]
        cost = share.stored(bond + 1) - share.stored(bond)
        gain: float = gains[index][bond] if bond < len(gains[index]) else 0.0
        if cost == 0:  # clipped at the layout's maximum
            return float("-inf")
        return -gain / cost  # the queue takes the smallest first

    tops = [
        min(share.max_bond_dim, max(1, int(cap * bond)))
        for share, bond in zip(shares, uniform, strict=True)
    ]
    bonds = _fill(shares, bonds, budget, loss_per_number, tops)
    return _fill(shares, bonds, budget, loss_per_number, [share.max_bond_dim for share in shares])


def least_numbers(shares: Sequence[Share]) -> int:
    """What all layers together take at bond dimension 1."""
    return _total(shares, [1] * len(shares))


def _check_budget(shares: Sequence[Share], budget: int) -> None:
    least = least_numbers(shares)
    if least > budget:
        dense = sum(share.dense for share in shares)
        raise BudgetError(
            f"a budget of {budget} parameters for {len(shares)} layers of {dense} cannot be met: "
            f"at bond dimension 1 they take {least}, a ratio of {dense / least:.4g}. Ask for "
            "less, force layouts of more sites (sites=4), or exclude small layers."
        )


def _total(shares: Sequence[Share], bonds: Sequence[int]) -> int:
    return sum(share.stored(bond) for share, bond in zip(shares, bonds, strict=True))


def _fill(
    shares: Sequence[Share],
    bonds: Sequence[int],
    budget: int,
    priority: Callable[[int, int], float],
    tops: Sequence[int],
) -> list[int]:
    """Raise bond dimensions one by one, smallest priority first, while they fit the budget.

    A layer whose next bond dimension does not fit is passed over: a cheaper one may still fit.
    """
    bonds = list(bonds)
    left = budget - _total(shares, bonds)
    queue = [
        (priority(index, bond), index) for index, bond in enumerate(bonds) if bond < tops[index]
    ]
    heapify(queue)
    while queue:
        _, index = heappop(queue)
        bond = bonds[index]
        cost = shares[index].stored(bond + 1) - shares[index].stored(bond)
        if cost > left:
            continue
        bonds[index], left = bond + 1, left - cost
        if bond + 1 < tops[index]:
            heappush(queue, (priority(index, bond + 1), index))
    return bonds
