"""Layouts: reading, writing, reordering, padding, maximal bond dims, and every refusal."""

import re

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from mpocompress.errors import BondDimError, LayoutError, MPOCompressError
from mpocompress.mpo import Layout, as_layout
from mpocompress.mpo.factors import (
    balanced_factors,
    balanced_layout,
    divisors,
    resolve_layout,
)
from tests.planted import LAWS, SEEDS, gaussian, interleaved, layouts, spectrum_at

# -- reading and writing


@LAWS
@given(layouts())
def test_text_round_trip(layout):
    assert Layout.parse(str(layout)) == layout
    assert as_layout(str(layout)) == layout
    assert Layout.from_pairs(layout.pairs) == layout
    assert as_layout(layout.pairs) == layout
    assert as_layout(layout) is layout


def test_text_is_out_by_in_per_site():
    layout = Layout.parse(" 32x28, 16x1 ")
    assert layout.out_dims == (32, 16)
    assert layout.in_dims == (28, 1)
    assert (layout.out_features, layout.in_features, layout.num_sites) == (512, 28, 2)
    assert layout.pairs == ((32, 28), (16, 1))
    assert str(layout) == "32x28,16x1"


def test_the_layout_of_the_svd_is_known():
    for layout in (Layout.svd(6, 4), Layout.svd(1, 1), Layout((7, 1), (1, 4), pad=True)):
        assert layout.is_svd
    for text in ("6x4", "1x4,6x1", "6x1,2x4", "6x2,1x4", "6x1,1x4,1x1"):
        assert not Layout.parse(text).is_svd


def test_pad_survives_parsing_and_transposing():
    assert Layout.parse("2x3,4x5", pad=True).transposed == Layout((3, 5), (2, 4), pad=True)
    assert Layout.from_pairs([(2, 3)], pad=True).pad


def test_layouts_are_values():
    assert hash(Layout((2, 3), (4, 5))) == hash(Layout([2, 3], [4, 5]))
    with pytest.raises(AttributeError):
        Layout((2,), (3,)).out_dims = (4,)


@pytest.mark.parametrize(
    "text", ["", "32", "32x", "x28", "32x28,", "32x28;32x28", "32*28", "-2x3", "2.5x3", "axb"]
)
def test_unreadable_text_names_the_part_and_the_form(text):
    bad = next(part for part in text.split(",") if not re.fullmatch(r"\d+x\d+", part))
    with pytest.raises(LayoutError, match=rf"cannot read '{re.escape(bad)}'.*32x28,32x28"):
        Layout.parse(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout((), ()), r"out_dims \(\) and in_dims \(\).*not empty"),
        (lambda: Layout((2, 3), (4,)), r"out_dims \(2, 3\) and in_dims \(4,\) must be equally"),
        (lambda: Layout((2, 0), (3, 4)), r"out_dims \(2, 0\).*at least 1"),
        (lambda: Layout((2, 2), (3, -4)), r"in_dims \(3, -4\).*at least 1"),
        (lambda: Layout.parse("0x3"), r"at least 1"),
        (lambda: Layout.from_pairs([(2, 3), (2,)]), r"site 1 of .* has 1 numbers"),
        (lambda: Layout.from_pairs([(2, 3, 4)]), r"site 0 of .* has 3 numbers"),
        (lambda: as_layout(5), r"layout 5: give a Layout"),
        (lambda: as_layout(None), r"layout None: give a Layout"),
        (lambda: as_layout([2, 3]), r"layout \[2, 3\]: give a Layout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_layouts_are_refused(make, message):
    with pytest.raises(LayoutError, match=message):
        make()


@pytest.mark.parametrize("dims", [(2.5, 4), ("a", 4), (True, 4)], ids=str)
def test_dims_that_are_no_integers_are_refused_not_rounded(dims):
    with pytest.raises(LayoutError, match=re.escape(repr(dims[0]))):
        Layout(dims, (2, 3))


# -- what fits a matrix


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (Layout((2, 3), (2, 2)), (8, 4), r"out_dims \(2, 3\) multiply to 6.*8x4 has 8 on its out"),
        (Layout((2, 4), (2, 3)), (8, 4), r"in_dims \(2, 3\) multiply to 6.*8x4 has 4 on its in"),
        (Layout((4, 4), (2, 2)), (8, 4), r"Divide 8 exactly, or allow padding.*pad=True"),
        (Layout((2, 3), (2, 2), pad=True), (8, 4), r"Enlarge a dim.*at least 8"),
    ],
    ids=str,
)
def test_layout_that_does_not_multiply_to_the_shape_is_refused(layout, shape, message):
    with pytest.raises(LayoutError, match=message):
        layout.check(shape)
    with pytest.raises(LayoutError, match=message):
        layout.split(torch.zeros(shape))


# -- reordering


@LAWS
@given(layouts(), SEEDS)
def test_split_equals_its_twin_and_join_inverts_it(layout, seed):
    matrix = gaussian(layout.out_features, layout.in_features, seed=seed)
    tensor = layout.split(matrix)
    assert torch.equal(tensor, interleaved(matrix, layout))
    assert torch.equal(layout.join(tensor), matrix)
    assert torch.equal(layout.transposed.split(matrix.T), interleaved(matrix.T, layout.transposed))


def test_leftmost_site_is_most_significant():
    matrix = torch.arange(36.0).reshape(6, 6)
    tensor = Layout((2, 3), (3, 2)).split(matrix).reshape(2, 3, 3, 2)
    for o1, o2, i1, i2 in [(1, 2, 2, 1), (0, 1, 1, 0), (1, 0, 0, 1)]:
        assert tensor[o1, i1, o2, i2] == matrix[3 * o1 + o2, 2 * i1 + i2]


@LAWS
@given(layouts(max_sites=3), SEEDS)
def test_padding_adds_zeros_and_is_cut_off_again(layout, seed):
    padded = Layout(layout.out_dims, layout.in_dims, pad=True)
    rows, columns = max(1, layout.out_features - 2), max(1, layout.in_features - 1)
    matrix = gaussian(rows, columns, seed=seed)
    tensor = padded.split(matrix)
    full = padded.join(tensor)
    assert full.shape == (layout.out_features, layout.in_features)
    assert torch.equal(full[:rows, :columns], matrix)
    assert full[rows:].count_nonzero() == 0
    assert full[:, columns:].count_nonzero() == 0
    assert torch.equal(padded.join(tensor, (rows, columns)), matrix)


# -- bond dims


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("8x6", ()),
        ("8x1,1x6", (6,)),
        ("2x2,2x2,2x2,2x2", (4, 16, 4)),
        ("2x2,3x3,4x4", (4, 16)),
        ("4x4,3x3,2x2", (16, 4)),
        ("3x3,3x3,3x3", (9, 9)),
        ("7x1,1x1,1x5", (5, 5)),
        ("2x3,4x1", (4,)),
    ],
)
def test_maximal_bond_dims(layout, expected):
    assert Layout.parse(layout).max_bond_dims() == expected


@LAWS
@given(layouts(max_dim=3), SEEDS)
def test_maximal_bond_dims_are_the_ranks_of_noise(layout, seed):
    noise = gaussian(layout.out_features, layout.in_features, seed=seed)
    ranks = tuple(
        int(spectrum_at(noise, layout, bond).count_nonzero())
        for bond in range(layout.num_sites - 1)
    )
    assert layout.max_bond_dims() == ranks


@LAWS
@given(layouts())
def test_clipping_leaves_no_bond_that_its_neighbours_cannot_carry(layout):
    for bond in (1, 2, 3, 7, 10**6):
        clipped = layout.clip([bond] * (layout.num_sites - 1))
        sizes = [out * in_ for out, in_ in layout.pairs]
        around = (1, *clipped, 1)
        for k, dim in enumerate(clipped):
            assert 1 <= dim <= min(bond, layout.max_bond_dims()[k])
            assert dim <= around[k] * sizes[k]
            assert dim <= around[k + 2] * sizes[k + 1]
        assert layout.clip(clipped) == clipped
        assert layout.clip(layout.max_bond_dims()) == layout.max_bond_dims()


def test_small_bond_limits_its_neighbours():
    assert Layout((2, 2, 2), (2, 2, 2)).clip((1, 100)) == (1, 4)
    assert Layout((1, 1, 8), (1, 1, 8)).clip((5, 5)) == (1, 1)
    assert Layout((2, 1, 8), (2, 1, 8)).clip((4, 3)) == (3, 3)


def test_wrong_number_of_bond_dims_is_refused():
    with pytest.raises(BondDimError, match=r"\(1, 2\).*2 sites"):
        Layout((2, 2), (2, 2)).clip((1, 2))


@LAWS
@given(layouts())
def test_parameters_at_maximal_bond_dims_are_the_entries_of_the_cores(layout):
    bonds = (1, *layout.max_bond_dims(), 1)
    entries = sum(
        torch.empty(bonds[k], out, in_, bonds[k + 1]).numel()
        for k, (out, in_) in enumerate(layout.pairs)
    )
    assert layout.num_parameters(layout.max_bond_dims()) == entries


# -- balanced layouts


@pytest.mark.parametrize("number", [1, 2, 7, 12, 36, 97, 360, 784, 1024])
def test_divisors_divide(number):
    assert divisors(number) == tuple(d for d in range(1, number + 1) if number % d == 0)


def _all_factorizations(number, parts):
    if parts == 1:
        return [(number,)]
    return [
        (factor, *rest)
        for factor in divisors(number)
        for rest in _all_factorizations(number // factor, parts - 1)
    ]


@pytest.mark.parametrize("number", [1, 2, 13, 30, 60, 72, 100, 784])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_balanced_factors_are_the_most_equal_ones(number, parts):
    def spread(factors):
        return torch.tensor(factors, dtype=torch.float64).log().square().sum()

    found = balanced_factors(number, parts)
    assert list(found) == sorted(found, reverse=True)
    assert torch.tensor(found).prod() == number
    best = min(spread(factors) for factors in _all_factorizations(number, parts))
    assert_close(spread(found), best)


@pytest.mark.parametrize(
    ("shape", "sites", "expected"),
    [
        ((1024, 784), 2, "32x28,32x28"),
        ((10, 1), 2, "5x1,2x1"),
        ((13, 7), 2, "13x1,1x7"),
        ((1, 1), 3, "1x1,1x1,1x1"),
        ((6, 4), 1, "6x4"),
    ],
)
def test_balanced_layouts(shape, sites, expected):
    layout = balanced_layout(*shape, sites)
    assert (layout.out_features, layout.in_features) == shape
    assert sorted(layout.pairs) == sorted(Layout.parse(expected).pairs)


def test_named_layouts():
    assert resolve_layout("svd", 5, 3) == Layout((5, 1), (1, 3)) == Layout.svd(5, 3)
    assert resolve_layout("balanced", 12, 12) == balanced_layout(12, 12, 2)
    assert resolve_layout([(5, 1), (1, 3)], 5, 3) == Layout.svd(5, 3)
    with pytest.raises(LayoutError, match="multiply to 6.*5 on its out"):
        resolve_layout("6x3", 5, 3)
    with pytest.raises(LayoutError, match="cannot read 'round'"):
        resolve_layout("round", 5, 3)


@pytest.mark.parametrize("sites", [0, -1, True, 2.5])
def test_impossible_number_of_sites(sites):
    with pytest.raises(LayoutError, match=rf"sites {sites}.*1 or more"):
        balanced_layout(4, 4, sites)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_matrix_has_no_balanced_layout(shape):
    with pytest.raises(LayoutError, match=f"{shape[0]}x{shape[1]} is empty"):
        balanced_layout(*shape)


def test_layout_errors_are_value_errors_of_ours():
    with pytest.raises(ValueError, match="cannot read") as caught:
        Layout.parse("?")
    assert isinstance(caught.value, MPOCompressError)
