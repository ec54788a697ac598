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
    input_hint,
    load_source,
    parse_input_spec,
)
from mpocompress.loading.config_inputs import inputs_of_config


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
    example = example_inputs(load_source(encoder))
    assert {name: tuple(t.shape) for name, t in example.kwargs.items()} == {
        "input_ids": (2, 16),
        "attention_mask": (2, 16),
    }
    assert set(example.kwargs["attention_mask"][1].tolist()) == {0, 1}
    assert example.origin.startswith("the model's config: input_ids 2x16:int64, attention_mask")


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TWO_STACKS = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
PICTURES = {"image_size": 32, "patch_size": 8, **SMALL}
WORDS = {"vocab_size": 50, "max_position_embeddings": 12, "pad_token_id": 0, **SMALL}
SOUND = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
# Model, its config, and what it is called with.
OF_CONFIGS = {
    "bert": ("BertModel", "BertConfig", WORDS, ["input_ids 2x10", "attention_mask 2x10"]),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**WORDS, "pad_token_id": 1},
        ["input_ids 2x10", "attention_mask 2x10"],
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", PICTURES, ["pixel_values 2x3x32x32"]),
    "yolos": (
        "YolosModel",
        "YolosConfig",
        {**PICTURES, "image_size": [32, 48], "num_detection_tokens": 2},
        ["pixel_values 2x3x32x48"],
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 50, "n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2},
        ["input_ids 2x16", "attention_mask 2x16"],
    ),
    "gpt2 classifier": (
        "GPT2ForSequenceClassification",
        "GPT2Config",
        {"vocab_size": 50, "n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2},
        ["input_ids 1x16", "attention_mask 1x16"],
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        ["input_ids 2x16", "attention_mask 2x16", "decoder_input_ids 2x8"],
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **{"vocab_size": 50, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 30},
            **TWO_STACKS,
            **ENDS,
        },
        ["input_features 2x8x60", "decoder_input_ids 2x8"],
    ),
    "speech to text": (
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        {
            **{"vocab_size": 50, "d_model": 16, "input_feat_per_channel": 8, "conv_channels": 16},
            **TWO_STACKS,
        },
        ["input_features 2x96x8", "decoder_input_ids 2x8"],
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**WORDS, "eos_token_id": 2}, "vision_config": PICTURES},
        ["input_ids 2x10", "attention_mask 2x10", "pixel_values 2x3x32x32"],
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {"vocab_size": 20, **SMALL, **SOUND},
        ["input_values 2x400"],
    ),
    "spectrogram": (
        "ASTModel",
        "ASTConfig",
        {"max_length": 64, "num_mel_bins": 16, "patch_size": 8, **SMALL},
        ["input_values 2x64x16"],
    ),
    "swin": (
        "SwinModel",
        "SwinConfig",
        {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        ["pixel_values 2x3x32x32"],
    ),
    "resnet": (
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        ["pixel_values 2x3x224x224"],
    ),
    "video": (
        "VideoMAEModel",
        "VideoMAEConfig",
        {"num_frames": 4, **PICTURES},
        ["pixel_values 2x4x3x32x32"],
    ),
}


@pytest.mark.parametrize("kind", OF_CONFIGS)
def test_inputs_of_a_config(kind):
    model, config, options, expected = OF_CONFIGS[kind]
    torch.manual_seed(0)
    module = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    example = example_inputs(module)
    found = {name: "x".join(map(str, t.shape)) for name, t in example.kwargs.items()}
    assert [f"{name} {shape}" for name, shape in found.items()] == expected
    half = example_inputs(module.to(torch.bfloat16))
    assert {t.dtype for t in half.kwargs.values()} <= {torch.bfloat16, torch.int64}


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_tokenizer_and_the_config_together(kind, encoder):
    model, config, options, expected = OF_CONFIGS[kind]
    module = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    names = ("vocab.txt", "tokenizer_config.json")
    kept = {name: (encoder / name).read_text() for name in names}
    kept["vocab.txt"] = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]"
    module.save_pretrained(encoder)
    for name, text in kept.items():
        (encoder / name).write_text(text)
    if kind == "clip":  # with a table of positions that the sentences fit in
        module = getattr(transformers, model)(
            transformers.CLIPConfig(
                text_config={**options["text_config"], "max_position_embeddings": 40},
                vision_config=PICTURES,
            )
        )
        module.save_pretrained(encoder)
    example = example_inputs(load_source(encoder))
    assert set(example.kwargs) == {text.split()[0] for text in expected}
    assert {tensor.shape[0] for tensor in example.kwargs.values()} == {3}
    assert example.origin == f"the tokenizer of {encoder.name}"


def test_an_end_that_a_config_has_not_is_no_token():
    _, config, options, expected = OF_CONFIGS["clip"]
    text = {**options["text_config"], "eos_token_id": -1, "pad_token_id": -1}
    both = getattr(transformers, config)(text_config=text, vision_config=PICTURES)
    found = inputs_of_config(transformers.CLIPModel(both))
    assert list(found) == [name.split()[0] for name in expected]
    assert 0 <= int(found["input_ids"].min()) <= int(found["input_ids"].max()) < 50


def test_a_config_of_others_is_no_config():
    module = nn.Conv2d(1, 2, 3)
    for config in ({"hidden_size": 3}, None, nn.ReLU()):
        module.config = config
        assert example_inputs(module) is None


class Pooled(nn.Sequential):
    """Convolutions, and a Linear that fixes the size of the picture."""

    def __init__(self, side):
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(side**2 // 4, 5)
        )


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, left, right, scale=None):
        return self.out(self.table(left) * self.table(right))


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))

    def forward(self, a, b):
        return a["x"] @ self.weight + b["y"]


HINTS = {
    "picture of 28": (lambda: Pooled(28), "--input 1x3x28x28"),
    "picture of 96": (lambda: Pooled(96), "--input 1x3x96x96"),
    "signal": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 5, 5), nn.Flatten(), nn.Linear(80, 2)),
        "--input 1x2x100",
    ),
    "tokens": (lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2)), "--input 1x16:int64"),
    "two of them": (Pair, "--input 1x16:int64 --input 1x16:int64"),
    "sequence": (lambda: nn.LSTM(7, 3), "--input 1x16x7"),
    "encoder": (lambda: nn.TransformerEncoderLayer(6, 2, 16), "--input 1x16x6"),
    "volume": (lambda: nn.Sequential(nn.BatchNorm3d(2), nn.Conv3d(2, 2, 3)), "1x2x16x112x112"),
}


@pytest.mark.parametrize("kind", HINTS)
def test_a_hint_works_as_it_stands(kind):
    build, shown = HINTS[kind]
    torch.manual_seed(0)
    module = build().eval()
    hint = input_hint(module)
    assert f"{shown}, which it accepts, or give --data" in hint
    assert example_inputs(module) is None
    specs = [word for word in hint.partition(", which")[0].split() if word[0].isdigit()]
    assert example_inputs(module, specs=specs) is not None


def test_without_a_guess_the_hint_names_the_arguments():
    assert input_hint(Strange()) == (
        "give it with --input, one for each of its arguments (a, b), as in --input 1x784, or give "
        "--data"
    )
    assert input_hint(nn.ReLU()) == "give it with --input, as in --input 1x784, or give --data"
