"""Layers that stay dense take up what is lost before them, where there is data."""

import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.planning import Plan
from mpocompress.surgery import find_weights
from mpocompress.tuning import correction_plans
from tests.planted import gaussian


def network(*, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for sizes in ((48, 64), (64, 64), (64, 3)):
        layers += [nn.Linear(*sizes, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def rows(count, seed):
    return gaussian(count, 48, seed=seed, dtype=torch.float32)


DATA = [rows(100, seed) for seed in range(8)]


def plan_of(model, corrects=None) -> Plan:
    """The middle layer is compressed, the first and the last stay dense."""
    found = mpo.plan(model, bond_dim=4, layout="svd", data=DATA)
    layers = [
        layer
        if layer.name == "2"
        else layer.model_copy(
            update={"action": "keep", "layout": None, "bond_dims": None, "corrects": True}
        )
        for layer in found.layers
    ]
    if corrects is not None:
        layers = [layer.model_copy(update={"corrects": corrects}) for layer in layers]
    return found.model_copy(update={"layers": tuple(layers)})


def error(model, result):
    held_out = rows(500, seed=99)
    with torch.no_grad():
        expected = model(held_out)
        return float((result.model(held_out) - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_behind_takes_up_much_of_what_is_lost_and_one_before_is_as_it_was(bias):
    model = network(bias=bias)
    plain, corrected = (
        mpo.compress(model, plan_of(model, corrects), data=DATA) for corrects in (False, True)
    )
    assert error(model, corrected) < 0.97 * error(model, plain)
    for index in (0, 4):
        assert torch.equal(plain.model[index].weight, model[index].weight)
    assert torch.equal(corrected.model[0].weight, model[0].weight)
    assert not torch.equal(corrected.model[4].weight, model[4].weight)
    if bias:
        assert torch.equal(corrected.model[0].bias, model[0].bias)


def test_the_correction_is_the_regression_of_the_dense_outputs():
    model = network()
    found = mpo.compress(model, plan_of(model), data=DATA).model
    with torch.no_grad():
        x = torch.cat(DATA)
        seen = found[:-1](x).double()
        ones = torch.ones(len(seen), 1, dtype=torch.float64)
        best = torch.linalg.lstsq(torch.cat([seen, ones], 1), model(x).double()).solution
        best_error = float((torch.cat([seen, ones], 1) @ best - model(x)).norm())
        # A ridge and as few as 800 rows: not the best on these rows, but near it.
        assert float((found(x) - model(x)).norm()) < 1.05 * best_error
        lost = (model(x) - found(x)).double()
        assert float(lost.mean(0).abs().max()) < 1e-5  # the bias takes up the mean exactly


def test_without_data_and_where_patterns_exclude_a_layer_it_is_as_it_was():
    model = network()
    without = mpo.compress(model, bond_dim=4, layout="svd", include=["2"])
    excluded = mpo.compress(model, bond_dim=4, layout="svd", exclude=["0", "4"], data=DATA)
    edited = mpo.compress(model, plan_of(model))
    for result in (without, excluded, edited):
        for index in (0, 4):
            assert torch.equal(result.model[index].weight, model[index].weight)
            assert torch.equal(result.model[index].bias, model[index].bias)


def test_plans_say_what_is_corrected_and_reports_what_was(tmp_path):
    model = network()
    # The head has 3 outputs: no bond dimension makes it smaller.
    found = mpo.plan(model, bond_dim=4, layout="svd", exclude=["0"], data=DATA)
    assert {layer.name: layer.corrects for layer in found.layers} == {
        "0": False,  # not selected
        "2": False,  # compressed
        "4": True,
    }
    path = tmp_path / "plan.json"
    found.save(path)
    assert Plan.load(path) == found
    result = mpo.compress(model, found, data=DATA)
    reasons = {layer.name: layer.reason for layer in result.report.layers}
    assert reasons["4"].endswith("; its values took up what is lost before it")
    assert "took up" not in reasons["0"]
    mpo.save(result, tmp_path / "model")
    loaded = mpo.load(tmp_path / "model", model=model)
    assert torch.equal(loaded[4].weight, result.model[4].weight)


def test_an_interrupted_run_ends_with_the_same_corrections(tmp_path):
    model = network()
    once = mpo.compress(model, plan_of(model), data=DATA, state=tmp_path)
    again = mpo.compress(model, plan_of(model), data=DATA, state=tmp_path)
    for name, value in once.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


def test_weights_that_others_use_are_not_corrected():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.again, self.own = (nn.Linear(8, 8) for _ in range(3))
            self.again.weight = self.up.weight
            self.table = nn.Embedding(9000, 8)
            self.wide = nn.Linear(8, 9000)

        def forward(self, x):
            return self.wide(self.own(self.again(self.up(x))))

    model = Tied()
    plans = correction_plans(model, find_weights(model).sites)
    assert [plan.site.name for plan in plans] == ["own"]
    assert all(plan.stays_dense for plan in plans)
