"""Models as people write them: what works elsewhere in torch works here, or is refused in time."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mpocompress as mpo
from mpocompress.errors import DataError, NoLayerMatched
from mpocompress.layers.modes import cuda_devices
from mpocompress.loading import load_source
from tests.tolerances import TOL


@dataclass
class Scores:
    hidden: Tensor
    logits: Tensor


class GivesADataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Scores:
        hidden = torch.relu(self.first(x))
        return Scores(hidden, self.second(hidden))


class Normalizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.sub_(0.5))


class Messages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 48)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        pairs = torch.relu(self.layer(torch.cat([x[edges[0]], x[edges[1]]], -1)))
        return x.new_zeros(len(x), 48).index_add_(0, edges[1], pairs)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(40, 24, generator=generator) for _ in range(4)]


def test_outputs_in_a_dataclass():
    dense, data = GivesADataclass(), batches()
    for options in ({"bond_dim": 4}, {"ratio": 2}, {"max_error": 0.6}):
        model = mpo.compress(dense, data=data, **options).model
        assert isinstance(model(data[0]), Scores)
    mpo.sweep(model, reference=dense, data=data, sweeps=1)
    mpo.distill(model, reference=dense, data=data, steps=2)


def test_inputs_that_a_forward_changes():
    data = batches()
    before = [x.clone() for x in data]
    with pytest.raises(DataError, match="changes its input 'argument 0' in place"):
        mpo.compress(Normalizes(), bond_dim=4, data=data)
    assert all(map(torch.equal, data, before))


@pytest.mark.onnx
def test_an_onnx_file_of_a_forward_that_changes_its_input(tmp_path):
    model, data = Normalizes().eval(), batches()
    before = [x.clone() for x in data]
    mpo.export_onnx(model, tmp_path / "model.onnx", data[0])
    mpo.verify(tmp_path / "model.onnx", model, data).raise_if_failed()
    assert all(map(torch.equal, data, before))


def test_too_few_graphs_to_hold_some_out():
    data = [(x, torch.randint(0, 40, (2, 30))) for x in batches()]
    with pytest.raises(DataError, match="what stands in one batch cannot be taken apart"):
        mpo.compress(Messages(), max_error=0.3, data=data)


def test_sweeps_of_recurrent_layers():
    dense = nn.GRU(24, 32)
    data = [x[:, None] for x in batches()]
    model = mpo.compress(dense, bond_dim=4).model
    with pytest.raises(NoLayerMatched, match=r"recurrent layers run on dense weights.*distill"):
        mpo.sweep(model, reference=dense, data=data, sweeps=1)


def test_frozen_models_are_not_healed_and_say_so_at_once(monkeypatch):
    monkeypatch.setattr("mpocompress.api.compression.meet", None)  # nothing is planned, nor fitted
    frozen = nn.Linear(24, 32).requires_grad_(False)
    with pytest.raises(DataError, match="requires_grad_"):
        mpo.compress(frozen, ratio=2, data=batches(), distill=5)


def test_names_that_begin_with_an_attribute_of_a_training_framework(tmp_path, monkeypatch):
    (tmp_path / "net_for_prefixes.py").write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Linear(24, 32))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    dense = nn.Sequential(nn.Linear(24, 32))
    state = {f"model.net.{name}": tensor for name, tensor in dense.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    found = load_source(tmp_path / "last.ckpt", factory="net_for_prefixes:make")
    assert torch.equal(found.module[0].weight, dense[0].weight)
    assert any("all names begin with 'model.net.'" in note for note in found.notes)


@pytest.mark.onnx
def test_a_size_is_kept_where_biases_are_equal_at_first(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(4)]
    for layer in layers:
        nn.init.zeros_(layer.bias)
    dense = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())])
    data = [torch.randn(64, 64) for _ in range(4)]
    result = mpo.compress(dense, max_size=30_000, data=data)
    written = mpo.export_onnx(result.model, tmp_path / "model.onnx", data[0]).num_bytes
    assert written == result.report.budget.reached <= 30_000


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        boxes = self.layer(x)
        kept = boxes.amax(-1) > 1e9
        return boxes[kept], kept.nonzero()


@pytest.mark.onnx
def test_a_detector_that_finds_nothing(tmp_path):
    model, data = Detector().eval(), batches()
    mpo.export_onnx(model, tmp_path / "model.onnx", data[0])
    mpo.verify(tmp_path / "model.onnx", model, data).raise_if_failed()


class Thresholded(nn.Module):
    """Gives those rows whose score is high, in one tensor or in one for each picture."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 64), nn.Linear(64, 32)
        self.listed = listed

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        found = self.second(torch.relu(self.first(x)))
        kept = found[found.amax(-1) > found.amax(-1).median()] if self.listed else found
        return list(kept[kept[:, 0] > 0]) if self.listed else kept[kept[:, 0] > 0]


@pytest.mark.parametrize("listed", [False, True])
def test_a_detector_that_finds_other_things_once_it_is_compressed(listed):
    torch.manual_seed(0)
    dense, data = Thresholded(listed), [*batches(), *batches()]
    for options in ({"bond_dim": 2}, {"ratio": 3}):
        result = mpo.compress(dense, data=data, **options)
        (change,) = (c for c in result.report.predictions if c.figure == "output_change")
        assert change.measured is None
        assert "depends on their values" in change.note
        assert "depends on their values" in result.report.to_markdown()
        assert "depends on their values" in result.report.to_html()
    mpo.sweep(
        result, reference=dense, data=data, sweeps=1, loss=lambda m, b: m.first(*b.args).var()
    )
    with pytest.raises(DataError, match="what it decides by"):
        mpo.compress(dense, data=data, max_error=0.5)
    with pytest.raises(DataError, match="what it decides by"):
        mpo.distill(result, reference=dense, data=data, steps=2)


class RulesOut(nn.Module):
    """Gives -Inf to some classes: always to the last, and to the first where the input says so."""

    def __init__(self, ruled_out: float = float("-inf"), *, by_score: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 64), nn.Linear(64, 32)
        self.ruled_out, self.by_score = ruled_out, by_score

    def forward(self, x: Tensor) -> Tensor:
        scores = self.second(torch.relu(self.first(x)))
        if self.by_score:
            return scores.masked_fill(scores < scores.median(-1, keepdim=True).values, -torch.inf)
        scores = torch.cat([scores, scores.new_full((len(x), 1), self.ruled_out)], -1)
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[:, 0] = x[:, 0] > 0
        return scores.masked_fill(mask, self.ruled_out)


def test_answers_that_are_ruled_out_do_not_count():
    """As if the model gave 0 there, which does not depend on its weights either."""
    torch.manual_seed(0)
    dense, data = RulesOut(), batches()
    twin = RulesOut(0.0)
    twin.load_state_dict(dense.state_dict())
    rows = torch.cat(data)
    for options in ({"ratio": 2}, {"max_error": 0.6}):
        result, expected = (mpo.compress(each, data=data, **options) for each in (dense, twin))
        found, wanted = (
            next(c for c in each.report.predictions if c.figure == "output_change")
            for each in (result, expected)
        )
        assert (found.predicted, found.measured) == (wanted.predicted, wanted.measured)
        assert torch.equal(result.model(rows)[:, 1:-1], expected.model(rows)[:, 1:-1])
    before = dense(rows).softmax(-1)
    start = (result.model(rows).softmax(-1) - before).norm()
    for loss in ("outputs", "logits"):
        mpo.sweep(result, reference=dense, data=data, sweeps=1, loss=loss)
    for loss in ("auto", "kl", "mse", "cosine"):
        healed = mpo.distill(result, reference=dense, data=data, steps=4, output_loss=loss)
        assert 0 <= healed.end_loss <= healed.start_loss
    assert (result.model(rows).softmax(-1) - before).norm() < start


def test_answers_that_are_ruled_out_by_their_values():
    torch.manual_seed(0)
    dense, data = RulesOut(by_score=True), batches()
    for options in ({"bond_dim": 2}, {"ratio": 3}):
        result = mpo.compress(dense, data=data, **options)
        (change,) = (c for c in result.report.predictions if c.figure == "output_change")
        assert change.measured is None
        assert "depends on their values" in change.note
    for tune in (mpo.sweep, mpo.distill):
        with pytest.raises(DataError, match="which answers are ruled out depends on values"):
            tune(result, reference=dense, data=data)


def test_outputs_that_are_no_numbers():
    dense, data = RulesOut(float("nan")), batches()
    for options in ({"bond_dim": 2}, {"ratio": 3}, {"max_error": 0.6}):
        with pytest.raises(DataError, match=r"\d+ of \d+ outputs of the dense model .* are NaN"):
            mpo.compress(dense, data=data, **options)


class Difference(nn.Module):
    """Of two layers that are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(24, 64), nn.Linear(24, 64)
        self.other.load_state_dict(self.one.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) - self.other(x)


def test_outputs_that_are_all_zero_have_no_relative_change():
    result = mpo.compress(Difference(), bond_dim=4, include=["one"], data=batches())
    (change,) = (c for c in result.report.predictions if c.figure == "output_change")
    assert change.measured is None
    assert "all outputs of the dense model are zero" in change.note


class PerExample(nn.Module):
    def __init__(self, transform: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 64), nn.Linear(64, 32)
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        def one(row: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(row)))

        if self.transform == "vmap":
            return torch.vmap(one)(x)
        return torch.func.grad(lambda rows: one(rows).square().sum())(x)


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_layers_inside_of_function_transforms(transform):
    dense, data = PerExample(transform), batches()
    assert mpo.compress(dense, bond_dim=4).model(data[0]).shape == dense(data[0]).shape
    with pytest.raises(DataError, match="compress without data"):
        mpo.compress(dense, bond_dim=4, data=data)


class MixesRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = mpo.MPOLinear(40, 40, layout="8x8,5x5", bond_dim=4)
        self.columns = nn.Linear(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.columns(self.rows(x.mT).mT)


def test_rows_that_an_mpo_layer_mixes():
    assert mpo.compress(MixesRows(), bond_dim=4, data=batches()).model(batches()[0]).shape == (
        40,
        32,
    )


class Samples(nn.Module):
    """A variational autoencoder: what it decodes is drawn at random."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(24, 64), nn.Linear(32, 24)
        self.refine = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.encode(x).chunk(2, -1)
        drawn = torch.relu(self.decode(mean + torch.exp(spread / 2) * torch.randn_like(mean)))
        return self.refine(nn.functional.dropout(drawn, 0.2))


def samples() -> tuple[Samples, list[Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Samples(), batches()


def same_draws(model: nn.Module, x: Tensor) -> Tensor:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        return model(x)


def test_a_model_that_draws_at_random_is_fitted_to_what_it_does_with_the_same_draws():
    dense, data = samples()
    whole = mpo.compress(dense, data=data, bond_dim=64, if_smaller=False).model
    for x in data:
        expected, found = same_draws(dense, x), same_draws(whole, x)
        torch.testing.assert_close(found, expected, **TOL[torch.float32]["apply"])


def test_a_model_that_draws_at_random_is_tuned_on_the_same_draws():
    dense, data = samples()
    found = mpo.compress(dense, data=data, bond_dim=64, if_smaller=False).model
    records = mpo.sweep(found, reference=dense, data=data, sweeps=1, local_steps=1)
    assert records[0].loss_before < 1e-9
    healed = mpo.distill(found, reference=dense, data=data, steps=1, output_loss="mse")
    assert healed.start_loss < 1e-9


def test_draws_of_a_model_follow_from_the_seed_and_those_of_others_from_theirs():
    dense, data = samples()

    def tuned(state: int) -> list[Tensor]:
        torch.manual_seed(state)
        before = torch.get_rng_state()
        found = mpo.compress(dense, data=data, ratio=2).model
        mpo.sweep(found, reference=dense, data=data, sweeps=1)
        mpo.distill(found, reference=dense, data=data, steps=3)
        assert torch.equal(torch.get_rng_state(), before)
        return [parameter.detach() for parameter in found.parameters()]

    with torch.random.fork_rng():
        assert all(map(torch.equal, tuned(2), tuned(3)))


def test_a_model_draws_on_the_gpu_that_only_its_buffers_are_on():
    model = nn.BatchNorm1d(4, affine=False)
    assert cuda_devices(model) == []
    with FakeTensorMode():  # as if there were one
        model.running_mean = torch.zeros(4, device="cuda")
    assert cuda_devices(model) == [torch.device("cuda", 0)]


def test_healing_with_another_seed_draws_other_numbers():
    class Noted(Samples):
        def forward(self, x: Tensor) -> Tensor:
            drawn.append(float(torch.rand(())))
            return super().forward(x)

    drawn: list[float] = []
    dense, data = Noted(), batches()
    found = mpo.compress(dense, bond_dim=4).model
    options = {"data": data, "steps": 2, "learning_rate": 1e-3, "batch_size": 5}
    runs = []
    for seed in (0, 0, 1):
        drawn.clear()
        healed = copy.deepcopy(found)
        mpo.distill(healed, reference=dense, seed=seed, **options)
        runs.append(set(drawn))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.onnx
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_integers_of_a_gauge_whose_bond_is_as_large_as_it_gets(quantize, tmp_path):
    dense, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(5, 64)
    options = {"bond_dim": 20, "sites": 3, "gauge": "identity", "if_smaller": False}
    model = mpo.compress(dense, **options).model
    mpo.export_onnx(model, tmp_path / "model.onnx", x, quantize=quantize)
    rounded = mpo.verify(tmp_path / "model.onnx", model, [x]).max_relative_difference
    assert 0 < rounded < (0.05 if quantize == "int8" else 0.5)


class ReadsTheDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.weight.dtype))


@pytest.mark.onnx
@pytest.mark.parametrize("form", ["chain", "dense", "auto"])
def test_a_forward_that_reads_a_weight_has_an_onnx_file(form, tmp_path):
    model = mpo.compress(ReadsTheDtype(), bond_dim=4).model
    mpo.export_onnx(model, tmp_path / "model.onnx", batches()[0], form=form)
    mpo.verify(tmp_path / "model.onnx", model, batches()).raise_if_failed()


@pytest.mark.parametrize("objective", ["macs", "latency"])
def test_tables_gain_no_time(objective):
    model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 256), nn.Linear(256, 64))
    plan = mpo.plan(model, bond_dim=4, include=["*"], objective=objective)
    table, *linear = plan.layers
    assert table.action == "keep"
    assert "looked up" in table.reason
    assert (table.dense_macs, table.macs) == (0, 0)
    if objective == "macs":  # which no timing decides
        assert [layer.action for layer in linear] == ["compress"] * 2
