"""Gauge: left and right canonical cores, moving the orthogonality center, rounding.

A core is left canonical if its (left*out*in, right) matrix has orthonormal columns, right canonical
if its (left, out*in*right) matrix has orthonormal rows. The *orthogonality center* is a range of
sites (first, last): cores before it are left canonical, cores after it right canonical. A chain of
which nothing is known has the range (0, L - 1).
"""

# Shape suffixes: L left bond, O out, I in, R right bond, X = L*O*I, Y = O*I*R, K new bond.

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpocompress.errors import ContractionError
from mpocompress.mpo import linalg
from mpocompress.mpo.cores import Cores, expand_bond_dims, layout_of
from mpocompress.mpo.truncate import Cut, Truncation, choose_bond_dim

Center = tuple[int, int]

_LEAST_SHARED = 1e-4


def move_center(
    cores: Sequence[Tensor], center: Center, first: int, last: int
) -> tuple[Cores, Center]:
    """Shrink or shift the orthogonality center to the sites `first` to `last` by QR steps.

    Neither the matrix nor any spectrum changes. Only the cores between the old and the new range
    are touched. The new center, returned too, may be smaller than the range asked for.

    Raises:
        ContractionError: the range is empty or outside the chain.
    """
    sites = len(cores)
    if not 0 <= first <= last < sites:
        raise ContractionError(
            f"orthogonality center {(first, last)}: the sites of this MPO are 0 to {sites - 1}."
        )
    moved = list(cores)
    for site in range(center[0], first):
        left, out, in_, right = moved[site].shape
        q_XK, r_KR = linalg.qr(moved[site].reshape(left * out * in_, right))
        moved[site] = q_XK.reshape(left, out, in_, -1)
        moved[site + 1] = torch.tensordot(r_KR, moved[site + 1], dims=1)
    for site in range(center[1], last, -1):
        left, out, in_, right = moved[site].shape
        q_YK, r_KL = linalg.qr(moved[site].reshape(left, out * in_ * right).mT)
        moved[site] = q_YK.mT.reshape(-1, out, in_, right)
        moved[site - 1] = torch.tensordot(moved[site - 1], r_KL.mT, dims=1)
    return tuple(moved), (min(max(center[0], first), last), max(min(center[1], last), first))


def canonical_defects(cores: Sequence[Tensor], center: Center) -> list[float]:
    """Measure the gauge: per site, the largest deviation from an isometry (0 at the center)."""
    defects = []
    for site, core in enumerate(cores):
        if center[0] <= site <= center[1]:
            defects.append(0.0)
            continue
        left, _, _, right = core.shape
        matrix = core.reshape(-1, right) if site < center[0] else core.reshape(left, -1).mT
        gram = matrix.mT @ matrix
        unit = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        defects.append(float((gram - unit).abs().max()))
    return defects


def equalize_norms(cores: Sequence[Tensor]) -> Cores:
    """Rescale every core to the same Frobenius norm: the geometric mean of what they have.

    The matrix does not change, nor does a core's direction; a core of norm 0 leaves all as they
    are. Gradients of a core are as large as the product of the others, so one learning rate for
    all cores needs this.
    """
    norms = [float(core.detach().double().norm()) for core in cores]
    if not all(0 < norm < math.inf for norm in norms):
        return tuple(cores)
    common = math.exp(sum(math.log(norm) for norm in norms) / len(norms))
    return tuple(core * (common / norm) for core, norm in zip(cores, norms, strict=True))


def symmetric_gauge(cores: Sequence[Tensor]) -> Cores:
    """Share the Schmidt values of every bond equally between its two cores.

    The result depends on the matrix alone, but for signs and rotations among equal Schmidt values:
    what is done to the cores next no longer remembers how they came about. For two sites these are
    the balanced factors U sqrt(S), sqrt(S) V^T; then all norms are equalized. The matrix does not
    change; Schmidt values below 1e-4 of a bond's largest are shared as if they were that large,
    which keeps the transformation well conditioned.

    Returns:
        Cores of the same shapes and dtype; those of `equalize_norms` where a bond dimension is
        larger than the rank that its sites allow, the matrix is 0, or a core is not finite.

    Source: Vidal, Phys. Rev. Lett. 91 (2003) 147902: Gamma and lambda, here with half of lambda on
    each side.
    """
    if not all(bool(core.isfinite().all()) for core in cores):
        return equalize_norms(cores)
    sites = len(cores)
    moved = list(move_center([c.double() for c in cores], (0, sites - 1), sites - 1, sites - 1)[0])
    right_half_R: Tensor | None = None
    for site in range(sites - 1, 0, -1):
        left, out, in_, right = moved[site].shape
        u_LK, values_K, v_KY = torch.linalg.svd(moved[site].reshape(left, -1), full_matrices=False)
        if len(values_K) < cores[site].shape[0] or not bool(values_K[0] > 0):
            return equalize_norms(cores)
        half_K = values_K.clamp_min(_LEAST_SHARED * values_K[0]).sqrt()
        moved[site] = (half_K[:, None] * v_KY).reshape(left, out, in_, right)
        moved[site - 1] = torch.tensordot(moved[site - 1], u_LK * values_K, dims=1)
        # The core to the right has its half. This one gives it up only now: its own SVD was to
        # see all of the Schmidt values.
        if right_half_R is not None:
            moved[site] = moved[site] / right_half_R
        right_half_R = half_K
    if right_half_R is not None:
        moved[0] = moved[0] / right_half_R
    return equalize_norms([core.to(cores[0].dtype) for core in moved])


def chain_rank_tolerance(cores: Sequence[Tensor], dtype: torch.dtype) -> float:
    """`linalg.rank_tolerance` of a chain: of its matrix, or of all its cores if these are smaller.

    A matrix that is far larger than whatever is decomposed says nothing of its rounding.
    """
    layout = layout_of(cores)
    largest = max(core.numel() // min(core.shape[0], core.shape[3]) for core in cores)
    size = min(max(layout.out_features, layout.in_features), len(cores) * largest)
    return linalg.rank_tolerance((size,), dtype)


def round_cores(
    cores: Sequence[Tensor],
    center: Center,
    *,
    bond_dim: int | Sequence[int] | None = None,
    cutoff: float = 0.0,
) -> tuple[Cores, tuple[Cut, ...]]:
    """Recompress a chain: center to the right end, then SVD truncation from right to left.

    Returns:
        The cores, right canonical with the center at site 0, and the cuts, bond by bond from the
        left. As for the sequential SVD, the squared error equals the summed discarded weights.

    Raises:
        BondDimError: a bond dimension below 1, or the wrong number of them.

    Source: Oseledets, SIAM J. Sci. Comput. 33 (2011) 2295, algorithm 2.
    """
    sites = len(cores)
    limits = [
        Truncation(bond_dim=bond, cutoff=cutoff) for bond in expand_bond_dims(bond_dim, sites - 1)
    ]
    moved = list(move_center(cores, center, sites - 1, sites - 1)[0])
    cuts: list[Cut] = []
    tolerance = chain_rank_tolerance(cores, cores[0].dtype)
    for site in range(sites - 1, 0, -1):
        left, out, in_, right = moved[site].shape
        found = linalg.leading_svd(moved[site].reshape(left, -1), limits[site - 1].bond_dim)
        cut = choose_bond_dim(
            found.values_R,
            limits[site - 1],
            rank_tolerance=tolerance,
            total_weight=found.total_weight,
        )
        bond = cut.bond_dim
        moved[site] = found.right_RN[:bond].reshape(bond, out, in_, right)
        carry_LK = found.left_MR[:, :bond] * found.values_R[:bond]
        moved[site - 1] = torch.tensordot(moved[site - 1], carry_LK, dims=1)
        cuts.append(cut)
    return tuple(moved), tuple(reversed(cuts))
