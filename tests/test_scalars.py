"""Numbers of users: what counts as one, and that everything takes NumPy's and torch's."""

from decimal import Decimal
from fractions import Fraction
from math import isnan

import numpy as np
import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.errors import BondDimError, DataError, LayoutError, PlanError
from mpocompress.report import CompressionReport
from mpocompress.scalars import as_count, as_integer, as_number, as_seed

BOOLEANS = [True, np.True_, np.array(True), torch.tensor(True)]
NO_NUMBERS = [*BOOLEANS, "4", None, [4], np.array([4]), np.array([4, 5]), 4j]
WHOLE = [4, np.int64(4), np.uint8(4), np.array(4), torch.tensor(4)]
N, F = np.int64, np.float32


@pytest.mark.parametrize("value", [0, -1, 1.0, F(2), *NO_NUMBERS], ids=repr)
def test_a_count_is_an_integer_that_is_large_enough(value):
    with pytest.raises(LayoutError) as caught:
        as_count("sites", value, 1, LayoutError)
    assert str(caught.value) == f"sites {value!r}: it is an integer, 1 or more."


@pytest.mark.parametrize("value", [*WHOLE, 0, 10**30], ids=repr)
def test_counts_are_plain(value):
    assert type(as_count("sweeps", value, 0, DataError)) is int
    assert as_count("sweeps", value, 0, DataError) == value


@pytest.mark.parametrize("value", [*WHOLE, F(4), torch.tensor(4.0), Decimal(4), Fraction(4)])
def test_numbers_are_plain(value):
    assert type(as_number(value)) is float
    assert as_number(value) == 4.0


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_none_or_nan(value):
    assert isnan(as_number(value))
    assert as_integer(value) is None


def test_an_integer_beyond_floats_is_no_number():
    assert isnan(as_number(10**400))


def test_seeds_are_those_of_torch():
    for seed in (-(2**63), -1, 0, N(7), 2**64 - 1):
        assert as_seed(seed) == seed
        torch.Generator().manual_seed(as_seed(seed))
    for seed in (2**64, -(2**63) - 1, 1.0, True, "0"):
        with pytest.raises(DataError, match=r"seed .*: it is an integer of 64 bits"):
            as_seed(seed)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 5)
    )


def batches():
    torch.manual_seed(1)
    return [{"input": torch.randn(40, 64), "labels": torch.arange(40) % 5} for _ in range(5)]


@pytest.mark.parametrize(
    ("options", "typed"),
    [
        ({"bond_dim": 4}, {"bond_dim": N(4)}),
        ({"bond_dim": 4}, {"bond_dim": torch.tensor(4)}),
        ({"bond_dim": 4, "sites": 3, "batch": 2}, {"bond_dim": 4, "sites": N(3), "batch": N(2)}),
        ({"ratio": 2.0}, {"ratio": F(2)}),
        ({"ratio": 2}, {"ratio": N(2)}),
        ({"ratio": 2.5}, {"ratio": Fraction(5, 2)}),
        ({"max_error": 0.5}, {"max_error": F(0.5)}),
        (
            {"bond_dim": 4, "data": batches(), "distill": 3, "sweeps": 2, "seed": 1},
            {"bond_dim": N(4), "data": batches(), "distill": N(3), "sweeps": N(2), "seed": N(1)},
        ),
    ],
    ids=lambda options: " ".join(f"{k}={v!r}" for k, v in options.items() if k != "data"),
)
def test_compress_takes_scalars_of_numpy_and_torch(options, typed):
    plain, found = mpo.compress(network(), **options), mpo.compress(network(), **typed)
    text = found.report.to_json()
    assert CompressionReport.from_json(text).settings == plain.report.settings
    assert mpo.Plan.from_json(found.plan.to_json()) == plain.plan
    x = batches()[0]["input"]
    assert torch.equal(found.model(x), plain.model(x))


def test_other_budgets_and_steps_take_them_too(tmp_path):
    plan = mpo.plan(
        network(), max_drop=F(0.5), data=batches(), seed=N(2), sweeps=N(2), distill=N(1)
    )
    assert mpo.Plan.from_json(plan.to_json()) == plan
    plan = mpo.plan(network(), max_size=F(30000), data=batches())
    assert mpo.Plan.from_json(plan.to_json()) == plan
    model, data = network(), [batch["input"] for batch in batches()]
    result = mpo.compress(model, bond_dim=4, data=data)
    mpo.distill(
        result,
        reference=model,
        data=data,
        steps=N(3),
        blockwise_steps=N(0),
        hidden_weight=F(1),
        learning_rate=F(1e-3),
        batch_size=N(8),
        accumulate=N(2),
        held_out=F(0.25),
        evaluate_every=N(2),
        patience=N(3),
        seed=N(1),
        checkpoint=tmp_path / "healing",
    )
    mpo.sweep(
        result,
        reference=model,
        data=data,
        sweeps=N(1),
        sites=N(2),
        local_steps=N(1),
        learning_rate=F(1e-3),
        bond_dim=N(4),
        cutoff=F(0),
        eval_batches=N(2),
        seed=N(1),
        state=tmp_path / "sweeps",
    )
    assert CompressionReport.from_json(result.report.to_json()) == result.report
    path = mpo.export_onnx(result.model, tmp_path / "model.onnx", data[0]).path
    assert mpo.verify(path, result.model, batch_sizes=[N(1), N(3)], tolerance=F(1e-4), seed=N(3))
    fresh = mpo.tensorize(network(), bond_dim=N(2), sites=N(2), gain=F(1))
    mpo.train(
        fresh,
        (torch.randn(64, 64), torch.arange(64) % 5),
        epochs=N(1),
        batch_size=N(32),
        learning_rate=F(0.05),
        sites=N(2),
        local_steps=N(2),
        bond_dim=N(3),
        validation=F(0.25),
        patience=N(4),
        seed=N(5),
        checkpoint=tmp_path / "training",
    )


@pytest.mark.parametrize("value", BOOLEANS, ids=repr)
@pytest.mark.parametrize(
    ("option", "error"),
    [
        ("bond_dim", BondDimError),
        ("ratio", PlanError),
        ("max_size", PlanError),
        ("max_error", PlanError),
        ("max_drop", PlanError),
        ("sites", LayoutError),
        ("batch", PlanError),
        ("sweeps", DataError),
        ("distill", DataError),
        ("seed", DataError),
    ],
)
def test_booleans_are_refused_by_name_and_value(option, error, value):
    name = "size" if option == "max_size" else option
    targets = {"bond_dim", "ratio", "max_size", "max_error", "max_drop"}
    target = {} if option in targets else {"bond_dim": 4}
    for call in (mpo.plan, mpo.compress):
        with pytest.raises(error) as caught:
            call(network(), **target, **{option: value})
        assert f"{name} {value!r}" in str(caught.value)


@pytest.mark.parametrize("value", ["4", [2], np.array([2, 3]), float("nan")], ids=repr)
@pytest.mark.parametrize("option", ["ratio", "max_error", "max_drop"])
def test_what_is_no_number_is_refused_by_name_and_value(option, value):
    with pytest.raises(PlanError) as caught:
        mpo.plan(network(), **{option: value})
    assert f"{option} {value!r}" in str(caught.value)
