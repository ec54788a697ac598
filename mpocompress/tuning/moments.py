"""Second moments of activations: streaming, additive, respecting padding."""

# Shape suffixes: N rows, I input features, J features of the other variable.

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mpocompress.errors import DataError

# Products of so many rows are formed in float32 and summed in float64: the rounding of a sum then
# does not grow with the amount of data, at the speed of a float32 product.
_CHUNK = 4096
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
        itself = left_NI is right_NJ
        for left_nI, right_nJ in zip(left_NI.split(_CHUNK), right_NJ.split(_CHUNK), strict=True):
            if left_nI.shape[0] == 0:
                continue
            left_nI, right_nJ = _working(left_nI), _working(right_nJ)
            if self._sums is None:
                self._sums = _Sums.around(left_nI.mean(0), right_nJ.mean(0))
            left_nI = left_nI - self._sums.left_shift_I.to(left_nI.dtype)
            right_nJ = right_nJ - self._sums.right_shift_J.to(right_nJ.dtype)
            product_IJ = (left_nI.mT @ right_nJ).double()
            if itself:  # products in float32 are symmetric up to rounding only
                product_IJ = (product_IJ + product_IJ.mT) / 2
            self._sums.product_IJ += product_IJ
            self._sums.left_I += left_nI.double().sum(0)
            self._sums.right_J += right_nJ.double().sum(0)
            self.rows += left_nI.shape[0]
        if self._sums is not None and not bool(torch.isfinite(self._sums.product_IJ).all()):
            raise DataError("activations with NaN or Inf; check the data and the model.")

    def merge(self, other: "CrossMoment") -> None:
        """Add what another one has seen."""
        if other._sums is None:
            return
        if self._sums is None:
            self._sums = _Sums.around(other._sums.left_shift_I, other._sums.right_shift_J)
        mine, theirs = self._sums, other._sums
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
        self.rows += other.rows

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

    @classmethod
    def around(cls, left_shift_I: Tensor, right_shift_J: Tensor) -> "_Sums":
        left_I, right_J = left_shift_I.double(), right_shift_J.double()
        return cls(
            left_I,
            right_J,
            left_I.new_zeros(len(left_I), len(right_J)),
            torch.zeros_like(left_I),
            torch.zeros_like(right_J),
        )


def _working(rows: Tensor) -> Tensor:
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


def keep_mask(arguments: Mapping[str, object]) -> Tensor | None:
    """The mask of real tokens among forward arguments by name, as booleans; None without one."""
    for names, keeps in ((_KEEP_MASKS, True), (_DROP_MASKS, False)):
        for name in names:
            mask = arguments.get(name)
            if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point():
                return (mask != 0) if keeps else (mask == 0)
    return None
