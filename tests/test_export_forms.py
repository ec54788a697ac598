"""Forms of a layer in ONNX: the same function, bytes on disk, and what a session folds."""

import json

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.errors import ExportError
from mpocompress.export import export_onnx, form_choice, graph_stats, verify
from mpocompress.export.forms import DenseAtLoad, transposed_matrix
from mpocompress.layers import MPOLinear
from tests.tolerances import TOL

pytestmark = pytest.mark.onnx

LAYOUTS = [
    ("24x1,1x36", 8),
    ("6x6,4x6", 10),
    ("2x3,3x4,4x3", 5),
    ("2x3,3x2,2x2,2x3", 6),
    ("24x36", 1),
]


def folded(path, tmp_path, limit=None):
    """Operators and files of the graph that a session runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "session.onnx")
    options.log_severity_level = 3
    if limit is not None:
        key = "optimization.constant_folding_max_output_size_in_bytes"
        options.add_session_config_entry(key, str(limit))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session, graph_stats(tmp_path / "session.onnx").operators


@pytest.mark.parametrize("gauge", ["none", "identity"])
@pytest.mark.parametrize(("layout", "bond_dim"), LAYOUTS, ids=str)
def test_dense_twin(layout, bond_dim, gauge):
    torch.manual_seed(0)
    layer = MPOLinear(36, 24, layout=layout, bond_dim=bond_dim)
    layer = layer.fix_gauge_() if gauge == "identity" else layer
    x = torch.randn(2, 5, 36)
    found = transposed_matrix(list(layer.cores), (24, 36))
    torch.testing.assert_close(found, layer.to_dense().T, **TOL[torch.float32]["dense"])
    torch.testing.assert_close(DenseAtLoad(layer)(x), layer(x), **TOL[torch.float32]["apply"])


def test_dense_twin_of_a_padded_layer():
    torch.manual_seed(0)
    cores = mpo.MPO.random([(5, 4), (3, 6)], 3).cores
    layer = MPOLinear.from_mpo(mpo.MPO(cores, shape=(13, 22)))
    x = torch.randn(3, 22)
    torch.testing.assert_close(DenseAtLoad(layer)(x), layer(x), **TOL[torch.float32]["apply"])


class Net(nn.Module):
    """Layers of several layouts, one used twice, tokens of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MPOLinear(36, 36, layout="6x6,6x6", bond_dim=9)
        self.second = MPOLinear(36, 24, layout="2x3,3x4,4x3", bond_dim=5, bias=False)
        self.last = MPOLinear(24, 10, layout="svd", bond_dim=4).fix_gauge_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(self.first(x).relu()).relu()).relu())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("form", ["chain", "dense", "auto"])
def test_parity_at_other_batch_sizes_and_lengths(tmp_path, net, form):
    exported = export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 5, 36), form=form)
    data = [torch.randn(rows, length, 36) for rows, length in ((1, 5), (3, 2), (64, 9))]
    found = verify(exported.path, net, data, batch_sizes=(1, 3, 64))
    assert found.max_relative_difference < 1e-5
    assert set(exported.forms) == {"first", "second", "last"}


def test_the_dense_form_is_one_product_once_a_session_is_up(tmp_path, net):
    exported = export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 36), form="dense")
    stats = graph_stats(exported.path)
    assert max(stats.ranks.values()) <= 4
    assert {"first.cores.0", "first.cores.1", "last.cores.0.free"} <= set(stats.initializers)
    _, operators = folded(exported.path, tmp_path)
    assert sum(operators.values()) - operators.get("Relu", 0) <= 4
    assert set(operators) <= {"Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Relu"}


def test_where_nothing_is_folded_the_graph_computes_the_same(tmp_path, net):
    exported = export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 36), form="dense")
    x = torch.randn(7, 36)
    session, operators = folded(exported.path, tmp_path, limit=16)
    assert operators["MatMul"] + operators.get("Gemm", 0) > 4  # W is rebuilt in every run
    (found,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found), net(x), **TOL[torch.float32]["onnx"])


def test_a_chain_has_neither_einsum_nor_transposed_constants(tmp_path, net):
    net.last.free_gauge_()  # a gauged core is rebuilt at the load: see test_export_gauged
    exported = export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 36), form="chain")
    stats = graph_stats(exported.path)
    assert "Einsum" not in stats.operators
    assert max(stats.ranks.values()) <= 4
    graph = onnx.load(exported.path).graph
    stored = {tensor.name for tensor in graph.initializer}
    assert not [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in stored]


def test_the_dense_file_is_as_small_as_the_chain(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        MPOLinear(384, 1536, layout="svd", bond_dim=96),
        nn.GELU(),
        MPOLinear(1536, 384, layout="balanced", bond_dim=24),
    )
    sizes = {
        form: export_onnx(
            model, tmp_path / f"{form}.onnx", torch.randn(2, 384), form=form
        ).num_bytes
        for form in ("chain", "dense")
    }
    assert sizes["dense"] < 1.02 * sizes["chain"]


def test_auto_takes_what_is_faster(tmp_path):
    """At 1024 rows the two-site chain does 32 times the products; low rank does an eighth."""
    torch.manual_seed(0)
    model = nn.Sequential(
        MPOLinear(512, 512, layout="balanced", bond_dim=64),
        MPOLinear(512, 512, layout="svd", bond_dim=32),
    ).eval()
    example = torch.randn(256, 512)
    exported = export_onnx(model, tmp_path / "m.onnx", example, form="auto", form_batch=256)
    assert {name: layer.form for name, layer in exported.forms.items()} == {
        "0": "dense",
        "1": "chain",
    }
    assert exported.forms["0"].rows == 256
    assert exported.forms["0"].dense_seconds < exported.forms["0"].chain_seconds
    metadata = {p.key: p.value for p in onnx.load(exported.path).metadata_props}
    assert json.loads(metadata["mpocompress.forms"]) == {"0": "dense", "1": "chain"}
    verify(exported.path, model).raise_if_failed()


def test_layers_of_equal_sizes_are_measured_once_and_anew_for_each_export(tmp_path, monkeypatch):
    layers = [MPOLinear(36, 24, layout="svd", bond_dim=4) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.Linear(24, 36), layers[1]).eval()
    timings, measured = form_choice._timings, []

    def counting(layer, rows):
        measured.append(layer)
        return timings(layer, rows)

    monkeypatch.setattr(form_choice, "_timings", counting)
    for count in (1, 2):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 36), form="auto")
        assert len(measured) == count


@pytest.mark.parametrize(("layout", "bond_dim"), LAYOUTS, ids=str)
def test_what_is_measured_is_what_is_exported(tmp_path, layout, bond_dim):
    torch.manual_seed(0)
    layer = MPOLinear(36, 24, layout=layout, bond_dim=bond_dim)
    exported = export_onnx(layer, tmp_path / "m.onnx", torch.randn(2, 36))
    graph = form_choice._chain_graph(layer)
    products = [name for name, _ in graph.nodes if name == "MatMul"]
    stats = graph_stats(exported.path)
    assert len(products) == stats.operators.get("MatMul", 0) + stats.operators.get("Gemm", 0)
    shapes = sorted(w.shape for w in graph.weights.values() if w.ndim == 2)
    cores = sorted(s for n, s in stats.initializers.items() if n.startswith("cores"))
    assert shapes == cores
    x = torch.randn(5, 36)
    for made in (graph, form_choice._dense_graph(layer)):
        (found,) = form_choice._session(made, layer).run(None, {"x": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(found), layer(x), **TOL[torch.float32]["onnx"])


def test_forms_by_layer_and_refusals(tmp_path, net):
    exported = export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 36), form={"second": "dense"})
    assert {n: layer.form for n, layer in exported.forms.items()} == {
        "first": "chain",
        "second": "dense",
        "last": "chain",
    }
    with pytest.raises(
        ExportError, match="'third', which is no compressed layer. There are: first"
    ):
        export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 36), form={"third": "dense"})
    with pytest.raises(ExportError, match="form 'fast': a layer is exported as one of auto, chain"):
        export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 36), form="fast")


def test_equal_calls_give_equal_bytes(tmp_path, net):
    example = torch.randn(2, 36)
    for name in ("a", "b"):
        export_onnx(net, tmp_path / name, example, form="dense", quantize="int8")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("form", "products"), [("chain", 2), ("dense", 1)])
def test_a_layer_that_is_the_whole_model_has_a_form_too(form, products, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(5, 24)
    layer = mpo.compress(nn.Linear(24, 18), bond_dim=3, layout="svd").model
    exported = export_onnx(layer, tmp_path / "model.onnx", x, form=form)
    assert exported.forms[""].form == form
    _, operators = folded(exported.path, tmp_path)
    assert sum(operators.get(name, 0) for name in ("MatMul", "Gemm")) == products
    assert verify(exported.path, layer, [x]).max_relative_difference <= 1e-5
