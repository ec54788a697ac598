"""Untrained models with MPO layers: which layers, at what scale, and what is kept."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import mpocompress as mpo
from mpocompress.errors import BondDimError, LayoutError, NoLayerMatched
from mpocompress.layers import MPOLinear
from mpocompress.layers.base import MPOLayer
from tests.planted import seeded
from tests.tolerances import TOL

F32 = TOL[torch.float32]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 144), nn.ReLU(), nn.Linear(144, 64), nn.Linear(64, 1))


def kinds(model):
    return [type(layer) for layer in model if not isinstance(layer, nn.ReLU)]


def test_layers_that_become_smaller_are_replaced_and_the_model_is_untouched():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensorized = mpo.tensorize(model, bond_dim=4)
    assert kinds(tensorized) == [MPOLinear, MPOLinear, nn.Linear]
    assert kinds(model) == [nn.Linear] * 3
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert tensorized[0].bond_dims == (4,)
    assert torch.equal(tensorized[0].bias, model[0].bias)
    assert tensorized(torch.ones(2, 64)).shape == (2, 1)


def test_the_initialization_of_the_dense_weights_lives_on():
    model = network()
    nn.init.kaiming_normal_(model[0].weight)
    tensorized = mpo.tensorize(model, sites=3, bond_dim=2, include=["0", "2"])
    for position in (0, 2):
        assert_close(
            tensorized[position].weight.square().mean(),
            model[position].weight.square().mean(),
            **F32["norm"],
        )
    scaled = mpo.tensorize(model, bond_dim=2, gain=1, include=["0"])
    assert_close(scaled[0].weight.square().mean(), torch.tensor(1 / 64), **F32["norm"])


def test_sites_and_a_layout_exclude_each_other():
    with pytest.raises(LayoutError, match="both force a layout"):
        mpo.tensorize(network(), sites=3, layout={"0": "svd"}, bond_dim=2)


def test_layers_that_are_named_are_replaced_even_if_they_grow():
    tensorized = mpo.tensorize(network(), bond_dim=None, layout={"3": "1x8,1x8"}, include=["3"])
    assert kinds(tensorized) == [nn.Linear, nn.Linear, MPOLinear]


def test_a_layout_for_each_pattern():
    tensorized = mpo.tensorize(
        network(), bond_dim=2, layout={"0": "12x8,12x8", "2": "4x4,4x6,4x6"}, exclude=["3"]
    )
    assert str(tensorized[0].layout) == "12x8,12x8"
    assert str(tensorized[2].layout) == "4x4,4x6,4x6"


def test_ties_stay_and_the_generator_decides():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    first = mpo.tensorize(model, bond_dim=2, generator=seeded(1))
    again = mpo.tensorize(model, bond_dim=2, generator=seeded(1))
    assert all(a is b for a, b in zip(first[0].cores, first[1].cores, strict=True))
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(
        first[0].weight, mpo.tensorize(model, bond_dim=2, generator=seeded(2))[0].weight
    )


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.middle, self.head = nn.Linear(32, 32), nn.Linear(32, 2)

    def forward(self, x):
        seen, _ = self.lstm(x)
        seen, _ = self.attention(seen, seen, seen)
        return self.head(torch.tanh(self.middle(seen[:, -1])))


def test_weights_that_no_layer_is_called_with_are_replaced_too():
    torch.manual_seed(0)
    model = Reader()
    whole = mpo.tensorize(model, bond_dim=4)
    names = [name for name, layer in whole.named_modules() if isinstance(layer, MPOLayer)]
    attention = [f"attention.{part}_proj" for part in ("q", "k", "v", "out")]
    assert names == ["lstm.ih_l0", "lstm.hh_l0", *attention, "middle"]
    assert isinstance(model.lstm, nn.LSTM)
    # What keeps its weights stays what it is.
    part = mpo.tensorize(model, bond_dim=4, include=["attention.q_proj", "middle"])
    assert isinstance(part.lstm, nn.LSTM)
    assert isinstance(part.attention.q_proj, MPOLinear)
    assert isinstance(part.attention.k_proj, nn.Linear)
    assert isinstance(mpo.tensorize(model, include=["middle"]).attention, nn.MultiheadAttention)


@pytest.mark.parametrize("method", ["dmrg", "adam"])
def test_such_models_are_trained(method):
    torch.manual_seed(0)
    x = torch.randn(400, 6, 8)
    y = (x[:, :, 0].sum(1) > 0).long()
    model = mpo.tensorize(Reader(), bond_dim=4)
    before = {name: value.clone() for name, value in model.named_parameters()}
    result = mpo.train(model, (x, y), method=method, epochs=8)
    assert result.kept.score > 0.75
    # The kernel reads rebuilt weights: sweeps pass the recurrence by, and it is trained along.
    assert "lstm.ih_l0" not in result.kept.bond_dims
    for name, value in model.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_a_recurrence_alone_is_trained_by_adam():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(16, 16), _Outputs())
    tensorized = mpo.tensorize(model, bond_dim=2)
    data = (torch.randn(60, 16), torch.randn(60, 16))
    with pytest.raises(NoLayerMatched, match='recurrent layers run on .*method="adam"'):
        mpo.train(tensorized, data, epochs=1)
    result = mpo.train(tensorized, data, method="adam", epochs=5)
    assert result.kept.validation_loss < result.history[0].validation_loss


class _Outputs(nn.Module):
    def forward(self, outputs):
        return outputs[0]


def test_refusals():
    with pytest.raises(NoLayerMatched, match="no layer would become smaller"):
        mpo.tensorize(network(), bond_dim=None)
    with pytest.raises(NoLayerMatched, match="include pattern 'nope'"):
        mpo.tensorize(network(), include=["nope"])
    with pytest.raises(LayoutError, match='"auto" is chosen by trained weights'):
        mpo.tensorize(network(), layout="auto")
    with pytest.raises(LayoutError, match=r"layer '0': layout 7x8,8x8"):
        mpo.tensorize(network(), layout="7x8,8x8", include=["0"])
    with pytest.raises(BondDimError, match="0"):
        mpo.tensorize(network(), bond_dim=0)
