"""The identity gauge: a chain stored by no more numbers than it has degrees of freedom.

Across a bond of dimension R any invertible R x R matrix and its inverse may be inserted, so R^2 of
the numbers in a chain say nothing. Here they are spent on an identity: core k, seen as the matrix
(L*O*I, R), has the R unit vectors in R of its rows, the *pivots*, and only its other rows, the
*free* ones, are stored. The last core is stored whole; its entries are entries of the matrix.

Bonds are fixed from left to right. Nothing is lost: the dense matrix stays the same.
"""

# Shape suffixes: L left bond, O out, I in, R right bond, X = L*O*I, F = X - R free rows.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mpocompress.errors import ContractionError, LayoutError
from mpocompress.mpo import canonical, linalg
from mpocompress.mpo.cores import Cores, check_cores, layout_of
from mpocompress.mpo.dense import to_dense
from mpocompress.mpo.dominant_rows import dominant_rows
from mpocompress.mpo.layout import Layout

Gauge = Literal["none", "identity"]
"""How a chain is stored: all entries of all cores, or in the identity gauge."""


def check_gauge(gauge: str) -> Gauge:
    """The name of a gauge.

    Raises:
        LayoutError: there is none of that name.
    """
    for known in get_args(Gauge):
        if gauge == known:
            return known
    raise LayoutError(f'gauge {gauge!r}: there are "none" and "identity".')


def stored_parameters(layout: Layout, bond_dims: Sequence[int], gauge: Gauge) -> int:
    """Numbers that a chain of these sizes takes in a gauge; indices are not counted."""
    if gauge == "identity":
        return layout.degrees_of_freedom(bond_dims)
    return layout.num_parameters(bond_dims)


@dataclass(frozen=True, eq=False, slots=True)
class IdentityGauge:
    """A chain in the identity gauge.

    Attributes:
        free: free rows (F, R) of every core but the last, in the order of the core's rows.
        pivots: numbers (R,) of the rows that hold the identity, ascending, one tensor for each
            core but the last, in the smallest integer dtype that holds them.
        last: the last core (L, O, I, 1), whole.
        layout: the sites.
        shape: (out, in) of the matrix; what the sites multiply to beyond it is padding.

    Raises:
        ContractionError: sizes that do not fit each other, mixed dtypes or devices, or pivots that
            are not ascending row numbers; the message names the site.
        LayoutError: the shape is larger than what the sites multiply to.
    """

    free: tuple[Tensor, ...]
    pivots: tuple[Tensor, ...]
    last: Tensor
    layout: Layout
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", _padded(self.layout, self.shape))
        sites = self.layout.num_sites
        if len(self.free) != sites - 1 or len(self.pivots) != sites - 1:
            raise ContractionError(
                f"{len(self.free)} sets of free rows and {len(self.pivots)} of pivots: a layout "
                f"of {sites} sites has {sites - 1} bonds, and needs one of each for every bond."
            )
        left = 1
        for site, (free_FR, pivots_R) in enumerate(zip(self.free, self.pivots, strict=True)):
            out, in_ = self.layout.pairs[site]
            check_rows(site, free_FR, pivots_R, left * out * in_)
            if free_FR.dtype != self.last.dtype or free_FR.device != self.last.device:
                raise ContractionError(
                    f"core {site} is {free_FR.dtype} on {free_FR.device}, the last core is "
                    f"{self.last.dtype} on {self.last.device}. Move them together with .to(...)."
                )
            left = int(pivots_R.shape[0])
        expected = (left, *self.layout.pairs[-1], 1)
        if tuple(self.last.shape) != expected:
            raise ContractionError(
                f"core {sites - 1}, the last one, has shape {tuple(self.last.shape)}; the sites "
                f"and pivots before it need {expected}."
            )

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """Dimensions of the L - 1 inner bonds."""
        return tuple(int(pivots_R.shape[0]) for pivots_R in self.pivots)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the free rows and the last core."""
        return self.last.dtype

    @property
    def num_parameters(self) -> int:
        """Stored numbers, without the indices: entries of all cores less the sum of R^2."""
        return sum(free_FR.numel() for free_FR in self.free) + self.last.numel()

    @property
    def index_bytes(self) -> int:
        """Bytes of the pivots."""
        return sum(pivots_R.nbytes for pivots_R in self.pivots)

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is stored: numbers and pivots."""
        return self.num_parameters * self.dtype.itemsize + self.index_bytes

    @property
    def cores(self) -> Cores:
        """The chain as ordinary cores, differentiable in `free` and `last`."""
        built = []
        left = 1
        for site, (free_FR, pivots_R) in enumerate(zip(self.free, self.pivots, strict=True)):
            shape = (left, *self.layout.pairs[site], int(pivots_R.shape[0]))
            sources_X = row_sources(pivots_R, free_FR.shape[0])
            built.append(rebuild_core(free_FR, pivots_R, sources_X, shape))
            left = shape[3]
        return (*built, self.last)

    def to_dense(self) -> Tensor:
        """The matrix (out, in), differentiable in `free` and `last`."""
        return to_dense(self.cores, self.shape)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "IdentityGauge":
        """The same chain in another dtype or on another device."""
        return IdentityGauge(
            tuple(free_FR.to(dtype=dtype, device=device) for free_FR in self.free),
            tuple(pivots_R.to(device=device) for pivots_R in self.pivots),
            self.last.to(dtype=dtype, device=device),
            self.layout,
            self.shape,
        )


def fix_identity_gauge(
    cores: Sequence[Tensor], *, shape: tuple[int, int] | None = None
) -> IdentityGauge:
    """Bring a chain into the identity gauge; the dense matrix stays the same.

    The chain is made right canonical first, so that neither the pivots nor the free rows depend on
    the gauge that it comes in, however ill-conditioned. Pivots are chosen such that no free entry
    is larger than `dominant_rows.DOMINANCE`. A bond that carries less than its dimension (linearly
    dependent columns, or more of them than rows) is rounded to what it carries: what is cut is
    zero up to the rounding of float64.

    Args:
        cores: the chain, of any floating dtype. Work is done in float64, and the result is
            rounded to the dtype given once. Gradients stop here.
        shape: (out, in) of the matrix if the sites multiply to more.

    Raises:
        ContractionError: the cores form no chain, or are on the meta device.
        DecompositionError: NaN or Inf entries.

    Source: Oseledets, Tyrtyshnikov, Linear Algebra and its Applications 432 (2010) 70 (cross
        approximation of tensor trains), for a chain that is given.
    """
    check_cores(cores)
    dtype, layout = cores[0].dtype, layout_of(cores)
    if cores[0].is_meta:
        raise ContractionError(
            "the cores are on the meta device and have no values to pick pivots by. Load them "
            "first, then fix the gauge."
        )
    for core in cores:
        linalg.check_finite(core.detach())
    wide = tuple(core.detach().to(torch.float64) for core in cores)
    moved = list(canonical.move_center(wide, (0, len(wide) - 1), 0, 0)[0])
    free, pivots = [], []
    tolerance = canonical.chain_rank_tolerance(wide, torch.float64)
    for site in range(len(moved) - 1):
        left, out, in_, right = moved[site].shape
        basis_XR, carry_RS = _independent_columns(moved[site].reshape(-1, right), tolerance)
        pivots_R, core_XR = dominant_rows(basis_XR)
        kept_X = torch.ones(left * out * in_, dtype=torch.bool, device=core_XR.device)
        kept_X[pivots_R] = False
        free.append(core_XR[kept_X].to(dtype))
        pivots.append(pivots_R.to(index_dtype(left * out * in_)))
        moved[site + 1] = torch.tensordot(basis_XR[pivots_R] @ carry_RS, moved[site + 1], dims=1)
    return IdentityGauge(
        tuple(free),
        tuple(pivots),
        moved[-1].to(dtype),
        layout,
        shape or (layout.out_features, layout.in_features),
    )


def _independent_columns(matrix_XS: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Orthonormal B (X, R) and C (R, S) with matrix = B C, R the numerical rank (at least 1)."""
    basis_XK, carry_KS = linalg.qr(matrix_XS)
    values_K = linalg.svd_values(carry_KS)
    rank = max(1, int((values_K > tolerance * values_K[0]).sum()))
    if rank == carry_KS.shape[0]:
        return basis_XK, carry_KS
    left_KK, values_K, right_KS = linalg.svd(carry_KS)
    carry_RS = values_K[:rank, None] * right_KS[:rank]
    return basis_XK @ left_KK[:, :rank], carry_RS


def check_rows(site: int, free_FR: Tensor, pivots_R: Tensor, rows: int) -> None:
    """Check that free rows and pivots make up a core of `rows` rows.

    Raises:
        ContractionError: they do not; the message names the site.
    """
    sizes = f"core {site} has {rows} rows"
    if free_FR.ndim != 2 or pivots_R.ndim != 1 or pivots_R.shape[0] < 1:
        raise ContractionError(
            f"{sizes}; its free rows have shape {tuple(free_FR.shape)} and its pivots "
            f"{tuple(pivots_R.shape)}. They must be (rows - R, R) and (R,), R at least 1."
        )
    bond = int(pivots_R.shape[0])
    if tuple(free_FR.shape) != (rows - bond, bond):
        raise ContractionError(
            f"{sizes}, of which {bond} are pivots; its free rows must have shape "
            f"{(rows - bond, bond)}, not {tuple(free_FR.shape)}."
        )
    if pivots_R.dtype.is_floating_point or pivots_R.dtype == torch.bool:
        raise ContractionError(f"core {site}: pivots are row numbers, not {pivots_R.dtype}.")
    if pivots_R.is_meta:  # the shapes are all there is
        return
    numbers = pivots_R.tolist()
    if numbers != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= rows:
        raise ContractionError(
            f"{sizes}; its pivots {numbers[:5]}... must be ascending numbers from 0 to {rows - 1}, "
            "each once. The file is damaged, or the pivots belong to another core."
        )


def index_dtype(size: int) -> torch.dtype:
    """The smallest integer dtype that counts to `size`."""
    if size <= 1 << 8:
        return torch.uint8
    return next(
        dtype
        for dtype in (torch.int16, torch.int32, torch.int64)
        if size - 1 <= torch.iinfo(dtype).max
    )


def row_sources(pivots_R: Tensor, num_free: int) -> Tensor:
    """Where each row of a core comes from: r < R is unit vector r, R + f is free row f.

    Returns:
        (X,) in the smallest integer dtype.
    """
    bond = pivots_R.shape[0]
    rows = bond + num_free
    is_pivot_X = torch.zeros(rows, dtype=torch.int64, device=pivots_R.device)
    is_pivot_X[pivots_R.long()] = 1
    before_X = is_pivot_X.cumsum(0) - is_pivot_X  # pivots among the rows before
    free_X = bond + torch.arange(rows, device=pivots_R.device) - before_X
    return torch.where(is_pivot_X == 1, before_X, free_X).to(index_dtype(rows))


def rebuild_core(
    free_FR: Tensor, pivots_R: Tensor, sources_X: Tensor, shape: tuple[int, int, int, int]
) -> Tensor:
    """The ordinary core (L, O, I, R), differentiable in its free rows.

    Args:
        free_FR: the rows that are stored.
        pivots_R: numbers of the other rows.
        sources_X: what `row_sources` gives for them.
        shape: of the core.
    """
    sources_X = sources_X.long()
    # 0, 1, ..., R - 1, read from stored tensors: an exporter would fold the identity matrix into
    # its file if it were made of constants alone.
    columns_R = sources_X.index_select(0, pivots_R.long())
    core_XR = (columns_R.unsqueeze(1) == columns_R).to(free_FR.dtype)
    if free_FR.shape[0]:
        core_XR = torch.cat((core_XR, free_FR))
    return core_XR.index_select(0, sources_X).reshape(shape)


def _padded(layout: Layout, shape: tuple[int, int]) -> Layout:
    padded = (layout.out_features, layout.in_features) != tuple(shape)
    found = Layout(layout.out_dims, layout.in_dims, padded)
    found.check(shape)
    return found
