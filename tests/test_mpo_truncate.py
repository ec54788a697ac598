"""What is kept of a spectrum, on planted spectra, one constraint at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mpocompress.errors import BondDimError, DecompositionError
from mpocompress.mpo import Cut, Truncation, choose_bond_dim
from mpocompress.mpo.truncate import check_bond_dim, error_bound
from tests.planted import LAWS
from tests.tolerances import TOL

TINY = torch.finfo(torch.float64).eps
WEIGHT = TOL[torch.float64]["weight"]

# Squares 1, 1e-2, ..., 1e-28: what is lost by keeping d values is about 1.0101 * 10^(-2 d).
DECADES = 10.0 ** -torch.arange(15, dtype=torch.float64)
DEGENERATE = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0], dtype=torch.float64)


def choose(spectrum, tolerance=TINY, total=None, **limits):
    return choose_bond_dim(
        spectrum, Truncation(**limits), rank_tolerance=tolerance, total_weight=total
    )


def test_without_limits_everything_is_kept():
    cut = choose(DECADES)
    assert cut == Cut(
        bond_dim=15, discarded_weight=0.0, total_weight=cut.total_weight, clipped=False
    )
    assert_close(cut.total_weight, float((DECADES**2).sum()))
    assert cut.truncation_error == 0.0


@pytest.mark.parametrize("bond_dim", [1, 2, 14, 15])
def test_bond_dim_alone(bond_dim):
    cut = choose(DECADES, bond_dim=bond_dim)
    assert cut.bond_dim == bond_dim
    assert not cut.clipped
    assert cut.discarded_weight == pytest.approx(float((DECADES[bond_dim:] ** 2).sum()))
    assert cut.truncation_error == pytest.approx(cut.discarded_weight / cut.total_weight)


def test_larger_bond_dim_than_values_is_reported_as_clipped():
    assert choose(DECADES, bond_dim=16) == Cut(
        bond_dim=15, discarded_weight=0.0, total_weight=float((DECADES**2).sum()), clipped=True
    )


@pytest.mark.parametrize("kept", range(1, 8))
def test_cutoff_alone_keeps_as_few_as_it_allows(kept):
    weights = DECADES**2
    exact = float(weights[kept:].sum() / weights.sum())
    assert choose(DECADES, cutoff=exact * (1 + 1e-6)).bond_dim == kept
    assert choose(DECADES, cutoff=exact * (1 - 1e-6)).bond_dim == kept + 1


def test_cutoff_is_inclusive_and_relative():
    spectrum = torch.tensor([3.0, 1.0, 1.0, 1.0, 2.0**-1, 2.0**-1], dtype=torch.float64)
    spectrum = spectrum.sort(descending=True).values
    # Weights 9, 1, 1, 1, 1/4, 1/4 add up to 12.5: dropping the last two loses exactly 1/25.
    for scale in (1.0, 2.0**40, 2.0**-40):
        assert choose(scale * spectrum, cutoff=0.04).bond_dim == 4
        assert choose(scale * spectrum, cutoff=0.0399).bond_dim == 5


def test_rank_tolerance_alone_drops_what_is_zero_up_to_rounding():
    cut = choose(DECADES, tolerance=1e-6)
    assert cut.bond_dim == 6  # 1e-6 itself counts as zero
    assert cut.discarded_weight == pytest.approx(1.0101e-12, rel=1e-4)
    assert choose(DECADES, tolerance=1e-6, bond_dim=7).clipped
    assert not choose(DECADES, tolerance=1e-6, bond_dim=6).clipped
    # A cutoff below the rounding noise cannot bring the noise back.
    assert choose(DECADES, tolerance=1e-6, cutoff=1e-20).bond_dim == 6


def test_tightest_limit_wins():
    assert choose(DECADES, bond_dim=3, cutoff=1e-8).bond_dim == 3
    assert choose(DECADES, bond_dim=9, cutoff=1e-3).bond_dim == 2
    assert choose(DECADES, bond_dim=9, cutoff=1e-20, tolerance=1e-4).bond_dim == 4


def test_degenerate_values_are_cut_where_the_limit_says():
    assert choose(DEGENERATE).bond_dim == 6
    assert choose(DEGENERATE, bond_dim=3).discarded_weight == 1.5
    # Weights 4, 1, 1, 1, 1/4, 1/4: total 7.5.
    kept = {
        cutoff: choose(DEGENERATE, cutoff=cutoff).bond_dim for cutoff in (0.05, 0.19, 0.2, 0.34)
    }
    assert kept == {0.05: 5, 0.19: 4, 0.2: 3, 0.34: 2}


def test_at_least_one_value_is_kept():
    assert choose(DECADES, cutoff=0.999999).bond_dim == 1
    assert choose(torch.ones(4), cutoff=0.9).bond_dim == 1


def test_zero_spectrum_keeps_one_zero():
    for limits in ({}, {"cutoff": 0.5}, {"bond_dim": 3}):
        cut = choose(torch.zeros(5), **limits)
        assert (cut.bond_dim, cut.discarded_weight, cut.total_weight) == (1, 0.0, 0.0)
        assert cut.truncation_error == 0.0


def test_partial_spectrum_counts_what_was_never_computed():
    weights = DECADES**2
    total = float(weights.sum())
    cut = choose(DECADES[:4], total=total, bond_dim=3)
    assert cut.bond_dim == 3
    assert cut.total_weight == total
    assert_close(cut.discarded_weight, float(weights[3:].sum()), **WEIGHT)
    whole = choose(DECADES[:4], total=total)
    assert whole.bond_dim == 4
    assert_close(whole.discarded_weight, float(weights[4:].sum()), **WEIGHT)


def test_partial_spectrum_cannot_meet_a_cutoff_below_what_was_never_computed():
    cut = choose(torch.tensor([1.0, 0.5]), total=2.0, cutoff=0.01)
    assert cut.bond_dim == 2
    assert cut.truncation_error == 0.375


def test_total_weight_below_the_spectrum_is_rounding():
    cut = choose(DECADES, total=1.0, bond_dim=2)
    assert cut.total_weight == float((DECADES**2).sum())
    assert cut.discarded_weight == pytest.approx(float((DECADES[2:] ** 2).sum()))


@LAWS
@given(
    st.lists(st.floats(min_value=0, max_value=1e6), min_size=1, max_size=12),
    st.floats(min_value=0, max_value=0.99),
    st.integers(min_value=1, max_value=14),
)
def test_cut_is_the_smallest_within_the_cutoff(values, cutoff, bond_dim):
    spectrum = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    cut = choose(spectrum, cutoff=cutoff)
    assert 1 <= cut.bond_dim <= len(values)
    rounding = len(values) * TINY
    if cutoff > 0:
        assert cut.truncation_error <= cutoff + rounding
        if cut.bond_dim > 1:
            one_less = float((spectrum[cut.bond_dim - 1 :] ** 2).sum())
            assert one_less > (cutoff - rounding) * cut.total_weight
    both = choose(spectrum, cutoff=cutoff, bond_dim=bond_dim)
    assert both.bond_dim == min(cut.bond_dim, bond_dim)


def test_half_precision_and_float32_spectra_are_summed_in_float64():
    spectrum = torch.full((4096,), 0.01)
    cut = choose(spectrum, tolerance=0.5, bond_dim=1)
    assert cut.discarded_weight == pytest.approx(4095 * float(spectrum[0]) ** 2, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_spectrum_that_is_not_finite_is_refused(bad):
    with pytest.raises(DecompositionError, match="2 values is empty or not finite"):
        choose(torch.tensor([bad, 1.0]))


def test_empty_spectrum_is_refused():
    with pytest.raises(DecompositionError, match="0 values is empty or not finite"):
        choose(torch.zeros(0))


@pytest.mark.parametrize("bond_dim", [0, -3, True, 2.5, "4"])
def test_impossible_bond_dims(bond_dim):
    with pytest.raises(BondDimError, match=rf"bond_dim {bond_dim!r}.*at least 1.*Try 16"):
        Truncation(bond_dim=bond_dim)
    with pytest.raises(BondDimError, match="in layer fc1"):
        check_bond_dim(bond_dim, " in layer fc1")


@pytest.mark.parametrize("cutoff", [-1e-9, 1.0, 1.5, math.nan, math.inf])
def test_impossible_cutoffs(cutoff):
    with pytest.raises(DecompositionError, match=rf"cutoff {cutoff!r}.*\[0, 1\).*Try 1e-6"):
        Truncation(cutoff=cutoff)


def test_error_bound_is_the_root_of_the_summed_weights():
    cuts = [
        Cut(bond_dim=1, discarded_weight=weight, total_weight=50.0, clipped=False)
        for weight in (9.0, 16.0, 0.0)
    ]
    assert error_bound(cuts) == 5.0
    assert error_bound([]) == 0.0
