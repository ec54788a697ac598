"""SVD with its fallbacks, and the randomized range finder against the best possible error."""

import math

import pytest
import torch
from torch.testing import assert_close

from mpocompress.errors import DecompositionError
from mpocompress.mpo import linalg
from tests.planted import gaussian, orthonormal, seeded, with_spectrum
from tests.tolerances import HONESTY, NEAR_OPTIMUM, RITZ, TOL

DTYPES = [torch.float32, torch.float64]


def rebuild(left, values, right):
    return (left.double() * values.double()) @ right.double()


def gram_defect(columns):
    gram = columns.double().T @ columns.double()
    return gram, torch.eye(gram.shape[0], dtype=torch.float64)


# -- QR and SVD


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5), (1, 7), (7, 1)])
def test_qr_is_orthonormal_with_a_non_negative_diagonal(shape, dtype):
    matrix = gaussian(*shape, dtype=dtype)
    q, r = linalg.qr(matrix)
    assert q.dtype == r.dtype == dtype
    assert bool((r.diagonal() >= 0).all())
    assert_close(*gram_defect(q), **TOL[dtype]["gauge"])
    assert_close(q @ r, matrix, **TOL[dtype]["dense"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5), (1, 7), (7, 1), (64, 48)])
def test_svd_is_reduced_descending_and_has_fixed_signs(shape, dtype):
    matrix = gaussian(*shape, dtype=dtype)
    left, values, right = linalg.svd(matrix)
    assert left.dtype == values.dtype == right.dtype == dtype
    assert len(values) == min(shape)
    assert bool((values.diff() <= 0).all())
    assert_close(rebuild(left, values, right), matrix.double(), **TOL[dtype]["dense"])
    pivots = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    assert bool((pivots > 0).all())


def test_negating_a_matrix_moves_the_sign_to_the_right_vectors():
    matrix = gaussian(6, 5)
    left, values, right = linalg.svd(matrix)
    other_left, other_values, other_right = linalg.svd(-matrix)
    assert_close(other_left, left, **TOL[torch.float64]["dense"])
    assert_close(other_values, values, **TOL[torch.float64]["spectrum"])
    assert_close(other_right, -right, **TOL[torch.float64]["dense"])


class FailingDriver:
    """torch.linalg.svd that does not converge the first few times."""

    def __init__(self, failures, result=None):
        self.left, self.real, self.result, self.calls = failures, torch.linalg.svd, result, 0

    def __call__(self, matrix, *args, **kwargs):
        self.calls += 1
        if self.left > 0:
            self.left -= 1
            if self.result is not None:
                return self.result(matrix)
            raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")
        return self.real(matrix, *args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_driver_that_fails_once_is_followed_by_another(monkeypatch, shape, dtype):
    matrix = gaussian(*shape, dtype=dtype)
    driver = FailingDriver(1)
    monkeypatch.setattr(torch.linalg, "svd", driver)
    left, values, right = linalg.svd(matrix)
    assert driver.calls == 2
    assert left.dtype == values.dtype == right.dtype == dtype
    assert_close(rebuild(left, values, right), matrix.double(), **TOL[dtype]["dense"])
    assert_close(*gram_defect(left), **TOL[dtype]["gauge"])


def test_values_that_are_not_finite_count_as_a_failure(monkeypatch):
    def poisoned(matrix):
        size = min(matrix.shape)
        return (
            matrix.new_zeros(matrix.shape[0], size),
            matrix.new_full((size,), math.nan),
            matrix.new_zeros(size, matrix.shape[1]),
        )

    monkeypatch.setattr(torch.linalg, "svd", FailingDriver(1, poisoned))
    matrix = gaussian(8, 6)
    assert_close(rebuild(*linalg.svd(matrix)), matrix, **TOL[torch.float64]["dense"])


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_svd_after_qr_is_an_svd(shape):
    matrix = gaussian(*shape)
    left, values, right = linalg._svd_after_qr(matrix)
    assert_close(rebuild(left, values, right), matrix, **TOL[torch.float64]["dense"])
    assert_close(values, torch.linalg.svdvals(matrix), **TOL[torch.float64]["spectrum"])


def test_no_driver_converges(monkeypatch):
    driver = FailingDriver(10**6)
    monkeypatch.setattr(torch.linalg, "svd", driver)
    with pytest.raises(
        DecompositionError, match=r"no SVD driver converged.*\(8, 6\).*float32.*largest float"
    ):
        linalg.svd(gaussian(8, 6, dtype=torch.float32))
    assert driver.calls >= 2


def test_nan_reaching_a_driver_is_our_error():
    with pytest.raises(DecompositionError, match="no SVD driver converged"):
        linalg.svd(torch.full((3, 3), math.nan))


def test_singular_values_fall_back_to_the_svd(monkeypatch):
    matrix = gaussian(9, 7)
    expected = torch.linalg.svdvals(matrix)

    def fails(_matrix):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "svdvals", fails)
    assert_close(linalg.svd_values(matrix), expected, **TOL[torch.float64]["spectrum"])


def test_working_dtype():
    wide = {dtype: linalg.working_dtype(dtype) for dtype in (torch.float16, torch.bfloat16)}
    assert set(wide.values()) == {torch.float32}
    assert [linalg.working_dtype(dtype) for dtype in DTYPES] == DTYPES


def test_weight_is_accumulated_in_float64():
    tensor = torch.full((2100, 2100), 1e-3)
    expected = 2100**2 * float(tensor[0, 0]) ** 2
    exact = TOL[torch.float64]["norm"]
    assert_close(linalg.weight_of(tensor), expected, **exact)
    assert_close(linalg.weight_of(tensor.T[::2]), expected / 2, **exact)
    assert linalg.weight_of(torch.full((4,), 1e30)) == pytest.approx(4e60)


# -- the range finder

COUNT = 800
INDEX = torch.arange(COUNT, dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones(COUNT),
    "noise": torch.linspace(2, 0.1, COUNT),
    "polynomial": 1 / (1 + INDEX),
    "slow polynomial": (1 + INDEX) ** -0.5,
    "exponential": 0.9**INDEX,
    "repeated": 10.0 ** -(INDEX // 24),
    "plateau": torch.where(INDEX < 8, 1.0, 1e-3 * (1 + INDEX) ** -0.3),
}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1024, COUNT), torch.float32),
        ((COUNT, 1024), torch.float32),
        ((1024, COUNT), torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", SPECTRA)
def test_range_finder_is_near_the_optimum_and_honest(name, shape, dtype):
    spectrum, rank = SPECTRA[name].double(), 32
    matrix = with_spectrum(spectrum, *shape, dtype=dtype)
    found = linalg.leading_svd(matrix, rank)
    assert rank <= len(found.values_R) < COUNT  # the randomized path was taken
    assert_close(*gram_defect(found.left_MR), **TOL[dtype]["gauge"])
    assert_close(*gram_defect(found.right_RN.T), **TOL[dtype]["gauge"])

    kept = rebuild(found.left_MR[:, :rank], found.values_R[:rank], found.right_RN[:rank])
    error = float((matrix.double() - kept).norm())
    best = float(spectrum[rank:].norm())
    assert error <= NEAR_OPTIMUM * best
    assert_close(found.values_R[: rank // 4].double(), spectrum[: rank // 4], **RITZ)

    weight = float(spectrum.square().sum())
    assert_close(found.total_weight, weight, **TOL[torch.float32]["norm"])
    everything = rebuild(found.left_MR, found.values_R, found.right_RN)
    missing = float((matrix.double() - everything).square().sum())
    assert_close(found.residual_weight, missing, **HONESTY)
    # What a cut after `rank` values is said to lose is what it loses.
    said = found.total_weight - float(found.values_R[:rank].double().square().sum())
    assert_close(said, error**2, **HONESTY)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1024, COUNT), (COUNT, 1024)], ids=str)
def test_rank_deficient_matrix_is_found_exactly(shape, dtype):
    spectrum = torch.linspace(3, 1, 20)
    matrix = with_spectrum(spectrum, *shape, dtype=dtype)
    found = linalg.leading_svd(matrix, 32)
    assert_close(found.values_R[:20].double(), spectrum.double(), **TOL[dtype]["spectrum"])
    noise = linalg.rank_tolerance(shape, dtype) * 3
    assert float(found.values_R[20:].max()) <= noise
    assert found.residual_weight <= noise**2
    assert_close(
        rebuild(found.left_MR, found.values_R, found.right_RN),
        matrix.double(),
        **TOL[dtype]["dense"],
    )


@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_scale_does_not_matter(scale):
    spectrum = SPECTRA["polynomial"]
    matrix = with_spectrum(spectrum * scale, 1024, COUNT, dtype=torch.float32)
    found = linalg.leading_svd(matrix, 32)
    assert len(found.values_R) < COUNT
    kept = rebuild(found.left_MR[:, :32], found.values_R[:32], found.right_RN[:32])
    error = float((matrix.double() - kept).norm())
    assert error <= NEAR_OPTIMUM * float(spectrum[32:].norm()) * scale
    weight = float(spectrum.square().sum()) * scale**2
    assert_close(found.total_weight, weight, **TOL[torch.float32]["norm"])


def test_products_that_overflow_are_our_error():
    with pytest.raises(DecompositionError, match="entries near the largest float"):
        linalg.leading_svd(gaussian(800, 780, dtype=torch.float32) * 1e37, 8)


@pytest.mark.parametrize(
    ("shape", "rank", "randomized"),
    [
        ((767, 2000), 8, False),  # the smaller side decides
        ((768, 800), 8, True),
        ((768, 800), 115, True),
        ((768, 800), 116, False),  # more than 15 %
        ((768, 800), None, False),
    ],
)
def test_range_finder_is_for_large_matrices_and_small_ranks(monkeypatch, shape, rank, randomized):
    taken = []

    def recorded(matrix, wanted, generator, total):
        taken.append(wanted)
        return linalg.LeadingSVD(matrix[:, :1], matrix[0, :1], matrix[:1], 1.0, 0.0)

    monkeypatch.setattr(linalg, "_randomized_svd", recorded)
    monkeypatch.setattr(linalg, "svd", lambda m: (m[:, :1], m[0, :1], m[:1]))
    linalg.leading_svd(torch.zeros(shape), rank)
    assert taken == ([rank] if randomized else [])


@pytest.mark.parametrize("shape", [(800, 780), (780, 800)])
def test_no_convergence_falls_back_to_what_is_exact(monkeypatch, shape):
    monkeypatch.setattr(linalg, "_CONVERGED", -1.0)
    matrix = gaussian(*shape, dtype=torch.float32)
    found = linalg.leading_svd(matrix, 16)
    values = torch.linalg.svdvals(matrix)
    assert_close(found.values_R, values[:16], **TOL[torch.float32]["spectrum"])
    lost = float(values[16:].double().square().sum())
    assert_close(found.residual_weight, lost, **HONESTY)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(200, 500), (500, 200), (200, 200)])
@pytest.mark.parametrize("decay", [0.0, -1.0])
@pytest.mark.parametrize("rank", [1, 60, 100])
def test_vectors_from_a_gram_matrix_are_as_exact_as_those_of_an_svd(shape, decay, rank, dtype):
    spectrum = (1 + torch.arange(200, dtype=torch.float64)) ** decay
    matrix = with_spectrum(spectrum, *shape, dtype=dtype)
    found = linalg.leading_svd(matrix, rank)
    assert len(found.values_R) == rank
    assert_close(found.values_R.double(), spectrum[:rank], **TOL[dtype]["spectrum"])
    assert_close(*gram_defect(found.left_MR), **TOL[dtype]["gauge"])
    assert_close(*gram_defect(found.right_RN.mT), **TOL[dtype]["gauge"])
    best = float(spectrum[rank:].square().sum())
    rest = matrix.double() - rebuild(found.left_MR, found.values_R, found.right_RN)
    assert_close(float(rest.square().sum()), best, **HONESTY)
    assert_close(found.residual_weight, best, **HONESTY)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_below_what_a_gram_matrix_resolves_is_found_by_a_full_svd(dtype):
    spectrum = torch.cat([torch.ones(20), 1e-5 * torch.ones(20), torch.zeros(160)]).double()
    found = linalg.leading_svd(with_spectrum(spectrum, 200, 300, dtype=dtype), 60)
    assert_close(found.values_R.double(), spectrum, **TOL[dtype]["spectrum"])
    assert float(found.values_R[60]) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(150, 400), (400, 150)])
def test_values_of_large_matrices_are_those_of_an_svd(shape, dtype):
    spectrum = (1 + torch.arange(150, dtype=torch.float64)) ** -2.0
    matrix = with_spectrum(spectrum, *shape, dtype=dtype)
    values = linalg.svd_values(matrix)
    assert values.dtype == dtype
    assert_close(values.double(), spectrum, **TOL[dtype]["spectrum"])
    weights = linalg.value_weights(matrix)
    assert weights.dtype == torch.float64
    assert_close(weights, spectrum.square(), **TOL[dtype]["spectrum"])
    assert bool((weights >= 0).all())


def test_few_vectors_of_a_matrix_that_is_trained_have_gradients_and_no_warning(recwarn):
    matrix = gaussian(160, 200, dtype=torch.float64).requires_grad_()
    found = linalg.leading_svd(matrix, 40)
    found.values_R.square().sum().backward()
    assert not recwarn.list
    projected = found.left_MR.detach() @ (found.left_MR.detach().mT @ matrix.detach())
    assert_close(matrix.grad, 2 * projected, **TOL[torch.float64]["gradient"])


def test_values_whose_squares_overflow_are_found():
    matrix = 1e200 * with_spectrum(torch.ones(150).double(), 150, 150, dtype=torch.float64)
    found = linalg.leading_svd(matrix, 40)
    assert_close(found.values_R[:40] / 1e200, torch.ones(40).double(), rtol=1e-12, atol=0.0)


def test_singular_values_inside_the_range_finder_have_a_fallback(monkeypatch):
    def fails(_matrix):
        raise torch.linalg.LinAlgError("no convergence")

    matrix = with_spectrum(SPECTRA["polynomial"], 1024, COUNT, dtype=torch.float32)
    monkeypatch.setattr(torch.linalg, "svdvals", fails)
    found = linalg.leading_svd(matrix, 32)
    assert_close(
        found.values_R[:8].double(), SPECTRA["polynomial"][:8], **TOL[torch.float32]["spectrum"]
    )


def test_equal_matrices_give_equal_factors_whatever_the_global_seed():
    matrix = gaussian(800, 780, dtype=torch.float32)
    torch.manual_seed(1)
    first = linalg.leading_svd(matrix, 16)
    torch.manual_seed(2)
    second = linalg.leading_svd(matrix.clone(), 16)
    assert torch.equal(first.left_MR, second.left_MR)
    assert torch.equal(first.right_RN, second.right_RN)
    other = linalg.leading_svd(matrix, 16, seeded(5))
    assert not torch.equal(first.left_MR, other.left_MR)


@pytest.mark.parametrize("shape", [(60, 40), (1024, COUNT), (COUNT, 1024)])
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_leading_weight(shape, rank):
    spectrum = (1 + torch.arange(min(shape), dtype=torch.float64)) ** -1.0
    matrix = with_spectrum(spectrum, *shape, dtype=torch.float32)
    leading, total = linalg.leading_weight(matrix, rank)
    weights = spectrum.square()
    assert_close(total, float(weights.sum()), **TOL[torch.float32]["norm"])
    lost, best = total - leading, float(weights[rank:].sum())
    slack = total * TOL[torch.float32]["weight"]["atol"] * 10
    assert best - slack <= lost <= best * NEAR_OPTIMUM**2 + slack


def test_leading_weight_of_a_matrix_that_is_not_finite():
    with pytest.raises(DecompositionError, match="1 of 4 entries are NaN or Inf"):
        linalg.leading_weight(torch.tensor([[1.0, math.inf], [0.0, 1.0]]), 1)


def test_orthonormal_matrix_has_no_preferred_direction():
    """All singular values are equal: any 32 of them are the best."""
    matrix = orthonormal(900, COUNT, seed=3).float()
    found = linalg.leading_svd(matrix, 32)
    assert_close(found.values_R, torch.ones_like(found.values_R), **TOL[torch.float32]["spectrum"])
    missing = float(COUNT - len(found.values_R))
    assert_close(found.residual_weight, missing, **HONESTY)
