"""From a dense matrix to cores: sequential SVD, and MPOs that are known in closed form."""

# Shape suffixes: O rows, I columns, X left bond * out * in, Y everything to the right, R new bond.

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from mpocompress.errors import DecompositionError, LayoutError
from mpocompress.mpo import linalg
from mpocompress.mpo.cores import Cores, expand_bond_dims
from mpocompress.mpo.layout import Layout
from mpocompress.mpo.truncate import Cut, Truncation, choose_bond_dim, error_bound


@dataclass(frozen=True, kw_only=True, slots=True)
class Factorization:
    """Cores of one sequential SVD and what was cut at each bond.

    Attributes:
        cores: left canonical but for the last one, which is the orthogonality center; float32 or
            float64.
        cuts: one per bond, left to right.
        weight: squared Frobenius norm of the matrix.
    """

    cores: Cores
    cuts: tuple[Cut, ...]
    weight: float

    @property
    def error_bound(self) -> float:
        """Absolute Frobenius error; exact for this one pass, up to rounding."""
        return error_bound(self.cuts)

    @property
    def relative_error(self) -> float:
        """`error_bound` relative to the norm of the matrix (0 for a zero matrix)."""
        return self.error_bound / sqrt(self.weight) if self.weight > 0 else 0.0


def sequential_svd(
    matrix_OI: Tensor,
    layout: Layout,
    *,
    bond_dim: int | Sequence[int] | None = None,
    cutoff: float = 0.0,
    generator: torch.Generator | None = None,
) -> Factorization:
    """Factorize a matrix by SVDs from left to right, the orthogonality center moving along.

    The squared error equals the summed discarded weights, and is at most L - 1 times the best
    possible at these bond dimensions.

    Args:
        matrix_OI: (out, in), any real floating dtype; see `linalg.decomposition_dtype` for the
            dtype of the work.
        layout: must fit the matrix.
        bond_dim: largest bond dimension, one for all bonds or one for each; None for no limit.
        cutoff: largest truncation error at each bond (relative discarded weight, squared).
        generator: for the randomized range finder of large matrices; fixed seed by default.

    Raises:
        LayoutError: the layout does not fit.
        BondDimError: a bond dimension below 1, or the wrong number of them.
        DecompositionError: NaN or Inf entries, a cutoff outside [0, 1), no driver converged.

    Source: Oseledets, SIAM J. Sci. Comput. 33 (2011) 2295, algorithm 1, for matrices as in
    Oseledets, SIAM J. Matrix Anal. Appl. 31 (2010) 2130.
    """
    check_matrix(matrix_OI)
    bond_dims = expand_bond_dims(bond_dim, layout.num_sites - 1)
    limits = [Truncation(bond_dim=bond, cutoff=cutoff) for bond in bond_dims]
    layout.check((matrix_OI.shape[0], matrix_OI.shape[1]))
    linalg.check_finite(matrix_OI)
    rest = layout.split(matrix_OI.detach().to(linalg.decomposition_dtype(matrix_OI)))
    weight = linalg.weight_of(rest)
    # Noise is relative to the whole matrix: later unfoldings are smaller, their rounding is not.
    result_dtype = linalg.working_dtype(matrix_OI.dtype)
    tolerance = linalg.rank_tolerance(tuple(matrix_OI.shape), result_dtype, work=rest.dtype)
    cores: list[Tensor] = []
    cuts: list[Cut] = []
    left_bond = 1
    for (out, in_), limit in zip(layout.pairs, limits, strict=False):
        theta_XY = rest.reshape(left_bond * out * in_, -1)
        known = None if cores else weight
        found = linalg.leading_svd(theta_XY, limit.bond_dim, generator, weight=known)
        cut = choose_bond_dim(
            found.values_R, limit, rank_tolerance=tolerance, total_weight=found.total_weight
        )
        bond = cut.bond_dim
        cores.append(found.left_MR[:, :bond].reshape(left_bond, out, in_, bond))
        rest = found.values_R[:bond, None] * found.right_RN[:bond]
        cuts.append(cut)
        left_bond = bond
    cores.append(rest.reshape(left_bond, layout.out_dims[-1], layout.in_dims[-1], 1))
    return Factorization(
        cores=tuple(_own(core.to(result_dtype), matrix_OI) for core in cores),
        cuts=tuple(cuts),
        weight=weight,
    )


def check_matrix(matrix_OI: Tensor) -> tuple[int, int]:
    """The shape of what is to be factorized.

    Raises:
        DecompositionError: no tensor, or an empty one.
        LayoutError: a tensor that is no matrix.
    """
    if not isinstance(matrix_OI, Tensor):
        raise DecompositionError(
            f"a {type(matrix_OI).__name__} is not a torch tensor. Convert it with torch.as_tensor."
        )
    if matrix_OI.ndim != 2:
        raise LayoutError(
            f"a tensor of shape {tuple(matrix_OI.shape)} is not a matrix (out, in). Reshape it."
        )
    if matrix_OI.numel() == 0:
        raise DecompositionError(
            f"a matrix of shape {tuple(matrix_OI.shape)} is empty; there is nothing to factorize."
        )
    return matrix_OI.shape[0], matrix_OI.shape[1]


def _own(core: Tensor, matrix_OI: Tensor) -> Tensor:
    """The core in memory of its own: a chain of one site may be a view of the matrix."""
    shared = core.untyped_storage().data_ptr() == matrix_OI.untyped_storage().data_ptr()
    return core.clone() if shared else core.contiguous()


def identity_cores(layout: Layout, dtype: torch.dtype, device: torch.device | None) -> Cores:
    """The identity, bond dimension 1.

    Raises:
        LayoutError: a site whose out and in dims differ.
    """
    if layout.out_dims != layout.in_dims:
        raise LayoutError(
            f"layout {layout}: the identity needs equal out and in dims at every site."
        )
    return tuple(
        torch.eye(out, dtype=dtype, device=device)[None, :, :, None] for out in layout.out_dims
    )


def kronecker_cores(factors: Sequence[Tensor]) -> Cores:
    """The Kronecker product of matrices (out_k, in_k), leftmost most significant: bond dim 1.

    Raises:
        LayoutError: a factor that is no matrix.
    """
    for site, factor in enumerate(factors):
        if factor.ndim != 2:
            raise LayoutError(
                f"factor {site} of shape {tuple(factor.shape)} is not a matrix (out, in). Reshape "
                "it; a vector is (n, 1) or (1, n)."
            )
    return tuple(factor[None, :, :, None] for factor in factors)


def random_cores(
    layout: Layout,
    bond_dim: int | Sequence[int] | None,
    *,
    variance: float,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Cores:
    """Independent Gaussian cores whose matrix has entries of mean 0 and the given variance.

    An entry of the matrix is a sum over all bonds (prod D_k terms) of products of L independent
    core entries, so its variance is prod(D_k) * prod(var_k); every core takes the same share.

    Raises:
        BondDimError: a bond dimension below 1, or the wrong number of them.
    """
    limits = expand_bond_dims(bond_dim, layout.num_sites - 1)
    most = layout.max_bond_dims()
    wanted = [cap if bond is None else bond for bond, cap in zip(limits, most, strict=True)]
    bonds = (1, *layout.clip(wanted), 1)
    # By shares: the product of the bonds of a long chain is beyond what a float holds.
    share = 0.5 / layout.num_sites
    std = variance**share * prod(bond**-share for bond in bonds)
    return tuple(
        std
        * torch.randn(
            (bonds[k], out, in_, bonds[k + 1]), dtype=dtype, device=device, generator=generator
        )
        for k, (out, in_) in enumerate(layout.pairs)
    )
