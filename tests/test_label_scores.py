"""Accuracy and R²: one definition for budgets, training and verification, wherever labels lie."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mpocompress.errors import DataError
from mpocompress.export.agreement import LabelScore
from mpocompress.tuning import Accuracy, RSquared, Supervised, task_score
from mpocompress.tuning.minibatches import Minibatch
from tests.planted import gaussian


def batches(output, labels, rows):
    """Of a model that gives back what it gets."""
    pairs = zip(output.split(rows), labels.split(rows), strict=True)
    return [Minibatch((x,), {}, y) for x, y in pairs]


def by_budget(calls):
    return task_score(nn.Identity(), calls).value


def by_training(calls):
    kind = "mse" if calls[0].labels.is_floating_point() else "cross_entropy"
    return Supervised(kind).evaluate(nn.Identity(), calls)[1]


def by_verification(calls):
    score = LabelScore()
    for call in calls:
        score.add({"output": call.args[0].numpy()}, call.labels.numpy())
    return score.value()


CALLERS = [by_budget, by_training, by_verification]


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("offset", [0.0, 1e8, -1e12])
@pytest.mark.parametrize("score", CALLERS)
def test_r_squared_does_not_cancel_far_from_zero(score, offset, rows):
    # Labels that have no rounding at any of the offsets: R² is then the same at all of them.
    labels = (gaussian(1000) * 64).round() / 64
    output = labels + 0.125 * gaussian(1000, seed=1).sign()
    expected = 1 - 0.125**2 / float(labels.var(correction=0))
    assert 0.98 < expected < 0.99
    found = score(batches(offset + output, offset + labels, rows))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("score", CALLERS)
def test_batches_of_different_means_count_as_one(score):
    labels = torch.cat([gaussian(10), 1e6 + gaussian(30, seed=1), torch.full((5,), -1e6)]).double()
    output = labels + 1e5
    expected = 1 - 1e10 / float(labels.var(correction=0))
    for rows in (1, 10, 45):
        assert score(batches(output, labels, rows)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("score", CALLERS)
def test_classes_below_zero_are_left_out(score):
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, -1, -100])
    for rows in (1, 2, 5):
        assert score(batches(logits, labels, rows)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("label", [0.1, 1 / 3, 1e8 + 0.1])
def test_labels_without_spread_have_no_r_squared(label):
    labels = torch.full((50,), label, dtype=torch.float64)
    calls = batches(labels + 0.5, labels, 7)
    with pytest.raises(DataError, match=r"the 50 labels .* all equal.*R² is not defined.*eval_fn"):
        by_budget(calls)
    loss, score = Supervised("mse").evaluate(nn.Identity(), calls)
    assert loss == pytest.approx(0.25)
    assert math.isnan(score)
    assert by_verification(calls) is None


def test_labels_that_are_no_numbers_have_no_drop():
    labels = torch.tensor([1.0, float("nan"), 2.0])
    with pytest.raises(DataError, match="labels with NaN or Inf"):
        by_budget(batches(labels, labels, 3))


def test_nothing_judged_is_nan():
    assert math.isnan(Accuracy().value)
    assert math.isnan(RSquared().value)
    assert math.isnan(RSquared().mean_squared_error)
    left_out = batches(torch.eye(3), torch.full((3,), -1), 3)
    assert all(map(math.isnan, Supervised("cross_entropy").evaluate(nn.Identity(), left_out)))


def test_targets_in_whole_numbers_have_an_r_squared_in_training():
    labels = torch.tensor([1, 2, 3, 4])
    score = Supervised("mse").evaluate(nn.Identity(), batches(labels + 0.5, labels, 2))
    assert score == pytest.approx((0.25, 1 - 0.25 / 1.25))


def test_labels_of_two_kinds_have_no_score():
    score = LabelScore()
    outputs = {"logits": np.eye(4, 3, dtype="f")}
    score.add(outputs, np.array([0, 1, 2, -1]))
    with pytest.raises(DataError, match="others floating ones"):
        score.add(outputs, np.zeros((4, 3), "f"))
