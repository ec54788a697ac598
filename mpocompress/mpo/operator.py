"""The matrix product operator: cores, the shape of the matrix, and where the center is.

Everything here returns a new MPO; the functions of the room do the work on plain cores.
"""

from collections.abc import Iterable, Sequence
from math import prod
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpocompress.errors import ContractionError
from mpocompress.mpo import algebra, canonical, linalg, spectra
from mpocompress.mpo.contract import apply_cores, plans_for
from mpocompress.mpo.cores import Cores, bond_dims_of, check_cores, layout_of
from mpocompress.mpo.dense import to_dense
from mpocompress.mpo.factorize import (
    check_matrix,
    identity_cores,
    kronecker_cores,
    random_cores,
    sequential_svd,
)
from mpocompress.mpo.factors import resolve_layout
from mpocompress.mpo.layout import Layout, LayoutLike, as_layout

if TYPE_CHECKING:
    from mpocompress.mpo.metric import Metric


class MPO:
    """A matrix (out, in) as a chain of cores (left bond, out, in, right bond).

    Args:
        cores: the chain; outer bonds are 1. Not copied.
        shape: (out, in) of the matrix if the sites multiply to more: the rest is padding.
        center: range of sites (first, last) known to hold the orthogonality center; default:
            nothing is known, the whole chain.

    Raises:
        ContractionError: the cores do not form a chain, or the center lies outside it.
        LayoutError: the shape is larger than what the sites multiply to.

    For a padded matrix `norm`, `inner` and the spectra are those of the padded matrix.
    """

    __slots__ = ("_center", "_cores", "_shape")

    def __init__(
        self,
        cores: Iterable[Tensor],
        *,
        shape: tuple[int, int] | None = None,
        center: canonical.Center | None = None,
    ) -> None:
        chain: Cores = tuple(cores)
        check_cores(chain)
        layout = layout_of(chain, pad=True)
        if shape is None:
            shape = (layout.out_features, layout.in_features)
        layout.check(shape)
        center = (0, len(chain) - 1) if center is None else center
        if not 0 <= center[0] <= center[1] < len(chain):
            raise ContractionError(
                f"orthogonality center {center}: the sites of this MPO are 0 to {len(chain) - 1}."
            )
        self._cores = chain
        self._shape = (int(shape[0]), int(shape[1]))
        self._center = center

    # -- making one

    @classmethod
    def from_matrix(
        cls,
        matrix_OI: Tensor,
        layout: LayoutLike,
        *,
        bond_dim: int | Sequence[int] | None = None,
        cutoff: float = 0.0,
        metric: "Metric | None" = None,
        generator: torch.Generator | None = None,
    ) -> "MPO":
        """Factorize a matrix: by sequential SVD, or by a fit in a metric.

        Args:
            matrix_OI: (out, in), any real floating dtype. Work is done in float32 or wider; the
                cores have the matrix's dtype and device.
            layout: "svd", "balanced" (two sites), a `Layout`, (out, in) pairs, or text such as
                "32x28,32x28".
            bond_dim: largest bond dimension, for all bonds or one for each; None for no limit.
            cutoff: largest truncation error at each bond (relative discarded weight, squared).
            metric: what counts, such as `Metric(x.T @ x / len(x))` for the outputs of inputs x;
                None: all entries alike. See `mpo.fit.fit`, which also says how close it came.
            generator: for the randomized range finder of large matrices; a fit draws nothing.

        Raises:
            LayoutError: the layout does not fit the matrix.
            BondDimError: a bond dimension below 1.
            ContractionError: the metric does not fit the matrix.
            DecompositionError: NaN or Inf entries, an impossible cutoff, or a metric with negative
                eigenvalues.

        Source: Oseledets, SIAM J. Matrix Anal. Appl. 31 (2010) 2130.
        """
        shape = check_matrix(matrix_OI)
        named = isinstance(layout, str) and layout in ("svd", "balanced")
        layout = resolve_layout(layout, *shape) if named else as_layout(layout)
        if metric is not None:
            from mpocompress.mpo.fit import fit  # which is built on this class

            return fit(matrix_OI, metric, layout, bond_dim, cutoff=cutoff).mpo
        result = sequential_svd(
            matrix_OI, layout, bond_dim=bond_dim, cutoff=cutoff, generator=generator
        )
        last = layout.num_sites - 1
        return cls(result.cores, shape=shape, center=(last, last)).to(dtype=matrix_OI.dtype)

    @classmethod
    def identity(
        cls,
        layout: LayoutLike,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> "MPO":
        """The identity with bond dimension 1; LayoutError unless out and in dims are equal."""
        return cls(identity_cores(as_layout(layout), dtype, device))

    @classmethod
    def kronecker(cls, factors: Sequence[Tensor]) -> "MPO":
        """The Kronecker product of matrices (out_k, in_k), with bond dimension 1.

        Raises:
            LayoutError: a factor that is no matrix.
        """
        return cls(kronecker_cores(factors))

    @classmethod
    def random(
        cls,
        layout: LayoutLike,
        bond_dim: int | Sequence[int] | None,
        *,
        variance: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> "MPO":
        """Gaussian cores whose matrix has entries of mean 0 and the given variance."""
        return cls(
            random_cores(
                as_layout(layout),
                bond_dim,
                variance=variance,
                dtype=dtype,
                device=device,
                generator=generator,
            )
        )

    # -- reading it

    @property
    def cores(self) -> Cores:
        """The cores, left to right, each (left bond, out, in, right bond)."""
        return self._cores

    @property
    def center(self) -> canonical.Center:
        """First and last site of the orthogonality center; (0, L - 1) if nothing is known."""
        return self._center

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix, without padding."""
        return self._shape

    @property
    def layout(self) -> Layout:
        """Out and in dims of the sites; `pad` is set if they multiply to more than the shape."""
        layout = layout_of(self._cores)
        padded = (layout.out_features, layout.in_features) != self._shape
        return Layout(layout.out_dims, layout.in_dims, True) if padded else layout

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """Dimensions of the L - 1 inner bonds."""
        return bond_dims_of(self._cores)

    @property
    def num_parameters(self) -> int:
        """Entries of all cores, padding included."""
        return sum(core.numel() for core in self._cores)

    @property
    def num_bytes(self) -> int:
        """Bytes of all cores."""
        return self.num_parameters * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the cores."""
        return self._cores[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the cores."""
        return self._cores[0].device

    def __len__(self) -> int:
        return len(self._cores)

    def __repr__(self) -> str:
        return (
            f"MPO({self.shape[0]}x{self.shape[1]}, layout={self.layout}, "
            f"bond_dims={list(self.bond_dims)}, {self.num_parameters} parameters)"
        )

    def to_dense(self) -> Tensor:
        """The matrix (out, in), differentiable in the cores."""
        return to_dense(self._cores, self._shape)

    def apply(self, x: Tensor) -> Tensor:
        """W x for every row: (..., in) to (..., out), along the cheapest order for this batch.

        Raises:
            ContractionError: the last dimension of x is not `shape[1]`.
        """
        return apply_cores(self._cores, x, shape=self._shape)

    def macs(self, rows: int) -> int:
        """Multiply-adds of `apply` for a batch of `rows` rows."""
        return plans_for(self._cores).best(rows).macs(rows)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "MPO":
        """Cores in another dtype or on another device.

        A narrower dtype loses the gauge; and as its range may be narrower, too, the norm, which
        sits in the center core, is first spread over all cores.
        """
        target = dtype or self.dtype
        narrower = torch.promote_types(self.dtype, target) != target
        cores = algebra.spread_norm(self._cores) if narrower else self._cores
        return MPO(
            (core.to(dtype=target, device=device) for core in cores),
            shape=self._shape,
            center=None if narrower else self._center,
        )

    # -- gauge and spectra

    def canonicalize(self, first: int, last: int | None = None) -> "MPO":
        """Move the orthogonality center to the sites `first` to `last` (default: one site).

        The matrix does not change. Half types are worked on, and returned, in float32.

        Raises:
            ContractionError: no such sites.
        """
        last = first if last is None else last
        wide = self._widened()
        cores, center = canonical.move_center(wide._cores, wide._center, first, last)
        return MPO(cores, shape=self._shape, center=center)

    def round(self, *, bond_dim: int | Sequence[int] | None = None, cutoff: float = 0.0) -> "MPO":
        """Recompress to smaller bond dimensions; the center ends at site 0.

        The squared error equals the summed discarded weights. Half types return in float32.

        Raises:
            BondDimError: a bond dimension below 1.
        """
        wide = self._widened()
        cores, _ = canonical.round_cores(
            wide._cores, wide._center, bond_dim=bond_dim, cutoff=cutoff
        )
        return MPO(cores, shape=self._shape, center=(0, 0))

    def schmidt_spectra(self) -> list[Tensor]:
        """Schmidt values at every bond, left to right; each descending, not normalized."""
        wide = self._widened()
        return spectra.schmidt_spectra(wide._cores, wide._center)

    def schmidt_values(self, bond: int) -> Tensor:
        """Schmidt values at one bond: descending, not squared, not normalized.

        Raises:
            ContractionError: no such bond.
        """
        if not 0 <= bond < len(self) - 1:
            raise ContractionError(
                f"bond {bond}: an MPO of {len(self)} sites has {len(self) - 1} bonds, "
                "counted from 0."
            )
        return self.schmidt_spectra()[bond]

    def entropies_nats(self) -> list[float]:
        """Entanglement entropy at every bond, left to right, in nats."""
        return [spectra.entropy_nats(spectrum) for spectrum in self.schmidt_spectra()]

    def norm(self) -> float:
        """Frobenius norm, from the center core if there is one, else by contraction."""
        wide = self._widened()
        first, last = wide._center
        if first == last:
            return linalg.weight_of(wide._cores[first]) ** 0.5
        last_site = len(self) - 1
        # Orthogonalizing costs as much as <W, W>, and does not square the condition number.
        moved, _ = canonical.move_center(wide._cores, wide._center, last_site, last_site)
        return linalg.weight_of(moved[last_site]) ** 0.5

    # -- algebra

    def inner(self, other: "MPO") -> Tensor:
        """Frobenius inner product with an MPO of the same sites; a 0-d tensor, differentiable.

        Half types are summed, and returned, in float32.

        Raises:
            ContractionError: the sites differ.
        """
        algebra.check_same_sites(self._cores, other._cores, "inner product")
        return algebra.inner_cores(self._widened()._cores, other._widened()._cores)

    @property
    def T(self) -> "MPO":  # noqa: N802  # the name that torch and numpy use
        """The transposed matrix; the cores are views."""
        return MPO(
            algebra.transpose_cores(self._cores),
            shape=(self._shape[1], self._shape[0]),
            center=self._center,
        )

    def __add__(self, other: "MPO") -> "MPO":
        if not isinstance(other, MPO):
            return NotImplemented
        algebra.check_same_sites(self._cores, other._cores, "sum")
        if self._shape != other._shape:
            raise ContractionError(f"sum: shapes {self._shape} and {other._shape} differ.")
        return MPO(algebra.add_cores(self._cores, other._cores), shape=self._shape)

    def __radd__(self, other: int) -> "MPO":
        """For `sum`, which begins with the integer 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: "MPO") -> "MPO":
        return self + (-1.0) * other if isinstance(other, MPO) else NotImplemented

    def __neg__(self) -> "MPO":
        return (-1.0) * self

    def __mul__(self, factor: float) -> "MPO":
        """The matrix times a real number, or a tensor of one."""
        if not (isinstance(factor, Real) or (isinstance(factor, Tensor) and factor.ndim == 0)):
            return NotImplemented
        site = self._center[0]
        return MPO(
            algebra.scale_cores(self._cores, factor, site), shape=self._shape, center=self._center
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "MPO":
        return self * (1 / divisor) if isinstance(divisor, Real | Tensor) else NotImplemented

    def __matmul__(self, other: "MPO") -> "MPO":
        """Matrix product; bond dimensions multiply. For W x take `apply`.

        Raises:
            ContractionError: the right factor is no MPO, in dims of the left and out dims of the
                right one differ, or a factor is padded on that side, where truncation may have left
                entries.
        """
        if not isinstance(other, MPO):
            raise ContractionError(
                f"product of an MPO and a {type(other).__name__}: W.apply(x) gives W x for every "
                "row of x; make an MPO of a matrix with MPO.from_matrix."
            )
        mine, theirs = self.layout, other.layout
        if mine.in_dims != theirs.out_dims:
            raise ContractionError(
                f"product: in_dims {mine.in_dims} of the left factor and out_dims "
                f"{theirs.out_dims} of the right factor must be equal."
            )
        size = min(self._shape[1], other._shape[0])
        if size != prod(mine.in_dims):
            raise ContractionError(
                f"product: the summed index is padded from {size} to {prod(mine.in_dims)}; use "
                "layouts that divide it exactly."
            )
        return MPO(
            algebra.compose_cores(self._cores, other._cores),
            shape=(self._shape[0], other._shape[1]),
        )

    def _widened(self) -> "MPO":
        wide = linalg.working_dtype(self.dtype)
        return self if wide == self.dtype else self.to(dtype=wide)
