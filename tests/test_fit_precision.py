"""Fits in float32: what float64 finds, whatever units weights, features and gradients are in."""

import pytest
import torch
from torch.testing import assert_close

from mpocompress.mpo import MPO
from mpocompress.mpo.fit import fit
from mpocompress.mpo.metric import Metric
from tests.fit_problems import moment
from tests.planted import gaussian
from tests.tolerances import TOL


@pytest.fixture
def in_float32(monkeypatch):
    """Small matrices are worked on as those of more than 4096 rows are."""
    monkeypatch.setattr("mpocompress.mpo.fit._FLOAT64_UP_TO", 0)


def error_of(found, target, input_II, output_OO):
    """Relative, in float64."""
    metric = Metric(input_II, output_OO)
    return metric.relative_error(target, found.mpo.to(dtype=torch.float64).to_dense())


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("unit", [1.0, 1e2, 1e3])
@pytest.mark.parametrize("text", ["4x4,4x4", "3x4,4x2,2x3"])
def test_gains_of_features_in_coarse_units_are_no_noise(text, unit, output, monkeypatch):
    layout = MPO.random(text, 2).layout
    outs, ins = layout.out_features, layout.in_features
    x = gaussian(300, ins, seed=0) @ gaussian(ins, ins, seed=1)
    units = torch.ones(ins, dtype=torch.float64)
    units[: ins // 2] = unit
    input_II = (x * units).T @ (x * units) / 300
    output_OO = moment(outs, seed=2, samples=4) if output else None
    target = gaussian(outs, ins, seed=3) / units
    wide = fit(target, Metric(input_II, output_OO), layout, 4)
    monkeypatch.setattr("mpocompress.mpo.fit._FLOAT64_UP_TO", 0)
    output_f32 = None if output_OO is None else output_OO.float()
    narrow = fit(target.float(), Metric(input_II.float(), output_f32), layout, 4)
    errors = [error_of(found, target, input_II, output_OO) for found in (wide, narrow)]
    assert errors[1] < 1.02 * errors[0]


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("output", [False, True])
def test_features_beyond_the_digits_of_float32_are_fitted_in_float64(output):
    x, units = gaussian(300, 24, seed=0), torch.ones(24, dtype=torch.float64)
    units[3] = 1e6
    input_II = ((x * units).T @ (x * units) / 300).float()
    output_OO = moment(24, seed=2).float() if output else None
    target = (gaussian(24, 24, seed=3) / units).float()
    found = fit(target, Metric(input_II, output_OO), "3x4,4x2,2x3", 4)
    assert found.mpo.dtype == torch.float32
    wide = None if output_OO is None else output_OO.double()
    best = fit(target.double(), Metric(input_II.double(), wide), "3x4,4x2,2x3", 4)
    assert found.relative_error < 1.01 * best.relative_error < 1


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("text", ["8x1,1x12", "4x3,2x4", "2x2,2x3,2x2"])
@pytest.mark.parametrize(
    ("weight", "inputs", "gradients"),
    [(2.0**66, 1, 1), (2.0**-66, 1, 1), (1, 2.0**80, 1), (1, 2.0**-80, 1), (1, 1, 2.0**70),
     (1, 1, 2.0**-70), (2.0**-40, 2.0**-40, 2.0**-40)],
)  # fmt: skip
def test_a_fit_is_the_same_in_all_units(weight, inputs, gradients, text):
    target = gaussian(8, 12, seed=0).float()
    input_II, output_OO = moment(12, seed=1).float(), moment(8, seed=2).float()
    updates = [[], []]
    plain = fit(target, Metric(input_II, output_OO), text, 2, observer=updates[0].append)
    metric = Metric(input_II * inputs, output_OO * gradients)
    found = fit(target * weight, metric, text, 2, observer=updates[1].append)
    scale = weight**2 * inputs * gradients
    # An odd power of two has no root in float32, and sweeps carry its rounding on.
    close = {"rtol": 1e-2, "atol": 1e-2}
    assert_close(found.mpo.to_dense() / weight, plain.mpo.to_dense(), **close)
    assert found.relative_error == pytest.approx(plain.relative_error, rel=1e-3)
    assert found.objective / scale == pytest.approx(plain.objective, rel=1e-3)
    assert found.mpo.center == plain.mpo.center
    for ours, theirs in zip(found.history, plain.history, strict=True):
        assert ours.objective / scale == pytest.approx(theirs.objective, rel=1e-3)
    for ours, theirs in zip(*reversed(updates), strict=True):
        assert ours.objective / scale == pytest.approx(theirs.objective, rel=1e-3)
        assert_close(MPO(ours.cores).to_dense() / weight, MPO(theirs.cores).to_dense(), **close)


@pytest.mark.usefixtures("in_float32")
def test_a_start_is_in_the_units_of_the_target():
    target, metric = gaussian(8, 12, seed=0).float(), Metric(moment(12, seed=1).float())
    start = fit(target, metric, "4x3,2x4", 2, round_trips=2).mpo
    small = MPO([core * 2.0**-33 for core in start.cores])
    found = fit(target * 2.0**-66, metric, "4x3,2x4", 2, start=small, round_trips=0)
    assert_close(found.mpo.to_dense() * 2.0**66, start.to_dense(), **TOL[torch.float32]["dense"])
