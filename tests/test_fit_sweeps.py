"""Fitting by sweeps: the objective never rises, planted chains come back, singular metrics work."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from mpocompress.errors import BondDimError, ContractionError, DecompositionError, LayoutError
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.canonical import canonical_defects, move_center
from mpocompress.mpo.cut import CutMoment
from mpocompress.mpo.extrapolation import Extrapolation, align_gauge
from mpocompress.mpo.fit import fit
from mpocompress.mpo.metric import Metric
from mpocompress.mpo.sweep import Quadratic, Sweeper
from mpocompress.mpo.sweep_cost import cheapest_cut, sweep_macs
from tests.fit_problems import fits, moment, objective
from tests.planted import (
    LAWS,
    SEEDS,
    chains,
    dense_twin,
    gaussian,
    kronecker,
    layouts,
    random_chain,
    regauged,
)
from tests.tolerances import TOL

F64 = TOL[torch.float64]
# Sites with legs of size 1, rectangular; the last two are degenerate on purpose.
LAYOUTS = ["3x4,4x2", "2x3,3x2,2x4", "2x2,1x3,3x1,2x2", "4x1,2x3,1x4", "1x1,3x4,2x2"]


def rounding_scale(matrices, c, g):
    """Size of the terms of the objective, of which it is the small difference."""
    largest = max(float(matrix.square().sum()) for matrix in matrices)
    return largest * float(c.norm()) * (1.0 if g is None else float(g.norm()))


def problem(layout, seed=0, *, samples=None, dead=0, output=False):
    """Target and metric, with a ridge of zero: the data alone decides."""
    c = moment(layout.in_features, seed=seed, samples=samples, dead=dead)
    g = moment(layout.out_features, seed=seed + 5) if output else None
    target = gaussian(layout.out_features, layout.in_features, seed=seed + 9)
    return target, Metric(c, g, ridge=0.0, output_ridge=0.0)


# -- the objective never rises


@LAWS
@given(st.data(), chains(max_sites=4), SEEDS, st.booleans())
def test_objective_never_rises_over_a_local_solve(data, chain, seed, filtered_start):
    layout, bonds = chain
    if layout.num_sites < 2:
        return
    target, c, g = data.draw(fits(layout))
    metric = Metric(c, g, ridge=data.draw(st.sampled_from([0.0, 1e-3])), output_ridge=1e-2)
    c, g = metric.ridged_input_II, metric.ridged_output_OO
    start = None if filtered_start else random_chain(layout, bonds, seed=seed)
    seen = []
    result = fit(
        target,
        metric,
        layout,
        bonds,
        start=start,
        round_trips=3,
        tolerance=0.0,
        observer=seen.append,
    )
    measured = [objective(target, dense_twin(update.cores), c, g) for update in seen]
    if not seen:  # a closed form
        return
    scale = rounding_scale([target, *(dense_twin(update.cores) for update in seen)], c, g)
    for update, value in zip(seen, measured, strict=True):
        assert_close(update.objective / scale, value / scale, **F64["dense"])
        assert update.gain >= 0
        assert update.truncation == 0
    for before, after in pairwise([result.history[0].objective, *measured]):
        assert after <= before + F64["weight"]["atol"] * scale
    for before, after in pairwise(result.history):
        assert after.objective <= before.objective
    assert_close(result.objective / scale, measured[-1] / scale, **F64["dense"])


@LAWS
@given(st.data(), chains(max_sites=4), SEEDS)
def test_two_site_sweeps_rise_at_most_by_their_truncation(data, chain, seed):
    layout, bonds = chain
    if layout.num_sites < 2:
        return
    target, c, g = data.draw(fits(layout))
    metric = Metric(c, g, ridge=1e-3, output_ridge=1e-2)
    c, g = metric.ridged_input_II, metric.ridged_output_OO
    seen = []
    result = fit(
        target,
        metric,
        layout,
        bonds,
        start=random_chain(layout, bonds, seed=seed),
        two_site=True,
        cutoff=data.draw(st.sampled_from([0.0, 1e-2, 0.3])),
        round_trips=2,
        observer=seen.append,
    )
    if not seen:
        return
    scale = rounding_scale([target, *(dense_twin(update.cores) for update in seen)], c, g)
    assert all(have <= most for have, most in zip(result.mpo.bond_dims, bonds, strict=True))
    previous = result.history[0].objective
    for update in seen:
        value = objective(target, dense_twin(update.cores), c, g)
        assert_close(update.objective / scale, value / scale, **F64["dense"])
        change = update.truncation - update.gain
        assert_close((value - previous) / scale, change / scale, **F64["dense"])
        previous = value
    for before, after in pairwise(result.history):
        assert after.objective <= before.objective + after.truncation + 1e-13 * scale


@pytest.mark.parametrize("text", LAYOUTS)
@pytest.mark.parametrize("output", [False, True], ids=["", "G"])
def test_converged_fit_is_stationary(text, output):
    layout = Layout.parse(text)
    target, metric = problem(layout, output=output)
    result = fit(target, metric, layout, 2, round_trips=2000, tolerance=1e-12)
    assert result.converged
    cores = [core.clone().requires_grad_() for core in result.cores]
    lost = target - dense_twin(cores)
    loss = (lost * metric.weigh(lost)).sum() / metric.norm(target) ** 2
    for gradient in torch.autograd.grad(loss, cores):
        assert_close(gradient, torch.zeros_like(gradient), **TOL[torch.float32]["gradient"])


# -- known results


@pytest.mark.parametrize("spread", [0.1, 0.5])
@pytest.mark.parametrize("output", [False, True], ids=["", "G"])
def test_planted_chain_is_recovered(spread, output):
    layout = Layout.parse("4x5,6x4,5x6")
    planted = random_chain(layout, (6, 6), seed=3)
    corrupted = [
        core + spread * core.std() * gaussian(*core.shape, seed=k) for k, core in enumerate(planted)
    ]
    target = dense_twin(planted)
    metric = problem(layout, seed=1, output=output)[1]
    result = fit(target, metric, layout, 6, start=corrupted, round_trips=300, tolerance=0.0)
    assert result.history[0].relative_error > spread / 2
    assert result.relative_error <= 1e-8


def test_planted_chain_is_recovered_from_the_default_start():
    layout = Layout.parse("4x5,6x4,5x6")
    target = dense_twin(random_chain(layout, (6, 6), seed=3))
    result = fit(target, problem(layout, seed=1)[1], layout, 6, round_trips=300, tolerance=0.0)
    assert result.relative_error <= 1e-8


@LAWS
@given(layouts(), SEEDS, st.booleans())
def test_exact_at_maximal_bond_dims(layout, seed, output):
    target, metric = problem(layout, seed, output=output)
    result = fit(target, metric, layout)
    assert_close(result.mpo.to_dense(), target, **F64["dense"])
    assert result.mpo.layout == layout


@pytest.mark.parametrize("text", ["4x6,5x3", "2x8,12x2", "1x6,8x2"])
def test_identity_metric_on_two_sites_is_the_truncated_svd(text):
    layout = Layout.parse(text)
    target = gaussian(layout.out_features, layout.in_features, seed=0)
    expected = MPO.from_matrix(target, layout, bond_dim=4)
    start = random_chain(layout, (4,), seed=1)
    for options in ({}, {"start": start, "round_trips": 500, "tolerance": 0.0}):
        result = fit(target, None, layout, 4, **options)
        assert_close(result.mpo.to_dense(), expected.to_dense(), **TOL[torch.float32]["dense"])
        assert_close(result.mpo.norm(), expected.norm(), **F64["dense"])


@pytest.mark.parametrize("text", LAYOUTS)
def test_independent_of_the_starting_gauge(text):
    layout = Layout.parse(text)
    target, metric = problem(layout)
    bonds = layout.clip([2] * (layout.num_sites - 1))
    start = random_chain(layout, bonds, seed=4)
    results = [
        fit(target, metric, layout, start=chain, round_trips=4, tolerance=0.0)
        for chain in (start, regauged(start, seed=1), regauged(start, seed=2))
    ]
    for other in results[1:]:
        assert_close(other.mpo.to_dense(), results[0].mpo.to_dense(), **F64["dense"])
        for mine, theirs in zip(results[0].history, other.history, strict=True):
            assert_close(mine.relative_error, theirs.relative_error, **F64["dense"])


def test_equal_calls_give_equal_results():
    layout = Layout.parse("2x3,3x2,2x4")
    target, metric = problem(layout, output=True)
    first, second = (fit(target, metric, layout, 2, two_site=True) for _ in range(2))
    assert first.history == second.history
    for mine, theirs in zip(first.cores, second.cores, strict=True):
        assert torch.equal(mine, theirs)


def test_output_metric_that_is_a_product_is_solved_directly():
    layout = Layout.parse("3x4,4x2,2x3")
    target, metric = problem(layout)
    weights = [moment(out, seed=k) for k, out in enumerate(layout.out_dims)]
    g = kronecker(weights)
    direct = fit(target, Metric(metric.input_II, g, 0.0, 0.0), layout, 3, round_trips=3)
    assert all(record.cg_iterations == 0 for record in direct.history)
    nearly = g + 1e-7 * moment(layout.out_features, seed=8)
    iterated = fit(target, Metric(metric.input_II, nearly, 0.0, 0.0), layout, 3, round_trips=3)
    assert any(record.cg_iterations > 0 for record in iterated.history)
    assert_close(direct.relative_error, iterated.relative_error, **TOL[torch.float32]["dense"])


# -- singular metrics


@pytest.mark.parametrize("text", LAYOUTS)
@pytest.mark.parametrize("output", [False, True], ids=["", "G"])
@pytest.mark.parametrize(
    "data",
    [{"samples": 1}, {"samples": 3}, {"dead": 3}, {"samples": 2, "dead": 2}],
    ids=["1 sample", "3 samples", "dead", "few and dead"],
)
def test_singular_metrics(text, output, data):
    layout = Layout.parse(text)
    target, metric = problem(layout, output=output, **data)
    plain = fit(target, None, layout, 2).mpo.to_dense()
    result = fit(target, metric, layout, 2, round_trips=6)
    assert all(bool(torch.isfinite(core).all()) for core in result.cores)
    assert result.relative_error <= metric.relative_error(target, plain) * (1 + 1e-9)


def test_few_samples_are_fitted_exactly_where_the_chain_can():
    # One input vector: of a fit with a bond of 4 outs only W x counts, and it has 12 numbers.
    layout = Layout.parse("3x4,4x2")
    target, metric = problem(layout, samples=1)
    assert fit(target, metric, layout, 4, round_trips=50).relative_error <= 1e-6


def test_dead_inputs_do_not_count():
    layout = Layout.parse("3x4,4x2")
    target, metric = problem(layout, dead=4)
    changed = target.clone()
    changed[:, 4:] += 10 * gaussian(12, 4, seed=1)
    first, second = (fit(t, metric, layout, 2) for t in (target, changed))
    assert_close(first.relative_error, second.relative_error, **F64["dense"])


@pytest.mark.parametrize("output", [False, True])
def test_units_of_a_feature_do_not_decide_the_fit(output):
    x, g = (gaussian(300, 16, seed=seed) for seed in (0, 1))
    target, units = gaussian(16, 16, seed=2), torch.ones(16, dtype=torch.float64)
    output_OO = g.T @ g / 300 if output else None
    plain = fit(target, Metric(x.T @ x / 300, output_OO), "4x4,4x4", 6).relative_error
    for size in (1e3, 1e6):
        units[3] = size
        metric = Metric((x * units).T @ (x * units) / 300, output_OO)
        found = fit(target / units, metric, "4x4,4x4", 6)
        assert found.relative_error < 1.15 * plain
        svd = fit(target / units, metric, "16x1,1x16", 6).relative_error
        assert svd == pytest.approx(
            fit(target, Metric(x.T @ x / 300, output_OO), "16x1,1x16", 6).relative_error, rel=1e-3
        )


def test_zero_target():
    layout = Layout.parse("3x4,4x2")
    result = fit(torch.zeros(12, 8), Metric(moment(8, seed=0)), layout, 2)
    assert result.relative_error == 0.0
    assert result.converged
    assert not bool(result.mpo.to_dense().any())


# -- bonds


def test_cutoff_finds_planted_bond_dims():
    layout = Layout.parse("4x4,4x4,4x4")
    target = dense_twin(random_chain(layout, (3, 5), seed=0))
    metric = Metric(moment(64, seed=1))
    start = random_chain(layout, (1, 1), seed=2)
    result = fit(target, metric, layout, start=start, cutoff=1e-9, round_trips=4)
    assert result.mpo.bond_dims == (3, 5)
    assert result.relative_error <= 1e-4


def test_larger_cutoff_gives_smaller_bonds_and_larger_errors():
    layout = Layout.parse("4x4,4x4,4x4")
    target, metric = gaussian(64, 64, seed=0), Metric(moment(64, seed=1))
    fine, coarse = (fit(target, metric, layout, cutoff=cutoff) for cutoff in (1e-3, 1e-1))
    assert coarse.mpo.num_parameters < fine.mpo.num_parameters
    assert coarse.relative_error > fine.relative_error
    assert coarse.history[1].kind == "two-site"
    assert coarse.history[1].truncation > 0


def test_two_site_sweeps_lower_the_error_of_a_chain():
    # At equal bond dims and round trips: the first sweep sees two cores at once.
    layout = Layout.parse("4x4,4x4,4x4,4x4")
    target, metric = gaussian(256, 256, seed=0), Metric(moment(256, seed=1))
    one, two = (
        fit(target, metric, layout, 4, round_trips=1, two_site=two) for two in (False, True)
    )
    assert two.relative_error < one.relative_error
    assert two.mpo.bond_dims == one.mpo.bond_dims == (4, 4, 4)


def test_start_with_larger_bonds_is_truncated():
    layout = Layout.parse("3x4,4x2")
    target, metric = problem(layout)
    start = MPO.from_matrix(target, layout)
    result = fit(target, metric, layout, 2, start=start, round_trips=1)
    assert result.mpo.bond_dims == (2,)
    assert fit(target, metric, layout, start=start, round_trips=0).relative_error <= 1e-10


# -- dtypes, padding, gauge


def test_float32_in_and_out():
    layout = Layout.parse("2x3,3x2,2x4")
    target, metric = problem(layout, output=True)
    wide = fit(target, metric, layout, 2)
    for dtype, tolerance in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        moments = Metric(metric.input_II.float(), metric.output_OO.float(), 0.0, 0.0)
        narrow = fit(target.to(dtype), moments, layout, 2)
        assert narrow.mpo.dtype == dtype
        expected = TOL[getattr(torch, tolerance)]["dense"]
        assert_close(narrow.relative_error, wide.relative_error, **expected)


def test_large_matrices_are_worked_on_in_their_own_dtype(monkeypatch):
    monkeypatch.setattr("mpocompress.mpo.fit._FLOAT64_UP_TO", 4)
    layout = Layout.parse("2x3,3x2,2x4")
    target, metric = problem(layout)
    wide = fit(target, metric, layout, 2)
    moments = Metric(metric.input_II.float(), ridge=1e-3)
    seen = []
    narrow = fit(target.float(), moments, layout, 2, observer=seen.append)
    assert seen[0].cores[0].dtype == torch.float32
    assert_close(narrow.relative_error, wide.relative_error, rtol=1e-2, atol=0)
    for before, after in pairwise(narrow.history):
        assert after.objective <= before.objective


@pytest.mark.parametrize("output", [False, True], ids=["", "G"])
def test_padding_is_cut_off(output):
    layout = Layout((4, 3), (3, 4), pad=True)
    target = gaussian(11, 10, seed=0)
    metric = Metric(moment(10, seed=1), moment(11, seed=2) if output else None)
    result = fit(target, metric, layout, 3, round_trips=20)
    assert result.mpo.shape == (11, 10)
    assert_close(result.relative_error, metric.relative_error(target, result.mpo.to_dense()))
    plain = MPO.from_matrix(target, layout, bond_dim=3)
    assert result.relative_error < metric.relative_error(target, plain.to_dense())
    # History counts padding rows, too; they can only add to the error.
    assert result.objective <= result.history[-1].objective * (1 + 1e-9)
    assert fit(target, metric, layout).relative_error <= 1e-10


@pytest.mark.parametrize("two_site", [False, True])
def test_result_knows_its_gauge(two_site):
    layout = Layout.parse("2x3,3x2,2x4")
    target, metric = problem(layout)
    mpo = fit(target, metric, layout, 2, two_site=two_site).mpo
    assert mpo.center == (0, 0)
    assert max(canonical_defects(mpo.cores, mpo.center)) <= 1e-12
    svd = fit(target, metric, Layout.svd(12, 24), 2).mpo
    assert max(canonical_defects(svd.cores, svd.center)) <= 1e-12


def test_stops_when_the_objective_does():
    layout = Layout.parse("2x3,3x2,2x4")
    target, metric = problem(layout)
    result = fit(target, metric, layout, 2, round_trips=200, tolerance=1e-3)
    assert result.converged
    assert len(result.history) < 401
    last, before = result.history[-1].objective, result.history[-3].objective
    assert before - last <= 1e-3 * before
    assert not fit(target, metric, layout, 2, round_trips=1, tolerance=0.0).converged


# -- extrapolation


def test_alignment_undoes_rotations_of_the_bonds():
    layout = Layout.parse("2x3,3x2,2x4")
    chain = move_center(random_chain(layout, (3, 4), seed=0), (0, 2), 0, 0)[0]
    turned = move_center(regauged(chain, seed=1), (0, 2), 0, 0)[0]
    for mine, theirs in zip(align_gauge(turned, chain), chain, strict=True):
        assert_close(mine, theirs, **F64["dense"])
    aligned = align_gauge(move_center(random_chain(layout, (3, 4), seed=5), (0, 2), 0, 0)[0], chain)
    assert max(canonical_defects(aligned, (0, 0))) <= 1e-12


def test_extrapolation_goes_on_along_the_last_step():
    layout = Layout.parse("2x3,3x2")
    first = move_center(random_chain(layout, (3,), seed=0), (0, 1), 0, 0)[0]
    second = (first[0] + 0.1 * gaussian(*first[0].shape, seed=1), first[1])
    extrapolation = Extrapolation()
    assert extrapolation.propose() is None
    extrapolation.observe(first)
    assert extrapolation.propose() is None
    extrapolation.observe(second)
    assert_close(extrapolation.propose()[0], 2 * second[0] - first[0], **F64["dense"])
    extrapolation.judge(False)
    assert_close(extrapolation.propose()[0], 1.5 * second[0] - 0.5 * first[0], **F64["dense"])
    extrapolation.observe(tuple(core[..., :] for core in random_chain(layout, (2,), seed=0)))
    assert extrapolation.propose() is None


def test_extrapolation_saves_round_trips(monkeypatch):
    layout = Layout.parse("8x8,8x8")
    target, metric = gaussian(64, 64, seed=0), Metric(moment(64, seed=1))
    with_it = fit(target, metric, layout, 4, round_trips=16, tolerance=0.0)
    monkeypatch.setattr(Extrapolation, "propose", lambda self: None)
    without = fit(target, metric, layout, 4, round_trips=16, tolerance=0.0)
    assert with_it.relative_error < without.relative_error


# -- cost


@pytest.mark.parametrize(
    ("text", "bond"),
    [("16x16,16x16", 8), ("16x16,16x16", 40), ("4x4,8x8,8x4", 8), ("4x4,4x4,4x4,4x4", 4)],
)
def test_a_sweep_costs_what_is_counted(text, bond):
    layout = Layout.parse(text)
    target, metric = problem(layout)
    cores = move_center(
        random_chain(layout, layout.clip([bond] * (layout.num_sites - 1)), seed=0),
        (0, layout.num_sites - 1),
        0,
        0,
    )[0]
    quadratic = Quadratic(
        input_II=metric.input_II,
        output_OO=None,
        out_weights=None,
        linear_OI=metric.weigh(target),
        weight=metric.norm(target) ** 2,
    )
    for cut in range(layout.num_sites - 1):
        sweeper = Sweeper(quadratic, cores, cut=cut)
        for direction in (1, -1):
            sweeper.sweep_one_site(direction, turning=direction == -1)
        with FlopCounterMode(display=False) as counter:
            for direction in (1, -1):
                sweeper.sweep_one_site(direction, turning=True)
        counted = 2 * sweep_macs(layout, bond, cut=cut).contractions
        flops = counter.get_total_flops() / 2
        # Moving the center and measuring the gain are left out of the count.
        assert counted <= flops <= 1.5 * counted
        with FlopCounterMode(display=False) as counter:
            sweeper.try_cores(cores)
        counted = sweep_macs(layout, bond, cut=cut).extrapolation
        assert counted <= counter.get_total_flops() / 2 <= 1.1 * counted


def test_the_cut_is_where_the_count_is_lowest():
    layout = Layout.parse("2x2,2x2,4x4,8x8")
    best = sweep_macs(layout, 8)
    counts = [sweep_macs(layout, 8, cut=cut).total for cut in range(3)]
    assert best.total == min(counts) == counts[cheapest_cut(layout, 8)]
    assert best.total == best.contractions + best.factorizations


def test_an_environment_is_made_once_a_sweep(monkeypatch):
    layout = Layout.parse("2x2,2x2,2x2,2x2")
    target, metric = problem(layout)
    absorbed = []
    original = CutMoment.absorb
    monkeypatch.setattr(CutMoment, "absorb", lambda *args: absorbed.append(1) or original(*args))
    fit(target, metric, layout, 2, round_trips=1, start=random_chain(layout, (2, 2, 2)))
    assert len(absorbed) == 3  # once a sweep for the half that is entered, and once to begin


# -- refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": "3x4,4x3"}, LayoutError, "3x4,4x3: in_dims .* multiply to 12"),
        ({"bond_dims": 0}, BondDimError, "bond_dim 0"),
        ({"bond_dims": (2, 2)}, BondDimError, "has 2 entries"),
        ({"cutoff": 1.0}, DecompositionError, r"cutoff 1.0"),
        ({"round_trips": -1}, DecompositionError, r"round_trips -1: .* Try 8"),
        ({"round_trips": True}, DecompositionError, "round_trips True"),
        ({"tolerance": -1.0}, DecompositionError, r"tolerance -1.0: .* Try 1e-3"),
        ({"target_OI": torch.full((12, 8), float("nan"))}, DecompositionError, "96 of 96 entries"),
        ({"target_OI": torch.ones(12)}, LayoutError, r"shape \(12,\) is not a matrix"),
        ({"target_OI": [[1.0]]}, DecompositionError, "a list is not a torch tensor"),
        ({"metric": Metric(torch.eye(7))}, ContractionError, "does not fit a metric of 7 inputs"),
        (
            {"start": random_chain(Layout.parse("4x4,3x2"), (2,))},
            LayoutError,
            "start has layout 4x4,3x2, but 3x4,4x2",
        ),
        ({"start": [torch.ones(1, 3, 4, 1)] * 3}, LayoutError, "start has layout 3x4,3x4,3x4"),
        ({"start": [torch.ones(3, 4)]}, ContractionError, r"core 0 has shape \(3, 4\)"),
        (
            {"start": [torch.full((1, 3, 4, 1), torch.inf), torch.ones(1, 4, 2, 1)]},
            DecompositionError,
            "12 of 12 entries",
        ),
    ],
)
def test_refuses(options, error, message):
    arguments = {
        "target_OI": gaussian(12, 8),
        "metric": Metric(moment(8, seed=0)),
        "layout": "3x4,4x2",
        "bond_dims": 2,
    } | options
    with pytest.raises(error, match=message):
        fit(**arguments)


def test_counting_refuses_a_single_site():
    with pytest.raises(LayoutError, match="single site; a sweep needs at least two"):
        sweep_macs(Layout.parse("3x4"), 2)


def test_searching_in_float32_finds_what_float64_does(monkeypatch):
    # After four round trips: where the ways part before that, both end at .418 (seed 1), later.
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(64, 48, generator=generator, dtype=torch.float64)
    inputs, outputs = (
        torch.randn(200, size, generator=generator, dtype=torch.float64)
        * torch.exp(-torch.arange(size) / 12)
        for size in (48, 64)
    )
    metric = Metric(inputs.T @ inputs, outputs.T @ outputs)
    found = {}
    for above in (1e-4, float("inf")):  # by default, and never
        monkeypatch.setattr("mpocompress.mpo.local_solve._COARSE_ABOVE", above)
        found[above] = fit(target, metric, Layout((4, 4, 4), (4, 3, 4)), 5, round_trips=4)
    coarse, fine = found.values()
    assert any(record.cg_iterations for record in fine.history)
    assert coarse.relative_error == pytest.approx(fine.relative_error, rel=1e-3)
    objectives = [record.objective for record in coarse.history]
    assert objectives == sorted(objectives, reverse=True)
