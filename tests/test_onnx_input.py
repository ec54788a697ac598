"""ONNX in, ONNX out, as a stranger uses it: files of other frameworks on the command line."""

import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mpocompress.api.graphs import plan_graph
from mpocompress.cli import main
from mpocompress.export.graphs import OnnxModel
from mpocompress.planning import PlanOptions
from tests.onnx_graphs import (
    conv_net,
    keras_dense,
    mlp,
    model,
    node,
    rows,
    run,
    save,
    vector,
    weight,
)
from tests.tolerances import TOL

pytestmark = pytest.mark.onnx


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked_result(here: Path, source: str, directory: str = "out") -> dict:
    """The report of a result, after everything that holds for each of them."""
    report = json.loads((here / directory / "report.json").read_text())
    assert report["parity"]["passed"]
    assert report["parity"]["reference"] == "graph"
    assert report["source"]["name"] == source
    files = {file.name: file.stat().st_size for file in (here / directory).iterdir()}
    assert report["files"] == {
        name: size for name, size in files.items() if not name.startswith("report.")
    }
    made = onnx.load(here / directory / "model.onnx", load_external_data=False)
    total = report["totals"]["bytes"]["model"]
    stored = sum(numpy_helper.to_array(t).nbytes for t in made.graph.initializer)
    # Sizes of reshapes and the like are not weights.
    assert total["compressed"] <= stored <= total["compressed"] + 1000
    assert total["compressed"] < total["dense"]
    entries = {entry.key: entry.value for entry in made.metadata_props}
    assert json.loads(entries["mpocompress.layers"]).keys() == {
        layer["name"] for layer in report["layers"] if layer["status"] == "compressed"
    }
    assert entries["mpocompress.source_sha256"] == report["source"]["sha256"]
    assert not [file for file in here.iterdir() if file.name.startswith(".")]
    return report


def smaller(here: Path, source: str, directory: str = "out") -> bool:
    return (here / directory / "model.onnx").stat().st_size < (here / source).stat().st_size


KERAS_INPUT = "input_1:0"


@pytest.mark.parametrize("opset", [11, 13, 22])
def test_a_keras_network(here, capsys, opset):
    save(keras_dense(opset), here / "keras.onnx")
    images = rows(64, 4, 4, 3)
    np.savez(here / "data.npz", **{KERAS_INPUT: images})
    code, out, err = command(
        capsys, "keras.onnx", "--ratio", "2", "--data", "data.npz", "-o", "out"
    )
    assert code == 0, err
    assert "agrees with the dense graph of the same weights" in out
    assert "no gradients, so all layers got the same ratio" in err
    report = checked_result(here, "keras.onnx")
    assert smaller(here, "keras.onnx")
    assert report["totals"]["parameters"]["model"]["ratio"] >= 2
    assert report["parity"]["batch_sizes"] == [1, 3, 7, 32]
    made = onnx.load(here / "out" / "model.onnx")
    assert [entry.version for entry in made.opset_import] == [opset]
    before, after = (
        run(path, {KERAS_INPUT: images})[0] for path in ("keras.onnx", "out/model.onnx")
    )
    assert after.shape == before.shape == (64, 10)
    assert np.abs(after - before).max() < 0.5


def test_a_scikit_learn_classifier(here, capsys):
    from skl2onnx import to_onnx
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = rows(300, 64)
    classes = (x[:, 0] > x[:, 0].mean()).astype(int) + (x[:, 1] > x[:, 1].mean())
    network = make_pipeline(StandardScaler(), MLPClassifier((128, 96), max_iter=20, random_state=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        network.fit(x, classes)
    (here / "sklearn.onnx").write_bytes(to_onnx(network, x[:1]).SerializeToString())
    np.savez(here / "data.npz", X=x)
    code, _, err = command(
        capsys, "sklearn.onnx", "--ratio", "3", "--data", "data.npz", "-o", "out"
    )
    assert code == 0, err
    report = checked_result(here, "sklearn.onnx")
    assert smaller(here, "sklearn.onnx")
    assert [layer["name"] for layer in report["layers"] if layer["status"] == "compressed"] == [
        "coefficient",
        "coefficient1",
    ]
    labels, scores = run(here / "out" / "model.onnx", {"X": x})
    assert (labels == network.predict(x)).mean() > 0.9
    assert list(scores[0]) == [0, 1, 2]


def test_a_convolutional_network_keeps_its_kernels(here, capsys):
    save(conv_net(), here / "conv.onnx")
    code, _, err = command(capsys, "conv.onnx", "--bond-dim", "8", "-o", "out")
    assert code == 0, err
    report = checked_result(here, "conv.onnx")
    assert smaller(here, "conv.onnx")
    by_name = {layer["name"]: layer for layer in report["layers"]}
    assert by_name["fc"]["status"] == "compressed"
    assert by_name["conv1.weight"]["status"] == "kept"
    assert by_name["conv1.weight"]["reason"] == "a convolution kernel is not a linear weight"


def test_external_data(here, capsys):
    (here / "model").mkdir()
    save(mlp(), here / "model" / "net.onnx", external=True)
    code, _, err = command(capsys, "model/net.onnx", "--bond-dim", "8", "-o", "out")
    assert code == 0, err
    checked_result(here, "net.onnx")
    assert not (here / "out" / "model.onnx.data").exists()
    before = (here / "model" / "net.onnx.data").stat().st_size
    assert (here / "out" / "model.onnx").stat().st_size < before


def test_options_reach_the_graph(here, capsys):
    save(mlp(), here / "net.onnx")
    arguments = ["--bond-dim", "4", "--layout", "8x6,8x8", "--include", "fc0", "-o", "out"]
    code, _, err = command(capsys, "net.onnx", *arguments)
    assert code == 0, err
    by_name = {layer["name"]: layer for layer in checked_result(here, "net.onnx")["layers"]}
    assert by_name["fc0"]["layout"] == [[8, 6], [8, 8]]
    assert by_name["fc1"]["reason"] == "not selected by the include and exclude patterns"
    code, out, _ = command(capsys, "net.onnx", "--bond-dim", "4", "--exclude", "fc0", "--dry-run")
    assert code == 0
    assert "nothing was written" in out
    code, _, err = command(capsys, "net.onnx", "--bond-dim", "4", "--include", "fc7")
    assert code == 2
    assert "include pattern 'fc7' matches no layer. Nearest names: 'fc0', 'fc1'" in err
    assert {file.name for file in here.iterdir()} == {"net.onnx", "out"}


def test_what_stays_dense_in_a_graph_is_not_planned_to_be_corrected():
    made, _ = plan_graph(OnnxModel(mlp(), Path()), PlanOptions(bond_dim=100000))
    assert {layer.action for layer in made} == {"keep"}
    assert not any(layer.corrects for layer in made)


def test_inspect_lists_every_tensor(here, capsys):
    save(conv_net(), here / "conv.onnx")
    code, out, _ = command(capsys, "inspect", "conv.onnx", "--json")
    assert code == 0
    found = json.loads(out)
    assert sum(entry["parameters"] for entry in found["entries"]) == found["parameters"]
    convertible = [entry["name"] for entry in found["entries"] if entry["convertible"]]
    assert convertible == ["fc"]


def test_equal_runs_give_equal_files(here, capsys):
    save(mlp(), here / "net.onnx")
    for name in ("a", "b"):
        assert command(capsys, "net.onnx", "--bond-dim", "8", "-o", name)[0] == 0
    for name in ("model.onnx", "model.mpo.safetensors"):
        assert (here / "a" / name).read_bytes() == (here / "b" / name).read_bytes(), name


def test_densify_gives_the_weights_of_the_graph(here, capsys):
    save(mlp(), here / "net.onnx")
    assert command(capsys, "net.onnx", "--bond-dim", "8", "--layout", "svd", "-o", "out")[0] == 0
    assert command(capsys, "densify", "out", "-o", "dense.safetensors")[0] == 0
    dense = load_file(here / "dense.safetensors")
    original = {t.name: numpy_helper.to_array(t) for t in mlp().graph.initializer}
    assert dense.keys() == original.keys()
    np.testing.assert_array_equal(dense["fc0.bias"], original["fc0.bias"])
    made = onnx.load(here / "out" / "model.onnx")
    stored = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    expected = (stored["fc0.cores.1"] @ stored["fc0.cores.0"]).T
    np.testing.assert_allclose(dense["fc0.weight"], expected, **TOL[torch.float32]["dense"])


def tied_exports() -> onnx.ModelProto:
    """As torch's exporter writes a table that is the head's weight, too: two tensors."""
    return model(
        [node("Gather", "fc.weight i", "e"), node("Gemm", "e val_0 fc.bias", "y")],
        {"fc.weight": weight(50, 64), "val_0": weight(64, 50, seed=1), "fc.bias": vector(50)},
        inputs={"i": ["batch"]},
        outputs={"y": ["batch", 50]},
        input_types={"i": onnx.TensorProto.INT64},
    )


def several_forms() -> onnx.ModelProto:
    """(in, out), (out, in) behind a transposition, and three dimensions of them."""
    return model(
        [
            node("MatMul", "x w", "a"),
            node("Transpose", "v", "vt"),
            node("MatMul", "a vt", "b"),
            node("Reshape", "u us", "ur"),
            node("MatMul", "b ur", "c"),
            node("Transpose", "t", "tp", perm=[2, 1, 0]),
            node("Reshape", "tp us", "tr"),
            node("MatMul", "c tr", "y"),
        ],
        {
            "w": weight(48, 64),
            "v": weight(64, 56, seed=1).T.copy(),
            "u": weight(56, 56, seed=2).reshape(56, 7, 8),
            "t": weight(56, 56, seed=3).reshape(56, 7, 8),
            "us": np.array([56, 56]),
        },
        inputs={"x": ["batch", 48]},
        outputs={"y": ["batch", 56]},
    )


def densified(here: Path, capsys, proto: onnx.ModelProto, *options: str) -> tuple[dict, dict]:
    """The dense state of a result, and what the graph stores."""
    save(proto, here / "net.onnx")
    code, _, err = command(capsys, "net.onnx", "--bond-dim", "8", *options, "-o", "out")
    assert code == 0, err
    code, _, err = command(capsys, "densify", "out", "-o", "dense.safetensors")
    assert code == 0, err
    original = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    return load_file(here / "dense.safetensors"), original


def test_densify_of_a_graph_leaves_tensors_that_other_weights_are_named_after(here, capsys):
    dense, original = densified(here, capsys, tied_exports(), "--layout", "svd")
    assert dense.keys() == original.keys()
    np.testing.assert_array_equal(dense["fc.weight"], original["fc.weight"])
    assert dense["val_0"].shape == (64, 50)
    stored = {
        t.name: numpy_helper.to_array(t)
        for t in onnx.load(here / "out" / "model.onnx").graph.initializer
    }
    expected = stored["fc.cores.1"] @ stored["fc.cores.0"]
    np.testing.assert_allclose(dense["val_0"], expected, **TOL[torch.float32]["dense"])


def test_densify_of_a_graph_gives_its_own_names_and_shapes(here, capsys):
    proto = several_forms()
    dense, original = densified(here, capsys, proto, "--layout", "svd")
    # What is transposed and then reshaped cannot be called as the stored tensor is.
    assert dense.keys() - {"us"} == {"w", "v", "u", "tr"}
    for name in ("w", "v", "u"):
        assert dense[name].shape == original[name].shape, name
    again = onnx.ModelProto()
    again.CopyFrom(proto)
    dense["t"] = dense["tr"].reshape(8, 7, 56).transpose(2, 1, 0).copy()
    for tensor in again.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(dense[tensor.name], tensor.name))
    feed = {"x": rows(5, 48)}
    expected, actual = run(here / "out" / "model.onnx", feed)[0], run(again, feed)[0]
    np.testing.assert_allclose(actual, expected, **TOL[torch.float32]["onnx"])


def test_a_result_of_a_graph_without_the_names_of_its_tensors(here, capsys):
    densified(here, capsys, mlp())
    for proto, message in (
        (mlp(), None),
        (tied_exports(), "its dense weight would be called 'fc.weight', as another tensor"),
    ):
        save(proto, here / "net.onnx")
        assert command(capsys, "net.onnx", "--bond-dim", "8", "-o", "out", "--force")[0] == 0
        file = here / "out" / "model.mpo.safetensors"
        with safe_open(file, framework="np") as opened:
            manifest = json.loads(opened.metadata()["mpocompress"])
        for record in manifest["layers"]:  # as earlier commits wrote them
            del record["stored"]
            record |= {"dense_shape": None, "transposed": False}
        save_file(load_file(file), file, metadata={"mpocompress": json.dumps(manifest)})
        code, _, err = command(capsys, "densify", "out", "-o", "dense.pt", "--force")
        assert (code, message is None or message in err) == (0 if message is None else 2, True)


def test_weights_that_want_one_name_get_two(here, capsys):
    """Cores of `w` are stored as `w.cores.0`; `a` and `a.weight` are both called a in PyTorch."""
    proto = model(
        [
            node("MatMul", "x w", "b"),
            node("Mul", "b w.cores.0", "c"),
            node("MatMul", "c a.weight", "d"),
            node("MatMul", "d a", "y"),
        ],
        {
            "w": weight(48, 64),
            "w.cores.0": vector(64),
            "a.weight": weight(64, 40),
            "a": weight(40, 40),
        },
        inputs={"x": ["batch", 48]},
        outputs={"y": ["batch", 40]},
    )
    dense, original = densified(here, capsys, proto)
    assert {name: value.shape for name, value in dense.items()} == {
        name: value.shape for name, value in original.items()
    }
    np.testing.assert_array_equal(dense["w.cores.0"], original["w.cores.0"])
    names = {layer["name"] for layer in checked_result(here, "net.onnx")["layers"]}
    assert names == {"node_b", "w.cores.0", "a.weight", "a"}


def test_a_batch_size_that_the_graph_fixes(here, capsys):
    proto = mlp()
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 5
    save(proto, here / "net.onnx")
    code, _, err = command(capsys, "net.onnx", "--bond-dim", "8", "-o", "out")
    assert code == 0, err
    assert checked_result(here, "net.onnx")["parity"]["batch_sizes"] == [5]


def test_inputs_that_must_fit_together_are_given_by_shape(here, capsys):
    proto = model(
        [
            node("Concat", "a b", "x", axis=1),
            node("MatMul", "x W", "y"),
        ],
        {"W": weight(48, 64)},
        inputs={"a": ["batch", "left"], "b": ["batch", "right"]},
        outputs={"y": ["batch", 64]},
    )
    save(proto, here / "net.onnx")
    code, _, err = command(capsys, "net.onnx", "--bond-dim", "8", "-o", "out")
    assert code == 2
    assert "does not run on inputs that were made up" in err
    assert "'a': float32 (batch, left); 'b': float32 (batch, right)" in err
    arguments = ["--input", "1x20", "--input", "1x28"]
    code, _, err = command(capsys, "net.onnx", "--bond-dim", "8", *arguments, "-o", "out")
    assert code == 0, err
    code, _, err = command(capsys, "net.onnx", "--bond-dim", "8", "--input", "1x20", "-o", "no")
    assert code == 2
    assert "shapes 1x20 do not fit net.onnx" in err
    assert {file.name for file in here.iterdir()} == {"net.onnx", "out"}


def of_shape(shape: list[int | str | None] | None) -> onnx.ModelProto:
    proto = model(
        [node("MatMul", "x W", "y")],
        {"W": weight(64, 64)},
        inputs={"x": [1]},
        outputs={"y": [1]},
    )
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.CopyFrom(
            onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shape)
        )
    return proto


@pytest.mark.parametrize("size", [-1, 0])
def test_sizes_below_1_are_open(here, capsys, size):
    save(of_shape([size, 64]), here / "net.onnx")
    code, _, err = command(capsys, "net.onnx", "--bond-dim", "8", "-o", "made-up")
    assert code == 0, err
    assert f"net.onnx: sizes below 1 are read as open: 'x' (dimension 0: {size})" in err
    np.savez(here / "data.npz", x=rows(40, 64))
    code, _, err = command(capsys, "net.onnx", "--bond-dim", "8", "--data", "data.npz", "-o", "out")
    assert code == 0, err
    for result in ("made-up", "out"):
        assert run(here / result / "model.onnx", {"x": rows(5, 64)})[0].shape == (5, 64)
        assert checked_result(here, "net.onnx", result)["parity"]["batch_sizes"][:3] == [1, 3, 7]


def test_an_input_without_a_shape_needs_data_or_a_shape(here, capsys):
    save(of_shape(None), here / "net.onnx")
    code, _, err = command(capsys, "net.onnx", "--bond-dim", "8", "-o", "no")
    assert code == 2
    assert "net.onnx does not say how many dimensions 'x' has; it takes 'x': float32 of any" in err
    assert "Give --data, or the shape of each input as --input." in err
    np.savez(here / "data.npz", x=rows(40, 3, 64))
    given = {"data": ("--data", "data.npz"), "shape": ("--input", "2x3x64")}
    for result, arguments in given.items():
        code, _, err = command(capsys, "net.onnx", "--bond-dim", "8", *arguments, "-o", result)
        assert code == 0, err
        checked_result(here, "net.onnx", result)
    code, _, err = command(
        capsys, "net.onnx", "--bond-dim", "8", "--input", "2x3", "--input", "2", "-o", "no"
    )
    assert code == 2
    assert "shapes 2x3, 2 do not fit net.onnx, which takes 'x': float32 of any shape" in err


def test_weights_that_a_caller_could_give_are_said_to_be_inputs_no_longer(here, capsys):
    proto = mlp()
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in proto.graph.initializer
    )
    save(proto, here / "net.onnx")
    arguments = ("net.onnx", "--bond-dim", "4", "--exclude", "fc1", "-o", "out")
    code, _, err = command(capsys, *arguments)
    assert code == 0, err
    assert "net.onnx lets a caller give other weights for fc0.weight as inputs" in err
    made = onnx.load(here / "out" / "model.onnx")
    assert [v.name for v in made.graph.input] == ["x", "fc0.bias", "fc1.weight", "fc1.bias"]


def without_weights() -> onnx.ModelProto:
    return model(
        [node("Mul", "x s", "y")],
        {"s": vector(8)},
        inputs={"x": ["batch", 8]},
        outputs={"y": ["batch", 8]},
    )


def test_what_cannot_be_compressed_leaves_nothing_behind(here, capsys):
    save(without_weights(), here / "none.onnx")
    save(mlp(sizes=(3, 4)), here / "tiny.onnx")
    save(mlp(), here / "cut.onnx")
    (here / "cut.onnx").write_bytes((here / "cut.onnx").read_bytes()[:-100])
    save(mlp(), here / "lost.onnx", external=True)
    (here / "lost.onnx.data").unlink()
    nan = mlp()
    broken = weight(48, 64).T.copy()
    broken[3, 5] = np.nan
    nan.graph.initializer[0].CopyFrom(numpy_helper.from_array(broken, "fc0.weight"))
    save(nan, here / "nan.onnx")
    before = sorted(here.iterdir())
    cases = {
        "none.onnx": "there is no layer that can be converted",
        "tiny.onnx": "nothing to compress: every weight stays dense",
        "cut.onnx": "no complete ONNX file",
        "lost.onnx": "there is no such file beside the model",
        "missing.onnx": "missing.onnx does not exist",
        "nan.onnx": "1 of 3072 weights are NaN or Inf, the first is nan at row 3, column 5",
    }
    for name, message in cases.items():
        code, _, err = command(capsys, name, "--bond-dim", "8")
        assert code == 2, name
        assert message in err
        assert "Traceback" not in err
    for option, message in (
        (("--distill", "5", "--data", "data.npz"), "gradients, which an ONNX graph does not have"),
        (("--quantize", "int8"), "--quantize int8 is for PyTorch models"),
        (("--form", "dense"), "--form dense is for PyTorch models"),
        (("--objective", "latency"), "An ONNX graph takes --bond-dim, --ratio or --plan"),
        (("--model", "a:b"), "--model a:b builds a PyTorch module"),
        (("--data", "none.npz"), "none.npz does not exist"),
    ):
        code, _, err = command(capsys, "tiny.onnx", "--bond-dim", "1", *option)
        assert code == 2
        assert message in err
    for option in (
        ("--max-size", "1kB"),
        ("--max-error", "0.1"),
        ("--max-size", "1kB", "--dry-run"),
    ):
        code, _, err = command(capsys, "tiny.onnx", *option)
        assert code == 2
        assert f"{option[0]} {option[1]} is for PyTorch models" in err
    code, _, err = command(capsys, "tiny.onnx", "--ratio", "50")
    assert code == 3
    assert "cannot be met" in err
    assert sorted(here.iterdir()) == before
