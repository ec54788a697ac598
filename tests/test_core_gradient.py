"""Hand-written gradients of single cores: equal to autograd, in the cheapest order."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpocompress.errors import ContractionError
from mpocompress.mpo import Layout, apply_cores
from mpocompress.mpo.contract import merge_cores
from mpocompress.mpo.core_gradient import (
    OpenCore,
    _greedy,
    _macs,
    _network,
    core_gradient,
    plan_gradient,
)
from tests.planted import LAWS, SEEDS, chains, dense_twin, gaussian, random_chain
from tests.tolerances import TOL

F64 = TOL[torch.float64]["gradient"]


def by_autograd(cores, site, x, gradient, shape):
    """Through the dense matrix: no contraction of the package takes part."""
    leaves = [core.detach().clone().requires_grad_(k == site) for k, core in enumerate(cores)]
    matrix = dense_twin(leaves)[: shape[0], : shape[1]]
    (x @ matrix.T).backward(gradient)
    return leaves[site].grad


@LAWS
@given(
    chains(max_sites=5, max_dim=4),
    st.integers(min_value=1, max_value=40),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    SEEDS,
)
def test_every_core_as_by_autograd(chain, rows, padding, seed):
    layout, bond_dims = chain
    cores = random_chain(layout, bond_dims, seed=seed)
    shape = (max(1, layout.out_features - padding[0]), max(1, layout.in_features - padding[1]))
    x, gradient = gaussian(rows, shape[1], seed=seed), gaussian(rows, shape[0], seed=seed + 1)
    for site in range(layout.num_sites):
        found = core_gradient(cores, site, x, gradient, shape=shape)
        torch.testing.assert_close(found, by_autograd(cores, site, x, gradient, shape), **F64)


@LAWS
@given(chains(max_sites=5, max_dim=3).filter(lambda chain: chain[0].num_sites > 1), SEEDS)
def test_merged_neighbours_as_by_autograd(chain, seed):
    layout, bond_dims = chain
    cores = random_chain(layout, bond_dims, seed=seed)
    shape = (layout.out_features, layout.in_features)
    x = gaussian(2, 3, shape[1], seed=seed)
    gradient = gaussian(2, 3, shape[0], seed=seed + 1)
    for site in range(layout.num_sites - 1):
        merged = [*cores[:site], merge_cores(cores, (site, site + 1)), *cores[site + 2 :]]
        leaf = merged[site].clone().requires_grad_()
        y = apply_cores([*merged[:site], leaf, *merged[site + 1 :]], x, shape=shape)
        y.backward(gradient)
        torch.testing.assert_close(core_gradient(merged, site, x, gradient), leaf.grad, **F64)


def test_long_chains_take_the_greedy_order_and_are_right():
    layout = Layout((2,) * 10, (2,) * 10)
    cores = random_chain(layout, (3,) * 9)
    x, gradient = gaussian(5, 1024, seed=1), gaussian(5, 1024, seed=2)
    for site in (0, 4, 9):
        leaf = cores[site].clone().requires_grad_()
        apply_cores([*cores[:site], leaf, *cores[site + 1 :]], x, shape=(1024, 1024)).backward(
            gradient
        )
        torch.testing.assert_close(core_gradient(cores, site, x, gradient), leaf.grad, **F64)


def every_tree(numbers):
    """All orders of pairwise contractions."""
    if len(numbers) == 1:
        yield numbers[0]
        return
    first, rest = numbers[0], numbers[1:]
    for size in range(len(rest)):
        for others in itertools.combinations(rest, size):
            left = [first, *others]
            right = [number for number in rest if number not in others]
            for a in every_tree(left):
                for b in every_tree(right):
                    yield (a, b)


@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize("site", [0, 1, 2])
@pytest.mark.parametrize("calls", [1, 100])
def test_the_order_is_the_cheapest_of_all(rows, site, calls):
    layout, bond_dims = Layout((2, 3, 4), (4, 1, 3)), (5, 2)
    network = _network(layout, bond_dims, site, rows)

    def cost(tree):
        fixed, each = _macs(network, tree)
        return fixed + calls * each

    plan = plan_gradient(layout, bond_dims, site, rows, calls)
    assert plan.fixed_macs + calls * plan.macs == min(map(cost, every_tree([0, 1, 2, 3])))
    assert cost(_greedy(network)) >= plan.fixed_macs + calls * plan.macs


def test_few_rows_never_meet_in_a_dense_gradient():
    layout = Layout((32, 32), (32, 32))
    assert plan_gradient(layout, (8,), 0, 4).macs < 4 * 1024 * 1024  # x times g alone is that many
    # A large bond makes every other order dearer.
    assert plan_gradient(layout, (64,), 0, 4096).tree == ((0, 1), 2)


def test_products_of_frozen_cores_are_made_once(monkeypatch):
    cores = random_chain(Layout((2,) * 4, (2,) * 4), (4, 16, 4))
    opened = OpenCore(cores, 0, calls=1000)
    assert opened.plan(500).fixed_macs > 0
    x, gradient = gaussian(500, 16, seed=1), gaussian(500, 16, seed=2)
    first = opened.gradient(x, gradient)
    count = []
    tensordot = torch.tensordot
    monkeypatch.setattr(torch, "tensordot", lambda *a, **k: count.append(1) or tensordot(*a, **k))
    torch.testing.assert_close(opened.gradient(x, gradient), first, **F64)
    assert len(count) == 2


def test_input_gradient_is_that_of_the_transposed_chain():
    cores = random_chain(Layout((2, 3), (4, 2), pad=True), (3,))
    opened = OpenCore(cores, 1, shape=(5, 7))
    gradient = gaussian(6, 5)
    expected = gradient @ dense_twin(cores)[:5, :7]
    torch.testing.assert_close(opened.apply_transposed(cores[1], gradient), expected, **F64)


def test_half_types_are_summed_in_float32_and_no_rows_give_zero():
    cores = random_chain(Layout((4, 4), (4, 4)), (3,))
    half = [core.bfloat16() for core in cores]
    x, gradient = gaussian(64, 16), gaussian(64, 16, seed=1)
    found = core_gradient(half, 0, x.bfloat16(), gradient.bfloat16())
    assert found.dtype == torch.bfloat16
    expected = by_autograd(cores, 0, x, gradient, (16, 16)).bfloat16()
    torch.testing.assert_close(found, expected, **TOL[torch.bfloat16]["gradient"])
    assert not core_gradient(cores, 0, x[:0], gradient[:0]).any()


def test_what_does_not_fit_is_refused():
    cores = random_chain(Layout((2, 2), (3, 2)), (2,))
    with pytest.raises(ContractionError, match="open core 2: the sites of this chain are 0 to 1"):
        core_gradient(cores, 2, gaussian(3, 6), gaussian(3, 4))
    with pytest.raises(ContractionError, match=r"needs \(\.\.\., 6\) and \(\.\.\., 4\)"):
        core_gradient(cores, 0, gaussian(3, 6), gaussian(4, 4))
