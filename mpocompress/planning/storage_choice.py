"""Ways to store one weight, and the allocation of bytes over many of them.

Each layer offers a few ways: dense or factorized, at several precisions, each with its bytes and
with the loss that its error costs, on one scale for all layers. Under a budget of bytes the best
selection lies on the lower convex hulls of these points: all layers then pay the same for the last
bit of loss, up to one step of one layer. It is found by walking along the hulls, the step with most
loss for its bytes first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpocompress.mpo import Layout
from mpocompress.mpo.identity_gauge import Gauge
from mpocompress.mpo.precision import Precision
from mpocompress.surgery import WeightSite

# Bytes of the nodes that unpack one tensor, measured: bit fields take more of them than what the
# format packs itself. Of two factors the first is rebuilt from its free rows besides.
_UNPACKING: dict[Precision, int] = {"float32": 0, "float16": 300, "int8": 600, "int4": 600}
_UNPACKING_FIELDS = 1500
_REBUILDING = 2500
_PLACING = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageChoice:
    """One way to store a weight.

    Attributes:
        layout: of one site for a dense weight.
        bond_dims: of the layout.
        gauge: of its cores.
        precision: of its numbers.
        block: columns that share a scale; None for all of a row.
        tiers: of a table, see `LayerPlan.tiers`.
        bytes: in a file.
        loss: what its error costs.
    """

    layout: Layout
    bond_dims: tuple[int, ...] = ()
    gauge: Gauge = "none"
    precision: Precision = "float32"
    block: int | None = None
    tiers: tuple[tuple[int, Precision], ...] = ()
    bytes: int
    loss: float

    @property
    def cost(self) -> int:
        """Bytes in a file with those of the graph around it, about."""
        one = _UNPACKING.get(self.precision, _UNPACKING_FIELDS)
        graph = one * self.layout.num_sites
        if self.gauge == "identity":
            graph += _REBUILDING
        if self.tiers:
            others = (_UNPACKING.get(name, _UNPACKING_FIELDS) for _, name in self.tiers)
            graph += sum(others) + _PLACING
        return self.bytes + graph


StorageChoices = Callable[[WeightSite], Sequence[StorageChoice]]
"""All ways to store a weight; none if it has to stay as it is."""


def lower_hull(choices: Sequence[StorageChoice]) -> list[StorageChoice]:
    """The choices on the lower convex hull of loss over bytes, fewest bytes first."""
    hull: list[StorageChoice] = []
    for choice in sorted(choices, key=lambda found: (found.cost, found.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) >= 2 and _rate(hull[-2], hull[-1]) <= _rate(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def allocate_bytes(hulls: Sequence[Sequence[StorageChoice]], budget: int) -> list[StorageChoice]:
    """One choice of each layer, with the least loss that the walk along the hulls finds.

    Args:
        hulls: of each layer, see `lower_hull`.
        budget: bytes for all of them, with the graph around them; with fewer than the first choices
            take, these are returned.
    """
    places = [0] * len(hulls)
    left = budget - sum(hull[0].cost for hull in hulls)
    steps = sorted(
        (
            (-_rate(hull[place], hull[place + 1]), index, place)
            for index, hull in enumerate(hulls)
            for place in range(len(hull) - 1)
        )
    )
    for _, index, place in steps:
        cost = hulls[index][place + 1].cost - hulls[index][places[index]].cost
        # A step that does not fit is passed over; those of other layers may be smaller.
        if places[index] <= place and cost <= left:
            places[index], left = place + 1, left - cost
    return [hull[place] for hull, place in zip(hulls, places, strict=True)]


def _rate(small: StorageChoice, large: StorageChoice) -> float:
    """Loss won for each byte more."""
    return (small.loss - large.loss) / max(large.cost - small.cost, 1)
