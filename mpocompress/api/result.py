"""What `compress` returns, and where the time went."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from mpocompress.planning import Plan
from mpocompress.report import CompressionReport


@dataclass(kw_only=True, slots=True, eq=False)
class CompressionResult:
    """What `compress` returns.

    Attributes:
        model: a new module with MPO layers inside; same call signature, trainable.
        report: what was measured; `sweep` and `distill`, which change the model in place, replace
            it by the report of what the model is then.
        plan: what was executed.
    """

    model: nn.Module
    report: CompressionReport
    plan: Plan


class Clock:
    """Wall time by stage, in seconds."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as part of `stage`."""
        start = time.perf_counter()
        yield
        self.add({stage: time.perf_counter() - start})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add times that were taken elsewhere, but for their total."""
        for stage, taken in seconds.items():
            if stage != "total":
                self._seconds[stage] = self._seconds.get(stage, 0.0) + taken

    def total(self) -> dict[str, float]:
        """All stages, and "total"."""
        return {**self._seconds, "total": sum(self._seconds.values())}
