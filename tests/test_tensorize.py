"""Untrained models with MPO layers: which layers, at what scale, and what is kept."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import mpocompress as mpo
from mpocompress.errors import BondDimError, LayoutError, NoLayerMatched
from mpocompress.layers import MPOLinear
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
