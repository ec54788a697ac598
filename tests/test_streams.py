"""Residual streams that a layer's output is weighed against: scaled, subtracted, or changed."""

import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.loading import Batch
from mpocompress.tuning.fitting.residual import StreamWatcher
from mpocompress.tuning.lockstep import Runner, stopping_layers
from tests.planted import gaussian

# How a stream h and an output y are put together, and the weight of h relative to y.
WAYS = {
    "h + y": (lambda h, y: h + y, 1.0),
    "y + h": (lambda h, y: y + h, 1.0),
    "h - y": (lambda h, y: h - y, -1.0),
    "y - h": (lambda h, y: y - h, -1.0),
    "h + 3 y": (lambda h, y: torch.add(h, y, alpha=3), 1 / 3),
    "y + 2 h": (lambda h, y: torch.add(y, h, alpha=2), 2.0),
    "h - y, in place": (lambda h, y: h.clone().sub_(y), None),
    "h += 4 y": (lambda h, y: h.add_(y, alpha=4), 0.25),
    "h + y / 2": (lambda h, y: h + y / 2, 2.0),
    "h - 0.5 y": (lambda h, y: h - 0.5 * y.view_as(h), -2.0),
    "h + 0 y": (lambda h, y: torch.add(h, y, alpha=0), None),
    "h + relu(y)": (lambda h, y: h + torch.relu(y), None),
    "h + relu(y), in place": (lambda h, y: h + torch.relu_(y), None),
    "h + y, scaled in place": (lambda h, y: h + y.mul_(3.0), None),
}


class Residual(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 8)
        self.join = WAYS[way][0]

    def forward(self, x):
        h = self.first(x)
        return self.head(self.join(h, self.second(torch.tanh(h))))


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_streams_are_found(way):
    model, watcher = Residual(way).eval(), StreamWatcher()

    def compute(layer, runner, value):
        return runner.call_layer(layer, lambda v: type(layer).forward(layer, v), value)

    runner = Runner(model, Batch(args=(gaussian(6, 24, seed=0).float(),)), watcher)
    with stopping_layers([model.first, model.second], compute), torch.no_grad():
        runner.start()
    found, expected = watcher.take_stream(model.second), WAYS[way][1]
    assert (found is None) == (expected is None)
    assert found is None or found.weight == pytest.approx(expected)


@pytest.mark.parametrize(
    "way", ["h - y", "y - h", "h + 3 y", "y + 2 h", "h += 4 y", "h + y / 2", "h - 0.5 y"]
)
def test_what_is_lost_of_a_stream_is_made_good_by_its_weight(way):
    """It was added to the output whatever its weight was, in h - y with the wrong sign."""
    model = Residual(way).eval()
    x = (gaussian(2000, 24, seed=1) @ gaussian(24, 24, seed=2) * 0.3).float()
    errors = []
    for repair in (False, True):
        options = {"bond_dim": 6, "include": ["first", "second"], "if_smaller": False, "seed": 0}
        found = compressed(model, list(x[:1000].split(100)), options, repair)
        with torch.no_grad():
            expected, outputs = model(x[1000:]), found(x[1000:])
        errors.append(float((outputs - expected).norm() / expected.norm()))
    assert errors[1] < 0.75 * errors[0]


def compressed(model, data, options, repair):
    """The compressed model, with streams repaired or left as they are."""
    with pytest.MonkeyPatch.context() as patch:
        if not repair:
            patch.setattr(StreamWatcher, "take_stream", lambda watcher, layer: None)
        return mpo.compress(model, data=data, **options).model
