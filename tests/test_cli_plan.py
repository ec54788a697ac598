"""A plan on the command line: printed, edited, carried out; and what is no plan of the model."""

import json
import math
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.export import export_onnx
from tests.test_cli import run


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 32)).eval()
    torch.save(model, "model.pt")
    export_onnx(model, "graph.onnx", torch.randn(2, 48))
    generator = torch.Generator().manual_seed(1)
    np.savez("data.npz", input=torch.randn(240, 48, generator=generator).numpy())
    return tmp_path


def planned(capsys, *options, model="model.pt"):
    """What a dry run prints, as values; and the same in plan.json."""
    code, out, err = run(capsys, model, *options, "--dry-run", "--json")
    assert code == 0, err
    Path("plan.json").write_text(out)
    return json.loads(out)


@pytest.mark.onnx
@pytest.mark.parametrize("model", ["model.pt", "graph.onnx"])
def test_a_printed_plan_does_what_its_options_do(here, capsys, model):
    options = ("--bond-dim", "6", "--layout", "svd", "--exclude", "2")
    data = ("--data", "data.npz")
    planned(capsys, *options, *data, model=model)
    for name, given in (("options", options), ("plan", ("--plan", "plan.json"))):
        code, _, err = run(capsys, model, *given, *data, "--form", "chain", "-o", name)
        assert code == 0, err
    first, second = (mpo.CompressionReport.load(here / name) for name in ("options", "plan"))
    assert first.layers == second.layers
    assert first.settings == second.settings
    assert (here / "options/model.onnx").read_bytes() == (here / "plan/model.onnx").read_bytes()


@pytest.mark.onnx
def test_an_edited_plan_is_carried_out_and_shown(here, capsys):
    plan = planned(capsys, "--ratio", "3", "--data", "data.npz")
    plan["layers"][0] |= {"layout": [[8, 8], [8, 6]], "bond_dims": [5]}
    plan["layers"][1] |= {"action": "keep"}
    Path("plan.json").write_text(json.dumps(plan))
    code, out, _ = run(capsys, "model.pt", "--plan", "plan.json", "--dry-run")
    assert code == 0
    assert "8x8,8x6" in out
    assert not (here / "model-mpo").exists()
    code, out, _ = run(capsys, "model.pt", "--plan", "plan.json", "--dry-run", "--json")
    assert mpo.Plan.from_json(out) == mpo.Plan.load("plan.json")
    assert run(capsys, "model.pt", "--plan", "plan.json", "--data", "data.npz")[0] == 0
    report = mpo.CompressionReport.load(here / "model-mpo")
    assert [layer.name for layer in report.compressed_layers] == ["0"]
    assert report.compressed_layers[0].bond_dims == [5]


@pytest.mark.onnx
def test_the_precisions_of_a_plan_are_those_of_its_file(here, capsys):
    data = ("--data", "data.npz")
    planned(capsys, "--max-size", "9kB", "--quantize", "auto", *data)
    assert any(layer.rounds for layer in mpo.Plan.load("plan.json").compressed)
    code, _, err = run(capsys, "model.pt", "--plan", "plan.json", *data)
    assert code == 0, err
    assert (here / "model-mpo/model.onnx").stat().st_size <= 9000
    onnxruntime.InferenceSession("model-mpo/model.onnx", providers=["CPUExecutionProvider"])
    code, _, err = run(capsys, "model.pt", "--plan", "plan.json", "--quantize", "int8", "--force")
    assert code == 2
    assert "plan.json has a precision for each layer" in err
    code, _, err = run(capsys, "model.pt", "--plan", "plan.json", "--no-onnx", *data, "--force")
    assert code == 0, err
    # Another graph's plan, and what graphs cannot be.
    plan = planned(capsys, "--bond-dim", "4", model="graph.onnx")
    for edit in ({"precision": "int8"}, {"gauge": "identity"}):
        plan["layers"][0] |= edit
        Path("plan.json").write_text(json.dumps(plan))
        for extra in ((), ("--dry-run",)):
            code, _, err = run(capsys, "graph.onnx", "--plan", "plan.json", *extra, "-o", "g")
            assert code == 2
            assert re.search("layer '0': .* is for PyTorch models", err)


def test_what_decides_a_plan_is_refused_beside_one_by_name(here, capsys):
    planned(capsys, "--bond-dim", "4")
    for given, words in (
        (("--ratio", "4"), "so --ratio would not be looked at"),
        (
            ("--bond-dim", "4", "--of", "layers", "--layout", "svd", "--exclude", "0"),
            "so --bond-dim and --of and --layout and --exclude would not",
        ),
        (("--max-size", "9kB", "--quantize", "auto"), "so --max-size and --quantize would not"),
        (("--objective", "macs", "--sites", "3", "--include", "0"), "--objective and --sites and"),
        (("--max-error", "0.1", "--max-drop", "0.1"), "so --max-error and --max-drop would not"),
    ):
        for extra in ((), ("--dry-run",)):
            code, out, err = run(capsys, "model.pt", "--plan", "plan.json", *given, *extra)
            assert (code, out) == (2, "")
            assert words in err
            assert "--plan plan.json says what becomes of each layer" in err
    assert not (here / "model-mpo").exists()


def _first(plan, **changes):
    first, *rest = plan["layers"]
    return plan | {"layers": [first | changes, *rest]}


def _candidate(plan, **changes):
    candidates = plan["layers"][0]["candidates"]
    return _first(plan, candidates=[candidates[0] | changes])


BAD = {
    "not a file": (None, r"cannot read the plan 'bad.json'"),
    "empty": (lambda plan: "", "'bad.json' is not a plan: the file: Invalid JSON"),
    "no text": (lambda plan: b"\xff\xfe\x00", "cannot read the plan 'bad.json': 'utf-8'"),
    "nested": (lambda plan: "[" * 100_000, "Invalid JSON: recursion limit"),
    "a list": (lambda plan: "[]", "Input should be an object"),
    "another version": (lambda plan: plan | {"format_version": 9}, "plan format version 9"),
    "NaN": (lambda plan: plan | {"settings": {"a": math.nan}}, "settings must be plain JSON"),
    "unknown field": (lambda plan: plan | {"note": ""}, "note: Extra inputs"),
    "twice": (lambda plan: plan | {"layers": plan["layers"] * 2}, "layer '0' is listed 2 times"),
    "not all": (lambda plan: plan | {"layers": plan["layers"][:1]}, "says nothing of layer '2'"),
    "another name": (lambda plan: _first(plan, name="fc"), "names layer 'fc', which this model"),
    "another shape": (lambda plan: _first(plan, shape=[96, 48]), "layer '0'"),
    "another kind": (lambda plan: _first(plan, kind="conv"), "of kind 'conv' in the plan, but"),
    "no layout": (lambda plan: _first(plan, layout=None), "'compress' needs a layout"),
    "too small": (lambda plan: _first(plan, layout=[[8, 8], [4, 6]]), "layer '0': .* multiply to"),
    "too large": (lambda plan: _first(plan, layout=[[999, 8], [4, 99]]), "more than twice as much"),
    "beyond 64 bits": (lambda plan: _first(plan, layout=[[2**70, 1], [1, 1]]), "layout.0.0: "),
    "many sites": (
        lambda plan: _first(plan, layout=[[64, 48]] + [[1, 1]] * 999, bond_dims=[1] * 999),
        "layers.0.layout: .* at most 64 items",
    ),
    "bonds": (lambda plan: _first(plan, bond_dims=[2, 2]), "has 1 bonds, but bond_dims"),
    "bond of 0": (lambda plan: _first(plan, bond_dims=[0]), "bond_dims.0: .* greater than 0"),
    "candidate": (lambda plan: _candidate(plan, parameters=-1), "candidates.0.parameters: "),
    "candidate's bonds": (lambda plan: _candidate(plan, bond_dims=[1, 1]), "2 sites have 1 bonds"),
    "candidate's error": (lambda plan: _candidate(plan, loss=math.inf), "candidates.0.loss: "),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_plan_of_the_model_exits_2_and_says_why(here, capsys, case):
    make, message = BAD[case]
    plan = planned(capsys, "--bond-dim", "4")
    if make is not None:
        bad = make(plan)
        text = bad if isinstance(bad, str | bytes) else json.dumps(bad)
        Path("bad.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = {path.name for path in here.iterdir()}
    for extra in ((), ("--dry-run",)):
        code, out, err = run(capsys, "model.pt", "--plan", "bad.json", *extra)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        assert re.search(message, err), err
    assert {path.name for path in here.iterdir()} == before


@pytest.mark.onnx
def test_precisions_of_a_plan_need_no_onnx_file(here, capsys):
    planned(capsys, "--max-size", "9kB", "--quantize", "auto", "--data", "data.npz")
    torch.save(torch.load("model.pt", weights_only=False).state_dict(), "state.pt")
    code, _, err = run(capsys, "state.pt", "--plan", "plan.json")
    assert code == 0, err
    assert not (here / "state-mpo/model.onnx").exists()  # a state dict cannot be run


@pytest.mark.onnx
def test_a_plan_does_not_say_what_a_run_has_done(here, capsys):
    plan = planned(capsys, "--bond-dim", "4")
    plan["settings"] |= {"distill": {"held_out_loss": {}}, "rows_of_data": "many", "mine": 1}
    Path("plan.json").write_text(json.dumps(plan))
    assert run(capsys, "model.pt", "--plan", "plan.json")[0] == 0
    report = mpo.CompressionReport.load(here / "model-mpo")
    assert report.settings["mine"] == 1
    assert not {"distill", "rows_of_data"} & set(report.settings)


def test_a_run_is_not_resumed_by_another_plan(here, capsys, monkeypatch):
    plan = planned(capsys, "--bond-dim", "4")
    given = ("--plan", "plan.json", "--data", "data.npz", "--resume")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mpocompress.api.job.stored_weights", interrupt)
        code, _, err = run(capsys, "model.pt", *given)
        assert code == 130
        assert "the same command goes on from there" in " ".join(err.split())
        assert "With --resume" in run(capsys, "model.pt", "--bond-dim", "4", "-o", "other")[2]
    assert (here / "model-mpo.state").is_dir()
    plan["layers"][0]["bond_dims"] = [3]
    Path("plan.json").write_text(json.dumps(plan))
    code, _, err = run(capsys, "model.pt", *given)
    assert code == 2
    assert "plan" in err
