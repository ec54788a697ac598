"""Second moments of activations: streaming, additive, respecting padding."""

# Shape suffixes: N rows, I input features, J features of the other variable.

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mpocompress.errors import DataError

# Products of so many rows are formed in float32 and summed in float64: the rounding of a sum then
# does not grow with the amount of data, at the speed of a float32 product.
_CHUNK = 4096
# Columns at once of the moment of x with itself, half of which is known from the other half.
_BLOCK = 128
# Arguments that mark real tokens (1) or padding (True), as the common libraries name them.
_KEEP_MASKS = ("attention_mask", "mask")
_DROP_MASKS = ("key_padding_mask", "src_key_padding_mask", "padding_mask")


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
        for left_nI, right_nJ in zip(left_NI.split(_CHUNK), right_NJ.split(_CHUNK), strict=True):
            if left_nI.shape[0] == 0:
                continue
            left_nI, right_nJ = widened(left_nI), widened(right_nJ)
            if self._sums is None:
                self._sums = _Sums.around(left_nI.mean(0).double(), right_nJ.mean(0).double())
            sums = self._sums
            left_nI = left_nI - sums.left_shift_I.to(left_nI.dtype)
            if left_NI is right_NJ and sums.left_shift_I is sums.right_shift_J:
                right_nJ = left_nI
            else:
                right_nJ = right_nJ - sums.right_shift_J.to(right_nJ.dtype)
            sums.product_IJ += _product(left_nI, right_nJ)
            # As exact as the product; summing float32 in float64 takes ten times as long.
            left_I = left_nI.sum(0).double()
            sums.left_I += left_I
            sums.right_J += left_I if right_nJ is left_nI else right_nJ.sum(0).double()
            self.rows += left_nI.shape[0]
        if self._sums is not None and not bool(torch.isfinite(self._sums.product_IJ.sum())):
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
            raise DataError(
                "no rows of activations were seen: the data is empty, or its mask marks everything "
                "as padding."
            )
        sums = self._sums
        left_I, right_J = sums.left_I / self.rows, sums.right_J / self.rows
        product_IJ = sums.product_IJ / self.rows - left_I[:, None] * right_J
        left_I, right_J = left_I + sums.left_shift_I, right_J + sums.right_shift_J
        if not centered:
            product_IJ = product_IJ + left_I[:, None] * right_J
        return product_IJ, left_I, right_J


@dataclass(slots=True)
class _Sums:
    """Sums over rows of x - s and y - t and of their product; s and t are the shifts, float64."""

    left_shift_I: Tensor
    right_shift_J: Tensor
    product_IJ: Tensor
    left_I: Tensor
    right_J: Tensor

    def copy(self) -> "_Sums":
        """One to add to; shifts are never changed, and stay the same objects."""
        sums = (self.product_IJ.clone(), self.left_I.clone(), self.right_J.clone())
        return _Sums(self.left_shift_I, self.right_shift_J, *sums)

    @classmethod
    def around(cls, left_shift_I: Tensor, right_shift_J: Tensor) -> "_Sums":
        if left_shift_I is not right_shift_J and torch.equal(left_shift_I, right_shift_J):
            right_shift_J = left_shift_I  # of x with itself
        return cls(
            left_shift_I,
            right_shift_J,
            left_shift_I.new_zeros(len(left_shift_I), len(right_shift_J)),
            torch.zeros_like(left_shift_I),
            torch.zeros_like(right_shift_J),
        )


def _product(left_nI: Tensor, right_nJ: Tensor) -> Tensor:
    """Sum of x y^T over rows; of x with itself only the upper blocks are multiplied."""
    features = left_nI.shape[1]
    if left_nI is not right_nJ or features < 2 * _BLOCK:
        product_IJ = left_nI.mT @ right_nJ
        # Rounding is not symmetric, and a metric has to be.
        return (product_IJ + product_IJ.mT) / 2 if left_nI is right_nJ else product_IJ
    product_II = left_nI.new_empty(features, features)
    for start in range(0, features, _BLOCK):
        end = min(start + _BLOCK, features)
        rows_iI = left_nI[:, start:end].mT @ left_nI[:, start:]
        rows_iI[:, : end - start] += rows_iI[:, : end - start].mT.clone()
        rows_iI[:, : end - start] /= 2
        product_II[start:end, start:] = rows_iI
        product_II[end:, start:end] = rows_iI[:, end - start :].mT
    return product_II


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


def real_rows(activation: Tensor, keep: Tensor | None) -> Tensor:
    """The rows (N, features) of an activation (..., features) that are not padding.

    Args:
        activation: features last.
        keep: boolean (batch, sequence), True for real tokens; ignored where the leading dimensions
            of the activation are others.
    """
    if keep is not None and activation.ndim >= 3 and activation.shape[:2] == keep.shape:
        return activation[keep.to(activation.device)].reshape(-1, activation.shape[-1])
    return activation.reshape(-1, activation.shape[-1])


def real_indices(indices: Tensor, keep: Tensor | None) -> Tensor:
    """Indices (...) into a table, as a list of those that are not padding; as in `real_rows`."""
    if keep is not None and indices.ndim >= 2 and indices.shape[:2] == keep.shape:
        return indices[keep.to(indices.device)].reshape(-1)
    return indices.reshape(-1)


def keep_mask(arguments: Mapping[str, object]) -> Tensor | None:
    """The mask of real tokens among forward arguments by name, as booleans; None without one."""
    for names, keeps in ((_KEEP_MASKS, True), (_DROP_MASKS, False)):
        for name in names:
            mask = arguments.get(name)
            if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point():
                return (mask != 0) if keeps else (mask == 0)
    return None
