"""Files of torch.save: what opens, what is refused, and that refusing runs nothing."""

import collections
import contextlib
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mpocompress.errors import LoadError, UnsafeCheckpointError
from mpocompress.loading import load_source
from mpocompress.loading.safe_pickle import SAFE_LAYERS


class RunsCommand:
    """Unpickles by running a shell command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x)

    def __setstate__(self, state):
        raise AssertionError("unpickling a foreign class ran its code")


def save(path: Path, content, **options) -> Path:
    torch.save(content, path, **options)
    return path


def rewrite_pickle(path: Path, program: bytes) -> Path:
    """Replace the pickle in an archive of torch.save, keeping its other records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, program if name.endswith("/data.pkl") else content)
    return path


def encoder_layer(activation, **options):
    return nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True, **options)


WHOLE_MODULES = {
    "sequential": lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 2)),
    "attention": lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=3, batch_first=True),
    "encoder layer, relu": lambda: encoder_layer("relu"),
    "encoder layer, gelu": lambda: encoder_layer("gelu"),
    "encoder layer, silu": lambda: encoder_layer(nn.functional.silu),
    "encoder": lambda: nn.TransformerEncoder(encoder_layer(nn.functional.relu), 2),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()),
    "lstm": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True),
    "embedding": lambda: nn.Embedding(7, 3, padding_idx=0),
    "parameter list": lambda: nn.ParameterList([torch.ones(2), torch.zeros(3)]),
    "nested containers": lambda: nn.ModuleDict(
        {"a": nn.ModuleDict({"b": nn.ModuleList([nn.Linear(2, 2), nn.Identity()])})}
    ),
    "bfloat16": lambda: nn.Linear(4, 3).to(torch.bfloat16),
    "with a loss": lambda: nn.ModuleDict({"net": nn.Linear(2, 2), "loss": nn.CrossEntropyLoss()}),
}


@pytest.mark.parametrize("build", WHOLE_MODULES.values(), ids=WHOLE_MODULES.keys())
def test_whole_module_of_torch_nn_opens(build, tmp_path):
    torch.manual_seed(0)
    module = build()
    source = load_source(save(tmp_path / "net.pt", module))
    assert (source.kind, source.format, source.notes) == ("module", "torch module", ())
    assert type(source.module) is type(module)
    assert not any(part.training for part in source.module.modules())
    expected = module.state_dict()
    loaded = source.module.state_dict()
    assert list(loaded) == list(expected)
    for name, value in expected.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_opened_recurrent_and_attention_layers_compute_the_same(tmp_path):
    torch.manual_seed(0)
    lstm, encoder = nn.LSTM(4, 5), nn.TransformerEncoder(encoder_layer("gelu"), 1).eval()
    x, tokens = torch.randn(3, 2, 4), torch.randn(2, 3, 8)
    assert torch.equal(load_source(save(tmp_path / "l.pt", lstm)).module(x)[0], lstm(x)[0])
    loaded = load_source(save(tmp_path / "e.pt", encoder)).module
    assert torch.equal(loaded(tokens), encoder(tokens))


def test_shared_layers_and_frozen_parameters_stay_so(tmp_path):
    layer = nn.Linear(3, 3).requires_grad_(False)
    module = load_source(save(tmp_path / "net.pt", nn.Sequential(layer, nn.ReLU(), layer))).module
    assert module[0] is module[2]
    assert not module[0].weight.requires_grad


def test_state_dict_opens_and_is_mapped_from_the_file(tmp_path):
    state = {"fc.weight": torch.randn(400, 300), "steps": torch.tensor(3)}
    path = save(tmp_path / "net.PTH", state)
    before = path.read_bytes()
    source = load_source(path)
    assert (source.kind, source.format, source.name) == (
        "state_dict",
        "torch state_dict",
        "net.PTH",
    )
    assert torch.equal(source.state_dict["fc.weight"], state["fc.weight"])
    # Mapped pages are private: writing to the tensor leaves the file alone.
    source.state_dict["fc.weight"].zero_()
    assert path.read_bytes() == before


def test_a_recompressed_archive_gives_the_same_values(tmp_path):
    # Its bytes cannot be mapped; torch.load(mmap=True) would return noise without complaint.
    state = {"w": torch.arange(1000.0)}
    path = save(tmp_path / "net.pt", state)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert torch.equal(load_source(path).state_dict["w"], state["w"])


def test_old_format_opens_for_state_dicts_only(tmp_path):
    options = {"_use_new_zipfile_serialization": False}
    state = {"w": torch.randn(3, 2)}
    loaded = load_source(save(tmp_path / "old.pt", state, **options))
    assert torch.equal(loaded.state_dict["w"], state["w"])
    path = save(tmp_path / "old_module.pt", nn.Linear(2, 2), **options)
    with pytest.raises(
        UnsafeCheckpointError, match=r"whole module in the format of torch before 1"
    ):
        load_source(path)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_nested_state_is_found_and_noted(key, tmp_path):
    content = {"epoch": 3, "ema": torch.ones(1), key: {"fc.weight": torch.ones(2, 3)}}
    source = load_source(save(tmp_path / "run.ckpt", content))
    assert list(source.state_dict) == ["fc.weight"]
    assert source.notes == (f"the model is the file's entry {key!r}", "left aside: 'ema', 'epoch'")


def test_nested_module_is_found(tmp_path):
    source = load_source(save(tmp_path / "run.pt", {"model": nn.Linear(2, 2), "epoch": 1}))
    assert isinstance(source.module, nn.Linear)


def test_a_dict_that_contains_itself_ends(tmp_path):
    content: dict = {"epoch": 1}
    content["model"] = content
    with pytest.raises(LoadError, match="holds no weights"):
        load_source(save(tmp_path / "run.pt", content))


@pytest.mark.parametrize(
    ("prefix", "origin"), [("module.", "DistributedDataParallel"), ("_orig_mod.", "torch.compile")]
)
def test_wrapper_prefix_is_taken_off(prefix, origin, tmp_path):
    state = {f"{prefix}fc.weight": torch.ones(2, 2), f"{prefix}fc.bias": torch.ones(2)}
    source = load_source(save(tmp_path / "net.pt", state))
    assert list(source.state_dict) == ["fc.weight", "fc.bias"]
    assert origin in source.notes[0]


def test_a_prefix_of_some_names_stays(tmp_path):
    state = {"module.fc.weight": torch.ones(2, 2), "head.weight": torch.ones(2, 2)}
    assert list(load_source(save(tmp_path / "net.pt", state)).state_dict) == list(state)


def test_entries_that_are_no_tensors_are_noted(tmp_path):
    source = load_source(save(tmp_path / "net.pt", {"w": torch.ones(2), "lr": 0.1, "tag": "x"}))
    assert source.notes == ("left aside, because they are not tensors: 'lr', 'tag'",)


def test_parametrized_state_is_noted(tmp_path):
    new = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    source = load_source(save(tmp_path / "net.pt", nn.Sequential(new).state_dict()))
    assert "'0.weight' is stored in parts" in source.notes[0]
    old = {"fc.weight_g": torch.ones(3, 1), "fc.weight_v": torch.ones(3, 2)}
    assert "'fc.weight' is stored in parts" in load_source(save(tmp_path / "o.pt", old)).notes[0]


def test_shell_command_is_not_run_unless_trusted(tmp_path):
    evidence = tmp_path / "was_here"
    content = {"w": torch.ones(2, 2), "x": RunsCommand(f"touch {evidence}")}
    path = save(tmp_path / "evil.pt", content)
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system") as caught:
        load_source(path)
    assert not evidence.exists()
    assert "--model MODULE:FACTORY" in str(caught.value)
    assert "--trust-pickle" in str(caught.value)
    # The file is a working attack, not a broken one.
    assert load_source(path, trust_pickle=True).kind == "state_dict"
    assert evidence.exists()


@pytest.mark.parametrize("old_format", [False, True])
def test_foreign_class_is_named_and_not_built(old_format, tmp_path):
    path = tmp_path / "net.pt"
    save(path, Foreign(), _use_new_zipfile_serialization=not old_format)
    with pytest.raises(UnsafeCheckpointError, match=r"test_loading_pickle\.Foreign"):
        load_source(path)


@pytest.mark.parametrize(
    ("content", "name", "hint"),
    [
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "DataParallel", r"model\.module"),
        (lambda: nn.LazyLinear(3), "LazyLinear", ""),
        (
            lambda: {"w": torch.ones(1), "x": np.float64(2.0)},
            r"numpy\.\S+\.scalar",
            "Convert NumPy",
        ),
        (lambda: {"w": torch.ones(1), "p": Path("x")}, "PosixPath", ""),
        (lambda: encoder_layer(torch.relu), r"builtins\.getattr", r"torch\.nn\.functional\.relu"),
    ],
    ids=["DataParallel", "lazy", "numpy scalar", "path", "torch.relu"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_globals_are_refused_by_name(content, name, hint, tmp_path):
    path = save(tmp_path / "net.pt", content())
    with pytest.raises(UnsafeCheckpointError, match=name) as caught:
        load_source(path)
    assert caught.match(hint)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_hooks_are_refused_with_the_remedy(tmp_path):
    path = save(tmp_path / "net.pt", nn.utils.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(UnsafeCheckpointError, match=r"remove_weight_norm before saving"):
        load_source(path)


@pytest.mark.parametrize(
    "name",
    [
        b"torch.nn.modules.linear\nEvilLinear",
        b"torch.nn.modules.module\ntorch.os.system",
        b"torch.serialization\nos.system",
        b"torch.nn\nModule.__init_subclass__",
        b"builtins\neval",
        b"torch\nload",
        b"torch.hub\nload",
        b"torch.nn.parallel.replicate\nreplicate",
    ],
)
def test_names_that_look_like_torch_are_refused(name, tmp_path):
    path = save(tmp_path / "net.pt", {"w": torch.ones(2)})
    program = b"\x80\x02c" + name + b"\nX\x08\x00\x00\x00echo bad\x85R."
    with pytest.raises(UnsafeCheckpointError, match=r"not part of torch\.nn"):
        load_source(rewrite_pickle(path, program))


def test_calls_of_other_objects_are_refused(tmp_path):
    path = save(tmp_path / "net.pt", {"w": torch.ones(2)})
    program = b"\x80\x02X\x01\x00\x00\x00a)R."  # calls a string
    with pytest.raises(UnsafeCheckpointError, match="makes calls that no file"):
        load_source(rewrite_pickle(path, program))


def replaced_forward():
    module = nn.Linear(2, 2)
    module.forward = nn.functional.relu
    return module


def with_hook():
    module = nn.Sequential(nn.Linear(2, 2))
    module[0]._forward_hooks = collections.OrderedDict({0: nn.functional.gelu})
    return module


def own_deepcopy():
    module = nn.Linear(2, 2)
    module.__dict__["__deepcopy__"] = nn.functional.relu
    return module


def contains_itself():
    module = nn.Sequential(nn.Linear(2, 2))
    module._modules["1"] = module
    return module


def shared_beyond_reason():
    module: nn.Module = nn.Linear(1, 1)
    for _ in range(30):
        module = nn.Sequential(module, module)
    return module


def malformed_table():
    module = nn.Linear(2, 2)
    module.__dict__["_parameters"] = {"weight": "not a tensor"}
    return module


def dotted_child():
    module = nn.Sequential()
    module._modules["a.b"] = nn.Linear(2, 2)
    return module


def tensor_with_function():
    module = nn.Linear(2, 2)
    module.weight.untyped_storage = nn.functional.relu
    return module


def nested_twice():
    return {"model": {"module": replaced_forward()}}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (replaced_forward, "brings its own 'forward'"),
        (with_hook, r"layer '0' carries hooks \(_forward_hooks\)"),
        (own_deepcopy, "brings its own '__deepcopy__'"),
        (contains_itself, "layer '1' contains itself"),
        (shared_beyond_reason, "shared so often"),
        (malformed_table, "malformed table _parameters"),
        (dotted_child, "malformed table _modules"),
        (tensor_with_function, "its tensor 'weight' carries functions"),
        (nested_twice, "brings its own 'forward'"),
    ],
)
def test_harmless_classes_with_behaviour_from_the_file_are_refused(build, message, tmp_path):
    path = save(tmp_path / "net.pt", build())
    with pytest.raises(UnsafeCheckpointError, match=message):
        load_source(path)


def test_what_else_the_process_allows_neither_matters_nor_changes(tmp_path):
    foreign = save(tmp_path / "foreign.pt", {"w": torch.ones(2), "p": collections.deque([1])})
    own = save(tmp_path / "own.pt", nn.Sequential(nn.Linear(2, 2)))
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([nn.Linear, collections.deque]):
        with pytest.raises(UnsafeCheckpointError, match=r"collections\.deque"):
            load_source(foreign)
        load_source(own)
        during = set(torch.serialization.get_safe_globals())
    assert during == before | {nn.Linear, collections.deque}
    assert set(torch.serialization.get_safe_globals()) == before


def test_the_allow_list_holds_layers_only():
    names = {cls.__name__ for cls in SAFE_LAYERS}
    assert {"Linear", "MultiheadAttention", "LSTM", "NonDynamicallyQuantizableLinear"} <= names
    assert not any(name.startswith("Lazy") or "Parallel" in name for name in names)
    assert all(cls.__module__.startswith("torch.nn.modules.") for cls in SAFE_LAYERS)


def test_newer_pickle_protocol_is_explained(tmp_path):
    path = save(tmp_path / "net.pt", nn.Linear(2, 2), pickle_protocol=4)
    with pytest.raises(UnsafeCheckpointError, match="pickle protocol 4"):
        load_source(path)
    assert load_source(path, trust_pickle=True).kind == "module"


def test_trusted_pickle_whose_code_is_missing(tmp_path):
    path = save(tmp_path / "net.pt", {"w": torch.ones(2)})
    rewrite_pickle(path, b"\x80\x02cno_such_module_here\nNet\n)R.")
    with pytest.raises(LoadError, match=r"no_such_module_here.*Is its code here"):
        load_source(path, trust_pickle=True)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated_archive(keep, tmp_path):
    path = save(tmp_path / "net.pt", nn.Linear(30, 30))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(LoadError, match=r"net\.pt \(\d+ bytes\) is truncated or corrupt"):
        load_source(path)


@pytest.mark.parametrize("keep", [20, 60, 200])
def test_truncated_old_format(keep, tmp_path):
    path = save(tmp_path / "net.pt", {"w": torch.ones(9)}, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LoadError, match=f"{keep} bytes"):
        load_source(path)


def test_damaged_pickle_is_reported_not_raised_through(tmp_path):
    path = save(tmp_path / "net.pt", {"w": torch.ones(2, 2), "b": torch.ones(2)})
    with zipfile.ZipFile(path) as archive:
        program = archive.read("net/data.pkl")
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(program)
        damaged[rng.integers(2, len(program))] = rng.integers(256)
        rewrite_pickle(path, bytes(damaged))
        # Some damage is harmless; the rest must not come out as something else.
        with contextlib.suppress(LoadError):
            load_source(path)


def test_storage_smaller_than_its_tensor_is_refused(tmp_path):
    path = save(tmp_path / "net.pt", {"w": torch.ones(4)})
    with zipfile.ZipFile(path) as archive:
        program = archive.read("net/data.pkl")
    # BININT1 4 is the storage's size, and the tensor's: claim 200 numbers in both.
    assert program.count(b"K\x04") == 2
    rewrite_pickle(path, program.replace(b"K\x04", b"K\xc8"))
    with pytest.raises(LoadError, match="cannot be unpickled"):
        load_source(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"just some text", "it starts with b'just some text'"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "run `git lfs pull`"),
        (b"<!DOCTYPE html><html>", "web page"),
        (pickle.dumps({"a": 1}), "a pickle, but not one of torch.save"),
        (struct.pack("<Q", 100) + b'{"w":{}}', "call it .safetensors"),
    ],
)
def test_foreign_content_under_the_name_of_a_checkpoint(content, message, tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=message):
        load_source(path)


def test_zip_of_something_else(tmp_path):
    path = tmp_path / "net.pt"
    with path.open("wb") as file:
        np.savez(file, x=np.ones(2))
    with pytest.raises(LoadError, match=r"without data\.pkl.*x\.npy"):
        load_source(path)


def test_formats_that_are_not_opened_are_named(tmp_path):
    script = tmp_path / "script.pt"
    with zipfile.ZipFile(script, "w") as archive:
        archive.writestr("script/data.pkl", b"")
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(LoadError, match="TorchScript archive"):
        load_source(script)
    program = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), program)
    with pytest.raises(LoadError, match=r"\.pt2.*may run code from it.*--trust-pickle"):
        load_source(program)
    with pytest.raises(LoadError, match=r"exported program"):
        load_source(program.rename(tmp_path / "program.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({}, "no entries at all"),
        ({"epoch": 3, "note": "x"}, "holds no weights: 'epoch', 'note'"),
        ({1: torch.ones(2)}, "filed under 1"),
        ({"w": torch.eye(3).to_sparse()}, r"'w' is sparse.*to_dense"),
        ({"w": torch.empty(3, device="meta")}, "'w' has no values"),
        ({"w": torch.ones(1).expand(100_000, 10_000)}, r"'w' claims shape .*contiguous"),
    ],
)
def test_content_that_is_no_model(content, message, tmp_path):
    with pytest.raises(LoadError, match=message):
        load_source(save(tmp_path / "net.pt", content))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_tensor_is_refused(tmp_path):
    weight = torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)
    with pytest.raises(LoadError, match=r"'w' is quantized.*dequantize"):
        load_source(save(tmp_path / "net.pt", {"w": weight}))


def test_small_expanded_buffers_are_fine(tmp_path):
    state = {"mask": torch.ones(1, 4).expand(4, 4), "w": torch.ones(2, 2)}
    loaded = load_source(save(tmp_path / "net.pt", state)).state_dict
    assert torch.equal(loaded["mask"], torch.ones(4, 4))
