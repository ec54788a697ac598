"""Tensor cross interpolation: a function of many discrete inputs as a matrix product state.

Across every bond the function is a matrix, rows for the digits to the left, columns for those to
the right. Interpolating it from r rows and r columns needs their crossings to be a well-conditioned
matrix. Two-site sweeps choose them: between the rows (chosen left rows) x (digit) and the columns
(digit) x (chosen right columns), the whole matrix is evaluated and pivots are taken by a full
search, largest residual first, until it is below the tolerance. The number of evaluations grows as
n d^2 r^2, not as d^n.

An interpolation knows only what it has looked at. So it is judged on random configurations that it
was not built from; and where these show an error, the worst of them become pivots of the next
sweeps. A function that vanishes but on a few configurations must be started on one of them.

Sources: Oseledets, Tyrtyshnikov, Linear Algebra Appl. 432 (2010) 70; Savostyanov, Oseledets, 7th
Int. Workshop on Multidimensional Systems (2011); Núñez Fernández et al., Phys. Rev. X 12 (2022)
041018, and SciPost Phys. 18 (2025) 104.
"""

# Shape suffixes: B configurations, N sites, K digits left of a bond, M right of it; X rows and
# Y columns of a two-site matrix, P pivots; L left bond, D digit, R right bond.

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpocompress.analysis.functions import AmplitudeFunction, Encoding
from mpocompress.errors import DataError
from mpocompress.mpo import MPO
from mpocompress.mpo.truncate import check_bond_dim

# Configurations that an error adds to the pivots; the sweeps drop those that were not needed.
_WORST = 8
# Residual at which pivots end, over the tolerance; times itself where that was not enough.
_MARGIN = 0.3
# Rounds without a smaller error before the best one is taken.
_PATIENCE = 4
_TOLERANCE = 1e-10
# Residuals below this share of the largest value are rounding of the function itself.
_ROUNDING = 1e-14


@dataclass(frozen=True, eq=False)
class CrossInterpolation:
    """A function as a matrix product state, and how far it is off.

    Attributes:
        mpo: the state as an MPO of n sites (d, 1), float64; its matrix (d^n, 1) has the amplitudes.
        converged: the check stayed within the tolerance.
        max_error: largest error on the check's random configurations, over the largest |psi| seen.
        relative_error: root of the mean squared error over that of psi on the same ones: an
            estimate of the error in norm.
        evaluations: of the function, the check included.
        sweeps: passes over the chain.
    """

    mpo: MPO
    converged: bool
    max_error: float
    relative_error: float
    evaluations: int
    sweeps: int

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """Numbers of pivots at all bonds."""
        return self.mpo.bond_dims

    def evaluate(self, digits_BN: Tensor) -> Tensor:
        """Amplitudes (B,) of configurations, float64."""
        return evaluate_chain(self.mpo.cores, digits_BN)


def evaluate_chain(cores: tuple[Tensor, ...], digits_BN: Tensor) -> Tensor:
    """Amplitudes (B,) of the configurations (B, N) in a chain of cores (L, D, 1, R)."""
    row_BL = cores[0].new_ones(len(digits_BN), 1)
    for site, core_LDIR in enumerate(cores):
        core_DLR = core_LDIR[:, :, 0].transpose(0, 1)
        next_BR = row_BL.new_zeros(len(row_BL), core_DLR.shape[2])
        for digit in range(core_DLR.shape[0]):  # a matrix for each digit, not for each row
            here_B = digits_BN[:, site].to(row_BL.device) == digit
            next_BR[here_B] = row_BL[here_B] @ core_DLR[digit]
        row_BL = next_BR
    return row_BL[:, 0]


def cross_interpolation(
    function: Callable[[Tensor], Tensor],
    num_sites: int,
    *,
    local_dim: int = 2,
    encoding: Encoding = "spins",
    log_amplitudes: bool = False,
    tolerance: float | None = None,
    bond_dim: int = 128,
    max_sweeps: int = 20,
    start: Tensor | None = None,
    check_points: int = 2000,
    seed: int = 0,
) -> CrossInterpolation:
    """Interpolate a real function of n digits by a matrix product state.

    Args:
        function: see `AmplitudeFunction`, as the next four; real.
        num_sites: n, at least 2.
        local_dim: d.
        encoding: of the digits.
        log_amplitudes: the function gives ln psi.
        tolerance: largest error relative to the largest |psi| seen; default: 1e-10, or in a
            function that computes in float32 its rounding, 1e-5.
        bond_dim: largest bond dimension; where it does not suffice, `converged` is False.
        max_sweeps: passes over the chain at most; there and back is two.
        start: configurations (B, n) to begin with, digits; at least one must not vanish. Default:
            the largest of random ones.
        check_points: random configurations that judge the result.
        seed: of these and of the start.

    Raises:
        DataError: a complex function, impossible sizes, or one that vanishes wherever looked at.
        BondDimError: a bond dimension below 1.
    """
    check_bond_dim(bond_dim)
    psi = AmplitudeFunction(
        function,
        num_sites,
        local_dim=local_dim,
        encoding=encoding,
        log_amplitudes=log_amplitudes,
    )
    return interpolate(
        psi,
        tolerance=tolerance,
        bond_dim=bond_dim,
        max_sweeps=max_sweeps,
        start=start,
        check_points=check_points,
        seed=seed,
    )


def interpolate(
    psi: AmplitudeFunction,
    *,
    tolerance: float | None,
    bond_dim: int,
    max_sweeps: int,
    start: Tensor | None,
    check_points: int,
    seed: int,
) -> CrossInterpolation:
    """`cross_interpolation` of what can already be evaluated."""
    if (
        psi.num_sites < 2
        or check_points < 1
        or max_sweeps < 2
        or not (tolerance is None or tolerance > 0)
    ):
        raise DataError(
            f"{psi.num_sites} sites, {check_points} check points, {max_sweeps} sweeps, tolerance "
            f"{tolerance}: at least 2, 1, 2 and a positive one are needed."
        )
    generator = torch.Generator().manual_seed(seed)

    def random_points(count: int) -> Tensor:
        shape = (count, psi.num_sites)
        return torch.randint(psi.local_dim, shape, generator=generator, device="cpu").to(psi.device)

    check_BN = random_points(check_points)
    exact_B = psi(check_BN)
    if exact_B.is_complex():
        raise DataError("the function is complex; interpolate its real and imaginary parts.")
    if tolerance is None:
        tolerance = max(_TOLERANCE, 100 * psi.precision)
    if start is None:
        candidates_BN = random_points(256)
        values_B = psi(candidates_BN).abs()
        start = candidates_BN[values_B.argmax()][None]
    start = torch.as_tensor(start, device=psi.device).long()
    if start.ndim != 2 or start.shape[1] != psi.num_sites:
        raise DataError(
            f"start of shape {tuple(start.shape)}: it is (points, {psi.num_sites}), a "
            "configuration in each row."
        )
    if not bool(((start >= 0) & (start < psi.local_dim)).all()):
        raise DataError(
            f"start with digits from {int(start.min())} to {int(start.max())}: at a site of "
            f"{psi.local_dim} values they are 0 to {psi.local_dim - 1}, whatever the encoding."
        )
    if not bool(psi(start).any()):
        raise DataError(
            "the function vanishes there, where the interpolation is to start. Give start=..., a "
            "configuration where it does not vanish."
        )
    pivots = _Pivots(psi, start, tolerance=tolerance, bond_dim=bond_dim)
    sweeps, least, stuck = 0, float("inf"), 0
    best: tuple[Tensor, ...] = ()
    while True:
        pivots.sweep(to_the_right=False)
        cores = pivots.sweep(to_the_right=True)
        sweeps += 2
        error_B = (evaluate_chain(cores, check_BN) - exact_B).abs()
        worst = float(error_B.max())
        converged = worst <= tolerance * psi.largest
        stuck = 0 if worst < least else stuck + 1
        if worst < least:
            least, best = worst, cores
        # At the largest bond dimension new pivots displace old ones: errors go up and down.
        if converged or sweeps + 2 > max_sweeps or stuck >= _PATIENCE:
            break
        pivots.add(check_BN[error_B.topk(min(_WORST, check_points)).indices])
    # Some of the check have become pivots by now: what is reported is measured on fresh points.
    fresh_BN = random_points(check_points)
    fresh_B = psi(fresh_BN)
    difference_B = evaluate_chain(best, fresh_BN) - fresh_B
    norm = float(fresh_B.norm())
    max_error = float(difference_B.abs().max()) / psi.largest
    return CrossInterpolation(
        mpo=MPO(best),
        converged=converged and max_error <= tolerance,
        max_error=max_error,
        relative_error=float(difference_B.norm()) / norm if norm > 0 else max_error,
        evaluations=psi.evaluations,
        sweeps=sweeps,
    )


class _Pivots:
    """Chosen rows (r, k) and columns (r, n - k) at every cut k, and the sweeps that choose them."""

    def __init__(
        self, psi: AmplitudeFunction, start_BN: Tensor, *, tolerance: float, bond_dim: int
    ) -> None:
        self._psi, self._bond_dim = psi, bond_dim
        # Errors of all bonds add up: pivots are taken well below what is asked for in the end.
        self._tolerance = _MARGIN * tolerance
        sites = psi.num_sites
        # At the ends there is one row, and one column, of no digits.
        self.rows = [start_BN[:1, :0] for _ in range(sites + 1)]
        self.columns = [start_BN[:1, :0] for _ in range(sites + 1)]
        for cut in range(1, sites):
            self.rows[cut] = torch.unique(start_BN[:, :cut], dim=0)
            self.columns[cut] = torch.unique(start_BN[:, cut:], dim=0)

    def add(self, points_BN: Tensor) -> None:
        """Let whole configurations take part in the next choice, and choose more closely."""
        self._tolerance *= _MARGIN
        for cut in range(1, self._psi.num_sites):
            rows, columns = points_BN[:, :cut], points_BN[:, cut:]
            self.rows[cut] = torch.unique(torch.cat((self.rows[cut], rows)), dim=0)
            self.columns[cut] = torch.unique(torch.cat((self.columns[cut], columns)), dim=0)

    def sweep(self, *, to_the_right: bool) -> tuple[Tensor, ...]:
        """Choose rows and columns anew at every cut; the chain that they give (to the right)."""
        sites, dim = self._psi.num_sites, self._psi.local_dim
        cores = []
        cuts = range(1, sites) if to_the_right else range(sites - 1, 0, -1)
        left = 1
        for cut in cuts:
            rows_XK = _with_digit(self.rows[cut - 1], dim, last=True)
            columns_YM = _with_digit(self.columns[cut + 1], dim, last=False)
            matrix_XY = self._values(rows_XK, columns_YM)
            rows_P, columns_P, factor_XP = full_pivots(
                matrix_XY,
                absolute=self._tolerance * self._psi.largest,
                rank=self._bond_dim,
            )
            self.rows[cut], self.columns[cut] = rows_XK[rows_P], columns_YM[columns_P]
            if to_the_right:
                # A[:, columns] A[rows, columns]^-1, which is a unit matrix at the chosen rows.
                core_XP = torch.linalg.solve_triangular(
                    factor_XP[rows_P], factor_XP, upper=False, left=False, unitriangular=True
                )
                cores.append(core_XP.reshape(left, dim, 1, -1))
                left = len(rows_P)
        if to_the_right:
            last_XK = _with_digit(self.rows[sites - 1], dim, last=True)
            cores.append(self._values(last_XK, last_XK[:1, :0]).reshape(left, dim, 1, 1))
        return tuple(cores)

    def _values(self, rows_XK: Tensor, columns_YM: Tensor) -> Tensor:
        x, y = len(rows_XK), len(columns_YM)
        points = torch.cat((rows_XK.repeat_interleave(y, dim=0), columns_YM.repeat(x, 1)), dim=1)
        return self._psi(points).reshape(x, y)


def full_pivots(matrix_XY: Tensor, *, absolute: float, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian elimination with a full search for the pivot, stopped at a residual or a rank.

    Args:
        matrix_XY: float64.
        absolute: stop when no entry of the residual is larger; at least one pivot is taken.
        rank: stop at so many pivots.

    Returns:
        Pivot rows, pivot columns, and L (X, P): the matrix is about L U, L unit lower triangular at
        the pivot rows, with no entry above 1.
    """
    residual_XY = matrix_XY.clone()
    rows: list[int] = []
    columns: list[int] = []
    factors: list[Tensor] = []
    floor = max(absolute, _ROUNDING * float(matrix_XY.abs().max()))
    for _ in range(min(rank, *matrix_XY.shape)):
        place = int(residual_XY.abs().argmax())
        row, column = divmod(place, residual_XY.shape[1])
        pivot = residual_XY[row, column].clone()
        if float(pivot.abs()) <= floor and rows:
            break
        if float(pivot.abs()) == 0.0:
            pivot = torch.ones_like(pivot)  # a zero matrix: any row and column will do
        factor_X = residual_XY[:, column] / pivot
        factor_X[row] = 1.0
        factor_X[rows] = 0.0
        residual_XY -= factor_X[:, None] * residual_XY[row].clone()
        residual_XY[row] = 0.0
        residual_XY[:, column] = 0.0
        rows.append(row)
        columns.append(column)
        factors.append(factor_X)
    device = matrix_XY.device
    return (
        torch.tensor(rows, device=device),
        torch.tensor(columns, device=device),
        torch.stack(factors, dim=1),
    )


def _with_digit(digits_BK: Tensor, dim: int, *, last: bool) -> Tensor:
    """Every row with every digit put after it (the digit runs fastest) or before it (slowest)."""
    count = len(digits_BK)
    digits = torch.arange(dim, device=digits_BK.device)
    if last:
        return torch.cat(
            (digits_BK.repeat_interleave(dim, dim=0), digits.repeat(count)[:, None]), dim=1
        )
    return torch.cat((digits.repeat_interleave(count)[:, None], digits_BK.repeat(dim, 1)), dim=1)
