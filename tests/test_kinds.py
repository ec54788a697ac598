"""Laws that hold for every kind of weight: see `tests/kinds.py` for the models."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

import mpocompress as mpo
from mpocompress.export import export_onnx, verify
from mpocompress.layers import MPOLayer
from mpocompress.layers.opened import layers_called
from mpocompress.mpo import MPO
from mpocompress.surgery import adapter_for, find_weights, open_modules, select_sites
from tests.kinds import KINDS, Kind
from tests.tolerances import TOL

EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
EXACT: Mapping[str, Any] = {"bond_dim": 10_000, "if_smaller": False}


def main(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def run(model: nn.Module, batch: Any) -> Tensor:
    return main(model(**batch) if isinstance(batch, dict) else model(batch))


def compressed(kind: Kind, model: nn.Module, **options: Any) -> mpo.CompressionResult:
    return mpo.compress(model, include=kind.include, **options)


def layers(model: nn.Module) -> list[MPOLayer]:
    return [module for module in model.modules() if isinstance(module, MPOLayer)]


def error_on_data(kind: Kind, model: nn.Module, dense: nn.Module) -> float:
    batches = kind.batches(torch.float64)
    with torch.no_grad():
        wrong = sum(float((run(model, b) - run(dense, b)).square().sum()) for b in batches)
        total = sum(float(run(dense, b).square().sum()) for b in batches)
    return (wrong / total) ** 0.5


@DTYPES
@EVERY
def test_at_the_maximal_bond_dimension_nothing_changes(kind, dtype):
    dense = kind.make().to(dtype)
    for layout in ("svd", "auto", "balanced"):
        model = compressed(kind, dense, layout=layout, **EXACT).model
        assert layers(model)
        for batch in kind.batches(dtype)[:2]:
            inputs = [
                value.requires_grad_()
                for value in (batch.values() if isinstance(batch, dict) else [batch])
                if value.is_floating_point()
            ]
            expected = run(dense, batch)
            upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
            wanted = torch.autograd.grad(expected, inputs, upstream.to(dtype)) if inputs else ()
            found = run(model, batch)
            assert_close(found, expected, **TOL[dtype]["apply"])
            got = torch.autograd.grad(found, inputs, upstream.to(dtype)) if inputs else ()
            for ours, theirs in zip(got, wanted, strict=True):
                assert_close(ours, theirs, **TOL[dtype]["gradient"])


@EVERY
def test_gradients_of_the_cores_are_those_of_the_dense_layer(kind):
    dense = kind.make().double()
    calls: list[tuple[nn.Module, Tensor]] = []
    dense = open_modules(dense)
    sites = select_sites(find_weights(dense), kind.include)
    for module in [module for site in sites for module in site.modules]:
        module.register_forward_hook(lambda layer, args, _out: calls.append((layer, args[0])))
    with layers_called(dense):
        run(dense, kind.batches(torch.float64)[0])
    assert calls
    for module, value in calls:
        module._forward_hooks.clear()
        adapter = adapter_for(module)
        matrix_OI = adapter.matrix(module)
        for layout in adapter.layouts(module) or (None,):
            chosen = layout or ((matrix_OI.shape[0], 1), (1, matrix_OI.shape[1]))
            layer = adapter.build(module, MPO.from_matrix(matrix_OI, chosen, bond_dim=2))
            if hasattr(module, "projection"):
                layer.projection = module.projection  # as surgery does
            found = layer(value)
            upstream = torch.randn_like(found)
            parameters = list(layer.cores.parameters())
            ours = torch.autograd.grad(found, parameters, upstream)
            weight = layer.weight.mT if adapter.kind == "linear" and adapter.transposed else None
            weight = layer.weight if weight is None else weight
            twin = functional_call(module, {"weight": weight}, (value,))
            assert_close(found, twin, **TOL[torch.float64]["apply"])
            padding = getattr(module, "padding_idx", None)
            if padding is not None:  # torch gives this row no gradient
                upstream = upstream * (value != padding)[..., None]
            for mine, theirs in zip(
                ours, torch.autograd.grad(twin, parameters, upstream), strict=True
            ):
                assert_close(mine, theirs, **TOL[torch.float64]["gradient"])


@EVERY
def test_data_make_it_better_at_equal_parameters(kind):
    dense = kind.make().double()
    options = {"bond_dim": kind.bond_dim, "layout": "svd", "if_smaller": False}
    plain = compressed(kind, dense, **options)
    fitted = compressed(kind, dense, data=kind.batches(torch.float64), **options)
    counts = [
        [(layer.parameters.compressed, layer.status) for layer in result.report.layers]
        for result in (plain, fitted)
    ]
    assert counts[0] == counts[1]
    assert any(layer.relative_output_error is not None for layer in fitted.report.layers)
    ours, theirs = (error_on_data(kind, r.model, dense) for r in (fitted, plain))
    assert ours < kind.gain * theirs


@EVERY
def test_saved_loaded_and_made_dense_again(kind, tmp_path):
    dense = kind.make()
    result = compressed(kind, dense, bond_dim=kind.bond_dim, layout="svd", if_smaller=False)
    mpo.save(result, tmp_path / "out")
    skeleton = kind.make()
    for parameter in skeleton.parameters():
        parameter.data.zero_()
    loaded = mpo.load(tmp_path / "out", model=skeleton)
    batch = kind.batches(torch.float32)[0]
    assert torch.equal(run(loaded, batch), run(result.model, batch))
    assert [type(layer) for layer in layers(loaded)] == [type(m) for m in layers(result.model)]
    with torch.device("meta"):
        empty = kind.make()
    assert torch.equal(run(mpo.load(tmp_path / "out", model=empty), batch), run(loaded, batch))
    again = kind.make()
    state = mpo.densify(tmp_path / "out")
    assert set(state) == set(again.state_dict())
    again.load_state_dict(state)
    assert_close(run(again, batch), run(loaded, batch), **TOL[torch.float32]["apply"])


@EVERY
def test_a_copy_trains_by_itself(kind):
    dense = kind.make().train()
    model = compressed(kind, dense, bond_dim=kind.bond_dim, layout="svd", if_smaller=False).model
    assert all(layer.training for layer in layers(model))
    assert not any(layer.training for layer in layers(copy.deepcopy(model).eval()))
    twin = copy.deepcopy(model)
    batch = kind.batches(torch.float32)[0]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        torch.manual_seed(0)  # of dropout
        loss = run(twin, batch).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert all(p.grad is not None for layer in layers(twin) for p in layer.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert mpo_ties(model) == mpo_ties(twin)


def mpo_ties(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.onnx
@EVERY
def test_onnx_runtime_agrees(kind, tmp_path):
    dense = kind.make()
    for layout in ("svd", "auto"):
        options = {"bond_dim": kind.bond_dim, "layout": layout, "if_smaller": False}
        model = compressed(kind, dense, **options).model
        batch = kind.batches(torch.float32)[0]
        export_onnx(model, tmp_path / "model.onnx", batch)
        found = verify(tmp_path / "model.onnx", model, kind.batches(torch.float32), tolerance=1e-4)
        found.raise_if_failed()
        assert {1, 3, 7} <= set(found.batch_sizes)


@pytest.mark.onnx
@EVERY
def test_onnx_runtime_agrees_where_it_stays_dense(kind, tmp_path):
    dense = kind.make()
    export_onnx(dense, tmp_path / "model.onnx", kind.batches(torch.float32)[0])
    verify(
        tmp_path / "model.onnx", dense, kind.batches(torch.float32), tolerance=1e-4
    ).raise_if_failed()


@EVERY
def test_identity_gauge(kind):
    dense = kind.make().double()
    options = {"bond_dim": kind.bond_dim, "layout": "svd", "if_smaller": False}
    plain = compressed(kind, dense, **options)
    gauged = compressed(kind, dense, gauge="identity", **options)
    batch = kind.batches(torch.float64)[0]
    found, expected = run(gauged.model, batch), run(plain.model, batch)
    assert_close(found, expected, **TOL[torch.float64]["apply"])
    assert gauged.report.totals.parameters.model.compressed < (
        plain.report.totals.parameters.model.compressed
    )


def test_sweeps_on_the_loss_leave_lookups_and_what_is_tied_to_them():
    kind = KINDS["embedding tied with the head"]
    dense = kind.make()
    result = mpo.compress(
        dense, bond_dim=4, include=["*"], layout="svd", if_smaller=False, sweeps=0
    )
    table = [core.detach().clone() for core in result.model.table.cores]
    data = kind.batches(torch.float32)
    history = mpo.sweep(result.model, reference=dense, data=data, sweeps=1, local_steps=2)
    assert {record.layer for record in history} == {"body"}
    assert all(map(torch.equal, table, result.model.table.cores))
    assert result.model.head.cores[0] is result.model.table.cores[0]


def test_tables_need_data_or_their_name():
    dense = KINDS["embedding"].make()
    plan = mpo.plan(dense, bond_dim=4)
    kept = {layer.name: layer.reason for layer in plan if layer.action == "keep"}
    assert "without data it is not known which rows matter" in kept["table"]
    with_data = mpo.plan(dense, bond_dim=4, data=KINDS["embedding"].batches(torch.float32))
    assert "table" in {layer.name for layer in with_data.compressed}
    by_name = mpo.plan(dense, bond_dim=4, include=["table"])
    assert [layer.name for layer in by_name.compressed] == ["table"]


def test_rows_that_data_never_shows_are_as_good_as_their_subspace():
    """A table of rank 2 with two rows beside it: frequent rows decide, rare ones follow."""
    kind = KINDS["embedding"]
    dense = kind.make().double()
    basis = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mix = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    dense.table.weight.data = mix @ basis
    dense.table.weight.data[39] += 10.0  # never looked up: weights alone would follow it
    data = kind.batches(torch.float64)
    assert all(int(batch.max()) < 39 for batch in data)
    options = {"bond_dim": 2, "include": ["table"], "layout": "svd", "if_smaller": False}
    wanted = dense.table.weight[:39].detach()
    errors = []
    for given in ({"data": data}, {}):
        found = mpo.compress(dense, **options, **given).model.table.to_dense()[:39]
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[0] < 0.02
    assert errors[1] > 10 * errors[0]


def test_what_an_embedding_does_beside_looking_up_keeps_it_dense():
    model = nn.ModuleDict(
        {
            "norm": nn.Embedding(4, 3, max_norm=1.0),
            "freq": nn.Embedding(4, 3, scale_grad_by_freq=True),
            "bag": nn.EmbeddingBag(4, 3),
            "lazy": nn.LazyLinear(3),
            "lazy conv": nn.LazyConv2d(3, 3),
            "normed": nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 3, 3)),
            "own": type("Own", (nn.Conv1d,), {"forward": lambda self, x: x})(3, 3, 3),
        }
    )
    reasons = find_weights(model).refused
    assert "max_norm" in reasons["norm"]
    assert "scale_grad_by_freq" in reasons["freq"]
    assert "nn.EmbeddingBag" in reasons["bag"]
    assert "lazy and not yet initialized" in reasons["lazy"]
    assert "lazy and not yet initialized" in reasons["lazy conv"]
    assert "weight is parametrized" in reasons["normed"]
    assert "has its own forward" in reasons["own"]
    assert not find_weights(model).sites
