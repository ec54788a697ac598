"""Budgets that only a measurement can tell, and how one was met.

Bytes of a file, errors of outputs, a drop of a metric: each is met by trying plans along one line,
from compact to exact, and measuring what comes out.
"""

from dataclasses import dataclass
from typing import Literal

from mpocompress.api.job import Job
from mpocompress.planning import Plan


def rounded_up(value: float) -> str:
    """A figure in four digits that is no less: who asks for it gets it."""
    return f"{value * (1 + 5e-4):.4g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Met:
    """How a budget was met.

    Attributes:
        target: "max_size", "max_error" or "max_drop".
        asked: the ceiling.
        reached: what was measured.
        what: of what, in words.
        where: on what it was measured, in words.
        trials: plans that were built and measured.
    """

    target: Literal["max_size", "max_error", "max_drop"]
    asked: float
    reached: float
    what: str
    where: str
    trials: int


def with_setting(job: Job, plan: Plan, name: str, value: float) -> Plan:
    """The plan with what is expected of it, and with what was asked for among its settings."""
    return job.predicted(plan.model_copy(update={"settings": {name: value, **plan.settings}}))
