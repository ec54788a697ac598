"""The tutorials and benchmarks of tensor networks from scratch, run small, as a user runs them."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("classification", ["--epochs", 6], "of 360 test images right"),
        ("regression", ["--epochs", 2, "--rows", 300], "adam: R^2"),
        ("hybrid", ["--epochs", 2], "bond 8: "),
    ],
)
def test_examples_run_and_draw(tmp_path, name, arguments, said):
    plot = tmp_path / "plot.png"
    finished = run(f"examples/tnn/{name}.py", *arguments, "--plot", plot)
    assert finished.returncode == 0, finished.stderr
    assert said in finished.stdout
    assert plot.stat().st_size > 1000


def test_scaling_is_measured_fitted_and_drawn(tmp_path):
    out, plot = tmp_path / "scaling.json", tmp_path / "scaling.svg"
    finished = run(
        "benchmarks/tnn_scaling.py", "--exponents", 6, 9, "--steps", 3, "--out", out, "--plot", plot
    )
    assert finished.returncode == 0, finished.stderr
    content = json.loads(out.read_text(encoding="utf-8"))
    assert [row["width"] for row in content["layers"]["MPO"]] == [64, 128, 256, 512]
    assert content["exponents"]["dense"]["parameters"] == pytest.approx(2, abs=0.05)
    assert content["exponents"]["dense"]["macs"] == pytest.approx(2)
    assert plot.stat().st_size > 1000


def test_runs_are_added_and_not_repeated(tmp_path):
    out = tmp_path / "runs.json"
    arguments = ["--epochs", 1, "--rows", 100, "--seeds", 0, "--out", out]
    small = ["--datasets", "diabetes", "--methods", "small dense", "TNN, Adam"]
    first = run("benchmarks/tnn_regression.py", *small, *arguments)
    assert first.returncode == 0, first.stderr
    again = run("benchmarks/tnn_regression.py", *small, "TNN, sweeps", *arguments)
    assert again.returncode == 0, again.stderr
    assert "TNN, Adam, seed 0" not in again.stdout
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert [found["method"] for found in runs] == ["small dense", "TNN, Adam", "TNN, sweeps"]


def test_the_small_dense_network_has_at_most_as_many_parameters(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    methods = importlib.import_module("tnn_methods")
    none = torch.zeros(1, 64)
    problem = methods.Problem(
        "made up", none, none[:, 0].long(), none, none[:, 0].long(), outputs=10,
        layouts=("16x8,16x8", "16x16,16x16"), bond_dim=4, epochs=1, tuning_epochs=1,
    )  # fmt: skip
    budget = methods.count(methods.tensor_network(problem))
    small = methods.small_dense(problem)
    assert methods.count(small) <= budget
    assert methods.count(methods.dense(problem, small[0].out_features + 1)) > budget
