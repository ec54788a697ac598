"""Sweeps on the loss: what is guaranteed, what is learned, and what is refused."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import mpocompress as mpo
from mpocompress.errors import (
    ContractionError,
    ConversionError,
    DataError,
    LoadError,
    NoLayerMatched,
)
from mpocompress.loading import Batch
from mpocompress.mpo import Layout
from mpocompress.tuning import Distillation, LossSweepOptions, sweep_on_loss
from mpocompress.tuning.sweeps.chains import find_chains
from mpocompress.tuning.sweeps.prefix import FrozenPrefix
from tests.planted import gaussian, random_chain
from tests.tolerances import LOSS, TOL, TRAJECTORY

F64 = TOL[torch.float64]
SITES = Layout((2, 3, 4), (4, 3, 2))


def mpo_linear(bond_dims, *, layout=SITES, seed=0, bias=True) -> mpo.MPOLinear:
    cores = random_chain(layout, bond_dims, seed=seed)
    offset = gaussian(layout.out_features, seed=seed) if bias else None
    return mpo.MPOLinear.from_mpo(mpo.MPO(cores), offset)


def network(bond_dims=(3, 3), seed=0) -> nn.Sequential:
    """24 -> 24 -> 24 with a dense layer before and after, float64."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 24),
        nn.Tanh(),
        mpo_linear(bond_dims, seed=seed),
        nn.Tanh(),
        mpo_linear(bond_dims, seed=seed + 50),
        nn.Tanh(),
        nn.Linear(24, 5),
    ).double()


def batches(count=6, rows=20, features=6):
    return [gaussian(rows, features, seed=100 + number) for number in range(count)]


def problem():
    """A student with smaller bonds than its teacher, sharing the dense layers."""
    teacher = network()
    student = copy.deepcopy(teacher)
    for position, seed in ((2, 7), (4, 8)):
        student[position] = mpo_linear((2, 2), seed=seed)
    return teacher, student


def loss_on(model, reference, data) -> float:
    calls = [Batch(args=(x,)) for x in data]
    distance = Distillation(reference, calls)
    with torch.no_grad():
        return float(torch.stack([distance(model, call) for call in calls]).mean())


# -- laws


def test_moving_the_center_leaves_the_outputs():
    model = network()
    x = batches(1)[0]
    expected = model(x).detach()
    for chain in find_chains(model).values():
        for site in (2, 0, 1):
            chain.move_center_(site, site)
            assert chain.center == (site, site)
            torch.testing.assert_close(model(x).detach(), expected, **F64["apply"])


@pytest.mark.parametrize("sites", [1, 2])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lbfgs"])
def test_the_loss_on_the_evaluation_batches_never_rises(sites, optimizer):
    teacher, student = problem()
    data = batches()
    start = loss_on(student, teacher, data)
    history = mpo.sweep(
        student,
        reference=teacher,
        data=data,
        sites=sites,
        optimizer=optimizer,
        learning_rate=20 if optimizer == "lbfgs" else 0.5,  # far too large: most must be undone
        eval_batches=None,
    )
    assert any(record.rejected for record in history)
    losses = [start, *(record.loss_after for record in history)]
    for before, record, after in zip(losses, history, losses[1:], strict=False):
        assert record.loss_before == pytest.approx(before, **LOSS)
        assert after <= record.loss_before
    assert loss_on(student, teacher, data) == pytest.approx(losses[-1], **LOSS)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lbfgs"])
def test_every_optimizer_learns(optimizer):
    teacher, student = problem()
    data = batches()
    history = mpo.sweep(student, reference=teacher, data=data, sweeps=6, optimizer=optimizer)
    assert history[-1].loss_after < 0.5 * history[0].loss_before
    assert loss_on(student, teacher, batches(3)) < 0.6 * history[0].loss_before


@pytest.mark.parametrize("sites", [1, 2])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lbfgs"])
def test_a_layer_of_zeros_learns(optimizer, sites):
    """Steps were relative to the size of its core, which is 0."""
    teacher, student = problem()
    with torch.no_grad():
        for core in student[2].cores:
            core.zero_()
    options = {"include": ["2"], "sweeps": 4, "sites": sites, "optimizer": optimizer}
    history = mpo.sweep(student, reference=teacher, data=batches(), **options)
    assert history[-1].loss_after < 0.95 * history[0].loss_before


@pytest.mark.parametrize("sites", [1, 2])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lbfgs"])
def test_manual_and_automatic_gradients_go_the_same_way(sites, optimizer):
    data = batches()
    runs = []
    for gradient in ("manual", "autograd"):
        teacher, student = problem()
        history = mpo.sweep(
            student,
            reference=teacher,
            data=data,
            sweeps=2,
            sites=sites,
            local_steps=4,
            optimizer=optimizer,
            # Steps that overshoot would amplify rounding without limit.
            learning_rate=2e-3 if optimizer == "sgd" else None,
            gradient=gradient,
        )
        runs.append((student, history))
    (manual, one), (automatic, other) = runs
    assert [r.bond_dims for r in one] == [r.bond_dims for r in other]
    assert [r.gradient_evaluations for r in one] == [r.gradient_evaluations for r in other]
    for position in (2, 4):
        torch.testing.assert_close(
            manual[position].weight, automatic[position].weight, **TRAJECTORY
        )


def test_a_planted_teacher_is_learned_and_its_bonds_are_found():
    layout = Layout((4, 4, 4), (4, 4, 4))
    teacher = nn.Sequential(mpo_linear((3, 3), layout=layout, seed=1, bias=False))
    student = nn.Sequential(mpo_linear((1, 1), layout=layout, seed=2, bias=False))
    data = batches(8, rows=128, features=64)
    history = mpo.sweep(
        student,
        reference=teacher,
        data=data,
        sweeps=8,
        sites=2,
        cutoff=1e-5,
        local_steps=20,
        optimizer="lbfgs",
    )
    assert history[-1].loss_after < 1e-4
    assert max(student[0].bond_dims) == 3
    assert loss_on(student, teacher, batches(2, rows=100, features=64)) < 1e-4
    expected = mpo.MPO(list(teacher[0].cores)).entropies_nats()
    assert list(history[-1].entropies_nats) == pytest.approx(expected, rel=0.05)


def test_bonds_stay_within_their_cap_and_shrink_with_a_cutoff():
    teacher, student = problem()
    history = mpo.sweep(student, reference=teacher, data=batches(), sites=2, sweeps=2)
    assert all(max(record.bond_dims) <= 2 for record in history)
    mpo.sweep(student, reference=teacher, data=batches(), sites=2, sweeps=2, bond_dim=4)
    assert student[2].bond_dims == (4, 4)
    assert "bond_dims=[4, 4]" in repr(student[2])
    wide = copy.deepcopy(student)
    # A second term that is zero: half of each bond carries nothing.
    wide[2].set_cores_((wide[2].to_mpo() + 0.0 * wide[2].to_mpo()).cores)
    assert wide[2].bond_dims == (8, 8)
    mpo.sweep(wide, reference=teacher, data=batches(), sites=2, sweeps=2, cutoff=1e-2, bond_dim=8)
    assert max(wide[2].bond_dims) < 8


def test_a_layer_that_is_used_twice_gets_the_gradient_of_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = mpo_linear((2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    data = batches(4, features=24)
    weights = []
    for gradient in ("manual", "autograd"):
        model = Twice()
        reference = Twice()
        reference.layer = mpo_linear((3, 3), seed=9)
        history = mpo.sweep(model, reference=reference, data=data, gradient=gradient, sweeps=2)
        assert history[-1].loss_after < history[0].loss_before
        weights.append(model.layer.weight)
    torch.testing.assert_close(*weights, **TRAJECTORY)


def test_tied_layers_stay_tied_and_are_swept_once():
    model = network((2, 2))
    model[4].cores = nn.ParameterList(list(model[2].cores))
    history = mpo.sweep(model, reference=network(), data=batches(), sites=2, bond_dim=3, sweeps=2)
    assert {record.layer for record in history} == {"2"}
    assert all(a is b for a, b in zip(model[2].cores, model[4].cores, strict=True))
    assert model[4].bond_dims == model[2].bond_dims == history[-1].bond_dims
    x = batches(1)[0]
    assert model(x).shape == (20, 5)


def test_modes_and_flags_are_restored_and_dense_parameters_stay():
    teacher, student = problem()
    student.train()
    student[0].weight.requires_grad_(False)
    student[4].cores[1].requires_grad_(False)
    before = student[0].weight.clone(), student[6].weight.clone()
    cores = [core.clone() for core in student[4].cores]
    mpo.sweep(student, reference=teacher, data=batches(), sites=2, bond_dim=4, sweeps=1)
    assert all(module.training for module in student.modules())
    assert not student[0].weight.requires_grad
    assert student[6].weight.requires_grad
    assert [core.requires_grad for core in student[4].cores] == [True, False, True]
    assert all(core.requires_grad for core in student[2].cores)
    assert torch.equal(cores[1], student[4].cores[1])
    assert torch.equal(before[0], student[0].weight)
    assert torch.equal(before[1], student[6].weight)
    assert all("forward" not in vars(module) for module in student.modules())


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("sites", [1, 2])
def test_frozen_cores_keep_their_values_while_others_of_the_layer_are_swept(frozen, sites):
    """A move of the gauge would go through them, and the layer would compute the same."""
    teacher, student = problem()
    for site in frozen:
        student[2].cores[site].requires_grad_(False)
    cores = [core.clone() for core in student[2].cores]
    options = {"sites": sites, "bond_dim": 3 if sites == 2 else None, "sweeps": 2}
    history = mpo.sweep(student, reference=teacher, data=batches(), include=["2"], **options)
    assert history[-1].loss_after < history[0].loss_before
    for site, (old, new) in enumerate(zip(cores, student[2].cores, strict=True)):
        assert torch.equal(old, new) == (site in frozen), site
        assert new.requires_grad == (site not in frozen)
    # Between two free neighbours the bond may change, beside a frozen core it cannot.
    changed = [bond != 2 for bond in student[2].bond_dims]
    assert changed == [sites == 2 and not {bond, bond + 1} & set(frozen) for bond in range(2)]


def test_dense_parameters_may_be_trained_along():
    results = []
    for train_dense in (False, True):
        teacher, student = problem()
        with torch.no_grad():
            student[6].bias += 1.0
        history = mpo.sweep(student, reference=teacher, data=batches(), train_dense=train_dense)
        results.append(history[-1].loss_after)
        assert all(record.loss_after <= record.loss_before for record in history)
    assert results[1] < results[0]


# -- the frozen prefix


def test_what_comes_before_the_layer_is_computed_once():
    model = network()
    counts = {0: 0, 6: 0}
    for position in counts:
        forward = model[position].forward

        def counted(x, position=position, forward=forward):
            counts[position] += 1
            return forward(x)

        model[position].forward = counted
    x = batches(1)[0]
    expected = model(x).sum()
    prefix = FrozenPrefix(model, [model[4]])
    with prefix.installed():
        losses = [prefix.run(0, lambda: model(x).sum()) for _ in range(5)]
    assert all(torch.equal(loss, expected) for loss in losses)
    assert counts[0] == 2
    assert counts[6] == 7  # once more, to see whether it repeats


def test_modules_that_write_in_place_are_replayed():
    """They are not run in a replay, so they write only once."""

    class Counted(nn.Linear):
        count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Counted(6, 24), nn.ReLU(inplace=True)).double()
    model.append(mpo_linear((2, 2)))
    x = batches(1)[0]
    with torch.no_grad():
        expected = model(x).sum()
        prefix = FrozenPrefix(model, [model[2]])
        with prefix.installed():
            losses = [prefix.run(0, lambda: model(x).sum()) for _ in range(4)]
    assert all(torch.equal(loss, expected) for loss in losses)
    assert model[0].count == 2


class WritesInPlace(nn.Module):
    """Before its layer it adds to what another has given, of batches with entries above that."""

    def __init__(self, above: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.above = above
        self.first, self.layer = nn.Linear(6, 24).double(), mpo_linear((2, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if x.abs().max() > self.above:
            h += 1.0
        return self.layer(h)


def test_models_that_write_in_place_are_computed_in_full():
    model = WritesInPlace(above=0.0)
    x = batches(1)[0]
    with torch.no_grad():
        expected = model(x).sum()
        prefix = FrozenPrefix(model, [model.layer])
        with prefix.installed():
            for _ in range(3):
                assert torch.equal(prefix.run(0, lambda: model(x).sum()), expected)


def test_models_that_write_in_place_for_some_batches_only_are_computed_in_full():
    model = WritesInPlace(above=100.0)
    calls = [x * scale for x, scale in zip(batches(3), (1, 1000, 1000), strict=True)]
    with torch.no_grad():
        prefix = FrozenPrefix(model, [model.layer])
        with prefix.installed():
            for number in (0, 1, 2, 0, 1, 2):
                expected = model(calls[number]).sum()
                assert torch.equal(
                    prefix.run(number, lambda x=calls[number]: model(x).sum()), expected
                )


# -- losses


def test_a_loss_of_ones_own_and_logits():
    teacher, student = problem()
    digits = [teacher(x).argmax(-1) for x in batches()]
    data = [{"input": x, "labels": y} for x, y in zip(batches(), digits, strict=True)]

    def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(**batch.kwargs), batch.labels)

    history = mpo.sweep(student, data=data, loss=cross_entropy)
    assert history[-1].loss_after < history[0].loss_before
    history = mpo.sweep(student, reference=teacher, data=batches(), loss="logits")
    assert 0 <= history[-1].loss_after < history[0].loss_before


def test_padding_does_not_count():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = mpo_linear((2, 2))

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x)

    teacher, student = Tokens(), Tokens()
    student.layer = mpo_linear((1, 1))
    x, mask = gaussian(2, 4, 24), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    noisy = x + 1e3 * (1 - mask)[..., None]
    losses = []
    for inputs in (x, noisy):
        call = Batch(kwargs={"x": inputs, "attention_mask": mask})
        losses.append(float(Distillation(teacher, [call])(student, call).detach()))
    assert losses[0] == pytest.approx(losses[1], **LOSS)


# -- going on, and on disk


@pytest.mark.parametrize("sites", [1, 2])
def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, sites):
    options = {"data": batches(), "sites": sites, "cutoff": 1e-6 if sites == 2 else 0.0}
    teacher, whole = problem()
    expected = mpo.sweep(whole, reference=teacher, sweeps=3, **options)

    class Interrupted(Exception):  # noqa: N818
        pass

    def stop(_layer: str, done: int, _total: int) -> None:
        if done == 3:
            raise Interrupted

    path = tmp_path / "state.safetensors"
    teacher, student = problem()
    with pytest.raises(Interrupted):
        mpo.sweep(student, reference=teacher, sweeps=3, state=path, progress=stop, **options)
    teacher, student = problem()
    history = mpo.sweep(student, reference=teacher, sweeps=3, state=path, **options)
    assert history == expected
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    with pytest.raises(LoadError, match="was written with seed 0, this run has 1"):
        mpo.sweep(student, reference=teacher, state=path, seed=1, **options)


@pytest.mark.parametrize("other", ["model", "data"])
def test_a_state_of_another_run_is_refused(tmp_path, other):
    path = tmp_path / "state.safetensors"
    teacher, student = problem()
    options = {"reference": teacher, "sweeps": 1, "state": path}
    mpo.sweep(student, data=batches(), **options)
    _, student = problem()
    data = batches()
    if other == "model":
        with torch.no_grad():
            next(p for n, p in student.named_parameters() if "bias" in n).add_(1)
    else:
        data = [1.5 * batch for batch in data]
    state = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(LoadError, match="SHA-256 of (what is not swept|the data)"):
        mpo.sweep(student, data=data, **options)
    assert all(torch.equal(state[name], v) for name, v in student.state_dict().items())


def test_a_foreign_state_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"nonsense")
    teacher, student = problem()
    with pytest.raises(LoadError, match="state of sweeps .* is truncated or foreign"):
        mpo.sweep(student, reference=teacher, data=batches(), state=path)


def test_a_state_without_a_core_is_refused_before_anything_changes(tmp_path):
    path = tmp_path / "state.safetensors"
    teacher, student = problem()
    options = {"reference": teacher, "data": batches(), "state": path}
    mpo.sweep(student, sweeps=1, **options)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    *_, last = (name for name in sorted(tensors) if "/" in name)
    del tensors[last]
    save_file(tensors, path, metadata)
    _, student = problem()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(LoadError, match=f"there is no '{last}'.*Remove it to begin anew"):
        mpo.sweep(student, sweeps=1, **options)
    assert all(torch.equal(before[name], v) for name, v in student.state_dict().items())


def test_equal_seeds_give_equal_results_and_a_result_is_taken_too(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    data = [x.float() for x in batches(features=24)]
    states = []
    for seed in (3, 3, 4):
        result = mpo.compress(model, bond_dim=3, layout="balanced", data=data)
        history = mpo.sweep(
            result, reference=model, data=data, sites=2, bond_dim=5, sweeps=2, seed=seed
        )
        states.append(result.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert history[-1].loss_after < history[0].loss_before
    mpo.save(result.model, tmp_path / "out")
    again = mpo.load(tmp_path / "out", model=model)
    assert again[0].bond_dims == result.model[0].bond_dims == (5,)
    assert torch.equal(again(data[0]), result.model(data[0]))


# -- set_cores_


def test_cores_of_the_same_shape_keep_their_parameters():
    layer = mpo_linear((2, 2))
    old = list(layer.cores)
    layer.set_cores_(random_chain(SITES, (2, 4), seed=5))
    assert layer.cores[0] is old[0]
    assert layer.cores[1] is not old[1]
    x = gaussian(3, 24)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias, **F64["apply"])
    with pytest.raises(ContractionError, match="only bond dimensions may change"):
        layer.set_cores_(random_chain(Layout((4, 3, 2), (4, 3, 2)), (2, 2)))


# -- refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "adagrad"}, DataError, "optimizer 'adagrad': there are 'adam', 'sgd'"),
        ({"gradient": "finite"}, DataError, "gradient 'finite': there are 'manual'"),
        ({"sites": 3}, DataError, "sites 3: there are 1, 2"),
        ({"sweeps": -1}, DataError, "sweeps -1: it is an integer, 0 or more"),
        ({"local_steps": 0}, DataError, "local_steps 0: it is an integer, 1 or more"),
        ({"eval_batches": 0}, DataError, "eval_batches 0"),
        ({"learning_rate": 0.0}, DataError, r"learning_rate 0.0: it is above 0. Try 0.02"),
        ({"cutoff": 0.1}, DataError, "Try sites=2"),
        ({"bond_dim": 3}, DataError, "Try sites=2"),
        ({"data": []}, DataError, "no batches"),
        ({"loss": "mse"}, DataError, "loss 'mse': distillation is on"),
        ({"reference": None}, DataError, "Give it as reference"),
        ({"include": ["9"]}, NoLayerMatched, "include pattern '9'"),
        ({"loss": lambda model, batch: model(*batch.args)}, DataError, "not a scalar tensor"),
        ({"loss": lambda model, batch: model(*batch.args).mean() / 0}, DataError, "before the"),
    ],
)
def test_what_is_impossible_is_refused(options, error, message):
    teacher, student = problem()
    with pytest.raises(error, match=message):
        mpo.sweep(student, **{"reference": teacher, "data": batches(), **options})
    assert all(core.requires_grad for core in student[2].cores)


def test_models_that_cannot_be_swept_are_refused():
    dense = nn.Sequential(nn.Linear(6, 6)).double()
    with pytest.raises(NoLayerMatched, match=r"nothing to sweep. Compress it first"):
        mpo.sweep(dense, reference=dense, data=batches())
    model = network()
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(NoLayerMatched, match=r"all MPO layers \(2, 4\) are frozen"):
        mpo.sweep(frozen, reference=model, data=batches())
    half = copy.deepcopy(model).bfloat16()
    with pytest.raises(ConversionError, match=r"layer '2' has torch.bfloat16 cores"):
        mpo.sweep(half, reference=half, data=batches())
    partly = copy.deepcopy(model)
    partly[4].cores[0] = partly[2].cores[0]
    with pytest.raises(ConversionError, match="shares some of its cores"):
        mpo.sweep(partly, reference=model, data=batches())


def test_rounded_layers_in_a_gauge_are_left_alone():
    torch.manual_seed(0)
    dense = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    data = [torch.randn(64, 64) for _ in range(4)]
    plan = mpo.plan(dense, bond_dim=8, layout="svd")
    rounded = {"precision": "int8", "gauge": "identity"}
    layers = [layer.model_copy(update=rounded) for layer in plan.layers[:3]]
    plan = plan.model_copy(update={"layers": (*layers, plan.layers[3])})
    model = mpo.compress(dense, plan, data=data).model
    assert list(find_chains(model)) == ["3"]
    before = [parameter.clone() for parameter in model[:3].parameters()]
    mpo.sweep(model, reference=dense, data=data, sweeps=1)
    assert all(map(torch.equal, before, model[:3].parameters()))


def test_layers_out_of_reach_are_left_alone():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.used = mpo_linear((2, 2)), mpo_linear((2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, reference = Idle(), Idle()
    reference.used = mpo_linear((3, 3), seed=4)
    calls = [Batch(args=(x,)) for x in batches(features=24)]
    history = sweep_on_loss(
        model, Distillation(reference, calls), calls, options=LossSweepOptions(sweeps=1)
    )
    assert [record.layer for record in history] == ["used"]
    with pytest.raises(NoLayerMatched, match=r"reach none of the MPO layers"):
        sweep_on_loss(model, Distillation(reference, calls), calls, include=["idle"])


@pytest.mark.parametrize("gauge", ["none", "identity"])
@pytest.mark.parametrize("with_reference", [True, False])
def test_the_report_of_a_swept_result_is_true_of_it(gauge, with_reference):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(36, 36), nn.ReLU(), nn.Linear(36, 4))
    data = [torch.randn(50, 36), torch.randn(50, 36)]
    result = mpo.compress(
        dense, bond_dim=3, layout="balanced", gauge=gauge, exclude=["2"], data=data
    )
    before = result.report

    def loss(model, batch):
        with torch.no_grad():
            target = dense(*batch.args)
        return (model(*batch.args) - target).square().mean()

    told = {"reference": dense} if with_reference else {"loss": loss}
    mpo.sweep(result, data=data, sweeps=2, sites=2, bond_dim=6, train_dense=True, **told)
    layer, kept = (next(e for e in result.report.layers if e.name == name) for name in ("0", "2"))
    assert layer.bond_dims == list(result.model[0].bond_dims) == [6]
    stored = sum(parameter.numel() for parameter in result.model[0].cores.parameters())
    totals = result.report.totals
    assert layer.parameters.compressed == totals.parameters.layers.compressed == stored
    assert totals.parameters.model.compressed == sum(p.numel() for p in result.model.parameters())
    more = sum(t.nbytes for t in result.model.state_dict().values())
    assert totals.bytes.model.compressed == more
    assert totals.bytes.model.dense == before.totals.bytes.model.dense
    assert totals.macs.layers.compressed > before.totals.macs.layers.compressed
    if with_reference:
        weight = dense[0].weight.detach()
        lost = weight - result.model[0].to_mpo().to_dense()
        error = float(lost.norm() / weight.norm())
        assert layer.relative_weight_error == pytest.approx(error, rel=1e-4)
    else:
        assert layer.relative_weight_error is None
    assert kept.changes == ["swept"]
    assert "sweeps on the loss" in result.report.seconds
    # What was predicted is of other bond dimensions; the change of the outputs is measured anew.
    if with_reference:
        (change,) = result.report.predictions
        ours, theirs = (torch.cat([m(x).detach() for x in data]) for m in (result.model, dense))
        assert change.measured == pytest.approx(float((ours - theirs).norm() / theirs.norm()), 1e-3)
        assert (change.predicted, change.note) == (None, "measured on rows that were swept on")
    else:
        assert not result.report.predictions
    page = result.report.to_markdown()
    assert "did not reach" not in page
    assert "tuned further by sweeps on a loss" in page
