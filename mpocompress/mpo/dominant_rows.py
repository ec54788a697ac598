"""Rows of a tall matrix that all others are small combinations of: the pivots of a gauge."""

# Shape suffixes: X rows, R columns and picked rows, K rows picked so far.

import torch
from torch import Tensor

from mpocompress.errors import DecompositionError

# A swap of rows pays if it raises the volume by this factor; it bounds the entries of the result.
DOMINANCE = 1.2
# Every swap raises the volume, so they end; only rounding could go on for ever.
_SWAPS_PER_COLUMN = 20


def dominant_rows(basis_XR: Tensor) -> tuple[Tensor, Tensor]:
    """Pick rows of a tall matrix that all rows are small combinations of.

    Pivoted QR of the rows picks those that stand out most of the span of the ones before; then rows
    are swapped while that raises the volume |det| of the picked block by more than `DOMINANCE`.
    Neither step depends on the basis, only on the space that its columns span.

    Args:
        basis_XR: float64, orthonormal columns.

    Returns:
        `(pivots_R, coefficients_XR)`: ascending row numbers (int64), and C with
        `basis = C @ basis[pivots]`, the identity in the picked rows, no entry above `DOMINANCE`.

    Raises:
        DecompositionError: the columns are dependent.

    Source: Goreinov, Oseledets, Savostyanov, Tyrtyshnikov, Zamarashkin, "How to find a good
        submatrix", in Matrix Methods (World Scientific, 2010) 247.
    """
    rank = basis_XR.shape[1]
    picked_R = _outstanding_rows(basis_XR)
    coefficients_XR = _combinations(basis_XR, picked_R)
    for _ in range(_SWAPS_PER_COLUMN * rank):
        place = int(coefficients_XR.abs().argmax())
        row, column = divmod(place, rank)
        pivot = coefficients_XR[row, column].clone()
        if not abs(float(pivot)) > DOMINANCE:
            break
        change_R = coefficients_XR[row].clone()
        change_R[column] -= 1.0
        coefficients_XR.addr_(coefficients_XR[:, column].clone() / pivot, change_R, alpha=-1.0)
        picked_R[column] = row
    picked_R = picked_R.sort().values
    # Solved once more: the updates have gathered rounding errors.
    coefficients_XR = _combinations(basis_XR, picked_R)
    coefficients_XR[picked_R] = torch.eye(rank, dtype=basis_XR.dtype, device=basis_XR.device)
    return picked_R, coefficients_XR


def _outstanding_rows(basis_XR: Tensor) -> Tensor:
    """Rows by pivoted QR: the row farthest from the span of those before comes next."""
    rows, rank = basis_XR.shape
    distances_X = (basis_XR**2).sum(1)
    span_RK = basis_XR.new_zeros(rank, rank)
    picked: list[int] = []
    for column in range(rank):
        row = int(distances_X.argmax())
        rest_R = basis_XR[row]
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            rest_R = rest_R - span_RK[:, :column] @ (span_RK[:, :column].mT @ rest_R)
        length = float(rest_R.norm())
        # The distances of orthonormal columns add up to rank - column: the largest is no rounding.
        if rows < rank or length**2 < 0.5 / rows:
            raise DecompositionError(
                f"no {rank} rows of a matrix of shape {tuple(basis_XR.shape)} span all others: its "
                "columns are dependent, or not orthonormal. Take Q of its QR decomposition."
            )
        span_RK[:, column] = rest_R / length
        distances_X -= (basis_XR @ span_RK[:, column]) ** 2
        picked.append(row)
        distances_X[row] = -1.0
    return torch.tensor(picked, device=basis_XR.device)


def _combinations(basis_XR: Tensor, picked_R: Tensor) -> Tensor:
    """C with `basis = C @ basis[picked]`."""
    return torch.linalg.solve(basis_XR[picked_R], basis_XR, left=False).contiguous()
