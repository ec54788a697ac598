"""The written file: structure, names, sizes, bytes; and that failures leave nothing behind."""

import hashlib
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.errors import DataError, ExportError, SaveError
from mpocompress.export import export_onnx, graph_stats, onnx_file, verify
from mpocompress.layers import MPOLinear
from mpocompress.surgery import find_weights

pytestmark = pytest.mark.onnx

MPO_OPERATORS = {"MatMul", "Reshape", "Transpose", "Add", "Shape", "Concat"}

LAYOUTS = {
    "svd": (24, 36),
    "6x6,4x6": (24, 36),
    "skewed: 12x3,2x12": (24, 36),
    "2x3,3x4,4x3": (24, 36),
    "2x3,3x2,2x2,2x3": (24, 36),
}


def weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("lead", "bias"), [((2,), True), ((2, 5), False)])
def test_mpo_layers_are_chains_of_matrix_products(tmp_path, layout, lead, bias):
    out_features, in_features = LAYOUTS[layout]
    sites = layout.rpartition(" ")[2]
    layer = MPOLinear(in_features, out_features, bias, layout=sites, bond_dim=3)
    exported = export_onnx(layer, tmp_path / "m.onnx", torch.randn(*lead, in_features))
    stats = graph_stats(exported.path)
    assert set(stats.operators) <= MPO_OPERATORS - {"Transpose"}
    assert stats.operators["MatMul"] == len(layer.cores)
    assert max(stats.ranks.values()) <= 4
    weights = {
        name: shape for name, shape in stats.initializers.items() if not name.startswith("v")
    }
    names = {f"cores.{k}" for k in range(len(layer.cores))} | ({"bias"} if bias else set())
    assert set(weights) == names
    assert stats.opset == 18
    sequence = ("sequence",) if len(lead) == 2 else ()
    assert stats.inputs == {"input": ("batch", *sequence, in_features)}
    assert stats.outputs == {"output": ("batch", *sequence, out_features)}
    verify(exported.path, layer, batch_sizes=(1, 2, 5)).raise_if_failed()


def test_dense_classifier(tmp_path):
    model = nn.Sequential(nn.Linear(12, 300), nn.ReLU(), nn.Linear(300, 4))
    exported = export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 12))
    stats = graph_stats(exported.path)
    assert stats.operators == {"Gemm": 2, "Relu": 1}
    assert set(stats.initializers) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert exported.num_bytes < weight_bytes(model) + 1500
    assert verify(exported.path, model).argmax_agreement == 1.0


def test_transposed_weights_of_any_size_keep_their_names(tmp_path):
    model = nn.Sequential(nn.Linear(600, 700), nn.Linear(700, 3))  # 3-D inputs: no Gemm
    stats = graph_stats(export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4, 600)).path)
    assert stats.operators == {"MatMul": 2, "Add": 2}
    assert stats.initializers["0.weight"] == (600, 700)
    assert stats.initializers["1.weight"] == (700, 3)


def test_images(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        MPOLinear(4 * 6 * 6, 10, layout="5x12,2x12", bond_dim=4),
    )
    exported = export_onnx(model, tmp_path / "m.onnx", torch.rand(1, 1, 12, 12))
    # Height and width meet in the flattened size: the file must not promise that they are free.
    assert exported.inputs[0].shape == ("batch", 1, 12, 12)
    verify(exported.path, model).raise_if_failed()


class Viewed(nn.Module):
    """A convolution whose outputs are seen as rows, as most classifiers of images do."""

    def __init__(self, conv: nn.Module, features: int) -> None:
        super().__init__()
        self.conv, self.head = conv, nn.Linear(features, 5)

    def forward(self, x):
        return self.head(self.conv(x).view(x.size(0), -1))


@pytest.mark.parametrize(
    ("conv", "sizes"),
    [
        (nn.Conv1d(3, 16, 3, padding=1), (6,)),
        (nn.Conv2d(3, 16, 3, padding=1), (6, 6)),
        (nn.Conv2d(4, 16, 1), (6, 6)),
        (nn.Conv2d(8, 16, 3, padding=1, groups=2), (6, 6)),
        (nn.Conv3d(3, 16, 3, padding=1), (4, 4, 4)),
        (nn.ConvTranspose2d(3, 16, 3, padding=1), (6, 6)),
    ],
    ids=str,
)
def test_outputs_of_every_chain_of_convolutions_can_be_viewed(tmp_path, conv, sizes):
    torch.manual_seed(0)
    model = Viewed(conv, 16 * prod(sizes))
    x = torch.randn(2, conv.in_channels, *sizes)
    (site,) = (site for site in find_weights(model).sites if site.name == "conv")
    for layout in site.layouts():
        options = {"bond_dim": 8, "layout": layout, "include": ["conv"], "if_smaller": False}
        small = mpo.compress(model, **options).model
        exported = export_onnx(small, tmp_path / "m.onnx", x)
        verify(exported.path, small).raise_if_failed()


def test_images_of_any_size(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    exported = export_onnx(model, tmp_path / "m.onnx", torch.rand(2, 3, 12, 16))
    assert exported.inputs[0].shape == ("batch", 3, "input_2", "input_3")
    verify(exported.path, model).raise_if_failed()


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = MPOLinear(6, 6, layout="2x3,3x2", bond_dim=2)
        self.alias = self.shared

    def forward(self, left, right):
        return self.shared(left) - self.alias(self.shared(right))


@pytest.mark.parametrize(
    ("pool", "size"),
    [
        (nn.AdaptiveAvgPool2d((4, 2)), 16),
        (nn.AdaptiveAvgPool2d((4, 2)), 18),  # windows of unequal sizes
        (nn.AdaptiveMaxPool2d((4, 2)), 16),
    ],
)
def test_adaptive_pooling_to_a_grid_fixes_the_size_of_images(tmp_path, pool, size):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), pool, nn.Flatten(), nn.Linear(32, 5))
    exported = export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 3, size, size))
    assert exported.inputs[0].shape == ("batch", 3, size, size)
    verify(exported.path, model).raise_if_failed()


def test_modules_that_are_used_twice_are_stored_once(tmp_path):
    exported = export_onnx(Siamese(), tmp_path / "m.onnx", (torch.randn(2, 6), torch.randn(2, 6)))
    stats = graph_stats(exported.path)
    assert {"shared.cores.0", "shared.cores.1", "shared.bias"} < set(stats.initializers)
    assert not any(name.startswith("alias") for name in stats.initializers)
    assert stats.inputs == {"left": ("batch", 6), "right": ("batch", 6)}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(500, 16)
        self.mix = MPOLinear(16, 16, bond_dim=2)
        self.head = nn.Linear(16, 500, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.mix(self.embedding(ids)))


def test_tied_weights_are_stored_once(tmp_path):
    model = Tied()
    exported = export_onnx(model, tmp_path / "m.onnx", torch.zeros(1, 1, dtype=torch.int64))
    assert exported.inputs[0].shape == ("batch", "sequence")
    assert exported.inputs[0].high == 499
    assert exported.num_bytes < weight_bytes(model) + 4000
    assert "embedding.weight" in graph_stats(exported.path).initializers
    verify(exported.path, model).raise_if_failed()


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        return torch.einsum("bi,ijk->bjk", x, self.core)


def test_no_einsum(tmp_path):
    model = Einsum()
    exported = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3))
    assert "Einsum" not in graph_stats(exported.path).operators
    verify(exported.path, model).raise_if_failed()


class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.output = nn.Parameter(torch.ones(3))  # a name that an output has too

    def forward(self, x, scale=None):
        y = x * self.output
        return {"output": y, "x": x, "none": None, "states": (y + 1, y + 1)}


def test_names_of_inputs_and_outputs(tmp_path):
    model = Outputs()
    exported = export_onnx(model, tmp_path / "m.onnx", {"x": torch.randn(2, 3)})
    assert exported.outputs == ("output", "x_out", "states.0", "states.1")
    verify(exported.path, model).raise_if_failed()
    names = ["a", "b", "c", "d"]
    exported = export_onnx(
        model, tmp_path / "m.onnx", torch.randn(2, 3), input_names=["data"], output_names=names
    )
    stats = graph_stats(exported.path)
    assert list(stats.inputs) == ["data"]
    assert list(stats.outputs) == names
    verify(exported.path, model, [{"x": torch.randn(4, 3)}]).raise_if_failed()
    with pytest.raises(DataError, match=r"output_names \['a'\] must be 4 different names"):
        export_onnx(model, tmp_path / "n.onnx", torch.randn(2, 3), output_names=["a"])
    with pytest.raises(DataError, match="'a' is an input's name, too"):
        export_onnx(
            nn.Linear(3, 2), tmp_path / "n.onnx", torch.randn(2, 3),
            input_names=["a"], output_names=["a"],
        )  # fmt: skip


def tiny_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
    )
    model = transformers.BertModel(config)
    for layer in model.encoder.layer:
        layer.intermediate.dense = MPOLinear.from_linear(layer.intermediate.dense, bond_dim=4)
    return model


def test_transformer_with_keyword_inputs(tmp_path):
    model = tiny_bert().train()
    example = {
        "input_ids": torch.tensor([[1, 2, 3, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "token_type_ids": torch.tensor([[0, 0, 0, 0]]),
    }
    exported = export_onnx(model, tmp_path / "m.onnx", example)
    assert model.training
    assert {spec.name: spec.shape for spec in exported.inputs} == dict.fromkeys(
        example, ("batch", "sequence")
    )
    assert [(spec.kind, spec.high) for spec in exported.inputs] == [
        ("indices", 99),
        ("mask", 1),
        ("indices", 1),
    ]
    stats = graph_stats(exported.path)
    assert stats.outputs == {
        "last_hidden_state": ("batch", "sequence", 16),
        "pooler_output": ("batch", 16),
    }
    assert "encoder.layer.1.intermediate.dense.cores.0" in stats.initializers
    parity = verify(exported.path, model, batch_sizes=(1, 4, 9, 2))
    parity.raise_if_failed()
    assert parity.batch_sizes == (1, 2, 4, 9)
    # Longer than the table of positions: PyTorch refuses it, and the message says so.
    long = {name: torch.ones(1, 41, dtype=torch.int64) for name in example}
    with pytest.raises(DataError, match=r"BertModel does not run on batch 0 .*\(1, 41\)"):
        verify(exported.path, model, [long])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)

    def forward(self, x, src_key_padding_mask):
        return self.layers(x, src_key_padding_mask=src_key_padding_mask)


def test_padding_masks_of_torch(tmp_path):
    # True marks what is left out. PyTorch's fused layers write zeros there, its others do not.
    model = Encoder()
    mask = torch.tensor([[False, False, False], [False, True, True]])
    exported = export_onnx(model, tmp_path / "m.onnx", (torch.randn(2, 3, 8), mask))
    assert [spec.shape[:2] for spec in exported.inputs] == [("batch", "sequence")] * 2
    assert (exported.inputs[1].low, exported.inputs[1].high) == (1, 0)
    verify(exported.path, model).raise_if_failed()
    verify(exported.path, model, [(torch.randn(2, 3, 8), mask)]).raise_if_failed()
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    "lengths", [(1, 2), (0, 3)], ids=["every row has padding", "nothing tells"]
)
def test_padding_masks_of_torch_are_made_up_so_that_outputs_are_finite(tmp_path, lengths):
    torch.manual_seed(0)
    model = Encoder()
    mask = torch.arange(3) >= torch.tensor(lengths)[:, None]
    exported = export_onnx(model, tmp_path / "m.onnx", (torch.randn(2, 3, 8), mask))
    result = verify(exported.path, model)
    result.raise_if_failed()
    assert result.batch_sizes == (1, 3, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_written_as_float32(tmp_path, dtype):
    model = nn.Sequential(MPOLinear(8, 8, bond_dim=2), nn.Linear(8, 2)).to(dtype)
    exported = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 8, dtype=dtype))
    assert exported.converted_from == (str(dtype).removeprefix("torch."),)
    assert exported.inputs[0].dtype == "float32"
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    verify(exported.path, model).raise_if_failed()


def test_nothing_of_the_model_changes(tmp_path):
    model = nn.Sequential(MPOLinear(8, 8, bond_dim=2), nn.Dropout(0.5), nn.BatchNorm1d(8))
    model[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    export_onnx(model, tmp_path / "m.onnx", torch.randn(4, 8))
    assert [module.training for module in model.modules()] == flags
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_later_opset(tmp_path):
    model = nn.Sequential(MPOLinear(8, 8, bond_dim=2), nn.LayerNorm(8))
    exported = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 8), opset=20)
    assert graph_stats(exported.path).opset == 20
    verify(exported.path, model).raise_if_failed()


def test_metadata_and_nothing_about_the_machine(tmp_path):
    model = nn.Sequential(MPOLinear(8, 8, bond_dim=2), nn.TransformerEncoderLayer(8, 2, 8))
    path = tmp_path / "m.onnx"
    export_onnx(model, path, torch.randn(2, 3, 8), metadata={"bond_dims": "[2]"})
    proto = onnx.load(path)
    assert {entry.key: entry.value for entry in proto.metadata_props}.items() >= {
        "bond_dims": "[2]",
        "mpocompress.forms": '{"0":"chain"}',
        "mpocompress.quantization": "none",
    }.items()
    assert len(proto.metadata_props) == 4  # and the description of the inputs
    assert proto.producer_name == "mpocompress"
    assert not proto.graph.metadata_props
    assert not proto.graph.value_info
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    structure = onnx.ModelProto()
    structure.CopyFrom(proto)
    for tensor in structure.graph.initializer:
        assert not tensor.metadata_props
        tensor.ClearField("raw_data")
    text = structure.SerializeToString()
    for trace in (b".py", b"site-packages", b"torch.", str(Path.home()).encode()):
        assert trace not in text


SCRIPT = """
import sys, torch
from torch import nn
from mpocompress.export import export_onnx
from mpocompress.layers import MPOLinear
torch.manual_seed(0)
model = nn.Sequential(
    MPOLinear(16, 24, layout="4x4,6x4", bond_dim=3), nn.TransformerEncoderLayer(24, 2, 8)
)
export_onnx(model, sys.argv[1], torch.ones(1, 5, 16))
"""


def test_same_bytes_and_no_chatter_in_every_process(tmp_path):
    paths = [tmp_path / "0.onnx", tmp_path / "1.onnx"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": path.stem},
        )
        for path in paths
    ]
    for process in processes:
        assert process.communicate() == (b"", b"")
        assert process.returncode == 0
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert len(digests) == 1


def test_large_models_have_a_data_file_that_moves_along(tmp_path):
    model = nn.Sequential(MPOLinear(64, 64, bond_dim=8), nn.Linear(64, 64))
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "m.onnx"
    exported = export_onnx(model, path, torch.randn(2, 64), single_file_bytes=1000)
    assert set(exported.files) == {"m.onnx", "m.onnx.data"}
    assert exported.files == {file.name: file.stat().st_size for file in path.parent.iterdir()}
    assert exported.files["m.onnx"] < 4000
    moved = path.parent.rename(tmp_path / "b") / "m.onnx"
    verify(moved, model).raise_if_failed()
    export_onnx(model, moved, torch.randn(2, 64))
    assert [file.name for file in moved.parent.iterdir()] == ["m.onnx"]
    verify(moved, model).raise_if_failed()


class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class FixedBatch(nn.Module):
    def forward(self, x):
        return x + torch.zeros(2, 3)


class Untranslatable(nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x)


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        (
            Branches(),
            torch.ones(2, 3),
            ExportError,
            r"Branches cannot be traced: .*depends on the value of a tensor, at "
            r"test_export_onnx.py:\d+ `if x.sum\(\) > 0:`. Choose by torch.where",
        ),
        (
            FixedBatch(),
            torch.ones(2, 3),
            ExportError,
            r"batch dimension \(0\) of input 'x' is fixed to 2.*FixedBatch.forward",
        ),
        (
            Untranslatable(),
            torch.ones(2, 3, 3),
            ExportError,
            "Untranslatable cannot be translated.*no counterpart for aten._linalg_svd.*Replace",
        ),
        (
            nn.Linear(3, 3),
            torch.ones(2, 4),
            DataError,
            r"Linear does not run on the example inputs \(input: float32 \(2, 4\)\)",
        ),
    ],
)
def test_models_that_cannot_be_exported(tmp_path, capfd, model, example, error, message):
    with pytest.raises(error, match=message):
        export_onnx(model, tmp_path / "m.onnx", example)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_failures_keep_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    model, example = nn.Linear(3, 3), torch.ones(2, 3)

    def invalid(*_: object, **__: object) -> None:
        raise onnx.checker.ValidationError("Field 'shape' is required.\nsecond line")

    with monkeypatch.context() as patch:
        patch.setattr(onnx.checker, "check_model", invalid)
        with pytest.raises(
            ExportError, match=r"m.onnx is no valid ONNX: Field 'shape' is required"
        ):
            export_onnx(model, path, example)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(onnx_file.os, "replace", full)
        with pytest.raises(SaveError, match=r"m\.onnx cannot be written: No space left on device"):
            export_onnx(model, path, example)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"opset": 17}, ExportError, "opset 17: .*Take opset=18"),
        ({"metadata": {"bond_dim": 8}}, ExportError, "metadata 'bond_dim': 8 is of type int"),
        ({"path": "missing/m.onnx"}, SaveError, "no directory .*missing. Create it first"),
        ({"path": "."}, SaveError, "is a directory"),
        ({"input_names": ["a", "b"]}, DataError, r"input_names \['a', 'b'\] must be 1 different"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path, options, error, message):
    path = tmp_path / options.pop("path", "m.onnx")
    with pytest.raises(error, match=message):
        export_onnx(nn.Linear(3, 3), path, torch.ones(2, 3), **options)
    assert list(tmp_path.iterdir()) == []


class Windows(nn.Module):
    """Fills pictures up to whole windows, where they are not."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3 * 16, 5)

    def forward(self, x):
        if x.shape[2] % 4:
            x = nn.functional.pad(x, (0, 0, 0, 4 - x.shape[2] % 4))
        if x.shape[3] % 4:
            x = nn.functional.pad(x, (0, 4 - x.shape[3] % 4))
        return self.mix(nn.functional.unfold(x, 4, stride=4).transpose(1, 2))


def test_sizes_that_would_need_another_padding_are_fixed(tmp_path):
    model = Windows().eval()
    exported = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3, 16, 24))
    (graph_input,) = onnx.load(exported.path).graph.input
    dims = [dim.dim_param or dim.dim_value for dim in graph_input.type.tensor_type.shape.dim]
    assert dims == ["batch", 3, 16, 24]
    assert verify(exported.path, model).passed
