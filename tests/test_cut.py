"""C at the cut of a chain: what is absorbed by its triangle is what all of C gives."""

import pytest
import torch

from mpocompress.mpo.cut import CutMoment, linear_at_cut


def symmetric(size):
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(size + 2, size, generator=generator, dtype=torch.float64)
    return rows.mT @ rows


@pytest.mark.parametrize("bond", [1, 3])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(("ins", "cut"), [((2, 3, 4), 0), ((2, 3, 4), 1), ((1, 5), 0), ((5, 1), 0)])
def test_absorbing_a_half_is_a_contraction_with_all_of_c(ins, cut, side, bond):
    size = torch.Size(ins).numel()
    input_II = symmetric(size)
    moment = CutMoment(input_II, ins, cut)
    left, right = torch.Size(ins[: cut + 1]).numel(), torch.Size(ins[cut + 1 :]).numel()
    # The right half is read from the right end.
    legs = input_II.reshape(left, *ins[cut + 1 :], left, *ins[cut + 1 :])
    sites = len(ins[cut + 1 :])
    mirrored = [*range(sites, 0, -1)]
    legs = legs.permute(0, *mirrored, sites + 1, *(sites + 1 + k for k in mirrored))
    c_ABAB = legs.reshape(left, right, left, right)
    torch.testing.assert_close(
        moment.full(), c_ABAB.transpose(1, 2).reshape(left**2, right**2), rtol=0, atol=0
    )
    other = (right, left)[side]
    gram = symmetric(bond * other).reshape(bond, other, bond, other).transpose(1, 2)
    expected = torch.einsum("rsbd,abcd->rsac" if side == 0 else "rsac,abcd->rsbd", gram, c_ABAB)
    torch.testing.assert_close(moment.absorb(gram, side), expected, rtol=1e-12, atol=1e-12)


def test_m_at_the_cut_has_the_legs_of_the_halves_together():
    outs, ins = (2, 3, 4), (3, 1, 2)
    linear_OI = torch.arange(24.0 * 6).reshape(24, 6)
    found = linear_at_cut(linear_OI, outs, ins, 0)
    legs = linear_OI.reshape(*outs, *ins)
    expected = torch.einsum("pqrabc->parqcb", legs).reshape(6, 24)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
