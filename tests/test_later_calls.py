"""Weights that a forward pass calls more than once are fitted for all of their calls."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mpocompress as mpo
from mpocompress.loading import Batch
from mpocompress.mpo import Layout
from mpocompress.surgery import find_weights, open_modules
from mpocompress.tuning import (
    OutputMetrics,
    SitePlan,
    fit_in_sequence,
    later_calls,
    take_statistics,
    with_fitted,
)
from mpocompress.tuning.fitting.correction import regression
from mpocompress.tuning.statistics.later_calls import LaterCalls
from mpocompress.tuning.statistics.moments import CrossMoment, RowCounts
from mpocompress.tuning.statistics.upstream import Moments
from tests.tolerances import TOL

N = 32
F64 = TOL[torch.float64]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(model: nn.Module, reference: nn.Module, *args: Tensor) -> float:
    with torch.no_grad():
        expected = reference.eval()(*args)
        return float((model.eval()(*args) - expected).norm() / expected.norm())


class Twice(nn.Module):
    """First called with the left half of the features, then with the right half."""

    def __init__(self, modules: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(N, N, bias=bias)
        self.second = self.first if modules == 1 else nn.Linear(N, N, bias=bias)
        self.second.weight = self.first.weight
        nn.init.normal_(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        left = torch.arange(N) < N // 2
        z = torch.tanh(self.first(x * left))
        return self.second(z * ~left)


class Cell(nn.Module):
    """A recurrence by hand: its weight is first called with zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(N, N, bias=False)
        nn.init.normal_(self.inner.weight, std=0.3)

    def forward(self, x_TNI: Tensor) -> Tensor:
        state = torch.zeros_like(x_TNI[0])
        scales = 4 * torch.exp(-torch.arange(N) / 6)
        for x in x_TNI:
            state = scales * torch.tanh(x + self.inner(state))
        return state


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("modules", [1, 2])
def test_data_beats_weights_where_calls_differ(modules, bias):
    """Fitted to its first call alone, the second one's half of the weight came out at random."""
    model, held_out = Twice(modules, bias), random(1000, N, seed=1)
    plain = mpo.compress(model, bond_dim=12, layout="svd")
    fitted = mpo.compress(model, bond_dim=12, layout="svd", data=list(random(4000, N).split(500)))
    assert error(fitted.model, model, held_out) < 0.9 * error(plain.model, model, held_out)


def test_a_weight_that_is_first_called_with_zeros_is_fitted_to_data():
    model, held_out = Cell(), random(5, 400, N, seed=99)
    plain = mpo.compress(model, bond_dim=8, layout="svd")
    data = [random(5, 50, N, seed=seed) for seed in range(8)]
    fitted = mpo.compress(model, bond_dim=8, layout="svd", data=data)
    assert error(fitted.model, model, held_out) < 0.5 * error(plain.model, model, held_out)


class Repeated(nn.Module):
    """One encoder block, three times, as in ALBERT."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.TransformerEncoderLayer(
            N, 4, 2 * N, dropout=0.0, batch_first=True, norm_first=norm_first
        )

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_block_that_is_applied_repeatedly_is_better_for_its_later_calls(norm_first):
    model = Repeated(norm_first).eval()
    scales = torch.exp(-torch.arange(N) / 6)
    data = [random(8, 10, N, seed=seed) * scales for seed in range(12)]
    held_out = random(100, 10, N, seed=99) * scales
    opened, calls = open_modules(model), [Batch(args=(x,)) for x in data]
    sites = find_weights(opened).sites
    plans = [SitePlan(site=site, layout=Layout.svd(*site.shape), bond_dims=(8,)) for site in sites]
    moments = take_statistics(opened, [site.modules[0] for site in sites], calls).layers
    errors = []
    for later in ({}, later_calls(sites, moments)):
        fitted = fit_in_sequence(
            opened, plans, calls, output_metrics=OutputMetrics(moments), later=later
        )
        weights = {site: found.mpo for site, found in fitted.items()}
        errors.append(error(with_fitted(opened, weights, fitted), model, held_out))
    plain = mpo.compress(model, bond_dim=8, layout="svd")
    assert errors[1] < 0.95 * errors[0]
    assert errors[1] < 0.7 * error(plain.model, model, held_out)
    through_api = mpo.compress(model, bond_dim=8, layout="svd", data=data)
    assert error(through_api.model, model, held_out) == pytest.approx(errors[1], rel=1e-3)


def test_a_fit_at_two_calls_is_the_regression_on_the_rows_of_both():
    class Funnel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.before, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(torch.tanh(self.twice(torch.tanh(self.before(x)))))

    model, x = Funnel().double().eval(), random(400, 8, dtype=torch.float64)
    sites = {site.name: site for site in find_weights(model).sites}
    for bond in (8, 5):
        plans = [
            SitePlan(site=sites[name], layout=Layout.svd(8, 8), bond_dims=(bonds,))
            for name, bonds in (("before", 3), ("twice", bond))
        ]
        one = Batch(args=(x[None],))  # nothing to check a ridge on: the smallest
        moments = take_statistics(model, [model.before, model.twice], [one]).layers
        later = later_calls(sites.values(), moments)
        assert list(later) == [sites["twice"]]
        before, twice = fit_in_sequence(model, plans, [one], later=later).values()
        with torch.no_grad():
            weight, bias = model.twice.weight, model.twice.bias
            dense = torch.tanh(model.before(x))
            ours = torch.tanh(x @ before.mpo.to_dense().mT + before.bias)
            again = torch.tanh(model.twice(dense))
            rows = torch.cat([ours, again])
            residual = torch.cat([(dense - ours) @ weight.mT, torch.zeros_like(again)])
            lost = rows @ (weight - twice.mpo.to_dense()).mT + residual + bias - twice.bias
            rows, residual = rows - rows.mean(0), residual - residual.mean(0)
            covariance = rows.mT @ rows / len(rows)
            diagonal = covariance.diagonal()
            ridge = 1e-3 * diagonal.clamp_min(diagonal.median()).diag()
            target = weight + (residual.mT @ rows / len(rows)) @ torch.linalg.inv(
                covariance + ridge
            )
            relative = rows @ (target - twice.mpo.to_dense()).mT
            relative = float(relative.norm() / (rows @ target.mT).norm())
        assert twice.rows == 800
        torch.testing.assert_close(lost.mean(0), torch.zeros_like(bias), **F64["apply"])
        if bond == 8:
            torch.testing.assert_close(twice.mpo.to_dense(), target, **F64["dense"])
        else:
            assert twice.relative_output_error == pytest.approx(relative, rel=1e-4)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("kinds", ["inputs", "cross", "residual", "both"])
def test_later_calls_of_a_part_of_the_data_stand_for_all(kinds, centered):
    dense, ours, stream, again = (random(60, 6, seed=s, dtype=torch.float64) + s for s in range(4))
    weight = random(6, 6, seed=9, dtype=torch.float64)
    inputs, cross, residual, later = (CrossMoment() for _ in range(4))
    inputs.add(ours, ours)
    cross.add(dense, ours)
    residual.add(stream, ours)
    later.add(again, again)
    first = Moments(
        inputs=inputs,
        cross=inputs if kinds == "inputs" else None if kinds == "residual" else cross,
        residual=residual if kinds in ("residual", "both") else None,
    )
    found = regression(
        weight, LaterCalls(later, RowCounts(), first_rows=20).pooled(first), centered=centered
    )
    lost = torch.zeros_like(ours)
    if kinds in ("cross", "both"):
        lost += (dense - ours) @ weight.mT
    if kinds in ("residual", "both"):
        lost += stream
    x = torch.cat([ours, *[again] * 3])
    e = torch.cat([lost, torch.zeros(180, 6, dtype=torch.float64)])
    for value, expected in ((found.mean_I, x.mean(0)), (found.residual_mean_O, e.mean(0))):
        torch.testing.assert_close(value, expected, **F64["apply"])
    if centered:
        x, e = x - x.mean(0), e - e.mean(0)
    torch.testing.assert_close(found.inputs_II, x.mT @ x / 240, **F64["apply"])
    torch.testing.assert_close(found.residual_OI, e.mT @ x / 240, **F64["apply"])
    assert inputs.rows == cross.rows == residual.rows == later.rows == 60


def test_a_table_is_fitted_to_all_lookups():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(200, N)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.table(left).sum(1) - self.table(right).sum(1)

    model = Pair()
    data = [
        (
            torch.randint(0, 10, (50, 4), generator=torch.Generator().manual_seed(seed)),
            torch.randint(10, 30, (50, 4), generator=torch.Generator().manual_seed(seed)),
        )
        for seed in range(4)
    ]
    result = mpo.compress(model, bond_dim=20, layout="svd", include=["table"], data=data)
    with torch.no_grad():
        table = model.table.weight
        lost = (table - result.model.table(torch.arange(200))).norm(dim=1) / table.norm(dim=1)
    assert float(lost[10:30].mean()) < 0.7 * float(lost[30:].mean())


def test_what_a_backward_pass_computes_again_is_no_call():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(N, N), nn.Linear(N, N)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(checkpoint(self.inner, x, use_reentrant=False))

    model, call = Checkpointed(), Batch(args=(random(40, N).requires_grad_(),))
    found = take_statistics(model, [model.inner, model.outer], [call]).layers
    assert not later_calls(find_weights(model).sites, found)
    assert found[model.inner].inputs.rows == found[model.outer].inputs.rows == 40


def test_layers_that_share_a_weight_share_the_metric_of_its_outputs():
    model = Twice(2, bias=False)
    modules = [model.first, model.second]
    moments = take_statistics(model, modules, [Batch(args=(random(400, N),))]).layers
    metrics = OutputMetrics(moments)
    mean = (moments[model.first].output_metric + moments[model.second].output_metric) / 2
    for module in modules:
        torch.testing.assert_close(metrics[module], mean, **F64["apply"])
