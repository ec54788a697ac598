"""Contraction with a batch: every order gives the dense result, and costs what it says."""

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from mpocompress.errors import ContractionError
from mpocompress.mpo import MPO, ContractionPlan, Layout, apply_cores, contract, plan_contractions
from tests.planted import LAWS, SEEDS, chains, dense_twin, gaussian, random_chain
from tests.tolerances import TOL

F64 = TOL[torch.float64]

CASES = [
    ("6x5", ()),
    ("6x1,1x5", (3,)),
    ("1x5,6x1", (1,)),
    ("1x1,6x5", (1,)),
    ("4x2,2x5", (3,)),
    ("2x3,3x2", (6,)),
    ("2x3,3x1,1x4", (2, 3)),
    ("3x2,2x2,2x3", (4, 5)),
    ("1x1,2x3,1x1", (2, 2)),
    ("2x2,2x3,3x2,2x1", (3, 4, 2)),
    ("2x1,1x2,2x2,1x3", (2, 2, 2)),
    ("2x2,1x2,2x1,2x2,1x2", (2, 3, 2, 2)),
]


def every_plan(layout, bonds):
    """All groupings of the sites, each in both kinds of order."""
    chain = contract._Chain(layout.out_dims, layout.in_dims, (1, *bonds, 1))
    for groups in contract._groupings(layout.num_sites):
        merges = [contract._cheapest_merge(chain, first, last) for first, last in groups]
        merged = contract._Chain(
            tuple(prod(layout.out_dims[first : last + 1]) for first, last in groups),
            tuple(prod(layout.in_dims[first : last + 1]) for first, last in groups),
            (*(chain.bonds[first] for first, _ in groups), 1),
        )
        for steps in (contract._outside_in(merged), contract._inside_out(merged)):
            yield ContractionPlan(
                groups=tuple(merge for _, merge in merges),
                steps=steps,
                fixed_macs=sum(macs for macs, _ in merges),
                macs_per_row=sum(step.macs for step in steps),
            )


def counted_macs(function):
    """Multiply-adds of the matrix products that torch really runs."""
    with FlopCounterMode(display=False) as counter:
        function()
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


# -- values and gradients


@pytest.mark.parametrize(("sites", "bonds"), CASES, ids=str)
def test_every_plan_equals_the_dense_product(sites, bonds):
    layout = Layout.parse(sites)
    cores = random_chain(layout, bonds, requires_grad=True)
    shape = (layout.out_features, layout.in_features)
    x = gaussian(3, layout.in_features, seed=1).requires_grad_()
    probe = gaussian(3, layout.out_features, seed=2)
    twin = x @ dense_twin(cores).T
    expected = torch.autograd.grad(twin, [*cores, x], probe)
    plans = [*every_plan(layout, bonds), *contract.plans_for(cores).plans]
    assert len(plans) > 2 ** (layout.num_sites - 1)
    for plan in plans:
        output = apply_cores(cores, x, shape=shape, plan=plan)
        assert_close(output, twin, **F64["apply"])
        for gradient, other in zip(
            torch.autograd.grad(output, [*cores, x], probe), expected, strict=True
        ):
            assert_close(gradient, other, **F64["gradient"])


@LAWS
@given(chains(max_sites=5), SEEDS, st.integers(min_value=1, max_value=300))
def test_cheapest_plan_equals_the_dense_product(chain, seed, rows):
    layout, bonds = chain
    mpo = MPO(random_chain(layout, bonds, seed=seed))
    x = gaussian(rows, layout.in_features, seed=seed)
    assert_close(mpo.apply(x), x @ dense_twin(mpo.cores).T, **F64["apply"])


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (2, 1, 3), (0,), (2, 0, 3), (1, 1, 1)])
@pytest.mark.parametrize(("sites", "bonds"), CASES[:9:2], ids=str)
def test_leading_dimensions(sites, bonds, lead):
    layout = Layout.parse(sites)
    cores = random_chain(layout, bonds)
    x = gaussian(*lead, layout.in_features)
    shape = (layout.out_features, layout.in_features)
    for plan in (*every_plan(layout, bonds), None):
        output = apply_cores(cores, x, shape=shape, plan=plan)
        assert output.shape == (*lead, layout.out_features)
        assert_close(output, x @ dense_twin(cores).T, **F64["apply"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype):
    layout = Layout.parse("4x3,2x4,3x2")
    cores = random_chain(layout, (4, 3), dtype=dtype)
    x = gaussian(5, layout.in_features, dtype=dtype)
    twin = x.double() @ dense_twin([core.double() for core in cores]).T
    scale = float(twin.abs().max())
    for plan in every_plan(layout, (4, 3)):
        output = apply_cores(cores, x, shape=(24, 24), plan=plan)
        assert output.dtype == dtype
        assert_close(output.double() / scale, twin / scale, **TOL[dtype]["apply"])


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_input_strides_do_not_matter(view):
    layout = Layout.parse("2x3,3x2,2x2")
    cores = random_chain(layout, (3, 2))
    x = {
        "transposed": gaussian(layout.in_features, 4).T,
        "strided": gaussian(4, 2 * layout.in_features)[:, ::2],
        "expanded": gaussian(1, layout.in_features).expand(4, -1),
    }[view]
    for plan in every_plan(layout, (3, 2)):
        output = apply_cores(cores, x, shape=(12, 12), plan=plan)
        assert_close(output, x @ dense_twin(cores).T, **F64["apply"])


@pytest.mark.parametrize("bond_dim", [None, 3])
@pytest.mark.parametrize("shape", [(7, 10), (9, 10), (7, 12), (5, 9)], ids=str)
def test_padded_layouts_apply_what_to_dense_shows(shape, bond_dim):
    layout = Layout.parse("3x4,3x3", pad=True)
    mpo = MPO.from_matrix(gaussian(*shape), layout, bond_dim=bond_dim)
    cores = [core.clone().requires_grad_() for core in mpo.cores]
    for lead in ((), (4,), (2, 3), (0,)):
        x = gaussian(*lead, shape[1]).requires_grad_()
        twin = x @ dense_twin(cores)[: shape[0], : shape[1]].T
        probe = gaussian(*lead, shape[0], seed=9)
        expected = torch.autograd.grad(twin, [*cores, x], probe)
        for plan in every_plan(layout, mpo.bond_dims):
            output = apply_cores(cores, x, shape=shape, plan=plan)
            assert_close(output, twin, **F64["apply"])
            gradients = torch.autograd.grad(output, [*cores, x], probe)
            for gradient, other in zip(gradients, expected, strict=True):
                assert_close(gradient, other, **F64["gradient"])
    x = gaussian(4, shape[1])
    assert_close(mpo.apply(x), x @ mpo.to_dense().T, **F64["apply"])


def test_long_chains_consider_no_grouping_and_all():
    sites = contract._MAX_SITES_FOR_GROUPING + 2
    layout = Layout((2,) * sites, (1,) * (sites - 2) + (2, 2))
    bonds = (2,) * (sites - 1)
    assert len(contract._groupings(sites)) == 2
    mpo = MPO(random_chain(layout, bonds))
    for rows in (1, 500):
        x = gaussian(rows, layout.in_features)
        assert_close(mpo.apply(x), x @ mpo.to_dense().T, **F64["apply"])


# -- cost


@pytest.mark.parametrize(("sites", "bonds"), CASES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_counted_multiply_adds_are_those_that_run(sites, bonds, rows):
    layout = Layout.parse(sites)
    cores = random_chain(layout, bonds)
    x = gaussian(rows, layout.in_features)
    shape = (layout.out_features, layout.in_features)
    for plan in every_plan(layout, bonds):
        ran = counted_macs(lambda plan=plan: apply_cores(cores, x, shape=shape, plan=plan))
        assert ran == plan.macs(rows)
    mpo = MPO(cores)
    assert counted_macs(lambda: mpo.apply(x)) == mpo.macs(rows)


@pytest.mark.parametrize(("sites", "bonds"), CASES, ids=str)
def test_merging_costs_what_is_counted(sites, bonds):
    layout = Layout.parse(sites)
    cores = random_chain(layout, bonds)
    for plan in every_plan(layout, bonds):
        ran = counted_macs(
            lambda plan=plan: [contract.merge_cores(cores, group) for group in plan.groups]
        )
        assert ran == plan.fixed_macs
    whole = contract._plan_groups(
        contract._Chain(layout.out_dims, layout.in_dims, (1, *bonds, 1)),
        ((0, layout.num_sites - 1),),
    )
    assert whole.builds_matrix
    merged = contract.merge_cores(cores, whole.groups[0])
    assert_close(merged[0, :, :, 0], dense_twin(cores), **F64["dense"])
    assert whole.macs_per_row == layout.out_features * layout.in_features


@LAWS
@given(chains(max_sites=5), st.integers(min_value=0, max_value=10**6))
def test_best_is_minimal_over_all_plans(chain, rows):
    layout, bonds = chain
    plans = plan_contractions(layout.out_dims, layout.in_dims, bonds)
    best = plans.best(rows)
    assert best.macs(rows) == min(plan.macs(rows) for plan in every_plan(layout, bonds))
    assert best.macs(rows) == best.fixed_macs + rows * best.macs_per_row


@LAWS
@given(chains(max_sites=5))
def test_kept_plans_are_undominated_and_begin_without_merging(chain):
    layout, bonds = chain
    plans = plan_contractions(layout.out_dims, layout.in_dims, bonds)
    assert plans.chain is plans.plans[0]
    assert plans.chain.groups == tuple(range(layout.num_sites))
    assert plans.chain.fixed_macs == 0
    for cheaper, dearer in zip(plans.plans, plans.plans[1:], strict=False):
        assert cheaper.fixed_macs < dearer.fixed_macs
        assert cheaper.macs_per_row > dearer.macs_per_row


def cost_of(layout, bonds, order):
    """Multiply-adds per row if the sites are contracted in this order, by counting index sizes.

    The state carries the in legs still open, the out legs done, and the bonds between done and
    open sites; a contraction multiplies its size by the legs that the core adds.
    """
    around = (1, *bonds, 1)
    done: set[int] = set()
    total = 0
    for site in order:
        outs = prod(layout.out_dims[k] for k in done)
        ins = prod(dim for k, dim in enumerate(layout.in_dims) if k not in done)
        edges = [k for k in range(layout.num_sites + 1) if (k - 1 in done) != (k in done)]
        open_bonds = prod(around[k] for k in edges)
        new = prod(around[k] for k in (site, site + 1) if k not in edges)
        total += outs * ins * open_bonds * layout.out_dims[site] * new
        done.add(site)
    return total


def outside_in_orders(sites):
    for sides in product((True, False), repeat=sites - 1):
        first, last, order = 0, sites - 1, []
        for from_left in sides:
            order.append(first if from_left else last)
            first, last = first + from_left, last - (not from_left)
        yield (*order, first)


def inside_out_orders(sites):
    def grow(first, last, order):
        if len(order) == sites:
            yield order
        if first > 0:
            yield from grow(first - 1, last, (*order, first - 1))
        if last < sites - 1:
            yield from grow(first, last + 1, (*order, last + 1))

    for start in range(sites):
        yield from grow(start, start, (start,))


@LAWS
@given(chains(max_sites=5))
def test_orders_are_the_cheapest_of_their_kind(chain):
    layout, bonds = chain
    whole = contract._Chain(layout.out_dims, layout.in_dims, (1, *bonds, 1))
    for steps, orders in (
        (contract._outside_in(whole), outside_in_orders),
        (contract._inside_out(whole), inside_out_orders),
    ):
        cheapest = min(cost_of(layout, bonds, order) for order in orders(layout.num_sites))
        assert sum(step.macs for step in steps) == cheapest
        assert sorted(step.group for step in steps) == list(range(layout.num_sites))


@LAWS
@given(chains(max_sites=5))
def test_merging_order_is_the_cheapest(chain):
    layout, bonds = chain
    whole = contract._Chain(layout.out_dims, layout.in_dims, (1, *bonds, 1))
    sizes = [out * in_ for out, in_ in layout.pairs]
    around = (1, *bonds, 1)

    def all_costs(first, last):
        if first == last:
            return [0]
        outer = around[first] * prod(sizes[first : last + 1]) * around[last + 1]
        return [
            left + right + outer * around[split]
            for split in range(first + 1, last + 1)
            for left in all_costs(first, split - 1)
            for right in all_costs(split, last)
        ]

    last = layout.num_sites - 1
    assert contract._cheapest_merge(whole, 0, last)[0] == min(all_costs(0, last))


def test_many_rows_build_the_matrix_and_few_do_not():
    mpo = MPO(random_chain(Layout.parse("32x32,32x32"), (64,), dtype=torch.float32))
    plans = contract.plans_for(mpo.cores)
    assert not plans.best(1).builds_matrix
    assert plans.best(10**6).builds_matrix
    assert mpo.macs(10**6) <= 10**6 * 32**4 + 64 * 32**4


def test_truncated_svd_costs_its_parameters_per_row():
    mpo = MPO(random_chain(Layout.svd(40, 30), (5,)))
    assert mpo.macs(7) == 7 * mpo.num_parameters


# -- refusals


@pytest.mark.parametrize("shape", [(3, 7), (7,), (12, 3), (0,)], ids=str)
def test_wrong_number_of_inputs_is_refused(shape):
    mpo = MPO(random_chain(Layout.parse("2x3,3x4"), (2,)))
    with pytest.raises(
        ContractionError, match=rf"last dimension is {shape[-1]}, but the MPO has 12 inputs"
    ):
        mpo.apply(torch.zeros(shape).double())


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0, 4)])
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_batches_in_pieces_give_the_same_values_and_gradients(lead, at_once, monkeypatch):
    torch.manual_seed(0)
    mpo = MPO(MPO.random("3x4,5x2,2x3", 4, dtype=torch.float64).cores, shape=(29, 23))
    cores = [core.requires_grad_() for core in mpo.cores]
    x = torch.randn(*lead, 23, dtype=torch.float64, requires_grad=True)
    found = []
    for limit in (1 << 30, at_once):
        plan = plan_contractions(mpo.layout.out_dims, mpo.layout.in_dims, mpo.bond_dims).chain
        monkeypatch.setattr(contract, "_STATE_BYTES", limit * 8 * plan.widest)
        y = apply_cores(cores, x, shape=mpo.shape, plan=plan)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *cores])))
    assert found[1][0].shape == (*lead, 29)
    for whole, pieces in zip(*found, strict=True):
        assert_close(pieces, whole)


def test_batches_in_pieces_merge_the_cores_once(monkeypatch):
    mpo = MPO.random("3x4,5x2,2x3", 4, dtype=torch.float64)
    made = []
    merge = contract.merge_cores

    def counting(cores, order):
        made.append(order)
        return merge(cores, order)

    monkeypatch.setattr(contract, "merge_cores", counting)
    plans = plan_contractions(mpo.layout.out_dims, mpo.layout.in_dims, mpo.bond_dims).plans
    plan = next(p for p in plans if len(p.steps) > 1 and any(g != 0 for g in p.groups))
    apply_cores(mpo.cores, torch.randn(1, 24).double(), shape=mpo.shape, plan=plan)
    once = len(made)
    monkeypatch.setattr(contract, "_STATE_BYTES", 2 * 8 * plan.widest)
    apply_cores(mpo.cores, torch.randn(9, 24).double(), shape=mpo.shape, plan=plan)
    assert len(made) == 2 * once


def test_input_without_dimensions_is_refused():
    mpo = MPO(random_chain(Layout.parse("2x3,3x4"), (2,)))
    with pytest.raises(ContractionError, match=r"input of shape \(\).*12 inputs"):
        mpo.apply(torch.tensor(1.0).double())
