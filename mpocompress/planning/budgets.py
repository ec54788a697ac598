"""How small, how exact or how good: the one of five ways to ask that was taken."""

import re
from collections.abc import Mapping
from math import isfinite, nan
from typing import Any

from mpocompress.errors import PlanError
from mpocompress.scalars import as_number

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([a-z]*)")


def parse_size(size: float | str) -> int:
    """Bytes of a size such as 25000000, "25MB" (10^6 bytes) or "24MiB" (2^20 bytes).

    Raises:
        PlanError: not a size, or below one byte.
    """
    number = as_number(size)
    if isinstance(size, str) and (found := _SIZE.fullmatch(size.strip().lower())) is not None:
        number = float(found[1]) * _UNITS.get(found[2], nan)
    if not (isfinite(number) and number >= 1):
        raise PlanError(f"size {size!r} is not a number of bytes. Try 25MB, 500kB or 25000000.")
    return int(number)


def check_max_error(max_error: float) -> float:
    """A relative error, as a plain number.

    Raises:
        PlanError: not a number between 0 and 1.
    """
    error = as_number(max_error)
    if not 0 < error < 1:
        raise PlanError(
            f"max_error {max_error!r}: it is relative, norm of the difference over norm, above 0 "
            "and below 1. Try 0.05."
        )
    return error


def check_max_drop(max_drop: float) -> float:
    """A drop, as a plain number.

    Raises:
        PlanError: negative or not finite.
    """
    drop = as_number(max_drop)
    if not (isfinite(drop) and drop >= 0):
        raise PlanError(
            f"max_drop {max_drop!r}: it is the metric before minus the metric after, 0 or more. "
            "Try 0.01, one point of accuracy."
        )
    return drop


def the_one_given(ways: Mapping[str, Any]) -> str:
    """The name of the one way to ask that is not None.

    Raises:
        PlanError: none, or more than one.
    """
    given = [name for name, value in ways.items() if value is not None]
    if len(given) == 1:
        return given[0]
    names = list(ways)
    every = f"{', '.join(names[:-1])} and {names[-1]}"
    if not given:
        raise PlanError(f"how small is not said. Give one of {every}, such as {names[0]} 16.")
    said = " and ".join(f"{name} {ways[name]}" for name in given)
    raise PlanError(f"{said} both say how small; give one of {every}.")
