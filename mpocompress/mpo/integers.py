"""Tensors as a file holds them: small integers with a scale for each block of a row, or halves."""

# Shape suffixes: X rows, Y columns, S blocks of a row.

from dataclasses import dataclass

import torch
from torch import Tensor

# With so few bits zero is no level: levels lie symmetric about it, an odd number of half steps
# away. With more, what a level more on one side costs is less than what an exact zero is worth.
SYMMETRIC_BITS = 3

# Scales within these are stored in half precision at a relative error of 5e-4 at most.
HALF_RANGE = (6.2e-5, 6.0e4)

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
        return offset_of(self.bits)

    @property
    def num_bytes(self) -> int:
        """Bytes of integers and scales in a file."""
        rows, columns = self.values.shape
        return integer_bytes(rows, columns, self.bits) + self.scales.nbytes

    def dequantized(self) -> Tensor:
        """The tensor that the integers stand for, in float32: exactly what ONNX Runtime makes."""
        spread_XY = spread_scales(self.scales.float(), self.block, self.values)
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


def offset_of(bits: int) -> float:
    """What is added to an integer of so many bits before its scale multiplies it: 0, or 1/2."""
    return 0.5 if bits <= SYMMETRIC_BITS else 0.0


def spread_scales(scales_XS: Tensor, block: int, like_XY: Tensor) -> Tensor:
    """The scale of each entry (X, Y)."""
    return scales_XS.repeat_interleave(block, dim=1)[:, : like_XY.shape[1]]


def as_stored_scales(scales_X: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to the dtype that they are stored in, within its range, as they were."""
    if dtype == torch.float16:
        least, most = HALF_RANGE
        size_X = scales_X.abs().clamp(least, most)
        scales_X = torch.where(scales_X < 0, -size_X, size_X)
    return scales_X.to(dtype).to(scales_X.dtype)
