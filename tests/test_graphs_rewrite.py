"""Cores in the place of weights in ONNX graphs: the dense twin is the graph itself."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mpocompress.export.graphs import (
    GraphInputs,
    OnnxModel,
    compare_graphs,
    find_graph_weights,
    graph_sites,
    with_cores,
    with_matrices,
    write_graph,
)
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.factors import balanced_layout
from tests.onnx_graphs import conv_net, keras_dense, mlp, model, node, run, save, vector, weight
from tests.tolerances import TOL

pytestmark = pytest.mark.onnx
ONNX = TOL[torch.float32]["onnx"]


def opened(proto, folder: Path = Path()) -> OnnxModel:
    return OnnxModel(proto, folder)


def lossless(graph: OnnxModel, sites: int | None = None) -> dict:
    """Every weight as an MPO that loses nothing."""
    weights = {}
    for site in graph_sites(find_graph_weights(graph)):
        layout = Layout.svd(*site.shape) if sites is None else balanced_layout(*site.shape, sites)
        weights[site] = MPO.from_matrix(site.matrix(), layout).to(dtype=site.dtype)
    return weights


def reference(graph: OnnxModel, weights: dict, folder: Path) -> Path:
    """The original products with the matrices that the cores stand for, written to a file."""
    proto, computed = with_matrices(graph, weights)
    write_graph(proto, Path(), folder / "reference.onnx", computed=computed)
    return folder / "reference.onnx"


def feed(*shape: int, name: str = "x", seed: int = 7) -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


# One product each, with everything that Gemm and MatMul can do to it.
PRODUCTS = {
    "matmul": ([node("MatMul", "x W", "y")], (12, 20), (5, 12)),
    "matmul of rank 3": ([node("MatMul", "x W", "y")], (12, 20), (2, 5, 12)),
    "matmul of rank 4": ([node("MatMul", "x W", "y")], (12, 20), (2, 3, 5, 12)),
    "matmul of one row": ([node("MatMul", "x W", "y")], (12, 20), (12,)),
    "gemm": ([node("Gemm", "x W b", "y")], (12, 20), (5, 12)),
    "gemm without bias": ([node("Gemm", "x W", "y", transB=1)], (20, 12), (5, 12)),
    "gemm, transA": ([node("Gemm", "x W b", "y", transA=1)], (12, 20), (12, 5)),
    "gemm, transA and transB": (
        [node("Gemm", "x W b", "y", transA=1, transB=1)],
        (20, 12),
        (12, 5),
    ),
    "gemm, alpha": ([node("Gemm", "x W b", "y", alpha=0.25)], (12, 20), (5, 12)),
    "gemm, alpha and beta": (
        [node("Gemm", "x W b", "y", alpha=-2.0, beta=0.5, transB=1)],
        (20, 12),
        (5, 12),
    ),
    "gemm, beta 0": ([node("Gemm", "x W b", "y", beta=0.0)], (12, 20), (5, 12)),
    "gemm, alpha without bias": ([node("Gemm", "x W", "y", alpha=3.0)], (12, 20), (5, 12)),
    "behind a Transpose": (
        [node("Transpose", "W", "t"), node("MatMul", "x t", "y")],
        (20, 12),
        (5, 12),
    ),
    "behind two, and an Identity": (
        [
            node("Transpose", "W", "t", perm=[1, 0]),
            node("Identity", "t", "i"),
            node("Transpose", "i", "u"),
            node("MatMul", "x u", "y"),
        ],
        (12, 20),
        (5, 12),
    ),
    "behind a Reshape": (
        [node("Reshape", "W shape", "r"), node("MatMul", "x r", "y")],
        (240,),
        (5, 12),
    ),
    "behind a Reshape of what is left": (
        [node("Reshape", "W left", "r"), node("MatMul", "x r", "y")],
        (12, 4, 5),
        (5, 12),
    ),
}


@pytest.mark.parametrize("sites", [None, 1, 2, 3], ids=["svd", "1 site", "2 sites", "3 sites"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_cores_compute_what_the_weight_computed(case, sites, tmp_path):
    nodes, shape, input_shape = PRODUCTS[case]
    stored = {
        "W": weight(12, 20, seed=1).reshape(shape),
        "b": vector(20),
        "shape": np.array([12, 20]),
        "left": np.array([0, -1]),
    }
    used = {name for entry in nodes for name in entry.input}
    proto = model(
        nodes,
        {name: array for name, array in stored.items() if name in used},
        inputs={"x": [f"d{axis}" for axis in range(len(input_shape) - 1)] + [input_shape[-1]]}
        if "transA" not in case
        else {"x": [12, "rows"]},
        outputs={"y": [None] * max(len(input_shape), 1)},
    )
    graph = opened(proto)
    weights = lossless(graph, sites)
    assert [site.shape for site in weights] == [(20, 12)]
    x = feed(*input_shape)
    expected = run(proto, x)[0]
    made = with_cores(graph, weights)
    onnx.checker.check_model(made, full_check=True)
    np.testing.assert_allclose(run(made, x)[0], expected, **ONNX)
    np.testing.assert_allclose(run(reference(graph, weights, tmp_path), x)[0], expected, **ONNX)
    assert "W" not in {tensor.name for tensor in made.graph.initializer}
    assert "Einsum" not in {entry.op_type for entry in made.graph.node}


def test_padded_layouts_are_padded_in_the_graph():
    graph = opened(mlp(sizes=(45, 61, 40)))
    weights = {}
    for site in graph_sites(find_graph_weights(graph)):
        layout = Layout((8, 8), (8, 6), pad=True) if site.shape == (61, 45) else None
        layout = layout or Layout((5, 8), (8, 8), pad=True)
        weights[site] = MPO.from_matrix(site.matrix(), layout)
    x = feed(3, 45)
    np.testing.assert_allclose(
        run(with_cores(graph, weights), x)[0], run(graph.proto, x)[0], **ONNX
    )


def test_intermediate_tensors_have_at_most_four_dimensions():
    graph = opened(keras_dense())
    made = with_cores(graph, lossless(graph, 3))
    inferred = onnx.shape_inference.infer_shapes(made, strict_mode=True)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in inferred.graph.value_info}
    assert len(ranks) > 15
    assert max(ranks.values()) <= 4


@pytest.mark.parametrize("opset", [11, 13, 17, 22])
def test_every_opset(opset):
    graph = opened(keras_dense(opset))
    x = feed(3, 4, 4, 3, name="input_1:0")
    for sites in (None, 2):
        made = with_cores(graph, lossless(graph, sites))
        onnx.checker.check_model(made, full_check=True)
        np.testing.assert_allclose(run(made, x)[0], run(graph.proto, x)[0], **ONNX)


def quantized(array: np.ndarray, axis: int) -> dict[str, np.ndarray]:
    scale = np.abs(array).max(axis=1 - axis, keepdims=True) / 127
    return {
        "W": np.round(array / scale).astype(np.int8),
        "scale": scale.reshape(-1).astype(np.float32),
        "zero": np.zeros(scale.size, np.int8),
    }


def test_a_dequantized_weight_is_one_of_float32():
    dense = weight(12, 20)
    proto = model(
        [
            node("DequantizeLinear", "W scale zero", "d", axis=1),
            node("MatMul", "x d", "y"),
        ],
        quantized(dense, 1),
        inputs={"x": ["batch", 12]},
        outputs={"y": ["batch", 20]},
    )
    graph = opened(proto)
    weights = lossless(graph)
    (site,) = weights
    assert site.dtype == torch.float32
    assert site.bytes == 12 * 20 + 20 * 4 + 20
    x = feed(4, 12)
    made = with_cores(graph, weights)
    # Not against the original in ONNX Runtime, which rounds the activations to integers there.
    stored = quantized(dense, 1)
    expected = x["x"] @ (stored["W"] * stored["scale"])
    np.testing.assert_allclose(run(made, x)[0], expected, **ONNX)
    assert not {"W", "scale", "zero"} & {tensor.name for tensor in made.graph.initializer}


def test_a_half_precision_weight_behind_a_cast_stays_one():
    proto = model(
        [node("Cast", "W", "c", to=TensorProto.FLOAT), node("MatMul", "x c", "y")],
        {"W": weight(12, 20).astype(np.float16)},
        inputs={"x": ["batch", 12]},
        outputs={"y": ["batch", 20]},
    )
    graph = opened(proto)
    weights = lossless(graph)
    made = with_cores(graph, weights)
    kinds = {t.name: t.data_type for t in made.graph.initializer}
    assert set(kinds.values()) == {TensorProto.FLOAT16}
    x = feed(4, 12)
    np.testing.assert_allclose(run(made, x)[0], run(proto, x)[0], **TOL[torch.float16]["apply"])


def test_a_constant_node_is_a_weight_too():
    constant = helper.make_node(
        "Constant", [], ["W"], name="c", value=numpy_helper.from_array(weight(12, 20), "whatever")
    )
    proto = model(
        [constant, node("MatMul", "x W", "y")],
        {},
        inputs={"x": ["batch", 12]},
        outputs={"y": ["batch", 20]},
    )
    graph = opened(proto)
    made = with_cores(graph, lossless(graph))
    assert [entry.op_type for entry in made.graph.node] == ["MatMul", "MatMul"]
    x = feed(4, 12)
    np.testing.assert_allclose(run(made, x)[0], run(proto, x)[0], **ONNX)


def test_a_shared_weight_stays_shared():
    proto = model(
        [
            node("MatMul", "x W", "a"),
            node("Relu", "a", "r"),
            node("MatMul", "r W", "y"),
        ],
        {"W": weight(24, 24)},
        inputs={"x": ["batch", 24]},
        outputs={"y": ["batch", 24]},
    )
    graph = opened(proto)
    weights = lossless(graph)
    (site,) = weights
    assert len(site.products) == 2
    made = with_cores(graph, weights)
    assert sum(t.name.startswith("W.cores") for t in made.graph.initializer) == 2
    x = feed(4, 24)
    np.testing.assert_allclose(run(made, x)[0], run(proto, x)[0], **ONNX)


def test_all_else_of_the_graph_is_kept():
    proto = mlp()
    proto.producer_name, proto.producer_version, proto.doc_string = "theirs", "1.2", "a model"
    proto.metadata_props.add(key="license", value="MIT")
    proto.graph.node[1].doc_string = "the only nonlinearity"
    proto.graph.value_info.append(
        helper.make_tensor_value_info("h0", TensorProto.FLOAT, [None, 64])
    )
    graph = opened(proto)
    before = proto.SerializeToString()
    weights = lossless(graph)
    weights = {site: mpo for site, mpo in weights.items() if site.name == "fc0"}
    made = with_cores(graph, weights, metadata={"mpocompress.version": "x"})
    assert proto.SerializeToString() == before
    assert (made.producer_name, made.producer_version, made.doc_string) == (
        "theirs",
        "1.2",
        "a model",
    )
    entries = {entry.key: entry.value for entry in made.metadata_props}
    assert entries == {"license": "MIT", "mpocompress.version": "x"}
    kept = [entry for entry in made.graph.node if entry in proto.graph.node]
    assert kept == list(proto.graph.node[1:])
    assert list(made.graph.input) == list(proto.graph.input)
    assert list(made.graph.output) == list(proto.graph.output)
    assert list(made.graph.value_info) == list(proto.graph.value_info)
    left = {t.name: t for t in proto.graph.initializer if t.name != "fc0.weight"}
    assert {t.name: t for t in made.graph.initializer if t.name in left} == left
    assert "h0" in {name for entry in made.graph.node for name in entry.output}


def test_sequences_of_maps_survive():
    """What scikit-learn's classifiers give."""
    proto = mlp(sizes=(48, 64, 3))
    proto.graph.node.append(
        helper.make_node("ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])
    )
    of_classes = helper.make_map_type_proto(
        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    )
    kind = helper.make_sequence_type_proto(of_classes)
    proto.graph.output.append(helper.make_value_info("z", kind))
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    graph = opened(proto)
    made = with_cores(graph, lossless(graph))
    assert made.graph.output[1] == proto.graph.output[1]
    ours, theirs = run(made, feed(4, 48))[1], run(proto, feed(4, 48))[1]
    for ours_row, theirs_row in zip(ours, theirs, strict=True):
        assert ours_row == pytest.approx(theirs_row, rel=ONNX["rtol"], abs=ONNX["atol"])


def with_tensors_as_inputs(ir_version: int) -> onnx.ModelProto:
    proto = mlp(11)
    proto.ir_version = ir_version
    proto.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in proto.graph.initializer
    )
    return proto


@pytest.mark.parametrize(
    ("ir_version", "inputs"), [(3, ["x"]), (4, ["x", "fc0.bias", "fc1.weight", "fc1.bias"])]
)
def test_stored_tensors_that_are_inputs(ir_version, inputs):
    # Before version 4 they had to be; since then they are defaults, which stay such.
    proto = with_tensors_as_inputs(ir_version)
    graph = opened(proto)
    assert [value.name for value in graph.inputs] == ["x"]
    weights = lossless(graph)
    first = {site: mpo for site, mpo in weights.items() if site.name == "fc0"}
    x = feed(4, 48)
    for made in (with_cores(graph, first), with_matrices(graph, first)[0]):
        assert [v.name for v in made.graph.input] == inputs
    made = with_cores(graph, first)
    onnx.checker.check_model(made)
    np.testing.assert_allclose(run(made, x)[0], run(proto, x)[0], **ONNX)


@pytest.mark.parametrize("domain", ["", "com.microsoft"])
@pytest.mark.parametrize("where", ["inside", "output"])
def test_noted_sizes_that_are_wrong_do_not_matter(tmp_path, domain, where):
    proto = model(
        [
            node("Gelu" if domain else "Relu", "x", "r", domain=domain),
            node("MatMul", "r w", "t"),
            node("Relu", "t", "y"),
        ],
        {"w": weight(64, 64)},
        inputs={"x": ["N", "S", 64]},
        outputs={"y": ["N", "S", 64]} | ({"r": [1, 16, 64]} if where == "output" else {}),
    )
    if domain:
        proto.opset_import.append(helper.make_opsetid(domain, 1))
    for name in "rt" if where == "inside" else "":
        proto.graph.value_info.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, 64])
        )
    graph = opened(proto)
    weights = lossless(graph, 2)
    path = tmp_path / "model.onnx"
    write_graph(with_cores(graph, weights), Path(), path)
    onnx.checker.check_model(path)
    assert compare_graphs(
        path, with_matrices(graph, weights), Path(), GraphInputs(graph), None
    ).passed
    assert graph.shapes.get("r") == (None if domain else (None, None, 64))


def test_sizes_follow_from_the_inputs_through_bodies():
    branch = helper.make_graph(
        [node("MatMul", "x w", "b")],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 16, 64])],
    )
    proto = model(
        [
            node("If", "flag", "r", then_branch=branch, else_branch=branch),
            node("Reshape", "r shape", "y"),
        ],
        {"w": weight(64, 64), "shape": np.array([0, 8, 2, 64])},
        inputs={"x": ["N", 16, 64], "flag": []},
        outputs={"y": ["N", 8, 2, 64]},
        input_types={"flag": TensorProto.BOOL},
    )
    before = proto.SerializeToString(deterministic=True)
    shapes = opened(proto).shapes
    assert (shapes["r"], shapes["y"]) == ((None, 16, 64), (None, 8, 2, 64))
    assert proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("limit", [1, 1 << 30], ids=["data file", "one file"])
def test_external_data_is_read_and_written(tmp_path, limit):
    proto = mlp()
    source = save(proto, tmp_path / "in.onnx", external=True)
    graph = opened(onnx.load(source, load_external_data=False), tmp_path)
    weights = lossless(graph)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "out.onnx"
    made = with_cores(graph, {s: m for s, m in weights.items() if s.name == "fc0"})
    files = write_graph(made, tmp_path, target, single_file_bytes=limit)
    assert set(files) == ({"out.onnx", "out.onnx.data"} if limit == 1 else {"out.onnx"})
    assert files == {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    (tmp_path / "in.onnx.data").unlink()
    x = feed(4, 48)
    np.testing.assert_allclose(run(target, x)[0], run(proto, x)[0], **ONNX)


def test_small_external_tensors_do_not_point_into_the_new_data_file_of_the_same_name(tmp_path):
    branches = [
        helper.make_graph(
            [node("Add", "m inner", "a")],
            name,
            [],
            [helper.make_tensor_value_info("a", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.full(64, value, np.float32), "inner")],
        )
        for name, value in (("then", 5), ("else", 7))
    ]
    proto = model(
        [
            node("MatMul", "x w", "h"),
            node("Add", "h b", "m"),
            node("If", "flag", "y", then_branch=branches[0], else_branch=branches[1]),
        ],
        {"w": weight(64, 64), "b": np.arange(64, dtype=np.float32)},
        inputs={"x": ["batch", 64], "flag": []},
        outputs={"y": ["batch", 64]},
        input_types={"flag": TensorProto.BOOL},
    )
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    source = save(proto, tmp_path / "in" / "model.onnx", external=True)
    read = onnx.load(source, load_external_data=False)
    assert all(t.data_location == TensorProto.EXTERNAL for t in read.graph.initializer)
    target = tmp_path / "out" / "model.onnx"
    write_graph(read, tmp_path / "in", target, single_file_bytes=1000)
    made = onnx.load(target, load_external_data=False)
    assert [t.data_location == TensorProto.EXTERNAL for t in made.graph.initializer] == [
        True,
        False,
    ]
    x = feed(4, 64) | {"flag": np.array(True)}
    np.testing.assert_array_equal(run(target, x)[0], run(source, x)[0])


def test_parity_finds_a_wrong_core(tmp_path):
    graph = opened(conv_net())
    weights = lossless(graph)
    path = tmp_path / "model.onnx"
    write_graph(with_cores(graph, weights), Path(), path)

    def compare():
        return compare_graphs(path, with_matrices(graph, weights), Path(), GraphInputs(graph), None)

    assert compare().passed
    assert compare().batch_sizes == (1, 3, 7)
    wrong = {
        site: MPO([core * 1.01 for core in mpo.cores], shape=mpo.shape)
        for site, mpo in weights.items()
    }
    write_graph(with_cores(graph, wrong), Path(), path)
    found = compare()
    assert not found.passed
    assert 0.005 < found.max_relative_difference < 0.02  # two cores, each 1 % too large; a bias
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_made_up_masks_do_not_hide_everything_from_parity(tmp_path):
    # True = ignore, of which the graph says nothing: NaN where all is ignored, and NaN agrees.
    proto = model(
        [
            node("MatMul", "x W", "h"),
            node("Where", "pad_mask low h", "s"),
            node("Softmax", "s", "y", axis=-1),
        ],
        {"W": weight(24, 24), "low": np.array(-np.inf, np.float32)},
        inputs={"x": [1, 24], "pad_mask": [1, 24]},
        outputs={"y": [1, 24]},
        input_types={"pad_mask": TensorProto.BOOL},
    )
    graph = opened(proto)
    weights = lossless(graph)
    path = tmp_path / "model.onnx"
    for factor, passes in ((1.0, True), (1.1, False)):
        cores = {s: MPO([c * factor for c in m.cores], shape=m.shape) for s, m in weights.items()}
        write_graph(with_cores(graph, cores), Path(), path)
        found = compare_graphs(
            path, with_matrices(graph, weights), Path(), GraphInputs(graph), None
        )
        assert found.passed == passes


def test_the_reference_of_a_large_model_goes_to_a_data_file(tmp_path):
    graph = opened(mlp())
    weights = lossless(graph)
    proto, computed = with_matrices(graph, weights)
    assert all(not t.raw_data for t in proto.graph.initializer if t.name in computed)
    path = tmp_path / "reference.onnx"
    files = write_graph(proto, Path(), path, computed=computed, single_file_bytes=1)
    assert files["reference.onnx.data"] >= 4 * 64 * (48 + 40)
    x = feed(4, 48)
    np.testing.assert_allclose(run(path, x)[0], run(graph.proto, x)[0], **ONNX)


def test_int4_blocks_are_read_as_onnx_runtime_reads_them():
    generator = np.random.default_rng(0)
    ints = generator.integers(-8, 8, (64, 20))
    scale = generator.uniform(0.01, 0.02, (2, 20)).astype(np.float32)
    proto = model(
        [
            node("DequantizeLinear", "W scale", "d", axis=0, block_size=32),
            node("MatMul", "x d", "y"),
        ],
        {"scale": scale},
        inputs={"x": ["batch", 64]},
        outputs={"y": ["batch", 20]},
        opset=21,
    )
    packed = helper.make_tensor("W", TensorProto.INT4, ints.shape, ints.reshape(-1).tolist())
    proto.graph.initializer.append(packed)
    proto.ir_version = 10
    graph = opened(proto)
    weights = lossless(graph)
    (site,) = weights
    dense = ints * np.repeat(scale, 32, axis=0)
    np.testing.assert_allclose(site.matrix().numpy(), dense.T, **TOL[torch.float32]["dense"])
    assert site.bytes == 64 * 20 // 2 + scale.nbytes
    x = feed(4, 64)
    np.testing.assert_allclose(run(with_cores(graph, weights), x)[0], x["x"] @ dense, **ONNX)
