"""Cholesky factors of positive semidefinite matrices, and solves with them."""

# Shape suffixes: N side of the matrix, M rows, K columns of what is solved for.

import torch
from torch import Tensor

from mpocompress.errors import DecompositionError

# LAPACK's own blocks do most of the work at a fraction of the speed of a matrix product; halves of
# halves down to this size do it in products. From 512 on that takes half to nine tenths of the time
# (float32 2.9 to 2.7 ms at 512, 41 to 28 at 1536; float64 66 to 43 at 1536, 149 to 86 at 2048, one
# core); below, what is saved goes into the calls.
_LEAF = 128
_RECURSIVE_FROM = 512
# Relative to the median of the diagonal of the Gram matrix. It damps steps in what the
# metric does not determine, and changes the others by this share of their condition number.
_DAMPING = {torch.float64: 1e-10, torch.float32: 1e-6}


def cholesky_(matrix_NN: Tensor) -> bool:
    """Replace A by its factor F, A = F F^T, F lower triangular.

    Args:
        matrix_NN: symmetric; only the lower triangle is read.

    Returns:
        Whether A is positive definite; if not, its entries are of no use any more.
    """
    if matrix_NN.shape[0] >= _RECURSIVE_FROM and matrix_NN.device.type == "cpu":
        done = _factorize_(matrix_NN)
        matrix_NN.tril_()
        return done
    factor_NN, failed = torch.linalg.cholesky_ex(matrix_NN)
    matrix_NN.copy_(factor_NN)
    return not bool(failed)


def _factorize_(matrix_NN: Tensor) -> bool:
    """The lower triangle; what is left above it is arbitrary."""
    size = matrix_NN.shape[0]
    if size <= _LEAF:
        factor_NN, failed = torch.linalg.cholesky_ex(matrix_NN)
        matrix_NN.copy_(factor_NN)
        return not bool(failed)
    half = size // 2
    upper, below, lower = matrix_NN[:half, :half], matrix_NN[half:, :half], matrix_NN[half:, half:]
    if not _factorize_(upper):
        return False
    _solve_transposed_(below, upper)
    _subtract_square_(lower, below)
    return _factorize_(lower)


def _solve_transposed_(rows_MK: Tensor, factor_KK: Tensor) -> None:
    """X with X F^T = B in place of B: in products, too, and without a copy of either."""
    size = factor_KK.shape[0]
    if size <= _LEAF:
        rows_MK.copy_(torch.linalg.solve_triangular(factor_KK.mT, rows_MK, upper=True, left=False))
        return
    half = size // 2
    _solve_transposed_(rows_MK[:, :half], factor_KK[:half, :half])
    rows_MK[:, half:].addmm_(rows_MK[:, :half], factor_KK[half:, :half].mT, alpha=-1)
    _solve_transposed_(rows_MK[:, half:], factor_KK[half:, half:])


def _subtract_square_(matrix_NN: Tensor, rows_NK: Tensor) -> None:
    """A - X X^T, in the lower triangle only but for blocks on the diagonal."""
    size = matrix_NN.shape[0]
    if size <= _LEAF:
        matrix_NN.addmm_(rows_NK, rows_NK.mT, alpha=-1)
        return
    half = size // 2
    _subtract_square_(matrix_NN[:half, :half], rows_NK[:half])
    _subtract_square_(matrix_NN[half:, half:], rows_NK[half:])
    matrix_NN[half:, :half].addmm_(rows_NK[half:], rows_NK[:half].mT, alpha=-1)


def solve_factored(rhs_NK: Tensor, factor_NN: Tensor) -> Tensor:
    """X with F F^T X = B: what `torch.cholesky_solve` gives, to the bit.

    That copies the factor for every solve: with 2048 unknowns and 8 columns six times the time.
    """
    halfway_NK = torch.linalg.solve_triangular(factor_NN, rhs_NK, upper=False)
    return torch.linalg.solve_triangular(factor_NN.mT, halfway_NK, upper=True)


def ridge_on(diagonal_N: Tensor, ridge: float, *, floor: float | None = None) -> Tensor:
    """What a ridge adds to the diagonal (N,) of a second moment.

    A share of each entry, so that a feature in fine units does not swamp all others, as it would
    with a share of the mean; of entries below the median of those that are not 0 a share of that
    median, because rows that were not seen may well excite what these hardly do.

    Args:
        diagonal_N: mean squares of the features.
        ridge: share of an entry.
        floor: share of what an entry lacks of the median; None: `ridge`.
    """
    seen_N = diagonal_N[diagonal_N > 0]
    if not seen_N.numel():
        return ridge * diagonal_N
    lacking_N = (seen_N.median() - diagonal_N).clamp_min(0.0)
    return ridge * diagonal_N + (ridge if floor is None else floor) * lacking_N


def solve_ridged(right_MN: Tensor, symmetric_NN: Tensor, ridge: float) -> Tensor:
    """X (M, N) with X (A + r diag A) = B, see `ridge_on`; A is positive semidefinite.

    In float64 where rounding in float32 leaves the shifted matrix indefinite; 0 where A is 0.

    Raises:
        DecompositionError: it is indefinite in float64, too.
    """
    if not bool(symmetric_NN.diagonal().any()):
        return torch.zeros_like(right_MN)
    factor_NN = symmetric_NN.clone()
    factor_NN.diagonal().add_(ridge_on(symmetric_NN.diagonal(), ridge))
    if cholesky_(factor_NN):
        return solve_factored(right_MN.mT, factor_NN).mT
    if symmetric_NN.dtype == torch.float64:
        raise DecompositionError(
            f"a matrix, {symmetric_NN.shape[0]} squared, is not positive semidefinite: it is "
            f"indefinite with a share of {ridge:g} more on its diagonal. Check that it is a sum of "
            "x xᵀ over samples without NaN."
        )
    return solve_ridged(right_MN.double(), symmetric_NN.double(), ridge).to(right_MN.dtype)


def damped_cholesky(gram_NN: Tensor, bonds: tuple[int, int] = (1, 1)) -> Tensor:
    """Cholesky factor of a positive semidefinite matrix plus a ridge just large enough.

    The ridge is a share of the median of the diagonal over ins or outs, each averaged over the
    bonds so that no gauge sees it; the mean may be that of a single feature in much finer units.
    Of a matrix of zeros the factor is the identity: nothing is gained whatever it is.

    Args:
        gram_NN: on legs (left bond, ins or outs, right bond), flattened.
        bonds: dimensions of the left and the right bond.

    Raises:
        DecompositionError: not even a ridge as large as the matrix makes it definite.
    """
    diagonal_N = gram_NN.diagonal()
    if not bool(diagonal_N.any()):
        return torch.eye(len(gram_NN), dtype=gram_NN.dtype, device=gram_NN.device)
    legs_X = diagonal_N.reshape(bonds[0], -1, bonds[1]).mean((0, 2))
    scale = float(legs_X[legs_X > 0].median())
    damping = _DAMPING[gram_NN.dtype]
    while damping * scale <= float(diagonal_N.mean()):
        # The factorization reads one triangle: symmetrizing the other took a fifth of a sweep.
        factor_NN = gram_NN.clone()
        factor_NN.diagonal().add_(damping * scale)
        if cholesky_(factor_NN):
            return factor_NN
        damping *= 100
    raise DecompositionError(
        f"the Gram matrix of a local solve, {gram_NN.shape[0]} squared with median diagonal "
        f"{scale:.3g}, is not positive semidefinite. Check the metric for negative eigenvalues and "
        "entries near the largest float."
    )
