"""Example batches as forward arguments, outputs as named tensors, and copies for inference."""

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpocompress.errors import DataError, ExportError
from mpocompress.export.calls import ForwardCall, flatten_outputs, inference_copy, run


class Sum(nn.Module):
    def forward(self, x, y=None, scale: float = 1.0):
        return x * scale if y is None else (x + y) * scale


class Language(nn.Module):
    def forward(self, input_ids, attention_mask=None, labels=None, use_cache=None):
        return {"logits": input_ids * 2.0, "cached": use_cache, "loss": labels}


class Many(nn.Module):
    def forward(self, *xs: Tensor):
        return sum(xs)


def test_tensor_tuple_and_dict_are_the_same_call():
    x = torch.ones(2, 3)
    calls = [ForwardCall.from_batch(Sum(), batch) for batch in (x, (x,), [x], {"x": x}, x.numpy())]
    assert {(call.slots, call.names, call.rows) for call in calls} == {(("x",), ("x",), 2)}


def test_constants_are_passed_on_and_are_no_inputs():
    call = ForwardCall.from_batch(Sum(), (torch.ones(2, 3), None, 2.0))
    assert call.names == ("x",)
    torch.testing.assert_close(run(Sum(), call)["output"], torch.full((2, 3), 2.0))


def test_variadic_arguments_are_numbered():
    call = ForwardCall.from_batch(Many(), (torch.ones(2), torch.ones(2)))
    assert call.names == ("xs_0", "xs_1")
    assert run(Many(), call)["output"].tolist() == [2.0, 2.0]


def test_labels_are_left_out_and_caches_switched_off():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": torch.ones(2)}
    call = ForwardCall.from_batch(Language(), batch)
    assert call.names == ("input_ids",)
    assert dict(call.constants) == {"use_cache": False}
    assert list(run(Language(), call)) == ["logits"]


def test_floats_become_float32_and_integers_stay():
    half, short = torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.int32)
    call = ForwardCall.from_batch(Sum(), (half, short))
    assert [tensor.dtype for tensor in call.tensors] == [torch.float32, torch.int32]


def test_rows_are_cut_or_repeated():
    call = ForwardCall.from_batch(Sum(), torch.arange(3.0))
    assert call.with_rows(2).tensors[0].tolist() == [0, 1]
    assert call.with_rows(5).tensors[0].tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("text", "not str"),
        ({"z": torch.ones(2)}, r"does not fit Sum.forward\(x, y, scale\): missing.*'x'"),
        ((torch.ones(2),) * 4, "too many positional arguments"),
        ((torch.ones(2, 3), torch.ones(4, 3)), r"'y' of shape \(4, 3\) has 4 rows, but 'x'"),
        (torch.ones(0, 3), r"'x' of shape \(0, 3\) is empty"),
        ((3.0,), "contains no tensor"),
        ((torch.ones(2), [torch.ones(2)]), "argument 'y' of the batch is a list"),
        (torch.ones(2, dtype=torch.complex64), "is complex"),
    ],
)
def test_batches_that_do_not_fit(batch, message):
    with pytest.raises(DataError, match=message):
        ForwardCall.from_batch(Sum(), batch)


Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Result:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    note: str = "no tensor"


def test_names_of_outputs():
    a, b = torch.zeros(1), torch.ones(1)
    assert list(flatten_outputs(a)) == ["output"]
    assert list(flatten_outputs((a,))) == ["output"]
    assert list(flatten_outputs((a, None, (b, a)))) == ["output_0", "output_2.0", "output_2.1"]
    assert list(flatten_outputs({"logits": a, "past_key_values": (a, b)})) == ["logits"]
    assert list(flatten_outputs(Pair(a, b))) == ["first", "second"]
    assert list(flatten_outputs(Result(a, (b,)))) == ["logits", "hidden.0"]
    with pytest.raises(DataError, match="returns no tensor, but NoneType"):
        flatten_outputs(None)


def test_inference_copy_shares_float32_tensors_and_leaves_the_mode_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    copied, converted = inference_copy(model)
    assert model.training
    assert not any(module.training for module in copied.modules())
    assert copied[0].weight is model[0].weight
    assert copied[1].running_mean is model[1].running_mean
    assert converted == ()


def test_inference_copy_converts_what_is_not_float32_and_keeps_ties():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).bfloat16()
    model[1].weight = model[0].weight
    model[2].weight = nn.Parameter(model[0].weight.detach())  # shares the storage only
    copied, converted = inference_copy(model)
    assert converted == ("bfloat16",)
    assert copied[0].weight.dtype == torch.float32
    assert copied[1].weight is copied[0].weight
    assert copied[2].weight is copied[0].weight
    assert model[0].weight.dtype == torch.bfloat16


def test_inference_copy_of_weights_that_are_computed():
    model = nn.Linear(3, 3)
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model)
    x = torch.ones(2, 3)
    expected = model(x)  # leaves a weight with a history, which deepcopy refuses
    copied, _ = inference_copy(model)
    torch.testing.assert_close(copied(x), expected)


def test_inference_copy_names_what_cannot_be_copied():
    model = nn.Linear(2, 2)
    model.source = (number for number in range(3))
    with pytest.raises(ExportError, match=r"Linear cannot be copied.*generator"):
        inference_copy(model)


def test_numpy_batches():
    call = ForwardCall.from_batch(Sum(), {"x": np.ones((2, 3))})
    assert call.tensors[0].dtype == torch.float32
