"""What may be asked of a plan, in one object, and the planner that answers it."""

from collections.abc import Sequence
from dataclasses import dataclass

from mpocompress.errors import PlanError
from mpocompress.mpo.identity_gauge import Gauge
from mpocompress.planning.layout_rules import LayoutChoice
from mpocompress.planning.plan import Plan
from mpocompress.planning.planner import Progress, plan_bond_dim
from mpocompress.planning.ratio import Gains, Of, plan_ratio
from mpocompress.surgery import Inventory


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """Exactly one of `bond_dim` and `ratio`, and how to get there.

    Attributes:
        bond_dim: largest bond dimension of every layer, see `plan_bond_dim`.
        ratio: parameters before / after, see `plan_ratio`.
        of: what the ratio counts.
        layout: see `plan_bond_dim`.
        sites: see `plan_bond_dim`.
        include: patterns of layers to compress.
        exclude: patterns of layers to keep.
        if_smaller: with `bond_dim`: keep layers that would not get smaller.
        gauge: how cores are stored.
        healed: with `ratio`: healing will follow.
    """

    bond_dim: int | None = None
    ratio: float | None = None
    of: Of = "model"
    layout: LayoutChoice = "auto"
    sites: int | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    if_smaller: bool = True
    gauge: Gauge = "none"
    healed: bool = False

    @property
    def is_given(self) -> bool:
        """Whether a bond dimension or a budget was given at all."""
        return self.bond_dim is not None or self.ratio is not None

    def make(
        self,
        inventory: Inventory,
        *,
        gains: Gains | None = None,
        tables: bool = True,
        progress: Progress | None = None,
    ) -> Plan:
        """The plan for a model; see `plan_ratio` for `gains`, `plan_bond_dim` for `tables`.

        Raises:
            PlanError: neither a bond dimension nor a ratio, or both.
            MPOCompressError: see `plan_bond_dim` and `plan_ratio`.
        """
        if self.bond_dim is not None and self.ratio is not None:
            raise PlanError(
                f"bond_dim {self.bond_dim} and ratio {self.ratio:g} both say how small; give one."
            )
        if self.ratio is not None:
            return plan_ratio(
                inventory,
                self.ratio,
                of=self.of,
                gains=gains,
                layout=self.layout,
                sites=self.sites,
                include=self.include,
                exclude=self.exclude,
                gauge=self.gauge,
                healed=self.healed,
                tables=tables,
                progress=progress,
            )
        if self.bond_dim is None:
            raise PlanError("how small is not said. Give a bond_dim, such as 16, or a ratio.")
        return plan_bond_dim(
            inventory,
            self.bond_dim,
            layout=self.layout,
            sites=self.sites,
            include=self.include,
            exclude=self.exclude,
            if_smaller=self.if_smaller,
            gauge=self.gauge,
            tables=tables,
            progress=progress,
        )
