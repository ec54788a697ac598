"""Environments and local solves against their dense twins."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mpocompress.errors import DecompositionError
from mpocompress.mpo.cholesky import damped_cholesky
from mpocompress.mpo.contract import merge_cores
from mpocompress.mpo.environment import Environments
from mpocompress.mpo.local_solve import (
    GramProblem,
    OperatorProblem,
    kronecker_preconditioner,
)
from mpocompress.mpo.truncate import Truncation
from mpocompress.mpo.two_site import SplitMetric, split_pair
from mpocompress.mpo.weighing import Exact
from tests.fit_problems import moment
from tests.planted import LAWS, SEEDS, chains, dense_twin, gaussian, kronecker, random_chain
from tests.tolerances import TOL

F64 = TOL[torch.float64]


def jacobian(cores, first, last):
    """Of the dense matrix in the merged open core: (out, in, entries of the core)."""
    sites = tuple(range(first, last + 1))
    theta = merge_cores(cores, sites[0] if len(sites) == 1 else sites)

    def dense(core):
        left, outs, ins, right = core.shape
        whole = [*cores[:first], core, *cores[last + 1 :]]
        if len(sites) == 2:  # the legs of a merged core are those of two sites
            o, i = cores[first].shape[1:3]
            split = core.reshape(left, o, outs // o, i, ins // i, right)
            matrix = split.permute(0, 1, 3, 2, 4, 5).reshape(left * o * i, -1)
            eye = torch.eye(len(matrix), dtype=core.dtype)
            pair = (eye.reshape(left, o, i, -1), matrix.reshape(-1, outs // o, ins // i, right))
            whole = [*cores[:first], *pair, *cores[last + 1 :]]
        return dense_twin(whole)

    found = torch.autograd.functional.jacobian(dense, theta)
    return theta, found.reshape(*found.shape[:2], -1)


def assert_relative(actual, expected):
    scale = max(1.0, float(expected.abs().max()))
    assert_close(actual / scale, expected / scale, **F64["apply"])


@LAWS
@given(st.data(), chains(max_sites=4), SEEDS)
def test_local_problems_are_those_of_the_dense_matrix(data, chain, seed):
    layout, bonds = chain
    sites = layout.num_sites
    if sites < 2:
        return
    cores = random_chain(layout, bonds, seed=seed)
    c, target = (
        moment(layout.in_features, seed=seed),
        gaussian(layout.out_features, layout.in_features, seed=seed + 1),
    )
    weights = None
    if data.draw(st.booleans()):
        weights = [moment(out, seed=seed + 2 + k) for k, out in enumerate(layout.out_dims)]
    g = torch.eye(layout.out_features, dtype=c.dtype) if weights is None else kronecker(weights)
    environments = Environments(
        cores,
        c,
        g @ target @ c,
        cut=data.draw(st.integers(0, sites - 2)),
        out_weights=weights,
    )
    # Cached environments must be as right as fresh ones, whichever core was changed before.
    for step in range(4):
        first = data.draw(st.integers(0, sites - 1))
        last = min(first + data.draw(st.integers(0, 1)), sites - 1)
        theta, jac = jacobian(list(environments.cores), first, last)
        left, outs, ins, right = theta.shape
        full = torch.einsum("oin,op,ij,pjm->nm", jac, g, c, jac)
        rhs = torch.einsum("oin,oi->n", jac, g @ target @ c)
        assert_relative(environments.rhs(first, last).reshape(-1), rhs)
        gram = environments.gram(first, last)
        weight = torch.eye(outs, dtype=c.dtype)
        if weights is not None:
            weight = kronecker(weights[first : last + 1])
        expanded = torch.einsum(
            "lirmjs,op->loirmpjs", gram.reshape(left, ins, right, left, ins, right), weight
        )
        assert_relative(expanded.reshape(full.shape), full)
        outer, inner = environments.marginals(first, last)
        legs = gram.reshape(len(outer), len(inner), len(outer), len(inner))
        assert_relative(outer, torch.einsum("abcb->ac", legs))
        assert_relative(inner, torch.einsum("abac->bc", legs))
        changed = data.draw(st.integers(0, sites - 1))
        old = environments.core(changed)
        environments.set_core(changed, gaussian(*old.shape, seed=seed + step))


def open_problem(seed=0):
    """Gram and operator form of the same problem: three sites, the middle one open."""
    left, right = gaussian(1, 2, 3, 2, seed=seed), gaussian(3, 2, 2, 1, seed=seed + 1)
    core = gaussian(2, 3, 2, 3, seed=seed + 2)
    c, g = moment(12, seed=seed + 3), moment(12, seed=seed + 4)
    return (left, core, right), c, g


def test_operator_problem_is_the_gram_problem():
    cores, c, _ = open_problem()
    linear = gaussian(12, 12, seed=9)
    environments = Environments(cores, c, linear, cut=0)
    rhs = environments.rhs(1, 1)
    by_gram = GramProblem(rhs, environments.gram(1, 1))
    by_operator = OperatorProblem(
        rhs, cores[0][0], cores[2][..., 0], Exact(c, None), by_gram.precondition
    )
    assert_relative(by_operator.apply(cores[1]), by_gram.apply(cores[1]))
    # The exact preconditioner needs one iteration.
    exact, iterated = by_gram.solve(cores[1]), by_operator.solve(cores[1])
    assert iterated.iterations == 1
    # Both damp by 1e-10 of the mean diagonal, times a condition number.
    assert_close(iterated.core_LOIR, exact.core_LOIR, **TOL[torch.float32]["dense"])
    assert_close(iterated.gain, exact.gain, **F64["dense"])
    assert exact.gain > 0


def test_conjugate_gradients_reach_the_solution_of_a_coupled_output_metric():
    cores, c, g = open_problem()
    target = gaussian(12, 12, seed=9)
    environments = Environments(cores, c, g @ target @ c, cut=0)
    rhs = environments.rhs(1, 1)

    def precondition():
        return kronecker_preconditioner(environments.marginals(1, 1), None)

    problem = OperatorProblem(rhs, cores[0][0], cores[2][..., 0], Exact(c, g), precondition)
    theta, jac = jacobian(list(cores), 1, 1)
    gram = torch.einsum("oin,op,ij,pjm->nm", jac, g, c, jac)
    assert_relative(problem.apply(theta).reshape(-1), gram @ theta.reshape(-1))
    core, gains = theta, []
    for _ in range(20):
        core, gain, iterations, residual, _ = problem.solve(core)
        gains.append(gain)
        assert iterations <= 100
        assert residual < 1
    # The solves restart from where the last one stopped, and end at the exact solution.
    exact = torch.linalg.solve(gram, rhs.reshape(-1))
    assert_relative(core.reshape(-1), exact)
    assert gains[0] > 0
    assert min(gains) >= 0


def test_kronecker_preconditioner_inverts_a_kronecker_product():
    a, b, w = moment(4, seed=0), moment(6, seed=1), moment(5, seed=2)
    gram = torch.kron(a, b)
    marginals = (a * b.trace(), b * a.trace())
    core = gaussian(2, 5, 4, 3, seed=3)
    problem = GramProblem(core, gram, w)
    solved = kronecker_preconditioner(marginals, w)(problem.apply(core))
    assert_close(solved, core, **TOL[torch.float32]["apply"])  # a condition number of some 1e6


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_singular_problem_lowers_the_objective_and_leaves_the_rest(rank):
    factor = gaussian(6, rank, seed=0)
    core, rhs_in_range = gaussian(1, 2, 6, 1, seed=1), gaussian(1, 2, rank, 1, seed=2)
    rhs = torch.tensordot(rhs_in_range, factor, dims=([2], [1])).permute(0, 1, 3, 2)
    problem = GramProblem(rhs, factor @ factor.T)
    solved = problem.solve(core)
    assert_close(problem.apply(solved.core_LOIR), rhs, **TOL[torch.float32]["dense"])
    change = (solved.core_LOIR - core).reshape(2, 6)
    moved = change @ torch.linalg.pinv(factor).T @ factor.T
    assert_close(change, moved, **TOL[torch.float32]["dense"])  # rounding over a ridge of 1e-10
    before = float((core * (problem.apply(core) - 2 * rhs)).sum())
    after = float((solved.core_LOIR * (problem.apply(solved.core_LOIR) - 2 * rhs)).sum())
    assert_close(before - after, solved.gain, **F64["dense"])


def test_solution_is_kept():
    core, gram = gaussian(2, 3, 2, 2, seed=0), moment(8, seed=1)
    at_rest = GramProblem(GramProblem(core, gram).apply(core), gram)
    assert_close(at_rest.solve(core).core_LOIR, core, **F64["dense"])


def test_split_in_the_metric_is_optimal_where_the_metric_is_a_product():
    a, b = moment(2 * 3, seed=0), moment(2 * 4, seed=1)
    weights = (moment(2, seed=2), moment(3, seed=3))
    theta = gaussian(2, 2 * 3, 3 * 2, 4, seed=4)
    metric = SplitMetric(a * b.trace(), b * a.trace(), weights)
    legs = theta.reshape(2, 2, 3, 3, 2, 4).permute(1, 0, 3, 2, 4, 5).reshape(12, 24)
    row_metric, column_metric = torch.kron(weights[0], a), torch.kron(weights[1], b)
    values = torch.linalg.eigvals(legs @ column_metric @ legs.T @ row_metric).real.sort().values
    for bond in (1, 3, 12):
        limits = Truncation(bond_dim=bond)
        first, last, cut = split_pair(theta, ((2, 3), (3, 2)), metric, limits)
        assert (first.shape, last.shape) == ((2, 2, 3, bond), (bond, 3, 2, 4))
        gram = torch.tensordot(first, first, dims=([0, 1, 2], [0, 1, 2]))
        assert_close(gram, torch.eye(bond, dtype=gram.dtype), **F64["gauge"])
        lost = legs - first.permute(1, 0, 2, 3).reshape(12, bond) @ last.reshape(bond, 24)
        measured = float(torch.trace(lost @ column_metric @ lost.T @ row_metric))
        best = float(values[: 12 - bond].sum())
        assert_close(measured, best, **TOL[torch.float32]["dense"])
        assert_close(cut.discarded_weight, best, **TOL[torch.float32]["dense"])


def test_refuses_an_indefinite_gram_matrix():
    indefinite = torch.diag(torch.tensor([1.0, -3.0], dtype=torch.float64))
    with pytest.raises(DecompositionError, match="2 squared .* is not positive semidefinite"):
        damped_cholesky(indefinite)
