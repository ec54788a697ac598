"""Moments of activations from running a graph, and fits in their metric."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto

from mpocompress.api.graphs import compress_graph
from mpocompress.errors import DataError
from mpocompress.export.graphs import (
    GraphInputs,
    OnnxModel,
    bias_of,
    find_graph_weights,
    graph_sites,
    input_moments,
    with_cores,
)
from mpocompress.planning import PlanOptions
from mpocompress.report import Source
from tests.onnx_graphs import mlp, model, node, rows, run, vector, weight
from tests.tolerances import TOL

pytestmark = pytest.mark.onnx
ONNX = TOL[torch.float32]["onnx"]


def opened(proto) -> OnnxModel:
    return OnnxModel(proto, Path())


def sites_of(graph: OnnxModel):
    return graph_sites(find_graph_weights(graph))


def moments(graph: OnnxModel, *feeds, **options) -> dict[str, np.ndarray]:
    found = {}
    for group in input_moments(graph, sites_of(graph), lambda: iter(feeds), **options):
        found |= {site.name: m.mean(centered=False)[0].numpy() for site, m in group.items()}
    return found


def second_moment(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    return x.T @ x / len(x)


@pytest.mark.parametrize("limit", [1, 1 << 30], ids=["a pass for each weight", "one pass"])
def test_moments_are_those_of_the_activations(limit):
    graph = opened(mlp())
    x = rows(50, 48)
    hidden = np.maximum(x @ weight(48, 64) + vector(64), 0)
    found = moments(graph, {"x": x[:20]}, {"x": x[20:]}, moment_bytes=limit)
    assert list(found) == ["fc0", "fc1"]
    np.testing.assert_allclose(found["fc0"], second_moment(x), **ONNX)
    np.testing.assert_allclose(found["fc1"], second_moment(hidden), **ONNX)


def test_padding_is_left_out_in_two_and_in_three_dimensions():
    proto = model(
        [
            node("MatMul", "x A", "a"),
            node("Reshape", "a flat", "f"),
            node("MatMul", "f B", "y"),
            node("Cast", "attention_mask", "m", to=TensorProto.FLOAT),
        ],
        {"A": weight(12, 16), "B": weight(16, 20), "flat": np.array([-1, 16])},
        inputs={"x": ["batch", "sequence", 12], "attention_mask": ["batch", "sequence"]},
        outputs={"y": [None, 20], "m": ["batch", "sequence"]},
        input_types={"attention_mask": TensorProto.INT64},
    )
    x = rows(3, 5, 12)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    found = moments(opened(proto), {"x": x, "attention_mask": mask})
    real = x[mask == 1]
    np.testing.assert_allclose(found["A"], second_moment(real), **ONNX)
    np.testing.assert_allclose(found["B"], second_moment(real @ weight(12, 16)), **ONNX)


def test_a_transposed_input_and_a_shared_weight():
    proto = model(
        [
            node("Gemm", "x W", "a", transA=1),
            node("MatMul", "a W", "y"),
        ],
        {"W": weight(24, 24)},
        inputs={"x": [24, "batch"]},
        outputs={"y": [None, 24]},
    )
    x = rows(30, 24)
    found = moments(opened(proto), {"x": x.T.copy()})
    expected = (second_moment(x) + second_moment(x @ weight(24, 24))) / 2
    np.testing.assert_allclose(found["W"], expected, **ONNX)


def compressed(graph: OnnxModel, feeds=None, **options):
    result = compress_graph(
        graph,
        PlanOptions(**options),
        feeds=None if feeds is None else lambda: iter(feeds),
        source=Source(name="net.onnx"),
    )
    return with_cores(graph, result.weights, result.vectors), result


def test_data_makes_the_output_error_smaller_and_the_mean_error_vanish():
    proto = mlp(sizes=(48, 64))
    graph = opened(proto)
    x = rows(400, 48)
    expected = run(proto, {"x": x})[0]
    feeds = [{"x": x[:200]}, {"x": x[200:]}]
    blind, _ = compressed(graph, bond_dim=6)
    fitted, result = compressed(graph, feeds, bond_dim=6)
    errors = {
        name: run(made, {"x": x})[0] - expected
        for name, made in (("blind", blind), ("fitted", fitted))
    }
    norms = {name: np.linalg.norm(error) for name, error in errors.items()}
    assert norms["fitted"] < 0.6 * norms["blind"]
    means = {name: np.abs(error.mean(0)).max() for name, error in errors.items()}
    assert means["fitted"] < ONNX["atol"] < 0.1 < means["blind"]
    assert set(result.vectors) == {"fc0.bias"}
    assert result.report.settings["rows_of_data"] == 400
    (layer,) = result.report.compressed_layers
    # With the mean in the bias the error of the layer is that of the centered outputs.
    centered = (x - x.mean(0)) @ weight(48, 64)
    measured = norms["fitted"] / np.linalg.norm(centered)
    assert layer.relative_output_error == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("beta", [1.0, -4.0])
def test_the_mean_goes_into_the_bias_of_a_scaled_gemm(alpha, beta):
    proto = model(
        [node("Gemm", "x W b", "y", alpha=alpha, beta=beta)],
        {"W": weight(48, 64), "b": vector(64)[None]},
        inputs={"x": ["batch", 48]},
        outputs={"y": ["batch", 64]},
    )
    x = rows(400, 48)
    made, _ = compressed(opened(proto), [{"x": x}], bond_dim=6)
    error = run(made, {"x": x})[0] - run(proto, {"x": x})[0]
    assert np.abs(error.mean(0)).max() < ONNX["atol"]
    assert np.abs(error).max() > 0.1


def test_a_bias_that_others_use_is_left_alone():
    stored = {"W": weight(24, 24), "V": weight(24, 24, seed=1), "b": vector(24)}
    proto = model(
        [
            node("MatMul", "x W", "a"),
            node("Add", "a b", "c"),
            node("MatMul", "c V", "d"),
            node("Add", "b d", "y"),
        ],
        stored,
        inputs={"x": ["batch", 24]},
        outputs={"y": ["batch", 24]},
    )
    graph = opened(proto)
    assert [bias_of(graph, site) for site in sites_of(graph)] == [None, None]
    _, result = compressed(graph, [{"x": rows(100, 24)}], bond_dim=4)
    assert result.vectors == {}


def test_equal_runs_give_equal_graphs():
    graph = opened(mlp())
    feeds = [{"x": rows(60, 48)}]
    one, two = (compressed(graph, feeds, bond_dim=6)[0] for _ in range(2))
    assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)


def test_a_ratio_is_kept_and_counted():
    graph = opened(mlp())
    _, result = compressed(graph, ratio=3.0, of="layers")
    totals = result.report.totals
    assert 3.0 <= totals.parameters.layers.ratio < 3.3
    assert totals.parameters.model.dense == 48 * 64 + 64 + 64 * 40 + 40
    assert totals.bytes.model.dense == 4 * totals.parameters.model.dense
    assert totals.bytes.model.compressed == 4 * totals.parameters.model.compressed
    assert totals.macs.layers.dense == 48 * 64 + 64 * 40
    cores = sum(core.numel() for mpo in result.weights.values() for core in mpo.cores)
    assert totals.parameters.layers.compressed == cores


def test_an_int8_weight_stays_where_cores_would_take_more_bytes():
    scale = np.full(64, 0.01, np.float32)
    ints = np.random.default_rng(0).integers(-127, 128, (48, 64)).astype(np.int8)
    proto = model(
        [
            node("DequantizeLinear", "Q scale", "d", axis=1),
            node("MatMul", "x d", "a"),
            node("MatMul", "a W", "y"),
        ],
        {"Q": ints, "scale": scale, "W": weight(64, 48)},
        inputs={"x": ["batch", 48]},
        outputs={"y": ["batch", 48]},
    )
    graph = opened(proto)
    _, result = compressed(graph, ratio=2.0, of="layers")
    by_name = {layer.name: layer for layer in result.report.layers}
    assert by_name["Q"].status == "kept"
    assert "would not be smaller than its 3328" in by_name["Q"].reason
    assert by_name["W"].status == "compressed"
    _, result = compressed(graph, bond_dim=4)
    assert {site.name for site in result.weights} == {"Q", "W"}
    bytes_ = result.report.totals.bytes.model
    assert bytes_.dense == 48 * 64 + 4 * 64 + 4 * 64 * 48
    assert bytes_.compressed == 2 * 4 * 4 * (48 + 64)


WRONG = {
    "another name": ({"z": torch.zeros(2, 48)}, "has z, but the model takes 'x': float32"),
    "another size": ({"x": torch.zeros(2, 47)}, r"'x' is float32 \(2, 47\)"),
    "another rank": ({"x": torch.zeros(2, 1, 48)}, r"takes 'x': float32 \(batch, 48\)"),
    "integers": ({"x": torch.zeros(2, 48, dtype=torch.int64)}, "'x' is int64"),
    "too many": ({"x": torch.zeros(2, 48), "y": torch.zeros(2, 48)}, "has x, y"),
}


@pytest.mark.parametrize("case", WRONG)
def test_data_that_does_not_fit_is_refused(case):
    given, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        GraphInputs(opened(mlp())).feed((), given, "data.npz, batch 0")


def test_data_goes_by_position_and_in_the_graphs_dtype():
    feed = GraphInputs(opened(mlp())).feed((torch.zeros(2, 48, dtype=torch.float64),), {}, "data")
    assert {name: array.dtype for name, array in feed.items()} == {"x": np.float32}


def test_no_data_is_an_error():
    graph = opened(mlp())
    with pytest.raises(DataError, match="no batches to fit on"):
        list(input_moments(graph, sites_of(graph), lambda: iter(())))
