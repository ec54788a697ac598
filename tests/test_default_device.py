"""What a caller sets as torch's default device is where nothing of a run ends up by accident."""

import pytest
import torch
from torch import nn

import mpocompress as mpo


@pytest.fixture
def elsewhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def small() -> tuple[nn.Module, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 24, generator=generator, device="cpu")
    with torch.device("cpu"):
        return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)), list(x.split(40))


@pytest.mark.parametrize(
    "options",
    [
        {"bond_dim": 4},
        {"ratio": 2, "sweeps": 2},
        {"max_error": 0.5},
        {"bond_dim": 4, "layout": "balanced", "distill": 4},
    ],
)
def test_compressing_with_data(options, elsewhere):
    dense, data = small()
    model = mpo.compress(dense, data=data, **options).model
    assert model(data[0]).device.type == "cpu"


@pytest.mark.onnx
@pytest.mark.parametrize("form", ["auto", "dense"])
def test_onnx_files(form, tmp_path, elsewhere):
    dense, data = small()
    model = mpo.compress(dense, bond_dim=4).model
    mpo.export_onnx(model, tmp_path / "model.onnx", data[0], form=form)
    mpo.verify(tmp_path / "model.onnx", model).raise_if_failed()


def test_training_with_data(elsewhere):
    dense, data = small()
    model = mpo.compress(dense, bond_dim=4).model
    mpo.sweep(model, reference=dense, data=data, sweeps=1)
    mpo.distill(model, reference=dense, data=data, steps=3)
    labelled = [(x, x[:, 0] > 0) for x in data]
    mpo.train(model, [(x, y.long()) for x, y in labelled], method="adam", epochs=1)
    assert all(p.device.type == "cpu" for p in model.parameters())
