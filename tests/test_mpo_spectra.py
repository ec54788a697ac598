"""Schmidt spectra and entanglement entropies of matrices whose entanglement is known."""

import math

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from mpocompress.errors import ContractionError, DecompositionError
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.spectra import entropy_nats, renyi_entropy_nats
from tests.planted import (
    LAWS,
    SEEDS,
    gaussian,
    kronecker_of_noise,
    layouts,
    random_chain,
    spectrum_at,
    swap,
)
from tests.tolerances import TOL

SPECTRUM = TOL[torch.float64]["spectrum"]


@LAWS
@given(layouts(max_dim=4), SEEDS)
def test_schmidt_values_are_the_singular_values_of_the_unfoldings(layout, seed):
    matrix = gaussian(layout.out_features, layout.in_features, seed=seed)
    mpo = MPO.from_matrix(matrix, layout)
    spectra = mpo.schmidt_spectra()
    assert len(spectra) == layout.num_sites - 1
    for bond, values in enumerate(spectra):
        assert_close(values, spectrum_at(matrix, layout, bond), **SPECTRUM)
        assert torch.equal(mpo.schmidt_values(bond), values)
        assert_close(float(values.norm()), mpo.norm(), **SPECTRUM)


def test_schmidt_values_are_neither_squared_nor_normalized():
    mpo = MPO.from_matrix(torch.diag(torch.tensor([3.0, 4.0])), Layout.svd(2, 2))
    assert_close(mpo.schmidt_values(0), torch.tensor([4.0, 3.0]), **TOL[torch.float32]["spectrum"])


@pytest.mark.parametrize("bond", [-1, 2, 5])
def test_bond_that_does_not_exist_is_refused(bond):
    mpo = MPO(random_chain(Layout.parse("2x2,2x2,2x2"), (2, 2)))
    with pytest.raises(ContractionError, match=f"bond {bond}: an MPO of 3 sites has 2 bonds"):
        mpo.schmidt_values(bond)


def test_one_site_has_no_bonds():
    mpo = MPO.from_matrix(gaussian(4, 4), "4x4")
    assert mpo.schmidt_spectra() == []
    assert mpo.entropies_nats() == []
    with pytest.raises(ContractionError, match="1 sites has 0 bonds"):
        mpo.schmidt_values(0)


@LAWS
@given(layouts(max_dim=4), SEEDS)
def test_kronecker_products_are_not_entangled(layout, seed):
    # Bonds with room for noise at rounding level: p ln p of eps^2 is far below the tolerance.
    mpo = MPO.from_matrix(kronecker_of_noise(layout, seed), layout)
    expected = torch.zeros(layout.num_sites - 1).double()
    assert_close(torch.tensor(mpo.entropies_nats()).double(), expected, **SPECTRUM)


@pytest.mark.parametrize("dim", [2, 3, 4, 7])
def test_swap_is_maximally_entangled(dim):
    mpo = MPO.from_matrix(swap(dim), [(dim, dim), (dim, dim)])
    assert mpo.entropies_nats() == [pytest.approx(2 * math.log(dim))]
    assert_close(mpo.schmidt_values(0), torch.full((dim * dim,), 1.0).double(), **SPECTRUM)


@pytest.mark.parametrize("size", [2, 5, 16])
def test_identity_across_out_and_in_is_maximally_entangled(size):
    mpo = MPO.from_matrix(torch.eye(size).double(), Layout.svd(size, size))
    assert mpo.entropies_nats() == [pytest.approx(math.log(size))]


@pytest.mark.parametrize("sites", [2, 3, 5])
def test_ghz_like_sum_of_two_orthogonal_products_has_entropy_log_two(sites):
    up = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    down = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    mpo = MPO.kronecker([up] * sites) + MPO.kronecker([down] * sites)
    assert mpo.entropies_nats() == [pytest.approx(math.log(2))] * (sites - 1)
    unequal = MPO.kronecker([up] * sites) + 2.0 * MPO.kronecker([down] * sites)
    expected = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert unequal.entropies_nats() == [pytest.approx(expected)] * (sites - 1)


@LAWS
@given(layouts(max_dim=4), SEEDS)
def test_entropy_lies_between_zero_and_the_log_of_the_bond_dim(layout, seed):
    matrix = gaussian(layout.out_features, layout.in_features, seed=seed)
    mpo = MPO.from_matrix(matrix, layout, bond_dim=3)
    for entropy, dim in zip(mpo.entropies_nats(), mpo.bond_dims, strict=True):
        assert 0.0 <= entropy <= math.log(dim) + SPECTRUM["atol"]


def test_entropy_does_not_depend_on_scale_or_order():
    values = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    p = values**2 / (values**2).sum()
    expected = float(-(p * p.log()).sum())
    for scale in (1.0, 1e-20, 1e18):
        assert entropy_nats((scale * values).float()) == pytest.approx(
            expected, rel=TOL[torch.float32]["norm"]["rtol"]
        )
    assert entropy_nats(values.flip(0)) == pytest.approx(expected)


def test_entropy_of_nothing_and_of_one_value():
    assert entropy_nats(torch.zeros(4)) == 0.0
    assert entropy_nats(torch.tensor([2.0, 0.0])) == 0.0
    assert entropy_nats(torch.tensor([7.0])) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_spectra_of_narrow_types_are_float32(dtype):
    mpo = MPO.from_matrix(gaussian(12, 12, dtype=dtype), "4x3,3x4")
    values = mpo.schmidt_values(0)
    assert values.dtype == torch.float32
    assert_close(
        values[0].double(),
        spectrum_at(mpo.to_dense(), mpo.layout, 0)[0],
        **TOL[dtype]["dense"],
    )


def test_entropy_of_bonds_beyond_the_rank():
    """Gauge redundancy adds no entropy: a chain of bond dim 6 around a Kronecker product."""
    mpo = MPO.kronecker([gaussian(2, 3, seed=k) for k in range(3)])
    padded = mpo + 0.0 * MPO(random_chain(mpo.layout, (5, 5)))
    assert padded.bond_dims == (6, 6)
    for entropy in padded.entropies_nats():
        assert entropy == pytest.approx(0.0, abs=SPECTRUM["atol"])


@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_entropy_where_squares_leave_the_range(scale):
    values = scale * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    assert entropy_nats(values) == pytest.approx(math.log(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_spectrum_that_is_not_finite_has_no_entropy(bad):
    with pytest.raises(DecompositionError, match="has no entropy. Check the matrix"):
        entropy_nats(torch.tensor([1.0, bad]))
    with pytest.raises(DecompositionError, match="has no entropy. Check the matrix"):
        renyi_entropy_nats(torch.tensor([1.0, bad]), 2)
