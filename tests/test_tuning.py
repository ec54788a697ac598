"""Fitting to data: moments, lockstep, streams, gradients, and what the fit is worth."""

import threading
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import mpocompress as mpo
from mpocompress.errors import DataError
from mpocompress.loading import Batch
from mpocompress.mpo import Layout
from mpocompress.mpo.metric import Metric
from mpocompress.surgery import copy_with_replacements, find_weights
from mpocompress.tuning import FitOptions, SitePlan, fit_in_sequence, take_statistics
from mpocompress.tuning.fitting.call_order import call_ranks
from mpocompress.tuning.fitting.correction import cross_validated_correction, regression
from mpocompress.tuning.fitting.residual import StreamWatcher
from mpocompress.tuning.lockstep import OperationRecorder, Runner, stopping_layers
from mpocompress.tuning.padding import keep_mask, real_rows
from mpocompress.tuning.statistics.moments import CrossMoment, joined_rows
from mpocompress.tuning.statistics.upstream import Collector, Moments, Place, merged
from tests.planted import gaussian
from tests.tolerances import TOL

F32, F64 = TOL[torch.float32], TOL[torch.float64]


def inputs(rows: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows that excite few directions much, as activations do."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(features, features, generator=generator) * torch.exp(
        -torch.arange(features) / (features / 6)
    )
    rows_NI = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))
    return (rows_NI @ mix.T).to(dtype)


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for left, right in pairwise(sizes):
        layers += [nn.Linear(left, right, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """Two residual blocks after a norm, as in a transformer."""

    def __init__(self, width: int = 24, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.norm(self.embed(x))
        if attention_mask is not None and not bool(attention_mask.all()):
            h = h * attention_mask[..., None]  # an operation that only some batches have
        h = h + self.drop(self.down(torch.relu(self.up(h))))
        return h + self.out(torch.tanh(h))


def error(model: nn.Module, reference: nn.Module, *args: Tensor) -> float:
    with torch.no_grad():
        expected = reference.eval()(*args)
        return float((model.eval()(*args) - expected).norm() / expected.norm())


# -- moments


def test_moments_are_additive_and_exact():
    x, y = inputs(9000, 6, dtype=torch.float64), inputs(9000, 4, seed=1, dtype=torch.float64)
    whole, parts = CrossMoment(), CrossMoment()
    whole.add(x, y)
    for left, right in zip(x.split(1000), y.split(1000), strict=True):
        part = CrossMoment()
        part.add(left, right)
        parts.merge(part)
    assert whole.rows == parts.rows == 9000
    for moment in (whole, parts):
        product, left, right = moment.mean(centered=True)
        centered = (x - x.mean(0)).T @ (y - y.mean(0)) / 9000
        torch.testing.assert_close(product, centered, **F64["dense"])
        torch.testing.assert_close(left, x.mean(0), **F64["dense"])
        torch.testing.assert_close(right, y.mean(0), **F64["dense"])


def test_moments_are_as_exact_where_a_forward_has_autocast_on():
    x, y = inputs(300, 24), inputs(300, 8, seed=1)
    found = []
    for enabled in (False, True):
        own, cross = CrossMoment(), CrossMoment()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            own.add(x, x)
            cross.add(x, y)
        found.append((*own.mean(centered=True), *cross.mean(centered=False)))
    assert all(map(torch.equal, *found))


def test_rows_that_are_joined_are_all_rows_in_order():
    pieces = [(inputs(n, 5, seed=n), inputs(n, 3, seed=n)) for n in (1500, 700, 1, 4000, 30)]
    joined = list(joined_rows(pieces))
    assert [len(left) for left, _ in joined] == [2200, 4001, 30]
    for place in range(2):
        whole = torch.cat([piece[place] for piece in pieces])
        assert torch.equal(torch.cat([piece[place] for piece in joined]), whole)


def test_moments_without_rows_or_with_nan_are_refused():
    with pytest.raises(DataError, match="marks everything as padding"):
        CrossMoment().mean(centered=False)
    with pytest.raises(DataError, match="NaN or Inf"):
        CrossMoment().add(torch.full((2, 2), float("nan")), torch.ones(2, 2))


def test_moment_of_a_wide_activation_with_itself_is_that_of_two_equal_ones():
    x = inputs(300, 700, dtype=torch.float64)
    itself, twins = CrossMoment(), CrossMoment()
    for part in x.split(128):
        itself.add(part, part)
        twins.add(part, part.clone())
    for found, expected in zip(itself.mean(centered=True), twins.mean(centered=True), strict=True):
        torch.testing.assert_close(found, expected, **F64["apply"])
    part = itself.empty_like()
    part.add(x, x)
    itself.merge(part)
    torch.testing.assert_close(
        itself.mean(centered=False)[0], twins.mean(centered=False)[0], **F64["apply"]
    )


@pytest.mark.parametrize("order", ["ooc", "oco", "coo", "occ"])
@pytest.mark.parametrize("read_between", [False, True])
def test_moments_of_x_with_itself_and_with_others_add_up_in_any_order(order, read_between):
    """Equal means at first, as where a prefix is compressed that leaves the first rows alone."""
    x = inputs(400, 300, dtype=torch.float64)
    y = torch.cat([x[:100], inputs(300, 300, seed=1, dtype=torch.float64)])
    added, merged_up = CrossMoment(), CrossMoment()
    left, right = [], []
    for number, kind in enumerate(order):
        a = x[number * 100 : number * 100 + 100]
        b = a if kind == "o" else y[number * 100 : number * 100 + 100]
        left.append(a)
        right.append(b)
        added.add(a, b)
        part = CrossMoment()
        part.add(a, b)
        merged_up.merge(part)
        if read_between:
            added.mean(centered=True)
            merged_up.mean(centered=False)
    a, b = torch.cat(left), torch.cat(right)
    expected = (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)
    for moment in (added, merged_up, CrossMoment.sum_of([merged_up])):
        torch.testing.assert_close(moment.mean(centered=True)[0], expected, **F64["apply"])


def test_a_moment_of_x_with_itself_is_kept_as_a_triangle():
    """With the rows of 128 that its blocks have beside the diagonal."""
    moment = CrossMoment()
    x = inputs(50, 1000)
    moment.add(x, x)
    kept = sum(part.numel() for part in moment._sums.parts)
    assert kept <= 1000 * (1000 + 128) / 2


def test_moments_that_are_forgotten_are_still_counted():
    x = inputs(50, 30)
    moment, counted = CrossMoment(), CrossMoment()
    moment.add(x, x)
    counted.count(x)
    moment.forget()
    for found in (moment, counted):
        assert (found.rows, found.features) == (50, 30)
        with pytest.raises(DataError, match="only counted"):
            found.mean(centered=False)


@pytest.mark.parametrize("features", [4, 300])
def test_nan_in_one_feature_of_x_with_itself_is_refused(features):
    x = inputs(40, features)
    x[7, features - 1] = float("nan")
    with pytest.raises(DataError, match="NaN or Inf"):
        CrossMoment().add(x, x)


def test_padding_does_not_count():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    keep = keep_mask({"attention_mask": mask})
    x = torch.arange(18.0).reshape(2, 3, 3)
    assert torch.equal(real_rows(x, keep), x.reshape(6, 3)[[0, 1, 3]])
    assert torch.equal(keep_mask({"key_padding_mask": mask == 0}), mask.bool())
    assert torch.equal(keep_mask({"attention_mask": mask.float()}), mask.bool())
    added = torch.where(mask == 1, 0.0, -1e4)
    for name in ("attention_mask", "mask", "key_padding_mask"):
        assert keep_mask({name: added}) is None
        assert keep_mask({name: torch.zeros(2, 3)}) is None
    assert keep_mask({"key_padding_mask": mask.float()}) is None
    assert real_rows(x[:, 0], keep).shape == (2, 3)


def test_which_of_several_masks_is_of_padding():
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[1:, 3] = True
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    for mask in (causal, ~causal, causal.float()):
        both = {"mask": mask, "src_key_padding_mask": padding}
        assert torch.equal(keep_mask(both), ~padding)
        assert keep_mask({"mask": mask}) is None
    assert torch.equal(keep_mask({"mask": ~padding}), ~padding)
    # Activations of an encoder and a decoder of one length cannot be told apart.
    arguments = {"attention_mask": ~padding, "decoder_input_ids": torch.zeros(4, 4).long()}
    assert keep_mask(arguments) is None
    arguments["decoder_input_ids"] = torch.zeros(4, 3).long()
    assert torch.equal(keep_mask(arguments), ~padding)


# -- lockstep


def test_runners_stop_at_every_layer_in_turn_and_change_nothing():
    model = mlp(6, 8, 5, 4)
    x = inputs(3, 6)
    layers = [module for module in model if isinstance(module, nn.Linear)]
    runner = Runner(model, Batch(args=(x,)), OperationRecorder())
    seen = []
    with stopping_layers(layers, lambda layer, own, value: own.stop_at(layer, value)):
        runner.start()
        while runner.arrival is not None:
            layer = runner.arrival.layer
            seen.append((layer, runner.arrival.input.shape))
            runner.resume(
                lambda value, layer=layer: nn.functional.linear(value, layer.weight, layer.bias)
            )
    assert [layer for layer, _ in seen] == layers
    torch.testing.assert_close(runner.output, model(x), **F32["apply"])
    assert all("forward" not in vars(layer) for layer in layers)


def test_errors_of_the_model_surface_in_the_caller_and_threads_end():
    class Picky(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if float(x.max()) > 100:
                raise ValueError("an entry above 100")
            return super().forward(x)

    model = Picky(*mlp(6, 8, 4))
    before = threading.active_count()
    with pytest.raises(ValueError, match="above 100"):  # not in the batch that is tried first
        mpo.compress(model, bond_dim=2, data=[torch.randn(3, 6), torch.full((3, 6), 101.0)])
    assert threading.active_count() == before
    assert all("forward" not in vars(module) for module in model.modules())


class Branches(nn.Module):
    """Layers that a batch calls in an order of its own: its first entries are their numbers."""

    def __init__(self) -> None:
        super().__init__()
        # The last one called is the first that the model has.
        self.head = nn.Linear(16, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for number in x[0, :3].int().tolist():
            if number >= 0:
                x = x + torch.tanh(self.layers[number](x))
        return self.head(x)


def along(*paths: tuple[int, int, int]) -> list[Tensor]:
    data = [inputs(40, 16, seed=number) for number in range(len(paths))]
    for x, path in zip(data, paths, strict=True):
        x[0, :3] = torch.tensor(path)
    return data


def test_layers_are_fitted_on_the_batches_that_call_them():
    torch.manual_seed(0)
    model = Branches().eval()
    data = along((0, 1, 2), (1, -1, -1), (-1, -1, -1), (0, 2, -1))
    result = mpo.compress(model, bond_dim=4, layout="balanced", data=data)
    rows = {layer.name: layer.relative_output_error for layer in result.report.layers}
    assert all(rows[name] is not None for name in ("head", "layers.0", "layers.1", "layers.2"))
    whole = mpo.compress(model, bond_dim=256, layout="balanced", data=data, if_smaller=False).model
    plain = mpo.compress(model, bond_dim=4, layout="balanced").model
    for x in data:
        expected = model(x)
        torch.testing.assert_close(whole(x), expected, **TOL[torch.float32]["apply"])
        ours, others = ((found(x) - expected).norm() for found in (result.model, plain))
        assert ours < others


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([(-1, -1, -1), (0, 1, 2)], ["layers.0", "layers.1", "layers.2", "head"]),
        ([(2, -1, -1), (1, 2, -1), (0, 1, -1)], ["layers.0", "layers.1", "layers.2", "head"]),
        ([(2, 1, 0), (1, -1, -1)], ["layers.2", "layers.1", "layers.0", "head"]),
        # One way round and the other.
        ([(0, 1, -1), (1, 0, 2)], ["layers.0", "layers.1", "layers.2", "head"]),
    ],
)
def test_no_layer_is_fitted_before_all_batches_wait_there(paths, expected):
    order: list[str] = []
    model = Branches()
    mpo.compress(
        model,
        mpo.plan(model, bond_dim=2, layout="balanced"),
        data=along(*paths),
        progress=lambda what, done, total: order.append(what),
    )
    assert [name for name in dict.fromkeys(order) if name in expected] == expected


def test_layers_that_batches_call_alone_have_a_place_in_the_order():
    """Else the order would seem to be unknown, and be read again before each layer."""
    model = Branches().eval()
    layers = list(model.layers)
    data = along((2, -1, -1), (0, -1, -1))
    ranks = call_ranks(model, layers, list(mpo.loading.as_batches(data)))
    assert set(ranks) == {layers[0], layers[2]}


def test_layers_that_only_empty_batches_reach_are_truncated():
    class Routed(nn.Module):
        def __init__(self, skips: bool) -> None:
            super().__init__()
            self.skips = skips
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows = (x[:, 0].clamp(0, 2).int() == number).nonzero()[:, 0]
                if len(rows) or not self.skips:
                    y = y.index_add(0, rows, expert(x[rows]))
            return y

    data = [x.clamp_max(0.9) for x in along((0, 0, 0), (0, 0, 0), (0, 0, 0))]
    data[1][5, 0] = 2.0  # the last expert has a single row, the second none
    for skips in (False, True):
        result = mpo.compress(Routed(skips), bond_dim=2, layout="balanced", data=data)
        found = {layer.name: layer.relative_output_error for layer in result.report.layers}
        assert found["experts.1"] is None
        assert found["experts.0"] is not None
        assert found["experts.2"] is not None


def test_data_that_is_padding_throughout_is_refused():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x) * attention_mask[..., None]

    data = [{"x": inputs(40, 16).reshape(8, 5, 16), "attention_mask": torch.zeros(8, 5).long()}]
    with pytest.raises(DataError, match="marks everything as padding"):
        mpo.compress(Masked(), bond_dim=2, data=data)


@pytest.mark.parametrize("masked", [False, True])
def test_residual_streams_are_found(masked):
    model = Block().eval()
    x = inputs(8, 24).reshape(2, 4, 24)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1 - masked]])
    watcher = StreamWatcher()
    layers = {
        module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }

    def compute(layer: nn.Module, runner: Runner, value: Tensor) -> Tensor:
        return runner.call_layer(layer, lambda v: type(layer).forward(layer, v), value)

    runner = Runner(model, Batch(args=(x,), kwargs={"attention_mask": mask}), watcher)
    with stopping_layers(list(layers), compute):
        runner.start()
    found = {name: watcher.take_stream(layer) for layer, name in layers.items()}
    assert {name for name, stream in found.items() if stream is not None} == {"down", "out"}
    with torch.no_grad():
        h = model.norm(model.embed(x)) * mask[..., None]
    torch.testing.assert_close(found["down"].value, h, **F32["apply"])


# -- gradients


def test_output_metric_of_the_last_layer_is_the_identity_and_earlier_ones_are_jacobians():
    model = mlp(6, 8, 4, bias=False).double()
    linears = [module for module in model if isinstance(module, nn.Linear)]
    x = inputs(4000, 6, dtype=torch.float64)
    calls = [Batch(args=(part,)) for part in x.split(500)]
    found = take_statistics(model, linears, calls, all_data=True).layers
    last = found[linears[1]].output_metric
    torch.testing.assert_close(last, torch.eye(4, dtype=torch.float64), rtol=0.2, atol=0.1)
    with torch.no_grad():
        slope = 1 - torch.tanh(linears[0](x)) ** 2
    jacobian = linears[1].weight.detach()[None] * slope[:, None, :]
    expected = (jacobian.mT @ jacobian).mean(0)
    torch.testing.assert_close(found[linears[0]].output_metric, expected, rtol=0.2, atol=0.1)
    torch.testing.assert_close(
        found[linears[0]].inputs.mean(centered=False)[0], x.mT @ x / len(x), **F64["apply"]
    )
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("rows", "size", "seen"),
    [(200, 10, 70), (4000, 50, 1000)],  # 8 rows for each of 8 features; a quarter of the batches
)
def test_moments_stop_once_every_layer_has_seen_enough_rows(rows, size, seen):
    model = mlp(6, 8, 4, bias=False)
    linears = [module for module in model if isinstance(module, nn.Linear)]
    calls = [Batch(args=(part,)) for part in inputs(rows, 6).split(size)]
    few = take_statistics(model, linears, calls).layers
    every = take_statistics(model, linears, calls, all_data=True).layers
    assert {m.inputs.rows for m in few.values()} == {seen}
    assert {m.inputs.rows for m in every.values()} == {rows}


def test_what_is_not_wanted_of_inputs_is_counted_and_changes_nothing_else():
    model = mlp(6, 8, 8, 4, bias=False)
    linears = [module for module in model if isinstance(module, nn.Linear)]
    calls = [Batch(args=(part,)) for part in inputs(400, 6).split(10)]
    whole = take_statistics(model, linears, calls)
    some = take_statistics(model, linears, calls, inputs_of=linears[:1])
    assert some.output_energy == whole.output_energy
    for layer in linears:
        found, expected = some.layers[layer], whole.layers[layer]
        assert torch.equal(found.output_metric, expected.output_metric)
        assert found.inputs.rows == expected.inputs.rows
        assert found.inputs.features == expected.inputs.features
    first = (side.layers[linears[0]].inputs.mean(centered=False)[0] for side in (some, whole))
    assert torch.equal(*first)
    with pytest.raises(DataError, match="only counted"):
        some.layers[linears[1]].inputs.mean(centered=False)


def test_output_energy_is_that_of_the_batches_that_the_moments_are_from():
    model = mlp(6, 8, 4, bias=False)
    linears = [module for module in model if isinstance(module, nn.Linear)]
    data = inputs(400, 6)
    calls = [Batch(args=(part,)) for part in data.split(50)]
    with torch.no_grad():
        squares = [float(model(call.args[0]).double().square().sum()) for call in calls]
    every = take_statistics(model, linears, calls, all_data=True)
    assert every.output_energy == pytest.approx(sum(squares), rel=1e-6)
    few = take_statistics(model, linears, calls)
    assert {moment.inputs.rows for moment in few.layers.values()} == {100}
    order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(0)).tolist()
    assert few.output_energy == pytest.approx(sum(squares[i] for i in order[:2]), rel=1e-6)


# -- the fit


def test_full_bond_dimension_reproduces_the_model():
    model = Block().eval()
    data = [inputs(40, 24, seed=s).reshape(4, 10, 24) for s in range(3)]
    result = mpo.compress(model, bond_dim=24, layout="svd", if_smaller=False, data=data)
    assert error(result.model, model, data[0]) < 1e-4
    assert all(e < 1e-4 for e in _output_errors(result))


def _output_errors(result: mpo.CompressionResult) -> list[float]:
    return [layer.relative_output_error for layer in result.report.compressed_layers]


@pytest.mark.parametrize("layout", ["svd", "balanced"])
def test_data_beats_weights_on_other_data(layout):
    model = mlp(32, 48, 48, 32).eval()
    data = [inputs(100, 32, seed=s) for s in range(10)]
    held_out = inputs(500, 32, seed=99)
    plain = mpo.compress(model, bond_dim=6, layout=layout)
    fitted = mpo.compress(model, bond_dim=6, layout=layout, data=data)
    assert error(fitted.model, model, held_out) < 0.8 * error(plain.model, model, held_out)
    assert [layer.bond_dims for layer in fitted.report.compressed_layers] == [
        layer.bond_dims for layer in plain.report.compressed_layers
    ]
    assert fitted.report.totals.parameters == plain.report.totals.parameters


def test_streams_are_repaired():
    model = Block(dropout=0.0).eval()
    calls = [Batch(args=(inputs(60, 24, seed=s),)) for s in range(20)]
    held_out = inputs(400, 24, seed=99)
    sites = {site.name: site for site in find_weights(model).sites}
    plans = [
        SitePlan(site=sites["embed"], layout=Layout.svd(24, 24), bond_dims=(3,)),
        SitePlan(site=sites["out"], layout=Layout.svd(24, 24), bond_dims=(24,)),
    ]
    errors = []
    for repair in (False, True):
        found = fit_in_sequence(model, plans, calls, options=FitOptions(repair_streams=repair))
        ours = copy_with_replacements(model, {site: w.mpo for site, w in found.items()})
        for site, weight in found.items():
            ours.get_submodule(site.name).bias.data.copy_(weight.bias)
        errors.append(error(ours, model, held_out))
    assert errors[1] < errors[0]


class Funnel(nn.Module):
    """A layer, then one with fewer outputs than inputs that may feed a residual stream."""

    def __init__(self, hidden: int, has_stream: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.wide = nn.Linear(8, 8), nn.Linear(8, hidden)
        self.narrow = nn.Linear(hidden, 8)
        self.has_stream = has_stream

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.narrow(torch.tanh(self.wide(h)))
        return h + y if self.has_stream else y


@pytest.mark.parametrize("has_stream", [False, True])
@pytest.mark.parametrize("hidden", [12, 32])  # more, and fewer outputs than half of the inputs
def test_a_fit_in_sequence_is_the_regression_of_what_is_lost_upstream(hidden, has_stream):
    model = Funnel(hidden, has_stream).double().eval()
    x = inputs(400, 8, dtype=torch.float64)
    sites = {site.name: site for site in find_weights(model).sites}
    plans = [
        SitePlan(site=sites[name], layout=Layout.svd(*sites[name].shape), bond_dims=(bond,))
        for name, bond in (("first", 3), ("narrow", 8))
    ]
    one = Batch(args=(x[None],))  # nothing to check a ridge on: the smallest
    first, narrow = fit_in_sequence(model, plans, [one]).values()
    with torch.no_grad():
        h = model.first(x)
        ours_h = x @ first.mpo.to_dense().mT + first.bias
        dense, ours = (torch.tanh(model.wide(value)) for value in (h, ours_h))
        weight = model.narrow.weight
        lost = (dense - ours) @ weight.mT + (h - ours_h if has_stream else 0.0)
        ours, residual = ours - ours.mean(0), lost - lost.mean(0)
        covariance = ours.mT @ ours / len(x)
        diagonal = covariance.diagonal()
        ridge = 1e-3 * diagonal.clamp_min(diagonal.median()).diag()
        correction = (residual.mT @ ours / len(x)) @ torch.linalg.inv(covariance + ridge)
    torch.testing.assert_close(narrow.mpo.to_dense(), weight + correction, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("has_stream", [False, True])
def test_what_is_lost_upstream_is_the_same_however_it_is_collected(has_stream, centered):
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1:, 3:] = False
    masks = [None if index == 1 else mask for index in range(5)]
    places = [
        Place(
            inputs(20, 12, seed=index).reshape(4, 5, 12),
            inputs(20, 12, seed=index + 50).reshape(4, 5, 12),
            (torch.randn(4, 5, 3), torch.randn(4, 5, 3)) if has_stream else None,
        )
        for index in range(5)
    ]
    rows = [
        (real_rows(p.dense, m), real_rows(p.ours, m)) for p, m in zip(places, masks, strict=True)
    ]
    dense, ours = (torch.cat(side).double() for side in zip(*rows, strict=True))
    torch.manual_seed(0)
    narrow, wide = nn.Linear(12, 3), nn.Linear(12, 20)
    collector = Collector(masks)
    for number, layer in enumerate((narrow, wide, narrow)):
        streams = has_stream and layer is narrow
        with torch.no_grad():
            weight = layer.weight.double()
            lost = (dense - ours) @ weight.mT
            if streams:
                wrong = [
                    real_rows(p.streams[0] - p.streams[1], m)
                    for p, m in zip(places, masks, strict=True)
                ]
                lost += torch.cat(wrong).double()
        at_layer = places if streams else [Place(p.dense, p.ours, None) for p in places]
        folds = collector.collect(layer, at_layer)
        assert [fold.inputs.rows for fold in folds] == [42, 34]
        assert all((fold.cross is None) == (number == 0) for fold in folds)  # then it is shared
        found = regression(weight, merged(folds), centered=centered)
        x, e = (ours - ours.mean(0), lost - lost.mean(0)) if centered else (ours, lost)
        for value, expected in (
            (found.inputs_II, x.mT @ x / len(x)),
            (found.residual_OI, e.mT @ x / len(x)),
            (found.mean_I, ours.mean(0)),
            (found.residual_mean_O, lost.mean(0)),
        ):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outputs", [1, 400])  # of many outputs, few combinations are compared
def test_a_correction_that_carries_over_only_at_the_smallest_ridge_is_found(outputs):
    """Noise in the large directions, what is lost in the small ones: no slope leads there."""
    weight = torch.zeros(outputs, 32, dtype=torch.float64)
    scales = torch.linspace(-1.0, 2.0, outputs)
    # Turned, or a share of each feature's own square would tell large from small.
    turn, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(2)))
    folds = []
    for fold, sign in enumerate((1.0, -1.0)):
        x = torch.randn(400, 32, generator=torch.Generator().manual_seed(fold))
        x *= torch.cat([torch.full((2,), 3.0), torch.full((30,), 0.03)])
        lost = 3 * x[:, 2:10].sum(1, keepdim=True) + sign * 0.04 * x[:, :1]
        x = x @ turn
        of_inputs, of_lost = CrossMoment(), CrossMoment()
        of_inputs.add(x, x)
        of_lost.add(lost * scales, x)
        folds.append(Moments(inputs=of_inputs, cross=of_inputs, residual=of_lost))
    whole = regression(weight, merged(folds), centered=True)
    found = cross_validated_correction(weight, folds, whole, centered=True)
    assert whole.gain(found) > 0
    torch.testing.assert_close(found, whole.correction(1e-3))


def test_batches_of_one_row_are_fitted():
    model = mlp(6, 8, 4).eval()
    data = [inputs(1, 6, seed=seed) for seed in range(2)]
    result = mpo.compress(model, bond_dim=2, layout="svd", if_smaller=False, data=data)
    assert all(bool(torch.isfinite(p).all()) for p in result.model.parameters())


def test_bias_takes_up_the_mean_of_the_error():
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    data = inputs(400, 32) + 5.0
    result = mpo.compress(model, bond_dim=2, layout="svd", data=[data])
    with torch.no_grad():
        lost = (result.model(data) - model(data)).mean(0)
    assert float(lost.abs().max()) < 1e-3


@pytest.mark.parametrize(
    "batch_of",
    [
        lambda x, mask: {"x": x, "attention_mask": mask},
        lambda x, mask: {"x": x, "attention_mask": mask.float()},
        lambda x, mask: (x, mask),
    ],
    ids=["named", "floating", "positional"],
)
def test_padding_is_not_fitted(batch_of):
    model = Block().eval()
    x = inputs(80, 24).reshape(8, 10, 24)
    mask = (torch.arange(10) < 5).expand(8, 10).long()
    noisy = x.clone()
    noisy[:, 5:] = 100 * torch.randn(8, 5, 24, generator=torch.Generator().manual_seed(5))
    results = [
        mpo.compress(model, bond_dim=4, layout="svd", data=[batch_of(v, mask)]) for v in (x, noisy)
    ]
    clean, other = (result.model.state_dict() for result in results)
    for name in clean:
        torch.testing.assert_close(clean[name], other[name], **F32["gradient"])


def test_model_is_untouched_and_results_repeat():
    model = Block().train()
    model.up.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [inputs(40, 24, seed=s) for s in range(3)]
    first = mpo.compress(model, bond_dim=4, data=data, seed=3)
    second = mpo.compress(model, bond_dim=4, data=data, seed=3)
    assert model.training
    assert not model.up.weight.requires_grad
    assert model.down.weight.requires_grad
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    one, two = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert first.report.settings["rows_of_data"] == 120


def test_few_samples_dead_inputs_and_constant_inputs_work():
    model = mlp(32, 48, 32).eval()
    few = inputs(5, 32)
    few[:, :10] = 0
    for data in (few, torch.zeros(4, 32), torch.ones(1, 32)):
        result = mpo.compress(model, bond_dim=6, data=[data])
        assert all(bool(p.isfinite().all()) for p in result.model.parameters())
        assert error(result.model, model, data) < (0.5 if data is few else 1e-5)


def test_inputs_that_are_constant_up_to_rounding_say_nothing_of_errors():
    """Their covariance is noise: cores were fitted to it, with errors of 6 relative to it."""
    noise, mean = gaussian(64, 6, seed=0), gaussian(1, 6, seed=1)
    weight, found = gaussian(4, 6, seed=2), {}
    for size in (1e-7, 1e-3):
        ours, dense = (CrossMoment() for _ in range(2))
        rows = (mean * (1 + size * noise)).float()
        ours.add(rows, rows)
        dense.add(rows.flip(0), rows)
        moments = Moments(inputs=ours, cross=dense, residual=None)
        found[size] = regression(weight, moments, centered=True)
        whole = regression(weight, moments, centered=False)
        assert bool(whole.inputs_II.any())
    assert not found[1e-7].inputs_II.any()
    assert not found[1e-7].residual_OI.any()
    assert bool(found[1e-3].inputs_II.any())
    assert bool(found[1e-3].residual_OI.any())


def test_few_samples_are_fitted_for_others():
    """With fewer rows than bond dimensions they could be met exactly, at the cost of all others."""
    model = mlp(32, 48, 32).eval()
    few, others = inputs(5, 32), inputs(500, 32, seed=9)
    fitted = mpo.compress(model, bond_dim=6, data=[few])
    blind = mpo.compress(model, bond_dim=6)
    assert error(fitted.model, model, others) < 0.95 * error(blind.model, model, others)
    (layer, _) = fitted.report.compressed_layers
    with torch.no_grad():
        lost = fitted.model[0](few) - model[0](few)
        centered = model[0](few) - model[0](few).mean(0)
    assert layer.relative_output_error == pytest.approx(
        float(lost.norm() / centered.norm()), rel=0.05
    )


def test_shared_and_tied_layers_are_fitted_once():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))))

    torch.manual_seed(0)
    model = Shared().eval()
    result = mpo.compress(model, bond_dim=6, layout="svd", data=[inputs(300, 24)])
    assert result.model.a.cores[0] is result.model.b.cores[0]
    assert torch.equal(result.model.a.bias, model.a.bias)
    assert torch.equal(result.model.b.bias, model.b.bias)
    assert len(result.report.compressed_layers) == 2


def test_layers_that_the_data_does_not_reach_are_truncated_and_say_so():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    result = mpo.compress(Wrapper(), bond_dim=4, data=[inputs(50, 32)])
    by_name = {layer.name: layer for layer in result.report.compressed_layers}
    assert by_name["used"].relative_output_error is not None
    assert by_name["unused"].relative_output_error is None
    assert by_name["unused"].discarded_weight_bound is not None


@pytest.mark.parametrize("sweeps", [-1, True, 2.5])
def test_impossible_numbers_of_sweeps_are_refused(sweeps):
    with pytest.raises(DataError, match="0 or more"):
        mpo.compress(mlp(16, 16), bond_dim=2, data=[inputs(9, 16)], sweeps=sweeps)


def test_no_data_is_refused():
    with pytest.raises(DataError):
        mpo.compress(mlp(16, 16), bond_dim=2, data=[])


def test_sweeps_use_the_whole_output_metric_where_it_is_affordable(monkeypatch):
    used = []
    over_sites = Metric.over_sites

    def counted(metric, layout):
        used.append(layout)
        return over_sites(metric, layout)

    monkeypatch.setattr(Metric, "over_sites", counted)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)).eval()
    data = [torch.randn(100, 16, generator=torch.Generator().manual_seed(0))]
    mpo.compress(model, bond_dim=2, layout="balanced", data=data)
    assert not used
    monkeypatch.setattr("mpocompress.tuning.fitting.plan._EXACT_MACS", 16 * 24 * 40)
    mpo.compress(model, bond_dim=2, layout="svd", data=data)
    mpo.compress(model, bond_dim=2, layout="balanced", data=data, include=["0"])
    assert not used
    mpo.compress(model, bond_dim=2, layout="balanced", data=data)
    assert len(used) == 2
