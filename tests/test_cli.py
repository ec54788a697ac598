"""The command line as a stranger uses it: exit codes, messages, files, and nothing left behind."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mpocompress as mpo
from mpocompress.cli import main
from mpocompress.saving import read_manifest

FACTORY = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(48, 64), nn.Linear(64, 40)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())

def make():
    return Net()
"""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40)).eval()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(network(), tmp_path / "model.pt")
    return tmp_path


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.mark.onnx
def test_one_command_from_checkpoint_to_verified_onnx(here, capsys):
    import onnxruntime

    code, out, err = run(capsys, "model.pt", "--bond-dim", "8")
    assert (code, err) == (0, "")
    made = here / "model-mpo"
    assert {path.name for path in made.iterdir()} == {
        "model.mpo.safetensors",
        "model.onnx",
        "report.html",
        "report.json",
        "report.md",
    }
    assert "2 layers compressed" in out
    report = json.loads((made / "report.json").read_text())
    assert report["parity"]["passed"] is True
    assert report["files"]["model.onnx"] == (made / "model.onnx").stat().st_size
    assert report["source"]["name"] == "model.pt"
    assert len(report["source"]["sha256"]) == 64
    assert report["totals"]["parameters"]["model"]["dense"] == 48 * 64 + 64 + 64 * 40 + 40
    assert [layer["status"] for layer in report["layers"] if layer["kind"] == "linear"] == [
        "compressed"
    ] * 2
    loaded = mpo.load(made, model=network())
    x = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    session = onnxruntime.InferenceSession(made / "model.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x})[0]
    expected = loaded(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.onnx
def test_json_prints_one_object(here, capsys):
    code, out, _ = run(capsys, "compress", "model.pt", "--bond-dim", "8", "--json", "-o", "out")
    assert code == 0
    assert json.loads(out)["format_version"] == 1
    code, out, err = run(capsys, "missing.pt", "--bond-dim", "8", "--json")
    assert code == 2
    assert json.loads(out)["error"]["exit_code"] == 2
    assert "missing.pt" in err


def test_dry_run_writes_nothing(here, capsys):
    code, out, _ = run(capsys, "model.pt", "--bond-dim", "8", "--dry-run")
    assert code == 0
    assert "nothing was written" in out
    code, out, _ = run(capsys, "model.pt", "--bond-dim", "8", "--dry-run", "--json")
    assert mpo.Plan.from_json(out).compressed
    assert [path.name for path in here.iterdir()] == ["model.pt"]


@pytest.mark.onnx
def test_equal_runs_give_equal_files(here, capsys):
    # Of the form that is asked for: which one "auto" takes is measured, and small ones are as fast.
    for name in ("a", "b"):
        assert run(capsys, "model.pt", "--bond-dim", "8", "--form", "chain", "-o", name)[0] == 0
    for name in ("model.onnx", "model.mpo.safetensors"):
        assert (here / "a" / name).read_bytes() == (here / "b" / name).read_bytes(), name


@pytest.mark.onnx
def test_force_replaces_and_report_redraws(here, capsys):
    assert run(capsys, "model.pt", "--bond-dim", "8")[0] == 0
    code, _, err = run(capsys, "model.pt", "--bond-dim", "4")
    assert code == 2
    assert "'model-mpo' exists. Use --force" in err
    assert run(capsys, "model.pt", "--bond-dim", "4", "--force")[0] == 0
    page = (here / "model-mpo" / "report.html").read_bytes()
    (here / "model-mpo" / "report.html").unlink()
    assert run(capsys, "report", "model-mpo")[0] == 0
    assert (here / "model-mpo" / "report.html").read_bytes() == page


@pytest.mark.onnx
def test_densify_gives_an_ordinary_checkpoint(here, capsys):
    assert run(capsys, "model.pt", "--bond-dim", "8")[0] == 0
    assert run(capsys, "densify", "model-mpo", "-o", "dense.pt")[0] == 0
    code, out, _ = run(capsys, "densify", "model-mpo", "-o", "again.pt", "--json")
    assert code == 0
    found = json.loads(out)
    assert found == {"file": "again.pt", "bytes": (here / "again.pt").stat().st_size}
    dense = network()
    dense.load_state_dict(torch.load("dense.pt", weights_only=True))
    x = torch.randn(3, 48)
    compressed = mpo.load("model-mpo", model=network())
    torch.testing.assert_close(dense(x), compressed(x), rtol=1e-4, atol=1e-5)
    code, _, err = run(capsys, "densify", "model-mpo", "-o", "dense.pt")
    assert code == 2
    assert "Use --force" in err


def test_inspect_lists_every_parameter(here, capsys):
    code, out, _ = run(capsys, "inspect", "model.pt", "--json")
    assert code == 0
    found = json.loads(out)
    assert sum(entry["parameters"] for entry in found["entries"]) == found["parameters"]
    first = found["entries"][0]
    assert first["convertible"]
    assert len(first["bonds"][0]["schmidt_values"]) == 48
    code, out, _ = run(capsys, "inspect", "model.pt", "--error", "0.5")
    assert code == 0
    assert "ratio at error 0.5" in out


@pytest.mark.onnx
def test_bare_state_dict(here, capsys):
    state = network().state_dict()
    state["embed_tokens.weight"] = torch.randn(30, 16)
    save_file(state, here / "bare.safetensors")
    code, _, err = run(capsys, "bare.safetensors", "--bond-dim", "8")
    assert code == 0
    assert "--model MODULE:FACTORY" in err
    report = mpo.CompressionReport.load(here / "bare-mpo")
    assert "--model MODULE:FACTORY" in report.onnx_note
    assert report.parity is None
    kinds = {layer.name: (layer.kind, layer.status) for layer in report.layers}
    assert kinds["0"] == ("matrix", "compressed")
    assert kinds["embed_tokens"] == ("embedding", "kept")
    assert not (here / "bare-mpo" / "model.onnx").exists()
    dense = mpo.densify(here / "bare-mpo")
    assert set(dense) == set(state)
    assert torch.equal(dense["embed_tokens.weight"], state["embed_tokens.weight"])
    loaded = mpo.load(here / "bare-mpo", model=_with_table())
    assert loaded[0](torch.randn(2, 48)).shape == (2, 64)


BRANCHING = """
from torch import nn

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 64)

    def forward(self, x):
        y = self.layer(x)
        return y if y.sum() > 0 else -y
"""


@pytest.mark.onnx
def test_what_onnx_cannot_hold_is_written_without(here, capsys, monkeypatch):
    (here / "branching_for_cli.py").write_text(BRANCHING)
    monkeypatch.syspath_prepend(str(here))
    from branching_for_cli import Branching

    torch.manual_seed(1)
    torch.save(Branching().state_dict(), here / "net.pt")
    np.savez(here / "x.npz", x=np.random.default_rng(0).normal(size=(96, 48)).astype(np.float32))
    given = ("net.pt", "--bond-dim", "8", "--model", "branching_for_cli:Branching")
    given = (*given, "--data", "x.npz", "--resume")
    code, _, err = run(capsys, *given)
    assert code == 1
    assert "--no-onnx" in err
    assert (here / "net-mpo.state").is_dir()
    assert run(capsys, *given, "--no-onnx")[0] == 0  # the same run, as far as fits go
    found = sorted(file.name for file in (here / "net-mpo").iterdir())
    assert found == ["model.mpo.safetensors", "report.html", "report.json", "report.md"]
    assert "--no-onnx" in mpo.CompressionReport.load(here / "net-mpo").onnx_note
    mpo.load("net-mpo", model=Branching())(torch.randn(2, 48))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--form", "dense"), "--form dense is for the ONNX file: --no-onnx writes none"),
        (("--quantize", "int8"), "--quantize int8 is for the ONNX file: --no-onnx writes none"),
        (("--max-size", "9kB"), "--max-size 9kB is for the ONNX file: --no-onnx writes none"),
    ],
)
def test_no_onnx_refuses_what_is_of_the_file(here, capsys, options, said):
    target = () if "--max-size" in options else ("--bond-dim", "4")
    code, _, err = run(capsys, "model.pt", *target, *options, "--no-onnx")
    assert code == 2
    assert said in err


def _with_table() -> nn.Module:
    model = network()
    model.add_module("embed_tokens", nn.Embedding(30, 16))
    return model


@pytest.mark.onnx
def test_factory_and_input(here, capsys, monkeypatch):
    (here / "mynet_for_cli.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(here))
    from mynet_for_cli import make

    torch.manual_seed(1)
    torch.save(make().state_dict(), here / "net.pt")
    given = ("net.pt", "--bond-dim", "8", "--model", "mynet_for_cli:make")
    code, _, err = run(capsys, *given, "-o", "named", "--input", "1x48")
    assert (code, err) == (0, "")
    assert (here / "named" / "model.onnx").exists()
    code, _, err = run(capsys, *given, "-o", "wrong", "--input", "1x47")
    assert code == 2
    assert "1x47" in err
    code, _, err = run(capsys, *given, "-o", "wrong", "--input", "1xfoo")
    assert code == 2
    assert "1xfoo" in err
    assert not (here / "wrong").exists()


@pytest.mark.onnx
def test_data_is_used_for_the_example_and_the_check(here, capsys):
    rows = np.random.default_rng(0).standard_normal((40, 48)).astype(np.float32)
    np.savez(here / "data.npz", input=rows, labels=np.zeros(40, dtype=np.int64))
    code, _, err = run(capsys, "model.pt", "--bond-dim", "8", "--data", "data.npz")
    assert (code, err) == (0, "")
    report = mpo.CompressionReport.load(here / "model-mpo")
    assert report.parity is not None
    assert report.parity.passed
    np.savez(here / "wrong.npz", input=rows[:, :40])
    code, _, err = run(capsys, "model.pt", "--bond-dim", "8", "--data", "wrong.npz", "-o", "w")
    assert code == 2
    assert not (here / "w").exists()


class Foreign:
    def __reduce__(self):
        return (Path.write_text, (Path("owned.txt"), "code ran"))


def _bad_weight(value: float) -> nn.Module:
    model = network()
    with torch.no_grad():
        model[0].weight[1, 2] = value
    return model


BAD = {
    "missing file": (lambda: "nothing.pt", (), "nothing.pt does not exist"),
    "empty file": (lambda: _write("empty.pt", b""), (), r"empty.pt is empty \(0 bytes\)"),
    "truncated pt": (
        lambda: _write("cut.pt", Path("model.pt").read_bytes()[:900]),
        (),
        "cut.pt",
    ),
    "truncated safetensors": (
        lambda: _truncated_safetensors(),
        (),
        "cut.safetensors",
    ),
    "foreign class": (
        lambda: _save("foreign.pt", Foreign()),
        (),
        "foreign.pt.*--trust-pickle",
    ),
    "NaN weights": (lambda: _save("nan.pt", _bad_weight(float("nan"))), (), "NaN or Inf"),
    "Inf weights": (lambda: _save("inf.pt", _bad_weight(float("inf"))), (), "NaN or Inf"),
    "bond dim 0": (lambda: "model.pt", ("--bond-dim", "0"), "bond_dim 0.*at least 1"),
    "bond dim -3": (lambda: "model.pt", ("--bond-dim", "-3"), "bond_dim -3.*at least 1"),
    "layout": (
        lambda: "model.pt",
        ("--layout", "3x5,7x11"),
        "multiply to 21, but the matrix of shape 64x48",
    ),
    "unreadable layout": (lambda: "model.pt", ("--layout", "big"), "cannot read 'big'"),
    "unmatched pattern": (lambda: "model.pt", ("--include", "encoder.*"), r"encoder\.\*"),
    "nothing to compress": (lambda: _save("relu.pt", nn.Sequential(nn.ReLU())), (), "no layer"),
    "nothing gets smaller": (
        lambda: _save("tiny.pt", nn.Sequential(nn.Linear(4, 4))),
        (),
        "nothing to compress",
    ),
    "unwritable output": (lambda: "model.pt", ("-o", "model.pt/out"), "cannot write to"),
    "output is a file": (lambda: "model.pt", ("-o", "model.pt"), "is a file"),
    "wrong input": (lambda: "model.pt", ("--input", "1x47"), "1x47"),
    "missing data of a plan": (
        lambda: _onnx("graph.onnx"),
        ("--dry-run", "--data", "no.npz"),
        "no.npz does not exist",
    ),
    "input of a plan": (
        lambda: _onnx("graph.onnx"),
        ("--dry-run", "--input", "1x47"),
        "47",
    ),
    "missing data": (lambda: "model.pt", ("--data", "no.npz"), "no.npz does not exist"),
}


def _write(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return name


def _onnx(name: str) -> str:
    mpo.export_onnx(network(), name, torch.randn(2, 48))
    return name


def _save(name: str, model: nn.Module) -> str:
    torch.save(model, name)
    return name


def _truncated_safetensors() -> str:
    save_file(network().state_dict(), "whole.safetensors")
    return _write("cut.safetensors", Path("whole.safetensors").read_bytes()[:200])


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_2_with_a_useful_line_and_leaves_nothing(here, capsys, case):
    prepare, options, message = BAD[case]
    model = prepare()
    before = {path.name: path.stat().st_mtime_ns for path in here.iterdir()}
    if "--bond-dim" not in options:
        options = ("--bond-dim", "8", *options)
    code, out, err = run(capsys, model, *options)
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 3
    assert re.search(message, err, re.DOTALL), err
    assert {path.name: path.stat().st_mtime_ns for path in here.iterdir()} == before


def test_usage_errors(here, capsys):
    assert run(capsys, "model.pt")[0] == 2
    assert run(capsys, "model.pt", "--bond-dim", "many")[0] == 2
    assert run(capsys, "model.pt", "--no-such-option")[0] == 2
    assert run(capsys, "densify")[0] == 2
    for wrong in ("--bond-dim=many", "--no-such-option"):
        code, out, err = run(capsys, "model.pt", wrong, "--json")
        found = json.loads(out)["error"]
        assert (code, found["exit_code"], found["type"]) == (2, 2, "UsageError")
        assert wrong.split("=")[0] in found["message"]
        assert found["message"] in err
    assert run(capsys, "report", "--help", "--json")[0] == 0
    code, _, err = run(capsys, "report", "nowhere")
    assert code == 2
    assert "report.json" in err


def test_parity_failure_exits_3_and_publishes_nothing(here, capsys, monkeypatch):
    from mpocompress.pipeline import onnx_files

    verify = onnx_files.verify
    monkeypatch.setattr(
        onnx_files, "verify", lambda *args, **kwargs: verify(*args, **kwargs, tolerance=0.0)
    )
    code, _, err = run(capsys, "model.pt", "--bond-dim", "8")
    assert code == 3
    assert "tolerance" in err
    assert [path.name for path in here.iterdir()] == ["model.pt"]


def test_unexpected_errors_have_no_traceback(here, capsys, monkeypatch):
    from mpocompress import pipeline

    def explode(*_args, **_kwargs):
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(pipeline, "convert", explode)
    monkeypatch.delenv("MPOCOMPRESS_TRACEBACK", raising=False)
    code, _, err = run(capsys, "model.pt", "--bond-dim", "8")
    assert code == 1
    assert "unexpected ZeroDivisionError: surprise" in err
    monkeypatch.setenv("MPOCOMPRESS_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["model.pt", "--bond-dim", "8"])


def test_a_run_that_is_ended_leaves_nothing(here, capsys, monkeypatch):
    from mpocompress.pipeline import onnx_files

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(onnx_files, "verify", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        main(["model.pt", "--bond-dim", "8", "-o", "out"])
    assert stop.value.code == 128 + signal.SIGTERM
    assert [path.name for path in here.iterdir()] == ["model.pt"]
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-error", "0.1", "--quantize", "int8"), "--max-error 0.1 is measured on float32"),
        (("--max-drop", "0.1", "--quantize", "int4"), "--max-drop 0.1 is measured on float32"),
    ],
)
def test_budgets_do_not_go_with_rounding_after_them(here, capsys, options, message):
    code, _, err = run(capsys, "model.pt", *options)
    assert code == 2
    assert message in err
    assert [path.name for path in here.iterdir()] == ["model.pt"]


def test_without_an_onnx_file_there_is_nothing_to_quantize(here, capsys):
    torch.save(torch.load("model.pt", weights_only=False).state_dict(), "state.pt")
    for option in ("--quantize", "int8"), ("--form", "dense"):
        code, _, err = run(capsys, "state.pt", "--bond-dim", "4", *option)
        assert code == 2
        assert f"{option[0]} {option[1]} is for the ONNX file: a bare state dict cannot" in err


def test_version_and_help(capsys):
    assert run(capsys, "--version")[1].strip() == f"mpocompress {mpo.__version__}"
    for command in ("compress", "inspect", "report", "densify"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0
        assert "Usage" in out
    assert "0 done; 1 the run failed; 2 usage" in run(capsys, "--help")[1]


def test_module_form_runs(here):
    done = subprocess.run(
        [sys.executable, "-m", "mpocompress", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("mpocompress ")


@pytest.mark.onnx
def test_ratio_is_a_ceiling_for_what_is_written(here, capsys):
    rows = np.random.default_rng(0).standard_normal((40, 48)).astype(np.float32)
    np.savez(here / "data.npz", input=rows)
    for name, options in {"plain": (), "fitted": ("--data", "data.npz")}.items():
        given = ("model.pt", "--ratio", "3", "--of", "layers", "-o", name, *options)
        code, _, err = run(capsys, *given)
        assert (code, err) == (0, "")
        report = mpo.CompressionReport.load(here / name)
        assert 3 <= report.totals.parameters.layers.ratio < 3.3
        assert report.settings["ratio"] == 3
    code, out, _ = run(capsys, "model.pt", "--ratio", "3", "--dry-run", "--data", "data.npz")
    assert code == 0
    assert "ratio of 3 of the model" in " ".join(out.split())


def test_impossible_ratio_exits_3_and_leaves_nothing(here, capsys):
    code, _, err = run(capsys, "model.pt", "--ratio", "1000")
    assert code == 3
    assert re.search(r"ratio of 1000 of the model cannot be met: .* it is \d", err)
    assert [path.name for path in here.iterdir()] == ["model.pt"]


def test_bond_dim_or_ratio(here, capsys):
    for options in ((), ("--ratio", "2", "--bond-dim", "8")):
        code, _, err = run(capsys, "model.pt", *options)
        assert code == 2
        assert "of --bond-dim, --ratio, --max-size, --max-error and --max-drop" in err
    assert run(capsys, "model.pt", "--ratio", "0.5")[0] == 2
    assert run(capsys, "model.pt", "--ratio", "2", "--of", "bytes")[0] == 2


HUGE = "9" * 400


@pytest.mark.parametrize(
    "arguments",
    [
        ["model.pt", "--bond-dim", "8", "--seed", HUGE],
        ["model.pt", "--bond-dim", "8", "--batch", HUGE],
        ["model.pt", "--bond-dim", "8", "--sites", HUGE],
        ["model.pt", "--bond-dim", "8", "--data", "data.npz", "--distill", HUGE],
        ["model.pt", "--bond-dim", "8", "--data", "data.npz", "--sweeps", HUGE],
        ["model.pt", "--bond-dim", "8", "--input", "99999999999999999999x64"],
        ["model.pt", "--bond-dim", "8", "-o", "o" * 300],
        ["model.pt", "--bond-dim", "8", "-o", "o" * 250],
        ["model.pt", "--bond-dim", "8", "-o", "o" * 300, "--resume"],
        ["model.pt", "--bond-dim", "8", "-o", "lost"],
        ["o" * 300, "--bond-dim", "8"],
        ["inspect", "o" * 300],
        ["densify", "cores", "-o", "o" * 300 + ".pt"],
        ["densify", "cores", "-o", "nowhere/x.pt"],
        ["densify", "cores", "-o", "cores", "--force"],
        ["export", "cores", "--source", "model.pt", "-o", "nowhere/x.onnx"],
        ["export", "cores", "--source", "model.pt", "--seed", HUGE],
        ["verify", "o" * 300, "--against", "model.pt"],
        ["bench", "model.onnx", "--threads", "99999999999999"],
        ["bench", "model.onnx", "--batch", f"1,{HUGE}"],
        ["bench", "model.onnx", "--repeats", HUGE],
        ["bench", "model.onnx", "--length", HUGE],
    ],
    ids=lambda arguments: " ".join(word if len(word) < 30 else word[:3] for word in arguments),
)
def test_impossible_numbers_and_places_are_mistakes_in_usage(here, capsys, arguments):
    """Refused before any work, and never as something unexpected."""
    np.savez("data.npz", x=torch.randn(8, 48).numpy())
    (here / "lost").symlink_to("nothing")
    mpo.save(mpo.compress(network(), bond_dim=8), here / "cores")
    before = {path.name for path in here.iterdir()}
    code, _, err = run(capsys, *arguments)
    assert code == 2, err
    assert "unexpected" not in err
    assert {path.name for path in here.iterdir()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("arguments", [["inspect", "model.pt", "--json"], ["inspect", "model.pt"]])
def test_a_full_disk_behind_the_standard_output(here, arguments):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mpocompress", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("mpocompress: cannot write the output: No space left on device.")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("names", []),
        ("dense_shape", [7, 7]),
        ("bond_dims", [-8]),
        ("bond_dims", [8, 8]),
        ("layout", [[7, 1], [1, 7]]),
        ("shape", [0, 48]),
    ],
)
def test_an_edited_manifest_is_refused(here, capsys, field, value):
    mpo.save(mpo.compress(network(), bond_dim=8, layout="svd"), here / "cores")
    file = here / "cores" / "model.mpo.safetensors"
    manifest = json.loads(read_manifest(file).model_dump_json())
    manifest["layers"][0][field] = value
    save_file(load_file(file), file, metadata={"mpocompress": json.dumps(manifest)})
    code, _, err = run(capsys, "densify", "cores")
    assert code == 2
    assert "the manifest of 'model.mpo.safetensors' is malformed: layers.0" in err
