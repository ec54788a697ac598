"""The identity gauge: the same matrix from as many numbers as there are degrees of freedom."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mpocompress.errors import ContractionError, DecompositionError, LayoutError
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.dominant_rows import DOMINANCE, dominant_rows
from mpocompress.mpo.identity_gauge import (
    IdentityGauge,
    check_gauge,
    fix_identity_gauge,
    index_dtype,
    rebuild_core,
    row_sources,
    stored_parameters,
)
from tests.planted import (
    LAWS,
    SEEDS,
    dense_twin,
    gaussian,
    layouts,
    random_chain,
    regauged,
    seeded,
    with_spectrum,
)
from tests.tolerances import TOL

F64 = TOL[torch.float64]


def largest(gauge: IdentityGauge) -> float:
    return max((float(free.abs().max()) for free in gauge.free if free.numel()), default=0.0)


def rescaled(cores, decades):
    """The same matrix, to the last bit, with columns scaled by powers of two at every bond."""
    cores = list(cores)
    for bond in range(len(cores) - 1):
        size = cores[bond].shape[3]
        exponents = torch.linspace(-decades, decades, size, dtype=torch.float64) * 3.32
        scales = 2.0 ** exponents.round()[torch.randperm(size, generator=seeded(bond))]
        cores[bond] = cores[bond] * scales
        cores[bond + 1] = cores[bond + 1] / scales[:, None, None, None]
    return cores


@LAWS
@given(layouts(max_sites=4, max_dim=4), SEEDS, st.integers(min_value=1, max_value=6))
def test_dense_matrix_count_and_size_of_the_entries(layout, seed, bond_dim):
    bonds = layout.clip([bond_dim] * (layout.num_sites - 1))
    cores = random_chain(layout, bonds, seed=seed)
    gauge = fix_identity_gauge(cores)
    assert_close(gauge.to_dense(), dense_twin(cores), **F64["dense"])
    assert_close(dense_twin(gauge.cores), dense_twin(cores), **F64["dense"])
    assert gauge.bond_dims == bonds
    count = sum(core.numel() for core in cores) - sum(bond**2 for bond in bonds)
    assert gauge.num_parameters == count == layout.degrees_of_freedom(bonds)
    assert largest(gauge) <= DOMINANCE + 1e-9


@pytest.mark.parametrize("text", ["12x1,1x10", "1x10,12x1", "4x2,3x5", "2x2,6x5", "1x1,3x4"])
def test_two_sites_at_maximal_bond_dim_take_the_dense_matrix(text):
    layout = Layout.parse(text)
    full = layout.out_features * layout.in_features
    assert layout.degrees_of_freedom(layout.max_bond_dims()) == full
    assert layout.degrees_of_freedom([10**6]) == full
    cores = random_chain(layout, layout.max_bond_dims())
    assert fix_identity_gauge(cores).num_parameters == full


def test_degrees_of_freedom_of_the_svd():
    layout = Layout.svd(384, 384)
    assert layout.degrees_of_freedom([112]) == 112 * 768 - 112**2
    assert stored_parameters(layout, [112], "identity") == 112 * 768 - 112**2
    assert stored_parameters(layout, [112], "none") == 112 * 768


@pytest.mark.parametrize("decades", [0, 3, 12])
def test_neither_numbers_nor_pivots_depend_on_the_gauge_before(decades):
    cores = random_chain(Layout.parse("4x3,3x4,2x5,3x2"), (4, 5, 3))
    first = fix_identity_gauge(cores)
    second = fix_identity_gauge(rescaled(regauged(cores, 5), decades))
    assert_close(second.to_dense(), first.to_dense(), **F64["dense"])
    for mine, theirs in zip(first.pivots, second.pivots, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(first.free, second.free, strict=True):
        assert_close(mine, theirs, **F64["dense"])
    assert_close(first.last, second.last, **F64["dense"])


@pytest.mark.parametrize("decades", [4, 8, 12])
def test_ill_conditioned_spectra_keep_small_entries(decades):
    spectrum = torch.logspace(0, -decades, 20, dtype=torch.float64)
    matrix = with_spectrum(spectrum, 40, 30)
    gauge = fix_identity_gauge(MPO.from_matrix(matrix, "40x1,1x30", bond_dim=20).cores)
    assert gauge.bond_dims == (20,)
    assert_close(gauge.to_dense(), matrix, **F64["dense"])
    assert largest(gauge) <= DOMINANCE + 1e-9


def test_rows_that_mislead_elimination_are_no_trap():
    # Elimination with row pivoting alone leaves 2^(n-1) here; all entries are 1 at most to begin.
    size = 24
    trap = torch.eye(size).tril() - torch.ones(size, size).tril(-1)
    trap[:, -1] = 1.0
    tall = torch.cat((trap, gaussian(10, size).float())).double()
    pivots, coefficients = dominant_rows(torch.linalg.qr(tall).Q)
    assert float(coefficients.abs().max()) <= DOMINANCE + 1e-9
    assert_close(coefficients @ tall[pivots], tall, **F64["dense"])


def test_dependent_columns_have_no_dominant_rows():
    with pytest.raises(DecompositionError, match=r"no 3 rows .*\(5, 3\).*dependent"):
        dominant_rows(torch.ones(5, 3, dtype=torch.float64))
    with pytest.raises(DecompositionError, match=r"no 3 rows .*\(2, 3\)"):
        dominant_rows(torch.ones(2, 3, dtype=torch.float64))


def test_bonds_that_carry_less_are_rounded():
    half = random_chain(Layout.parse("4x3,2x4,3x2"), (2, 3))
    doubled = (MPO(half) + MPO(half)).cores
    gauge = fix_identity_gauge(doubled)
    assert gauge.bond_dims == (2, 3)
    assert_close(gauge.to_dense(), 2 * dense_twin(half), **F64["dense"])
    # More columns than rows: (1, 2, 1, 5) then (5, 1, 3, 1).
    wide = (gaussian(1, 2, 1, 5), gaussian(5, 1, 3, 1, seed=1))
    gauge = fix_identity_gauge(wide)
    assert gauge.bond_dims == (2,)
    assert_close(gauge.to_dense(), dense_twin(wide), **F64["dense"])
    zero = fix_identity_gauge([torch.zeros(1, 4, 1, 3), torch.zeros(3, 1, 5, 1)])
    assert zero.bond_dims == (1,)
    assert zero.to_dense().count_nonzero() == 0


def test_one_site_is_stored_whole():
    core = gaussian(1, 3, 4, 1)
    gauge = fix_identity_gauge([core])
    assert gauge.num_parameters == 12
    assert gauge.index_bytes == 0
    assert torch.equal(gauge.to_dense(), core[0, :, :, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_given_comes_back_rounded_once(dtype):
    cores = [core.to(dtype) for core in random_chain(Layout.parse("6x5,5x6,2x3"), (9, 5))]
    gauge = fix_identity_gauge(cores)
    assert gauge.dtype == dtype
    assert {core.dtype for core in gauge.cores} == {dtype}
    exact = dense_twin([core.double() for core in cores])
    found = dense_twin([core.double() for core in gauge.cores])
    scale = float(exact.abs().max())
    assert_close(found / scale, exact / scale, **TOL[dtype]["dense"])
    # Pivots: 9 among 30 rows in a byte each, 5 among 9 * 30 rows in two.
    assert gauge.index_bytes == 9 + 2 * 5
    assert gauge.num_bytes == gauge.num_parameters * dtype.itemsize + 19


def test_padding_is_kept():
    cores = random_chain(Layout.parse("4x3,4x4"), (5,))
    gauge = fix_identity_gauge(cores, shape=(12, 10))
    assert gauge.layout.pad
    assert gauge.to_dense().shape == (12, 10)
    assert_close(gauge.to_dense(), dense_twin(cores)[:12, :10], **F64["dense"])


def test_gradients_are_those_of_the_dense_twin():
    gauge = fix_identity_gauge(random_chain(Layout.parse("4x2,3x4,2x3"), (4, 5)))
    leaves = [*(free.clone().requires_grad_() for free in gauge.free), gauge.last.clone()]
    leaves[-1].requires_grad_()
    twin = dataclasses.replace(gauge, free=tuple(leaves[:-1]), last=leaves[-1])
    probe = gaussian(24, 24, seed=3)
    mine = torch.autograd.grad((twin.to_dense() * probe).sum(), leaves)
    # Written out: an identity and a selection matrix per core, contracted by one einsum.
    cores = []
    for free, pivots, core in zip(leaves, gauge.pivots, gauge.cores, strict=False):
        rows, bond = core.shape[0] * core.shape[1] * core.shape[2], core.shape[3]
        others = [row for row in range(rows) if row not in pivots.tolist()]
        place = torch.eye(rows, dtype=torch.float64)
        block = place[:, pivots.long()] @ torch.eye(bond, dtype=torch.float64)
        cores.append((block + place[:, others] @ free).reshape(core.shape))
    expected = torch.autograd.grad((dense_twin([*cores, leaves[-1]]) * probe).sum(), leaves)
    for gradient, other in zip(mine, expected, strict=True):
        assert_close(gradient, other, **F64["gradient"])


def test_gradcheck_of_a_rebuilt_core():
    free = gaussian(4, 3).requires_grad_()
    pivots = torch.tensor([1, 4, 5])
    sources = row_sources(pivots, 4)
    assert sources.tolist() == [3, 0, 4, 5, 1, 2, 6]
    shape = (7, 1, 1, 3)
    assert torch.autograd.gradcheck(
        lambda rows: rebuild_core(rows, pivots, sources, shape), (free,)
    )


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1, torch.uint8),
        (256, torch.uint8),
        (257, torch.int16),
        (1 << 15, torch.int16),
        ((1 << 15) + 1, torch.int32),
        (1 << 31, torch.int32),
        ((1 << 31) + 1, torch.int64),
    ],
)
def test_smallest_index_dtype(size, dtype):
    assert index_dtype(size) == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"free": ()}, r"0 sets of free rows and 1 of pivots.*2 sites has 1 bonds"),
        ({"free": (torch.zeros(7, 4),)}, r"core 0 has 12 rows, of which 4.*\(8, 4\), not \(7, 4\)"),
        ({"free": (torch.zeros(4),)}, r"core 0 has 12 rows; its free rows have shape \(4,\)"),
        ({"free": (torch.zeros(8, 4).double(),)}, r"core 0 is torch\.float64.*\.to\("),
        ({"last": torch.zeros(3, 1, 10, 1)}, r"core 1, the last one, has shape.*\(4, 1, 10, 1\)"),
        ({"pivots": (torch.tensor([0, 1, 2, 12]),)}, "ascending numbers from 0 to 11"),
        ({"pivots": (torch.tensor([0, 2, 1, 3]),)}, "ascending numbers from 0 to 11"),
        ({"pivots": (torch.tensor([0, 1, 1, 3]),)}, "ascending numbers from 0 to 11"),
        ({"pivots": (torch.zeros(4),)}, r"pivots are row numbers, not torch\.float32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    gauge = fix_identity_gauge(MPO.random("12x1,1x10", 4).cores)
    with pytest.raises(ContractionError, match=message):
        dataclasses.replace(gauge, **change)


def test_cores_that_cannot_be_gauged_are_refused():
    cores = [torch.ones(1, 3, 1, 2), torch.ones(2, 1, 3, 1)]
    with pytest.raises(ContractionError, match="meta device and have no values"):
        fix_identity_gauge([core.to("meta") for core in cores])
    cores[1][0, 0, 1, 0] = float("nan")
    with pytest.raises(DecompositionError, match="1 of 6 entries are NaN or Inf"):
        fix_identity_gauge(cores)
    with pytest.raises(ContractionError, match="bond 0"):
        fix_identity_gauge([torch.ones(1, 3, 1, 2), torch.ones(3, 1, 3, 1)])
    with pytest.raises(LayoutError, match=r"gauge 'ortho': there are \"none\" and \"identity\""):
        check_gauge("ortho")
