"""Cholesky factors by halves, against what they are factors of, and solves with a ridge."""

import pytest
import torch
from torch.testing import assert_close

from mpocompress.errors import DecompositionError
from mpocompress.mpo.cholesky import cholesky_, solve_factored, solve_ridged
from tests.planted import gaussian
from tests.tolerances import TOL

DTYPES = [torch.float32, torch.float64]


def definite(size, dtype=torch.float64):
    rows = gaussian(2 * size + 1, size, seed=size)
    return (rows.T @ rows / len(rows)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 511, 512, 701])
def test_rebuilds_the_matrix_from_its_lower_triangle(size, dtype):
    matrix = definite(size, dtype)
    factor = matrix.tril()
    assert cholesky_(factor)
    assert_close(factor, factor.tril(), rtol=0.0, atol=0.0)
    assert bool((factor.diagonal() > 0).all())
    assert_close(factor @ factor.T, matrix, **TOL[dtype]["dense"])


@pytest.mark.parametrize("size", [3, 640])
@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_says_that_a_matrix_is_not_definite_wherever_that_shows(size, where):
    matrix = definite(size)
    assert cholesky_(matrix.clone())
    index = round(where * (size - 1))
    matrix[index, index] = -1.0
    assert not cholesky_(matrix)


def test_nan_is_not_definite():
    matrix = definite(600)
    matrix[599, 2] = float("nan")
    assert not cholesky_(matrix)


@pytest.mark.parametrize("size", [5, 530])
def test_solves_with_a_factor(size):
    matrix, right = definite(size), gaussian(size, 3, seed=1)
    factor = matrix.clone()
    assert cholesky_(factor)
    assert_close(matrix @ solve_factored(right, factor), right, **TOL[torch.float64]["dense"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [5, 530])
def test_solves_with_a_ridge(size, dtype):
    matrix, right = definite(size, dtype), gaussian(4, size, seed=1, dtype=dtype)
    before = matrix.clone()
    found = solve_ridged(right, matrix, 0.1)
    diagonal = matrix.diagonal()
    shifted = matrix + 0.1 * diagonal.clamp_min(diagonal.median()).diag()
    assert found.dtype == dtype
    assert_close(found @ shifted, right, **TOL[dtype]["dense"])
    assert_close(matrix, before, rtol=0.0, atol=0.0)


def test_solves_in_float64_what_rounding_left_singular():
    matrix, right = torch.ones(2, 2), torch.tensor([[3.0, 3.0]])
    found = solve_ridged(right, matrix, 1e-9)  # lost in float32
    assert found.dtype == torch.float32
    assert_close(found, right / 2, **TOL[torch.float32]["dense"])


def test_refuses_what_no_ridge_of_that_size_lifts():
    with pytest.raises(DecompositionError, match=r"2 squared, .* indefinite with a share of 0\.1"):
        solve_ridged(torch.ones(1, 2), torch.diag(torch.tensor([3.0, -1.0])), 0.1)


def test_of_nothing_nothing_follows():
    zeros = torch.zeros(3, 3)
    assert_close(solve_ridged(torch.ones(2, 3), zeros, 0.1), torch.zeros(2, 3), rtol=0.0, atol=0.0)
