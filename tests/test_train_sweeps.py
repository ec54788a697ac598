"""Sweeps from the start, in all layers at once: gradients, the way they go, what goes on."""

import copy
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import mpocompress as mpo
from mpocompress.layers import MPOLinear
from mpocompress.loading import Batch
from mpocompress.mpo import Layout
from mpocompress.tuning import TrainOptions
from mpocompress.tuning.minibatches import TrainingData
from mpocompress.tuning.sweeps.chains import find_chains
from mpocompress.tuning.sweeps.local_problem import LocalProblem
from mpocompress.tuning.training.methods import SweepMethod
from tests.planted import gaussian, random_chain, seeded
from tests.tolerances import TOL, TRAJECTORY

F64 = TOL[torch.float64]


def network(dropout=0.0) -> nn.Sequential:
    """16 -> 16 -> 24 -> 1, MPO layers of two and of three sites, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(24, 1)
    layers = [
        MPOLinear(a, b, layout=layout, bond_dim=3, generator=seeded(seed))
        for seed, (a, b, layout) in enumerate([(16, 16, "4x4,4x4"), (16, 24, "2x2,3x2,4x4")])
    ]
    first, second = layers
    model = nn.Sequential(first, nn.Tanh(), nn.Dropout(dropout), second, nn.Tanh(), head)
    return model.double()


def rows(count=256):
    x = gaussian(count, 16)
    return x, (x[:, 0] * x[:, 1]).tanh()


def losses(result):
    return [record.validation_loss for record in result.history]


@pytest.mark.parametrize("manual", [False, True])
def test_gradients_with_all_layers_open_are_those_of_their_cores(manual):
    model = network()
    x, y = rows(20)
    chains = list(find_chains(model).values())
    sites = (1, 2)
    for chain, site in zip(chains, sites, strict=True):
        chain.move_center_(site, site)
    cores = [chain.layers[0].cores[site] for chain, site in zip(chains, sites, strict=True)]
    expected = torch.autograd.grad((model(x)[:, 0] - y).square().mean(), cores)
    problems = [
        LocalProblem(chain, site, site, calls=1) for chain, site in zip(chains, sites, strict=True)
    ]
    with ExitStack() as opened:
        for problem in problems:
            opened.enter_context(problem.opened(manual=manual))
        loss = (model(x)[:, 0] - y).square().mean()
        found = torch.autograd.grad(loss, [problem.core for problem in problems])
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, **F64["gradient"])


@pytest.mark.parametrize(
    ("width", "short", "long"),
    [
        (1, [0, 1, 1, 0, 0, 1, 1, 0, 0], [0, 1, 2, 2, 1, 0, 0, 1, 2]),
        (2, [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1]),
    ],
)
def test_every_layer_goes_there_and_back_on_its_own(width, short, long):
    model = network()
    calls = [Batch(args=rows(64)[:1], labels=rows(64)[1])]
    data = TrainingData(calls, batch_size=1, held_out=0.0, seed=0, labelled=True)
    options = TrainOptions(sites=width, local_steps=4, epochs=2, train_dense=False)
    method = SweepMethod(list(find_chains(model).values()), [], data, lambda _: None, options)
    visits = [visit for sweep in range(3) for visit in method._visits(sweep)]
    assert [first.first for first, _ in visits] == short
    assert [second.first for _, second in visits] == long
    assert all(visit.last == visit.first + width - 1 for both in visits for visit in both)
    places = 4 - width
    turns = [number // places % 2 == 0 for number in range(len(visits))]
    assert [second.to_the_right for _, second in visits] == turns


@pytest.mark.parametrize("sites", [1, 2, "grow", "adam"])
def test_every_method_sees_as_many_rows(sites):
    seen = []

    def counted(model, batch):
        seen.append(batch.rows)
        return model(*batch.args).square().mean()

    options = {"method": "adam"} if sites == "adam" else {"sites": sites, "local_steps": 5}
    result = mpo.train(
        network(), rows(), loss=counted, epochs=11, batch_size=32, validation=0, **options
    )
    assert sum(seen[1:]) == 11 * 256  # the first is the look at the start
    assert result.history[-1].epoch == 11
    assert len(result.history) - 1 <= 11


def test_two_sweeps_are_the_least():
    model = network()
    before = copy.deepcopy(model)
    mpo.train(model, rows(64), epochs=1, validation=0)
    for position in (0, 3):
        for old, new in zip(before[position].cores, model[position].cores, strict=True):
            assert not torch.equal(old, new)


def test_the_gauge_of_the_start_does_not_matter():
    """Steps are relative to the size of the whole matrix, however the cores share it."""
    model = network()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[0].cores[0].mul_(1000)
        scaled[0].cores[1].div_(1000)
        scaled[3].cores[1].mul_(-0.1)
        scaled[3].cores[2].mul_(-10)
    found = [losses(mpo.train(each, rows(), epochs=4)) for each in (model, scaled)]
    assert found[0] == pytest.approx(found[1], rel=TRAJECTORY["rtol"])
    assert found[0][-1] < found[0][0]


def test_bonds_larger_than_their_sites_allow_are_cut_on_the_way():
    model = network()
    layout = Layout((2, 3, 4), (2, 2, 4))
    model[3] = MPOLinear.from_mpo(mpo.MPO(random_chain(layout, (9, 40))), torch.zeros(24).double())
    result = mpo.train(model, rows(), epochs=8, learning_rate=0.01)
    assert result.history[-1].bond_dims["3"] == (4, 16)
    assert losses(result)[-1] < losses(result)[0]


@pytest.mark.parametrize("sites", [1, 2])
def test_frozen_cores_keep_their_values_while_all_others_are_trained(sites):
    model = network()
    model[3].cores[0].requires_grad_(False)
    before = copy.deepcopy(model)
    options = {"sites": sites} if sites == 1 else {"sites": sites, "bond_dim": 4}
    result = mpo.train(model, rows(), epochs=12, **options)
    assert losses(result)[-1] < losses(result)[0]
    assert torch.equal(before[3].cores[0], model[3].cores[0])
    assert not model[3].cores[0].requires_grad
    assert model[3].bond_dims == ((3, 3) if sites == 1 else (3, 4))
    for old, new in zip(before[3].cores[1:], model[3].cores[1:], strict=True):
        assert not torch.equal(old, new)


class InterruptedTrainingError(Exception):
    pass


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sites", [1, 2, "grow"])
def test_an_interrupted_training_of_several_layers_ends_as_if_it_had_not_been(
    tmp_path, sites, frozen
):
    options = {"sites": sites, "local_steps": 4, "epochs": 9}
    if sites != 1:
        options["bond_dim"] = 4

    def stop(what, done, total):
        if done == total - 2:
            raise InterruptedTrainingError

    whole, halves = network(0.1), network(0.1)
    for model in (whole, halves):
        model[3].cores[1].requires_grad_(not frozen)
    expected = mpo.train(whole, rows(), **options)
    with pytest.raises(InterruptedTrainingError):
        mpo.train(halves, rows(), progress=stop, checkpoint=tmp_path / "state", **options)
    found = mpo.train(halves, rows(), checkpoint=tmp_path / "state", **options)
    assert found == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(value, halves.state_dict()[name]), name
