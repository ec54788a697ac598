"""Names of storage precisions, and what a matrix takes in each of them."""

from typing import Literal, get_args

from mpocompress.mpo.integers import integer_bytes, scale_bytes

Precision = Literal["float32", "float16", "int8", "int6", "int5", "int4", "int3", "int2"]
"""How numbers are stored; integers with a scale to each row, or to each block of columns."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def bits_of(precision: Precision) -> int | None:
    """Bits of an integer precision; None for a floating one."""
    return int(precision.removeprefix("int")) if precision.startswith("int") else None


def matrix_bytes(rows: int, columns: int, precision: Precision, block: int | None) -> int:
    """Bytes of a matrix in a file.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        precision: of its numbers.
        block: columns that share a scale, for integers; None for all of a row.
    """
    bits = bits_of(precision)
    if bits is None:
        return rows * columns * (4 if precision == "float32" else 2)
    return integer_bytes(rows, columns, bits) + scale_bytes(rows, columns, block)
