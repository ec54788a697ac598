"""The models of benchmarks/models/, tiny: they train, convert, run, save, load and export."""

import copy
import importlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import mpocompress as mpo
from mpocompress.export import export_onnx
from tests.tolerances import TOL

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALLER = {
    "conv": {"CHANNELS": (1, 8, 12, 12), "HALVED_AFTER": (1, 2)},
    "lstm": {"HIDDEN": 16},
    "causal": {"WIDTH": 32, "BLOCKS": 2, "WINDOW": 24},
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("trained_kinds")


@pytest.fixture
def training(benchmark):
    return importlib.import_module("training")  # the benchmark has put its folder on the path


@pytest.fixture
def tiny(benchmark, monkeypatch):
    """A function from a name to the recipe of a small model, and to a little of its data."""

    def make(name):
        for constant, value in SMALLER[name].items():
            monkeypatch.setattr(getattr(benchmark, name), constant, value)
        recipe = benchmark.RECIPES[name]
        if name == "causal" and not Path("/usr/share/games/fortunes").is_dir():
            pytest.skip("needs the fortunes package")
        data = recipe.data(0)
        little = {
            field: getattr(data, field)[:160]
            for field in ("inputs_N", "targets_N", "held_inputs_N", "held_targets_N")
        }
        return recipe, replace(data, **little)

    return make


@pytest.mark.parametrize("name", SMALLER)
def test_training_lowers_the_loss_and_is_the_same_for_a_seed(training, tiny, name):
    recipe, data = tiny(name)
    untrained = training.seeded_model(recipe.build, 0).eval()
    first = training.train(recipe, data, seed=0, steps=12)
    again = training.train(recipe, data, seed=0, steps=12)

    @torch.no_grad()
    def loss(model):
        return float(training.loss_of(model(data.inputs_N), data.targets_N))

    assert loss(first) < loss(untrained)
    assert loss(first) == loss(again)


@pytest.mark.slow
@pytest.mark.onnx
@pytest.mark.parametrize("name", SMALLER)
def test_compressed_healed_saved_loaded_and_exported(training, tiny, name, tmp_path):
    recipe, data = tiny(name)
    dense = training.train(recipe, data, seed=0, steps=8)
    before = copy.deepcopy(dense.state_dict())
    batches = [{data.argument: part} for part in data.inputs_N.split(40)]
    result = mpo.compress(dense, ratio=2, data=batches, distill=6)
    assert result.report.totals.parameters.model.ratio >= 2
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    mpo.save(result, tmp_path / "saved")
    loaded = mpo.load(tmp_path / "saved", model=recipe.build()).eval()
    held = data.held_inputs_N[:5]
    with torch.no_grad():
        expected = result.model.eval()(held)
        assert torch.equal(loaded(held), expected)
        assert not torch.equal(dense(held), expected)
    path = tmp_path / "model.onnx"
    export_onnx(loaded, path, {data.argument: data.inputs_N[:2]})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {data.argument: held.numpy()})
    tolerance = TOL[torch.float32]["onnx"]
    np.testing.assert_allclose(outputs, expected.numpy(), **tolerance)


def test_the_transformer_looks_at_no_later_character(tiny):
    recipe, data = tiny("causal")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = recipe.build().eval()
    tokens = data.inputs_N[:2]
    other = tokens.clone()
    other[:, 10:] = (other[:, 10:] + 1) % 96
    with torch.no_grad():
        ours, theirs = model(tokens), model(other)
    torch.testing.assert_close(ours[:, :10], theirs[:, :10], **TOL[torch.float32]["apply"])
    assert not torch.equal(ours[:, 10], theirs[:, 10])
    assert torch.equal(data.inputs_N[0, 1:], data.targets_N[0, :-1])


def test_scores_are_shares_and_perplexities(benchmark, tiny):
    recipe, data = tiny("conv")
    right = torch.nn.functional.one_hot(data.held_targets_N, 10).float()
    answers = iter([right, right.roll(1, dims=1)])
    assert benchmark.score(lambda _: next(answers), recipe, data) == 1.0
    assert benchmark.score(lambda _: next(answers), recipe, data) == 0.0
    uniform = replace(recipe, metric="perplexity")
    assert benchmark.score(lambda x: torch.zeros(len(x), 10), uniform, data) == pytest.approx(10)


@pytest.mark.parametrize(
    ("kind", "metric", "dense", "healed", "held"),
    [
        ("conv", "accuracy", 0.98, 0.971, True),
        ("conv", "accuracy", 0.98, 0.969, False),
        ("causal", "perplexity", 5.0, 5.2, True),
        ("causal", "perplexity", 5.0, 5.3, False),
    ],
)
def test_claims_are_judged_by_the_worst_untuned_seed(benchmark, kind, metric, dense, healed, held):
    def row(method, score, seed, **fields):
        return {
            "kind": kind,
            "metric": metric,
            "method": method,
            "seed": seed,
            "score": score,
            "asked": 4.0,
            "ratio": 4.01,
            "steps": 9,
            **fields,
        }

    terrible = 0.1 if metric == "accuracy" else 100.0
    rows = [
        row("dense", dense, 0),
        row("healed", terrible, 0, onnx_score=terrible),  # tuned on: not judged
        row("dense", dense, 1),
        row("healed", dense, 1, onnx_score=healed),
    ]
    (claim,) = benchmark.claims(rows)
    assert claim["held"] == held
    assert claim["seeds"] == [1]
    (tuned,) = benchmark.claims(rows[:3])
    assert tuned["held"] is None
    assert not benchmark.claims([*rows[:3], {**rows[3], "onnx_score": dense, "ratio": 3.9}])[0][
        "held"
    ]
    change = benchmark.lost(rows[3], rows[2], onnx=True)
    assert math.isclose(change, dense - healed if metric == "accuracy" else healed / dense - 1)
    assert len(benchmark.table(rows)) == 4
