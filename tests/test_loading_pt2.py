"""Programs of torch.export as input: safe by default, and with their linear layers back."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.cli import main
from mpocompress.errors import LoadError, UnsafeCheckpointError
from mpocompress.loading import load_source
from tests.tolerances import TOL

EXACT = TOL[torch.float32]["apply"]


class Net(nn.Module):
    """A layer used twice under two names, one without a bias, and one that nothing calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.norm = nn.Linear(48, 64), nn.LayerNorm(64)
        self.fc2, self.back = nn.Linear(64, 40, bias=False), nn.Linear(40, 64)
        self.again, self.unused = self.fc2, nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(40))

    def forward(self, x):
        hidden = self.fc2(self.norm(self.fc1(x).relu())) + self.shift
        return {"scores": self.again(self.back(hidden)), "hidden": hidden}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Net().eval(), (torch.randn(3, 48),), dynamic_shapes=(rows,))
    torch.export.save(program, tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def test_a_program_is_not_read_unless_it_is_trusted(path):
    with pytest.raises(UnsafeCheckpointError, match=r"may run code from it.*--trust-pickle"):
        load_source(path)


def test_layers_come_back_and_compute_the_same(path):
    source = load_source(path, trust_pickle=True)
    module = source.module
    layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    assert {name: tuple(layer.weight.shape) for name, layer in layers.items()} == {
        "fc1": (64, 48),
        "again": (40, 64),
        "back": (64, 40),
    }
    assert source.format == "torch exported program"
    assert source.notes == (
        "left aside, as the program does not use it: fc2.weight, unused.bias, unused.weight",
    )
    for rows in (1, 5):
        x = torch.randn(rows, 48)
        expected, found = Net().eval()(x), module(x)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], **EXACT)


def test_it_is_fitted_and_healed_like_any_model(path):
    module = load_source(path, trust_pickle=True).module
    torch.manual_seed(1)
    batches = [torch.randn(64, 48) for _ in range(4)]

    def error(model):
        with torch.no_grad():
            return sum(float((model(x)["scores"] - module(x)["scores"]).norm()) for x in batches)

    options = {"bond_dim": 12, "layout": "svd"}
    blind, fitted = mpo.compress(module, **options), mpo.compress(module, **options, data=batches)
    assert error(fitted.model) < error(blind.model)
    before = error(fitted.model)
    mpo.distill(fitted, reference=module, data=batches, steps=30)
    assert error(fitted.model) < before


@pytest.mark.onnx
def test_one_command(path, capsys):
    np.savez("data.npz", x=np.random.default_rng(0).standard_normal((40, 48)))
    arguments = ["--bond-dim", "8", "--data", "data.npz", "--trust-pickle", "-o", "out"]
    with pytest.raises(SystemExit) as stop:
        main(["net.pt2", *arguments])
    assert stop.value.code == 0
    streams = capsys.readouterr()
    assert "agrees with PyTorch" in streams.out
    assert "Warning" not in streams.err
    report = json.loads((path.parent / "out" / "report.json").read_text())
    compressed = [layer for layer in report["layers"] if layer["status"] == "compressed"]
    assert [layer["name"] for layer in compressed] == ["fc1", "again", "back"]
    assert report["parity"]["outputs"] == ["scores", "hidden"]


@pytest.mark.parametrize("content", [b"", b"not a program", b"PK\x03\x04"])
def test_damaged_programs_are_refused(tmp_path, content):
    (tmp_path / "net.pt2").write_bytes(content)
    with pytest.raises(LoadError, match=r"is empty|cannot be read as a program of torch\.export"):
        load_source(tmp_path / "net.pt2", trust_pickle=True)
