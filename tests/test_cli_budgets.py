"""Budgets and objectives on the command line: what is published, and what a refusal leaves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mpocompress as mpo
from tests.test_cli import run


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPOCOMPRESS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.Tanh(), nn.Linear(128, 64)).eval()
    torch.save(model, "model.pt")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(320, 96, generator=generator) * torch.exp(-torch.arange(96) / 12)
    with torch.no_grad():
        np.savez("data.npz", input=x.numpy(), labels=model(x).argmax(-1).numpy())
    return tmp_path


@pytest.mark.onnx
def test_a_size_is_a_ceiling_of_the_published_file(here, capsys):
    code, _, err = run(capsys, "model.pt", "--max-size", "40kB", "--input", "1x96", "-o", "out")
    assert (code, err) == (0, "")
    written = (here / "out" / "model.onnx").stat().st_size
    assert 0.96 * 40_000 <= written <= 40_000
    report = mpo.CompressionReport.load(here / "out")
    assert report.budget.reached == written
    assert report.settings["max_size"] == 40_000


@pytest.mark.onnx
def test_an_error_and_a_drop_are_met_and_reported(here, capsys):
    for name, given in (("error", ("--max-error", "0.2")), ("drop", ("--max-drop", "0.1"))):
        code, _, _ = run(capsys, "model.pt", *given, "--data", "data.npz", "-o", name)
        assert code == 0
        report = mpo.CompressionReport.load(here / name)
        assert report.budget.target == f"max_{name}"
        assert report.budget.reached <= report.budget.asked
        assert "was asked for" in (here / name / "report.md").read_text()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--max-size", "1kB", "--input", "1x96"), "with bond dimension 1 everywhere it has"),
        (("--max-error", "1e-9", "--data", "data.npz"), "the least that was found is"),
        (("--max-error", "1e-9"), "within a weight error of 1e-09: the least that was found is"),
        (("--max-drop", "0", "--ratio", "2"), None),
        (("--ratio", "500"), "with bond dimension 1 everywhere it is"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.onnx
def test_what_cannot_be_met_exits_3_with_the_reachable_figure(here, capsys, given, words):
    before = {path.name for path in here.iterdir()}
    code, out, err = run(capsys, "model.pt", *given, "-o", "out")
    assert code == (2 if words is None else 3)
    assert (words or "both say how small") in err
    assert out == ""
    assert {path.name for path in here.iterdir()} == before


def test_a_dry_run_predicts(here, capsys):
    code, out, _ = run(capsys, "model.pt", "--ratio", "3", "--data", "data.npz", "--dry-run")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("Predicted:"))
    parameters = 96 * 128 + 128 + 128 * 64 + 64
    assert f"parameters {parameters:,} -> " in line
    assert "change of the model's outputs 0." in line


@pytest.mark.onnx
def test_a_dry_run_by_latency_has_times(here, capsys):
    given = ("--ratio", "3", "--of", "layers", "--objective", "macs", "--dry-run")
    code, out, _ = run(capsys, "model.pt", *given)
    assert code == 0
    assert "µs" not in out
    given = ("--bond-dim", "2", "--objective", "latency", "--dry-run")
    code, out, err = run(capsys, "model.pt", *given)
    assert code == 0, err
    assert "µs of dense" in out
    assert "time of these layers" in out
    assert (here / "cache" / "latency.json").exists()
