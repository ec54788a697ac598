"""`--form`, `--quantize` and the command `export`, as a stranger uses them."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mpocompress.cli import main

pytestmark = pytest.mark.onnx


def run(capsys, *arguments):
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = stop.code or 0
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 40)).eval()
    torch.save(model, "model.pt")
    np.savez("data.npz", input=torch.randn(40, 128).numpy())
    return tmp_path


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_form_and_quantization_of_compress(here, capsys):
    code, out, err = run(
        capsys, "model.pt", "--bond-dim", "16", "--form", "dense", "--quantize", "int8", "--json"
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["parity"]["passed"] is True
    assert report["settings"]["quantize"] == "int8"
    found = {layer["name"]: layer for layer in report["layers"]}
    assert [found[name]["form"] for name in ("0", "2")] == ["dense", "dense"]
    said = metadata("model-mpo/model.onnx")
    assert said["mpocompress.quantization"] == "int8"
    assert json.loads(said["mpocompress.forms"]) == {"0": "dense", "2": "dense"}
    assert said["mpocompress.source_sha256"] == report["source"]["sha256"]
    assert json.loads(said["mpocompress.layers"])["0"]["bond_dims"]
    # A quarter of the numbers' bytes, scales, nodes and metadata.
    numbers = report["totals"]["parameters"]["layers"]["compressed"]
    assert report["files"]["model.onnx"] < numbers + 4 * 296 + 12_000


def test_auto_says_what_it_measured(here, capsys):
    assert run(capsys, "model.pt", "--bond-dim", "16", "--batch", "4")[0] == 0
    report = json.loads((here / "model-mpo" / "report.json").read_text())
    layers = [layer for layer in report["layers"] if layer["status"] == "compressed"]
    assert len(layers) == 2
    for layer in layers:
        assert layer["form"] in ("chain", "dense")
        assert layer["form_rows"] == 4
        assert set(layer["form_seconds"]) == {"chain", "dense"}
        assert min(layer["form_seconds"].values()) > 0
    assert "| ONNX |" in (here / "model-mpo" / "report.md").read_text()


def test_export_again(here, capsys):
    assert run(capsys, "model.pt", "--bond-dim", "16", "--form", "chain")[0] == 0
    base = ("export", "model-mpo", "--source", "model.pt")
    code, out, _ = run(capsys, *base, "--form", "dense", "--quantize", "int4", "--data", "data.npz")
    assert code == 0
    made = here / "model-mpo-dense-int4.onnx"
    assert f"{made.stat().st_size} bytes, 2 layers, 2 of them dense at load" in out
    assert made.stat().st_size < 0.5 * (here / "model-mpo" / "model.onnx").stat().st_size
    code, _, err = run(capsys, *base, "--form", "dense", "--quantize", "int4")
    assert code == 2
    assert "Use --force" in err
    for options, message in (
        (("-o", "model.pt", "--force"), "does not end in .onnx"),
        (("-o", "x.onnx", "--quantize", "auto"), "int4"),
    ):
        code, _, err = run(capsys, *base, *options)
        assert code == 2
        assert message in err
    # The same cores in the same form give the same file as the first time.
    assert run(capsys, *base, "--form", "chain", "-o", "again.onnx")[0] == 0
    first = (here / "model-mpo" / "model.onnx").read_bytes()
    assert (here / "again.onnx").read_bytes() == first
    code, out, err = run(
        capsys,
        *("verify", str(made), "--against", "model.pt", "--cores", "model-mpo"),
        *("--data", "data.npz"),
    )
    assert (code, err) == (0, "")
    assert "export with int4 cores" in out


def test_each_form_side_by_side(here, capsys):
    assert run(capsys, "model.pt", "--bond-dim", "16", "--form", "chain")[0] == 0
    code, out, _ = run(
        capsys, "export", "model-mpo", "--source", "model.pt", "--measure", "--json", "-o", "m.onnx"
    )
    assert code == 0
    found = json.loads(out)
    assert [file["path"] for file in found["forms"]["files"]] == ["chain", "dense", "auto"]
    for file in found["forms"]["files"]:
        assert set(file["latency_seconds"]) == {"1", "16", "128"}
        assert file["session_start_seconds"]["median"] > 0
        assert file["resident_bytes"]["median"] > 0
    chain, dense = (file["num_bytes"] for file in found["forms"]["files"][:2])
    assert dense < 1.02 * chain + 1000
    assert sorted(path.name for path in here.iterdir()) == [
        "data.npz",
        "m.onnx",
        "model-mpo",
        "model.pt",
    ]


def test_an_architecture_is_needed(here, capsys):
    assert run(capsys, "model.pt", "--bond-dim", "16", "--form", "chain")[0] == 0
    torch.save(torch.load("model.pt", weights_only=False).state_dict(), "state.pt")
    code, _, err = run(capsys, "export", "model-mpo", "--source", "state.pt")
    assert code == 2
    assert "--model MODULE:FACTORY" in err
    torch.save(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), "other.pt")
    code, _, err = run(capsys, "export", "model-mpo", "--source", "other.pt")
    assert code == 2
    assert "layer '0' is 256x128 in the saved result" in err
