"""Algebra on chains against dense twins: values, and gradients where they flow."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mpocompress.errors import ContractionError, LayoutError
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.dense import apply_reference, to_dense
from tests.planted import (
    LAWS,
    SEEDS,
    chains,
    dense_twin,
    gaussian,
    random_chain,
)
from tests.tolerances import TOL

F64 = TOL[torch.float64]


def pair(chain, seed, requires_grad=False):
    """Two chains of the same sites, the second with other bond dims."""
    layout, bonds = chain
    others = [bond % 3 + 1 for bond in bonds]
    return (
        random_chain(layout, bonds, seed=seed, requires_grad=requires_grad),
        random_chain(layout, others, seed=seed + 77, requires_grad=requires_grad),
    )


def assert_same_value_and_gradients(structured, twin, leaves, seed):
    """Equal values, and equal gradients of a random linear functional of them."""
    assert_close(structured, twin, **F64["dense"])
    probe = gaussian(*structured.shape, seed=seed)
    gradients = torch.autograd.grad(structured, leaves, probe, materialize_grads=True)
    expected = torch.autograd.grad(twin, leaves, probe, materialize_grads=True, retain_graph=True)
    for gradient, other in zip(gradients, expected, strict=True):
        assert_close(gradient, other, **F64["gradient"])


@LAWS
@given(chains(), SEEDS)
def test_to_dense(chain, seed):
    layout, bonds = chain
    cores = random_chain(layout, bonds, seed=seed, requires_grad=True)
    assert_same_value_and_gradients(MPO(cores).to_dense(), dense_twin(cores), cores, seed)
    assert_same_value_and_gradients(to_dense(cores), dense_twin(cores), cores, seed)


@LAWS
@given(chains(), SEEDS)
def test_reference_contraction(chain, seed):
    layout, bonds = chain
    cores = random_chain(layout, bonds, seed=seed, requires_grad=True)
    x = gaussian(3, layout.in_features, seed=seed).requires_grad_()
    assert_same_value_and_gradients(
        apply_reference(cores, x), x @ dense_twin(cores).T, [*cores, x], seed
    )


@LAWS
@given(chains(), SEEDS)
def test_sum_and_difference(chain, seed):
    first, second = pair(chain, seed, requires_grad=True)
    leaves = [*first, *second]
    total = MPO(first) + MPO(second)
    assert total.bond_dims == tuple(
        a + b for a, b in zip(MPO(first).bond_dims, MPO(second).bond_dims, strict=True)
    )
    twins = dense_twin(first), dense_twin(second)
    assert_same_value_and_gradients(total.to_dense(), twins[0] + twins[1], leaves, seed)
    difference = MPO(first) - MPO(second)
    assert_same_value_and_gradients(difference.to_dense(), twins[0] - twins[1], leaves, seed)


@LAWS
@given(chains(), SEEDS, st.sampled_from([0.0, 1.0, -2.5, 1e-12]))
def test_scaling(chain, seed, factor):
    cores, _ = pair(chain, seed, requires_grad=True)
    twin = factor * dense_twin(cores)
    for scaled in (factor * MPO(cores), MPO(cores) * factor):
        assert scaled.bond_dims == MPO(cores).bond_dims
        assert_same_value_and_gradients(scaled.to_dense(), twin, cores, seed)


@LAWS
@given(chains(), SEEDS)
def test_transpose(chain, seed):
    cores, _ = pair(chain, seed, requires_grad=True)
    mpo = MPO(cores)
    assert mpo.T.shape == (mpo.shape[1], mpo.shape[0])
    assert mpo.T.layout == mpo.layout.transposed
    assert_same_value_and_gradients(mpo.T.to_dense(), dense_twin(cores).T, cores, seed)
    assert_close(mpo.T.T.to_dense(), mpo.to_dense(), **F64["dense"])
    for core, view in zip(mpo.cores, mpo.T.cores, strict=True):
        assert core.data_ptr() == view.data_ptr()


@LAWS
@given(chains(max_sites=3), SEEDS, st.integers(min_value=1, max_value=3))
def test_product(chain, seed, inner_dim):
    layout, bonds = chain
    left = random_chain(layout, bonds, seed=seed, requires_grad=True)
    right_layout = Layout(layout.in_dims, tuple(inner_dim for _ in layout.in_dims))
    right = random_chain(right_layout, bonds[::-1], seed=seed + 5, requires_grad=True)
    product = MPO(left) @ MPO(right)
    assert product.bond_dims == tuple(a * b for a, b in zip(bonds, bonds[::-1], strict=True))
    assert_same_value_and_gradients(
        product.to_dense(), dense_twin(left) @ dense_twin(right), [*left, *right], seed
    )


@LAWS
@given(chains(), SEEDS)
def test_inner_product_and_norm(chain, seed):
    first, second = pair(chain, seed, requires_grad=True)
    twins = dense_twin(first), dense_twin(second)
    inner = MPO(first).inner(MPO(second))
    assert inner.shape == ()
    assert_same_value_and_gradients(inner, (twins[0] * twins[1]).sum(), [*first, *second], seed)
    assert_close(MPO(first).norm(), float(twins[0].detach().norm()), **F64["dense"])
    assert_close(
        float(MPO(first).inner(MPO(first)).detach()), MPO(first).norm() ** 2, **F64["dense"]
    )


def test_identity_is_neutral():
    layout = Layout.parse("2x3,3x2,2x2")
    mpo = MPO(random_chain(layout, (4, 3)))
    left = MPO.identity("2x2,3x3,2x2", dtype=torch.float64)
    right = MPO.identity("3x3,2x2,2x2", dtype=torch.float64)
    assert_close((left @ mpo @ right).to_dense(), mpo.to_dense(), **F64["dense"])
    assert (left @ mpo).bond_dims == mpo.bond_dims


def test_applying_a_product_is_applying_twice():
    first = MPO(random_chain(Layout.parse("2x3,3x4"), (3,)))
    second = MPO(random_chain(Layout.parse("3x2,4x5"), (4,)))
    x = gaussian(5, second.shape[1])
    assert_close((first @ second).apply(x), first.apply(second.apply(x)), **F64["apply"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inner_product_of_half_types_does_not_overflow(dtype):
    mpo = MPO.from_matrix(torch.full((64, 64), 8.0, dtype=dtype), "8x8,8x8")
    assert float(mpo.inner(mpo)) == pytest.approx(8.0**2 * 64**2, rel=TOL[dtype]["dense"]["rtol"])


# -- padding


def padded_pair():
    """Two truncated, padded matrices: their padding no longer is zero."""
    layout = Layout.parse("3x4,3x3", pad=True)
    return [MPO.from_matrix(gaussian(7, 10, seed=seed), layout, bond_dim=4) for seed in (1, 2)]


def test_padding_of_a_truncated_matrix_stays_invisible():
    first, second = padded_pair()
    full = dense_twin(first.cores)
    assert full.shape == (9, 12)
    assert float(full[7:].abs().max()) > F64["dense"]["atol"]
    assert_close(first.to_dense(), full[:7, :10], **F64["dense"])
    for result, twin in (
        (first + second, first.to_dense() + second.to_dense()),
        (first - second, first.to_dense() - second.to_dense()),
        (2.0 * first, 2.0 * first.to_dense()),
        (first.T, first.to_dense().T),
        (first.canonicalize(0), first.to_dense()),
        (first.to(dtype=torch.float64), first.to_dense()),
    ):
        assert result.layout.pad
        assert result.shape == tuple(twin.shape)
        assert_close(result.to_dense(), twin, **F64["dense"])
        x = gaussian(4, twin.shape[1])
        assert_close(result.apply(x), x @ twin.T, **F64["apply"])


def test_norm_and_inner_product_of_a_padded_matrix_are_those_of_all_sites():
    first, second = padded_pair()
    twins = dense_twin(first.cores), dense_twin(second.cores)
    assert_close(first.norm(), float(twins[0].norm()), **F64["dense"])
    assert_close(first.inner(second), (twins[0] * twins[1]).sum(), **F64["dense"])


def test_padding_of_one_side_only_may_be_multiplied_from_the_other():
    tall = MPO.from_matrix(gaussian(7, 12), Layout.parse("3x4,3x3", pad=True), bond_dim=4)
    wide = MPO.from_matrix(gaussian(12, 5), Layout.parse("4x2,3x3", pad=True), bond_dim=3)
    product = tall @ wide
    assert product.shape == (7, 5)
    assert_close(product.to_dense(), tall.to_dense() @ wide.to_dense(), **F64["dense"])


def test_padding_of_the_summed_index_is_refused():
    first, _ = padded_pair()
    with pytest.raises(ContractionError, match=r"summed index is padded from 10 to 12"):
        first @ MPO.identity("4x4,3x3", dtype=torch.float64)
    with pytest.raises(ContractionError, match=r"summed index is padded from 7 to 9"):
        MPO.identity("3x3,3x3", dtype=torch.float64) @ first


def test_signs_quotients_and_sums_of_many():
    terms = [MPO(random_chain(Layout.parse("2x2,3x2"), (2,), seed=seed)) for seed in range(3)]
    matrices = [term.to_dense() for term in terms]
    assert_close((-terms[0]).to_dense(), -matrices[0], **F64["dense"])
    assert_close((terms[0] / 4).to_dense(), matrices[0] / 4, **F64["dense"])
    assert_close(sum(terms).to_dense(), sum(matrices), **F64["dense"])
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (factor_gradient,) = torch.autograd.grad((terms[0] * factor).to_dense().sum(), factor)
    assert_close(factor_gradient, matrices[0].sum(), **F64["gradient"])


def test_factors_of_two_dtypes_meet_in_the_wider_one():
    layout = Layout.parse("2x2,3x3")
    wide = MPO(random_chain(layout, (2,)))
    narrow = wide.to(dtype=torch.float32)
    left, right = wide.to_dense(), narrow.to(dtype=torch.float64).to_dense()
    for found, expected in (
        ((wide @ narrow).to_dense(), left @ right),
        ((narrow + wide).to_dense(), right + left),
        (narrow.inner(wide), (right * left).sum()),
    ):
        assert found.dtype == torch.float64
        assert_close(found, expected, **F64["dense"])


# -- refusals


def test_cores_and_factors_of_other_kinds_are_refused():
    with pytest.raises(ContractionError, match="core 0 is a ndarray, not a torch tensor"):
        MPO([gaussian(1, 2, 2, 1).numpy()])
    with pytest.raises(LayoutError, match=r"factor 1 of shape \(3,\) is not a matrix"):
        MPO.kronecker([torch.ones(2, 2), torch.ones(3)])


def test_other_operands_are_refused():
    mpo = MPO(random_chain(Layout.parse("2x2,2x2"), (2,)))
    for operation in (
        lambda: mpo + 1,
        lambda: 1 + mpo,
        lambda: mpo - 1,
        lambda: mpo * mpo,
        lambda: mpo * 2j,
        lambda: mpo / mpo,
    ):
        with pytest.raises(TypeError, match="unsupported operand"):
            operation()
    with pytest.raises(ContractionError, match=r"an MPO and a Tensor: W.apply\(x\) gives W x"):
        mpo @ torch.ones(4)


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda a, b: a + b, "sum"),
        (lambda a, b: a - b, "sum"),
        (lambda a, b: a.inner(b), "inner product"),
    ],
)
@pytest.mark.parametrize("other", ["3x2,2x2", "2x2,3x2,1x1", "2x3,3x2"])
def test_other_sites_are_refused(operation, name, other):
    mpo = MPO(random_chain(Layout.parse("2x2,3x2"), (2,)))
    layout = Layout.parse(other)
    stranger = MPO(random_chain(layout, (2,) * (layout.num_sites - 1)))
    with pytest.raises(ContractionError, match=rf"{name}: the sites .*Factorize both"):
        operation(mpo, stranger)


def test_sum_of_different_padding_is_refused():
    layout = Layout.parse("2x2,2x2", pad=True)
    first, second = (MPO.from_matrix(gaussian(rows, 4), layout) for rows in (3, 4))
    with pytest.raises(ContractionError, match=r"sum: shapes \(3, 4\) and \(4, 4\) differ"):
        first + second


@pytest.mark.parametrize("other", ["2x2,3x2", "6x4", "3x2,2x2,1x1"])
def test_product_of_unequal_inner_dims_is_refused(other):
    mpo = MPO(random_chain(Layout.parse("2x3,3x2"), (2,)))
    layout = Layout.parse(other)
    stranger = MPO(random_chain(layout, (2,) * (layout.num_sites - 1)))
    with pytest.raises(ContractionError, match=r"product: in_dims \(3, 2\).*must be equal"):
        mpo @ stranger
