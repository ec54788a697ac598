"""Paths, kinds of files, safetensors, and what a Source says about where it came from."""

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpocompress.errors import LoadError
from mpocompress.loading import load_source


def test_name_and_hash_are_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "digits.pt"
    torch.save(nn.Linear(2, 2), path)
    monkeypatch.chdir(tmp_path)
    source = load_source("./digits.pt")
    assert source.name == "digits.pt"
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.tokenizer_folder is None


def test_weights_are_mapped_not_copied(tmp_path, monkeypatch):
    seen = []
    plain_load = torch.load

    def spy(*args, **options):
        seen.append(options)
        return plain_load(*args, **options)

    monkeypatch.setattr(torch, "load", spy)
    torch.save(nn.Linear(2, 2), tmp_path / "net.pt")
    load_source(tmp_path / "net.pt")
    load_source(tmp_path / "net.pt", trust_pickle=True)
    assert [(o["mmap"], o["weights_only"]) for o in seen] == [(True, True), (True, False)]


def test_safetensors(tmp_path):
    state = {"module.fc.weight": torch.randn(4, 3).half(), "module.fc.bias": torch.randn(4)}
    save_file(state, tmp_path / "net.safetensors", metadata={"format": "pt"})
    source = load_source(tmp_path / "net.safetensors")
    assert (source.kind, source.format) == ("state_dict", "safetensors")
    assert torch.equal(source.state_dict["fc.weight"], state["module.fc.weight"])
    assert "took the prefix 'module.' off" in source.notes[0]


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", r"\(3 bytes\) is too short"),
        (header(b'{"w": 1}'), "not that of a safetensors file"),
        (header(b"not json"), "not that of a safetensors file"),
        (header(b"[" * 100_000), "not that of a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run `git lfs pull`"),
        (
            header(b'{"w":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
            "cannot be read as safetensors",
        ),
        (
            header(b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}') + bytes(4),
            "cannot be read as safetensors",
        ),
    ],
)
def test_corrupt_safetensors(content, message, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=message) as caught:
        load_source(path)
    assert "net.safetensors" in str(caught.value)


def test_truncated_safetensors_names_both_sizes(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"w": torch.ones(100)}, path)
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    with pytest.raises(LoadError, match=rf"has {len(content) - 50} bytes.*{len(content)}.*trunc"):
        load_source(path)
    path.write_bytes(content[:30])
    with pytest.raises(LoadError, match=r"\(30 bytes\) is not a complete safetensors file"):
        load_source(path)
    path.write_bytes(content + b"x")
    with pytest.raises(LoadError, match="followed by something else"):
        load_source(path)


def test_safetensors_without_tensors(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({}, path)
    with pytest.raises(LoadError, match="holds no weights"):
        load_source(path)


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.safetensors", "net.bin"])
def test_empty_file(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(LoadError, match=rf"{name} is empty \(0 bytes\)"):
        load_source(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(LoadError, match=r"nothing_here\.pt does not exist"):
        load_source(tmp_path / "nothing_here.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net.h5", r"unknown kind of file '\.h5'.*\.safetensors"),
        ("net", "unknown kind of file ''"),
        ("net.onnx", r"is an ONNX file: a graph, which PyTorch does not run"),
        ("net.pt2", r"reading a \.pt2 file may run code from it.*--trust-pickle"),
    ],
)
def test_unsupported_extension(name, message, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(LoadError, match=message):
        load_source(tmp_path / name)


def test_something_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(LoadError, match="neither a file nor a folder"):
        load_source(tmp_path / "pipe.pt")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "without config.json, so not a Hugging Face model. It holds: nothing"),
        (("a.txt", "b.txt"), "It holds: a.txt, b.txt"),
        (("net.pt", "log.txt"), "Did you mean the file net.pt in it"),
        (("model.mpo.safetensors", "report.json"), "a result of mpocompress"),
    ],
)
def test_folder_that_is_no_model(files, message, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(LoadError, match=message.replace(".", r"\.")):
        load_source(tmp_path)


def test_folder_without_weights(tmp_path):
    Path(tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(LoadError, match=r"no weights: none of model\.safetensors"):
        load_source(tmp_path)
