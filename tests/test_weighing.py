"""The cheap stand-in of a metric, and fits that it steers."""

import pytest
import torch
from torch.testing import assert_close

from mpocompress.mpo import Layout, Metric, Truncation
from mpocompress.mpo.fit import fit
from mpocompress.mpo.sweep import Quadratic, Sweeper
from mpocompress.mpo.weighing import Coarse, Exact, Leading, Steering
from tests.fit_problems import moment
from tests.planted import dense_twin, gaussian, random_chain
from tests.tolerances import TOL

F64 = TOL[torch.float64]


def leading_moment(size, *, rank, seed):
    """A few directions that carry most of it, and a small diagonal."""
    directions = gaussian(size, rank, seed=seed)
    return directions @ directions.T + torch.diag(torch.linspace(0.1, 0.2, size).double())


def data_moment(size, *, seed):
    """Second moment of features whose variances fall, as those of real data do."""
    rows = gaussian(2 * size, size, seed=seed) * torch.arange(1, size + 1).double() ** -1.0
    mixed = rows @ torch.linalg.qr(gaussian(size, size, seed=seed + 1)).Q
    return mixed.T @ mixed


@pytest.fixture(autouse=True)
def small_moments_have_leading_parts(monkeypatch):
    monkeypatch.setattr("mpocompress.mpo.weighing._LEADING_FROM", 128)


def test_leading_part_and_diagonal_of_a_moment_that_has_no_more():
    given = leading_moment(300, rank=5, seed=0)
    found = Leading.of(given, 10)
    rebuilt = found.basis_NR @ found.middle_RR @ found.basis_NR.T + found.rest_N.diag()
    assert_close(rebuilt.diagonal(), given.diagonal(), **F64["dense"])
    assert (rebuilt - given).norm() < 2e-3 * given.norm()
    matrix = gaussian(7, 300, seed=2)
    assert_close(found.apply_right(matrix), matrix @ rebuilt, **F64["dense"])


def test_steering_is_close_and_positive():
    exact = Exact(data_moment(260, seed=0), data_moment(280, seed=2))
    coarse = Steering(exact).current
    assert isinstance(coarse, Coarse)
    assert coarse.dtype == torch.float32
    matrix = gaussian(280, 260, seed=4)
    wanted, got = exact.apply(matrix), coarse.apply(matrix.float()).double()
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    for seed in range(5):
        trial = gaussian(280, 260, seed=seed).float()
        assert float((trial * coarse.apply(trial)).sum()) > 0
    for kept, given in zip(coarse.diagonals, exact.diagonals, strict=True):
        assert_close(kept, given.float(), **TOL[torch.float32]["dense"])


def test_steering_gets_finer_until_it_is_the_metric():
    exact = Exact(moment(256, seed=0), moment(256, seed=2))  # no direction carries much
    steering, matrix = Steering(exact), gaussian(256, 256, seed=4)
    errors = []
    while True:
        got = steering.current.apply(matrix.float()).double()
        errors.append(float((got - exact.apply(matrix)).norm() / exact.apply(matrix).norm()))
        if not steering.refine():
            break
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-5


@pytest.mark.parametrize(
    ("outs", "ins"), [(None, 300), (40, 300), (300, 40)], ids=["no G", "small G", "small C"]
)
def test_steering_without_a_large_output_metric_is_the_metric_in_float32(outs, ins):
    exact = Exact(data_moment(ins, seed=0), None if outs is None else data_moment(outs, seed=1))
    steering = Steering(exact)
    assert isinstance(steering.current, Exact)
    assert Steering(steering.current).current is None
    assert steering.current.dtype == torch.float32
    assert not steering.refine()
    matrix = gaussian(outs or 3, ins, seed=2)
    wanted = exact.apply(matrix)
    assert (steering.current.apply(matrix.float()).double() - wanted).norm() < 1e-5 * wanted.norm()


LAYOUT = Layout((4, 4, 8), (8, 4, 4))


def steered_problem():
    target = gaussian(128, 128, seed=0)
    return target, Metric(data_moment(128, seed=1), data_moment(128, seed=3))


@pytest.mark.parametrize("two_site", [False, True])
def test_steered_fits_end_where_those_by_the_exact_metric_do(two_site, monkeypatch):
    target, metric = steered_problem()
    options = {"bond_dims": 4, "round_trips": 2, "two_site": two_site}
    steered = fit(target, metric, LAYOUT, **options)
    monkeypatch.setattr("mpocompress.mpo.weighing._LEADING_FROM", 1_000)
    exact = fit(target, metric, LAYOUT, **options)
    assert steered.history != exact.history, "nothing was steered by a leading part"
    assert steered.relative_error <= 1.03 * exact.relative_error
    objectives = [record.objective for record in steered.history if not record.truncation]
    assert objectives == sorted(objectives, reverse=True)
    # What the sweeps add up is what the result has.
    assert steered.history[-1].objective == pytest.approx(steered.objective, rel=1e-9)


@pytest.mark.parametrize("steered", [True, False])
def test_what_sweeps_keep_of_the_chain_is_that_of_the_chain(steered):
    # G W C is carried from solve to solve, over moves of the center, splits and other chains.
    size, layout = (128, LAYOUT) if steered else (12, Layout((3, 2, 2), (2, 3, 2)))
    make = data_moment if steered else moment
    c, g, target = make(size, seed=1), make(size, seed=3), gaussian(size, size, seed=5)
    quadratic = Quadratic(
        input_II=c,
        output_OO=g,
        out_weights=None,
        linear_OI=g @ target @ c,
        weight=float((target * (g @ target @ c)).sum()),
    )
    sweeper = Sweeper(quadratic, random_chain(layout, (3, 3), seed=7), cut=0)

    def assert_true():
        kept = sweeper._weighed_OI
        assert kept is not None
        dense = dense_twin(sweeper.cores)
        assert (kept - g @ dense @ c).norm() <= 1e-12 * (g @ dense @ c).norm()
        change = target - dense
        assert sweeper.objective == pytest.approx(float((change * (g @ change @ c)).sum()))

    assert_true()
    for _ in range(2):
        for direction in (1, -1):
            sweeper.sweep_one_site(direction, turning=False)
            assert_true()
    for direction in (1, -1):
        sweeper.sweep_two_site(direction, [Truncation(bond_dim=2)] * 2)
        assert_true()
    assert sweeper.bond_dims == (2, 2)
    assert not sweeper.try_cores(random_chain(layout, (2, 2), seed=9))
    assert_true()
