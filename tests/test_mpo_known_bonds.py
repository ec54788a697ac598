"""Matrices whose bond dimensions are known: they catch wrong index orders and cuts off by one."""

import pytest
import torch
from torch.testing import assert_close

from mpocompress.mpo import MPO, Layout
from tests.planted import (
    cyclic_shift,
    gaussian,
    hadamard,
    kronecker_of_noise,
    second_difference,
    shift,
    swap,
    toeplitz,
)
from tests.tolerances import TOL

SQUARE = ["2x2,2x2,2x2,2x2", "2x2,3x3,4x4", "4x4,3x3,2x2", "3x3,3x3,3x3"]
RECTANGULAR = ["2x3,3x2,4x1,1x4", "2x4,3x3,4x2", "4x1,3x2,2x5", "1x3,3x1,3x3"]


def identity(layout):
    return torch.eye(layout.out_features, dtype=torch.float64)


def ones(layout):
    return torch.ones(layout.out_features, layout.in_features, dtype=torch.float64)


def product(layout):
    return kronecker_of_noise(layout, seed=1)


def two_products(layout):
    return kronecker_of_noise(layout, seed=1) + kronecker_of_noise(layout, seed=2)


def counting_diagonal(layout):
    return torch.diag(torch.arange(layout.out_features, dtype=torch.float64))


def upper_triangle(layout):
    return ones(layout).triu()


def lower_triangle(layout):
    return ones(layout).tril()


def cyclic(layout):
    return cyclic_shift(layout.out_features)


def open_shift(layout):
    return shift(layout.out_features)


def laplacian(layout):
    return second_difference(layout.out_features)


CASES = [
    *((make, layout, 1) for make in (identity, ones, product) for layout in SQUARE),
    *(
        (make, layout, 2)
        for make in (
            two_products,
            counting_diagonal,
            upper_triangle,
            lower_triangle,
            cyclic,
            open_shift,
        )
        for layout in SQUARE
    ),
    *((laplacian, layout, 3) for layout in SQUARE),
    *((make, layout, 1) for make in (ones, product) for layout in RECTANGULAR),
    *((two_products, layout, 2) for layout in RECTANGULAR),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("make", "sites", "expected"), CASES, ids=[f"{m.__name__}-{s}" for m, s, _ in CASES]
)
def test_known_bond_dims(make, sites, expected, dtype):
    layout = Layout.parse(sites)
    matrix = make(layout).to(dtype)
    mpo = MPO.from_matrix(matrix, layout)
    assert mpo.bond_dims == tuple(min(expected, top) for top in layout.max_bond_dims())
    assert_close(mpo.to_dense(), matrix, **TOL[dtype]["dense"])


@pytest.mark.parametrize("sites", SQUARE + RECTANGULAR)
def test_noise_has_maximal_bond_dims(sites):
    layout = Layout.parse(sites)
    noise = gaussian(layout.out_features, layout.in_features)
    assert MPO.from_matrix(noise, layout).bond_dims == layout.max_bond_dims()


@pytest.mark.parametrize("sites", ["2x2,2x2,2x2,2x2,2x2,2x2", "4x4,16x16", "8x2,2x8,4x4"])
def test_hadamard_is_a_kronecker_product(sites):
    layout = Layout.parse(sites)
    mpo = MPO.from_matrix(hadamard(6), layout)
    if layout.out_dims == layout.in_dims:
        assert mpo.bond_dims == (1,) * (layout.num_sites - 1)
    assert_close(mpo.to_dense(), hadamard(6), **TOL[torch.float64]["dense"])


@pytest.mark.parametrize("sites", ["8x8,8x8", "4x4,4x4,4x4", "2x2,4x4,8x8"])
def test_toeplitz_matrices_have_small_bond_dims(sites):
    distance = torch.arange(-63, 64, dtype=torch.float64)
    # r^|i - j| is a geometric series on either side of the diagonal: at most three terms.
    exponential = MPO.from_matrix(toeplitz(0.8 ** distance.abs()), sites)
    assert max(exponential.bond_dims) <= 3
    # A band of five diagonals carries at most one digit over, to either side.
    band = MPO.from_matrix(toeplitz(torch.where(distance.abs() <= 2, 1 + distance**2, 0.0)), sites)
    assert max(band.bond_dims) <= 3
    # A block Toeplitz matrix at any cut: 2n - 1 distances instead of n^2 blocks.
    noise = MPO.from_matrix(toeplitz(gaussian(127)), sites)
    outer = Layout.parse(sites)
    for bond, dim in enumerate(noise.bond_dims):
        blocks = outer.out_features // int(torch.tensor(outer.out_dims[bond + 1 :]).prod())
        assert dim <= min(2 * blocks - 1, outer.max_bond_dims()[bond])
        assert dim < outer.max_bond_dims()[bond]


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_swap_is_maximally_entangled(dim):
    assert MPO.from_matrix(swap(dim), [(dim, dim), (dim, dim)]).bond_dims == (dim * dim,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sites", ["16x16,16x16", "4x4,4x4,4x4,4x4", "2x2,8x8,16x16"])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (identity, 1),
        (ones, 1),
        (product, 1),
        (two_products, 2),
        (upper_triangle, 2),
        (cyclic, 2),
        (laplacian, 3),
    ],
)
def test_known_bond_dims_at_layer_size(make, expected, sites, dtype):
    """Entries of one sign: LAPACK's rounding adds up there and must not count as rank."""
    layout = Layout.parse(sites)
    mpo = MPO.from_matrix(make(layout).to(dtype), layout)
    assert set(mpo.bond_dims) == {expected}
