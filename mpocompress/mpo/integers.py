"""Matrices as small integers with a scale for each block of a row, and rounding to them.

Rounding to the nearest level treats all errors alike. With the Gram matrix H of what the matrix
meets, errors cost tr(E H E^T): then columns are rounded one after the other, and what a column
lost is made good, as far as it goes, by the columns that are still to come. With a metric G of the
rows as well, errors cost tr(G E H E^T), and the rows still to come take their part likewise.
"""

# Shape suffixes: X rows, Y columns, B columns of a block, S blocks of a row.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# How far the largest entry of a block may be clipped, relative to it; 1 is tried first. With few
# levels long blocks are clipped hard: their many small entries are worth more than the largest.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_HARD_CLIPS = (*_CLIPS, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25)

# Ridge on the Gram matrix, relative to its mean diagonal.
_RIDGE = 1e-2

# Columns after which the rest of the matrix is brought up to date; with feedback on both sides,
# rows and columns.
_LAZY = 64
_TILE = 128

# Scales within these are stored in half precision at a relative error of 5e-4 at most. A few rows
# below them among others (padding, say) may be rounded more coarsely than they could be: next to
# the others that is nothing.
_HALF_RANGE = (6.2e-5, 6.0e4)
_FEW = 0.05

# With so few bits zero is no level: levels lie symmetric about it, an odd number of half steps
# away. With more, what a level more on one side costs is less than what an exact zero is worth.
_WITHOUT_ZERO = 3

BITS = (2, 3, 4, 5, 6, 8)
"""Bits of an integer that a matrix can be rounded to."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredIntegers:
    """A tensor as integers times scales.

    Attributes:
        values: (X, Y), int8; within -2^(bits-1) to 2^(bits-1) - 1.
        scales: (X, S) in float16 or float32, S = ceil(Y / block).
        bits: one of `BITS`.
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
    def offset(self) -> float:
        """What is added to an integer before the scale multiplies it: 0, or 1/2."""
        return _offset(self.bits)

    @property
    def num_bytes(self) -> int:
        """Bytes of integers and scales in a file."""
        rows, columns = self.values.shape
        return integer_bytes(rows, columns, self.bits) + self.scales.nbytes

    def dequantized(self) -> Tensor:
        """The tensor that the integers stand for, in float32: exactly what ONNX Runtime makes."""
        spread_XY = _spread(self.scales.float(), self.block, self.values)
        matrix_XY = (self.values.float() + self.offset) * spread_XY
        return (matrix_XY.T if self.transposed else matrix_XY).reshape(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredHalf:
    """A tensor in half precision.

    Attributes:
        values: float16.
    """

    values: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes in a file."""
        return self.values.nbytes

    def dequantized(self) -> Tensor:
        """The tensor in float32."""
        return self.values.float()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredRows:
    """The rows of a matrix in several precisions.

    Attributes:
        parts: matrices of some of the rows each.
        places: (X,) int32: where each row is in the parts, one below the other.
        shape: of the tensor.
    """

    parts: tuple[StoredIntegers | StoredHalf, ...]
    places: Tensor
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts and of the places."""
        return sum(part.num_bytes for part in self.parts) + place_bytes(len(self.places))

    def dequantized(self) -> Tensor:
        """The tensor in float32."""
        rows_XY = torch.cat([part.dequantized() for part in self.parts])
        return rows_XY[self.places.long()].reshape(self.shape)


Stored = StoredIntegers | StoredHalf | StoredRows
"""A tensor as a file holds it."""


def has_four_bits(stored: Stored) -> bool:
    """Whether any part of it is stored as integers of 4 bits."""
    if isinstance(stored, StoredRows):
        return any(map(has_four_bits, stored.parts))
    return isinstance(stored, StoredIntegers) and stored.bits == 4


def integer_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of packed integers: 3 bits are packed as 2 and 1, 5 as 4 and 1, 6 as 4 and 2.

    Each of these planes fills whole bytes row by row, but for 4 bits alone and 8, which the format
    packs itself.
    """
    if bits in (4, 8):
        return -(-rows * columns * bits // 8)
    return sum(rows * -(-columns * plane // 8) for plane in planes(bits))


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the bit fields that an integer is cut into, highest first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def place_bytes(rows: int) -> int:
    """Bytes of the places of so many rows: two each where they are enough."""
    return rows * (2 if rows <= 1 << 16 else 4)


def scale_bytes(rows: int, columns: int, block: int | None) -> int:
    """Bytes of scales in half precision."""
    return 2 * rows * (1 if block is None else -(-columns // block))


def round_matrix(
    matrix_XY: Tensor,
    bits: int,
    block: int | None,
    *,
    shape: tuple[int, ...],
    gram_YY: Tensor | None = None,
    metric_XX: Tensor | None = None,
    feedback_YY: Tensor | None = None,
    transposed: bool = False,
) -> StoredIntegers:
    """Round a matrix to integers.

    Args:
        matrix_XY: what is rounded, with its blocks along the rows.
        bits: one of `BITS`.
        block: columns of a block; None for one scale to a row.
        shape: of the tensor that it is.
        gram_YY: H, of which an error E costs tr(E H E^T); None to round to the nearest.
        metric_XX: G, with `gram_YY`: an error costs tr(G E H E^T).
        feedback_YY: what `feedback_of` gives for `gram_YY`, if it is known.
        transposed: noted in the result.

    Source: with H, Frantar et al., GPTQ, arXiv 2210.17323; with G, the same on both sides, which is
        Babai's nearest plane in the lattice of the Kronecker product.
    """
    columns = matrix_XY.shape[1]
    block = columns if block is None else min(block, columns)
    work_XY = matrix_XY.double().clone()
    if gram_YY is None:
        scales_XS = _scales(work_XY, bits, block)
        spread_XY = _spread(scales_XS.double(), block, work_XY)
        values_XY = _nearest(work_XY, spread_XY, bits)
    elif metric_XX is None:
        if feedback_YY is None:
            feedback_YY = feedback_of(gram_YY.double())
        values_XY, scales_XS = _with_feedback(work_XY, feedback_YY, bits, block)
    else:
        values_XY, scales_XS = _with_both_feedbacks(
            work_XY, gram_YY.double(), metric_XX.double(), bits, block
        )
    return StoredIntegers(
        values=values_XY.to(torch.int8),
        scales=scales_XS,
        bits=bits,
        block=block,
        transposed=transposed,
        shape=shape,
    )


def round_rows(
    matrix_XY: Tensor,
    tiers: Sequence[tuple[Tensor, int | None]],
    block: int | None,
    *,
    shape: tuple[int, ...],
    gram_YY: Tensor | None = None,
) -> StoredRows:
    """Round each group of rows to its own number of bits.

    Args:
        matrix_XY: what is rounded.
        tiers: numbers of rows, and the bits for them (None for float16); together all rows, once.
        block: see `round_matrix`.
        shape: see `round_matrix`.
        gram_YY: see `round_matrix`.
    """
    parts: list[StoredIntegers | StoredHalf] = []
    for rows_X, bits in tiers:
        part_XY = matrix_XY[rows_X]
        if bits is None:
            parts.append(StoredHalf(values=part_XY.to(torch.float16)))
        else:
            size = (part_XY.shape[0], part_XY.shape[1])
            parts.append(round_matrix(part_XY, bits, block, shape=size, gram_YY=gram_YY))
    order_X = torch.cat([rows_X for rows_X, _ in tiers])
    places_X = torch.empty(len(order_X), dtype=torch.int32, device=order_X.device)
    places_X[order_X] = torch.arange(len(order_X), dtype=torch.int32, device=order_X.device)
    return StoredRows(parts=tuple(parts), places=places_X, shape=shape)


def feedback_of(gram_YY: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse: row y says what those after y take over."""
    mean = float(gram_YY.diagonal().mean()) or 1.0
    eye_YY = torch.eye(len(gram_YY), dtype=gram_YY.dtype, device=gram_YY.device)
    lower_YY = torch.linalg.cholesky(gram_YY + _RIDGE * mean * eye_YY)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower_YY), upper=True)


def _with_feedback(
    work_XY: Tensor, upper_YY: Tensor, bits: int, block: int
) -> tuple[Tensor, Tensor]:
    columns = work_XY.shape[1]
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
            exact_X = (values_XY[:, y] + _offset(bits)) * scale_X
            error_X = (work_XY[:, y] - exact_X) / upper_YY[y, y]
            work_XY[:, y:end] -= error_X[:, None] * upper_YY[y, y:end]
            lost_XB[:, y - start] = error_X
        work_XY[:, end:] -= lost_XB @ upper_YY[start:end, end:]
    half = all(scale.dtype == torch.float16 for scale in scales)
    return values_XY, torch.cat([s if half else s.float() for s in scales], dim=1)


def _with_both_feedbacks(
    work_XY: Tensor, gram_YY: Tensor, metric_XX: Tensor, bits: int, block: int
) -> tuple[Tensor, Tensor]:
    """Tile after tile; what a tile leaves is handed on to the columns and rows that follow it."""
    rows, columns = work_XY.shape
    scales_XS = _scales(work_XY, bits, block)
    # What later columns, and rows below, take over of an error, as multiples of it.
    later_YY = feedback_of(gram_YY)
    later_YY = (later_YY / later_YY.diagonal()[:, None]).float().triu(1)
    below_XX = feedback_of(metric_XX)
    below_XX = (below_XX / below_XX.diagonal()[:, None]).float().triu(1)
    spread_XY = _spread(scales_XS.float(), block, work_XY)
    target_XY = work_XY.float()
    values_XY = torch.zeros_like(target_XY)
    for start in range(0, columns, _TILE):
        ours = slice(start, start + _TILE)
        # What the rows above hand down to an entry, on top of its target.
        handed_XB = torch.zeros_like(target_XY[:, ours])
        lost_XB = torch.zeros_like(handed_XB)
        for top in range(0, rows, _TILE):
            tile = slice(top, top + _TILE)
            values_AB, lost_AB = _round_tile(
                target_XY[tile, ours],
                handed_XB[tile],
                spread_XY[tile, ours],
                later_YY[ours, ours],
                below_XX[tile, tile],
                bits,
            )
            values_XY[tile, ours], lost_XB[tile] = values_AB, lost_AB
            wanted_AB = lost_AB + handed_XB[tile]
            handed_XB[top + _TILE :] -= below_XX[tile, top + _TILE :].mT @ wanted_AB
        target_XY[:, start + _TILE :] -= lost_XB @ later_YY[ours, start + _TILE :]
    return values_XY, scales_XS


def _round_tile(
    target_AB: Tensor,
    handed_AB: Tensor,
    scale_AB: Tensor,
    later_BB: Tensor,
    below_AA: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Values of a tile, and what they miss of their targets; targets and what is handed change.

    All entries (x, y) with the same x + y at once: each waits for its row and its column only.
    """
    rows, columns = target_AB.shape
    values_AB, lost_AB = torch.zeros_like(target_AB), torch.zeros_like(target_AB)
    every_A = torch.arange(rows, device=target_AB.device)
    for diagonal in range(rows + columns - 1):
        low, high = max(0, diagonal - columns + 1), min(rows, diagonal + 1)
        x_D = every_A[low:high]
        y_D = diagonal - x_D
        target_D, handed_D, scale_D = target_AB[x_D, y_D], handed_AB[x_D, y_D], scale_AB[x_D, y_D]
        value_D = _nearest(target_D + handed_D, scale_D, bits)
        values_AB[x_D, y_D] = value_D
        lost_D = target_D - (value_D + _offset(bits)) * scale_D
        lost_AB[x_D, y_D] = lost_D
        # Later columns take over what is missing of the target; rows below also what they were to
        # take over of it before.
        left, right = diagonal - high + 1, diagonal - low + 1
        target_AB[low:high, left:] -= lost_D[:, None] * later_BB[y_D, left:]
        wanted_D = lost_D + handed_D
        handed_AB[low:, left:right] -= (wanted_D[:, None] * below_AA[x_D, low:]).mT.flip(1)
    return values_AB, lost_AB


def _scales(work_XY: Tensor, bits: int, block: int) -> Tensor:
    return _storable(
        torch.cat([_scale(part_XB, bits) for part_XB in work_XY.split(block, dim=1)], dim=1)
    )


def _scale(part_XB: Tensor, bits: int) -> Tensor:
    """Scale of each row (X, 1) with the least squared error.

    Where zero is a level there is one more below it than above, and it is the largest entry that
    gets it.
    """
    index_X1 = part_XB.abs().argmax(1, keepdim=True)
    extreme_X1 = part_XB.gather(1, index_X1)
    # Of zeros any scale makes zeros, or with few bits the least one that half precision has.
    empty = 1.0 if bits > _WITHOUT_ZERO else _HALF_RANGE[0]
    if bits == 8:
        return torch.where(extreme_X1 == 0, empty, extreme_X1.abs() / 127)
    extreme_X1 = torch.where(extreme_X1 == 0, empty, extreme_X1)
    top = 2.0 ** (bits - 1)
    extremes: tuple[float, ...] = (-top, top - 1)
    if bits <= _WITHOUT_ZERO:
        extremes = (top - 0.5,)
    best_X1, least_X1 = extreme_X1, torch.full_like(extreme_X1, torch.inf)
    for clip in _CLIPS if bits > _WITHOUT_ZERO else _HARD_CLIPS:
        for level in extremes:
            scale_X1 = clip * extreme_X1 / level
            rounded_XB = (_nearest(part_XB, scale_X1, bits) + _offset(bits)) * scale_X1
            error_X1 = ((part_XB - rounded_XB) ** 2).sum(1, keepdim=True)
            best_X1 = torch.where(error_X1 < least_X1, scale_X1, best_X1)
            least_X1 = torch.minimum(error_X1, least_X1)
    return best_X1


def _offset(bits: int) -> float:
    return 0.5 if bits <= _WITHOUT_ZERO else 0.0


def _nearest(work_XY: Tensor, scale_XY: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1)
    return (work_XY / scale_XY - _offset(bits)).round().clamp(-top, top - 1)


def _storable(scales_XS: Tensor) -> Tensor:
    size = scales_XS.abs()
    small = size <= _HALF_RANGE[0]
    if bool((size >= _HALF_RANGE[1]).any()) or float(small.double().mean()) > _FEW:
        return scales_XS.float()
    least = torch.where(scales_XS < 0, -_HALF_RANGE[0], _HALF_RANGE[0]).to(scales_XS)
    return torch.where(small, least, scales_XS).to(torch.float16)


def _spread(scales_XS: Tensor, block: int, like_XY: Tensor) -> Tensor:
    return scales_XS.repeat_interleave(block, dim=1)[:, : like_XY.shape[1]]
