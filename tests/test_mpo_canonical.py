"""Gauge: canonical forms, the moving center, rounding, and what none of them may change."""

import copy
import pickle
import warnings
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mpocompress.errors import BondDimError, ContractionError
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.canonical import (
    canonical_defects,
    equalize_norms,
    move_center,
    round_cores,
    symmetric_gauge,
)
from mpocompress.mpo.factorize import random_cores
from mpocompress.mpo.identity_gauge import fix_identity_gauge
from tests.planted import (
    LAWS,
    SEEDS,
    chains,
    dense_twin,
    gaussian,
    random_chain,
    regauged,
    spectrum_at,
)
from tests.tolerances import NEAR_OPTIMUM, TOL

F64 = TOL[torch.float64]
LAYOUT = Layout.parse("2x3,3x2,2x2,3x1")
BONDS = (4, 5, 3)
RANGES = [(first, last) for first in range(4) for last in range(first, 4)]


def measured_defects(cores, center):
    """Deviation from an isometry by explicit sums, apart from the code under test."""
    defects = []
    for site, core in enumerate(cores):
        if site < center[0]:
            gram = torch.einsum("loir,lois->rs", core, core)
        elif site > center[1]:
            gram = torch.einsum("loir,moir->lm", core, core)
        else:
            continue
        defects.append(float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max()))
    return defects


@pytest.mark.parametrize(("start", "target"), list(product(RANGES, RANGES)), ids=str)
def test_center_from_every_range_to_every_range(start, target):
    cores = random_chain(LAYOUT, BONDS)
    dense = dense_twin(cores)
    begun, held = move_center(cores, (0, 3), *start)
    assert start[0] <= held[0] <= held[1] <= start[1]
    moved, center = move_center(begun, held, *target)
    assert target[0] <= center[0] <= center[1] <= target[1]
    assert max(measured_defects(moved, center), default=0.0) <= F64["gauge"]["atol"]
    assert max(canonical_defects(moved, center)) <= F64["gauge"]["atol"]
    assert_close(dense_twin(moved), dense, **F64["dense"])
    # Cores outside of both ranges are untouched.
    for site in range(4):
        if site < min(held[0], target[0]) or site > max(held[1], target[1]):
            assert moved[site] is begun[site]


def test_center_within_the_target_stays_where_it_is():
    cores, center = move_center(random_chain(LAYOUT, BONDS), (0, 3), 2, 2)
    same, kept = move_center(cores, center, 0, 3)
    assert kept == (2, 2)
    assert all(a is b for a, b in zip(same, cores, strict=True))


def test_defects_are_measured_not_believed():
    cores = random_chain(LAYOUT, BONDS)
    assert canonical_defects(cores, (0, 3)) == [0.0] * 4
    false_claim = canonical_defects(cores, (3, 3))
    assert min(false_claim[:3]) > 0.01
    assert false_claim[3] == 0.0
    assert_close(
        torch.tensor(false_claim[:3]),
        torch.tensor(measured_defects(cores, (3, 3))),
        **TOL[torch.float32]["gauge"],
    )


@LAWS
@given(chains(), SEEDS, st.integers(min_value=0, max_value=3))
def test_moving_the_center_changes_neither_values_nor_spectra(chain, seed, site):
    layout, bonds = chain
    cores = random_chain(layout, bonds, seed=seed)
    mpo = MPO(cores)
    site = min(site, layout.num_sites - 1)
    moved = mpo.canonicalize(site)
    assert moved.center == (site, site)
    assert moved.shape == mpo.shape
    assert_close(moved.to_dense(), dense_twin(cores), **F64["dense"])
    assert_close(moved.norm(), float(dense_twin(cores).norm()), **F64["dense"])
    assert_close(float(moved.cores[site].norm()), moved.norm(), **F64["dense"])
    dense = dense_twin(cores)
    for bond, values in enumerate(moved.schmidt_spectra()):
        expected = spectrum_at(dense, layout, bond)
        kept = min(len(values), len(expected))
        assert_close(values[:kept], expected[:kept], **F64["spectrum"])
        assert_close(values[kept:], torch.zeros_like(values[kept:]), **F64["spectrum"])
        assert_close(expected[kept:], torch.zeros_like(expected[kept:]), **F64["spectrum"])


@LAWS
@given(chains(max_dim=4, max_bond=6), SEEDS)
def test_there_and_back_brings_bond_dims_within_the_maximal_ones(chain, seed):
    layout, bonds = chain
    mpo = MPO(random_chain(layout, bonds, seed=seed))
    swept = mpo.canonicalize(layout.num_sites - 1).canonicalize(0)
    for dim, before, top in zip(swept.bond_dims, bonds, layout.max_bond_dims(), strict=True):
        assert dim <= min(before, top)
    assert_close(swept.to_dense(), mpo.to_dense(), **F64["dense"])


@pytest.mark.parametrize("target", [(-1, 0), (0, 4), (2, 1), (4, 4)], ids=str)
def test_sites_that_do_not_exist_are_refused(target):
    mpo = MPO(random_chain(LAYOUT, BONDS))
    with pytest.raises(ContractionError, match=r"center .*sites of this MPO are 0 to 3"):
        mpo.canonicalize(*target)
    with pytest.raises(ContractionError, match=r"center .*sites of this MPO are 0 to 3"):
        MPO(random_chain(LAYOUT, BONDS), center=target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_moved_and_returned_in_float32(dtype):
    mpo = MPO(random_chain(LAYOUT, BONDS, dtype=dtype))
    moved = mpo.canonicalize(1)
    assert moved.dtype == torch.float32
    assert max(canonical_defects(moved.cores, moved.center)) <= TOL[torch.float32]["gauge"]["atol"]
    assert_close(moved.to_dense().to(dtype), mpo.to_dense(), **TOL[dtype]["dense"])


def test_narrower_dtype_loses_the_gauge_and_wider_keeps_it():
    mpo = MPO(random_chain(LAYOUT, BONDS, dtype=torch.float32)).canonicalize(2)
    assert mpo.to(dtype=torch.float64).center == (2, 2)
    assert mpo.to(dtype=torch.float32).center == (2, 2)
    assert mpo.to(dtype=torch.bfloat16).center == (0, 3)
    halved = mpo.to(dtype=torch.float16)
    assert halved.to(dtype=torch.bfloat16).center == (0, 3)


def test_transpose_and_scaling_keep_the_center():
    mpo = MPO(random_chain(LAYOUT, BONDS)).canonicalize(2)
    for kept in (mpo.T, mpo * 3.0, -0.5 * mpo):
        assert kept.center == (2, 2)
        assert max(canonical_defects(kept.cores, kept.center)) <= F64["gauge"]["atol"]
    assert (mpo + mpo).center == (0, 3)


# -- rounding


@LAWS
@given(chains(max_dim=4, max_bond=6), SEEDS, st.integers(min_value=1, max_value=4))
def test_rounding_error_equals_the_discarded_weight(chain, seed, bond_dim):
    layout, bonds = chain
    cores = random_chain(layout, bonds, seed=seed)
    dense = dense_twin(cores)
    rounded, cuts = round_cores(cores, (0, layout.num_sites - 1), bond_dim=bond_dim)
    weight = float(dense.square().sum())
    lost = sum((cut.discarded_weight for cut in cuts), 0.0)
    error = float((dense_twin(rounded) - dense).square().sum())
    assert_close(error / weight, lost / weight, **F64["weight"])
    assert max(measured_defects(rounded, (0, 0)), default=0.0) <= F64["gauge"]["atol"]
    # Quasi-optimal: no worse than the tails of all bonds together, no better than the worst one.
    tails = [
        float(spectrum_at(dense, layout, bond)[bond_dim:].square().sum())
        for bond in range(layout.num_sites - 1)
    ]
    slack = F64["weight"]["atol"] * weight
    assert max(tails, default=0.0) - slack <= error <= sum(tails) + slack


@LAWS
@given(chains(max_bond=6), SEEDS, st.sampled_from([0.0, 1e-3, 0.3]))
def test_rounding_never_raises_bond_dims(chain, seed, cutoff):
    layout, bonds = chain
    mpo = MPO(random_chain(layout, bonds, seed=seed))
    rounded = mpo.round(cutoff=cutoff)
    for dim, before, top in zip(rounded.bond_dims, bonds, layout.max_bond_dims(), strict=True):
        assert 1 <= dim <= min(before, top)
    assert rounded.center == (0, 0)
    assert rounded.shape == mpo.shape
    if cutoff == 0.0:
        assert_close(rounded.to_dense(), mpo.to_dense(), **F64["dense"])
    else:
        error = float((rounded.to_dense() - mpo.to_dense()).norm())
        assert error <= (cutoff * max(len(bonds), 1)) ** 0.5 * mpo.norm() * (1 + 1e-9)


def test_rounding_a_sum_of_equal_chains_finds_the_old_bond_dims():
    mpo = MPO(random_chain(LAYOUT, (3, 4, 2)))
    doubled = mpo + mpo
    assert doubled.bond_dims == (6, 8, 4)
    rounded = doubled.round()
    assert rounded.bond_dims == (3, 4, 2)
    assert_close(rounded.to_dense(), 2 * mpo.to_dense(), **F64["dense"])


def test_rounding_a_difference_of_equals_leaves_nothing():
    mpo = MPO(random_chain(LAYOUT, BONDS))
    nothing = mpo - mpo
    assert nothing.norm() <= F64["dense"]["atol"] * mpo.norm()


@pytest.mark.parametrize("sites", [40, 64, 200])
def test_rounding_and_gauges_of_long_chains_keep_their_bonds(sites):
    generator = torch.Generator().manual_seed(0)
    chain = MPO.random(
        [(2, 2)] * sites, 2, variance=2.0**-sites, dtype=torch.float64, generator=generator
    )
    assert chain.round().bond_dims == chain.bond_dims
    assert float((chain - chain.round()).norm()) < 1e-12 * float(chain.norm())
    gauged = MPO(fix_identity_gauge(chain.cores).cores)
    assert float((chain - gauged).norm()) < 1e-9 * float(chain.norm())


def test_random_chains_of_large_bonds_have_their_variance():
    chain = MPO.random([(2, 2)] * 200, 64, dtype=torch.float64)  # the bonds multiply to 64^188
    assert all(bool(core.isfinite().all()) and float(core.norm()) > 0 for core in chain.cores)


def test_rounding_to_one_bond_dim_each_and_from_any_center():
    mpo = MPO(random_chain(LAYOUT, BONDS))
    by_site = [mpo.canonicalize(site).round(bond_dim=(2, 3, 1)) for site in range(4)]
    for rounded in by_site:
        assert rounded.bond_dims == (2, 3, 1)
        assert_close(rounded.to_dense(), by_site[0].to_dense(), **F64["dense"])


def test_rounding_agrees_with_the_sequential_svd_of_two_sites():
    matrix = gaussian(12, 12)
    direct = MPO.from_matrix(matrix, "4x3,3x4", bond_dim=3)
    rounded = MPO.from_matrix(matrix, "4x3,3x4").round(bond_dim=3)
    assert_close(rounded.to_dense(), direct.to_dense(), **F64["dense"])


def test_rounding_the_zero_matrix():
    mpo = MPO([torch.zeros_like(core) for core in random_chain(LAYOUT, BONDS)])
    rounded = mpo.round(cutoff=1e-6)
    assert rounded.bond_dims == (1, 1, 1)
    assert rounded.norm() == 0.0
    assert torch.equal(rounded.to_dense(), torch.zeros(mpo.shape).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_rounded_in_float32(dtype):
    mpo = MPO(random_chain(LAYOUT, BONDS, dtype=dtype))
    rounded = mpo.round()
    assert rounded.dtype == torch.float32
    assert_close(rounded.to_dense().to(dtype), mpo.to_dense(), **TOL[dtype]["dense"])


def test_rounding_of_large_bonds_takes_the_range_finder():
    layout = Layout.svd(900, 850)
    mpo = MPO(random_chain(layout, (850,), dtype=torch.float32))
    rounded = mpo.round(bond_dim=16)
    dense = mpo.to_dense().double()
    best = float(spectrum_at(dense, layout, 0)[16:].norm())
    assert rounded.bond_dims == (16,)
    assert float((rounded.to_dense().double() - dense).norm()) <= NEAR_OPTIMUM * best


@pytest.mark.parametrize("bond_dim", [0, -3, True, 2.5])
def test_rounding_to_an_impossible_bond_dim(bond_dim):
    with pytest.raises(BondDimError, match=rf"bond_dim {bond_dim}"):
        MPO(random_chain(LAYOUT, BONDS)).round(bond_dim=bond_dim)
    with pytest.raises(BondDimError, match="2 entries, but 4 sites have 3 bonds"):
        MPO(random_chain(LAYOUT, BONDS)).round(bond_dim=(2, 2))


# -- gauge freedom


@LAWS
@given(chains(), SEEDS)
def test_gauge_is_invisible(chain, seed):
    layout, bonds = chain
    cores = random_chain(layout, bonds, seed=seed)
    mpo, other = MPO(cores), MPO(regauged(cores, seed))
    x = gaussian(3, layout.in_features, seed=seed)
    assert_close(other.to_dense(), mpo.to_dense(), **F64["dense"])
    assert_close(other.apply(x), mpo.apply(x), **F64["apply"])
    assert_close(other.norm(), mpo.norm(), **F64["dense"])
    assert_close(other.inner(mpo), mpo.inner(mpo), **F64["dense"])
    for values, others in zip(mpo.schmidt_spectra(), other.schmidt_spectra(), strict=True):
        assert_close(others, values, **F64["spectrum"])
    assert_close(
        torch.tensor(other.entropies_nats()).double(),
        torch.tensor(mpo.entropies_nats()).double(),
        **TOL[torch.float32]["spectrum"],
    )
    assert_close(other.round(bond_dim=2).to_dense().norm(), mpo.round(bond_dim=2).to_dense().norm())


# -- the norm


@LAWS
@given(chains(), SEEDS)
def test_norm_from_any_center_is_the_frobenius_norm(chain, seed):
    layout, bonds = chain
    cores = random_chain(layout, bonds, seed=seed)
    expected = float(dense_twin(cores).norm())
    assert_close(MPO(cores).norm(), expected, **F64["dense"])
    for site in range(layout.num_sites):
        assert_close(MPO(cores).canonicalize(site).norm(), expected, **F64["dense"])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norm_of_tiny_and_huge_float32_matrices_does_not_underflow(scale):
    mpo = MPO(random_chain(LAYOUT, BONDS, dtype=torch.float32))
    assert_close((scale * mpo).norm(), scale * mpo.norm(), **TOL[torch.float32]["norm"])


def test_reading_numbers_of_trainable_cores_warns_of_nothing():
    mpo = MPO(random_chain(LAYOUT, BONDS, requires_grad=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mpo.norm() > 0
        assert mpo.canonicalize(1).norm() == pytest.approx(mpo.norm())
        assert len(mpo.entropies_nats()) == 3
        assert mpo.round(bond_dim=2).bond_dims == (2, 2, 2)


# -- what a chain is


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "at least one core"),
        ([(1, 2, 2)], r"core 0 has shape \(1, 2, 2\).*four non-empty"),
        ([(1, 2, 2, 3), (3, 0, 2, 1)], r"core 1 has shape \(3, 0, 2, 1\).*four non-empty"),
        ([(1, 2, 2, 3), (4, 2, 2, 1)], "bond 0: core 0 ends with bond dimension 3.*begins with 4"),
        ([(2, 2, 2, 3), (3, 2, 2, 1)], "outermost bonds have dimensions 2 and 1"),
        ([(1, 2, 2, 3), (3, 2, 2, 2)], "outermost bonds have dimensions 1 and 2"),
    ],
    ids=str,
)
def test_cores_that_form_no_chain_are_refused(shapes, message):
    with pytest.raises(ContractionError, match=message):
        MPO([torch.zeros(shape) for shape in shapes])


def test_mixed_dtypes_are_refused():
    with pytest.raises(ContractionError, match=r"core 1 is torch.float64.*core 0 is torch.float32"):
        MPO([torch.zeros(1, 2, 2, 1), torch.zeros(1, 2, 2, 1).double()])


@pytest.mark.parametrize("shape", [(25, 6), (24, 7)], ids=str)
def test_shape_larger_than_the_sites_is_refused(shape):
    with pytest.raises(ValueError, match="multiply to .*Enlarge a dim"):
        MPO(random_chain(Layout.parse("4x3,6x2"), (2,)), shape=shape)


@pytest.mark.parametrize("shape", [(0, 6), (24, -1)], ids=str)
def test_empty_shape_is_refused(shape):
    with pytest.raises(ValueError, match=f"{shape[0]}x{shape[1]}"):
        MPO(random_chain(Layout.parse("4x3,6x2"), (2,)), shape=shape)


def test_reading_an_mpo():
    mpo = MPO(random_chain(LAYOUT, BONDS))
    assert len(mpo) == 4
    assert mpo.shape == (36, 12)
    assert mpo.bond_dims == BONDS
    assert mpo.num_parameters == sum(core.numel() for core in mpo.cores)
    assert mpo.num_parameters == LAYOUT.num_parameters(BONDS)
    assert (mpo.dtype, mpo.device) == (torch.float64, torch.device("cpu"))
    assert repr(mpo).startswith("MPO(36x12, layout=2x3,3x2,2x2,3x1, bond_dims=[4, 5, 3]")


def test_copies_and_pickles():
    mpo = MPO.from_matrix(gaussian(7, 10), Layout.parse("3x4,3x3", pad=True)).canonicalize(0)
    for twin in (copy.deepcopy(mpo), pickle.loads(pickle.dumps(mpo))):
        assert (twin.shape, twin.center, twin.layout) == (mpo.shape, mpo.center, mpo.layout)
        assert all(torch.equal(a, b) for a, b in zip(twin.cores, mpo.cores, strict=True))


@pytest.mark.parametrize(
    ("sites", "bonds"),
    [("4x3,6x5", (7,)), ("4x4,4x4,4x4", (6, 9)), ("2x3,3x2,4x4,3x5", (4, 6, 9)), ("8x8", ())],
)
def test_the_symmetric_gauge_forgets_how_the_cores_came_about(sites, bonds):
    generator = torch.Generator().manual_seed(0)
    layout = Layout.parse(sites)
    cores = [
        core.double() for core in random_cores(layout, bonds, variance=1.0, generator=generator)
    ]
    other = list(cores)
    for bond, size in enumerate(bonds):
        change = torch.randn(size, size, generator=generator, dtype=torch.float64)
        other[bond] = torch.tensordot(other[bond], change, dims=1)
        other[bond + 1] = torch.tensordot(torch.linalg.inv(change), other[bond + 1], dims=1)
    ours, theirs = symmetric_gauge(cores), symmetric_gauge(other)
    assert [core.shape for core in ours] == [core.shape for core in cores]
    assert_close(MPO(ours).to_dense(), MPO(cores).to_dense(), rtol=1e-10, atol=1e-12)
    for first, second in zip(
        ours, theirs, strict=True
    ):  # equal but for the signs of singular vectors
        assert_close(first.abs(), second.abs(), rtol=1e-8, atol=1e-9)
    norms = [float(core.norm()) for core in ours]
    assert max(norms) <= min(norms) * (1 + 1e-12)


def test_the_symmetric_gauge_of_two_sites_is_balanced():
    cores = random_cores(
        Layout.parse("4x3,6x5"), (7,), variance=1.0, generator=torch.Generator().manual_seed(0)
    )
    left, right = (core.double() for core in symmetric_gauge([core.double() for core in cores]))
    left_KK = torch.einsum("loik,loim->km", left, left)
    assert_close(left_KK, torch.einsum("koir,moir->km", right, right), rtol=1e-10, atol=1e-12)
    assert_close(left_KK, torch.diag(left_KK.diagonal()), rtol=1e-10, atol=1e-12)


def test_the_symmetric_gauge_of_a_bond_that_is_too_large_only_equalizes_norms():
    cores = [gaussian(1, 2, 2, 5), gaussian(5, 3, 3, 1)]
    for ours, expected in zip(symmetric_gauge(cores), equalize_norms(cores), strict=True):
        assert_close(ours, expected)


def test_the_symmetric_gauge_of_a_rank_deficient_chain_is_finite_and_exact():
    cores = [
        core.double()
        for core in random_cores(
            Layout.parse("4x4,4x4"), (6,), variance=1.0, generator=torch.Generator().manual_seed(0)
        )
    ]
    cores[0][..., 3:] = 0
    found = symmetric_gauge(cores)
    assert all(bool(core.isfinite().all()) for core in found)
    assert_close(MPO(found).to_dense(), MPO(cores).to_dense(), rtol=1e-10, atol=1e-12)


def test_the_symmetric_gauge_of_a_zero_matrix_leaves_finite_cores():
    left, right = gaussian(1, 4, 4, 6), gaussian(6, 4, 4, 1)
    left[..., 3:], right[:3] = 0, 0  # no core is zero, their product is
    for found, expected in zip(
        symmetric_gauge([left, right]), equalize_norms([left, right]), strict=True
    ):
        assert_close(found, expected)
