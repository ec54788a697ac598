"""Second moments of activations: streaming, additive, respecting padding."""

# Shape suffixes: N rows, I input features, J features of the other variable.

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpocompress.errors import DataError, PathsDifferError

# Products of so many rows are formed in float32 and summed in float64: the rounding of a sum then
# does not grow with the amount of data, at the speed of a float32 product.
_CHUNK = 4096
# Columns at once of the moment of x with itself, of which the upper triangle is enough.
_BLOCK = 128
# A moment of so many features takes half a GB; larger ones (of a vocabulary) are not collected.
MAX_FEATURES = 8192


class CrossMoment:
    """Sums of x y^T over rows, with the sums of x and y; counts rows.

    Both are shifted by the mean of the first rows that come, so that a covariance is not the small
    difference of two large moments. Additive: moments of parts of the data can be merged.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._sums: _Sums | None = None

    def add(self, left_NI: Tensor, right_NJ: Tensor) -> None:
        """Add the rows of two activations.

        Raises:
            DataError: NaN or Inf in a product.
        """
        own = left_NI is right_NJ
        left_NI, right_NJ = left_NI.detach(), right_NJ.detach()
        for left_nI, right_nJ in zip(left_NI.split(_CHUNK), right_NJ.split(_CHUNK), strict=True):
            if left_nI.shape[0] == 0:
                continue
            left_nI, right_nJ = widened(left_nI), widened(right_nJ)
            if self._sums is None:
                self._sums = _Sums.around(left_nI.mean(0).double(), right_nJ.mean(0).double())
            sums = self._sums
            left_nI = left_nI - sums.left_shift_I.to(left_nI.dtype)
            if own and sums.symmetric:
                sums.add_own(left_nI)
            else:
                sums.add(left_nI, right_nJ - sums.right_shift_J.to(right_nJ.dtype))
            self.rows += left_nI.shape[0]
        if self._sums is not None and not self._sums.is_finite():
            raise DataError("activations with NaN or Inf; check the data and the model.")

    @property
    def features(self) -> int:
        """Of the wider of x and y; 0 before any rows were seen."""
        return 0 if self._sums is None else max(self._sums.product_IJ.shape)

    def empty_like(self) -> "CrossMoment":
        """One that has seen nothing, with the same shifts: merged into this one, it costs least."""
        empty = CrossMoment()
        if self._sums is not None:
            empty._sums = _Sums.around(self._sums.left_shift_I, self._sums.right_shift_J)
        return empty

    def merge(self, other: "CrossMoment") -> None:
        """Add what another one has seen."""
        if other._sums is None:
            return
        if self._sums is None:
            self.rows, self._sums = other.rows, other._sums.copy()
            return
        mine, theirs = self._sums, other._sums
        self.rows += other.rows
        if mine.symmetric and theirs.symmetric:
            mine.upper_only |= theirs.upper_only
        else:
            mine.complete()
            theirs.complete()
            mine.symmetric = False
        if mine.left_shift_I is theirs.left_shift_I and mine.right_shift_J is theirs.right_shift_J:
            mine.product_IJ += theirs.product_IJ
            mine.left_I += theirs.left_I
            mine.right_J += theirs.right_J
            return
        left_I = theirs.left_shift_I - mine.left_shift_I
        right_J = theirs.right_shift_J - mine.right_shift_J
        mine.product_IJ += (
            theirs.product_IJ
            + left_I[:, None] * theirs.right_J
            + theirs.left_I[:, None] * right_J
            + other.rows * left_I[:, None] * right_J
        )
        mine.left_I += theirs.left_I + other.rows * left_I
        mine.right_J += theirs.right_J + other.rows * right_J

    def merge_zeros(self, other: "CrossMoment") -> None:
        """Add rows of zeros for x, with the y of what another one has seen."""
        if self._sums is None or other._sums is None:
            return
        mine, theirs = self._sums, other._sums
        zeros = CrossMoment()
        zeros.rows = other.rows
        zeros._sums = _Sums(
            torch.zeros_like(mine.left_shift_I),
            theirs.right_shift_J,
            torch.zeros_like(mine.product_IJ),
            torch.zeros_like(mine.left_I),
            theirs.right_J,
            symmetric=False,
        )
        self.merge(zeros)

    def scaled_to(self, rows: int) -> "CrossMoment":
        """One with the same means, of so many rows."""
        scaled = CrossMoment()
        if self._sums is not None and rows > 0:
            scaled.rows, scaled._sums = rows, self._sums.copy()
            scaled._sums.scale_(rows / self.rows)
        return scaled

    @classmethod
    def sum_of(cls, parts: Iterable["CrossMoment"]) -> "CrossMoment":
        """One that has seen what the parts have, which stay as they are."""
        total = cls()
        for part in parts:
            total.merge(part)
        return total

    def mean(self, *, centered: bool) -> tuple[Tensor, Tensor, Tensor]:
        """E[x y^T] (I, J), E[x] (I,), E[y] (J,) in float64; the product without the means if asked.

        Raises:
            DataError: no rows were seen.
        """
        if self._sums is None:
            raise PathsDifferError(
                "no rows of activations were seen: the data is empty, or its mask marks everything "
                "as padding."
            )
        sums = self._sums
        sums.complete()
        left_I, right_J = sums.left_I / self.rows, sums.right_J / self.rows
        product_IJ = (sums.product_IJ / self.rows).addr_(left_I, right_J, alpha=-1)
        left_I, right_J = left_I + sums.left_shift_I, right_J + sums.right_shift_J
        if not centered:
            product_IJ.addr_(left_I, right_J)
        return product_IJ, left_I, right_J


@dataclass(slots=True)
class _Sums:
    """Sums over rows of x - s and y - t and of their product; s and t are the shifts, float64.

    Attributes:
        symmetric: the product is of x with itself.
        upper_only: its lower triangle is not up to date, and is made from the upper one when all of
            it is asked for.
    """

    left_shift_I: Tensor
    right_shift_J: Tensor
    product_IJ: Tensor
    left_I: Tensor
    right_J: Tensor
    symmetric: bool
    upper_only: bool = False

    @classmethod
    def around(cls, left_shift_I: Tensor, right_shift_J: Tensor) -> "_Sums":
        own = left_shift_I is right_shift_J or torch.equal(left_shift_I, right_shift_J)
        if own:
            right_shift_J = left_shift_I
        return cls(
            left_shift_I,
            right_shift_J,
            left_shift_I.new_zeros(len(left_shift_I), len(right_shift_J)),
            torch.zeros_like(left_shift_I),
            torch.zeros_like(right_shift_J),
            symmetric=own,
        )

    def copy(self) -> "_Sums":
        """One to add to; shifts are never changed, and stay the same objects."""
        sums = (self.product_IJ.clone(), self.left_I.clone(), self.right_J.clone())
        shifts = (self.left_shift_I, self.right_shift_J)
        return _Sums(*shifts, *sums, self.symmetric, self.upper_only)

    def scale_(self, factor: float) -> None:
        """As if every row had come so many times."""
        for total in (self.product_IJ, self.left_I, self.right_J):
            total *= factor

    def add(self, left_nI: Tensor, right_nJ: Tensor) -> None:
        """Rows that are shifted."""
        self.complete()
        self.symmetric = False
        self.product_IJ += left_nI.mT @ right_nJ
        self.left_I += left_nI.sum(0).double()
        self.right_J += right_nJ.sum(0).double()

    def add_own(self, rows_nI: Tensor) -> None:
        """Rows that are shifted, with themselves."""
        features = rows_nI.shape[1]
        for start in range(0, features, _BLOCK):
            block_ni = rows_nI[:, start : start + _BLOCK]
            self.product_IJ[start : start + _BLOCK, start:] += block_ni.mT @ rows_nI[:, start:]
        self.upper_only = True
        # As exact as the product; summing float32 in float64 takes ten times as long.
        sum_I = rows_nI.sum(0).double()
        self.left_I += sum_I
        self.right_J += sum_I

    def complete(self) -> None:
        """Fill in the lower triangle."""
        if self.upper_only:
            features = self.product_IJ.shape[0]
            for start in range(0, features, _BLOCK):
                end = min(start + _BLOCK, features)
                on_diagonal = self.product_IJ[start:end, start:end]
                on_diagonal.copy_(on_diagonal.triu() + on_diagonal.triu(1).mT)
                self.product_IJ[end:, start:end] = self.product_IJ[start:end, end:].mT
            self.upper_only = False

    def is_finite(self) -> bool:
        """Whether all sums are; of x with itself, what is not shows on the diagonal."""
        seen = self.product_IJ.diagonal() if self.upper_only else self.product_IJ
        return bool(torch.isfinite(seen.sum()))


def joined_rows(pieces: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Rows (n, features) of several activations, put together until a `CrossMoment` is fed well.

    Adding a float32 product to the float64 sum costs what multiplying hundreds of rows does.
    """
    waiting: list[tuple[Tensor, ...]] = []
    rows = 0
    for piece in pieces:
        waiting.append(piece)
        rows += piece[0].shape[0]
        if rows >= _CHUNK // 2:
            yield _joined(waiting)
            waiting, rows = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(pieces: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return pieces[0] if len(pieces) == 1 else tuple(map(torch.cat, zip(*pieces, strict=True)))


class RowCounts:
    """How often each row of a table is looked up. Additive, as `CrossMoment` is."""

    def __init__(self) -> None:
        self.rows = 0
        self._counts_O: Tensor | None = None

    def add(self, indices: Tensor, table_rows: int) -> None:
        """Count indices of any shape into a table of so many rows."""
        counts_O = torch.bincount(indices.reshape(-1), minlength=table_rows).double()
        self._counts_O = counts_O if self._counts_O is None else self._counts_O + counts_O
        self.rows += indices.numel()

    def merge(self, other: "RowCounts") -> None:
        """Add what another one has seen."""
        if other._counts_O is not None:
            mine = self._counts_O
            self._counts_O = other._counts_O if mine is None else mine + other._counts_O
            self.rows += other.rows

    def scaled_to(self, rows: int) -> "RowCounts":
        """One with the same frequencies, of so many rows."""
        scaled = RowCounts()
        if self._counts_O is not None and rows > 0:
            scaled.rows, scaled._counts_O = rows, self._counts_O * (rows / self.rows)
        return scaled

    def frequencies(self) -> Tensor:
        """Share of each row (rows,), float64, adding up to 1.

        Raises:
            DataError: no lookups were seen.
        """
        if self._counts_O is None or not self.rows:
            raise DataError(
                "no lookups were seen: the data is empty, or its mask marks everything as padding."
            )
        return self._counts_O / self.rows


def widened(rows: Tensor) -> Tensor:
    """In float64 as they are, else in float32: in what moments are formed."""
    return rows if rows.dtype == torch.float64 else rows.float()
