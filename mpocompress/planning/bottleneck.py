"""Where the layout ((out, 1), (1, in)) is a bottleneck, and more sites are worth a look.

A bond dimension D of it lets D numbers through, whatever is trained; an MPO of as many parameters
has full matrix rank. Few numbers that carry too little of what matters therefore suggest more
sites. A fit on trial tells; where none can be made, healing decides, since it makes up for a larger
error at first.
"""

from dataclasses import dataclass

from mpocompress.mpo import Layout
from mpocompress.mpo.factors import balanced_layout
from mpocompress.planning.allocation import Share

# Fewer numbers between two factors than this, that lose more than this share of what matters, give
# way to four sites. On a digit classifier such layers heal worst by far, and four sites best;
# above, all layouts come out alike (benchmarks/digits_extreme.py, benchmarks/planner.py).
_NARROW = 16
_LOST = 0.02
_SITES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Bottleneck:
    """Two factors that would let too few numbers through.

    Attributes:
        layout: that may do better.
        bond: numbers between the two factors; 0 if they cannot be as small as that.
        lost: share of what matters that they would lose.
        matters: sum of the gains of all bond dimensions; None if they are not known.
    """

    layout: Layout
    bond: int
    lost: float
    matters: float | None

    def reason(self, loss: float | None) -> str:
        """Why the other layout was taken, given what it loses, on the scale of the gains."""
        factors = f"two factors with a bond dimension of {self.bond} would lose {self.lost:.0%}"
        if self.bond == 0:
            factors = "two factors cannot be as small"
        if loss is None or not self.matters:
            return f"{self.layout.num_sites} sites, for healing follows, and {factors}"
        share = loss / self.matters
        return f"{self.layout.num_sites} sites, which lose {share:.0%} on trial, where {factors}"


def find_bottleneck(
    shape: tuple[int, int], share: Share, part: float, *, tried: bool
) -> Bottleneck | None:
    """What two factors would do to a weight; None where they are wide enough.

    Args:
        shape: (out, in) of the weight.
        share: of the layout ((out, 1), (1, in)), with its gains.
        part: of its parameters that the layer may keep.
        tried: whether fits on trial will decide in any case. Without them a layer with no more than
            a few inputs or outputs, such as a head, is taken to be narrow by itself.
    """
    layout = balanced_layout(*shape, _SITES)
    if (1, 1) in layout.pairs or (min(shape) <= _NARROW and not tried):
        return None  # sizes without factors, or as narrow as that from the beginning
    matters = None if share.gains is None else float(share.gains.sum())
    bond, lost = share.within(part * share.dense), 1.0
    if bond > 0:
        if share.gains is None or not matters or bond >= min(_NARROW, *shape):
            return None
        lost = 1 - float(share.gains[:bond].sum()) / matters
        if lost <= _LOST:
            return None
    return Bottleneck(layout=layout, bond=bond, lost=lost, matters=matters or None)
