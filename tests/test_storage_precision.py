"""Storage precisions: rounding, plans that choose them, and files that hold what was planned."""

import copy
import itertools

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.errors import BudgetError, DataError, ExportError, PlanError
from mpocompress.export import quantize_cores
from mpocompress.export.graph_integers import pack_fields
from mpocompress.layers import MPOLinear
from mpocompress.layers.rounded_scales import trainable_scales
from mpocompress.mpo import MPO, Layout, integer_fit, sequential_svd
from mpocompress.mpo.identity_gauge import IdentityGauge
from mpocompress.mpo.integer_fit import round_matrix
from mpocompress.mpo.integers import BITS, StoredRows, integer_bytes, planes
from mpocompress.mpo.precision import matrix_bytes
from mpocompress.planning import LayerPlan, Plan
from mpocompress.planning.storage_choice import StorageChoice, allocate_bytes, lower_hull
from mpocompress.report.narrative import headline
from mpocompress.tuning.fitting.rounding import Storage, round_weight
from mpocompress.tuning.fitting.storage_choices import smoothed_frequencies
from mpocompress.tuning.statistics.moments import RowCounts


def definite(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
    scaled = factor * torch.logspace(0, -2, size, dtype=torch.float64)
    found = scaled @ scaled.T
    return found + 0.02 * float(found.diagonal().mean()) * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [None, 8])
def test_levels_are_kept_and_within_their_bits(bits, block):
    torch.manual_seed(0)
    stored = round_matrix(torch.randn(6, 20), bits, block, shape=(6, 20))
    top = 2 ** (bits - 1)
    assert -top <= int(stored.values.min())
    assert int(stored.values.max()) <= top - 1
    again = round_matrix(stored.dequantized(), bits, block, shape=(6, 20))
    # A row may not use its outermost level, so the scale found again may be another one.
    lost = (again.dequantized() - stored.dequantized()).norm() / stored.dequantized().norm()
    assert float(lost) < 0.5 * 2.0 ** (1 - bits)


@pytest.mark.parametrize("lazy", [2, 3, 128])
def test_feedback_is_that_of_the_whole_row(lazy, monkeypatch):
    """Column by column, slow, and obviously right; no sweeps."""
    monkeypatch.setattr(integer_fit, "_LAZY", lazy)
    rows, columns, bits = 7, 5, 3
    gram = definite(columns, 1)
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    stored = round_matrix(matrix, bits, None, shape=(rows, columns), gram_YY=gram, sweeps=0)
    ridged = gram + 1e-2 * gram.diagonal().mean() * torch.eye(columns)
    order = ridged.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(ridged[order][:, order]), upper=True)
    work, scale = matrix.double()[:, order], stored.scales[:, 0].double()
    expected = torch.zeros_like(work)
    for column in range(columns):
        value = (work[:, column] / scale - 0.5).round().clamp(-4, 3)
        expected[:, column] = value
        error = (work[:, column] - (value + 0.5) * scale) / upper[column, column]
        work[:, column:] -= error[:, None] * upper[column, column:]
    assert torch.equal(expected.to(torch.int8), stored.values[:, order])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [None, 16, 20])
def test_feedback_and_every_sweep_lower_the_loss(bits, block):
    gram = definite(48, 1)
    matrix = torch.randn(40, 48, generator=torch.Generator().manual_seed(3))
    losses = [
        float((lost @ gram * lost).sum())
        for given in ({}, *({"gram_YY": gram, "sweeps": sweeps} for sweeps in (0, 1, 2, 8)))
        for found in [round_matrix(matrix, bits, block, shape=(40, 48), **given)]
        for lost in [(found.dequantized() - matrix).double()]
    ]
    assert losses[1] < 0.85 * losses[0]
    assert losses[2] < losses[1]
    assert losses[4] <= losses[3] <= losses[2]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_after_sweeps_no_other_level_of_one_entry_is_better(bits):
    gram = definite(12, 1)
    matrix = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    stored = round_matrix(matrix, bits, None, shape=(5, 12), gram_YY=gram, sweeps=60)
    ridged = gram + 1e-2 * gram.diagonal().mean() * torch.eye(12)

    def losses(values: torch.Tensor) -> torch.Tensor:
        lost = (values.double() + stored.offset) * stored.scales.double() - matrix.double()
        return (lost @ ridged * lost).sum(1)

    least, top = losses(stored.values), 2 ** (bits - 1)
    for column in range(12):
        for level in range(-top, top):
            other = stored.values.clone()
            other[:, column] = level
            assert bool((losses(other) >= least * (1 - 2e-2)).all())


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_zeros_take_the_bytes_that_a_plan_counts(bits):
    matrix = torch.randn(20, 24, generator=torch.Generator().manual_seed(3))
    matrix[:8] = 0
    for gram in (None, definite(24, 1)):
        stored = round_matrix(matrix, bits, 8, shape=(20, 24), gram_YY=gram)
        assert stored.num_bytes == matrix_bytes(20, 24, f"int{bits}", 8)
        assert float(stored.dequantized()[:8].abs().max()) < 1e-4


@pytest.mark.parametrize("bits", [2, 3])
def test_zeros_beside_small_entries_are_no_larger_than_these(bits):
    """They were half the least scale of half precision, whatever the others were."""
    torch.manual_seed(0)
    matrix, x = torch.randn(12, 32), torch.randn(200, 32)
    matrix[0], matrix[1, :16] = 0, 0
    gram = x.T @ x
    for gram_YY in (None, gram):
        plain = round_matrix(matrix, bits, 16, shape=(12, 32), gram_YY=gram_YY).dequantized()
        for unit in (1e-6, 1e-20):
            rounded = round_matrix(matrix * unit, bits, 16, shape=(12, 32), gram_YY=gram_YY)
            found = rounded.dequantized() / unit
            assert float(found[0].abs().max()) < 1e-6
            assert (found - matrix).norm() < 1.02 * (plain - matrix).norm()


def test_rows_are_rounded_each_for_itself(monkeypatch):
    gram = definite(24, 1)
    matrix = torch.randn(10, 24, generator=torch.Generator().manual_seed(3))
    whole = round_matrix(matrix, 3, 8, shape=(10, 24), gram_YY=gram, sweeps=1)
    monkeypatch.setattr(integer_fit, "_ROWS", 3)
    parts = round_matrix(matrix, 3, 8, shape=(10, 24), gram_YY=gram, sweeps=1)
    assert torch.equal(whole.values, parts.values)
    assert torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("gauge", ["none", "identity"])
@pytest.mark.parametrize("precision", ["float16", "int8", "int4", "int3"])
def test_rounded_factors_are_what_is_stored(gauge, precision):
    torch.manual_seed(0)
    chain = MPO((torch.randn(1, 30, 1, 9), torch.randn(9, 1, 24, 1)))
    storage = Storage(precision=precision, gauge=gauge)
    gram = definite(24, 1)
    plain = round_weight(chain, storage)
    aware = round_weight(chain, storage, input_II=gram)
    for found in (plain, aware):
        assert isinstance(found.weight, IdentityGauge) == (gauge == "identity")
    losses = [
        float((lost @ gram * lost).sum())
        for found in (plain, aware)
        for lost in [(found.mpo.to_dense() - chain.to_dense()).double()]
    ]
    if precision != "float16":
        assert losses[1] < losses[0]
    if gauge == "identity":
        pivots = aware.weight.pivots[0].long()
        exact = aware.mpo.to_dense()[pivots]
        torch.testing.assert_close(exact, aware.stored["1"].dequantized().reshape(9, 24))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_fields_fill_bytes_lowest_first(width):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << width, (3, 11)).astype(np.int16)
    packed = pack_fields(values, width)
    assert packed.shape == (3, -(-11 * width // 8))
    for x, y in itertools.product(range(3), range(11)):
        byte = int(packed[x, y * width // 8])
        assert (byte >> (y * width % 8)) % (1 << width) == values[x, y]
    assert [planes(bits) for bits in (2, 3, 5, 6)] == [(2,), (2, 1), (4, 1), (4, 2)]


def point(size: int, loss: float) -> StorageChoice:
    return StorageChoice(layout=Layout.from_pairs([(4, 4)]), bytes=size, loss=loss)


def test_hulls_leave_out_what_is_dominated_and_what_no_price_would_buy():
    points = [point(10, 9.0), point(20, 8.9), point(30, 2.0), point(40, 2.5), point(60, 0.0)]
    assert [found.bytes for found in lower_hull(points)] == [10, 30, 60]


@pytest.mark.parametrize("seed", range(5))
def test_allocation_is_within_its_budget_and_close_to_the_best(seed):
    rng = np.random.default_rng(seed)
    hulls = []
    for _ in range(4):
        sizes = np.sort(rng.choice(np.arange(5, 60), 4, replace=False))
        losses = rng.random() * 10 * np.exp(-sizes / 12)
        hulls.append(
            lower_hull([point(int(b), float(e)) for b, e in zip(sizes, losses, strict=True)])
        )
    for budget in range(sum(hull[0].bytes for hull in hulls), 240, 7):
        chosen = allocate_bytes(hulls, budget)
        assert sum(found.bytes for found in chosen) <= budget
        best = min(
            sum(found.loss for found in tried)
            for tried in itertools.product(*hulls)
            if sum(found.bytes for found in tried) <= budget
        )
        largest = max(hull[0].loss for hull in hulls)
        assert sum(found.loss for found in chosen) <= best + largest  # within one step
        assert sum(found.loss for found in chosen) <= 2.5 * best + 1e-9


def test_unseen_rows_share_what_was_seen_once():
    counts = RowCounts()
    counts.add(torch.tensor([0, 0, 0, 0, 1, 1, 2, 3]), 10)
    shares = smoothed_frequencies(counts)
    assert float(shares.sum()) == pytest.approx(1.0)
    assert float(shares[4:].sum()) == pytest.approx(2 / 8)
    assert float(shares[0]) == pytest.approx((1 - 2 / 8) * 4 / 8)


class Reader(nn.Module):
    """A table, two layers, and an output layer: inputs in a subspace, so that data tell much."""

    def __init__(self, words: int = 300) -> None:
        super().__init__()
        self.table = nn.Embedding(words, 48)
        self.hidden, self.out = nn.Linear(48, 96), nn.Linear(96, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(self.table(x))))


def reader_and_data(seed: int = 0) -> tuple[Reader, list[torch.Tensor]]:
    torch.manual_seed(seed)
    model = Reader().eval()
    shares = 1.0 / torch.arange(1, 301).float()
    data = [torch.multinomial(shares, 256, replacement=True).reshape(16, 16) for _ in range(8)]
    return model, data


@pytest.fixture(scope="module")
def dense_file(tmp_path_factory):
    model, data = reader_and_data()
    path = tmp_path_factory.mktemp("dense") / "m.onnx"
    return mpo.export_onnx(model, path, data[0]).num_bytes


@pytest.mark.onnx
@pytest.mark.parametrize(("ratio", "least"), [(2.5, 0.6), (4.5, 0.8)])
def test_a_size_is_a_ceiling_of_the_written_file(tmp_path, dense_file, ratio, least):
    model, data = reader_and_data()
    most = int(dense_file / ratio)
    result = mpo.compress(model, max_size=most, quantize="auto", data=data)
    exported = mpo.export_onnx(result.model, tmp_path / "m.onnx", data[0])
    assert least * most < exported.num_bytes <= most
    found = mpo.verify(exported.path, result.model, data)
    assert found.max_relative_difference < 1e-5
    assert all(layer.precision != "float32" for layer in result.plan.compressed)
    assert result.report.budget.reached == exported.num_bytes
    rounded = [layer for layer in result.report.layers if layer.precision]
    assert {layer.name for layer in rounded} == {layer.name for layer in result.plan.compressed}
    assert any(layer.candidates for layer in rounded)
    json = type(result.report).from_json(result.report.to_json())
    assert [layer.precision for layer in json.layers] == [
        layer.precision for layer in result.report.layers
    ]
    text = result.report.to_markdown()
    assert "Stored as" in text
    assert "smaller: from" in headline(result.report)
    assert headline(result.report).endswith("of weights.")
    assert "in a precision of its own" in text
    assert "did not become smaller" not in text
    assert rounded[0].precision in result.report.to_html()


def edited(plan: Plan, name: str, **update: object) -> Plan:
    rows = [row.model_copy(update=update) if row.name == name else row for row in plan.layers]
    return Plan.from_json(plan.model_copy(update={"layers": tuple(rows)}).to_json())


@pytest.mark.onnx
@pytest.mark.parametrize("data_given", [True, False])
def test_an_edited_plan_runs_as_edited(tmp_path, dense_file, data_given):
    model, data = reader_and_data()
    plan = mpo.plan(model, max_size=dense_file // 4, quantize="auto", data=data)
    assert Plan.from_json(plan.to_json()) == plan
    dense = ((96, 48),)
    plan = edited(
        plan,
        "hidden",
        action="compress",
        layout=dense,
        bond_dims=(),
        gauge="none",
        precision="int5",
        block=16,
        tiers=(),
    )
    plan = edited(
        plan,
        "out",
        action="compress",
        layout=((40, 1), (1, 96)),
        bond_dims=(12,),
        gauge="identity",
        precision="int4",
        block=None,
        tiers=(),
    )
    tiers = (("int8", 20), ("float16", 30)) if data_given else ()
    plan = edited(
        plan,
        "table",
        action="compress",
        layout=((300, 48),),
        bond_dims=(),
        gauge="none",
        precision="int2",
        block=None,
        tiers=tuple((rows, name) for name, rows in tiers),
    )
    result = mpo.compress(model, plan, data=data if data_given else None)
    hidden, out, table = result.model.hidden, result.model.out, result.model.table
    assert hidden.stored["0"].bits == 5
    assert hidden.stored["0"].scales.shape == (96, 3)
    assert {name: stored.bits for name, stored in out.stored.items()} == {"0.free": 4, "1": 4}
    stored = table.stored["0"]
    if data_given:
        assert isinstance(stored, StoredRows)
        assert [len(part.dequantized()) for part in stored.parts] == [20, 30, 250]
        # The first words are the frequent ones here, and lose the least.
        lost = (table.to_dense() - model.table.weight.detach()).norm(dim=1)
        assert float(lost[:10].max()) < 0.1 * float(lost[100:].mean())
    else:
        assert stored.bits == 2
    exported = mpo.export_onnx(result.model, tmp_path / "m.onnx", data[0])
    assert mpo.verify(exported.path, result.model, data).max_relative_difference < 1e-5
    for layer in plan.compressed:
        assert result.report.totals.bytes.layers.compressed > 0
        module = result.model.get_submodule(layer.name)
        assert layer.bytes == sum(s.num_bytes for s in module.stored.values()) + (
            sum(core.pivots.nbytes for core in module.cores.gauged)
            if layer.gauge == "identity"
            else 0
        )
    tensors = {t.name: t for t in onnx.load(exported.path).graph.initializer}
    assert "hidden.cores.0.bits4" in tensors
    assert "out.cores.1.int4" in tensors


@pytest.mark.onnx
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [None, 32])
def test_files_hold_every_precision(tmp_path, bits, block):
    torch.manual_seed(bits)
    model = nn.Sequential(nn.Linear(45, 37), nn.ReLU(), nn.Linear(37, 21))
    layers = tuple(
        LayerPlan(
            name=name,
            shape=(out, in_),
            action="compress",
            layout=((out, in_),),
            bond_dims=(),
            precision=f"int{bits}",
            block=block,
        )
        for name, (out, in_) in {"0": (37, 45), "2": (21, 37)}.items()
    )
    result = mpo.compress(model, Plan(layers=layers))
    exported = mpo.export_onnx(result.model, tmp_path / "m.onnx", torch.randn(2, 45))
    assert mpo.verify(exported.path, result.model).max_relative_difference < 1e-5
    assert exported.quantization == "auto"
    blocks = (1, 1) if block is None else (2, 2)
    expected = integer_bytes(37, 45, bits) + 2 * 37 * blocks[0]
    expected += integer_bytes(21, 37, bits) + 2 * 21 * blocks[1]
    assert sum(layer.bytes for layer in result.plan.layers) == expected
    plain = mpo.export_onnx(result.model, tmp_path / "f.onnx", torch.randn(2, 45), quantize="none")
    assert plain.quantization == "none"
    assert mpo.verify(plain.path, result.model).max_relative_difference < 1e-5


def bytes_of_layers(model: nn.Module) -> int:
    """A file that holds nothing but the layers that are rounded."""
    return sum(
        stored.num_bytes
        for layer in model.modules()
        for stored in (getattr(layer, "stored", None) or {}).values()
    )


def test_plans_in_bytes_prefer_what_the_data_need():
    """Of two equal layers the one whose outputs hardly matter is stored in fewer bits."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.loud(x) + 0.01 * self.quiet(x)

    torch.manual_seed(0)
    model = Two()
    data = [torch.randn(50, 64) for _ in range(4)]
    with_bytes = {"max_size": "7kB", "quantize": "auto", "data": data}
    plan = mpo.plan(
        model,
        **with_bytes,
        onnx_bytes=bytes_of_layers,
    )
    bytes_of = {layer.name: layer.bytes for layer in plan.layers}
    assert bytes_of["quiet"] < bytes_of["loud"]
    assert sum(bytes_of.values()) <= 7000


class Words(nn.Module):
    """A table, and an output layer that may be tied to it."""

    def __init__(self, *, tied: bool, with_gradients: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner = nn.Embedding(60, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, 60, bias=False)
        if tied:
            self.head.weight = self.table.weight
        self.with_gradients = with_gradients

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.with_gradients and torch.is_grad_enabled()):
            return self.head(torch.relu(self.inner(self.table(words))))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.filterwarnings("ignore:forward of Words runs")
def test_tables_have_precisions_with_a_tied_head_and_without_gradients(tied, with_gradients):
    model = Words(tied=tied, with_gradients=with_gradients)
    data = [torch.randint(0, 60, (16, 8)) for _ in range(4)]
    size = 2 * sum(p.numel() for p in model.parameters())
    plan = mpo.plan(
        model,
        max_size=size,
        quantize="auto",
        data=data,
        onnx_bytes=bytes_of_layers,
    )
    assert {layer.precision for layer in plan.compressed} - {"float32"}
    assert "table" in {layer.name for layer in plan.compressed}


def test_healing_against_a_half_precision_model_keeps_scales_and_cores_together():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    data = [torch.randn(64, 64) for _ in range(4)]
    result = mpo.compress(
        model,
        max_size="4kB",
        quantize="auto",
        data=data,
        onnx_bytes=bytes_of_layers,
    )
    before = {name: value.clone() for name, value in result.model.state_dict().items()}
    half = copy.deepcopy(model).half()
    healed = mpo.distill(result, reference=half, data=data, steps=20, learning_rate=1e-2)
    assert healed.best_step
    layer = result.model[0]
    cores = dict(layer.cores.named_parameters())
    assert not all(torch.equal(before[f"0.cores.{name}"], core) for name, core in cores.items())
    assert all(torch.equal(cores[name], s.dequantized()) for name, s in layer.stored.items())
    assert result.report.settings["distill"]["steps"] == 20


@pytest.mark.onnx
def test_healing_trains_scales_and_leaves_integers(tmp_path, dense_file):
    model, data = reader_and_data()
    result = mpo.compress(model, max_size=dense_file // 6, quantize="auto", data=data)
    before = {name: value.clone() for name, value in result.model.state_dict().items()}
    stored_before = {
        name: dict(result.model.get_submodule(name).stored) for name in ("hidden", "out")
    }
    mpo.distill(result, reference=model, data=data, steps=20, learning_rate=1e-2)
    after = result.model.state_dict()
    assert list(after) == list(before)
    for name, stored in stored_before.items():
        layer = result.model.get_submodule(name)
        assert not any(core.requires_grad for core in layer.cores.parameters())
        for key, old in stored.items():
            new = layer.stored[key]
            assert torch.equal(new.values, old.values)
            assert not torch.equal(new.scales, old.scales)
            assert new.scales.dtype == old.scales.dtype
            assert torch.equal(dict(layer.cores.named_parameters())[key], new.dequantized())
    exported = mpo.export_onnx(result.model, tmp_path / "m.onnx", data[0])
    assert exported.num_bytes <= dense_file // 6
    assert mpo.verify(exported.path, result.model, data).max_relative_difference < 1e-5


def rounded_layer(layout: Layout, gauge: str, precision: str = "int3") -> MPOLinear:
    torch.manual_seed(0)
    weight = sequential_svd(torch.randn(24, 30), layout, bond_dim=9)
    found = round_weight(
        MPO(weight.cores, shape=(24, 30)), Storage(precision=precision, block=8, gauge=gauge)
    )
    layer = MPOLinear.from_mpo(found.weight, torch.randn(24))
    layer.stored = dict(found.stored)
    layer.requires_grad_(False)
    return layer


@pytest.mark.parametrize("gauge", ["none", "identity"])
@pytest.mark.parametrize("layout", [Layout.svd(24, 30), Layout.parse("4x5,6x6")])
def test_open_scales_change_nothing_and_have_the_gradients_of_the_dense_twin(layout, gauge):
    layer, x = rounded_layer(layout, gauge), torch.randn(7, 30)
    before, state, stored = layer(x), layer.state_dict(), dict(layer.stored)
    expected = {}
    for name, parameter in layer.cores.named_parameters():
        parameter.requires_grad_(True)
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), parameter)
        parameter.requires_grad_(False)
        found = stored[name]
        rows = gradient.reshape(found.values.T.shape).T if found.transposed else gradient
        slope = rows.reshape(found.values.shape) * (found.values + found.offset)
        blocks = [part.sum(1) for part in slope.split(found.block, dim=1)]
        expected[name] = torch.stack(blocks, 1) * found.scales.float()
    with trainable_scales(layer):
        torch.testing.assert_close(layer(x), before)
        gains = [p for p in layer.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(layer(x).square().sum(), gains)
    assert len(gains) == 2
    for gradient in gradients:
        twin = next(e for e in expected.values() if e.shape == gradient.shape)
        torch.testing.assert_close(gradient, twin, rtol=1e-4, atol=1e-3)
    after = layer.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert all(torch.equal(layer.stored[name].scales, stored[name].scales) for name in stored)


def test_shared_cores_keep_their_scales():
    first = rounded_layer(Layout.svd(24, 30), "none")
    second = copy.deepcopy(first)
    second.cores = first.cores
    model = nn.ModuleList([first, second])
    with trainable_scales(model):
        assert not any(p.requires_grad for p in model.parameters())


def test_refusals(tmp_path):
    model, data = reader_and_data()
    with pytest.raises(PlanError, match='quantize "auto" shares bytes among layers, but ratio'):
        mpo.plan(model, ratio=4, quantize="auto", data=data)
    with pytest.raises(PlanError, match="quantize 'int3': a plan leaves precisions alone"):
        mpo.plan(model, max_size="1MB", quantize="int3", data=data)
    with pytest.raises(PlanError, match="Drop layout, sites and objective"):
        mpo.plan(model, max_size="1MB", quantize="auto", layout="svd", data=data)
    with pytest.raises(BudgetError, match="with each layer as small as it gets it has"):
        mpo.plan(model, max_size=3000, quantize="auto", data=data)
    row = {"name": "0", "shape": (8, 8), "action": "compress", "layout": ((8, 8),), "bond_dims": ()}
    with pytest.raises(PlanError, match="tiers are rows of a dense table"):
        LayerPlan(**row, precision="int2", tiers=((4, "int8"),)).sites()
    with pytest.raises(PlanError, match="block 8 is of integers that share a scale"):
        LayerPlan(**row, block=8).sites()
    with pytest.raises(DataError, match='"auto" writes layers as they were rounded, and none'):
        quantize_cores(model, "auto")
    half = nn.Sequential(nn.Linear(8, 8)).half()
    with pytest.raises(PlanError, match="precision 'int4' is for float32 weights"):
        mpo.compress(half, Plan(layers=(LayerPlan(**row, precision="int4"),)))
    result = mpo.compress(
        nn.Sequential(nn.Linear(8, 8)), Plan(layers=(LayerPlan(**row, precision="int4"),))
    )
    result.model[0].cores[0].data += 0.1
    with pytest.raises(ExportError, match=r"'cores\.0' has changed since"):
        mpo.export_onnx(result.model, tmp_path / "m.onnx", torch.randn(2, 8))
