"""Numbers that users give, as Python's own: what is printed, compared or stored as JSON is plain.

NumPy's and torch's scalars count as what they hold. Booleans and text are no numbers anywhere.
"""

from collections.abc import Mapping
from math import nan
from operator import index
from typing import Any

from mpocompress.errors import DataError, MPOCompressError


def plain(value: Any) -> Any:
    """A scalar of NumPy or torch as Python's, which tells booleans from numbers; all else as it is.

    Both `float(numpy.True_)` and `operator.index(torch.tensor(True))` are 1.
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def as_integer(value: object) -> int | None:
    """What `operator.index` accepts, as an integer; None for all else, and for booleans."""
    value = plain(value)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return index(value)
    except TypeError:  # arrays have the method, whatever they hold
        return None


def as_number(value: object) -> float:
    """What has a float's value, as one; NaN, which passes no check, for all else and booleans."""
    value = plain(value)
    if isinstance(value, bool) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return nan
    try:
        return float(value)  # type: ignore[arg-type]  # of two protocols, one is there
    except (TypeError, ValueError, OverflowError):
        return nan


def as_count(name: str, value: object, least: int, error: type[MPOCompressError]) -> int:
    """An integer of at least `least`.

    Raises:
        MPOCompressError: of the class `error`, with the name and the value: it is none.
    """
    number = as_integer(value)
    if number is None or number < least:
        raise error(f"{name} {value!r}: it is an integer, {least} or more.")
    return number


def as_seed(seed: object) -> int:
    """A seed that torch's generators take.

    Raises:
        DataError: it is none.
    """
    number = as_integer(seed)
    if number is None or not -(2**63) <= number < 2**64:
        raise DataError(f"seed {seed!r}: it is an integer of 64 bits. Try 0.")
    return number


def put_plain(options: object, values: Mapping[str, object]) -> None:
    """Give a frozen object of options the values that its checks have read, in its own making."""
    for name, value in values.items():
        object.__setattr__(options, name, value)
