"""The metric of a fit: distances, factors of singular moments, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mpocompress.errors import ContractionError, DecompositionError
from mpocompress.mpo.metric import Metric, factorize_metric
from tests.fit_problems import moment, moments, objective
from tests.planted import LAWS, gaussian
from tests.tolerances import TOL

F64 = TOL[torch.float64]


def test_distance_is_the_definition():
    target, matrix = gaussian(5, 7, seed=1), gaussian(5, 7, seed=2)
    c, g = moment(7, seed=3), moment(5, seed=4)
    for output in (None, g):
        metric = Metric(c, output, ridge=0.0, output_ridge=0.0)
        expected = objective(target, matrix, c, output)
        assert_close(metric.distance(target, matrix) ** 2, expected, **F64["dense"])
        relative = metric.relative_error(target, matrix)
        norm = objective(target, torch.zeros_like(target), c, output)
        assert_close(relative**2, expected / norm, **F64["dense"])


def test_distance_is_the_mean_output_error():
    x = gaussian(50, 7, seed=0)
    target, matrix = gaussian(5, 7, seed=1), gaussian(5, 7, seed=2)
    metric = Metric(x.T @ x / 50, moment(5, seed=3), ridge=0.1)
    lost, kept = x @ (target - matrix).T, x @ target.T
    assert_close(
        metric.relative_output_error(target, matrix),
        float(lost.norm() / kept.norm()),
        **F64["dense"],
    )


def test_ridge_is_a_share_of_the_diagonal_or_of_its_median():
    c, g = moment(6, seed=0), moment(4, seed=1)
    metric = Metric(c, g, ridge=1e-3, output_ridge=1e-1)
    for ridged, matrix, share in (
        (metric.ridged_input_II, c, 1e-3),
        (metric.ridged_output_OO, g, 1e-1),
    ):
        diagonal = matrix.diagonal()
        assert_close(ridged, matrix + share * diagonal.clamp_min(diagonal.median()).diag())
    assert_close(metric.input_II, c, rtol=0, atol=0)


def test_inputs_that_the_data_hardly_show_have_a_ridge_of_their_own():
    c = torch.diag(torch.tensor([0.0, 1e-9, 2.0, 400.0, 8.0]).double())  # median of four: 2
    for ridge, floor in ((1e-4, 1e-4), (0.1, 1e-3)):
        added = Metric(c, ridge=ridge).ridged_input_II.diagonal() - c.diagonal()
        expected = ridge * c.diagonal() + floor * torch.tensor([2.0, 2.0, 0.0, 0.0, 0.0]).double()
        assert_close(added, expected, rtol=1e-6, atol=1e-9)


def test_one_input_in_fine_units_changes_nothing_for_the_others():
    c = moment(7, seed=3)
    units = torch.ones(7, dtype=torch.float64)
    units[int(c.diagonal().argmax())] = 1e4
    plain, fine = Metric(c), Metric(units[:, None] * c * units)
    target, matrix = gaussian(5, 7, seed=1), gaussian(5, 7, seed=2)
    assert_close(fine.distance(target / units, matrix / units), plain.distance(target, matrix))


def test_identity_metric_is_the_frobenius_norm():
    target, matrix = gaussian(5, 7, seed=1), gaussian(5, 7, seed=2)
    distance = Metric.identity(7).distance(target, matrix)
    assert_close(distance, float((target - matrix).norm()), **F64["dense"])


def test_zero_target_has_no_error_of_its_own():
    metric = Metric.identity(3)
    assert metric.relative_error(torch.zeros(2, 3), torch.zeros(2, 3)) == 0.0
    assert metric.relative_error(torch.zeros(2, 3), torch.ones(2, 3)) == float("inf")


@LAWS
@given(st.data(), st.integers(min_value=1, max_value=12))
def test_factor_rebuilds_the_moment_and_solves(data, size):
    c = data.draw(moments(size))
    factor = factorize_metric(c, "C")
    f = factor.factor_NR
    assert_close(f @ f.T, c, **F64["dense"])
    assert factor.rank == f.shape[1] <= size
    rows = gaussian(3, factor.rank, seed=0)
    solved = factor.solve(rows)
    # F has full column rank, so every right-hand side has a solution: the one in the span of C.
    scale = float(f.norm() * solved.norm())
    assert float((factor.apply(solved) - rows).abs().max()) <= scale * F64["dense"]["atol"]


def test_singular_moment_has_a_factor_of_its_rank():
    assert factorize_metric(moment(9, seed=0, samples=4), "C").rank == 4
    assert factorize_metric(moment(9, seed=0, dead=2), "C").rank == 7
    assert factorize_metric(moment(9, seed=0), "C").inverse_RN is None


def test_units_of_a_feature_do_not_decide_what_is_noise():
    units = torch.ones(9, dtype=torch.float64)
    units[2] = 1e9  # a raw timestamp beside numbers around 1
    c = moment(9, seed=0)
    scaled = factorize_metric(c * units * units[:, None], "C")
    assert_close(scaled.factor_NR, units[:, None] * factorize_metric(c, "C").factor_NR)
    few = moment(9, seed=0, samples=4) * units * units[:, None]
    assert factorize_metric(few, "C").rank == 4


def test_rounding_of_float32_accumulation_is_no_negative_eigenvalue():
    x = gaussian(20, 60, seed=0, dtype=torch.float32)
    factor = Metric((x.T @ x), ridge=0.0).to(dtype=torch.float64).input_factor
    assert 20 <= factor.rank < 60


def test_dtype_follows_the_moments():
    c = moment(4, seed=0)
    assert Metric(c).dtype == torch.float64
    assert Metric(c.float(), moment(3, seed=1)).ridged_output_OO.dtype == torch.float32
    assert Metric(c.bfloat16()).dtype == torch.float32
    metric = Metric(c, moment(3, seed=1), ridge=0.5)
    moved = metric.to(dtype=torch.float32)
    assert (moved.dtype, moved.output_OO.dtype, moved.ridge) == (torch.float32, torch.float32, 0.5)
    assert metric.to(dtype=torch.float64) is metric


def test_factors_are_made_once():
    metric = Metric(moment(4, seed=0), moment(3, seed=1))
    assert metric.input_factor is metric.input_factor
    assert metric.output_factor is metric.output_factor
    assert Metric(moment(4, seed=0)).output_factor is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_II": torch.ones(2, 3)}, ContractionError, r"shape \(2, 3\); it is a square"),
        ({"input_II": torch.ones(0, 0)}, ContractionError, "square matrix"),
        ({"input_II": torch.eye(2).long()}, DecompositionError, r"int64 cannot be decomposed"),
        (
            {"input_II": torch.tensor([[1.0, 0.5], [0.2, 1.0]])},
            DecompositionError,
            r"input second moment is not symmetric: .* differ by 0.3",
        ),
        (
            {"input_II": torch.tensor([[1.0, 0.0], [0.0, float("nan")]])},
            DecompositionError,
            r"1 of 4 entries are NaN",
        ),
        (
            {"input_II": torch.diag(torch.tensor([1.0, -2.0]))},
            DecompositionError,
            r"diagonal from -2 to 1",
        ),
        ({"input_II": torch.zeros(2, 2)}, DecompositionError, "data reached this layer"),
        (
            {"input_II": torch.eye(2), "output_OO": torch.ones(2)},
            ContractionError,
            r"output metric has shape \(2,\)",
        ),
        ({"input_II": torch.eye(2), "ridge": -1.0}, DecompositionError, r"ridge -1.0: .* Try 1e-3"),
        (
            {"input_II": torch.eye(2), "output_ridge": float("inf")},
            DecompositionError,
            "output_ridge inf",
        ),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Metric(**arguments)


def test_refuses_negative_eigenvalues():
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    with pytest.raises(DecompositionError, match=r"input second moment has eigenvalues from -0.99"):
        _ = Metric(indefinite).input_factor
    with pytest.raises(DecompositionError, match=r"output metric has eigenvalues from -0.99"):
        _ = Metric(torch.eye(3), indefinite).output_factor


def test_refuses_a_matrix_of_another_shape():
    metric = Metric(torch.eye(3), torch.eye(2))
    with pytest.raises(ContractionError, match=r"\(3, 2\) does not fit a metric of 3 inputs and 2"):
        metric.distance(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ContractionError, match=r"\(4, 3\) .* transpose it"):
        metric.norm(torch.ones(4, 3))
