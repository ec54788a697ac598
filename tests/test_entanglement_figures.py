"""Pictures of entanglement: what they draw is what was measured, and nobody's state changes."""

import io
import subprocess
import sys

import matplotlib
import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.analysis import (
    EntanglementRecorder,
    entanglement,
    profile_figure,
    spectra_figure,
    state_entanglement,
    state_figure,
    training_figure,
)
from mpocompress.errors import DataError


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 16), mpo.MPOLinear(16, 16, layout="2x2,4x4,2x2", bond_dim=3), nn.Linear(16, 4)
    )


def lines_of(axes):
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def png(figure):
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def test_profiles_show_the_entropies_and_the_maximum_of_every_layer():
    network = model()
    by_weight = entanglement(network)
    by_data = entanglement(network, metric="data", data=torch.randn(64, 16))
    figure = profile_figure(by_weight, compare=by_data)
    assert len(figure.axes) == 3
    for axes, layer in zip(figure.axes, by_weight.layers, strict=True):
        lines = lines_of(axes)
        assert lines["weight metric"] == list(layer.entropies_nats)
        assert lines["maximum"] == list(layer.capacities_nats)
        assert lines["data metric"] == list(by_data.layer(layer.name).entropies_nats)
        assert layer.growth.verdict in axes.get_title()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "maximum",
        "weight metric",
        "data metric",
    ]
    assert png(figure)[:4] == b"\x89PNG"


def test_spectra_are_relative_to_the_largest_value():
    found = entanglement(model())
    figure = spectra_figure(found)
    for axes, layer in zip(figure.axes, found.layers, strict=True):
        assert len(axes.lines) == len(layer.schmidt_values)
        for line in axes.lines:
            assert line.get_ydata()[0] == 1.0
            assert min(line.get_ydata()) >= 1e-7
    assert png(figure)


def test_training_has_one_line_for_each_bond():
    network = model()
    recorder = EntanglementRecorder(network)
    with torch.no_grad():
        for core in network[1].cores:
            core[..., 1:] *= 0.1
    recorder()
    figure = training_figure(recorder)
    axes = figure.axes[1]
    assert axes.get_title() == "layer 1"
    history = recorder.entropies_nats("1")
    assert lines_of(axes) == {
        "bond 0": [history[0][0], history[1][0]],
        "bond 1": [history[0][1], history[1][1]],
    }
    assert png(figure)


def test_states_stand_beside_page_and_product():
    states = {
        "cat": state_entanglement(lambda s: (s == s[:, :1]).all(1).double(), 6),
        "up": state_entanglement(lambda s: (s == 1).all(1).double(), 6),
    }
    figure = state_figure(states)
    lines = lines_of(figure.axes[0])
    assert lines["cat"] == list(states["cat"].entropies_nats)
    assert lines["Haar-random (Page)"] == list(states["cat"].page_nats)
    assert lines["product state"] == [0, 0]
    assert png(figure)
    other = state_entanglement(lambda s: s[:, 0], 3)
    with pytest.raises(DataError, match="the same number of sites"):
        state_figure({**states, "other": other})
    with pytest.raises(DataError, match="one or more states"):
        state_figure({})


def test_layers_without_a_bond_have_no_picture():
    found = entanglement(nn.Linear(4, 4), layout="4x4")
    for draw in (profile_figure, spectra_figure):
        with pytest.raises(DataError, match="no layer has a bond"):
            draw(found)
    recorder = EntanglementRecorder(
        nn.Linear(4, 4), measure=lambda layer: entanglement(layer, layout="4x4")
    )
    with pytest.raises(DataError, match="nothing was recorded"):
        training_figure(recorder)


def test_names_are_not_taken_for_formulas_and_styles_stay():
    odd = nn.Sequential()
    odd.add_module("a$b$c", nn.Linear(4, 4))
    before = dict(matplotlib.rcParams)
    figure = profile_figure(entanglement(odd))
    assert "a$b$c" in figure.axes[0].get_title()
    assert png(figure)
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_when_a_picture_is_drawn():
    check = (
        "import sys, torch, mpocompress as mpo\n"
        "found = mpo.analysis.entanglement(torch.nn.Linear(4, 4))\n"
        "assert 'matplotlib' not in sys.modules\n"
        "mpo.analysis.profile_figure(found)\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=False, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
