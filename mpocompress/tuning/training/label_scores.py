"""Accuracy and R² of outputs by their labels, batch by batch: the one definition of both."""

from dataclasses import dataclass, field
from math import nan
from typing import ClassVar

from torch import Tensor


@dataclass(slots=True)
class Accuracy:
    """Share of the labels that are the place of the largest output; those below 0 are left out.

    Attributes:
        right: labels that are.
        count: labels of 0 and more.
    """

    name: ClassVar[str] = "accuracy"
    right: int = 0
    count: int = 0

    def add(self, output: Tensor, labels: Tensor) -> None:
        """Judge a batch.

        Args:
            output: (..., classes).
            labels: class numbers (...), below `classes`.
        """
        found, labels = output.argmax(-1).cpu(), labels.cpu().long()
        judged = labels >= 0
        self.right += int((found == labels)[judged].sum())
        self.count += int(judged.sum())

    @property
    def value(self) -> float:
        """In [0, 1]; NaN if nothing was judged."""
        return self.right / self.count if self.count else nan


@dataclass(slots=True)
class RSquared:
    """1 less the squared error over that of the labels' mean, over all entries; at most 1.

    Attributes:
        squared_error: sum over the entries.
        spread: sum of the squared deviations of the labels from their mean; exactly 0 where all
            are equal.
        count: entries.

    Source: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", COMPSTAT 1982 (merging of batches).
    """

    name: ClassVar[str] = "R²"
    squared_error: float = 0.0
    spread: float = 0.0
    count: int = 0
    _first: float = field(default=0.0, init=False, repr=False)
    _mean: float = field(default=0.0, init=False, repr=False)  # of the labels, less the first one

    def add(self, output: Tensor, labels: Tensor) -> None:
        """Judge a batch, in float64.

        Args:
            output: any shape.
            labels: as many entries, in the same order.
        """
        if not labels.numel():
            return
        wide = labels.detach().cpu().double().reshape(-1)
        error = output.detach().cpu().double().reshape(-1) - wide
        self.squared_error += float(error.square().sum())
        # Sums of labels and of their squares would cancel where labels are far from 0. Less the
        # first one, labels that are all equal are 0 without rounding, and so is their spread.
        self._first = self._first if self.count else float(wide[0])
        moved = wide - self._first
        mean, added = float(moved.mean()), len(moved)
        whole = self.count + added
        step = mean - self._mean
        self.spread += float((moved - mean).square().sum())
        self.spread += step * step * self.count * added / whole
        self._mean += step * added / whole
        self.count = whole

    @property
    def mean_squared_error(self) -> float:
        """Over all entries; NaN if there are none."""
        return self.squared_error / self.count if self.count else nan

    @property
    def value(self) -> float:
        """At most 1; NaN where it is not defined: no labels, or all equal."""
        return 1 - self.squared_error / self.spread if self.spread else nan
