"""Example inputs: given, from the tokenizer, or inferred only where that is certain."""

import json
import re

import pytest
import torch
import transformers
from torch import nn

from mpocompress.errors import DataError
from mpocompress.layers import MPOLinear
from mpocompress.loading import (
    InputSpec,
    as_batches,
    example_inputs,
    load_source,
    parse_input_spec,
)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1x784", InputSpec((1, 784))),
        ("1x784:float32", InputSpec((1, 784), torch.float32)),
        (" 2X3X4:BFLOAT16 ", InputSpec((2, 3, 4), torch.bfloat16)),
        ("8:int64", InputSpec((8,), torch.int64)),
        ("1x2:bool", InputSpec((1, 2), torch.bool)),
    ],
)
def test_input_spec(text, spec):
    assert parse_input_spec(text) == spec
    assert parse_input_spec(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1xfoo", "is not a shape"),
        ("", "is not a shape"),
        ("1x-784", "is not a shape"),
        ("-1x784", "is not a shape"),
        ("1,784", "is not a shape"),
        ("1x784:", "is not a shape"),
        ("1.5x2", "is not a shape"),
        ("1x0", "a dimension of zero"),
        ("1x784:float33", "unknown dtype 'float33'; known are float64, float32"),
    ],
)
def test_wrong_input_specs_show_a_right_one(text, message):
    with pytest.raises(DataError, match=f"--input {re.escape(repr(text))}.*{message}") as caught:
        parse_input_spec(text)
    assert "Right is, for example, 1x784" in str(caught.value)


def test_specs_make_positional_inputs():
    model = nn.Bilinear(3, 4, 2)
    example = example_inputs(model, specs=["2x3", "2x4:float32"])
    assert [tuple(a.shape) for a in example.args] == [(2, 3), (2, 4)]
    assert example.kwargs == {}
    assert example.origin == "--input 2x3 2x4:float32"
    again = example_inputs(model, specs=["2x3", "2x4:float32"])
    assert torch.equal(example.args[0], again.args[0])


def test_spec_without_dtype_takes_that_of_the_model():
    example = example_inputs(nn.Linear(3, 2).to(torch.bfloat16), specs=["4x3"])
    assert example.args[0].dtype == torch.bfloat16


def test_integers_are_valid_indices_and_masks_hide_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.small = nn.Embedding(1000, 4), nn.Embedding(3, 4)

        def forward(self, ids, mask):
            return (self.large(ids) + self.small(ids)) * mask[..., None]

    example = example_inputs(Net(), specs=["2x50:int64", "2x50:int64"])
    assert set(example.args[0].flatten().tolist()) == {0, 1, 2}
    assert bool(example.args[1].bool().all())


@pytest.mark.parametrize("true_means", ["use", "ignore"])
def test_boolean_masks_hide_nothing_whatever_true_means(true_means):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, mask, ids):
            hidden = mask if true_means == "ignore" else ~mask
            scores = self.table(ids).sum(-1).masked_fill(hidden, float("-inf"))
            return scores.softmax(-1)

    example = example_inputs(Net(), specs=["2x50:bool", "2x50:int64"])
    assert set(example.args[0].flatten().tolist()) == {true_means == "use"}
    assert len(set(example.args[1].flatten().tolist())) == 9


def test_a_mask_that_is_named_after_padding_marks_it():
    class Net(nn.Module):
        def forward(self, x, src_key_padding_mask):
            return x.masked_fill(src_key_padding_mask, 0)

    example = example_inputs(Net(), specs=["2x3", "2x3:bool"])
    assert not example.args[1].any()


def test_a_mask_that_the_model_refuses_is_tried_the_other_way_round():
    class Net(nn.Module):
        def forward(self, x, skip):
            if skip.all():
                raise ValueError("nothing is left")
            return x

    example = example_inputs(Net(), specs=["2x3", "2x3:bool"])
    assert not example.args[1].any()
    with pytest.raises(DataError, match="does not accept 2x3:bool: .*missing 1 required"):
        example_inputs(Net(), specs=["2x3:bool"])


def test_spec_that_does_not_fit_shows_shape_and_reason():
    model = nn.Sequential(nn.Linear(784, 10))
    message = (
        r"--input 1x700: the model does not accept 1x700:float32: RuntimeError: mat1 and mat2 "
        r"shapes cannot be multiplied \(1x700 and 784x10\).*forward takes \(input\)"
    )
    with pytest.raises(DataError, match=message):
        example_inputs(model, specs=["1x700"])
    with pytest.raises(DataError, match="does not accept 1x784:float32, 1x784:float32: TypeError"):
        example_inputs(model, specs=["1x784", "1x784"])


def test_spec_that_is_too_large():
    for text in ("9999999999x9999999999", "99999999999999999999x64"):
        with pytest.raises(DataError, match=f"'{text}' has more than 2147483648 numbers"):
            example_inputs(nn.Linear(2, 2), specs=[text])
    with pytest.raises(DataError, match="no tensor of 9999999999x9999999999 can be made"):
        example_inputs(nn.Linear(2, 2), specs=[InputSpec((9999999999, 9999999999))])


def test_data_comes_first_and_is_cast_to_the_model():
    x = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    batches = as_batches([{"input": x, "labels": torch.ones(2)}])
    example = example_inputs(nn.Linear(3, 2), specs=["9x9"], batches=batches)
    assert torch.equal(example.kwargs["input"], x.float())
    assert example.args == ()
    assert example.origin == "the first batch of data"


def test_data_that_does_not_fit_names_the_arguments_of_forward():
    batches = as_batches([{"image": torch.ones(2, 3)}])
    message = r"does not accept image=2x3:float32: TypeError.*forward takes \(input\).*arr_0"
    with pytest.raises(DataError, match=message):
        example_inputs(nn.Linear(3, 2), batches=batches)


def test_modes_and_gradients_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    example_inputs(model)
    assert [part.training for part in model] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(part._forward_pre_hooks for part in model)


class FirstChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x, scale=1.0):
        hidden = torch.relu(self.fc(x)) * scale
        return {"logits": self.head(hidden), "hidden": hidden}


INFERRED = {
    "linear": (lambda: nn.Linear(6, 2), "inferred from the first layer (6 inputs)"),
    "mpo": (
        lambda: MPOLinear(6, 4, bias=False, layout="balanced", bond_dim=2),
        "inferred from the first layer (6 inputs)",
    ),
    "chain": (
        lambda: nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(6, 4), nn.ReLU())),
        "inferred from the first layer 1.0 (6 inputs)",
    ),
    "norm first": (
        lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)),
        "inferred from the first layer 1 (6 inputs)",
    ),
    "own forward": (FirstChild, "inferred from the first layer fc (6 inputs)"),
    "flatten": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4)),
        "inferred from the first layer 1 (6 inputs); the model flattens its input, so another "
        "shape can be given as --input",
    ),
}


@pytest.mark.parametrize(("build", "origin"), INFERRED.values(), ids=INFERRED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inferred(build, origin, dtype):
    torch.manual_seed(0)
    example = example_inputs(build().to(dtype))
    assert [(tuple(a.shape), a.dtype) for a in example.args] == [((2, 6), dtype)]
    assert example.kwargs == {}
    assert example.origin == origin


class NotFirst(FirstChild):
    def forward(self, x):
        return self.fc(self.head(x))


class Padded(FirstChild):
    def forward(self, x):
        return self.fc(nn.functional.pad(x, (0, 6 - x.shape[1]))[:, :6].repeat(2, 1))


class TwoArguments(FirstChild):
    def forward(self, x, y):
        return self.fc(x) + self.fc(y)


class Scalar(FirstChild):
    def forward(self, x):
        return self.fc(x).sum()


class Sequence(nn.Module):
    """Takes a matrix for one unbatched sequence: rows are not independent."""

    def __init__(self, kind):
        super().__init__()
        self.project = nn.Linear(6, 8)
        if kind == "lstm":
            self.mix: nn.Module = nn.LSTM(8, 8)
        else:
            self.mix = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        output = self.mix(self.project(x))
        return output[0] if isinstance(output, tuple) else output


NOT_CERTAIN = {
    "no linear": lambda: nn.Conv2d(1, 2, 3),
    "convolution first": lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)),
    "embedding first": lambda: nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 2)),
    "attention": lambda: nn.MultiheadAttention(6, 2),
    "encoder": lambda: nn.TransformerEncoderLayer(6, 2, 16),
    "executed later": NotFirst,
    "rows are repeated": Padded,
    "two arguments": TwoArguments,
    "scalar output": Scalar,
    "lstm over rows": lambda: Sequence("lstm"),
    "attention over rows": lambda: Sequence("attention"),
    "no forward": lambda: nn.ModuleDict({"a": nn.Linear(6, 2)}),
}


@pytest.mark.parametrize("build", NOT_CERTAIN.values(), ids=NOT_CERTAIN.keys())
def test_nothing_is_inferred_unless_it_is_certain(build):
    torch.manual_seed(0)
    assert example_inputs(build()) is None


def test_bare_state_dict_has_no_example(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pt")
    assert example_inputs(load_source(tmp_path / "net.pt"), specs=["1x3"]) is None


@pytest.fixture
def encoder(tmp_path):
    """A tiny BERT with a word-level tokenizer."""
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "rain", "again", "every", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return tmp_path


def test_tokenizer_of_the_folder(encoder, capfd):
    capfd.readouterr()
    example = example_inputs(load_source(encoder))
    assert list(example.kwargs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert example.args == ()
    assert example.kwargs["input_ids"].shape[0] == 3
    assert set(example.kwargs["attention_mask"].flatten().tolist()) == {0, 1}
    assert example.origin == f"the tokenizer of {encoder.name}"
    assert capfd.readouterr() == ("", "")


def test_tokenizer_outputs_that_forward_does_not_take_are_left_out(encoder):
    source = load_source(encoder)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = source.module

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids, attention_mask).last_hidden_state

    wrapped = type(source)(
        kind="module",
        name=source.name,
        sha256=source.sha256,
        format=source.format,
        module=Wrapper(),
        tokenizer_folder=encoder,
    )
    assert list(example_inputs(wrapped).kwargs) == ["input_ids", "attention_mask"]


def test_tokenizer_that_cannot_be_used(encoder):
    source = load_source(encoder)
    (encoder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"the tokenizer of .* cannot be used.*--data.*--input"):
        example_inputs(source)


def test_folder_without_a_tokenizer(encoder):
    (encoder / "vocab.txt").unlink()
    (encoder / "tokenizer_config.json").unlink()
    assert example_inputs(load_source(encoder)) is None
