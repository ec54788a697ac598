"""Which tensors of an ONNX graph are weights, which are kept and why, and what they are called."""

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpocompress.errors import LoadError, NoLayerMatched
from mpocompress.export.graphs import OnnxModel, find_graph_weights, graph_sites
from mpocompress.loading.onnx_source import load_onnx
from mpocompress.surgery import select_sites
from tests.onnx_graphs import conv_net, keras_dense, mlp, model, node, save, vector, weight

pytestmark = pytest.mark.onnx


def inventory(proto):
    return find_graph_weights(OnnxModel(proto, Path()))


def matmul(stored: dict, *more, outputs=("y",), nodes=()):
    return model(
        [*nodes, node("MatMul", "x W", "y"), *more],
        stored,
        inputs={"x": ["batch", 24]},
        outputs={name: [None, None] for name in outputs},
    )


def test_sites_and_kept_tensors_add_up():
    found = inventory(conv_net())
    kinds = {entry.name: entry.kind for entry in found.entries}
    assert kinds == {
        "conv1.weight": "conv",
        "conv1.bias": "bias",
        "conv2.weight": "conv",
        "fc": "linear",
        "fc.bias": "bias",
    }
    stored = conv_net().graph.initializer
    assert found.parameters == sum(int(np.prod(tensor.dims)) for tensor in stored)
    assert found.bytes == 4 * found.parameters
    assert [(site.name, site.shape) for site in found.sites] == [("fc", (64, 256))]
    assert "convolution kernel is not a linear weight" in found.refused["conv1.weight"]


def test_the_matrix_is_out_by_in():
    (first, *_), (second, *_) = (graph_sites(inventory(proto)) for proto in (mlp(), keras_dense()))
    np.testing.assert_array_equal(first.matrix().numpy(), weight(48, 64).T)
    np.testing.assert_array_equal(second.matrix().numpy(), weight(48, 64).T)


def test_shapes_of_reshapes_are_buffers_and_no_parameters():
    found = inventory(keras_dense())
    entry = next(entry for entry in found.kept if entry.name == "const_shape__12")
    assert (entry.kind, entry.parameters, entry.bytes) == ("buffer", 0, 16)


def test_a_bias_of_one_row_is_a_bias():
    proto = model(
        [node("MatMul", "x W", "a"), node("Add", "a b", "y")],
        {"W": weight(24, 24), "b": vector(24)[None]},
        inputs={"x": ["batch", 24]},
        outputs={"y": ["batch", 24]},
    )
    assert [entry.kind for entry in inventory(proto).kept] == ["bias"]


W = {"W": weight(24, 24)}

REFUSED = {
    "multiplies from the left in MatMul 'node_z'": matmul(
        W, node("MatMul", "W y2", "z"), node("Transpose", "y", "y2"), outputs=("z",)
    ),
    "is also read by Gather 'node_z'": matmul(
        {**W, "i": np.array([1])}, node("Gather", "W i", "z"), outputs=("y", "z")
    ),
    "is also read by Identity 'node_unused'": matmul(W, node("Identity", "W", "unused")),
    "is also read by Transpose 'node_z'": matmul(
        W, node("Transpose", "W", "z"), outputs=("y", "z")
    ),
    "it is an output of the graph, too": matmul(W, outputs=("y", "W")),
    "in different forms": matmul(
        W,
        node("Transpose", "W", "t"),
        node("MatMul", "y t", "z"),
        outputs=("z",),
    ),
    "has shape (2, 24, 24), not two": matmul({"W": np.ones((2, 24, 24), np.float32)}),
    "it multiplies from the left in MatMul 'node_y'; weights on the right": model(
        [node("MatMul", "W x", "y")],
        W,
        inputs={"x": [24, "columns"]},
        outputs={"y": [24, None]},
    ),
    "it is added in Gemm 'node_y', and nothing multiplies by it": model(
        [node("Gemm", "x x2 W", "y")],
        W,
        inputs={"x": [24, 24], "x2": [24, 24]},
        outputs={"y": [24, 24]},
    ),
    "what Transpose 'node_t' makes of it is an output of the graph, too": model(
        [node("Transpose", "W", "t"), node("MatMul", "x t", "y")],
        W,
        inputs={"x": ["batch", 24]},
        outputs={"y": [None, None], "t": [24, 24]},
    ),
    "nothing reads what Transpose 'node_t' makes of it": model(
        [node("Transpose", "W", "t"), node("Relu", "x", "y")],
        W,
        inputs={"x": ["batch", 24]},
        outputs={"y": [None, None]},
    ),
    "its shape (24, 24) does not fit Reshape": model(
        [node("Reshape", "W shape", "r"), node("MatMul", "x r", "y")],
        {**W, "shape": np.array([5, -1])},
        inputs={"x": ["batch", 5]},
        outputs={"y": [None, None]},
    ),
    "its weight is INT32": model(
        [node("Cast", "x", "x2", to=TensorProto.INT32), node("MatMul", "x2 W", "y")],
        {"W": np.ones((24, 24), np.int32)},
        inputs={"x": ["batch", 24]},
        outputs={"y": [None, None]},
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_weights_say_why(reason):
    found = inventory(REFUSED[reason])
    assert not found.sites
    entry = next(entry for entry in found.kept if entry.name == "W")
    assert reason in entry.reason
    with pytest.raises(NoLayerMatched, match="no layer that can be converted"):
        select_sites(found)


def test_paths_that_scale_rows_and_columns_are_different_weights():
    # Transposed and then scaled row by row, or scaled and then transposed: by columns of the other.
    proto = quantized_twice(
        [node("Transpose", "wq", "a"), node("DequantizeLinear", "a s", "w1", axis=0)],
        [node("DequantizeLinear", "wq s", "b", axis=0), node("Transpose", "b", "w2")],
        scale=np.linspace(0.001, 0.05, 64).astype(np.float32),
    )
    found = inventory(proto)
    with pytest.raises(NoLayerMatched, match=r"'wq' \(its products use it in different"):
        select_sites(found)


@pytest.mark.parametrize("scales", [1, 64])
def test_paths_that_give_the_same_numbers_are_one_weight(scales):
    axis = {"axis": 0} if scales > 1 else {}
    proto = quantized_twice(
        [node("DequantizeLinear", "wq s", "a", **axis), node("Transpose", "a", "w1")],
        [
            node("DequantizeLinear", "wq s", "b", **axis),
            node("Transpose", "b", "c", perm=[0, 1]),
            node("Transpose", "c", "w2"),
        ],
        scale=np.linspace(0.001, 0.05, scales)
        .astype(np.float32)
        .reshape(() if scales == 1 else -1),
    )
    (site,) = graph_sites(inventory(proto))
    assert len(site.products) == 2


def test_a_transpose_that_moves_nothing_is_none():
    proto = model(
        [
            node("Transpose", "W", "t", perm=[0, 1]),
            node("MatMul", "x t", "y"),
            node("Gemm", "x W", "z", transB=1),
        ],
        W,
        inputs={"x": ["batch", 24]},
        outputs={"y": ["batch", 24], "z": ["batch", 24]},
    )
    assert "in different forms" in inventory(proto).refused["W"]


def quantized_twice(first, second, *, scale):
    numbers = np.random.default_rng(0).integers(-128, 128, (64, 1)) * np.ones((1, 64))
    return model(
        [*first, *second, node("MatMul", "x w1", "y1"), node("MatMul", "x w2", "y2")],
        {"wq": numbers.astype(np.int8), "s": scale},
        inputs={"x": ["batch", 64]},
        outputs={"y1": ["batch", 64], "y2": ["batch", 64]},
    )


def test_a_weight_that_a_loop_reads_stays():
    body = helper.make_graph(
        [node("MatMul", "x W", "inside")],
        "body",
        [],
        [helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)],
    )
    proto = model(
        [
            node("MatMul", "x W", "y"),
            node("If", "flag", "z", then_branch=body, else_branch=body),
        ],
        W,
        inputs={"x": ["batch", 24], "flag": []},
        outputs={"y": [None, None], "z": [None, None]},
        input_types={"flag": TensorProto.BOOL},
    )
    found = inventory(proto)
    assert not found.sites
    assert "is also read by If 'node_z' (inside its body)" in found.kept[0].reason


def test_made_up_names_give_way_to_those_that_people_know():
    stored = {
        "onnx::MatMul_7": weight(24, 24),
        "encoder.query.bias": vector(24),
        "onnx::MatMul_8": weight(24, 24),
        "decoder.weight": weight(24, 24),
    }
    proto = model(
        [
            node("MatMul", "x onnx::MatMul_7", "a", name="/encoder/query/MatMul"),
            node("Add", "encoder.query.bias a", "b"),
            node("MatMul", "b onnx::MatMul_8", "c", name="/encoder/key/MatMul"),
            node("MatMul", "c decoder.weight", "y"),
        ],
        stored,
        inputs={"x": ["batch", 24]},
        outputs={"y": [None, None]},
    )
    found = inventory(proto)
    assert [site.names for site in found.sites] == [
        ("encoder.query", "/encoder/query/MatMul", "onnx::MatMul_7"),
        ("/encoder/key/MatMul", "onnx::MatMul_8"),
        ("decoder", "decoder.weight"),
    ]
    for pattern in ("encoder.query", "*query/MatMul", "onnx::MatMul_7"):
        assert [site.name for site in select_sites(found, [pattern])] == ["encoder.query"]


# What is wrong with a file, and what is said of it.


def edited(tmp_path, edit, *, external=False, proto=None):
    proto = proto or mlp()
    path = save(proto, tmp_path / "net.onnx", external=external)
    if edit is not None:
        import onnx

        changed = onnx.load(path, load_external_data=False)
        edit(changed)
        path.write_bytes(changed.SerializeToString())
    return path


def point(key: str, value: str):
    def edit(proto):
        for entry in proto.graph.initializer[0].external_data:
            if entry.key == key:
                entry.value = value

    return edit


EXTERNAL = {
    "absolute": (point("location", "/etc/passwd"), "not inside the model's folder"),
    "above": (point("location", "../net.onnx.data"), "not inside the model's folder"),
    "above, the other way": (point("location", "..\\net.onnx.data"), "not inside"),
    "drive": (point("location", "C:net.onnx.data"), "not inside the model's folder"),
    "nothing": (point("location", ""), "not inside the model's folder"),
    "missing": (point("location", "other.data"), "no such file beside the model"),
    "beyond the end": (point("offset", "999999999"), "truncated, or belongs to another"),
    "negative": (point("offset", "-4"), "truncated, or belongs to another"),
    "too short": (point("length", "12"), "needs 12288 bytes"),
    "no number": (point("offset", "much"), "no number"),
}


@pytest.mark.parametrize("case", EXTERNAL)
def test_external_data_is_checked_before_it_is_read(tmp_path, case):
    edit, message = EXTERNAL[case]
    path = edited(tmp_path, edit, external=True)
    with pytest.raises(LoadError, match=message) as caught:
        load_onnx(path)
    assert "'fc0.weight'" in str(caught.value)


def test_external_data_behind_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    path = edited(tmp_path / "model", None, external=True)
    data = path.with_name("net.onnx.data")
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LoadError, match=r"not inside the model's folder.*cp -L"):
        load_onnx(path)


def test_truncated_external_data_is_refused(tmp_path):
    path = edited(tmp_path, None, external=True)
    data = path.with_name("net.onnx.data")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(LoadError, match=r"truncated, or belongs to another model"):
        load_onnx(path)


def old(proto):
    proto.opset_import[0].version = 9


def sparse(proto):
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    index = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, index, [4]))


def twice(proto):
    proto.graph.node.append(proto.graph.node[0])


def other_tensor(**fields):
    def edit(proto):
        tensor = proto.graph.initializer[0]
        for name, value in fields.items():
            if name == "dims":
                del tensor.dims[:]
                tensor.dims.extend(value)
            else:
                setattr(tensor, name, value)

    return edit


DAMAGED = {
    "unknown type": (other_tensor(data_type=99), "'fc0.weight' has the unknown type 99"),
    "negative size": (other_tensor(dims=[-64, 48]), r"'fc0.weight' has the shape \(-64, 48\)"),
    "too large": (other_tensor(dims=[1 << 40, 48]), "for which its data is too short"),
    "hidden": (other_tensor(name="h0"), "value 'h0' has two sources"),
    "old": (old, r"uses opset 9; 11 and later are read.*convert_version"),
    "sparse": (sparse, "holds sparse tensors"),
    "two sources": (twice, "value 'h0' has two sources"),
    "no operators": (lambda proto: proto.opset_import.pop(), "which version of the operators"),
    "no graph": (lambda proto: proto.graph.Clear(), "holds no graph"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_graphs_are_refused(tmp_path, case):
    edit, message = DAMAGED[case]
    with pytest.raises(LoadError, match=message):
        load_onnx(edited(tmp_path, edit))


BYTES = {
    "empty": (b"", "is empty"),
    "text": (b"hello, this is not a model", "no complete ONNX file"),
    "web page": (b"<html><body>404</body></html>", "looks like a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
}


@pytest.mark.parametrize("case", BYTES)
def test_foreign_files_are_refused(tmp_path, case):
    content, message = BYTES[case]
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=message):
        load_onnx(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = save(mlp(), tmp_path / "net.onnx")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(LoadError, match="no complete ONNX file"):
        load_onnx(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(LoadError, match=r"none\.onnx does not exist"):
        load_onnx(tmp_path / "none.onnx")


def test_the_hash_covers_the_external_data(tmp_path):
    path = edited(tmp_path, None, external=True)
    before = load_onnx(path).sha256
    data = path.with_name("net.onnx.data")
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    assert load_onnx(path).sha256 != before
