"""`verify` on files: the difference split in two, quality, labels, exit codes; ONNX and PyTorch."""

import json
import math
import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.cli import main
from mpocompress.errors import DataError, LoadError, ParityError
from mpocompress.export import export_onnx
from mpocompress.export.agreement import Agreement, LabelScore
from mpocompress.export.comparison import compare
from mpocompress.export.verify import Comparison
from mpocompress.tuning import task_score
from mpocompress.tuning.minibatches import Minibatch

pytestmark = pytest.mark.onnx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.first(x).relu()
        return {"hidden": hidden, "logits": self.second(hidden)}


class Logits(nn.Module):
    """One output of a net alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)["logits"]


class Tokens(nn.Module):
    """Positions, padding, and an output for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 16), nn.Linear(16, 16)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        # Padding is not what it should be, and must not matter.
        return self.out(self.table(input_ids)) * (1 + 100 * (1 - attention_mask[..., None]))


@pytest.fixture
def pair(tmp_path):
    """A dense model, a compressed one, and the file of the latter."""
    torch.manual_seed(0)
    dense = Net().eval()
    result = mpo.compress(dense, bond_dim=6, layout="svd")
    path = export_onnx(result.model, tmp_path / "small.onnx", torch.randn(2, 24)).path
    return dense, result.model, path


def batches(count=3, rows=5, labels=None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield {"x": torch.randn(rows, 24, generator=generator)}, labels


def test_the_difference_is_split_in_export_and_approximation(pair):
    dense, small, path = pair
    found = compare(path, dense, batches(), compressed=small)
    x = torch.cat([arrays["x"] for arrays, _ in batches()])
    with torch.no_grad():
        truth, cheap = dense(x), small(x)
    for name in ("hidden", "logits"):
        lost = float((cheap[name] - truth[name]).norm() / truth[name].norm())
        assert found.approximation[name].relative_error == pytest.approx(lost, rel=1e-4)
        assert found.total[name].relative_error == pytest.approx(lost, rel=1e-4)
        assert found.export[name].max_relative_difference < 1e-5
        cosine = float(nn.functional.cosine_similarity(cheap[name], truth[name]).mean())
        assert found.total[name].cosine == pytest.approx(cosine, abs=1e-5)
        same = (cheap[name].argmax(1) == truth[name].argmax(1)).float().mean()
        assert found.total[name].argmax_agreement == pytest.approx(float(same))
    assert found.samples == 15
    assert found.failures == ()
    json.dumps(found.to_dict())


def test_an_onnx_reference_gives_the_same_total(pair, tmp_path):
    dense, _, path = pair
    other = export_onnx(dense, tmp_path / "dense.onnx", torch.randn(2, 24), input_names=["pixels"])
    by_file = compare(path, other.path, batches())
    by_model = compare(path, dense, batches())
    assert by_file.export is None
    for name, figures in by_model.total.items():
        assert by_file.total[name].relative_error == pytest.approx(figures.relative_error, rel=1e-4)


def test_the_file_may_have_output_names_of_its_own(pair, tmp_path):
    dense, small, path = pair
    names = ["states", "scores"]
    named = export_onnx(small, tmp_path / "named.onnx", torch.randn(2, 24), output_names=names).path
    found = compare(named, dense, batches(), compressed=small)
    plain = compare(path, dense, batches(), compressed=small)
    for part in ("total", "export", "approximation"):
        figures = getattr(found, part)
        assert list(figures) == names
        for ours, theirs in zip(figures.values(), getattr(plain, part).values(), strict=True):
            assert ours.relative_error == pytest.approx(theirs.relative_error, abs=1e-6)
    # One output of several goes by name.
    onnx.utils.extract_model(path, tmp_path / "one.onnx", ["x"], ["logits"])
    found = compare(tmp_path / "one.onnx", dense, batches(), compressed=small)
    assert list(found.approximation) == ["logits"]
    lost = plain.approximation["logits"].relative_error
    assert found.approximation["logits"].relative_error == pytest.approx(lost)


def test_a_wrong_export_fails_although_the_total_is_not_bounded(pair):
    dense, small, path = pair
    model = onnx.load(path)
    bias = next(t for t in model.graph.initializer if t.name == "second.bias")
    values = onnx.numpy_helper.to_array(bias) + 0.01
    bias.CopyFrom(onnx.numpy_helper.from_array(values.astype("f"), bias.name))
    onnx.save(model, path)
    found = compare(path, dense, compressed=small)
    with pytest.raises(ParityError, match="the export alone changes output 'logits'"):
        found.raise_if_failed()


def test_tolerance_is_of_the_total(pair):
    dense, _, path = pair
    assert compare(path, dense, tolerance=10.0).failures == ()
    with pytest.raises(ParityError, match=r"differ in output 'hidden'.*allowed is 0\.001"):
        compare(path, dense, tolerance=1e-3).raise_if_failed()


def test_labels_are_scored_on_both_sides(pair):
    dense, _, path = pair
    rows = [arrays["x"] for arrays, _ in batches()]
    labels = [dense(x)["logits"].argmax(1) for x in rows]
    labels[0][0] = -100  # to be skipped
    data = [({"x": x}, label) for x, label in zip(rows, labels, strict=True)]
    found = compare(path, dense, data).labels
    # Labels are integers: of the two outputs they fit both in shape, and the first is taken.
    assert found["measure"] == "accuracy"
    assert found["output"] == "hidden"
    score = LabelScore()
    for x, label in zip(rows, labels, strict=True):
        score.add({"logits": dense(x)["logits"].detach().numpy()}, label.numpy())
    assert score.value() == 1.0
    assert (score.judged, score.mean_squared_error()) == (14, None)
    score = LabelScore()
    score.add({"y": np.ones((4, 1), "f")}, np.array([0, 0, 2, 2], "f"))
    assert (score.measure, score.value(), score.mean_squared_error()) == ("R²", 0.0, 1.0)
    score = LabelScore()
    outputs = {"two": np.eye(4, 2, dtype="f"), "three": np.eye(4, 3, dtype="f")}
    score.add(outputs, np.array([0, 1, 2, -100]))
    assert (score.output, score.judged) == ("three", 3)
    with pytest.raises(DataError, match=r"label 3 .* has a column for: 'three' has 3"):
        score.add(outputs, np.array([0, 1, 3, 1]))


def test_floating_labels_are_scored_as_budgets_score_them(pair):
    dense, small, path = pair
    targets = [dense(arrays["x"])["logits"].detach() for arrays, _ in batches()]
    data = [(arrays, y) for (arrays, _), y in zip(batches(), targets, strict=True)]
    found = compare(path, dense, data).labels
    assert (found["output"], found["measure"], found["reference"]) == ("logits", "R²", 1.0)
    calls = [Minibatch((), arrays, y) for arrays, y in data]
    assert found["file"] == pytest.approx(task_score(Logits(small), calls).value, rel=1e-5)
    errors = found["mean_squared_error"]
    assert errors["reference"] == 0
    spread = torch.cat(targets).double().var(correction=0)
    assert found["file"] == pytest.approx(1 - errors["file"] / float(spread))


def test_padding_is_not_compared(tmp_path):
    torch.manual_seed(0)
    dense = Tokens().eval()
    result = mpo.compress(dense, bond_dim=8, layout="svd", if_smaller=False)
    ids, mask = torch.randint(0, 20, (4, 6)), torch.ones(4, 6, dtype=torch.int64)
    mask[1:, 3:] = 0
    example = {"input_ids": ids, "attention_mask": mask}
    path = export_onnx(result.model, tmp_path / "t.onnx", example).path
    found = compare(path, dense, [(example, None)]).total["output"]
    assert found.vectors == int(mask.sum())
    with torch.no_grad():
        ours, truth = result.model(**example), dense(**example)
    kept = mask.bool()
    lost = float((ours[kept] - truth[kept]).norm() / truth[kept].norm())
    assert found.relative_error == pytest.approx(lost, rel=1e-4)


def test_special_values_and_integers():
    agreement = Agreement()
    row = np.array([[1.0, np.nan, np.inf]])
    agreement.add({"a": row, "n": np.array([1, 2])}, {"a": row, "n": np.array([1, 3])})
    found = agreement.result()
    assert found["a"].max_abs_difference == 0
    assert found["n"].max_relative_difference == 1
    assert found["n"].cosine is None
    agreement.add({"a": np.zeros((1, 3))}, {"a": row})
    assert math.isinf(agreement.result()["a"].max_abs_difference)


def test_integers_and_texts_are_compared_exactly():
    big = 2**60
    for ours, theirs in (
        (np.array([big + 1]), np.array([big])),
        (np.array(["a", "b"], object), np.array(["a", "c"], object)),
        (np.array(["a"], object), np.array([1.0])),
    ):
        agreement = Agreement()
        agreement.add({"y": ours}, {"y": theirs})
        assert agreement.result()["y"].max_relative_difference >= 1
        agreement = Agreement()
        agreement.add({"y": theirs}, {"y": theirs})
        assert agreement.result()["y"].max_relative_difference == 0


@pytest.fixture(scope="module")
def classifier():
    """A pipeline of scikit-learn with classes of a type, as ONNX: labels, and maps from classes."""
    from skl2onnx import to_onnx
    from sklearn.neural_network import MLPClassifier

    x = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    classes = (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0)

    def made(names=None) -> bytes:
        network = MLPClassifier((64, 48), max_iter=5, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged
            network.fit(x, classes if names is None else names[classes])
        return to_onnx(network, x[:1]).SerializeToString()

    return made, x, classes


@pytest.mark.parametrize("names", [None, np.array(["cat", "dog", "owl"])], ids=["numbers", "texts"])
def test_classifiers_of_scikit_learn(classifier, names, tmp_path, monkeypatch, capsys):
    made, x, classes = classifier
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").write_bytes(made(names))
    np.savez("data.npz", X=x, labels=classes)
    assert run(capsys, "net.onnx", "--ratio", "2", "-o", "out")[0] == 0
    code, out, err = run(
        capsys, *("verify", "out/model.onnx", "--against", "net.onnx"), "--data", "data.npz"
    )
    assert code == 0, err
    assert "output_probability" in out
    assert "accuracy on the labels" in out
    code, out, _ = run(capsys, "verify", "net.onnx", "--against", "net.onnx", "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found["total"]) == ["output_label", "output_probability"]
    assert found["total"]["output_label"]["max_abs_difference"] == 0
    code, _, err = run(
        capsys, *("bench", "out/model.onnx", "--against", "net.onnx"), *("--batch", "2"), "--json"
    )
    assert code == 0, err


def test_sequences_of_tensors(tmp_path):
    value = onnx.helper.make_tensor_value_info
    sequence = onnx.helper.make_tensor_sequence_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("SplitToSequence", ["x"], ["y"], axis=1)],
        "halves",
        [value("x", onnx.TensorProto.FLOAT, ["batch", 2])],
        [sequence("y", onnx.TensorProto.FLOAT, None)],
    )
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "s.onnx"
    )

    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x[:, :1], x[:, 1:] + 0.5

    found = compare(tmp_path / "s.onnx", Halves()).total
    assert [figures.max_abs_difference for figures in found.values()] == [0, 0.5]
    assert list(found) == ["y.0", "y.1"]
    assert not mpo.verify(tmp_path / "s.onnx", Halves()).passed
    assert compare(tmp_path / "s.onnx", tmp_path / "s.onnx", tolerance=0).failures == ()


def test_what_does_not_fit_is_named(pair, tmp_path):
    dense, _, path = pair
    with pytest.raises(DataError, match=r"needs 'x': float32 \(batch, 24\), but the data has 'z'"):
        compare(path, dense, [({"z": torch.zeros(2, 24)}, None)])
    with pytest.raises(DataError, match="'z', which .* does not take"):
        compare(path, dense, [({"x": torch.zeros(2, 24), "z": torch.zeros(2)}, None)])
    with pytest.raises(DataError, match=r"float32 \(2, 25\)"):
        compare(path, dense, [({"x": torch.zeros(2, 25)}, None)])
    with pytest.raises(DataError, match="no batches"):
        compare(path, dense, [])
    with pytest.raises(ParityError, match="has the outputs hidden, logits, but the reference has"):
        compare(path, nn.Linear(24, 10), [({0: torch.zeros(2, 24)}, None)])
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(LoadError, match=r"cannot open .*broken\.onnx"):
        compare(tmp_path / "broken.onnx", dense)


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40)).eval()
    torch.save(model, "model.pt")
    x = torch.randn(20, 48)
    np.savez("data.npz", input=x.numpy(), labels=model(x).argmax(1).numpy())
    assert run(capsys, "model.pt", "--bond-dim", "8")[0] == 0
    return tmp_path


def run(capsys, *arguments):
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = stop.code or 0
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_command_line(here, capsys):
    made = "model-mpo/model.onnx"
    code, out, err = run(capsys, "verify", made, "--against", "model.pt", "--data", "data.npz")
    assert (code, err) == (0, "")
    assert "20 samples" in out
    assert "approximation" in out
    assert "accuracy on the labels" in out
    assert "reference 1.0000" in out
    code, out, _ = run(
        capsys, "verify", made, "--against", "model.pt", "--tolerance", "1e-3", "--json"
    )
    assert code == 3
    found = json.loads(out)
    assert found["passed"] is False
    assert found["export"]["output"]["max_relative_difference"] < 1e-5
    code, _, err = run(capsys, "verify", made, "--against", "model.pt", "--tolerance", "1e-3")
    assert code == 3
    assert "allowed is 0.001" in err
    code, out, err = run(capsys, "verify", made, "--against", made, "--tolerance", "0")
    assert code == 0
    assert "not told apart" in err
    torch.save(torch.load("model.pt", weights_only=False).state_dict(), "state.pt")
    code, _, err = run(capsys, "verify", made, "--against", "state.pt")
    assert code == 2
    assert "--model MODULE:FACTORY" in err


def test_a_compressed_graph_against_the_model_that_the_graph_was_made_of(here, capsys):
    model = torch.load("model.pt", weights_only=False)
    export_onnx(model, "dense.onnx", torch.randn(2, 48), output_names=["logits"])
    assert run(capsys, "dense.onnx", "--bond-dim", "8", "-o", "graph")[0] == 0
    verify = ["verify", "graph/model.onnx", "--against", "model.pt", "--data", "data.npz"]
    code, out, err = run(capsys, *verify)
    assert (code, err) == (0, "")
    assert "approximation" in out
    code, out, _ = run(capsys, *verify, "--json")
    assert code == 0
    found = json.loads(out)
    for part in ("total", "export", "approximation"):
        assert list(found[part]) == ["logits"]
    # A graph with names of its own, which the model does not have.
    graph = onnx.load("dense.onnx")
    for tensor in graph.graph.initializer:
        tensor.name = tensor.name.replace("0.", "first.").replace("2.", "last.")
    for node in graph.graph.node:
        renamed = [name.replace("0.", "first.").replace("2.", "last.") for name in node.input]
        node.input[:] = renamed
    onnx.save(graph, "foreign.onnx")
    assert run(capsys, "foreign.onnx", "--bond-dim", "8", "-o", "graph", "--force")[0] == 0
    code, out, err = run(capsys, *verify, "--json")
    assert code == 0
    assert "the cores beside model.onnx have the names of a graph" in err
    assert json.loads(out)["approximation"] is None
    assert run(capsys, *verify, "--cores", "graph")[0] == 2


def test_nan_on_both_sides_is_no_agreement(here, capsys):
    model = torch.load("model.pt", weights_only=False)
    with torch.no_grad():
        model[2].bias.fill_(torch.nan)
    torch.save(model, "nan.pt")
    code, _, err = run(capsys, "nan.pt", "--bond-dim", "8")
    assert code == 3
    assert "nothing was compared: 'output' is NaN or infinite throughout" in err
    assert "'2.bias' of the model has NaN" in err
    assert not (here / "nan-mpo").exists()
    export_onnx(model, "nan.onnx", torch.randn(2, 48))
    code, _, err = run(capsys, "nan.onnx", "--bond-dim", "8", "-o", "graph")
    assert code == 3
    assert "'2.bias' of the model has NaN" in err
    code, out, _ = run(capsys, "verify", "nan.onnx", "--against", "nan.onnx", "--json")
    assert code == 3
    assert "nothing was compared" in json.loads(out)["failures"][0]
    # One of several outputs may be NaN on both sides, and all may be empty.
    nan, ones, empty = np.full(2, np.nan), np.ones(2), np.ones((0, 4))
    for outputs, nowhere in (
        ({"a": nan, "b": ones}, False),
        ({"a": nan, "b": empty}, True),
        ({"a": empty}, False),
    ):
        agreement = Agreement()
        agreement.add(outputs, outputs)
        assert (agreement.nothing_compared is not None) is nowhere
        # The check of an export decides alike.
        parity = Comparison()
        for name, values in outputs.items():
            parity.compare(parity.output(name), values, values)
        if nowhere:
            with pytest.raises(ParityError, match=agreement.nothing_compared):
                parity.result(1e-4)
        else:
            assert parity.result(1e-4).passed


def test_json_has_no_infinity(here, capsys):
    graph = onnx.load("model-mpo/model.onnx")
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name == "2.bias")
    values = onnx.numpy_helper.to_array(bias).copy()
    values[0] = np.inf
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(graph, "inf.onnx")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    code, out, _ = run(
        capsys,
        *("verify", "inf.onnx", "--against", "model-mpo/model.onnx", "--json", "--tolerance", "1"),
    )
    assert code == 3
    found = json.loads(out, parse_constant=refuse)["total"]["output"]
    assert found["max_abs_difference"] is found["max_relative_difference"] is None
    assert found["finite"] is False
    assert json.loads(out)["passed"] is False


def test_command_line_says_r_squared_and_the_mean_squared_error(here, capsys):
    with np.load("data.npz") as data:
        x = data["input"]
    with torch.no_grad():
        y = torch.load("model.pt", weights_only=False)(torch.from_numpy(x)).numpy()
    verify = ["verify", "model-mpo/model.onnx", "--against", "model.pt", "--data", "numbers.npz"]
    np.savez("numbers.npz", input=x, labels=y + 1)
    code, out, err = run(capsys, *verify)
    assert (code, err) == (0, "")
    assert "R² on the labels: " in out
    assert "; mean squared error " in out
    assert ", reference 1\n" in out
    np.savez("numbers.npz", input=x, labels=np.full_like(y, 0.1))
    code, out, err = run(capsys, *verify)
    assert (code, err) == (0, "")
    assert "R² on the labels is not defined, since all are equal; mean squared error " in out
    code, out, _ = run(capsys, *verify, "--json")
    found = json.loads(out)["labels"]
    assert (code, found["measure"]) == (0, "R²")
    assert found["file"] is found["reference"] is None
    assert found["mean_squared_error"]["reference"] == pytest.approx(
        float(np.square(y - 0.1).mean())
    )
