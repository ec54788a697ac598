"""How far the outputs of two models are apart: running figures over batches, output by output."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Protocol

import numpy as np
import torch

from mpocompress.errors import DataError
from mpocompress.scalars import as_number
from mpocompress.tuning import Accuracy, RSquared


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputAgreement:
    """One output of two models, over all samples.

    Attributes:
        max_abs_difference: of any number; infinite where one side is NaN or infinite alone.
        max_relative_difference: `max|a - b| / max|b|`; integers and texts must be equal: 1 or more
            if not.
        relative_error: `norm(a - b) / norm(b)`, Frobenius: what is lost on the whole.
        cosine: mean over all vectors (the last axis) of the cosine between both; None for numbers,
            and for outputs that are no floats.
        argmax_agreement: share of vectors whose largest entry is at the same place; likewise.
        vectors: that were compared.
    """

    max_abs_difference: float
    max_relative_difference: float
    relative_error: float
    cosine: float | None
    argmax_agreement: float | None
    vectors: int


def check_tolerance(tolerance: float) -> float:
    """A tolerance of a relative difference, as a plain number.

    Raises:
        DataError: below 0, infinite or NaN.
    """
    number = as_number(tolerance)
    if not (isfinite(number) and number >= 0):
        raise DataError(f"tolerance {tolerance}: it is a relative difference, 0 or more. Try 1e-4.")
    return number


class Counted(Protocol):
    """Figures of an output: its `numbers`, and how many of them are `finite` where expected."""

    numbers: int
    finite: int


def nothing_compared(outputs: Mapping[str, Counted]) -> str | None:
    """Say that a comparison says nothing, since no expected number is finite; None if it does.

    Outputs without any numbers, as of empty batches, do agree.

    Args:
        outputs: figures over all batches, by name.
    """
    found = outputs.values()
    if any(output.finite for output in found) or not any(output.numbers for output in found):
        return None
    return (
        f"nothing was compared: {', '.join(map(repr, outputs))} "
        f"{'is' if len(outputs) == 1 else 'are'} NaN or infinite throughout"
    )


def num_infinite(array: np.ndarray) -> int:
    """How many numbers are NaN or infinite."""
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"):
        return 0
    return int((~np.isfinite(array.astype(np.float64))).sum())


def differences(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Absolute differences; 0 for equal infinities and NaN on both sides, else infinite.

    Integers differ by 1 at least where they are not equal, and texts by 1.
    """
    if not (has_numbers(actual) and has_numbers(expected)):
        return np.asarray(actual.astype(object) != expected.astype(object)).astype(np.float64)
    unequal: np.ndarray | None = None
    if not np.issubdtype(expected.dtype, np.floating):
        unequal = np.asarray(actual != expected)
        actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.asarray(np.abs(actual - expected))  # also of scalars
    special = ~np.isfinite(difference)
    if special.any():
        ours, theirs = actual[special], expected[special]
        equal = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
        difference[special] = np.where(equal, 0, np.inf)
    return difference if unequal is None else np.maximum(difference, unequal)


def has_numbers(array: np.ndarray) -> bool:
    """Whether an array holds no texts."""
    return array.dtype.kind not in "OSU"


@dataclass(slots=True)
class _Sums:
    max_difference: float = 0.0
    max_value: float = 0.0
    squared_difference: float = 0.0
    squared_value: float = 0.0
    cosines: float = 0.0
    argmax_equal: int = 0
    vectors: int = 0
    numbers: int = 0
    finite: int = 0
    floats: bool = True
    wide: bool = False  # whether there is more than one entry to a vector

    def add(self, actual: np.ndarray, expected: np.ndarray) -> None:
        self.floats = bool(np.issubdtype(expected.dtype, np.floating))
        difference = differences(actual, expected).astype(np.float64)
        finite = np.ones(expected.shape)
        if has_numbers(expected):
            finite = expected[np.isfinite(expected)].astype(np.float64)
        self.max_difference = max(self.max_difference, float(difference.max(initial=0)))
        self.max_value = max(self.max_value, float(np.abs(finite).max(initial=0)))
        self.squared_difference += float((difference**2).sum())
        self.squared_value += float((finite**2).sum())
        self.numbers += expected.size
        self.finite += finite.size
        if not self.floats or expected.ndim == 0 or expected.shape[-1] < 2 or not expected.size:
            self.vectors += int(np.prod(expected.shape[:-1], dtype=int))
            return
        self.wide = True
        ours = actual.reshape(-1, actual.shape[-1]).astype(np.float64)
        theirs = expected.reshape(-1, expected.shape[-1]).astype(np.float64)
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = np.where(norms > 0, (ours * theirs).sum(1) / norms, 1.0)
        self.cosines += float(np.nan_to_num(cosines).sum())
        self.argmax_equal += int((ours.argmax(1) == theirs.argmax(1)).sum())
        self.vectors += len(ours)

    def result(self) -> OutputAgreement:
        relative = _ratio(self.max_difference, self.max_value)
        if not self.floats and relative:
            relative = max(relative, 1.0)
        compared = self.wide and self.vectors
        return OutputAgreement(
            max_abs_difference=self.max_difference,
            max_relative_difference=relative,
            relative_error=_ratio(self.squared_difference, self.squared_value) ** 0.5,
            cosine=self.cosines / self.vectors if compared else None,
            argmax_agreement=self.argmax_equal / self.vectors if compared else None,
            vectors=self.vectors,
        )


def _ratio(part: float, whole: float) -> float:
    if not part:
        return 0.0
    return part / whole if whole else float("inf")


@dataclass(slots=True)
class Agreement:
    """Running figures over batches; nothing is kept of the batches themselves."""

    _sums: dict[str, _Sums] = field(default_factory=dict)

    def add(
        self,
        actual: Mapping[str, np.ndarray],
        expected: Mapping[str, np.ndarray],
        keep: np.ndarray | None = None,
    ) -> None:
        """Compare one batch.

        Args:
            actual: outputs by name, with the shapes of the expected ones.
            expected: what they are held against.
            keep: boolean (batch, sequence): positions that are no padding. Only they are compared
                in outputs (batch, sequence, ...).
        """
        for name, theirs in expected.items():
            ours = actual[name]
            if keep is not None and theirs.ndim >= 3 and theirs.shape[:2] == keep.shape:
                ours, theirs = ours[keep], theirs[keep]
            self._sums.setdefault(name, _Sums()).add(ours, theirs)

    @property
    def nothing_compared(self) -> str | None:
        """That no expected number is finite, in words; None if some are, or there are none."""
        return nothing_compared(self._sums)

    def result(self) -> dict[str, OutputAgreement]:
        """The figures of each output."""
        return {name: sums.result() for name, sums in self._sums.items()}


@dataclass(slots=True)
class LabelScore:
    """Accuracy or R² of an output, as budgets and training have them, over batches.

    Integer labels, one for each vector of the first output that has them so, count as classes
    (those below 0 are left out); floating labels of an output's shape are targets.

    Attributes:
        output: that the labels belong to; None if no labels fitted so far.
        score: of it.
    """

    output: str | None = None
    score: Accuracy | RSquared | None = None

    def add(self, outputs: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
        """Score one batch; labels that fit no output are ignored.

        Raises:
            DataError: labels are classes that the output has no columns for, or of another kind
                than in the batches before.
        """
        narrow: list[str] = []
        for name, values in outputs.items():
            if self.output not in (None, name) or not np.issubdtype(values.dtype, np.floating):
                continue
            if np.issubdtype(labels.dtype, np.integer) and values.shape[:-1] == labels.shape:
                if labels.size and labels.max() >= values.shape[-1]:
                    narrow.append(f"{name!r} has {values.shape[-1]}")
                    continue
                self._add(name, Accuracy, values, labels)
                return
            if np.issubdtype(labels.dtype, np.floating) and values.size == labels.size:
                self._add(name, RSquared, values, labels)
                return
        if narrow:
            raise DataError(
                f"label {labels.max()} is a class that no output has a column for: "
                f"{', '.join(narrow)}. Count classes from 0; labels below 0 are left out."
            )

    def _add(
        self,
        name: str,
        kind: type[Accuracy] | type[RSquared],
        values: np.ndarray,
        labels: np.ndarray,
    ) -> None:
        if self.score is None:
            self.output, self.score = name, kind()
        if not isinstance(self.score, kind):
            raise DataError("some batches have whole numbers as labels, others floating ones.")
        self.score.add(
            torch.from_numpy(np.ascontiguousarray(values)),
            torch.from_numpy(np.ascontiguousarray(labels)),
        )

    @property
    def judged(self) -> int:
        """Labels that were."""
        return 0 if self.score is None else self.score.count

    @property
    def measure(self) -> str | None:
        """What `value` is: "accuracy" or "R²"; None if no labels fitted."""
        return None if self.score is None else self.score.name

    def value(self) -> float | None:
        """Accuracy or R², the higher the better; None where it is not defined.

        That is: no labels fitted, all are left out or, for R², all are equal.
        """
        if isinstance(self.score, RSquared) and not self.score.spread:
            return None
        return self.score.value if self.score is not None and self.score.count else None

    def mean_squared_error(self) -> float | None:
        """Over all entries, for R²; else None."""
        return self.score.mean_squared_error if isinstance(self.score, RSquared) else None
