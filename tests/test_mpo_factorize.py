"""Sequential SVD: exactness, the laws of its error, cutoffs, dtypes, odd shapes, refusals."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mpocompress.errors import BondDimError, DecompositionError, LayoutError
from mpocompress.mpo import MPO, Layout, sequential_svd
from mpocompress.mpo.factorize import random_cores
from tests.planted import (
    LAWS,
    SEEDS,
    chains,
    dense_twin,
    gaussian,
    kronecker,
    layouts,
    seeded,
    spectrum_at,
    with_spectrum,
)
from tests.tolerances import HONESTY, NEAR_OPTIMUM, SAMPLING, TOL

F64 = TOL[torch.float64]


def squared_error(matrix, cores):
    return float((matrix.double() - dense_twin([core.double() for core in cores])).square().sum())


def lost_weight(result):
    return sum((cut.discarded_weight for cut in result.cuts), 0.0)


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


# -- exactness


@LAWS
@given(layouts(), SEEDS)
def test_lossless_at_maximal_bond_dims(layout, seed):
    matrix = gaussian(layout.out_features, layout.in_features, seed=seed)
    result = sequential_svd(matrix, layout)
    assert_close(dense_twin(result.cores), matrix, **F64["dense"])
    bonds = (1, *layout.max_bond_dims(), 1)
    assert [tuple(core.shape) for core in result.cores] == [
        (bonds[k], out, in_, bonds[k + 1]) for k, (out, in_) in enumerate(layout.pairs)
    ]
    assert_close(result.weight, float(matrix.square().sum()))
    assert_close(result.error_bound, 0.0, **F64["dense"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["32x1,1x24", "8x6,4x4", "4x2,4x3,2x4", "2x3,2x2,2x2,4x2"])
def test_lossless_at_size_in_each_dtype(layout, dtype):
    sites = Layout.parse(layout)
    matrix = gaussian(sites.out_features, sites.in_features, dtype=dtype)
    result = sequential_svd(matrix, sites)
    assert {core.dtype for core in result.cores} == {dtype}
    assert_close(dense_twin(result.cores), matrix, **TOL[dtype]["dense"])


@LAWS
@given(layouts(max_sites=3), SEEDS)
def test_transposing_swaps_out_and_in(layout, seed):
    matrix = gaussian(layout.out_features, layout.in_features, seed=seed)
    result = sequential_svd(matrix, layout)
    transposed = sequential_svd(matrix.T, layout.transposed)
    for core, other in zip(result.cores, transposed.cores, strict=True):
        assert core.shape == other.transpose(1, 2).shape
    assert_close(dense_twin(transposed.cores), matrix.T, **F64["dense"])


@LAWS
@given(layouts(max_sites=3), SEEDS)
def test_padding_is_invisible(layout, seed):
    rows, columns = max(1, layout.out_features - 1), max(1, layout.in_features - 2)
    matrix = gaussian(rows, columns, seed=seed)
    mpo = MPO.from_matrix(matrix, Layout(layout.out_dims, layout.in_dims, pad=True))
    assert mpo.shape == (rows, columns)
    assert_close(mpo.to_dense(), matrix, **F64["dense"])
    assert mpo.layout.pad == ((rows, columns) != (layout.out_features, layout.in_features))
    assert mpo.num_parameters == layout.num_parameters(mpo.bond_dims)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("1x1", (1, 1)),
        ("1x1,1x1", (1, 1)),
        ("1x5", (1, 5)),
        ("1x5,1x1,1x1", (1, 5)),
        ("1x2,1x3", (1, 6)),
        ("5x1", (5, 1)),
        ("3x1,2x1", (6, 1)),
        ("13x1,1x11", (13, 11)),
        ("1x11,13x1", (13, 11)),
        ("13x11,1x1", (13, 11)),
        ("1x1,13x11,1x1", (13, 11)),
        ("1x1,2x1,1x1,1x3,1x1", (2, 3)),
    ],
)
def test_primes_single_rows_and_trivial_legs(layout, shape):
    matrix = gaussian(*shape)
    mpo = MPO.from_matrix(matrix, layout)
    assert mpo.shape == shape
    assert_close(mpo.to_dense(), matrix, **F64["dense"])
    assert_close(mpo.norm(), float(matrix.norm()), **F64["dense"])


def test_cores_are_left_canonical_with_the_center_last():
    result = sequential_svd(gaussian(12, 12), Layout.parse("2x2,2x3,3x2"), bond_dim=3)
    for core in result.cores[:-1]:
        columns = core.reshape(-1, core.shape[3])
        assert_close(columns.T @ columns, torch.eye(core.shape[3]).double(), **F64["gauge"])
    assert_close(
        float(result.cores[-1].square().sum()),
        result.weight - lost_weight(result),
    )


# -- the error


@LAWS
@given(chains(max_dim=4), SEEDS, st.sampled_from([0.0, 0.01, 0.2]))
def test_squared_error_equals_the_summed_discarded_weight(chain, seed, cutoff):
    layout, bonds = chain
    matrix = gaussian(layout.out_features, layout.in_features, seed=seed)
    result = sequential_svd(matrix, layout, bond_dim=bonds, cutoff=cutoff)
    lost = lost_weight(result)
    weight = float(matrix.square().sum())
    assert_close(squared_error(matrix, result.cores) / weight, lost / weight, **F64["weight"])
    assert_close(result.error_bound**2, lost)
    assert_close(result.relative_error, math.sqrt(lost / weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["256x1,1x256", "16x16,16x16", "8x4,4x8,8x8", "4x4,4x4,4x4,4x4"])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_squared_error_equals_the_discarded_weight_at_256(layout, decay, dtype):
    spectrum = (1 + torch.arange(256.0)) ** -decay
    matrix = with_spectrum(spectrum, 256, 256, dtype=dtype)
    result = sequential_svd(matrix, Layout.parse(layout), bond_dim=12)
    lost = lost_weight(result)
    weight = float(matrix.double().square().sum())
    assert_close(
        squared_error(matrix, result.cores) / weight, lost / weight, **TOL[dtype]["weight"]
    )


@LAWS
@given(chains(max_dim=4), SEEDS)
def test_error_is_within_the_root_of_the_bonds_of_the_best_possible(chain, seed):
    layout, bonds = chain
    matrix = gaussian(layout.out_features, layout.in_features, seed=seed)
    result = sequential_svd(matrix, layout, bond_dim=bonds)
    # No MPO of these bond dims comes closer than the worst bond alone allows.
    tails = [
        float(spectrum_at(matrix, layout, bond)[dim:].square().sum())
        for bond, dim in enumerate(bonds)
    ]
    error = squared_error(matrix, result.cores)
    weight = float(matrix.square().sum())
    slack = F64["weight"]["atol"] * weight
    assert error <= sum(tails) + slack  # theorem 2.2: hence at most (L - 1) * best^2
    assert error >= max(tails, default=0.0) - slack
    for cut, tail in zip(result.cuts, tails, strict=True):
        assert cut.discarded_weight <= tail + slack


@LAWS
@given(layouts(max_sites=2, max_dim=6), SEEDS, st.integers(min_value=1, max_value=8))
def test_two_sites_are_optimal(layout, seed, bond_dim):
    matrix = gaussian(layout.out_features, layout.in_features, seed=seed)
    result = sequential_svd(matrix, layout, bond_dim=bond_dim)
    if layout.num_sites == 2:
        tail = float(spectrum_at(matrix, layout, 0)[bond_dim:].square().sum())
        assert_close(squared_error(matrix, result.cores), tail, **F64["dense"])


def test_degenerate_layout_is_the_truncated_svd():
    matrix = gaussian(20, 12)
    mpo = MPO.from_matrix(matrix, Layout.svd(20, 12), bond_dim=5)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert_close(mpo.to_dense(), (left[:, :5] * values[:5]) @ right[:5], **F64["dense"])


def test_large_matrices_take_the_range_finder_and_stay_honest():
    spectrum = (1 + torch.arange(768.0)) ** -0.5
    for dtype in (torch.float32, torch.float64):
        matrix = with_spectrum(spectrum, 1024, 768, dtype=dtype)
        result = sequential_svd(matrix, Layout.svd(1024, 768), bond_dim=32)
        best = float(spectrum[32:].square().sum())
        error = squared_error_of_svd(matrix, result.cores)
        assert best * (1 - 1e-6) <= error <= best * NEAR_OPTIMUM**2
        weight = float(spectrum.square().sum())
        assert_close(
            error / weight, result.cuts[0].discarded_weight / weight, **TOL[dtype]["weight"]
        )


def squared_error_of_svd(matrix, cores):
    left, right = cores[0].double(), cores[1].double()
    dense = left.reshape(-1, left.shape[3]) @ right.reshape(right.shape[0], -1)
    return float((matrix.double() - dense).square().sum())


def test_discarded_weight_of_a_large_float32_matrix_with_one_dominant_direction():
    """The tail holds 3e-7 of the weight: the difference of two float32 sums would hide it."""
    spectrum = torch.linspace(2.0, 0.1, 768, dtype=torch.float64)
    spectrum[0] = 1e5
    matrix = with_spectrum(spectrum, 768, 768, dtype=torch.float32)
    result = sequential_svd(matrix, Layout.svd(768, 768), bond_dim=32)
    error = squared_error_of_svd(matrix, result.cores)
    assert_close(result.cuts[0].discarded_weight, error, **HONESTY)


def test_cutoff_and_bond_dim_together_on_a_large_float32_matrix():
    """What the range finder never saw is known well enough for a cutoff below float32's eps."""
    spectrum = 2.0 ** -torch.arange(768, dtype=torch.float64)
    matrix = with_spectrum(spectrum, 768, 768, dtype=torch.float32)
    result = sequential_svd(matrix, Layout.svd(768, 768), bond_dim=64, cutoff=1e-7)
    assert result.cuts[0].bond_dim == 12  # 4^-12 = 6e-8


@pytest.mark.parametrize("largest", [1e3, 1e5])
def test_without_limits_one_dominant_direction_costs_nothing_else(largest):
    """Values of 1e-6 of the largest are data in float32: only the entries are rounded."""
    spectrum = torch.linspace(2.0, 0.1, 256, dtype=torch.float64)
    spectrum[0] = largest
    matrix = with_spectrum(spectrum, 256, 256, dtype=torch.float32)
    result = sequential_svd(matrix, Layout.svd(256, 256))
    assert result.cuts[0].bond_dim == 256
    assert result.error_bound == 0.0
    assert_close(
        dense_twin(result.cores) / largest, matrix / largest, **TOL[torch.float32]["dense"]
    )


# -- cutoff and bond dims


@LAWS
@given(layouts(), SEEDS, st.floats(min_value=1e-6, max_value=0.5))
def test_cutoff_bounds_the_truncation_error_of_each_bond(layout, seed, cutoff):
    matrix = gaussian(layout.out_features, layout.in_features, seed=seed)
    result = sequential_svd(matrix, layout, cutoff=cutoff)
    for cut in result.cuts:
        assert 0 <= cut.truncation_error <= cutoff
    assert result.relative_error <= math.sqrt(len(result.cuts) * cutoff)


def test_cutoff_is_relative_and_squared():
    matrix = with_spectrum(torch.tensor([10.0, 1.0, 0.1]), 6, 5)
    for scale in (1.0, 1e-12, 1e12):
        assert MPO.from_matrix(scale * matrix, "6x1,1x5", cutoff=0.0102).bond_dims == (1,)
        assert MPO.from_matrix(scale * matrix, "6x1,1x5", cutoff=0.0098).bond_dims == (2,)
        assert MPO.from_matrix(scale * matrix, "6x1,1x5", cutoff=1.02e-4).bond_dims == (2,)
        assert MPO.from_matrix(scale * matrix, "6x1,1x5", cutoff=0.98e-4).bond_dims == (3,)


@pytest.mark.parametrize("wanted", [3, (3, 3, 3), [2, 5, 3], (1, 1, 1), (100, 100, 100)], ids=str)
def test_bond_dim_for_all_bonds_or_one_for_each(wanted):
    layout = Layout.parse("2x3,3x2,2x2,2x1")
    mpo = MPO.from_matrix(gaussian(24, 12), layout, bond_dim=wanted)
    limits = [wanted] * 3 if isinstance(wanted, int) else list(wanted)
    assert mpo.bond_dims == layout.clip(limits)


def test_integers_of_numpy_are_integers():
    matrix = gaussian(8, 8)
    for bond_dim in (np.int64(3), [np.int32(3), 3], np.array([3, 3])):
        mpo = MPO.from_matrix(matrix, "2x2,2x2,2x2", bond_dim=bond_dim)
        assert mpo.bond_dims == (3, 3)
        assert all(type(dim) is int for dim in mpo.bond_dims)
    assert Layout(tuple(np.array([2, 4])), (2, 4)) == Layout((2, 4), (2, 4))


def test_clipped_bond_dims_are_reported():
    result = sequential_svd(gaussian(8, 8), Layout.parse("2x2,2x2,2x2"), bond_dim=(9, 4))
    assert [cut.clipped for cut in result.cuts] == [True, False]
    assert [cut.bond_dim for cut in result.cuts] == [4, 4]


# -- dtypes, strides, storage, determinism


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["24x1,1x20", "6x4,4x5", "3x5,4x2,2x2", "24x20"])
def test_dtype_that_came_is_returned(layout, dtype):
    matrix = gaussian(24, 20, dtype=dtype)
    mpo = MPO.from_matrix(matrix, layout)
    assert mpo.dtype == dtype
    assert_close(mpo.to_dense(), matrix, **TOL[dtype]["dense"])


def test_half_types_are_worked_on_in_float32():
    matrix = gaussian(24, 20, dtype=torch.bfloat16)
    result = sequential_svd(matrix, Layout.parse("6x4,4x5"))
    assert {core.dtype for core in result.cores} == {torch.float32}
    assert_close(dense_twin(result.cores), matrix.float(), **TOL[torch.float32]["dense"])


def test_rounding_to_a_half_type_costs_the_gauge():
    matrix = gaussian(24, 20)
    assert MPO.from_matrix(matrix, "6x4,4x5").center == (1, 1)
    assert MPO.from_matrix(matrix.to(torch.bfloat16), "6x4,4x5").center == (0, 1)


def test_large_float16_weights_do_not_overflow_in_a_core():
    matrix = torch.full((4096, 4), 2000.0, dtype=torch.float16)
    mpo = MPO.from_matrix(matrix, Layout.svd(4096, 4), bond_dim=2)
    assert all(bool(core.isfinite().all()) for core in mpo.cores)
    relative = (
        mpo.to(dtype=torch.float64).to_dense() - matrix.double()
    ).norm() / matrix.double().norm()
    assert float(relative) <= TOL[torch.float16]["dense"]["rtol"]


@pytest.mark.parametrize(
    "view",
    [
        lambda m: m.T,
        lambda m: m[:, ::2],
        lambda m: m[::2],
        lambda m: m.flip(0),
        lambda m: m[:1].expand(16, 16),
        lambda m: m[4:12, 4:12],
    ],
)
@pytest.mark.parametrize("sites", [1, 2])
def test_strides_do_not_matter(view, sites):
    matrix = view(gaussian(16, 16))
    rows, columns = matrix.shape
    layout = [(rows, columns)] if sites == 1 else [(rows // 4, 4), (4, columns // 4)]
    mpo, same = MPO.from_matrix(matrix, layout), MPO.from_matrix(matrix.contiguous(), layout)
    assert_close(mpo.to_dense(), matrix, **F64["dense"])
    for core, other in zip(mpo.cores, same.cores, strict=True):
        assert torch.equal(core, other)


@pytest.mark.parametrize("layout", ["16x12", "16x1,1x12", "4x3,4x4", "1x1,16x12"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_no_storage_is_shared_with_the_matrix(layout, dtype):
    matrix = gaussian(16, 12, dtype=dtype)
    kept = matrix.clone()
    mpo = MPO.from_matrix(matrix, layout)
    for core in mpo.cores:
        assert storage(core) != storage(matrix)
        assert core.is_contiguous()
        assert core.untyped_storage().nbytes() == core.numel() * core.element_size()
        core.zero_()
    assert torch.equal(matrix, kept)


def test_factorizing_a_parameter_records_no_gradient():
    matrix = gaussian(8, 8).requires_grad_()
    assert not any(core.requires_grad for core in MPO.from_matrix(matrix, "2x4,4x2").cores)
    assert not any(core.requires_grad for core in MPO.from_matrix(matrix, "8x8").cores)


@pytest.mark.parametrize(
    ("shape", "layout", "bond_dim"),
    [((24, 24), "2x3,3x2,4x4", 4), ((800, 780), "800x1,1x780", 16), ((800, 800), "20x20,40x40", 8)],
)
def test_equal_matrices_give_equal_cores(shape, layout, bond_dim):
    matrix = gaussian(*shape, dtype=torch.float32)
    first = MPO.from_matrix(matrix, layout, bond_dim=bond_dim)
    torch.manual_seed(99)  # the global generator is not used
    second = MPO.from_matrix(matrix.clone(), layout, bond_dim=bond_dim)
    assert all(torch.equal(a, b) for a, b in zip(first.cores, second.cores, strict=True))


def test_given_generator_is_used():
    matrix = gaussian(800, 780, dtype=torch.float32)
    layout = Layout.svd(800, 780)
    cores = [
        MPO.from_matrix(matrix, layout, bond_dim=8, generator=seeded(seed)).cores[0]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(cores[0], cores[1])
    assert not torch.equal(cores[0], cores[2])


# -- zero matrices


@pytest.mark.parametrize("cutoff", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["8x6", "8x1,1x6", "2x2,2x3,2x1"])
def test_zero_matrix(layout, cutoff):
    result = sequential_svd(torch.zeros(8, 6), Layout.parse(layout), cutoff=cutoff)
    assert all(cut.bond_dim == 1 for cut in result.cuts)
    assert torch.equal(dense_twin(result.cores), torch.zeros(8, 6))
    assert (result.weight, result.error_bound, result.relative_error) == (0.0, 0.0, 0.0)


def test_large_zero_matrix():
    result = sequential_svd(torch.zeros(800, 780), Layout.svd(800, 780), bond_dim=8)
    assert result.cuts[0].bond_dim == 1
    assert result.error_bound == 0.0


# -- closed forms


@LAWS
@given(layouts(max_dim=3), SEEDS)
def test_kronecker_product_of_factors(layout, seed):
    factors = [gaussian(out, in_, seed=seed + k) for k, (out, in_) in enumerate(layout.pairs)]
    mpo = MPO.kronecker(factors)
    assert mpo.bond_dims == (1,) * (layout.num_sites - 1)
    assert mpo.layout == layout
    assert_close(mpo.to_dense(), kronecker(factors), **F64["dense"])


def test_identity_mpo():
    mpo = MPO.identity("2x2,3x3,4x4", dtype=torch.float64)
    assert torch.equal(mpo.to_dense(), torch.eye(24).double())
    with pytest.raises(LayoutError, match="2x3,3x2: the identity needs equal out and in dims"):
        MPO.identity("2x3,3x2")


@pytest.mark.parametrize(
    ("layout", "bond_dim"),
    [("16x1,1x16", 4), ("4x4,4x4", 1), ("4x4,4x4", 12), ("2x4,4x2,2x2", 3), ("16x16", 1)],
)
def test_random_cores_have_the_variance_asked_for(layout, bond_dim):
    generator = seeded(0)
    sites = Layout.parse(layout)
    squares = [
        dense_twin(random_cores(sites, bond_dim, variance=0.3, generator=generator)).square().mean()
        for _ in range(600)
    ]
    assert_close(torch.stack(squares).mean(), torch.tensor(0.3), **SAMPLING)


def test_random_cores_are_clipped_seeded_and_typed():
    layout = Layout.parse("2x2,2x2,2x2")
    first = MPO.random(layout, 100, dtype=torch.float64, generator=seeded(3))
    again = MPO.random(layout, (100, 100), dtype=torch.float64, generator=seeded(3))
    assert first.bond_dims == (4, 4)
    assert first.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(first.cores, again.cores, strict=True))


# -- refusals


@pytest.mark.parametrize(
    ("value", "seen"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]
)
@pytest.mark.parametrize("layout", ["4x6", "4x1,1x6", "2x2,2x3"])
def test_entries_that_are_not_finite_are_counted_and_located(value, seen, layout):
    matrix = gaussian(4, 6)
    matrix[1, 2] = value
    matrix[3, 0] = value
    with pytest.raises(
        DecompositionError, match=rf"2 of 24 entries.*first at \[1, 2\] \({seen}\).*Repair"
    ):
        MPO.from_matrix(matrix, layout)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_matrix_is_refused(shape):
    with pytest.raises(DecompositionError, match=rf"\({shape[0]}, {shape[1]}\) is empty"):
        MPO.from_matrix(torch.zeros(shape), "2x2,2x2")


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2)])
def test_tensor_that_is_no_matrix_is_refused(shape):
    with pytest.raises(LayoutError, match=r"is not a matrix \(out, in\)"):
        MPO.from_matrix(torch.zeros(shape), "2x2")


@pytest.mark.parametrize("bond_dim", [0, -3, True, 2.5, math.nan])
@pytest.mark.parametrize("layout", ["4x6", "4x1,1x6", "2x2,2x3"])
def test_impossible_bond_dim_is_refused(bond_dim, layout):
    with pytest.raises(BondDimError, match=rf"bond_dim {bond_dim}.*at least 1"):
        MPO.from_matrix(gaussian(4, 6), layout, bond_dim=bond_dim)
    with pytest.raises(BondDimError, match=rf"bond_dim {bond_dim}.*at least 1"):
        MPO.random(layout, bond_dim)


@pytest.mark.parametrize("bad", [0, -3, True, 2.5])
def test_impossible_bond_dim_of_one_bond_is_located(bad):
    with pytest.raises(BondDimError, match=rf"bond_dim {bad} at bond 1"):
        MPO.from_matrix(gaussian(8, 8), "2x2,2x2,2x2", bond_dim=(2, bad))


@pytest.mark.parametrize("bond_dims", [(), (2,), (2, 2, 2)])
def test_wrong_number_of_bond_dims_is_refused(bond_dims):
    with pytest.raises(BondDimError, match=rf"{len(bond_dims)} entries, but 3 sites have 2 bonds"):
        MPO.from_matrix(gaussian(8, 8), "2x2,2x2,2x2", bond_dim=bond_dims)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.int64, r"\.float\(\) first"),
        (torch.bool, r"\.float\(\) first"),
        (torch.complex64, "the real and the imaginary part"),  # float() would drop one
    ],
    ids=str,
)
def test_dtype_that_is_not_real_floating_is_refused(dtype, advice):
    with pytest.raises(DecompositionError, match=rf"dtype {dtype} cannot be decomposed.*{advice}"):
        MPO.from_matrix(torch.ones(4, 4, dtype=dtype), "2x2,2x2")


@pytest.mark.parametrize("cutoff", [-0.1, 1.0, math.nan])
def test_impossible_cutoff_is_refused(cutoff):
    with pytest.raises(DecompositionError, match=rf"cutoff {cutoff}"):
        MPO.from_matrix(gaussian(4, 4), "2x2,2x2", cutoff=cutoff)


def test_layout_that_does_not_fit_is_refused():
    with pytest.raises(LayoutError, match=r"out_dims \(2, 3\) multiply to 6.*4x4.*4 on its out"):
        MPO.from_matrix(gaussian(4, 4), "2x2,3x2")


def test_bonds_of_neighbouring_cores_match():
    result = sequential_svd(gaussian(24, 24), Layout.parse("2x3,3x2,4x4"), bond_dim=(3, 7))
    for left, right in pairwise(result.cores):
        assert left.shape[3] == right.shape[0]
    assert result.cores[0].shape[0] == result.cores[-1].shape[3] == 1


@pytest.mark.parametrize(
    ("name", "pairs"), [("svd", ((12, 1), (1, 8))), ("balanced", ((4, 2), (3, 4)))]
)
def test_layouts_by_name(name, pairs):
    matrix = gaussian(12, 8)
    mpo = MPO.from_matrix(matrix, name)
    assert mpo.layout == MPO.from_matrix(matrix, pairs).layout
    assert_close(mpo.to_dense(), matrix, **TOL[torch.float64]["dense"])
    with pytest.raises(LayoutError, match="is not a matrix"):
        MPO.from_matrix(matrix[0], name)
