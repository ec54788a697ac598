"""Whatever units inputs, hidden features and outputs are in, a model is compressed alike."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import mpocompress as mpo
from mpocompress.loading import Batch
from mpocompress.tuning import output_errors
from mpocompress.tuning.objectives import relative_square
from mpocompress.tuning.statistics.moments import CrossMoment
from tests.planted import gaussian
from tests.tolerances import TOL


def in_units(model, inputs, first, second, outputs):
    """The same function in other units: of the inputs, both hidden layers and the outputs."""
    changed = copy.deepcopy(model)
    units = [inputs, first, second, outputs]
    layers = [layer for layer in changed if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.weight.mul_(units[number + 1] / units[number])
            layer.bias.mul_(units[number + 1])
    return changed


@pytest.mark.parametrize("layout", ["auto", "balanced"])
@pytest.mark.parametrize(
    "units",
    [(1e-25, 1, 1, 1), (1e20, 1, 1, 1), (1, 1e20, 1, 1), (1, 1e-20, 1, 1), (1, 1, 1, 1e20),
     (1, 1, 1, 1e-20)],
    ids=str,
)  # fmt: skip
def test_units_do_not_decide_what_a_compression_finds(units, layout):
    torch.manual_seed(0)
    widths = (24, 32, 28, 10)
    linears = [nn.Linear(a, b) for a, b in pairwise(widths)]
    model = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2]).eval()
    x = (gaussian(400, 24, seed=1) @ gaussian(24, 24, seed=2) * 0.3).float()
    found = []
    for each in ((1, 1, 1, 1), units):
        dense, data = in_units(model, *each), [x[:200] * each[0], x[200:] * each[0]]
        result = mpo.compress(dense, ratio=2, of="layers", layout=layout, data=data, seed=0)
        with torch.no_grad():
            outputs, expected = (part(x * each[0]).double() for part in (result.model, dense))
        rows = [(row.bond_dims, row.relative_output_error) for row in result.report.layers]
        found.append((float((outputs - expected).norm() / expected.norm()), rows))
    (plain, plain_rows), (other, rows) = found
    assert other == pytest.approx(plain, rel=1e-2)
    for (bonds, error), (plain_bonds, plain_error) in zip(rows, plain_rows, strict=True):
        assert bonds == plain_bonds
        assert error == (plain_error if plain_error is None else pytest.approx(plain_error, 1e-2))


@pytest.mark.parametrize("unit", [1e-30, 1e25])
@pytest.mark.parametrize("other", [None, 1.0])
def test_moments_hold_squares_that_float32_does_not(unit, other):
    x, y = gaussian(300, 5, seed=0).float() + 1, gaussian(300, 5, seed=1).float()
    moment = CrossMoment()
    for part in range(0, 300, 100):
        left = x[part : part + 100] * unit
        moment.add(left, left if other is None else y[part : part + 100])
    expected = (x.double() * unit).T @ (y.double() if other else x.double() * unit) / 300
    found = moment.mean(centered=False)[0]
    assert_close(
        found / found.abs().max(), expected / expected.abs().max(), **TOL[torch.float32]["dense"]
    )
    assert_close(found.abs().max(), expected.abs().max(), **TOL[torch.float32]["norm"])


class InUnits(nn.Module):
    """A model whose outputs are in other units."""

    def __init__(self, model, unit):
        super().__init__()
        self.model, self.unit = model, unit

    def forward(self, x):
        return self.model(x) * self.unit


@pytest.mark.parametrize("unit", [1e-8, 1e-20, 1e20])
@pytest.mark.parametrize("tune", ["distill", "sweep"])
def test_units_of_outputs_do_not_decide_what_tuning_does(tune, unit):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 6)).eval()
    x = gaussian(320, 16, seed=1).float()
    data = list(x.split(40))
    errors = []
    for each in (1.0, unit):
        dense = InUnits(model, each)
        options = {"bond_dim": 2, "layout": "balanced", "if_smaller": False}
        found = mpo.compress(dense, data=data, seed=0, **options).model
        if tune == "distill":
            result = mpo.distill(
                found, reference=dense, data=data, steps=30, output_loss="mse", seed=0
            )
            assert 1e-3 < result.end_loss < result.start_loss < 1
        else:
            mpo.sweep(found, reference=dense, data=data, sweeps=1, seed=0)
        with torch.no_grad():
            outputs, expected = ((part(x) / each).double() for part in (found, dense))
        errors.append(float((outputs - expected).norm() / expected.norm()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_a_relative_square_is_that_in_all_units():
    target, found = gaussian(8, 5, seed=0).float(), gaussian(8, 5, seed=1).float()
    expected = (found - target).square().sum() / target.square().sum()
    for unit in (1.0, 1e-25, 1e25):
        assert_close(
            relative_square(found * unit, target * unit), expected, **TOL[torch.float32]["norm"]
        )
    zeros = torch.zeros(8, 5)
    assert_close(relative_square(found, zeros), found.square().sum())
    assert relative_square(zeros, zeros) == 0
    assert relative_square(zeros[:0], zeros[:0]) == 0


class Masked(nn.Module):
    """Logits, of which those of impossible classes are -inf."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 10)

    def forward(self, x):
        logits = self.second(torch.relu(self.first(x)))
        return torch.cat((logits[:, :8], torch.full_like(logits[:, 8:], -torch.inf)), dim=1)


@pytest.mark.parametrize("way", [{"bond_dim": 4}, {"ratio": 2}], ids=str)
def test_logits_of_impossible_classes_are_no_error(way):
    """A report of them was refused, its measured error being NaN."""
    model, data = Masked().eval(), [gaussian(60, 16, seed=seed).float() for seed in range(4)]
    result = mpo.compress(model, data=data, **way)
    errors = output_errors(model, result.model, [], [Batch(args=(x,)) for x in data]).model
    with torch.no_grad():
        expected, found = (torch.cat([m(x) for x in data])[:, :8] for m in (model, result.model))
    assert errors == pytest.approx(float((found - expected).norm() / expected.norm()), rel=1e-4)
