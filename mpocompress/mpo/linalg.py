"""SVD and QR as the rest of the package uses them; the one caller of torch.linalg decompositions.

Work is done in float32 or wider. Signs are fixed, so that equal matrices give equal factors.
"""

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, constant_pad_nd

from mpocompress.errors import DecompositionError

# A range finder pays when the bond is much smaller than the matrix: below these sizes a full SVD
# takes under a second on one core, and it is exact.
_RANDOMIZED_FROM = 768
# Values alone, or few vectors, come from eigenvalues of the Gram matrix of the smaller side in
# float64. One core, 768x3072: 0.11 s for the values, where an SVD in float32 takes 0.40, one in
# float64 0.77, and the range finder 0.06 for 48 of them, 0.15 to 0.22 for 96.
_GRAM_FROM = 128
_RANDOMIZED_VALUES_FRACTION = 0.1
# Beyond this share of the smaller side, what comes after the eigenvectors costs what is saved.
_GRAM_FRACTION = 0.5
# A Gram matrix has its rounding relative to the square of the largest value: below this share of
# it, vectors of a float64 matrix lose digits, and rank is not told from noise.
_GRAM_RESOLVES = 1e-8
_COLUMNS_AT_ONCE = 1024  # of a Gram matrix: no float64 copy of the matrix
# Entries up to which a decomposition in float64 costs at most seconds more than in float32.
_DOUBLE_UP_TO = 1 << 21
# Of the smaller side. Above, blocks of flat spectra fill the matrix before they converge, and what
# they took comes on top.
_RANDOMIZED_FRACTION = 0.15
# Columns of a block beyond the rank, of the rank and at least. A block must not be narrower than
# the rank: of a Schmidt value with multiplicity m, blocks of K < m columns find only K vectors.
# Wider ones cost more than they gain: all blocks are kept, and to the same error a block of the
# rank needs four fifths of the columns that one of 1.25 times the rank does (measured at 4096).
_OVERSAMPLING = 0.0625
_LEAST_OVERSAMPLING = 4
# Entries whose float64 copy stays in the cache. A copy that does not took ten times as long at
# 4096x4096, a third of the time of the whole decomposition.
_IN_CACHE = 1 << 17
_ROWS_AT_ONCE = 512  # of a residual: no second copy of the matrix
# Least over largest pivot down to which Cholesky QR in float64 gives a float32 block orthonormal
# columns; it takes a quarter of the time of Householder's, which was a third of the whole.
_WELL_CONDITIONED = 1e-3
# Stop once all further products with A or A^T would lower the squared error by less than this share
# of it. The error is then at most 1.005 times the least one for flat spectra, the worst case, and
# below 1.001 for falling ones (measured at 1024 and 4096).
_CONVERGED = 4e-3
_SLOWEST = 0.9  # share of a decrease that the next of its kind is taken to keep, at most


class LeadingSVD(NamedTuple):
    """Leading part of an SVD: `matrix_MN` is about `left_MR * values_R @ right_RN`.

    `residual_weight` is the squared Frobenius norm of what none of the R triplets covers (0 for a
    full SVD); `total_weight` is it and the squares of all R values.
    """

    left_MR: Tensor
    values_R: Tensor
    right_RN: Tensor
    total_weight: float
    residual_weight: float


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other real floating dtype.

    Raises:
        DecompositionError: the dtype is not real and floating.
    """
    if not dtype.is_floating_point:
        advice = (
            "Take the real and the imaginary part, each with cores of its own."
            if dtype.is_complex
            else "Convert the matrix with .float() first."
        )
        raise DecompositionError(
            f"dtype {dtype} cannot be decomposed: cores are real and floating. {advice}"
        )
    return torch.float64 if dtype == torch.float64 else torch.float32


def weight_of(tensor: Tensor) -> float:
    """Squared Frobenius norm, accumulated in float64 without a float64 copy of the tensor."""
    flat = tensor.detach().reshape(-1)
    if not flat.is_cpu:
        return float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2
    if flat.numel() <= _IN_CACHE:
        return float(flat.double().square().sum())
    total = 0.0
    for part in flat.split(_IN_CACHE):
        wide = part.double()
        total += float(torch.dot(wide, wide))
    return total


def decomposition_dtype(matrix_MN: Tensor) -> torch.dtype:
    """Dtype that a matrix is decomposed in: float64, or float32 for large ones of 32 bits or less.

    float64 costs twice the time, and buys bond dimensions that are the true ranks: in float32 the
    rounding noise of an SVD cannot be told from small Schmidt values.
    """
    wide = working_dtype(matrix_MN.dtype)
    return torch.float64 if matrix_MN.numel() <= _DOUBLE_UP_TO else wide


def rank_tolerance(
    shape: tuple[int, ...], dtype: torch.dtype, *, work: torch.dtype | None = None
) -> float:
    """Relative size below which a singular value of a matrix of `shape` is rounding noise.

    Measured on matrices of rank 1 and 2 in long chains: the noise stays below 3 n eps. In float32
    that bound would cut visible weight away (2e-3 of the norm at 4096), so it is taken lower there.
    A float32 matrix that is decomposed in float64 (`work`) carries no noise but the rounding of its
    entries: 0.12 eps at most, measured on low-rank matrices of 64 to 1024 rows.
    """
    if dtype == torch.float32 and work == torch.float64:
        return float(2 * torch.finfo(dtype).eps)
    size = max(shape)
    factor = size if dtype == torch.float64 else size**0.5
    return float(4 * factor * torch.finfo(dtype).eps)


def check_finite(matrix: Tensor) -> None:
    """Raise DecompositionError if an entry is NaN or Inf, naming how many and the first one."""
    # One NaN or Inf makes the sum so, too. A finite matrix whose sum overflows is looked at again.
    if bool(torch.isfinite(matrix.sum())):
        return
    finite = torch.isfinite(matrix)
    if bool(finite.all()):
        return
    bad = torch.nonzero(~finite)
    first = tuple(int(i) for i in bad[0])
    raise DecompositionError(
        f"{len(bad)} of {matrix.numel()} entries are NaN or Inf, the first at {list(first)} "
        f"({float(matrix[first])}). Repair the checkpoint or exclude the layer."
    )


def qr(matrix_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced QR with a non-negative diagonal of R: (M, K), (K, N), K = min(M, N)."""
    q_MK, r_KN = torch.linalg.qr(matrix_MN)
    signs_K = torch.where(torch.diagonal(r_KN) < 0, -1.0, 1.0).to(matrix_MN.dtype)
    return q_MK * signs_K, r_KN * signs_K[:, None]


def svd(matrix_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced SVD (M, K), (K,), (K, N), descending, signs fixed.

    If the default driver fails to converge, others follow: gesvd where it can be chosen (CUDA),
    float64, and float64 after a QR decomposition, which presents LAPACK with another matrix.

    Raises:
        DecompositionError: no driver converged.
    """
    attempts = [lambda: torch.linalg.svd(matrix_MN, full_matrices=False)]
    if matrix_MN.is_cuda:
        attempts.append(lambda: torch.linalg.svd(matrix_MN, full_matrices=False, driver="gesvd"))
    attempts.append(lambda: torch.linalg.svd(matrix_MN.double(), full_matrices=False))
    attempts.append(lambda: _svd_after_qr(matrix_MN.double()))
    for attempt in attempts:
        try:
            left_MK, values_K, right_KN = attempt()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(torch.isfinite(values_K).all()):
            dtype = matrix_MN.dtype
            return fix_signs(left_MK.to(dtype), values_K.to(dtype), right_KN.to(dtype))
    raise DecompositionError(
        f"no SVD driver converged on a matrix of shape {tuple(matrix_MN.shape)} and dtype "
        f"{matrix_MN.dtype}. Check it for NaN, Inf and entries near the largest float."
    )


def _svd_after_qr(matrix_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if matrix_MN.shape[0] < matrix_MN.shape[1]:
        left_NK, values_K, right_KM = _svd_after_qr(matrix_MN.mT)
        return right_KM.mT, values_K, left_NK.mT
    q_MK, r_KN = torch.linalg.qr(matrix_MN)
    left_KK, values_K, right_KN = torch.linalg.svd(r_KN, full_matrices=False)
    return q_MK @ left_KK, values_K, right_KN


def fix_signs(left_MK: Tensor, values_K: Tensor, right_KN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make the largest entry of every left singular vector positive."""
    if left_MK.numel() == 0:
        return left_MK, values_K, right_KN
    pivots_1K = left_MK.abs().argmax(dim=0, keepdim=True)
    signs_K = torch.where(left_MK.gather(0, pivots_1K)[0] < 0, -1.0, 1.0).to(left_MK.dtype)
    return left_MK * signs_K, values_K, right_KN * signs_K[:, None]


def leading_svd(
    matrix_MN: Tensor,
    rank: int | None,
    generator: torch.Generator | None = None,
    *,
    weight: float | None = None,
) -> LeadingSVD:
    """At least the `rank` leading singular triplets, by whichever way is cheaper.

    A full SVD for small matrices and large ranks; for small ranks a randomized range finder whose
    error is checked afterwards; between them, and if that does not converge, eigenvectors of the
    Gram matrix, with the full SVD as the last resort.

    Args:
        matrix_MN: float32 or float64.
        rank: triplets needed; None for all.
        generator: source of the test matrix; default: a generator with a fixed seed, so that equal
            matrices give equal results.
        weight: `weight_of` the matrix, if it is known.
    """
    if rank is not None and _pays(matrix_MN, rank):
        total = weight_of(matrix_MN) if weight is None else weight
        found = _randomized_svd(matrix_MN, rank, generator, total)
        if found is not None:
            return found
    small_side = min(matrix_MN.shape)
    if rank is not None and small_side >= _GRAM_FROM and rank <= _GRAM_FRACTION * small_side:
        found = _gram_svd(matrix_MN, rank)
        if found is not None:
            return found
    left_MK, values_K, right_KN = svd(matrix_MN)
    return LeadingSVD(left_MK, values_K, right_KN, weight_of(values_K), 0.0)


def _pays(matrix_MN: Tensor, rank: int, fraction: float = _RANDOMIZED_FRACTION) -> bool:
    small_side = min(matrix_MN.shape)
    return small_side >= _RANDOMIZED_FROM and rank <= fraction * small_side


def _gram(matrix_MN: Tensor) -> Tensor:
    """Gram matrix (K, K) of the smaller side, K = min(M, N), in float64."""
    flat_KN = matrix_MN if matrix_MN.shape[0] <= matrix_MN.shape[1] else matrix_MN.mT
    side = flat_KN.shape[0]
    gram_KK = flat_KN.new_zeros(side, side, dtype=torch.float64)
    for part_Kn in flat_KN.split(_COLUMNS_AT_ONCE, dim=1):
        wide_Kn = part_Kn.double()
        gram_KK.addmm_(wide_Kn, wide_Kn.mT)
    return gram_KK


def _gram_svd(matrix_MN: Tensor, rank: int) -> LeadingSVD | None:
    """The `rank` leading triplets: the matrix in the span of eigenvectors of its Gram matrix.

    The span is the best one up to rounding of the total weight, twice the digits of the matrix for
    float32; within it an SVD of K x rank numbers gives values and vectors to the matrix's digits.
    None if the values fall too low for that, as of matrices of a lower rank, or LAPACK fails.
    """
    if matrix_MN.shape[0] > matrix_MN.shape[1]:
        found = _gram_svd(matrix_MN.mT, rank)
        if found is None:
            return None
        left_NR, values_R, right_RM, total, residual = found
        return LeadingSVD(*fix_signs(right_RM.mT, values_R, left_NR.mT), total, residual)
    try:
        weights_M, vectors_MM = torch.linalg.eigh(_gram(matrix_MN))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    if not bool(weights_M[-rank] > _GRAM_RESOLVES * weights_M[-1]):  # of NaN, too
        return None
    span_MR = vectors_MM[:, -rank:].to(matrix_MN.dtype)
    left_RR, values_R, right_RN = _svd_after_qr(span_MR.mT @ matrix_MN)
    residual = float(weights_M.detach()[:-rank].clamp_min(0.0).sum())
    left_MR, values_R, right_RN = fix_signs(span_MR @ left_RR, values_R, right_RN)
    return LeadingSVD(left_MR, values_R, right_RN, weight_of(values_R) + residual, residual)


def _randomized_svd(
    matrix_MN: Tensor, rank: int, generator: torch.Generator | None, total: float
) -> LeadingSVD | None:
    """Randomized block Krylov iteration with a Rayleigh-Ritz step and an a-posteriori check.

    Block Golub-Kahan bidiagonalization: blocks of orthonormal U and V with U^T A V = B known from
    the products themselves. After a product with A^T, U^T A = B V^T exactly; after one with A,
    A V = U B. The error of the best rank-R part of what is covered is ||A||^2 - sum_{i <= R}
    s_i(B)^2: it is measured, not estimated. What cannot be known without the full spectrum is how
    far the optimum is; the s_i(B) rise with every product, so the check is that more products no
    longer lower the error. None if the blocks fill the matrix before that.

    Keeping all blocks costs little beside a product, and takes half the products that subspace
    iteration needs for flat spectra.

    Source: Musco, Musco, NeurIPS 28 (2015) 1396; Halko, Martinsson, Tropp, SIAM Review 53 (2011)
    217, algorithm 5.1.
    """
    if matrix_MN.shape[0] < matrix_MN.shape[1]:
        found = _randomized_svd(matrix_MN.mT, rank, generator, total)
        if found is None:
            return None
        left_NR, values_R, right_RM, covered, residual = found
        return LeadingSVD(*fix_signs(right_RM.mT, values_R, left_NR.mT), covered, residual)
    if generator is None:
        generator = torch.Generator(device=matrix_MN.device).manual_seed(0)
    beyond = max(_LEAST_OVERSAMPLING, int(_OVERSAMPLING * rank))
    width = min(rank + beyond, *matrix_MN.shape)
    test_NK = torch.randn(
        (matrix_MN.shape[1], width),
        generator=generator,
        device=matrix_MN.device,
        dtype=matrix_MN.dtype,
    )
    # An error below this is the rounding of the total weight, and says nothing.
    noise = total * 4 * torch.finfo(matrix_MN.dtype).eps
    left_MU = _orthonormalized(matrix_MN @ test_NK)[0]
    right_NV = matrix_MN.new_empty(matrix_MN.shape[1], 0)
    middle_UV = matrix_MN.new_empty(width, 0)  # B
    errors: list[float] = []
    while True:
        if left_MU.shape[1] > right_NV.shape[1]:
            product_NK = matrix_MN.mT @ left_MU[:, -width:]
            new_NK, known_VK, carry_KK = _orthogonalized(product_NK, right_NV)
            right_NV = torch.cat([right_NV, new_NK], 1)
            rows = middle_UV.shape[0] - width
            row_KV = torch.cat([known_VK.mT, carry_KK.mT], 1)
            padded_UV = constant_pad_nd(middle_UV[:rows], (0, width))
            middle_UV = torch.cat([padded_UV, row_KV])
        else:
            product_MK = matrix_MN @ right_NV[:, -width:]
            new_MK, known_UK, carry_KK = _orthogonalized(product_MK, left_MU)
            left_MU = torch.cat([left_MU, new_MK], 1)
            columns = middle_UV.shape[1] - width
            column_UK = torch.cat([known_UK, carry_KK])
            padded_UV = constant_pad_nd(middle_UV[:, :columns], (0, 0, 0, width))
            middle_UV = torch.cat([padded_UV, column_UK], 1)
        if not bool(torch.isfinite(middle_UV).all()):
            raise DecompositionError(
                f"products of a matrix of shape {tuple(matrix_MN.shape)} are not finite. Check it "
                "for NaN, Inf and entries near the largest float."
            )
        error = total - _leading_weight_of(middle_UV, rank)
        errors.append(error)
        if error <= noise or _to_gain(errors) <= _CONVERGED * error:
            break
        if max(middle_UV.shape) + width > matrix_MN.shape[1]:
            return None
    left_UR, values_R, right_RV = svd(middle_UV)
    left_MR = left_MU @ left_UR[:, :width]
    values_R, right_RN = values_R[:width], right_RV[:width] @ right_NV.mT
    residual = total - weight_of(values_R)
    if residual < 1e-4 * total:  # the difference of two large numbers: measure it directly instead
        residual = sum(
            weight_of(torch.addmm(rows_mN, left_mR * values_R, right_RN, alpha=-1))
            for rows_mN, left_mR in zip(
                matrix_MN.split(_ROWS_AT_ONCE), left_MR.split(_ROWS_AT_ONCE), strict=True
            )
        )
    left_MR, values_R, right_RN = fix_signs(left_MR, values_R, right_RN)
    residual = max(residual, 0.0)
    return LeadingSVD(left_MR, values_R, right_RN, weight_of(values_R) + residual, residual)


def _orthogonalized(block_MK: Tensor, basis_MU: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q (M, K), X (U, K) and R (K, K) with block = basis X + Q R, Q orthogonal to the basis.

    Twice, for a block that nearly lies in the basis leaves little but rounding, and the QR of that
    points anywhere.
    """
    known_UK = basis_MU.mT @ block_MK
    q_MK, r_KK = _orthonormalized(block_MK - basis_MU @ known_UK)
    if basis_MU.shape[1] == 0:
        return q_MK, known_UK, r_KK
    again_UK = basis_MU.mT @ q_MK
    q_MK, more_KK = _orthonormalized(q_MK - basis_MU @ again_UK)
    return q_MK, known_UK + again_UK @ r_KK, more_KK @ r_KK


def _orthonormalized(block_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Q (M, K) and R (K, K) of a tall block, by the cheapest way that keeps Q orthonormal."""
    if block_MK.dtype == torch.float32:
        wide_MK = block_MK.double()
        lower_KK, failed = torch.linalg.cholesky_ex(wide_MK.mT @ wide_MK)
        pivots_K = lower_KK.diagonal()
        if int(failed) == 0 and bool(pivots_K.min() > _WELL_CONDITIONED * pivots_K.max()):
            q_MK = torch.linalg.solve_triangular(lower_KK.mT, wide_MK, upper=True, left=False)
            return q_MK.float(), lower_KK.mT.float()
    q_MK, r_KK = torch.linalg.qr(block_MK)
    return q_MK, r_KK


def _leading_weight_of(middle_UV: Tensor, rank: int) -> float:
    """Sum of the `rank` largest squared singular values of a small matrix.

    From its smaller Gram matrix in float64, a tenth of the time of an SVD: what that loses of small
    singular values is far below the sum.
    """
    wide_UV = middle_UV.double()
    tall = wide_UV.shape[0] > wide_UV.shape[1]
    gram_KK = wide_UV.mT @ wide_UV if tall else wide_UV @ wide_UV.mT
    return float(torch.linalg.eigvalsh(gram_KK)[-rank:].sum())


def _to_gain(errors: list[float]) -> float:
    """What further products would take off the last error, if decreases go on to fall as they did.

    A product with A gains more, or less, than one with A^T: each is held against the last of its
    kind.
    """
    if len(errors) < 4:
        return inf
    earlier, before, last = (errors[-k - 1] - errors[-k] for k in (3, 2, 1))
    if last <= 0:
        return 0.0
    kept = min(last / earlier, _SLOWEST) if earlier > 0 else _SLOWEST
    return (before + last) * kept / (1 - kept)


def leading_weight(matrix_MN: Tensor, rank: int) -> tuple[float, float]:
    """Squared norm of the best rank-`rank` part of a matrix, and of the whole; no vectors kept.

    Raises:
        DecompositionError: NaN or Inf entries, or no driver converged.
    """
    check_finite(matrix_MN)
    if _pays(matrix_MN, rank, _RANDOMIZED_VALUES_FRACTION):
        found = _randomized_svd(matrix_MN, rank, None, weight_of(matrix_MN))
        if found is not None:
            return weight_of(found.values_R[:rank]), found.total_weight
    weights_K = value_weights(matrix_MN)
    return float(weights_K[:rank].sum()), float(weights_K.sum())


def value_weights(matrix_MN: Tensor) -> Tensor:
    """Squares of all singular values (min(M, N),), float64, descending.

    From the Gram matrix of a large one: right to float64 rounding of the largest square, below
    which small ones are noise, none negative.

    Raises:
        DecompositionError: no driver converged.
    """
    if min(matrix_MN.shape) >= _GRAM_FROM:
        try:
            weights_K = torch.linalg.eigvalsh(_gram(matrix_MN))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            weights_K = matrix_MN.new_full((1,), inf)
        if bool(torch.isfinite(weights_K).all()):  # squares of float64 may overflow
            return weights_K.clamp_min(0.0).flip(0)
    return _driver_values(matrix_MN).double() ** 2


def svd_values(matrix_MN: Tensor) -> Tensor:
    """All singular values, descending; cheaper than `svd`.

    Those of a large float32 matrix come from its Gram matrix in float64: faster, and its rounding
    is below that of an SVD in float32 down to the smallest value.

    Raises:
        DecompositionError: no driver converged.
    """
    if matrix_MN.dtype == torch.float32 and min(matrix_MN.shape) >= _GRAM_FROM:
        return value_weights(matrix_MN).sqrt().float()
    return _driver_values(matrix_MN)


def _driver_values(matrix_MN: Tensor) -> Tensor:
    try:
        return torch.linalg.svdvals(matrix_MN)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return svd(matrix_MN)[1]
