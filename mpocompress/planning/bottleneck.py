"""Where the layout ((out, 1), (1, in)) is a bottleneck, and more sites are worth a look.

A bond dimension D of it lets D numbers through, whatever is trained; an MPO of as many parameters
has full matrix rank. Few numbers that carry too little of what matters therefore suggest more
sites. A fit on trial tells; where none can be made, healing decides, since it makes up for a larger
error at first.
"""

from mpocompress.mpo import Layout
from mpocompress.mpo.factors import balanced_layout
from mpocompress.planning.allocation import Share

# Fewer numbers between two factors than this, that lose more than this share of what matters, give
# way to four sites. On a digit classifier such layers heal worst by far, and four sites best;
# above, all layouts come out alike (benchmarks/digits_extreme.py, benchmarks/planner.py).
_NARROW = 16
_LOST = 0.02
_SITES = 4


def wider_layout(
    shape: tuple[int, int], share: Share, part: float
) -> tuple[Layout, int, float] | None:
    """The layout that may do better; None where two factors are wide enough.

    Args:
        shape: (out, in) of the weight.
        share: of the layout ((out, 1), (1, in)), with its gains.
        part: of its parameters that the layer may keep.

    Returns:
        That layout, how many numbers there would be between two factors, and which share of what
        matters they would lose.
    """
    if min(shape) <= _NARROW:  # as narrow as that from the beginning
        return None
    bond = share.within(part * share.dense)
    lost = 1.0
    if bond > 0:
        if share.gains is None or bond >= _NARROW:
            return None
        lost = 1 - float(share.gains[:bond].sum() / share.gains.sum())
        if lost <= _LOST:
            return None
    return balanced_layout(*shape, _SITES), bond, lost
