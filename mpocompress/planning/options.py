"""What may be asked of a plan, in one object, and the planners that answer it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from mpocompress.errors import PlanError
from mpocompress.mpo.factors import check_sites
from mpocompress.mpo.identity_gauge import Gauge
from mpocompress.mpo.truncate import check_bond_dim
from mpocompress.planning.budgets import (
    check_max_drop,
    check_max_error,
    parse_size,
    the_one_given,
)
from mpocompress.planning.layout_rules import LayoutChoice
from mpocompress.planning.objective import (
    Latency,
    Objective,
    ObjectiveName,
    check_batch,
    check_objective,
)
from mpocompress.planning.parts import Gains
from mpocompress.planning.plan import Plan
from mpocompress.planning.planner import Progress, plan_bond_dim
from mpocompress.planning.ratio import Of, check_of, check_ratio, plan_ratio
from mpocompress.planning.sharing import Sharing
from mpocompress.planning.trials import PlanTrials, Trials
from mpocompress.surgery import Inventory

Target = Literal["bond_dim", "ratio", "max_size", "max_error", "max_drop"]
"""The ways to say how small."""

PlannedPrecision = Literal["none", "auto"]
"""Whether a plan leaves all layers in float32, or chooses a storage precision for each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """Exactly one target, and how to get there.

    Attributes:
        bond_dim: largest bond dimension of every layer, see `plan_bond_dim`.
        ratio: parameters before / after, see `plan_ratio`.
        max_size: bytes of the ONNX file, see `parse_size`.
        max_error: relative output error of every layer and of the model; without data the relative
            weight error of every layer.
        max_drop: metric before minus metric after.
        of: what the ratio counts.
        objective: what is to be small besides.
        batch: rows for which latency counts.
        layout: see `plan_bond_dim`.
        sites: see `plan_bond_dim`.
        include: patterns of layers to compress.
        exclude: patterns of layers to keep.
        if_smaller: with `bond_dim`: keep layers that would not get smaller.
        gauge: how cores are stored.
        healed: with a budget: healing will follow.
        quantize: with `max_size`: "auto" chooses a storage precision for each layer, too.
    """

    bond_dim: int | None = None
    ratio: float | None = None
    max_size: int | str | None = None
    max_error: float | None = None
    max_drop: float | None = None
    of: Of = "model"
    objective: ObjectiveName = "size"
    batch: int = 1
    layout: LayoutChoice = "auto"
    sites: int | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    if_smaller: bool = True
    gauge: Gauge = "none"
    healed: bool = False
    quantize: PlannedPrecision = "none"

    @property
    def is_given(self) -> bool:
        """Whether any target was given at all."""
        return any(value is not None for value in self._targets().values())

    @property
    def not_default(self) -> tuple[str, ...]:
        """Names of all options with another value than nothing gives them; `healed` is none."""
        given = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        del given["healed"]
        # An empty list says as little as an empty tuple.
        return tuple(name for name, (value, default) in given.items() if value not in (default, []))

    @property
    def target(self) -> Target:
        """Which one was given.

        Raises:
            PlanError: none, or more than one.
        """
        given = the_one_given(self._targets())
        return next(name for name in _TARGETS if name == given)

    def checked(self) -> "PlanOptions":
        """The options with plain numbers, and the size in bytes.

        Raises:
            PlanError: none or several targets, or one that makes no sense.
            BondDimError: `bond_dim` below 1.
            LayoutError: `sites` below 1.
        """
        target = self.target
        given = {name: getattr(self, name) for name in _NUMBERS}
        read: dict[str, Any] = {
            name: _NUMBERS[name](value) for name, value in given.items() if value is not None
        }
        check_objective(self.objective)
        if target == "ratio":
            check_of(self.of)
        elif self.of != "model":
            raise PlanError(f"of {self.of!r} is for a ratio, but {target} was given. Drop it.")
        self._check_quantize(target)
        return replace(self, **read)

    def aim(self, latency: Latency | None = None) -> Objective:
        """The objective, with the table of measured times that "latency" needs."""
        return Objective(name=self.objective, batch=self.batch, latency=latency)

    def sharing(
        self,
        inventory: Inventory,
        *,
        objective: Objective,
        gains: Gains | None = None,
        trials: Trials | None = None,
        plan_trials: PlanTrials | None = None,
        tables: bool = True,
        progress: Progress | None = None,
    ) -> Sharing:
        """What a budget is shared among.

        Raises:
            MPOCompressError: see `Sharing`.
        """
        return Sharing(
            inventory,
            gains=gains,
            trials=trials,
            plan_trials=plan_trials,
            layout=self.layout,
            sites=self.sites,
            include=self.include,
            exclude=self.exclude,
            gauge=self.gauge,
            objective=objective,
            may_stay_dense=self.of == "model",
            healed=self.healed,
            tables=tables,
            progress=progress,
        )

    def make(
        self,
        inventory: Inventory,
        *,
        objective: Objective | None = None,
        gains: Gains | None = None,
        trials: Trials | None = None,
        plan_trials: PlanTrials | None = None,
        tables: bool = True,
        progress: Progress | None = None,
    ) -> Plan:
        """The plan for a bond dimension or a ratio; the other targets have to be measured.

        See `Sharing` for `gains`, `trials`, `plan_trials` and `tables`.

        Raises:
            PlanError: another target, none, or several.
            MPOCompressError: see `plan_bond_dim` and `plan_ratio`.
        """
        objective = objective or self.aim()
        if self.target == "ratio" and self.ratio is not None:
            sharing = self.sharing(
                inventory,
                objective=objective,
                gains=gains,
                trials=trials,
                plan_trials=plan_trials,
                tables=tables,
                progress=progress,
            )
            return plan_ratio(sharing, self.ratio, of=self.of)
        if self.bond_dim is None:
            raise PlanError(f"{self.target} is met by measuring: call plan or compress with it.")
        return plan_bond_dim(
            inventory,
            self.bond_dim,
            layout=self.layout,
            sites=self.sites,
            include=self.include,
            exclude=self.exclude,
            if_smaller=self.if_smaller,
            gauge=self.gauge,
            objective=objective,
            tables=tables,
            progress=progress,
        )

    def _check_quantize(self, target: Target) -> None:
        if self.quantize not in get_args(PlannedPrecision):
            raise PlanError(
                f"quantize {self.quantize!r}: a plan leaves precisions alone (none) or chooses "
                "them (auto). One for all cores is given to export_onnx."
            )
        if self.quantize == "none":
            return
        if target != "max_size":
            raise PlanError(
                f'quantize "auto" shares bytes among layers, but {target} was given. Give '
                'max_size, such as "25MB".'
            )
        if self.layout != "auto" or self.sites is not None or self.objective != "size":
            raise PlanError(
                'quantize "auto" chooses layouts along with precisions, by size. Drop layout, '
                "sites and objective."
            )

    def _targets(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in _TARGETS}


_TARGETS: tuple[Target, ...] = ("bond_dim", "ratio", "max_size", "max_error", "max_drop")
# What reads each number. Plans and reports are JSON, which has no numbers of NumPy.
_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "bond_dim": check_bond_dim,
    "ratio": check_ratio,
    "max_size": parse_size,
    "max_error": check_max_error,
    "max_drop": check_max_drop,
    "batch": check_batch,
    "sites": check_sites,
}
