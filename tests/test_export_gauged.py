"""Layers in the identity gauge as ONNX: small in the file, ordinary cores once a session is up."""

import onnxruntime
import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.export import export_onnx, graph_stats, verify
from mpocompress.layers import MPOLinear

pytestmark = pytest.mark.onnx

# What remains when a session is loaded: ONNX Runtime makes Gemm of MatMul, Add and Relu.
SESSION_OPERATORS = {"MatMul", "Gemm", "FusedGemm", "Reshape", "Add", "Shape", "Concat", "Relu"}
LAYOUTS = [
    ("24x1,1x36", 8),
    ("6x6,4x6", 10),
    ("2x3,3x4,4x3", 5),
    ("2x3,3x2,2x2,2x3", 6),
    ("24x1,1x36", 24),  # every row of the first core is a unit vector: nothing of it is stored
]


def session_operators(path, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "session.onnx")
    options.log_severity_level = 3  # it warns that such a file is for this machine
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return graph_stats(tmp_path / "session.onnx").operators


@pytest.mark.parametrize("lead", [(2,), (2, 5)])
@pytest.mark.parametrize(("layout", "bond_dim"), LAYOUTS, ids=str)
def test_the_session_folds_what_rebuilds_the_cores(tmp_path, layout, bond_dim, lead):
    torch.manual_seed(0)
    layer = MPOLinear(36, 24, layout=layout, bond_dim=bond_dim).fix_gauge_()
    exported = export_onnx(layer, tmp_path / "m.onnx", torch.randn(*lead, 36))
    stats = graph_stats(exported.path)
    assert "Einsum" not in stats.operators
    assert max(stats.ranks.values()) <= 4
    last = f"cores.{len(layer.cores) - 1}"
    assert {last, "bias", "cores.0.pivots"} <= set(stats.initializers)
    parameters = dict(layer.named_parameters())
    for name, shape in stats.initializers.items():
        if name in parameters and name != last:
            assert shape == tuple(parameters[name].shape)
        elif name not in parameters:
            assert len(shape) < 2, "a rebuilt core, or a part of one, lies in the file"
    assert set(session_operators(exported.path, tmp_path)) <= SESSION_OPERATORS
    verify(exported.path, layer, batch_sizes=(1, 2, 5)).raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["svd", "balanced"])
def test_the_file_is_as_small_as_the_free_numbers(tmp_path, layout, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 320), nn.ReLU(), nn.Linear(320, 64)).to(dtype)
    result = mpo.compress(model, bond_dim=96, layout=layout, gauge="identity", if_smaller=False)
    exported = export_onnx(result.model, tmp_path / "m.onnx", torch.randn(2, 256))
    numbers = sum(parameter.numel() for parameter in result.model.parameters())
    # 4 kB a layer: nodes, pivots, and where each row comes from.
    assert exported.num_bytes < 4 * numbers + 2 * 4096
    assert set(session_operators(exported.path, tmp_path)) <= SESSION_OPERATORS
    verify(exported.path, result.model).raise_if_failed()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 48)
        self.second = nn.Linear(48, 48)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_tied_layers_are_stored_once(tmp_path):
    result = mpo.compress(Tied(), bond_dim=12, layout="svd", gauge="identity")
    exported = export_onnx(result.model, tmp_path / "m.onnx", torch.randn(2, 48))
    stored = graph_stats(exported.path).initializers
    assert {"first.cores.0.free", "first.cores.1"} <= set(stored)
    assert not any(name.startswith("second.cores") for name in stored)
    assert set(session_operators(exported.path, tmp_path)) <= SESSION_OPERATORS
    verify(exported.path, result.model).raise_if_failed()
