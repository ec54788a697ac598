"""Matrices as small integers with a scale for each block of a row, and rounding to them.

Rounding to the nearest level treats all errors alike. With the Gram matrix H of what the matrix
meets, errors cost tr(E H E^T): then columns are rounded one after the other, and what a column
lost is made good, as far as it goes, by the columns that are still to come.
"""

# Shape suffixes: X rows, Y columns, B columns of a block, S blocks of a row.

from dataclasses import dataclass

import torch
from torch import Tensor

# How far the largest entry of a block may be clipped, relative to it; 1 is tried first.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)

# Ridge on the Gram matrix, relative to its mean diagonal.
_RIDGE = 1e-2

# Columns after which the rest of the matrix is brought up to date.
_LAZY = 64

# Scales within these are stored in half precision at a relative error of 5e-4 at most.
_HALF_RANGE = (6.2e-5, 6.0e4)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredIntegers:
    """A tensor as integers times scales.

    Attributes:
        values: (X, Y), int8; within -8 to 7 if `bits` is 4.
        scales: (X, S) in float16 or float32, S = ceil(Y / block).
        bits: 4 or 8.
        block: columns that share a scale.
        transposed: whether (X, Y) is the transpose of the tensor as a matrix.
        shape: of the tensor.
    """

    values: Tensor
    scales: Tensor
    bits: int
    block: int
    transposed: bool
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of integers and scales in a file."""
        return -(-self.values.numel() * self.bits // 8) + self.scales.numel() * (
            self.scales.element_size()
        )

    def dequantized(self) -> Tensor:
        """The tensor that the integers stand for, in float32: exactly what ONNX Runtime makes."""
        matrix_XY = self.values.float() * _spread(self.scales.float(), self.block, self.values)
        return (matrix_XY.T if self.transposed else matrix_XY).reshape(self.shape)


def round_matrix(
    matrix_XY: Tensor,
    bits: int,
    block: int | None,
    *,
    shape: tuple[int, ...],
    gram_YY: Tensor | None = None,
    transposed: bool = False,
) -> StoredIntegers:
    """Round a matrix to integers.

    Args:
        matrix_XY: what is rounded, with its blocks along the rows.
        bits: 4 or 8.
        block: columns of a block; None for one scale to a row.
        shape: of the tensor that it is.
        gram_YY: H, of which an error E costs tr(E H E^T); None to round to the nearest.
        transposed: noted in the result.

    Source: with H, Frantar et al., GPTQ, arXiv 2210.17323.
    """
    columns = matrix_XY.shape[1]
    block = columns if block is None else min(block, columns)
    work_XY = matrix_XY.double().clone()
    if gram_YY is None:
        scales_XS = torch.cat(
            [_scale(part_XB, bits) for part_XB in work_XY.split(block, dim=1)], dim=1
        )
        scales_XS = _storable(scales_XS)
        spread_XY = _spread(scales_XS.double(), block, work_XY)
        values_XY = _nearest(work_XY, spread_XY, bits)
    else:
        values_XY, scales_XS = _with_feedback(work_XY, gram_YY.double(), bits, block)
    return StoredIntegers(
        values=values_XY.to(torch.int8),
        scales=scales_XS,
        bits=bits,
        block=block,
        transposed=transposed,
        shape=shape,
    )


def _with_feedback(
    work_XY: Tensor, gram_YY: Tensor, bits: int, block: int
) -> tuple[Tensor, Tensor]:
    columns = work_XY.shape[1]
    mean = float(gram_YY.diagonal().mean()) or 1.0
    eye_YY = torch.eye(columns, dtype=gram_YY.dtype, device=gram_YY.device)
    # The upper Cholesky factor of the inverse: row y says what the columns after y take over.
    lower_YY = torch.linalg.cholesky(gram_YY + _RIDGE * mean * eye_YY)
    upper_YY = torch.linalg.cholesky(torch.cholesky_inverse(lower_YY), upper=True)
    values_XY = torch.zeros_like(work_XY)
    scales: list[Tensor] = []
    for start in range(0, columns, _LAZY):
        end = min(start + _LAZY, columns)
        lost_XB = torch.zeros_like(work_XY[:, start:end])
        for y in range(start, end):
            if y % block == 0:
                scales.append(_storable(_scale(work_XY[:, y : y + block], bits)))
            scale_X = scales[-1][:, 0].double()
            values_XY[:, y] = _nearest(work_XY[:, y], scale_X, bits)
            error_X = (work_XY[:, y] - values_XY[:, y] * scale_X) / upper_YY[y, y]
            work_XY[:, y:end] -= error_X[:, None] * upper_YY[y, y:end]
            lost_XB[:, y - start] = error_X
        work_XY[:, end:] -= lost_XB @ upper_YY[start:end, end:]
    half = all(scale.dtype == torch.float16 for scale in scales)
    return values_XY, torch.cat([s if half else s.float() for s in scales], dim=1)


def _scale(part_XB: Tensor, bits: int) -> Tensor:
    """Scale of each row (X, 1) with the least squared error.

    There is one more level below zero than above, and it is the largest entry that gets it.
    """
    index_X1 = part_XB.abs().argmax(1, keepdim=True)
    extreme_X1 = part_XB.gather(1, index_X1)
    if bits == 8:
        return extreme_X1.abs().clamp(min=1e-12) / 127
    extreme_X1 = torch.where(extreme_X1 == 0, 1e-12, extreme_X1)
    best_X1, least_X1 = extreme_X1, torch.full_like(extreme_X1, torch.inf)
    for clip in _CLIPS:
        for levels in (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1):
            scale_X1 = clip * extreme_X1 / levels
            rounded_XB = _nearest(part_XB, scale_X1, bits) * scale_X1
            error_X1 = ((part_XB - rounded_XB) ** 2).sum(1, keepdim=True)
            best_X1 = torch.where(error_X1 < least_X1, scale_X1, best_X1)
            least_X1 = torch.minimum(error_X1, least_X1)
    return best_X1


def _nearest(work_XY: Tensor, scale_XY: Tensor, bits: int) -> Tensor:
    return (work_XY / scale_XY).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _storable(scales_XS: Tensor) -> Tensor:
    size = scales_XS.abs()
    half = bool(((size > _HALF_RANGE[0]) & (size < _HALF_RANGE[1])).all())
    return scales_XS.to(torch.float16 if half else torch.float32)


def _spread(scales_XS: Tensor, block: int, like_XY: Tensor) -> Tensor:
    return scales_XS.repeat_interleave(block, dim=1)[:, : like_XY.shape[1]]
