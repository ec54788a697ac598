"""Quantities of a report, each before and after: sizes, totals and their ratios."""

import math
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Ratios are stored beside the two numbers that they come from; a reader may have rounded them.
_RATIO_RTOL = 1e-6

# Numbers that can be drawn, and multiplied or divided by each other a few times.
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e300)]
Nats = Annotated[float, Field(ge=0, le=600)]


class Frozen(BaseModel):
    """A part of the schema: closed, unchangeable, and without NaN or infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def without_none(found: dict[str, Any], *names: str) -> dict[str, Any]:
    """Without entries that say nothing: such reports read as they did before there were any."""
    return {key: value for key, value in found.items() if key not in names or value is not None}


class Size(Frozen):
    """One quantity before (dense) and after (compressed)."""

    dense: NonNegativeInt
    compressed: NonNegativeInt

    @property
    def ratio(self) -> float:
        """Compression ratio, above 1 is smaller; 1 where there is nothing to count."""
        return self.dense / self.compressed if self.compressed else 1.0


class Total(Frozen):
    """One quantity before and after, summed up, with the compression ratio (above 1 is smaller)."""

    dense: NonNegativeInt
    compressed: NonNegativeInt
    ratio: NonNegativeFloat

    @classmethod
    def of(cls, dense: int, compressed: int) -> Self:
        """Make a total and its ratio; the ratio of nothing to nothing is 1."""
        size = Size(dense=dense, compressed=compressed)
        return cls(dense=dense, compressed=compressed, ratio=size.ratio)

    @model_validator(mode="after")
    def _check_ratio(self) -> Self:
        if self.compressed == 0 and self.dense > 0:
            raise ValueError(f"{self.dense} before and 0 after: nothing compresses to nothing")
        expected = self.dense / self.compressed if self.compressed else 1.0
        if not math.isclose(self.ratio, expected, rel_tol=_RATIO_RTOL):
            raise ValueError(f"ratio {self.ratio} is not dense / compressed = {expected}")
        return self


class Scope(Frozen):
    """A total for the whole model, and one for only the layers that were compressed."""

    model: Total
    layers: Total


class Totals(Frozen):
    """Before and after: parameters, stored tensor bytes, multiply-adds for one row per layer."""

    parameters: Scope
    bytes: Scope
    macs: Scope
