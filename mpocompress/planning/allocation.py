"""Bond dimensions of many layers under one budget of stored numbers.

Uniform: every layer gets smaller by the same factor, as nearly as whole bond dimensions allow.

By sensitivity: bond dimensions go, one at a time, to the layer where the next one lowers the loss
most for what it costs. The gain of the r-th is its squared singular value in the metric of the
loss (inputs and gradients at the outputs), in which layers are comparable; in weight space, or in
the metric of the inputs alone, they are not, and the same rule was measured to be worse than
uniform. Gains are a second-order prediction at the dense model, and errors interact: a floor for
every layer keeps the rule from starving one that only looks unimportant while all others are exact.

A layer may also stay dense, if its share says so: one step beyond its largest bond dimension. By
sensitivity that step is taken from any bond dimension, where all that it gains, for all that it
costs, is more than what the next bond dimension gains for its cost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate
from typing import Any, TypeVar

from torch import Tensor

from mpocompress.errors import BudgetError

# Share of the uniform bond dimension that every layer keeps. On a sentence encoder floors of 25 and
# 50 % gave the same quality, no floor was worse. There is no cap: where uniform means bond
# dimension 1, a multiple of it shuts layers out that are best left (nearly) dense. Of 16 trained
# models at ratios of 2 to 20 a cap of 4 had 1.6 times the error in the mean, up to 3,000 times.
FLOOR = 0.25


Choice = TypeVar("Choice", int, tuple[int, ...])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Share:
    """One layer that takes part.

    Attributes:
        name: of the layer.
        dense: entries of its matrix.
        max_bond_dim: at which the layer no longer gets larger or more exact.
        stored: numbers that the layer takes at a bond dimension; rises strictly up to
            `max_bond_dim`.
        gains: float64, descending: by how much each further bond dimension lowers the loss, on one
            scale for all layers, also beyond `max_bond_dim`; None if that is not known.
        may_stay_dense: whether `max_bond_dim + 1`, which stands for dense, is among the choices.
        price: what a bond dimension (or `max_bond_dim + 1`) costs by the objective, such as seconds
            or multiply-adds; gains are weighed against it. None: the numbers that it stores.
    """

    name: str
    dense: int
    max_bond_dim: int
    stored: Callable[[int], int]
    gains: Tensor | None = None
    may_stay_dense: bool = False
    price: Callable[[int], float] | None = None

    @property
    def top(self) -> int:
        """The last choice: the largest bond dimension, or one more, which is dense."""
        return self.max_bond_dim + self.may_stay_dense

    def numbers(self, bond_dim: int) -> int:
        """Numbers that a choice takes."""
        return self.dense if bond_dim > self.max_bond_dim else self.stored(bond_dim)

    def cost(self, bond_dim: int) -> float:
        """What a choice costs by the objective."""
        return self.numbers(bond_dim) if self.price is None else self.price(bond_dim)

    def within(self, numbers: float) -> int:
        """The last choice that takes no more than so many numbers; 0 if none does."""
        if self.may_stay_dense and numbers >= self.dense:
            return self.top
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

    low, high = 0.0, 1.0 + max(share.numbers(share.top) / share.dense for share in shares)
    for _ in range(50):  # halves the interval to the precision of a double
        middle = (low + high) / 2
        low, high = (middle, high) if _total(shares, at(middle)) <= budget else (low, middle)
    bonds = at(low)

    def worst_off(index: int, bond: int) -> list[tuple[float, int]]:
        return [(shares[index].numbers(bond) / shares[index].dense, bond + 1)]

    return _fill(shares, bonds, budget, worst_off, [share.top for share in shares])


def allocate_by_sensitivity(
    shares: Sequence[Share], budget: int, *, floor: float = FLOOR
) -> list[int]:
    """Each further bond dimension where it lowers the loss most for its cost.

    Args:
        shares: the layers, all with `gains`.
        budget: numbers that all of them together may take.
        floor: share of the uniform bond dimension that every layer keeps.

    Returns:
        A bond dimension, at least 1, for each layer.

    Raises:
        BudgetError: it is less than what bond dimension 1 takes everywhere.
    """
    uniform = allocate_uniform(shares, budget)
    bonds = [max(1, int(floor * bond)) for bond in uniform]
    gains = [[] if share.gains is None else share.gains.tolist() for share in shares]
    # Gains beyond each bond dimension, summed from the small ones up.
    beyond = [[*accumulate(reversed(values), initial=0.0)][::-1] for values in gains]

    def rate(index: int, bond: int, step: int) -> float:
        """Loss that a step wins for what it costs, negative: the queue takes the smallest first."""
        share = shares[index]
        cost = share.cost(step) - share.cost(bond)
        if step > share.max_bond_dim:
            gain: float = beyond[index][min(bond, len(gains[index]))]
        else:
            gain = gains[index][bond] if bond < len(gains[index]) else 0.0
        if cost <= 0:  # as fast or as small, and more exact
            return float("-inf")
        return -gain / cost

    def steps(index: int, bond: int) -> list[tuple[float, int]]:
        share = shares[index]
        ways = {bond + 1, share.top} if share.may_stay_dense else {bond + 1}
        return [(rate(index, bond, step), step) for step in ways]

    return _fill(shares, bonds, budget, steps, [share.top for share in shares])


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
    return sum(share.numbers(bond) for share, bond in zip(shares, bonds, strict=True))


def _fill(
    shares: Sequence[Share],
    bonds: Sequence[int],
    budget: int,
    steps: Callable[[int, int], list[tuple[float, int]]],
    tops: Sequence[int],
) -> list[int]:
    """Raise bond dimensions step by step, smallest priority first, while they fit the budget.

    Args:
        shares: the layers.
        bonds: to begin with.
        budget: for all of them.
        steps: of a layer at a bond dimension: (priority, next choice).
        tops: the last choice of each layer.
    """

    def allowed(index: int, bond: int) -> list[tuple[float, int]]:
        return [found for found in steps(index, bond) if bond < found[1] <= tops[index]]

    return spend(
        bonds,
        budget - _total(shares, bonds),
        lambda index, bond: shares[index].numbers(bond),
        allowed,
    )


def spend(
    choices: Sequence[Choice],
    left: int,
    numbers: Callable[[int, Choice], int],
    steps: Callable[[int, Choice], Sequence[tuple[Any, Choice]]],
) -> list[Choice]:
    """Take steps, smallest priority first, while they fit what is left.

    A step that does not fit is passed over: another layer's, or a smaller one, may still fit.

    Args:
        choices: of each layer, to begin with.
        left: numbers that all of them together may take beyond that.
        numbers: that a layer takes with a choice.
        steps: of a layer from a choice: (priority, next choice).
    """
    choices = list(choices)
    queue: list[tuple[Any, int, Choice, Choice]] = []

    def offer(index: int) -> None:
        for priority, step in steps(index, choices[index]):
            heappush(queue, (priority, index, choices[index], step))

    for index in range(len(choices)):
        offer(index)
    while queue:
        _, index, choice, step = heappop(queue)
        cost = numbers(index, step) - numbers(index, choice)
        if choice != choices[index] or cost > left:
            continue
        choices[index], left = step, left - cost
        offer(index)
    return choices
