"""Second moments of activations: streaming, additive, respecting padding."""

# Shape suffixes: N rows, I input features, J features of the other variable.

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpocompress.errors import DataError, NoRowsError

# Products of so many rows are formed in float32 and summed in float64: the rounding of a sum then
# does not grow with the amount of data, at the speed of a float32 product.
_CHUNK = 4096
# Entries between these have squares, and sums of them, that float32 holds.
_SMALLEST, _LARGEST = 1e-15, 1e15
# Rows at once of the moment of x with itself, of which the upper triangle is kept: those of all
# layers are in memory together, and take several times what the weights do.
_BLOCK = 128
# A moment of so many features takes a quarter of a GB, and half a GB where it is used; larger ones
# (of a vocabulary) are not collected.
MAX_FEATURES = 8192


class CrossMoment:
    """Sums of x y^T over rows, with the sums of x and y; counts rows.

    Both are shifted by the mean of the first rows that come, so that a covariance is not the small
    difference of two large moments. Additive: moments of parts of the data can be merged.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._sums: _Sums | None = None
        self._counted_features = 0

    def count(self, rows_NI: Tensor) -> None:
        """Count rows, and no more: their moment will not be asked for."""
        self.rows += rows_NI.shape[0]
        self._counted_features = rows_NI.shape[1]

    def forget(self) -> None:
        """Free the sums: only how many rows there were, and of what, will be asked for."""
        self._counted_features, self._sums = self.features, None

    def add(self, left_NI: Tensor, right_NJ: Tensor) -> None:
        """Add the rows of two activations.

        Raises:
            DataError: NaN or Inf in a product.
        """
        # A forward may have switched autocast on, which would round products to half precision.
        with torch.autocast(left_NI.device.type, enabled=False):
            self._add(left_NI.detach(), right_NJ.detach(), own=left_NI is right_NJ)
        if self._sums is not None and not self._sums.is_finite():
            raise DataError("activations with NaN or Inf; check the data and the model.")

    def _add(self, left_NI: Tensor, right_NJ: Tensor, *, own: bool) -> None:
        for left_nI, right_nJ in zip(left_NI.split(_CHUNK), right_NJ.split(_CHUNK), strict=True):
            if left_nI.shape[0] == 0:
                continue
            left_nI, right_nJ = _squarable(left_nI), _squarable(right_nJ)
            if self._sums is None:
                self._sums = _Sums.around(left_nI.mean(0).double(), right_nJ.mean(0).double())
            sums = self._sums
            left_nI = left_nI - sums.left_shift_I.to(left_nI.dtype)
            if own and sums.symmetric:
                sums.add_own(left_nI)
            else:
                right_nJ = right_nJ - sums.right_shift_J.to(right_nJ.dtype)
                wider = torch.promote_types(left_nI.dtype, right_nJ.dtype)
                sums.add(left_nI.to(wider), right_nJ.to(wider))
            self.rows += left_nI.shape[0]

    @property
    def features(self) -> int:
        """Of the wider of x and y; 0 before any rows were seen."""
        if self._sums is None:
            return self._counted_features
        return max(len(self._sums.left_shift_I), len(self._sums.right_shift_J))

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
        if not (mine.symmetric and theirs.symmetric):
            mine.unpack()
        same = (
            mine.left_shift_I is theirs.left_shift_I and mine.right_shift_J is theirs.right_shift_J
        )
        left_I = theirs.left_shift_I - mine.left_shift_I
        right_J = theirs.right_shift_J - mine.right_shift_J
        for (rows, columns, sums), added in zip(
            mine.pieces(), theirs.parts_like(mine), strict=True
        ):
            sums += added
            if not same:
                sums += left_I[rows, None] * theirs.right_J[columns]
                sums += theirs.left_I[rows, None] * right_J[columns]
                sums += other.rows * left_I[rows, None] * right_J[columns]
        mine.left_I += theirs.left_I
        mine.right_J += theirs.right_J
        if not same:
            mine.left_I += other.rows * left_I
            mine.right_J += other.rows * right_J

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
            [mine.left_I.new_zeros(len(mine.left_I), len(theirs.right_J))],
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
            DataError: no rows were seen, or they were only counted.
        """
        if self._sums is None:
            if self.rows:
                raise DataError(
                    f"{self.rows} rows of activations were only counted; take statistics of these "
                    "inputs, too."
                )
            raise NoRowsError(
                "no rows of activations were seen: the data is empty, or its mask marks everything "
                "as padding."
            )
        sums = self._sums
        left_I, right_J = sums.left_I / self.rows, sums.right_J / self.rows
        product_IJ = sums.product().div_(self.rows).addr_(left_I, right_J, alpha=-1)
        left_I, right_J = left_I + sums.left_shift_I, right_J + sums.right_shift_J
        if not centered:
            product_IJ.addr_(left_I, right_J)
        return product_IJ, left_I, right_J


@dataclass(slots=True)
class _Sums:
    """Sums over rows of x - s and y - t and of their product; s and t are the shifts, float64.

    Attributes:
        parts: the product: all of it, or if it is symmetric `_BLOCK` rows each, from their diagonal
            on.
        symmetric: the product is of x with itself.
    """

    left_shift_I: Tensor
    right_shift_J: Tensor
    parts: list[Tensor]
    left_I: Tensor
    right_J: Tensor
    symmetric: bool

    @classmethod
    def around(cls, left_shift_I: Tensor, right_shift_J: Tensor) -> "_Sums":
        own = left_shift_I is right_shift_J or torch.equal(left_shift_I, right_shift_J)
        if own:
            right_shift_J = left_shift_I
        left, right = len(left_shift_I), len(right_shift_J)
        blocks = range(0, left, _BLOCK)
        shapes = [(min(_BLOCK, left - start), left - start) for start in blocks]
        return cls(
            left_shift_I,
            right_shift_J,
            [left_shift_I.new_zeros(shape) for shape in (shapes if own else [(left, right)])],
            torch.zeros_like(left_shift_I),
            torch.zeros_like(right_shift_J),
            symmetric=own,
        )

    def copy(self) -> "_Sums":
        """One to add to; shifts are never changed, and stay the same objects."""
        parts = [part.clone() for part in self.parts]
        shifts = (self.left_shift_I, self.right_shift_J)
        return _Sums(*shifts, parts, self.left_I.clone(), self.right_J.clone(), self.symmetric)

    def scale_(self, factor: float) -> None:
        """As if every row had come so many times."""
        for total in (*self.parts, self.left_I, self.right_J):
            total *= factor

    def add(self, left_nI: Tensor, right_nJ: Tensor) -> None:
        """Rows that are shifted."""
        self.unpack()
        self.parts[0] += left_nI.mT @ right_nJ
        self.left_I += left_nI.sum(0).double()
        self.right_J += right_nJ.sum(0).double()

    def add_own(self, rows_nI: Tensor) -> None:
        """Rows that are shifted, with themselves."""
        for rows, columns, sums in self.pieces():
            sums += rows_nI[:, rows].mT @ rows_nI[:, columns]
        # As exact as the product; summing float32 in float64 takes ten times as long.
        sum_I = rows_nI.sum(0).double()
        self.left_I += sum_I
        self.right_J += sum_I

    def pieces(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and the sums there that are kept."""
        if not self.symmetric:
            yield slice(None), slice(None), self.parts[0]
            return
        for number, part in enumerate(self.parts):
            start = number * _BLOCK
            yield slice(start, start + _BLOCK), slice(start, None), part

    def parts_like(self, other: "_Sums") -> list[Tensor]:
        """The parts, unpacked if those of the other one are."""
        return self.parts if other.symmetric else [self.product()]

    def product(self) -> Tensor:
        """All of the product (I, J), to be changed."""
        if not self.symmetric:
            return self.parts[0].clone()
        features = len(self.left_I)
        product_II = self.left_I.new_empty(features, features)
        for rows, columns, sums in self.pieces():
            product_II[columns, rows] = sums.mT
            product_II[rows, columns] = sums
            on_diagonal = product_II[rows, rows]  # of which rounding may differ above and below
            on_diagonal.copy_(on_diagonal.triu() + on_diagonal.triu(1).mT)
        return product_II

    def unpack(self) -> None:
        """From now on the product is not symmetric."""
        if self.symmetric:
            self.parts, self.symmetric = [self.product()], False

    def is_finite(self) -> bool:
        """Whether all sums are; of x with itself, what is not shows on the diagonal."""
        seen = [part.diagonal() if self.symmetric else part for part in self.parts]
        return bool(torch.isfinite(torch.stack([part.sum() for part in seen])).all())


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


def _squarable(rows: Tensor) -> Tensor:
    """Widened, and in float64 where float32 does not hold squares of the largest entries."""
    largest = float(rows.detach().abs().max())
    if largest == 0 or _SMALLEST < largest < _LARGEST:
        return widened(rows)
    return rows.double()


def widened(rows: Tensor) -> Tensor:
    """In float64 as they are, else in float32: in what moments are formed."""
    return rows if rows.dtype == torch.float64 else rows.float()
