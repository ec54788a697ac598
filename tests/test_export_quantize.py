"""Cores as integers: the rounding, the simulated model, and the file against it."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.errors import ExportError
from mpocompress.export import export_onnx, graph_stats, quantize_cores, verify
from mpocompress.layers import MPOLinear
from mpocompress.mpo.integer_fit import round_matrix

pytestmark = pytest.mark.onnx


@pytest.mark.parametrize("block", [None, 8, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_stays_within_half_a_step(bits, block):
    torch.manual_seed(0)
    matrix = torch.randn(12, 37)
    stored = round_matrix(matrix, bits, block, shape=(12, 37))
    assert stored.values.dtype == torch.int8
    assert int(stored.values.abs().max()) <= 2 ** (bits - 1)
    steps = stored.scales.float().abs().repeat_interleave(stored.block, 1)[:, :37]
    error = (stored.dequantized() - matrix).abs()
    if bits == 8:
        assert bool((error <= 0.51 * steps).all())
    else:  # clipped on purpose where that lowers the squared error
        assert float(error.square().mean() / matrix.square().mean()) < 0.02
    assert stored.num_bytes == -(-12 * 37 * bits // 8) + stored.scales.numel() * 2


def test_values_that_are_levels_are_kept_exactly():
    torch.manual_seed(0)
    for bits in (4, 8):
        levels = torch.randint(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), (6, 32)).float()
        levels[:, 0] = -(2 ** (bits - 1)) if bits == 4 else 127
        stored = round_matrix(0.25 * levels, bits, 32, shape=(6, 32))
        torch.testing.assert_close(stored.dequantized(), 0.25 * levels)
    zero = round_matrix(torch.zeros(2, 8), 4, 4, shape=(2, 8))
    assert float(zero.dequantized().abs().max()) < 1e-6


def test_small_scales_are_kept_in_single_precision():
    stored = round_matrix(1e-9 * torch.randn(3, 32), 8, None, shape=(3, 32))
    assert stored.scales.dtype == torch.float32


def test_feedback_lowers_the_error_in_its_metric():
    torch.manual_seed(0)
    factor = torch.randn(96, 8) @ torch.randn(8, 96) + 0.1 * torch.randn(96, 96)
    gram = (factor @ factor.T).double()
    matrix = torch.randn(40, 96)

    def error(stored):
        lost = (stored.dequantized() - matrix).double()
        return float(((lost @ gram) * lost).sum())

    nearest = error(round_matrix(matrix, 4, 32, shape=(40, 96)))
    assert error(round_matrix(matrix, 4, 32, shape=(40, 96), gram_YY=gram)) < 0.3 * nearest
    plain = round_matrix(matrix, 4, 32, shape=(40, 96), gram_YY=torch.eye(96), sweeps=0)
    assert error(plain) == pytest.approx(nearest, rel=1e-6)


class Net(nn.Module):
    def __init__(self, gauge: str = "none") -> None:
        super().__init__()
        self.first = MPOLinear(64, 96, layout="svd", bond_dim=24)
        self.second = MPOLinear(96, 96, layout="8x12,12x8", bond_dim=30)
        self.third = MPOLinear(96, 50, layout="5x4,5x4,2x6", bond_dim=9, bias=False)
        self.again = MPOLinear(50, 50, layout="svd", bond_dim=20)
        if gauge == "identity":
            for layer in (self.first, self.second, self.third, self.again):
                layer.fix_gauge_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.first(x).relu()).relu()
        return self.again(self.again(self.third(hidden)).relu())


@pytest.fixture
def net(request):
    torch.manual_seed(0)
    return Net(getattr(request, "param", "none")).eval()


def session_operators(path, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "session.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return set(graph_stats(tmp_path / "session.onnx").operators)


@pytest.mark.parametrize("net", ["none", "identity"], indirect=True)
@pytest.mark.parametrize("form", ["chain", "dense"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_file_computes_what_the_simulation_does(tmp_path, net, quantize, form):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    data = [torch.randn(20, 64) for _ in range(3)]
    quantized = quantize_cores(net, quantize, data)
    exported = export_onnx(
        net, tmp_path / "m.onnx", torch.randn(2, 64), form=form, quantize=quantized
    )
    found = verify(exported.path, quantized.model, data, batch_sizes=(1, 3, 64))
    assert found.max_relative_difference < 1e-5
    assert exported.quantization == quantize
    # Once a session is up nothing but float32 products and what a chain needs is left.
    operators = session_operators(exported.path, tmp_path)
    assert operators <= {
        *("MatMul", "Gemm", "FusedGemm", "FusedMatMul", "Relu", "Add"),
        *("Reshape", "Shape", "Concat", "Slice", "Gather", "Unsqueeze"),
    }
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        x = torch.cat(data)
        lost = (quantized.model(x) - net(x)).norm() / net(x).norm()
    assert 0 < float(lost) < {"int8": 0.02, "int4": 0.25}[quantize]


@pytest.mark.parametrize("net", ["none", "identity"], indirect=True)
def test_bytes(tmp_path, net):
    sizes = {
        quantize: export_onnx(
            net, tmp_path / "m.onnx", torch.randn(2, 64), quantize=quantize
        ).num_bytes
        for quantize in ("none", "int8", "int4")
    }
    stored = {q: quantize_cores(net, q).integers for q in ("int8", "int4")}
    numbers = sum(s.values.numel() for s in stored["int8"].values())
    assert sizes["none"] - sizes["int8"] > 2.5 * numbers - 8000  # 3 less scales and nodes
    assert sizes["int4"] < sizes["int8"]
    tensors = onnx.load(tmp_path / "m.onnx").graph.initializer
    assert any(t.data_type == onnx.TensorProto.INT4 for t in tensors)
    assert all(len(t.name) < 40 and "model." not in t.name for t in tensors)


def test_data_make_int4_better_on_them(net):
    """Inputs in a subspace: the metric knows it, and the rounding without data does not."""
    torch.manual_seed(1)
    basis = torch.randn(6, 64)
    layer = nn.Sequential(net.first)
    data = [torch.randn(50, 6) @ basis + 2 for _ in range(4)]
    x = torch.cat(data)
    with torch.no_grad():
        truth = layer(x)
        losses = [
            float((quantize_cores(layer, "int4", given).model(x) - truth).norm() / truth.norm())
            for given in (None, data)
        ]
    assert losses[1] < 0.5 * losses[0]


def test_tied_layers_are_rounded_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu())

    torch.manual_seed(0)
    result = mpo.compress(Tied(), bond_dim=12, layout="svd")
    quantized = quantize_cores(result.model, "int8")
    assert len(quantized.integers) == 2
    exported = export_onnx(
        result.model, tmp_path / "m.onnx", torch.randn(2, 48), quantize=quantized
    )
    stored = graph_stats(exported.path).initializers
    assert {"first.cores.0.int8", "first.cores.0.scales"} <= set(stored)
    assert not any(name.startswith("second.cores") for name in stored)
    verify(exported.path, quantized.model).raise_if_failed()


def test_refusals(tmp_path, net):
    with pytest.raises(ExportError, match="quantize 'int3': cores are stored as one of none, int8"):
        export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 64), quantize="int3")
    with pytest.raises(ExportError, match="opset 18 has no 4-bit tensors"):
        export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 64), quantize="int4", opset=18)
    assert np.isfinite(float(quantize_cores(net, "none").model(torch.zeros(1, 64)).sum()))
