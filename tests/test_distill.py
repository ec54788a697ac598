"""Healing by distillation: the loss, the data, the blocks, the loop, the checkpoint, the report."""

import copy
import json
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import mpocompress as mpo
from mpocompress.cli import main
from mpocompress.errors import DataError, LoadError
from mpocompress.layers.balance import balance_cores_
from mpocompress.loading import Batch
from mpocompress.tuning import DistillOptions, distill_
from mpocompress.tuning.healing.blocks import can_replay, find_blocks
from mpocompress.tuning.healing.learning_rates import LEARNING_RATES, peak_from_trials, trial_steps
from mpocompress.tuning.healing.loss import Distance, loss_for, normalized_error, output_loss
from mpocompress.tuning.minibatches import Minibatch, TrainingData
from mpocompress.tuning.schedule import warm_cosine
from tests.tolerances import TOL

F32, F64 = TOL[torch.float32], TOL[torch.float64]
FIXED = DistillOptions(learning_rate=3e-3, evaluate_every=5)


def rows(count: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


def classifier() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    return model.append(nn.Linear(64, 5)).eval()


class Layer(nn.Module):
    """A transformer block: attention that heeds the mask, then a feed-forward part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, h: Tensor, keep: Tensor) -> tuple[Tensor]:
        x = self.norm(h)
        scores = self.query(x) @ self.key(x).mT / x.shape[-1] ** 0.5
        scores = scores.masked_fill(~keep[:, None, :], float("-inf"))
        return (h + self.drop(self.out(scores.softmax(-1) @ self.value(x))),)


class Transformer(nn.Module):
    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        for layer in self.layers:
            (x,) = layer(x, keep=attention_mask.bool())
        return x


def sentences(batches: int = 6, garbage: float = 0.0) -> list[dict[str, Tensor]]:
    found = []
    for seed in range(batches):
        x = rows(4 * 6, 16, seed).reshape(4, 6, 16)
        mask = (torch.arange(6) < torch.tensor([6, 5, 3, 2])[:, None]).long()
        noise = garbage * rows(4 * 6, 16, 50 + seed).reshape(4, 6, 16)
        found.append({"x": torch.where(mask[..., None] > 0, x, noise), "attention_mask": mask})
    return found


def calls(batches: list[dict[str, Tensor]]) -> list[Batch]:
    return [Batch(kwargs=batch) for batch in batches]


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return classifier()


@pytest.fixture(scope="module")
def fitted(dense):
    return mpo.compress(dense, bond_dim=3, sites=3, exclude=["4"])


@pytest.fixture
def small(fitted) -> nn.Module:
    return copy.deepcopy(fitted.model)


@pytest.fixture(scope="module")
def transformer():
    model = Transformer().eval()
    return model, mpo.compress(model, bond_dim=3, layout="svd", data=sentences()).model


# -- the loop


def test_the_held_out_loss_falls_and_so_does_it_elsewhere(dense, small):
    other = rows(400, 16, seed=9)
    before = float(output_loss(small(other), dense(other), None).detach())
    found = mpo.distill(small, reference=dense, data=[rows(600, 16)], steps=150)
    assert found.end_loss < 0.5 * found.start_loss
    assert float(output_loss(small(other), dense(other), None).detach()) < 0.6 * before
    assert found.history[0].step == 0
    assert min(record.held_out_loss for record in found.history) == found.end_loss
    assert found.learning_rates["model"] in LEARNING_RATES


@pytest.mark.parametrize(
    ("losses", "start", "steps", "peak"),
    [
        ((0.95, 0.99), 1.0, 400, 3e-4),  # near a minimum: the next rate pays in the longer run
        ((0.95, 0.99), 1.0, 60, 1e-4),  # which this one is not
        ((1.01, 1.2), 1.0, 400, 1e-4),  # high enough
        ((0.95, 1.3), 1.0, 400, 1e-4),  # the next one is too high
        ((0.95, float("inf")), 1.0, 400, 1e-4),
        ((0.9, 0.7, 0.5, 0.6), 1.0, 400, 1e-3),  # far from any minimum
        ((0.9, 0.88, 0.86, 0.84, 0.82), 1.0, 400, 1e-2),  # there is no higher one
        ((float("inf"),), 1.0, 400, 1e-4),
    ],
)
def test_the_rate_that_trials_suggest(losses, start, steps, peak):
    tried = dict(zip(LEARNING_RATES, losses, strict=False))
    assert peak_from_trials(tried, start, steps) == peak


def test_trials_are_short():
    assert [trial_steps(steps) for steps in (7, 60, 1000, 9000)] == [7, 20, 50, 100]


def test_never_worse_than_the_start(dense, small):
    data = [rows(200, 16)]
    before = small(data[0])
    found = mpo.distill(small, reference=dense, data=data, steps=10, learning_rate=3.0)
    assert found.best_step == 0
    assert found.end_loss == found.start_loss
    torch.testing.assert_close(small(data[0]), before, **F32["apply"])


def test_a_diverging_run_keeps_the_start(dense, small):
    found = mpo.distill(small, reference=dense, data=[rows(200, 16)], steps=20, learning_rate=1e30)
    assert found.end_loss == found.start_loss
    assert all(bool(p.isfinite().all()) for p in small.parameters())


def test_patience_ends_a_run(dense, small):
    options = DistillOptions(learning_rate=3.0, evaluate_every=1, patience=3)
    found = distill_(small, dense, [Batch(args=(rows(200, 16),))], steps=50, options=options)
    assert found.history[-1].step == 3


def test_auto_takes_a_rate_that_beats_the_wrong_ones(dense, small):
    data, losses = [rows(400, 16)], {}
    for rate in ("auto", 1e-6, 1.0):
        model = copy.deepcopy(small)
        found = mpo.distill(model, reference=dense, data=data, steps=60, learning_rate=rate)
        losses[rate] = found.end_loss
    assert losses["auto"] < min(losses[1e-6], losses[1.0])


def test_equal_runs_give_equal_weights_and_another_seed_others(dense, fitted):
    states = []
    torch.manual_seed(11)
    before = torch.get_rng_state()
    for seed in (0, 0, 1):
        model = copy.deepcopy(fitted.model)
        mpo.distill(
            model, reference=dense, data=[rows(200, 16)], steps=12, seed=seed, batch_size=20
        )
        states.append(model.state_dict())
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_modes_flags_and_the_reference_are_as_they_were(dense, small):
    small.train()
    small[2].eval()
    small[4].weight.requires_grad_(False)
    frozen = small[4].weight.clone()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    mpo.distill(small, reference=dense, data=[rows(200, 16)], steps=5, learning_rate=1e-3)
    assert [m.training for m in (small, small[0], small[2], dense)] == [True, True, False, False]
    assert not small[4].weight.requires_grad
    assert torch.equal(frozen, small[4].weight)
    assert all(p.grad is None for p in small.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())


def test_the_schedule_warms_up_and_decays():
    rates = [warm_cosine(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 20)
    assert max(rates) == rates[20] == 1.0
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0 < rates[-1] < 1e-4

    short = [warm_cosine(step, 60, 1.0) for step in range(60)]
    assert short[0] == pytest.approx(1 / 20)
    assert max(short) == short[20] == 1.0
    assert warm_cosine(0, 1, 1.0) == 1.0
    assert [warm_cosine(step, 6, 1.0) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]


def test_a_run_that_is_worse_at_first_is_not_given_up(dense, small):
    arguments = {"reference": dense, "data": [rows(1000, 16)]}
    mpo.distill(small, **arguments, steps=200, learning_rate=3e-3)
    again = mpo.distill(small, **arguments, steps=60, learning_rate=0.1, evaluate_every=1)
    losses = [record.held_out_loss for record in again.history]
    assert min(losses[1:31]) > losses[0]
    assert again.end_loss < losses[0]


# -- balancing


def test_balancing_changes_norms_and_no_function():
    layer = mpo.MPOLinear(24, 36, layout=[(4, 2), (3, 3), (3, 4)], bond_dim=4, dtype=torch.float64)
    with torch.no_grad():
        layer.cores[0].mul_(1e4)
        layer.cores[2].mul_(1e-3)
    x = rows(7, 24).double()
    before = layer(x)
    assert balance_cores_(layer) == 1
    torch.testing.assert_close(layer(x), before, **F64["apply"])
    norms = torch.stack([core.detach().norm() for core in layer.cores])
    torch.testing.assert_close(norms, norms[:1].expand(3), **F64["norm"])


def test_frozen_cores_keep_their_values(dense, small):
    data, layer = [rows(64, 16)], small[0]
    with torch.no_grad():
        layer.cores[0].mul_(8)
        layer.cores[1].div_(8)
    layer.cores[0].requires_grad_(False)
    before = [core.detach().clone() for core in layer.cores]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mpo.distill(small, reference=dense, data=data, steps=2, learning_rate=1e-3, progress=stop)
    assert all(map(torch.equal, layer.cores, before))
    mpo.distill(small, reference=dense, data=data, steps=2, learning_rate=1e-3)
    assert torch.equal(layer.cores[0], before[0])


def test_balancing_heeds_ties_and_leaves_zeros():
    first, second, third = (mpo.MPOLinear(8, 8, bond_dim=2) for _ in range(3))
    for position in range(2):
        second.cores[position] = first.cores[position]
    third.cores[0] = first.cores[0]
    model = nn.ModuleList([first, second, third])
    with torch.no_grad():
        first.cores[0].mul_(100)
    dense_third = third.to_dense()
    assert balance_cores_(model) == 0
    assert torch.equal(third.to_dense(), dense_third)
    assert balance_cores_(nn.ModuleList([first, second])) == 1
    assert second.cores[0] is first.cores[0]
    with torch.no_grad():
        first.cores[1].zero_()
    kept = first.cores[0].clone()
    balance_cores_(first)
    assert torch.equal(first.cores[0], kept)


# -- the loss


def test_cosine_of_rows_of_zeros_loses_nothing():
    dense = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert float(output_loss(dense.clone(), dense, None, "cosine")) == pytest.approx(0, abs=1e-6)
    assert float(output_loss(-dense, dense, None, "cosine")) == pytest.approx(1)


def test_auto_loss_adds_kl_where_there_may_be_logits():
    ours, dense = rows(8, 5), rows(8, 5, seed=1)
    both = output_loss(ours, dense, None)
    parts = [output_loss(ours, dense, None, kind) for kind in ("kl", "mse")]
    torch.testing.assert_close(both, parts[0] + parts[1], **F32["apply"])
    wide = rows(2, 2000), rows(2, 2000, seed=1)
    assert torch.equal(output_loss(*wide, None), output_loss(*wide, None, "mse"))
    column = rows(8, 1), rows(8, 1, seed=1)
    assert torch.equal(output_loss(*column, None), output_loss(*column, None, "mse"))


def test_quantities_in_small_units_are_no_logits():
    ours, dense = 1000 * rows(8, 5), 1000 * rows(8, 5, seed=1)
    assert torch.equal(output_loss(ours, dense, None), output_loss(ours, dense, None, "mse"))
    # Padding says nothing of the units.
    ours, dense = (rows(24, 5, seed=seed).reshape(8, 3, 5) for seed in (0, 1))
    keep = torch.arange(3).expand(8, 3) < 1
    padded = torch.where(keep[..., None], dense, 1000 * dense)
    compared = [output_loss(ours, y, keep, vocabularies=[5]) for y in (dense, padded)]
    assert torch.equal(*compared)
    barred = rows(8, 5, seed=1)  # one class that cannot be
    barred[:, 2] = -1e9
    guess = barred + 0.1 * rows(8, 5)
    assert output_loss(guess, barred, None) > output_loss(guess, barred, None, "mse")


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        (None, "auto"),
        (torch.arange(8) % 4, "auto"),
        ((torch.arange(8) % 4).double(), "auto"),
        (torch.eye(4)[torch.arange(8) % 4], "auto"),
        (torch.softmax(rows(8, 4).float(), -1), "auto"),
        (torch.softmax(rows(80, 400).float(), -1).bfloat16(), "auto"),
        (torch.softmax(rows(8, 4).float(), -1).mul(100).round() / 100, "auto"),
        (rows(8, 4), "mse"),
        (rows(8, 1), "mse"),
        ((rows(8, 4) > 0).float(), "mse"),
    ],
    ids=[
        "none",
        "classes",
        "in floats",
        "one-hot",
        "soft",
        "half",
        "decimals",
        "columns",
        "one",
        "many of many",
    ],
)
def test_labels_that_are_quantities_say_that_outputs_are_no_logits(labels, loss):
    calls = [Batch((rows(8, 3),)), Batch((rows(8, 3),), labels=labels)]
    assert loss_for("auto", calls) == loss
    assert loss_for("kl", calls) == "kl"


@pytest.mark.parametrize(("units", "labelled"), [(1.0, True), (1000.0, False)])
def test_healing_of_a_regression_heeds_its_quantities(units, labelled):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 6))
    with torch.no_grad():
        model[2].weight.mul_(20 * units)
    data = rows(300, 12)
    labels = {"labels": rows(300, 6)} if labelled else {}
    result = mpo.compress(model, bond_dim=2, layout="svd", data=[{"input": data}])
    healed = copy.deepcopy(result.model)
    batches = [{"input": data, **labels}]
    mpo.distill(healed, reference=model, data=batches, steps=100, learning_rate=1e-2)
    new = rows(300, 12, seed=1)
    with torch.no_grad():
        before, after = (normalized_error(m(new), model(new), None) for m in (result.model, healed))
    assert after < 1.02 * before


def test_kl_is_that_of_the_softmax_and_blind_to_a_shift():
    ours, dense = rows(6, 4).double(), rows(6, 4, seed=1).double()
    p, q = (dense / 2).softmax(-1), (ours / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(output_loss(ours, dense, None, "kl"), expected, **F64["apply"])
    shifted = output_loss(ours + 3, dense, None, "kl")
    torch.testing.assert_close(shifted, expected, **F64["apply"])
    assert output_loss(ours + 3, dense, None) > expected


def test_scores_of_the_next_word_are_logits():
    ours, dense = rows(4, 7 * 11).reshape(4, 7, 11), rows(4, 7 * 11, seed=1).reshape(4, 7, 11)
    parts = [output_loss(ours, dense, None, kind) for kind in ("kl", "mse")]
    words = output_loss(ours, dense, None, vocabularies={5, 11})
    torch.testing.assert_close(words, parts[0] + parts[1], **F32["apply"])
    assert torch.equal(output_loss(ours, dense, None, vocabularies={5}), parts[1])

    class Words(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.table = nn.Embedding(11, 6)
            self.head = nn.Linear(6, outputs)

        def forward(self, ids):
            return self.head(self.table(ids))

    batch = Minibatch((torch.arange(12).reshape(3, 4) % 11,))
    for outputs, kinds in ((11, ("kl", "mse")), (6, ("mse",))):
        model, small = Words(outputs), Words(outputs)
        (given,) = batch.args
        expected = sum(output_loss(small(given), model(given), None, kind) for kind in kinds)
        found = Distance(small, model, (), "auto", 1.0)(batch)
        torch.testing.assert_close(found, expected, **F32["apply"])


def test_an_output_with_logits_is_compared_on_them():
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    ours, dense = rows(12, 7).reshape(3, 4, 7), rows(12, 7, seed=1).reshape(3, 4, 7)
    expected = sum(output_loss(ours, dense, None, kind) for kind in ("kl", "mse"))
    torch.testing.assert_close(
        output_loss(Output(ours), Output(dense), None), expected, **F32["apply"]
    )


def test_what_stands_beside_logits_is_compared_too():
    class Output(NamedTuple):
        logits: Tensor
        value: Tensor
        hidden_states: tuple[Tensor, ...] = ()

    logits, value = rows(12, 7), rows(12, 1, seed=1)
    dense = Output(logits, value, (rows(12, 5, seed=2),))
    ours = Output(logits, 1.2 * value, (rows(12, 5, seed=3),))
    expected = (normalized_error(logits, logits, None) + 0.2**2) / 2
    torch.testing.assert_close(output_loss(ours, dense, None), expected, **F32["apply"])
    assert float(output_loss(ours, dense, None, "kl")) == 0.0


def test_several_outputs_count_alike_whatever_their_scale():
    small, large = rows(8, 5), 1000 * rows(8, 3, seed=1)
    ours = (small * 1.1, large * 1.1)
    assert float(output_loss(ours, (small, large), None)) == pytest.approx(0.01, rel=1e-3)
    cosine = output_loss(ours, (small, large), None, "cosine")
    torch.testing.assert_close(cosine, torch.zeros(()), **F32["apply"])


def test_padding_has_no_say_in_loss_or_gradient(transformer):
    model, small = transformer
    found = []
    for garbage in (0.0, 100.0):
        batch = Batch(kwargs=sentences(1, garbage)[0])
        loss = Distance(small, model, find_blocks(small), "auto", 1.0)(batch)
        found.append([loss, *torch.autograd.grad(loss, list(small.parameters()))])
    for clean, other in zip(*found, strict=True):
        torch.testing.assert_close(clean, other, **F32["gradient"])
    unmasked = Batch(kwargs={**sentences(1, 100.0)[0], "attention_mask": torch.ones(4, 6)})
    assert not torch.isclose(Distance(small, model, (), "auto", 1.0)(unmasked), found[0][0])


# -- the data


def test_held_out_rows_are_never_trained_on_and_epochs_see_all_others():
    data = TrainingData(
        [Batch(args=(torch.arange(100.0)[:, None],))], batch_size=20, held_out=0.1, seed=0
    )
    held = {float(v) for batch in data.held_out() for v in batch.args[0]}
    assert len(held) == 10
    steps = data.minibatches_per_epoch
    epochs = [
        [float(v) for k in range(steps) for v in data.minibatch(e * steps + k).args[0]]
        for e in range(2)
    ]
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) == set(epochs[1]) == {float(v) for v in range(100)} - held
    assert torch.equal(data.minibatch(0).args[0], data.minibatch(0).args[0])


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [(60, 0.1, 20), (200, 0.1, 64), (1000, 0.1, 100), (60, 0.5, 30), (60, 0.0, 60), (2, 0.1, 1)],
)
def test_of_few_rows_a_larger_share_is_held_out(count, share, held):
    data = TrainingData(
        [Batch(args=(rows(count, 3),))], batch_size=None, held_out=share, least_held=64, seed=0
    )
    assert sum(batch.rows for batch in data.held_out()) == held


def test_small_batches_stay_whole_and_a_single_row_is_its_own_judge():
    given = [Batch(args=(rows(4, 3, seed),)) for seed in range(5)]
    data = TrainingData(given, batch_size=None, held_out=0.1, seed=0)
    assert data.minibatches_per_epoch == 4
    assert len(list(data.held_out())) == 1
    taken = [data.minibatch(step).args[0] for step in range(4)]
    assert all(any(t is call.args[0] for call in given) for t in taken)
    single = TrainingData([Batch(args=(rows(1, 3),))], batch_size=None, held_out=0.1, seed=0)
    assert torch.equal(next(single.held_out()).args[0], single.minibatch(0).args[0])


def test_a_short_last_batch_does_not_judge_alone():
    sizes = [64] * 6 + [2]
    given = [Batch(args=(rows(size, 3, seed),)) for seed, size in enumerate(sizes)]
    for seed in range(20):
        data = TrainingData(given, batch_size=None, held_out=0.1, least_held=64, seed=seed)
        assert 64 <= sum(batch.rows for batch in data.held_out()) <= 66


def test_tables_with_sparse_gradients_are_healed():
    torch.manual_seed(0)
    table = nn.Embedding(50, 32, sparse=True)
    model = nn.Sequential(table, nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    data = [torch.randint(0, 50, (64,)) for _ in range(4)]
    result = mpo.compress(model, bond_dim=4, exclude=["0"], data=data)
    before = result.model[0].weight.clone()
    found = mpo.distill(result, reference=model, data=data, steps=20, learning_rate=1e-3)
    assert found.end_loss < found.start_loss
    assert not torch.equal(before, result.model[0].weight)


def test_a_checkpoint_of_other_data_or_another_reference_is_refused(tmp_path, dense, small):
    given = {"reference": dense, "data": [rows(100, 16)], "steps": 4}
    path = tmp_path / "state.safetensors"
    mpo.distill(copy.deepcopy(small), **given, checkpoint=path)
    other = copy.deepcopy(dense)
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    for changed, named in (({"data": [rows(100, 16, 5)]}, "data"), ({"reference": other}, "refer")):
        with pytest.raises(DataError, match=f"a run with the SHA-256 of the {named}"):
            mpo.distill(copy.deepcopy(small), **(given | changed), checkpoint=path)


# -- blocks
# -- blocks


def test_blocks_are_the_repeated_modules_with_compressed_layers(transformer, fitted):
    assert find_blocks(transformer[1]) == ("layers.0", "layers.1", "layers.2")
    assert find_blocks(transformer[0]) == ()
    assert find_blocks(fitted.model) == ()  # compressed layers one after the other are no blocks


def test_blockwise_training_comes_first_and_helps(transformer):
    model, small = transformer
    small = copy.deepcopy(small)
    found = mpo.distill(
        small,
        reference=model,
        data=sentences(12),
        steps=0,
        blockwise_steps=40,
        learning_rate=3e-3,
    )
    assert {record.phase for record in found.history} == {"blocks"}
    assert found.blocks == ("layers.0", "layers.1", "layers.2")
    assert found.end_loss < found.start_loss
    again = mpo.distill(
        copy.deepcopy(small),
        reference=model,
        data=sentences(12),
        steps=20,
        blockwise_steps=5,
        learning_rate=1e-3,
    )
    assert next(r.phase for r in again.history if r.step) == "blocks"
    assert again.history[-1].phase == "model"
    assert again.end_loss <= again.start_loss


def test_gradients_are_cut_between_blocks(transformer):
    from mpocompress.tuning.healing.distill import _BlockDistance

    model, small = transformer
    small = copy.deepcopy(small)
    names = find_blocks(small)
    batch = calls(sentences(1))[0]
    loss = _BlockDistance(model.eval(), small.eval(), ())  # no blocks: nothing to compare
    with pytest.raises(RuntimeError, match="non-empty"):
        loss(batch)
    gradients = []
    for spoil in (False, True):
        if spoil:
            with torch.no_grad():
                small.layers[2].out.cores[0].mul_(5)
        value = _BlockDistance(small.eval(), model.eval(), names)(batch)
        gradients.append(torch.autograd.grad(value, list(small.layers[0].parameters())))
    for before, after in zip(*gradients, strict=True):
        assert torch.equal(before, after)


def test_blocks_that_cannot_be_replayed_are_trained_with_the_whole_only(transformer):
    class Counting(Layer):
        def forward(self, h: Tensor, keep: Tensor) -> tuple[Tensor]:
            self.calls = getattr(self, "calls", 0) + 1
            return (super().forward(h, keep)[0] + self.calls,)

    model = copy.deepcopy(transformer[0]).eval()
    assert can_replay(model, ("layers.0",), calls(sentences(1))[0])
    for layer in model.layers:
        layer.__class__ = Counting
    assert not can_replay(model, ("layers.0",), calls(sentences(1))[0])


# -- going on


@pytest.mark.parametrize("rate", [3e-3, "auto"])
def test_an_interrupted_run_ends_bit_identical(tmp_path, transformer, rate):
    model, small = transformer

    def run(path, stop_at=None):
        ours = copy.deepcopy(small)

        def progress(what, done, total):
            if stop_at is not None and what == stop_at[0] and done == stop_at[1]:
                raise KeyboardInterrupt

        arguments = {"steps": 14, "blockwise_steps": 11, "evaluate_every": 4, "learning_rate": rate}
        found = mpo.distill(
            ours,
            reference=model,
            data=sentences(8),
            checkpoint=path,
            progress=progress,
            **arguments,
        )
        return found, ours.state_dict()

    expected, state = run(None)
    path = tmp_path / "state.safetensors"
    for stop in (("distillation (blocks)", 6), ("distillation (model)", 2), None):
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                run(path, stop)
            assert path.exists()
    resumed, resumed_state = run(path)
    assert all(torch.equal(state[name], resumed_state[name]) for name in state)
    assert resumed.history == expected.history
    assert resumed.learning_rates == expected.learning_rates
    again, again_state = run(path)  # a finished run is not run again
    assert again.history == expected.history
    assert all(torch.equal(state[name], again_state[name]) for name in state)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_weight_that_is_not_in_row_major_order_is_resumed_bit_identical(tmp_path):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16))
    model = model.to(memory_format=torch.channels_last).eval()
    small = mpo.compress(model, bond_dim=2, layout="svd", include=["3"]).model
    assert not small[0].weight.is_contiguous()
    images = torch.randn(96, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def run(path, stop_at=None):
        def progress(what, done, total):
            if done == stop_at:
                raise KeyboardInterrupt

        options = {"steps": 12, "evaluate_every": 3, "learning_rate": 1e-2, "batch_size": 16}
        return mpo.distill(
            copy.deepcopy(small),
            reference=model,
            data=[images],
            checkpoint=path,
            progress=progress,
            **options,
        )

    expected = run(None)
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(path, stop_at=5)
    assert run(path).history == expected.history


def test_an_interruption_leaves_the_model_as_it_was(dense, small):
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}

    def progress(what, done, total):
        if what.startswith("distillation") and done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mpo.distill(
            small,
            reference=dense,
            data=[rows(200, 16)],
            steps=9,
            learning_rate=1e-2,
            progress=progress,
        )
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())


def test_foreign_checkpoints_are_refused(tmp_path, dense, fitted):
    path = tmp_path / "state.safetensors"

    def run(steps=5):
        model = copy.deepcopy(fitted.model)
        mpo.distill(
            model,
            reference=dense,
            data=[rows(99, 16)],
            steps=steps,
            learning_rate=1e-3,
            checkpoint=path,
        )

    run()
    with pytest.raises(DataError, match="a run with steps = 5, and this one has 6"):
        run(steps=6)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LoadError, match=r"truncated or foreign.*\n?.*start anew"):
        run()


# -- steps of several minibatches, and what is computed once


def test_a_step_on_all_minibatches_knows_no_order(dense, fitted):
    batches = [rows(8, 16, seed) for seed in range(4)]
    ends = []
    for seed in (0, 1):
        model = copy.deepcopy(fitted.model).double()
        mpo.distill(
            model, reference=copy.deepcopy(dense).double(), data=[b.double() for b in batches],
            steps=6, accumulate=4, held_out=0.0, learning_rate=1e-3, seed=seed,
        )  # fmt: skip
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, **F64["gradient"])
    start = torch.cat([p.detach().double().flatten() for p in fitted.model.parameters()])
    assert (ends[0] - start).norm() > 1e-3


def test_rows_weigh_alike_in_a_step_of_unlike_minibatches(dense, fitted):
    """One step on 2 and 6 rows is one on all 8, where the loss is a mean over rows."""
    x = rows(8, 16)
    ends = []
    for data in ([x[:2], x[2:]], [x[:4], x[4:]]):
        model, teacher = copy.deepcopy(fitted.model).double(), copy.deepcopy(dense).double()
        mpo.distill(
            model, reference=teacher, data=[b.double() for b in data], steps=1, accumulate=2,
            output_loss="cosine", held_out=0.0, learning_rate=1e-3,
        )  # fmt: skip
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, **F64["gradient"])


def test_the_dense_model_sees_each_batch_once_while_there_is_room(dense, fitted, monkeypatch):
    batches = [rows(8, 16, seed) for seed in range(6)]
    calls_made = []
    dense = copy.deepcopy(dense)
    dense.register_forward_hook(lambda *_: calls_made.append(1))
    ends, counts = [], []
    for room in (2**31, 0):
        monkeypatch.setattr("mpocompress.tuning.healing.loss._KEPT_BYTES", room)
        calls_made.clear()
        model = copy.deepcopy(fitted.model)
        mpo.distill(model, reference=dense, data=batches, steps=15, learning_rate=1e-3)
        counts.append(len(calls_made))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    probing = 3  # whether it can be called, and whether rows stand for themselves
    assert counts[0] == len(batches) + probing < 15 < counts[1]
    assert torch.equal(*ends)


# -- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps -1"),
        ({"steps": True}, "steps True"),
        ({"blockwise_steps": 1.5}, "blockwise_steps 1.5"),
        ({"output_loss": "huber"}, "none of auto, kl, mse, cosine"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"learning_rate": "fast"}, "or 'auto'"),
        ({"held_out": 1.0}, "held_out 1.0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"accumulate": 0}, "accumulate 0"),
        ({"accumulate": None}, "accumulate None"),
        ({"patience": 0}, "patience 0"),
        ({"hidden_weight": -1.0}, "hidden_weight -1.0"),
        ({"data": []}, "no batches"),
        ({"data": [torch.full((9, 16), float("nan"))]}, "NaN or Inf"),
    ],
)
def test_impossible_arguments_are_refused(dense, small, options, message):
    arguments = {"reference": dense, "data": [rows(50, 16)], "steps": 3, **options}
    with pytest.raises(DataError, match=message):
        mpo.distill(small, **arguments)


def test_models_that_cannot_be_trained_are_refused(dense, small, transformer):
    data = [rows(50, 16)]
    with pytest.raises(DataError, match="shares parameters"):
        mpo.distill(dense, reference=dense, data=data)
    with pytest.raises(DataError, match=r"bfloat16.*\.float\(\)"):
        distill_(small.bfloat16(), dense, [Batch((rows(50, 16),))])
    with pytest.raises(DataError, match="nothing to train"):
        mpo.distill(small.float().requires_grad_(False), reference=dense, data=data)
    with pytest.raises(DataError, match="has no module 'layers.0'"):
        mpo.distill(transformer[1], reference=dense, data=data)
    with pytest.raises(DataError, match="needs logits"):
        output_loss(rows(4, 1), rows(4, 1), None, "kl")
    with pytest.raises(DataError, match="dense model that was compressed"):
        output_loss(rows(4, 3), rows(4, 2), None, "mse")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gauge", ["none", "identity"])
def test_half_types_are_healed_in_float32(dense, dtype, gauge):
    half = copy.deepcopy(dense).to(dtype)
    x = rows(400, 16)
    result = mpo.compress(half, bond_dim=6, gauge=gauge)

    def error() -> float:
        with torch.no_grad():
            expected = half(x.to(dtype)).float()
            return float((result.model(x.to(dtype)).float() - expected).norm() / expected.norm())

    before = error()
    found = mpo.distill(result, reference=half, data=[x], steps=60, learning_rate=3e-3)
    assert found.end_loss < found.start_loss
    assert error() < 0.9 * before
    assert {p.dtype for p in (*result.model.parameters(), *half.parameters())} == {dtype}


# -- compress, report, command line


def test_the_report_tells_of_the_healed_weights(dense):
    data = [rows(1500, 16)]
    plain = mpo.compress(dense, bond_dim=3, sites=3, data=data, sweeps=0)
    result = mpo.compress(dense, bond_dim=3, sites=3, data=data, sweeps=0, distill=40)
    healing = result.report.settings["distill"]
    assert healing["steps"] == 40
    assert healing["held_out_loss"]["after"] < healing["held_out_loss"]["before"]
    assert result.report.seconds["distillation"] > 0
    for layer, before in zip(
        result.report.compressed_layers, plain.report.compressed_layers, strict=True
    ):
        weight = dense.get_submodule(layer.name).weight.detach()
        rebuilt = result.model.get_submodule(layer.name).to_dense()
        true = float((rebuilt - weight).norm() / weight.norm())
        assert layer.relative_weight_error == pytest.approx(true, rel=1e-4)
        assert before.relative_weight_error != pytest.approx(true, rel=1e-4)
        assert layer.relative_output_error is None
        assert before.relative_output_error is not None
    biases = [layer for layer in result.report.kept_layers if layer.name.endswith("bias")]
    assert biases
    assert all(layer.changes == ["healed"] for layer in biases)
    assert "trained along in the healing" in result.report.to_markdown()
    assert "took up the mean of the errors" in plain.report.to_markdown()
    assert "took up the mean of the errors" not in result.report.to_markdown()


def test_healing_a_result_brings_its_report_up_to_date(dense):
    result = mpo.compress(dense, bond_dim=3, sites=3)
    before = result.report
    found = mpo.distill(result, reference=dense, data=[rows(300, 16)], steps=20)
    assert result.report.settings["distill"]["best_step"] == found.best_step
    assert result.report.compressed_layers != before.compressed_layers
    assert mpo.CompressionReport.from_json(result.report.to_json()) == result.report


def test_healing_without_data_is_refused(dense):
    with pytest.raises(DataError, match="distill=30 trains on data"):
        mpo.compress(dense, bond_dim=3, distill=30)
    with pytest.raises(DataError, match="distill -2"):
        mpo.compress(dense, bond_dim=3, data=[rows(9, 16)], distill=-2)


@pytest.mark.onnx
def test_the_command_line_heals(tmp_path, monkeypatch, capsys, dense):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    torch.save(dense, "model.pt")
    np.savez("data.npz", input=rows(200, 16).numpy())
    arguments = ["model.pt", "--bond-dim", "3", "--sites", "3", "--distill", "10"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "--distill 10 trains on data" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*arguments[:-2], "--sweeps", "4"])
    assert stop.value.code == 2
    assert "--sweeps 4 are passes of a fit to data" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--data", "data.npz"])
    assert not stop.value.code
    report = json.loads((tmp_path / "model-mpo" / "report.json").read_text())
    assert report["settings"]["distill"]["steps"] == 10
    assert report["parity"]["passed"]
    assert report["seconds"]["distillation"] > 0
    healed = mpo.load("model-mpo", model=classifier())
    first = next(layer for layer in report["layers"] if layer["status"] == "compressed")
    weight = dense.get_submodule(first["name"]).weight.detach()
    difference = healed.get_submodule(first["name"]).to_dense() - weight
    true = float(difference.norm() / weight.norm())
    assert first["relative_weight_error"] == pytest.approx(true, rel=1e-4)
