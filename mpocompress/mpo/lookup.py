"""Rows of a matrix straight from its cores: what a table that is stored as an MPO is read by."""

# Shape suffixes: B rows asked for, M columns done, L left bond, O out, I in, R right bond.

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from mpocompress.mpo import linalg
from mpocompress.mpo.cores import layout_of

# Entries of a table that are made float64 in one go.
_BLOCK = 1 << 22


def lookup_rows(cores: Sequence[Tensor], indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows of the matrix that a chain stands for; the matrix is never built.

    The row number is written in the out dims of the sites, the leftmost most significant; each
    digit picks a slice of its core, and the slices are multiplied.

    Args:
        cores: of a matrix (out, in), perhaps padded.
        indices: (...), integers from 0 to out - 1.
        shape: (out, in) without padding.

    Returns:
        (..., in), in the dtype of the cores.

    Raises:
        IndexError: an index beyond the table (on the CPU).
    """
    flat_B = indices.reshape(-1)
    # In a graph -1 is the simpler size, but it cannot be told where there are no rows.
    count = -1 if torch.compiler.is_exporting() else flat_B.shape[0]
    stride = prod(layout_of(cores).out_dims)
    if (stride > shape[0] or stride == 1) and not torch.compiler.is_compiling():
        # No slice of a core says that an index is beyond: this does, and nothing else.
        cores[0].new_zeros(1).expand(shape[0]).index_select(0, flat_B)
    rows, columns = 1, 1
    state_BML: Tensor | None = None
    for core_LOIR in cores:
        left, out, in_, right = core_LOIR.shape
        if out == 1:
            slice_LX = core_LOIR.reshape(left, in_ * right)
            product = slice_LX[None] if state_BML is None else state_BML @ slice_LX
        else:
            stride //= out
            # The first digit needs no remainder: too large an index then finds no slice.
            digit_B = flat_B if stride == 1 else flat_B // stride
            digit_B = digit_B if rows == 1 else digit_B % out
            rows *= out
            table_OX = core_LOIR.permute(1, 0, 2, 3).reshape(out, left * in_ * right)
            slice_BLX = table_OX.index_select(0, digit_B).reshape(count, left, in_ * right)
            product = slice_BLX if state_BML is None else state_BML @ slice_BLX
        columns *= in_
        state_BML = product.reshape(product.shape[0], columns, right)
    assert state_BML is not None
    if rows == 1:  # a table with a single row
        state_BML = state_BML.expand(flat_B.shape[0], -1, -1)
    found_BI = state_BML.reshape(count, columns)
    if found_BI.shape[1] > shape[1]:
        found_BI = found_BI[:, : shape[1]]
    return found_BI.reshape(*indices.shape, shape[1])


def weighted_gram(table_OI: Tensor, weights_O: Tensor, factor_II: Tensor | None) -> Tensor:
    """F^T T^T diag(w) T F, (in, in) float64, of a table, weights of its rows, and a factor F.

    Its eigenvalues are the squared singular values of diag(w)^(1/2) T F.
    """
    columns = table_OI.shape[1]
    gram_II = torch.zeros(columns, columns, dtype=torch.float64, device=table_OI.device)
    rows = max(1, _BLOCK // columns)
    for table_oI, weights_o in zip(table_OI.split(rows), weights_O.split(rows), strict=True):
        wide_oI = table_oI.double()
        gram_II += wide_oI.mT @ (weights_o.double()[:, None] * wide_oI)
    return gram_II if factor_II is None else factor_II.mT @ gram_II @ factor_II


def column_basis(
    table_OI: Tensor, weights_O: Tensor, metric_II: Tensor | None, bond_dim: int
) -> tuple[Tensor, Tensor, float]:
    """The best low rank of a table whose rows matter differently.

    Minimizes the sum over rows o of w_o e_o C e_o^T, e the error of a row and C a metric, as the
    SVD of diag(w)^(1/2) T F with C = F F^T does. With its right singular vectors Q the result is
    (T F Q) (Q^T F^-1): the weights are not divided by, so rows that were never seen (w = 0) are
    projected onto the same subspace instead of being free.

    Args:
        table_OI: T; of any real floating dtype, the work is done in float64.
        weights_O: not negative, at least one above 0.
        metric_II: positive definite; None for the identity.
        bond_dim: columns of the left factor.

    Returns:
        (out, R) and (R, in) in float64, and the relative error in the metric (not squared).

    Raises:
        torch.linalg.LinAlgError: the metric is not positive definite.
    """
    factor_II = None if metric_II is None else torch.linalg.cholesky(metric_II.double())
    gram_II = weighted_gram(table_OI, weights_O, factor_II)
    values_I, vectors_II = torch.linalg.eigh(gram_II)
    basis_IR = vectors_II[:, -bond_dim:].flip(1)
    total = float(values_I.clamp_min(0).sum())
    lost = float(values_I[: len(values_I) - basis_IR.shape[1]].clamp_min(0).sum())
    if factor_II is None:
        right_RI, project_IR = basis_IR.mT, basis_IR
    else:
        project_IR = factor_II @ basis_IR
        right_RI = torch.linalg.solve_triangular(factor_II, basis_IR.mT, upper=False, left=False)
        # The metric's scale is arbitrary: orthonormal rows on the right, all size on the left.
        right_IR, mix_RR = linalg.qr(right_RI.mT)
        right_RI, project_IR = right_IR.mT, project_IR @ mix_RR.mT
    rows = max(1, _BLOCK // table_OI.shape[1])
    left_OR = torch.cat([part.double() @ project_IR for part in table_OI.split(rows)])
    return left_OR, right_RI.contiguous(), (lost / total) ** 0.5 if total > 0 else 0.0
