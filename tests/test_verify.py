"""Parity of ONNX Runtime and PyTorch: what is compared, what passes, what is refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from mpocompress.errors import DataError, LoadError, ParityError
from mpocompress.export import export_onnx, verify
from mpocompress.layers import MPOLinear

pytestmark = pytest.mark.onnx


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        self.hidden = MPOLinear(8, 8, layout="4x2,2x4", bond_dim=2)
        self.head = nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids, mask):
        x = self.hidden(self.embedding(ids)) * mask[..., None]
        return self.head(self.dropout(x.sum(1) / mask.sum(1, keepdim=True)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Classifier()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "m.onnx"
    mask = torch.ones(2, 6, dtype=torch.int64)
    return export_onnx(
        model, path, {"ids": torch.zeros(2, 6, dtype=torch.int64), "mask": mask}
    ).path


def batches(*sizes: tuple[int, int]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "ids": torch.randint(0, 20, size, generator=generator),
            "mask": torch.ones(size, dtype=torch.int64),
        }
        for size in sizes
    ]


def edited(path: Path, target: Path, change) -> Path:
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, target)
    return target


def change_initializer(name: str, entry: int, value: float):
    def change(proto: onnx.ModelProto) -> None:
        (tensor,) = [t for t in proto.graph.initializer if t.name == name]
        array = numpy_helper.to_array(tensor).copy()
        array.flat[entry] = value
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return change


def test_made_up_batches(path, model):
    model.train()
    result = verify(path, model)
    assert model.training
    assert result.passed
    assert result.batch_sizes == (1, 3, 7)
    assert result.samples == 11
    assert result.outputs == ("output",)
    assert result.argmax_agreement == 1.0
    assert 0 <= result.max_relative_difference < 1e-5
    assert verify(path, model) == result
    assert verify(path, model, seed=1) != result


def test_given_batches_and_the_first_one_resized(path, model):
    data = batches((4, 5), (6, 11), (1, 2))
    result = verify(path, model, data, batch_sizes=(3, 9))
    assert result.passed
    assert result.batch_sizes == (1, 3, 4, 6, 9)
    assert result.samples == 4 + 6 + 1 + 3 + 9
    assert verify(path, model, iter(data), batch_sizes=()).samples == 11


def test_one_batch_as_tuple_dict_or_with_labels(path, model):
    (batch,) = batches((4, 5))
    assert verify(path, model, batch, batch_sizes=()).samples == 4
    assert verify(path, model, [tuple(batch.values())], batch_sizes=()).samples == 4
    labelled = {"labels": torch.zeros(4), "mask": batch["mask"].int(), "ids": batch["ids"].int()}
    assert verify(path, model, [labelled], batch_sizes=()).passed


def test_a_changed_weight_is_found(path, model, tmp_path):
    wrong = edited(path, tmp_path / "wrong.onnx", change_initializer("head.bias", 1, 3.0))
    result = verify(wrong, model)
    assert not result.passed
    assert result.max_abs_difference > 1
    assert result.argmax_agreement < 1
    with pytest.raises(
        ParityError,
        match=r"'output': relative difference \d.* over 11 samples in batches of 1, 3, 7; allowed",
    ):
        result.raise_if_failed()
    assert verify(wrong, model, tolerance=1e9).passed
    result = verify(path, model)
    result.raise_if_failed()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_on_one_side_fail_and_on_both_sides_agree(path, model, tmp_path, value):
    wrong = edited(path, tmp_path / "wrong.onnx", change_initializer("head.bias", 1, value))
    result = verify(wrong, model)
    assert result.max_relative_difference == float("inf")
    assert not result.passed
    broken = Classifier()
    with torch.no_grad():
        broken.head.bias[1] = value
    assert verify(wrong, broken).passed


class Total(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x.sum() * self.factor


def test_scalar_outputs(tmp_path):
    exported = export_onnx(Total(float("nan")), tmp_path / "m.onnx", torch.ones(2, 3))
    with pytest.raises(ParityError, match="nothing was compared: 'output' is NaN or infinite"):
        verify(exported.path, Total(float("nan")))
    assert not verify(exported.path, Total(1.0)).passed
    exported = export_onnx(Total(2.0), tmp_path / "m.onnx", torch.ones(2, 3))
    assert verify(exported.path, Total(2.0)).passed


def test_the_model_of_another_file_fails(path):
    torch.manual_seed(5)
    other = Classifier()
    nn.init.normal_(other.head.weight)
    assert not verify(path, other).passed


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": torch.ones(2, 3, dtype=torch.int64)}, "does not fit Classifier.*'mask'"),
        (batches((2, 3, 4))[0], r"'ids' is int64 \(2, 3, 4\), but .* takes 'ids': int64 \(batch"),
        (
            {"ids": torch.ones(2, 3, dtype=torch.int64), "mask": torch.ones(2, 3)},
            r"'mask' is float32 \(2, 3\), but .*int64 \(batch, sequence\) with batch 2, sequence 3",
        ),
        (
            {
                "ids": torch.ones(2, 3, dtype=torch.int64),
                "mask": torch.ones(2, 4, dtype=torch.int64),
            },
            r"'mask' is int64 \(2, 4\), .* with batch 2, sequence 3",
        ),
        (
            {name: 99 * tensor for name, tensor in batches((2, 3))[0].items()},
            "Classifier does not run on batch 0 .*index out of range",
        ),
    ],
)
def test_batches_that_do_not_fit(path, model, batch, message):
    with pytest.raises(DataError, match=message):
        verify(path, model, [batch])


def test_no_batches(path, model):
    with pytest.raises(DataError, match="contains no batches"):
        verify(path, model, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": ()}, r"batch_sizes \[\]: give one or more"),
        ({"batch_sizes": (3, 0)}, r"batch_sizes \[3, 0\]"),
        ({"tolerance": float("nan")}, "tolerance nan: it is a relative difference"),
        ({"tolerance": -1.0}, "tolerance -1.0"),
    ],
)
def test_numbers_that_nothing_can_be_held_against(path, model, options, message):
    with pytest.raises(DataError, match=message):
        verify(path, model, **options)


def test_models_that_do_not_belong_to_the_file(path):
    with pytest.raises(DataError, match=r"does not run on inputs made up for .*m\.onnx"):
        verify(path, nn.Linear(3, 3))


def test_files_that_cannot_be_read(tmp_path, model):
    with pytest.raises(LoadError, match=r"missing\.onnx: there is no such file"):
        verify(tmp_path / "missing.onnx", model)
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(LoadError, match=r"cannot open .*broken\.onnx"):
        verify(tmp_path / "broken.onnx", model)


def test_files_without_our_metadata(path, model, tmp_path):
    def forget(proto: onnx.ModelProto) -> None:
        del proto.metadata_props[:]

    foreign = edited(path, tmp_path / "foreign.onnx", forget)
    verify(foreign, model).raise_if_failed()

    def rename(proto: onnx.ModelProto) -> None:
        forget(proto)
        for values in (proto.graph.input, proto.graph.output):
            for value in values:
                value.name = f"their_{value.name}"
        for node in proto.graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name in ("ids", "mask", "output"):
                        names[index] = f"their_{name}"

    renamed = edited(path, tmp_path / "renamed.onnx", rename)
    verify(renamed, model).raise_if_failed()
    result = verify(renamed, model, batches((2, 3)))
    assert result.passed
    assert result.outputs == ("their_output",)


def linear_graph(path: Path, shape: list[int | str], reshape_to: list[int]) -> Path:
    """y = reshape(x W) with a fixed shape, as exporters write that fix the batch."""
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node("MatMul", ["x", "w"], ["z"]),
                onnx.helper.make_node("Reshape", ["z", "shape"], ["y"]),
            ],
            "fixed",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
            [
                numpy_helper.from_array(np.eye(3, dtype=np.float32), "w"),
                numpy_helper.from_array(np.array(reshape_to), "shape"),
            ],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.save(proto, path)
    return path


class Identity(nn.Module):
    def forward(self, x):
        return x * 1.0


def test_graphs_that_fix_the_batch_are_found(tmp_path):
    free = linear_graph(tmp_path / "free.onnx", ["N", 3], [-1, 3])
    assert verify(free, Identity()).batch_sizes == (1, 3, 7)
    fixed = linear_graph(tmp_path / "fixed.onnx", ["batch", 3], [2, 3])
    with pytest.raises(ParityError, match=r"does not run .*fixed.onnx on x: float32 \(1, 3\)"):
        verify(fixed, Identity())
    flat = linear_graph(tmp_path / "flat.onnx", ["batch", 3], [3, -1])
    with pytest.raises(ParityError, match=r"has shape \(3, 1\), but PyTorch gives \(1, 3\)"):
        verify(flat, Identity())
    declared = linear_graph(tmp_path / "declared.onnx", [2, 3], [2, 3])
    assert verify(declared, Identity()).batch_sizes == (2,)
    with pytest.raises(
        DataError, match=r"'x' is float32 \(4, 3\), but .* takes 'x': float32 \(2, 3"
    ):
        verify(declared, Identity(), torch.ones(4, 3))


class Top(nn.Module):
    def forward(self, x):
        return {"indices": x.argmax(-1), "positive": x > 0}


def test_integer_and_boolean_outputs_must_be_equal(tmp_path):
    exported = export_onnx(Top(), tmp_path / "m.onnx", torch.randn(2, 9))
    result = verify(exported.path, Top())
    assert result.passed
    assert result.max_abs_difference == 0
    assert result.argmax_agreement is None

    class Other(Top):
        def forward(self, x):
            found = super().forward(x)
            return {**found, "indices": found["indices"] + 1}

    result = verify(exported.path, Other(), tolerance=0.9)
    assert not result.passed
    assert result.worst_output == "indices"


def test_another_number_of_outputs(path):
    class Two(Classifier):
        def forward(self, ids, mask):
            logits = super().forward(ids, mask)
            return {"logits": logits, "probabilities": logits.softmax(-1)}

    with pytest.raises(ParityError, match="has the outputs output, but the model returns logits"):
        verify(path, Two())
