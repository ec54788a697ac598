"""Walks along plans for budgets that only a measurement can tell: pure, the measuring passed in."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log

# A relative distance from the ceiling that is close enough.
_CLOSE = 0.01


@dataclass(frozen=True, slots=True)
class Measured:
    """One plan that was tried.

    Attributes:
        size: numbers that its layers may take.
        figure: what was measured.
        fits: whether it is within the budget.
    """

    size: float
    figure: float
    fits: bool


def smallest_that_fits(
    least: float, most: float, measure: Callable[[float], Measured], *, steps: int = 7
) -> list[Measured]:
    """Bracket the smallest size that fits, halving the interval of its logarithm.

    What fits at one size need not fit at every larger one; of what was tried, all is returned.

    Args:
        least: smallest size there is, above 0.
        most: largest.
        measure: of a size.
        steps: measurements in all, at least 1; the largest size is measured if none else fits.

    Returns:
        What was measured, smallest size first.
    """
    tried: list[Measured] = []
    low, high = log(least), log(max(most, least))
    for _ in range(max(1, steps)):
        middle = (low + high) / 2
        found = measure(exp(middle))
        tried.append(found)
        low, high = (low, middle) if found.fits else (middle, high)
        if high - low < 0.01:
            break
    if not any(found.fits for found in tried):
        tried.append(measure(most))
    return sorted(tried, key=lambda found: found.size)


def approach_ceiling(
    start: float,
    least: float,
    most: float,
    measure: Callable[[float], float],
    ceiling: float,
    *,
    per_number: float,
    tries: int = 8,
) -> list[Measured]:
    """Find a size whose figure is below a ceiling and close to it.

    The figure is about linear in the size: each measurement corrects the next size.

    Args:
        start: size to begin with.
        least: smallest size.
        most: largest.
        measure: the figure of a size.
        ceiling: of the figure.
        per_number: by how much the figure rises with the size, to begin with.
        tries: measurements at most.

    Returns:
        All that was measured, smallest size first.
    """
    tried: dict[float, Measured] = {}
    size = min(max(start, least), most)
    while len(tried) < tries and size not in tried:
        figure = measure(size)
        tried[size] = Measured(size, figure, figure <= ceiling)
        if tried[size].fits and (figure >= (1 - _CLOSE) * ceiling or size >= most):
            break
        below = [known for known in tried.values() if known.fits]
        above = [known for known in tried.values() if not known.fits]
        # A quarter of what is close enough is left for steps that are coarse.
        aim = size + ((1 - _CLOSE / 4) * ceiling - figure) / per_number
        if below and above:
            low = max(known.size for known in below)
            high = min(known.size for known in above)
            if not low < aim < high:
                aim = (low + high) / 2
            if high - low < 1:
                break
        size = float(min(max(round(aim), least), most))
    return sorted(tried.values(), key=lambda known: known.size)
