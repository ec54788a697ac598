"""What a plan is to make small: stored numbers, multiply-adds, or time in ONNX Runtime."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex, get_args

from mpocompress.errors import PlanError
from mpocompress.mpo import Layout
from mpocompress.planning.layouts import chain_macs
from mpocompress.scalars import as_count, put_plain

ObjectiveName = Literal["size", "macs", "latency"]
"""Numbers that are stored, multiply-adds of a row, or seconds of a batch."""

Latency = Callable[[tuple[int, int], Layout | None, Sequence[int]], float]
"""Seconds of one layer, measured: of its shape (out, in), as a chain of a layout and bond
dimensions, or dense (None, ()). It does not fall when bond dimensions rise."""

# Of two measured times that are closer than this, either may be the shorter one.
_NOISE = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Costs of a layer by an objective, and whether a chain is worth having instead of dense.

    Attributes:
        name: what counts.
        batch: rows at which latency is measured.
        latency: the measured table; needed for the objective "latency" only.
    """

    name: ObjectiveName = "size"
    batch: int = 1
    latency: Latency | None = None

    def __post_init__(self) -> None:
        check_objective(self.name)
        put_plain(self, {"batch": check_batch(self.batch)})
        if self.name == "latency" and self.latency is None:
            raise PlanError('objective "latency" needs a table of measured times.')

    def cost(self, shape: tuple[int, int], layout: Layout | None, bond_dim: int) -> float:
        """Multiply-adds of a row, or seconds, of a layer at a bond dimension; dense for None."""
        bonds = () if layout is None else layout.clip([bond_dim] * (layout.num_sites - 1))
        return self.cost_of(shape, layout, bonds)

    def cost_of(
        self, shape: tuple[int, int], layout: Layout | None, bond_dims: Sequence[int]
    ) -> float:
        """The same with one bond dimension for each bond."""
        if self.name == "latency" and self.latency is not None:
            return self.latency(shape, layout, bond_dims)
        return shape[0] * shape[1] if layout is None else chain_macs(layout, bond_dims)

    def allows(self, shape: tuple[int, int], layout: Layout, bond_dims: Sequence[int]) -> bool:
        """Whether a chain costs less than the dense layer; by latency, surely less (10 %).

        By size every chain does that is smaller at all, which is not asked here.
        """
        if self.name == "size":
            return True
        limit = self.cost_of(shape, None, ()) * (_NOISE if self.name == "latency" else 1.0)
        return self.cost_of(shape, layout, bond_dims) < limit

    def largest(self, shape: tuple[int, int], layout: Layout, top: int) -> int:
        """The largest bond dimension up to `top` that is allowed; 0 if none is."""
        if self.name == "size":
            return top
        low, high = 0, top
        while low < high:
            middle = (low + high + 1) // 2
            bonds = layout.clip([middle] * (layout.num_sites - 1))
            low, high = (middle, high) if self.allows(shape, layout, bonds) else (low, middle - 1)
        return low

    def refusal(
        self, shape: tuple[int, int], layout: Layout, bond_dims: Sequence[int] | None = None
    ) -> str:
        """Why a layer stays dense that no chain is allowed for: one clause.

        Args:
            shape: (out, in).
            layout: of the cheapest chain that was looked at.
            bond_dims: its bond dimensions; None for 1 everywhere, the least.
        """
        at = "any bond dimension" if bond_dims is None else f"bond dimensions {list(bond_dims)}"
        bonds = [1] * (layout.num_sites - 1) if bond_dims is None else bond_dims
        found, dense = self.cost_of(shape, layout, bonds), self.cost_of(shape, None, ())
        if self.name == "latency":
            return (
                f"as {layout} slower than dense at {at}: {found * 1e6:.1f} µs against "
                f"{dense * 1e6:.1f} µs for a batch of {self.batch} in ONNX Runtime"
            )
        return (
            f"as {layout} more multiply-adds than dense at {at}: {found:.0f} a row against "
            f"{dense:.0f}"
        )


def check_batch(batch: SupportsIndex) -> int:
    """A number of rows, as a plain integer.

    Raises:
        PlanError: fewer than one, or no integer.
    """
    return as_count("batch", batch, 1, PlanError)


def check_objective(name: str) -> None:
    """Refuse what is no objective.

    Raises:
        PlanError: with what there is.
    """
    if name not in get_args(ObjectiveName):
        raise PlanError(f'objective {name!r}: a plan makes "size", "macs" or "latency" small.')
