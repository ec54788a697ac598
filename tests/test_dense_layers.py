"""Layers that stay dense take up what is lost before them, where there is data."""

import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.loading import as_batches
from mpocompress.mpo import Layout
from mpocompress.planning import Plan
from mpocompress.report.expectations import comparison_rows
from mpocompress.surgery import find_weights
from mpocompress.tuning import FitStore, SitePlan, correction_plans
from tests.planted import gaussian
from tests.tolerances import TOL


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
    changes = {layer.name: layer.changes for layer in result.report.layers}
    assert changes["4"] == ["corrected"]
    assert changes["0"] == []
    assert "; its values took up what is lost before it" in result.report.to_html()
    mpo.save(result, tmp_path / "model")
    loaded = mpo.load(tmp_path / "model", model=model)
    assert torch.equal(loaded[4].weight, result.model[4].weight)


def test_an_interrupted_run_goes_on_with_the_same_corrections(tmp_path, monkeypatch):
    model = network()
    once = mpo.compress(model, plan_of(model), data=DATA, state=tmp_path / "once")

    def interrupt(what, done, total):
        if what == "4":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mpo.compress(model, plan_of(model), data=DATA, state=tmp_path / "again", progress=interrupt)
    put = []
    keep = FitStore.put
    monkeypatch.setattr(FitStore, "put", lambda *args: put.append(args[1]) or keep(*args))
    again = mpo.compress(model, plan_of(model), data=DATA, state=tmp_path / "again")
    assert [plan.site.name for plan in put] == ["4"]
    for name, value in once.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


class Parts(nn.Module):
    """Layers by name, and a forward that is given."""

    def __init__(self, forward, **layers):
        super().__init__()
        torch.manual_seed(1)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = [forward]

    def forward(self, x):
        return self._forward[0](self, x)


def linear(*sizes):
    return nn.Linear(*sizes)


def planned_names(model, calls=DATA):
    """Of corrections, where the layer `big` is compressed."""
    sites = {site.name: site for site in find_weights(model).sites}
    big = SitePlan(site=sites["big"], layout=Layout.svd(*sites["big"].shape), bond_dims=(4,))
    others = [site for name, site in sites.items() if name != "big"]
    plans = correction_plans(model.eval(), others, [big], list(as_batches(calls)))
    assert all(plan.stays_dense for plan in plans)
    return {plan.site.name for plan in plans}


def test_what_a_model_draws_while_it_is_looked_at_is_not_drawn_from_others():
    def forward(parts, x):
        return parts.head(parts.big(x) + torch.randn(48))

    model = Parts(forward, big=linear(48, 48), head=linear(48, 6))
    before = torch.get_rng_state()
    assert planned_names(model) == {"head"}
    assert torch.equal(torch.get_rng_state(), before)


def test_only_layers_that_every_batch_calls_once_behind_a_compressed_one_are_corrected():
    tied = linear(48, 48)
    again = linear(48, 48)
    again.weight = tied.weight
    model = Parts(
        lambda m, x: (
            m.wide(m.own(m.again(m.tied(m.twice(m.twice(m.big(m.before(x))))))))
            + m.empty(x[:0]).sum()
            + (m.seldom(x).sum() if float(x[0, 0]) > 0 else 0)
        ),
        before=linear(48, 48),
        big=linear(48, 48),
        twice=linear(48, 48),
        tied=tied,
        again=again,
        own=linear(48, 48),
        wide=linear(48, 9000),
        empty=linear(48, 2),
        seldom=linear(48, 2),
        unused=linear(48, 2),
    )
    assert planned_names(model) == {"own"}


def test_small_experts_that_some_batches_do_not_call_do_not_end_a_run():
    def forward(m, x):
        h, y = m.big(x), torch.zeros(len(x), 2)
        for which, expert in enumerate((m.first, m.second)):
            chosen = ((x[:, 0] > 1.5).long() == which).nonzero()[:, 0]
            if len(chosen):
                y[chosen] = expert(h[chosen])
        return y

    model = Parts(forward, big=linear(48, 64), first=linear(64, 2), second=linear(64, 2))
    data = [DATA[0][DATA[0][:, 0] < 1], DATA[1]]
    result = mpo.compress(model.eval(), bond_dim=4, layout="svd", data=data)
    assert torch.equal(result.model.second.weight, model.second.weight)
    assert isinstance(result.model.big, mpo.MPOLinear)


def test_where_compression_changes_which_layers_are_called_nothing_is_corrected():
    big = linear(48, 48)
    weight, bias = big.weight.detach().clone(), big.bias.detach().clone()

    def forward(m, x):
        h = m.big(x)
        return m.tail(h) if torch.allclose(h, x @ weight.T + bias, atol=1e-3) else h[:, :1]

    model = Parts(forward, big=big, tail=linear(48, 1)).eval()
    result = mpo.compress(model, bond_dim=1, layout="svd", data=DATA)
    assert isinstance(result.model.big, mpo.MPOLinear)
    assert torch.equal(result.model.tail.weight, model.tail.weight)
    assert torch.equal(result.model.tail.bias, model.tail.bias)
    (tail,) = (layer for layer in result.report.layers if layer.name == "tail")
    assert "no batch calls it any more" in tail.uncorrected
    assert tail.changes == []
    assert "stays as it was: once layers are compressed" in result.report.to_markdown()


@pytest.mark.parametrize("rows_of_a_batch", [1, 200])
def test_a_single_batch_is_its_own_check(rows_of_a_batch):
    model = network()
    data = [rows(rows_of_a_batch, seed=5)]
    plain, corrected = (
        mpo.compress(model, plan_of(model, corrects), data=data) for corrects in (False, True)
    )
    assert error(model, corrected) <= 1.001 * error(model, plain)


def test_what_the_fit_moved_is_not_called_trained():
    model = network()
    model[4].requires_grad_(False)
    result = mpo.compress(model, plan_of(model), data=DATA)
    mpo.distill(result, reference=model, data=DATA, steps=3, learning_rate=1e-3)
    changes = {layer.name: layer.changes for layer in result.report.layers}
    assert changes["4"] == ["corrected"]
    assert changes["4.bias"] == []
    assert changes["0"] == ["healed"]


def test_a_compressed_layer_may_have_a_single_padded_site():
    model = nn.Sequential(nn.Linear(64, 63), nn.Tanh(), nn.Linear(63, 3)).eval()
    found = mpo.plan(model, bond_dim=4, exclude=["2"])
    layers = [
        layer.model_copy(update={"action": "compress", "layout": ((64, 64),), "bond_dims": ()})
        if layer.name == "0"
        else layer
        for layer in found.layers
    ]
    plan = found.model_copy(update={"layers": tuple(layers)})
    data = [gaussian(50, 64, seed=seed, dtype=torch.float32) for seed in range(3)]
    result = mpo.compress(model, plan, data=data)
    with torch.no_grad():
        torch.testing.assert_close(
            result.model(data[0]), model(data[0]), **TOL[torch.float32]["apply"]
        )


def test_reports_say_that_predictions_know_nothing_of_corrections():
    result = mpo.compress(network(), ratio=4, of="layers", layout="svd", data=DATA)
    kept = next(layer for layer in result.report.layers if layer.name == "4")
    assert kept.status == "kept"
    notes = {row[0]: row[-1] for row in comparison_rows(result.report)}
    assert notes["relative change of the model's outputs"].endswith(
        "; the prediction is without what dense layers took up"
    )
