"""From an inventory of weights to a plan: bond dimensions that meet a ratio of parameters."""

from collections.abc import Sequence
from math import isfinite
from typing import Literal, get_args

from mpocompress.errors import BudgetError, PlanError
from mpocompress.planning.allocation import least_numbers
from mpocompress.planning.parts import Part
from mpocompress.planning.plan import Plan
from mpocompress.planning.sharing import Sharing
from mpocompress.scalars import as_number

Of = Literal["model", "layers"]
"""What a ratio counts: all parameters of the model, or those of the layers that get compressed."""


def check_ratio(ratio: float) -> float:
    """A ratio, as a plain number.

    Raises:
        PlanError: not a finite number above 1.
    """
    number = as_number(ratio)
    if not (isfinite(number) and number > 1):
        raise PlanError(f"ratio {ratio!r}: it is parameters before / after and above 1. Try 2.")
    return number


def check_of(of: str) -> None:
    """Refuse what a ratio cannot count.

    Raises:
        PlanError: with what it can.
    """
    if of not in get_args(Of):
        raise PlanError(f'of {of!r}: a ratio counts "model" or "layers".')


def plan_ratio(sharing: Sharing, ratio: float, *, of: Of = "model") -> Plan:
    """Plan bond dimensions that make the parameters `ratio` times fewer, or slightly more so.

    Args:
        sharing: the weights; for `of="layers"` without the choice to stay dense: a layer that does
            is not among those counted.
        ratio: parameters before / after, above 1; a ceiling for what is stored.
        of: "model" counts all parameters of the model, "layers" those of the compressed layers.

    Raises:
        PlanError: see `check_ratio` and `check_of`.
        BudgetError: it cannot be reached; the message says what can.
    """
    ratio = check_ratio(ratio)
    check_of(of)
    total = sharing.inventory.parameters

    def allowed(dense: int) -> float:
        return dense / ratio if of == "layers" else int(total / ratio) - (total - dense)

    def unreachable(parts: Sequence[Part]) -> BudgetError:
        dense = sum(part.share.dense for part in parts)
        least = least_numbers([part.share for part in parts])
        before = dense if of == "layers" else total
        reachable = before / (before - dense + least)
        return BudgetError(
            f"a ratio of {ratio:g} of the {of} cannot be met: with bond dimension 1 everywhere it "
            f"is {reachable:.4g}, since {before - dense} parameters stay as they are. Ask for "
            'less, count the compressed layers only (of="layers", --of layers), or force layouts '
            "of more sites."
        )

    found = sharing.at(allowed, f"a ratio of {ratio:g} of the {of}", unreachable=unreachable)
    return found.model_copy(update={"settings": {"ratio": ratio, "of": of, **found.settings}})
