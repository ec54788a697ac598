"""Objectives: tables of times, measured and planted, and plans that go by them."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.errors import BudgetError, PlanError
from mpocompress.export.latency import LatencyTable, grid_of_bonds, layer_graph
from mpocompress.mpo import Layout
from mpocompress.planning import Objective, PlanOptions, predicted_totals, with_predictions
from mpocompress.surgery import find_weights

SHAPE = (64, 48)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(96, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 32)
    ).eval()


@pytest.mark.onnx
@pytest.mark.parametrize("layout", [None, "64x1,1x48", "8x6,8x8", "4x4,4x4,4x3", "9x7,8x7"])
def test_the_graph_that_is_timed_computes_a_layer(layout):
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    sites = None if layout is None else Layout.parse(layout, pad=True)
    bonds = () if sites is None else sites.clip([5] * (sites.num_sites - 1))
    content = layer_graph(SHAPE, sites, bonds)
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    x = np.eye(48, dtype=np.float32)
    found = session.run(None, {"input": x})[0]
    assert found.shape == (48, 64)
    arrays = {
        array.name: numpy_helper.to_array(array)
        for array in onnx.load_from_string(content).graph.initializer
    }
    matrix = (found - arrays["bias"]).T  # a linear map and a bias, of the rank that it must have
    twice = session.run(None, {"input": 2 * x})[0]
    np.testing.assert_allclose(twice - arrays["bias"], 2 * matrix.T, rtol=1e-4, atol=1e-4)
    if layout == "64x1,1x48":
        assert np.linalg.matrix_rank(matrix, tol=1e-3) == 5
    if layout is None:
        np.testing.assert_allclose(matrix, arrays["weight"].T, rtol=1e-5, atol=1e-6)
    else:
        stored = sum(array.size for name, array in arrays.items() if name.startswith("core"))
        assert stored == sites.num_parameters(bonds)


@pytest.mark.onnx
def test_a_table_is_measured_once_and_kept_on_disk(tmp_path, monkeypatch):
    table = LatencyTable(4, threads=1, cache=tmp_path)
    layout = Layout.svd(*SHAPE)
    dense = table(SHAPE, None, ())
    times = [table(SHAPE, layout, (bond,)) for bond in (1, 8, 20, 27)]
    assert 0 < dense < 0.1
    assert times == sorted(times)
    assert all(0 < seconds < 0.1 for seconds in times)
    stored = json.loads((tmp_path / "latency.json").read_text())
    (key,) = stored["tables"]
    assert "onnxruntime" in key
    assert "1 threads" in key

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(LatencyTable, "_session", refuse)
    again = LatencyTable(4, threads=1, cache=tmp_path)
    assert again(SHAPE, None, ()) == dense
    assert again(SHAPE, layout, (8,)) == times[1]
    with pytest.raises(AssertionError, match="measured again"):
        LatencyTable(5, threads=1, cache=tmp_path)(SHAPE, None, ())
    with pytest.raises(AssertionError, match="measured again"):
        LatencyTable(4, threads=2, cache=tmp_path)(SHAPE, None, ())
    (tmp_path / "latency.json").write_text("not ours")
    with pytest.raises(AssertionError, match="measured again"):
        LatencyTable(4, threads=1, cache=tmp_path)(SHAPE, None, ())


def test_the_grid_spans_all_bond_dimensions_that_make_smaller():
    bonds = grid_of_bonds((384, 384), Layout.svd(384, 384))
    assert bonds[0] == 1
    assert 192 <= bonds[-1] <= 384
    assert bonds == sorted(set(bonds))


def planted(shape, layout, bond_dims) -> float:
    """Times in which square layers are slow as chains above bond dimension 20, others never."""
    if layout is None:
        return 1.0
    return 0.01 * bond_dims[0] + (0.7 if shape == (128, 128) else 0.0)


def plan_by_latency(**options):
    model = network()
    inventory = find_weights(model)
    objective = Objective(name="latency", batch=3, latency=planted)
    chosen = PlanOptions(objective="latency", batch=3, **options).checked()
    plan = chosen.make(inventory, objective=objective)
    return with_predictions(plan, inventory, objective=objective)


@pytest.mark.parametrize("options", [{"ratio": 1.5}, {"ratio": 3}, {"ratio": 3, "of": "layers"}])
def test_a_latency_plan_has_no_layer_that_is_slower_than_dense(options):
    plan = plan_by_latency(**options)
    assert plan.compressed
    for layer in plan:
        assert layer.predicted.seconds <= layer.predicted.dense_seconds
        if layer.shape == (128, 128) and layer.action == "compress":
            assert layer.bond_dims[0] <= 20
    assert plan.settings["objective"] == "latency"
    assert plan.settings["batch"] == 3
    totals = predicted_totals(plan)
    assert totals.seconds[1] < totals.seconds[0] == 3.0


def test_a_layer_that_no_chain_makes_faster_stays_dense_and_the_plan_says_why():
    def slow(shape, layout, bond_dims):
        return 1e-6 if layout is None else 2e-6 if shape == (128, 128) else 0.5e-6

    inventory = find_weights(network())
    objective = Objective(name="latency", batch=16, latency=slow)
    for options in (
        {"ratio": 2, "of": "layers"},
        {"bond_dim": 8},
        {"bond_dim": 8, "layout": "svd"},
    ):
        chosen = PlanOptions(objective="latency", batch=16, **options)
        plan = chosen.make(inventory, objective=objective)
        kept = {layer.name: layer.reason for layer in plan if layer.action == "keep"}
        assert list(kept) == ["2"]
        assert "slower than dense" in kept["2"]
        assert "2.0 µs against 1.0 µs for a batch of 16 in ONNX Runtime" in kept["2"]

    def never(shape, layout, bond_dims):
        return 1e-6

    objective = Objective(name="latency", latency=never)
    with pytest.raises(BudgetError, match="no layer is worth compressing by latency .0: .*slower"):
        PlanOptions(ratio=2, objective="latency").make(inventory, objective=objective)


def test_multiply_adds_never_rise_by_that_objective():
    model = network()
    plan = mpo.plan(model, ratio=3, layout="balanced", objective="macs", exclude=["4"])
    small = mpo.plan(model, ratio=3, layout="balanced", exclude=["4"])
    dense = {layer.name: layer.shape[0] * layer.shape[1] for layer in plan}
    assert any(layer.macs > dense[layer.name] for layer in small.compressed)
    assert all(layer.macs <= dense[layer.name] for layer in plan)


def test_latency_needs_a_table():
    with pytest.raises(PlanError, match="needs a table of measured times"):
        Objective(name="latency")


@pytest.mark.onnx
def test_the_report_has_predicted_and_measured_times(tmp_path, monkeypatch):
    monkeypatch.setenv("MPOCOMPRESS_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512)).eval()
    result = mpo.compress(model, ratio=8, objective="latency", batch=4)
    assert (tmp_path / "latency.json").exists()
    rows = {row.quantity: row for row in result.report.predictions}
    row = rows["time of the planned layers for a batch of 4 in ONNX Runtime"]
    assert row.predicted > 0
    assert row.measured > 0
    assert "µs" in result.report.to_markdown()
