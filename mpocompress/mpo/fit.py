"""Fitting a chain to a matrix in a metric: the one routine behind every data-aware compression.

`fit` minimizes tr(G (T − W) C (T − W)ᵀ) over all W of a layout and bond dimensions. For the
layouts ((out, 1), (1, in)) and ((1, in), (out, 1)) the minimum is closed: an SVD of the whitened
matrix. For all others it is approached by sweeps, each local solve exact, so that the objective
never rises.
"""

# Shape suffixes: O rows, I columns, R bond; L left bond of a core.

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import isfinite, sqrt

import torch
from torch import Tensor, constant_pad_nd

from mpocompress.errors import ContractionError, DecompositionError, LayoutError
from mpocompress.mpo import linalg
from mpocompress.mpo.canonical import move_center, round_cores
from mpocompress.mpo.cholesky import solve_ridged
from mpocompress.mpo.cores import Cores, bond_dims_of, check_cores, expand_bond_dims, layout_of
from mpocompress.mpo.extrapolation import Extrapolation
from mpocompress.mpo.factorize import sequential_svd
from mpocompress.mpo.layout import Layout, LayoutLike, as_layout
from mpocompress.mpo.metric import Metric, site_metrics
from mpocompress.mpo.operator import MPO
from mpocompress.mpo.sweep import Direction, Observer, Quadratic, Sweeper, SweepRecord
from mpocompress.mpo.sweep_cost import cheapest_cut
from mpocompress.mpo.truncate import Truncation, choose_bond_dim
from mpocompress.mpo.units import Units
from mpocompress.scalars import as_integer

# float64 costs twice the time and memory of float32; up to this size that is seconds and 128 MB for
# each moment, and it lets the local solves resolve C down to its ridge. Larger layers are worked on
# in float32 unless matrix or moments are float64 themselves.
_FLOAT64_UP_TO = 4096
# Beyond, mean squares may differ by so much from their median: at 1e7 fits in float32 end within
# 2 % of the error of those in float64, at 1e8 50 % above it, at 1e12 at a hundred times.
_FLOAT64_FROM_SPREAD = 1e7

# The start is the sequential SVD of T C (C + λ D)⁻¹, D the diagonal of C: of the weights with what
# the data hardly excites left out. Of λ between 0.01 and 10, 0.3 to 1 gave the lowest errors (with
# the mean of D in its place) after 1, 4 and 8 round trips on layers of a digit classifier and of a
# sentence encoder.
_START_FILTER = 0.5

# Two-site sweeps settle the bond dimensions in one round trip; a second gains nothing (measured),
# and one-site sweeps do the rest.
_TWO_SITE_TRIPS = 1

_THERE_AND_BACK: tuple[Direction, Direction] = (1, -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """What a fit found.

    Attributes:
        mpo: in the dtype of the target.
        objective: squared distance to the target in the metric, measured on the result (before it
            is rounded to the target's dtype).
        relative_error: its root relative to the norm of the target in the metric.
        history: what the sweeps began with, then one record a sweep.
        converged: the objective has stopped falling; otherwise the sweeps were used up.
    """

    mpo: MPO
    objective: float
    relative_error: float
    history: tuple[SweepRecord, ...]
    converged: bool

    @property
    def cores(self) -> Cores:
        """The cores, left to right, each (left bond, out, in, right bond)."""
        return self.mpo.cores


def fit(
    target_OI: Tensor,
    metric: Metric | None,
    layout: LayoutLike,
    bond_dims: int | Sequence[int] | None = None,
    *,
    start: MPO | Sequence[Tensor] | None = None,
    round_trips: int = 8,
    tolerance: float = 1e-3,
    two_site: bool = False,
    cutoff: float = 0.0,
    observer: Observer | None = None,
) -> FitResult:
    """Find the chain of a layout that is closest to a matrix in a metric.

    Args:
        target_OI: T, (out, in), any real floating dtype.
        metric: C and, if wanted, G; None is the identity, plain least squares in the weights.
        layout: must fit the target. Padding rows and columns are fitted to zero.
        bond_dims: largest bond dimension, one for all bonds or one for each; None for no limit.
        start: a chain of this layout to begin with; default: the sequential SVD of the target with
            what the data hardly excites filtered out. Larger bonds than `bond_dims` are truncated,
            smaller ones grow in two-site sweeps only.
        round_trips: at most so many times to the right and back, two sweeps each.
        tolerance: stop when a round trip lowers the objective (a *squared* error) by less than this
            share; 0 goes on until rounding.
        two_site: begin with sweeps that solve two cores at once and split them in the metric, so
            that bond dimensions move to where they are needed, within `bond_dims`.
        cutoff: largest truncation error (relative discarded weight, squared, in the metric) at each
            bond. Above 0 it turns `two_site` on, for the layouts that are swept.
        observer: called after each local update.

    Returns:
        The result is deterministic; `history` holds the objective after every sweep.

    Raises:
        LayoutError: the layout does not fit the target, or the start is of another layout.
        BondDimError: a bond dimension below 1, or the wrong number of them.
        ContractionError: the metric does not fit the target.
        DecompositionError: NaN or Inf entries, a metric with negative eigenvalues, a cutoff
            outside [0, 1), a negative tolerance or number of round trips.

    Cost of a sweep: `sweep_macs`. Work is done in float64 for matrices of up to 4096 rows and
    columns and for features in very different units, in the promoted dtype of target and moments
    otherwise.

    Source: Holtz, Rohwedder, Schneider, SIAM J. Sci. Comput. 34 (2012) A683 (alternating least
    squares in tensor trains); White, Phys. Rev. Lett. 69 (1992) 2863 (two-site updates).
    """
    layout = as_layout(layout)
    _check_options(round_trips, tolerance)
    if not isinstance(target_OI, Tensor):
        raise DecompositionError(
            f"a {type(target_OI).__name__} is not a torch tensor. Convert it with torch.as_tensor."
        )
    if target_OI.ndim != 2:
        raise LayoutError(
            f"a tensor of shape {tuple(target_OI.shape)} is not a matrix (out, in). Reshape it."
        )
    shape = (int(target_OI.shape[0]), int(target_OI.shape[1]))
    layout.check(shape)
    linalg.check_finite(target_OI)
    given = expand_bond_dims(bond_dims, layout.num_sites - 1)
    bonds = layout.clip(
        cap if bond is None else bond
        for bond, cap in zip(given, layout.max_bond_dims(), strict=True)
    )
    limits = [Truncation(bond_dim=bond, cutoff=cutoff) for bond in bonds]
    if metric is None:
        metric = Metric.identity(
            shape[1], dtype=linalg.working_dtype(target_OI.dtype), device=target_OI.device
        )
    metric.check(target_OI)
    units = Units.of(target_OI, metric)
    if units is not None:
        found = fit(
            target_OI.detach() / units.target,
            units.scaled(metric),
            layout,
            bond_dims,
            start=units.scaled_start(start),
            round_trips=round_trips,
            tolerance=tolerance,
            two_site=two_site,
            cutoff=cutoff,
            observer=units.restored_for(observer),
        )
        return replace(
            found,
            mpo=units.restored(found.mpo),
            objective=found.objective * units.objective,
            history=tuple(units.restored_record(record) for record in found.history),
        )
    dtype = torch.promote_types(linalg.working_dtype(target_OI.dtype), metric.dtype)
    if max(shape) <= _FLOAT64_UP_TO or _spread(metric) > _FLOAT64_FROM_SPREAD:
        dtype = torch.float64
    metric = metric.to(dtype)
    work_OI = target_OI.detach().to(dtype)
    history: list[SweepRecord] = []
    converged, center, norm = True, 0, None
    if layout.num_sites == 1:
        cores: Cores = (layout.split(work_OI).clone().reshape(1, *layout.pairs[0], 1),)
    elif start is None and _has_closed_form(layout):
        cores, norm = _closed_form(work_OI, metric, layout, limits[0])
        center = 1
    else:
        cores, history, converged = _sweep(
            _quadratic(work_OI, metric, layout),
            _start_cores(work_OI, metric, layout, bonds, cutoff, start),
            _Schedule(
                limits=limits,
                round_trips=round_trips,
                two_site_trips=_TWO_SITE_TRIPS if two_site or cutoff > 0 else 0,
                tolerance=tolerance,
            ),
            observer,
        )
    fitted = MPO(cores, shape=shape, center=(center, center))
    distance = metric.distance(work_OI, fitted.to_dense())
    norm = metric.norm(work_OI) if norm is None else norm
    relative_error = distance / norm if norm > 0 else 0.0
    if not history:
        history = [
            SweepRecord(
                kind="closed form",
                objective=distance**2,
                relative_error=relative_error,
                bond_dims=fitted.bond_dims,
            )
        ]
    return FitResult(
        mpo=fitted.to(dtype=target_OI.dtype),
        objective=distance**2,
        relative_error=relative_error,
        history=tuple(history),
        converged=converged,
    )


def _spread(metric: Metric) -> float:
    """The largest mean square of a feature over the median of those that are not 0."""
    spreads = []
    for moment_NN in (metric.input_II, metric.output_OO):
        if moment_NN is not None:
            diagonal_N = moment_NN.diagonal()
            seen_N = diagonal_N[diagonal_N > 0]
            spreads.append(float(seen_N.max() / seen_N.median()))
    return max(spreads)


def _check_options(round_trips: int, tolerance: float) -> None:
    if (trips := as_integer(round_trips)) is None or trips < 0:
        raise DecompositionError(
            f"round_trips {round_trips!r}: it is a number of sweeps to and fro. Try 8."
        )
    if not (isfinite(tolerance) and tolerance >= 0):
        raise DecompositionError(
            f"tolerance {tolerance!r}: it is a relative decrease and not negative. Try 1e-3."
        )


def _has_closed_form(layout: Layout) -> bool:
    """Whether all outs are on one of two sites and all ins on the other."""
    pairs = layout.pairs
    return layout.num_sites == 2 and any(
        pairs[site][0] == 1 and pairs[1 - site][1] == 1 for site in (0, 1)
    )


def _closed_form(
    work_OI: Tensor, metric: Metric, layout: Layout, limits: Truncation
) -> tuple[Cores, float]:
    """The best matrix of a rank in the metric: SVD of Fgᵀ T Fc, with C = Fc Fcᵀ and G = Fg Fgᵀ.

    Returns:
        Its cores, and the norm of T.
    """
    input_factor, output_factor = metric.input_factor, metric.output_factor
    whitened = input_factor.apply(work_OI)
    if output_factor is not None:
        whitened = output_factor.apply(whitened.mT).mT
    found = linalg.leading_svd(whitened, limits.bond_dim)
    cut = choose_bond_dim(
        found.values_R,
        limits,
        rank_tolerance=linalg.rank_tolerance(tuple(work_OI.shape), work_OI.dtype),
        total_weight=found.total_weight,
    )
    bond = cut.bond_dim
    left_RO = found.left_MR[:, :bond].mT
    if output_factor is not None:
        left_RO = output_factor.solve(left_RO)
    right_RI = input_factor.solve(found.values_R[:bond, None] * found.right_RN[:bond])
    missing = (layout.out_features - work_OI.shape[0], layout.in_features - work_OI.shape[1])
    left_RO, right_RI = (
        constant_pad_nd(factor, [0, more])
        for factor, more in zip((left_RO, right_RI), missing, strict=True)
    )
    outs_first = layout.pairs[0][1] == 1 and layout.pairs[1][0] == 1
    first_RX, second_RY = (left_RO, right_RI) if outs_first else (right_RI, left_RO)
    q_XR, r_RR = linalg.qr(first_RX.mT)
    cores = (
        q_XR.reshape(1, *layout.pairs[0], -1).contiguous(),
        (r_RR @ second_RY).reshape(-1, *layout.pairs[1], 1),
    )
    return cores, sqrt(found.total_weight)


def _start_cores(
    work_OI: Tensor,
    metric: Metric,
    layout: Layout,
    bonds: tuple[int, ...],
    cutoff: float,
    start: MPO | Sequence[Tensor] | None,
) -> Cores:
    """The chain that the sweeps begin with, the orthogonality center at site 0."""
    sites = layout.num_sites
    if start is None:
        # What is not cut needs no filter: the target itself is then a chain of these bonds.
        whole = bonds == layout.clip(layout.max_bond_dims()) and cutoff == 0.0
        begin_OI = work_OI if whole else _filtered(work_OI, metric)
        cores = sequential_svd(begin_OI, layout, bond_dim=bonds, cutoff=cutoff).cores
        return move_center(cores, (sites - 1, sites - 1), 0, 0)[0]
    cores = start.cores if isinstance(start, MPO) else tuple(start)
    check_cores(cores)
    if layout_of(cores).pairs != layout.pairs:
        raise LayoutError(
            f"the start has layout {layout_of(cores)}, but {layout} is asked for. Factorize the "
            "start with that layout, or leave it out."
        )
    if cores[0].device != work_OI.device:
        raise ContractionError(
            f"the start is on {cores[0].device}, the target on {work_OI.device}. "
            "Move one of them with .to(device=...)."
        )
    cores = tuple(core.detach().to(work_OI.dtype) for core in cores)
    for core in cores:
        linalg.check_finite(core)
    if any(have > most for have, most in zip(bond_dims_of(cores), bonds, strict=True)):
        return round_cores(cores, (0, sites - 1), bond_dim=bonds)[0]
    return move_center(cores, (0, sites - 1), 0, 0)[0]


def _filtered(work_OI: Tensor, metric: Metric) -> Tensor:
    """T C (C + λ D)⁻¹, D the diagonal of C."""
    input_II = metric.ridged_input_II
    return solve_ridged(work_OI @ input_II, input_II, _START_FILTER)


def _quadratic(work_OI: Tensor, metric: Metric, layout: Layout) -> Quadratic:
    """The objective in the layout's own sizes: padding has no inputs, and outputs of target 0."""
    # Factorizing is the proof that the metric has no negative eigenvalue, without which a local
    # problem may have no minimum.
    _ = metric.input_factor, metric.output_factor
    missing = (layout.out_features - work_OI.shape[0], layout.in_features - work_OI.shape[1])
    weighed_OI = metric.weigh(work_OI)
    weight = float((work_OI * weighed_OI).sum())
    input_II, output_OO = metric.ridged_input_II, metric.ridged_output_OO
    if any(missing):
        weighed_OI = constant_pad_nd(weighed_OI, [0, missing[1], 0, missing[0]])
        input_II = constant_pad_nd(input_II, [0, missing[1]] * 2)
    out_weights = None
    if output_OO is not None:
        if missing[0]:
            padded_OO = constant_pad_nd(output_OO, [0, missing[0]] * 2)
            padded_OO.diagonal()[output_OO.shape[0] :] = output_OO.diagonal().mean()
            output_OO = padded_OO
        out_weights = site_metrics(output_OO, layout)
        product_OO = reduce(torch.kron, out_weights)
        noise = 100 * torch.finfo(output_OO.dtype).eps
        if bool((product_OO - output_OO).abs().max() <= noise * output_OO.abs().max()):
            output_OO = None
    return Quadratic(
        input_II=input_II,
        output_OO=output_OO,
        out_weights=out_weights,
        linear_OI=weighed_OI,
        weight=weight,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Schedule:
    """When and how far to sweep: see `fit`."""

    limits: Sequence[Truncation]
    round_trips: int
    two_site_trips: int
    tolerance: float


def _sweep(
    quadratic: Quadratic, cores: Cores, schedule: _Schedule, observer: Observer | None
) -> tuple[Cores, list[SweepRecord], bool]:
    """Sweep to and fro, two-site first if asked for, until the objective stops falling."""
    cut = cheapest_cut(layout_of(cores), bond_dims_of(cores))
    sweeper = Sweeper(quadratic, cores, cut=cut, observer=observer)
    extrapolation = Extrapolation()
    history = [sweeper.record("start")]
    floor = torch.finfo(cores[0].dtype).eps ** 2 * quadratic.weight
    turning = False
    for number in range(schedule.round_trips):
        if number < schedule.two_site_trips:
            for direction in _THERE_AND_BACK:
                sweeper.sweep_two_site(direction, schedule.limits)
                history.append(sweeper.record("two-site"))
            continue
        before = sweeper.objective
        proposal = extrapolation.propose()
        if proposal is not None:
            accepted = sweeper.try_cores(proposal)
            extrapolation.judge(accepted)
            turning = turning and not accepted
        for direction in _THERE_AND_BACK:
            sweeper.sweep_one_site(direction, turning=turning)
            history.append(sweeper.record("one-site"))
            turning = True
        extrapolation.observe(sweeper.cores)
        if before - sweeper.objective <= max(schedule.tolerance * before, floor):
            return sweeper.cores, history, True
    return sweeper.cores, history, False
