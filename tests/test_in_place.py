"""Models that change tensors in place get the very same results as their twins that do not."""

import copy

import pytest
import torch
from torch import Tensor, nn

import mpocompress as mpo
from mpocompress.errors import DataError


class Block(nn.Module):
    def __init__(self, width: int, in_place: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(self.norm(x))))
        if self.in_place:
            x += y
            return x
        return x + y


class Stream(nn.Module):
    """A residual stream: `x += branch(x)` runs, but cannot be trained."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(24, 24), nn.Linear(24, 6)
        self.blocks = nn.Sequential(*(Block(24, in_place) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(torch.tanh(self.first(x))))


class Overwritten(nn.Module):
    """What one layer has read is changed before the next one reads it."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.last, self.in_place = nn.Linear(24, 6), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        u = self.a(x)
        if self.in_place:
            x[:, 8:].mul_(0.1)
        else:
            x = torch.cat([x[:, :8], 0.1 * x[:, 8:]], 1)
        return self.last(torch.tanh(u + self.b(x)))


def images(in_place: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (2, 3, 4)),
        nn.Conv2d(2, 12, 3, padding=1),
        nn.ReLU(inplace=in_place),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.ReLU(inplace=in_place),
        nn.Flatten(),
        nn.Linear(144, 32),
        nn.ReLU(inplace=in_place),
        nn.Linear(32, 6),
    )


MODELS = {"stream": Stream, "overwritten": Overwritten, "images": images}
OPTIONS = {
    "svd": {"bond_dim": 4, "layout": "svd"},
    "sites": {"bond_dim": 6, "sites": 2},
    "ratio": {"ratio": 2},
    "error": {"max_error": 0.3},
}


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(240, 24, generator=generator).split(60))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_in_place_is_out_of_place(model, options):
    found = [
        mpo.compress(MODELS[model](in_place).eval(), data=data(), **OPTIONS[options])
        for in_place in (False, True)
    ]
    plain, changed = ([layer.model_dump() for layer in result.report.layers] for result in found)
    assert plain == changed
    states = [result.model.state_dict() for result in found]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_data_are_not_changed_and_what_cannot_be_trained_is_not_healed():
    model, given = Stream(True).eval(), data()
    before = copy.deepcopy(given)
    result = mpo.compress(model, data=given, bond_dim=4, layout="svd")
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    state = {name: value.clone() for name, value in result.model.state_dict().items()}
    with pytest.raises(DataError, match="changes tensors in place that its gradients need"):
        mpo.distill(result, reference=model, data=given, steps=5)
    assert all(torch.equal(state[name], v) for name, v in result.model.state_dict().items())
