"""All plans of a model that share a number of stored parameters among its layers.

A ratio asks for one of them. Budgets that can only be measured (bytes of a file, errors, a drop in
accuracy) are met by walking along them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

from mpocompress.errors import BudgetError, LayoutError, NoLayerMatched
from mpocompress.mpo import Layout
from mpocompress.mpo.identity_gauge import Gauge, check_gauge
from mpocompress.planning.allocation import (
    Share,
    allocate_by_sensitivity,
    allocate_uniform,
    least_numbers,
)
from mpocompress.planning.bottleneck import find_bottleneck
from mpocompress.planning.entries import (
    compress_entry,
    keep_entry,
    why_kept,
    why_no_gain,
    why_nothing,
)
from mpocompress.planning.layout_rules import LayoutChoice, LayoutRules, describe_layout
from mpocompress.planning.layouts import make_candidate
from mpocompress.planning.objective import Objective
from mpocompress.planning.parts import (
    Bonds,
    Gains,
    Part,
    filled,
    stored_at,
)
from mpocompress.planning.plan import LayerPlan, Plan
from mpocompress.planning.planner import Progress
from mpocompress.planning.trials import Judge, PlanTrials, Shared, Trials
from mpocompress.surgery import Inventory, WeightSite, check_finite, select_sites
from mpocompress.surgery.match import as_patterns


class _Unfit(NamedTuple):
    """Why a weight takes no part in a layout, and whether the objective says so."""

    why: str
    by_objective: bool = False


class Sharing:
    """What can be shared: the selected weights with their layouts and costs.

    Args:
        inventory: of the model.
        gains: per layer, see `allocation`; layers without them share the uniform ratio.
        trials: makes trials where two factors are a bottleneck; None makes none.
        plan_trials: likewise of the plans that compete then; None adds up what layers do.
        layout: "auto" is the layout ((out, 1), (1, in)), whose errors are known at every bond
            dimension, except where `bottleneck` finds a better one; otherwise one that is forced,
            as in `plan_bond_dim`.
        sites: force balanced layouts of so many sites.
        include: patterns of layers to compress; default: all.
        exclude: patterns of layers to keep.
        gauge: how the cores are stored.
        objective: what gains are weighed against, and which chains are worth having.
        may_stay_dense: whether a plan may keep selected layers dense where that pays.
        healed: the compressed model will be trained to do what the dense one does.
        tables: whether embedding tables are among the layers that are meant by no pattern.
        progress: called once before each layer.

    Raises:
        LayoutError, NoLayerMatched, ConversionError: as in `plan_bond_dim`.
    """

    def __init__(
        self,
        inventory: Inventory,
        *,
        gains: Gains | None = None,
        trials: Trials | None = None,
        plan_trials: PlanTrials | None = None,
        layout: LayoutChoice = "auto",
        sites: int | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        gauge: Gauge = "none",
        objective: Objective | None = None,
        may_stay_dense: bool = True,
        healed: bool = False,
        tables: bool = True,
        progress: Progress | None = None,
    ) -> None:
        check_gauge(gauge)
        self.inventory = inventory
        self.gauge: Gauge = gauge
        self.objective = objective or Objective()
        self._may_stay_dense = may_stay_dense
        self._judge = Judge(trials, plan_trials, healed=healed)
        # More sites cost more multiply-adds than parameters: they are for small size alone.
        self._widens = self.objective.name == "size" and (healed or self._judge.tries)
        self.settings = {
            "layout": describe_layout(layout),
            "sites": sites,
            "include": list(as_patterns(include)),
            "exclude": list(as_patterns(exclude)),
            "gauge": gauge,
        }
        if self.objective.name != "size":
            self.settings["objective"] = self.objective.name
        if self.objective.name == "latency":
            self.settings["batch"] = self.objective.batch
        selected = {site.name for site in select_sites(inventory, include, exclude)}
        rules = LayoutRules(layout, sites, inventory, selected)
        self.kept: dict[WeightSite, LayerPlan] = {}
        self.parts: list[Part] = []
        self._refused: list[str] = []  # by the objective, and why
        for done, site in enumerate(inventory.sites):
            if progress is not None:
                progress(site.name, done, len(inventory.sites))
            if (kept := why_kept(site, selected, include, tables)) is not None:
                self.kept[site] = keep_entry(site, kept, selected=site.name in selected)
                continue
            check_finite(site)
            forced = rules.forced(site)
            if isinstance(forced, LayoutError):
                self.kept[site] = keep_entry(site, f"the layout does not fit: {forced}")
                continue
            part = self._part(site, forced or Layout.svd(*site.shape), gains)
            if isinstance(part, Part):
                self.parts.append(replace(part, forced=forced is not None))
                continue
            self.kept[site] = keep_entry(site, part.why)
            if part.by_objective:
                self._refused.append(f"{site.name}: {part.why}")
        rules.check_used()

    @property
    def dense(self) -> int:
        """Numbers of the weights that take part, dense."""
        return sum(part.share.dense for part in self.parts)

    @property
    def least(self) -> int:
        """Parameters of the whole model with bond dimension 1 everywhere."""
        return self.inventory.parameters - self.dense + least_numbers(self._shares(self.parts))

    def at(
        self,
        allowed: Callable[[int], float],
        why: str,
        *,
        unreachable: Callable[[Sequence[Part]], BudgetError],
    ) -> Plan:
        """The plan whose compressed weights take no more than an allowed number of parameters.

        Args:
            allowed: from the dense parameters of the weights that take part to what they may take
                together.
            why: for the reason of each entry, such as "a ratio of 4".
            unreachable: the error if even bond dimension 1 everywhere takes more.
        """
        return self._explained(self._best(allowed, why, unreachable), why)

    def _best(
        self,
        allowed: Callable[[int], float],
        why: str,
        unreachable: Callable[[Sequence[Part]], BudgetError],
    ) -> Shared:
        kept = max(allowed(self.dense), 0.0) / max(self.dense, 1)
        wide_parts = [self._widened(part, kept) for part in self.parts]
        make = partial(self._at, allowed=allowed, why=why, unreachable=unreachable)
        wide = make(wide_parts)
        # Trials are made at the bond dimensions of this plan; what they do not bear out goes.
        borne_out = [
            part if self._judge.is_worse(other, wide.bonds, part) else other
            for part, other in zip(self.parts, wide_parts, strict=True)
        ]
        if borne_out != wide_parts:
            wide = make(borne_out)
        if borne_out == self.parts:
            return wide
        # What layers in factors lose depends on how they share the budget, so whole plans compete.
        wide = self._better_shared(wide, borne_out, make)
        try:
            narrow = make(self.parts)
        except BudgetError:
            return wide
        if not self._may_stay_dense and wide.dropped != narrow.dropped:
            # What is dropped is not counted then: the plan that compresses more is the smaller.
            return min(wide, narrow, key=lambda found: found.dropped)
        return wide if self._judge.prefers(wide, narrow) else narrow

    def _explained(self, shared: Shared, why: str) -> Plan:
        """The plan; where layouts have more sites its reasons say what they lose on trial."""
        told: dict[str, LayerPlan] = {}
        for part, bond_dims in shared.bonds.items():
            if part.bottleneck is None or bond_dims is None:
                continue
            trial = self._judge.trial(part, bond_dims)
            how = part.bottleneck.reason(None if trial is None else trial.loss)
            told[part.site.name] = self.entry(part, bond_dims, _reason(why, how))
        rows = tuple(told.get(layer.name, layer) for layer in shared.plan.layers)
        return shared.plan.model_copy(update={"layers": rows})

    def _at(
        self,
        taking_part: Sequence[Part],
        allowed: Callable[[int], float],
        why: str,
        unreachable: Callable[[Sequence[Part]], BudgetError],
    ) -> Shared:
        entries = dict(self.kept)
        parts, budget = self._fitting(taking_part, allowed, entries, unreachable)
        allocated = _allocate(self._shares(parts), budget)
        bonds: Bonds = {
            part: part.bond_dims(bond) for part, bond in zip(parts, allocated, strict=True)
        }
        if self.objective.name == "size":
            bonds = filled(bonds, budget, self.gauge)
        for part, bond_dims in bonds.items():
            if bond_dims is None:
                dense = "dense: more exact for about as many parameters"
                entries[part.site] = keep_entry(part.site, dense)
                continue
            entries[part.site] = self.entry(part, bond_dims, _reason(why, part.how))
        dropped = len(taking_part) - len(parts)
        return Shared(plan=self.plan(entries), bonds=bonds, dropped=dropped)

    def _better_shared(
        self,
        wide: Shared,
        parts: Sequence[Part],
        make: Callable[[Sequence[Part]], Shared],
    ) -> Shared:
        """That plan, or the one in which the same layouts take the same share, by a trial of both.

        What layers lose is weighed as if it added up; but what follows repairs some of it. Of a
        digit classifier 20 times smaller, a dense head made good what its first layer lost.
        """
        if not self._judge.tries_plans or all(part.share.gains is None for part in parts):
            return wide
        alike = [
            part
            if part.bottleneck is None
            else replace(part, share=replace(part.share, gains=None))
            for part in parts
        ]
        try:
            other = make(alike)
        except BudgetError:
            return wide
        if not self._may_stay_dense and wide.dropped != other.dropped:
            return wide
        return other if self._judge.is_better(other, wide) else wide

    def of_model(self, parameters: float, why: str) -> Plan:
        """The plan in which the whole model has no more than so many parameters."""

        def unreachable(parts: Sequence[Part]) -> BudgetError:
            return BudgetError(
                f"{why} cannot be met: with bond dimension 1 everywhere "
                f"{self.least} parameters are left of {self.inventory.parameters}. Ask for less, "
                "or force layouts of more sites."
            )

        def allowed(dense: int) -> float:
            return parameters - (self.inventory.parameters - dense)

        return self.at(allowed, why, unreachable=unreachable)

    def entry(self, part: Part, bond_dims: Sequence[int], reason: str) -> LayerPlan:
        """The row of a weight at bond dimensions."""
        candidate = make_candidate(part.layout, bond_dims, gauge=self.gauge)
        return compress_entry(part.site, candidate, reason)

    def plan(self, entries: dict[WeightSite, LayerPlan]) -> Plan:
        """A plan of these rows, in model order."""
        rows = tuple(entries[site] for site in self.inventory.sites)
        return Plan(settings=dict(self.settings), layers=rows)

    def _widened(self, part: Part, kept: float) -> Part:
        """The weight in another layout where its own is a bottleneck."""
        if not self._widens or part.forced or part.site.layouts() is not None:
            return part
        # Where what stays dense is not counted, plans that compress more layers win untried.
        tried = self._judge.tries and self._may_stay_dense
        found = find_bottleneck(part.site.shape, part.share, kept, tried=tried)
        if found is None:
            return part
        other = self._part(part.site, found.layout, None)
        if not isinstance(other, Part) or other.share.within(kept * other.share.dense) < 1:
            return part
        wide = replace(other, bottleneck=found)
        gains = self._judge.gains(wide, kept) if len(self.parts) > 1 else None
        return replace(wide, share=replace(wide.share, gains=gains))

    def _part(self, site: WeightSite, layout: Layout, gains: Gains | None) -> "Part | _Unfit":
        if (no_gain := why_no_gain(site)) is not None and self.objective.name != "size":
            return _Unfit(no_gain, by_objective=True)
        stored = cache(partial(stored_at, layout, self.gauge))  # asked for thousands of times
        dense = site.shape[0] * site.shape[1]
        bare = Share(
            name=site.name,
            dense=dense,
            max_bond_dim=max(layout.max_bond_dims(), default=0),
            stored=stored,
        )
        smaller = bare.within(dense - 1)
        if smaller == 0:
            return _Unfit("no bond dimension makes it smaller")
        top = self.objective.largest(site.shape, layout, smaller)
        if top == 0:
            return _Unfit(self.objective.refusal(site.shape, layout), by_objective=True)
        known = None
        if gains is not None and layout.is_svd:
            known = gains(site)
        price = None
        if self.objective.name != "size":
            price = partial(self._price, site.shape, layout, top)
        share = Share(
            name=site.name,
            dense=dense,
            max_bond_dim=top,
            stored=stored,
            gains=known,
            may_stay_dense=self._may_stay_dense,
            price=price,
        )
        return Part(site=site, layout=layout, share=share)

    def _price(self, shape: tuple[int, int], layout: Layout, top: int, bond: int) -> float:
        return self.objective.cost(shape, None if bond > top else layout, bond)

    def _shares(self, parts: Sequence[Part]) -> list[Share]:
        return [part.share for part in parts]

    def _fitting(
        self,
        taking_part: Sequence[Part],
        allowed: Callable[[int], float],
        entries: dict[WeightSite, LayerPlan],
        unreachable: Callable[[Sequence[Part]], BudgetError],
    ) -> tuple[list[Part], int]:
        """The weights that can take part, and how many numbers they may store together.

        Where nothing tells what a bond dimension is worth, one that even at bond dimension 1 is
        less compact than all of them must be on average stays dense. Where gains tell, dense or
        few bond dimensions are weighed against what the same numbers do elsewhere.
        """
        parts = list(taking_part)
        while parts:
            dense = sum(part.share.dense for part in parts)
            budget = int(allowed(dense))
            weighed = _weighed(self._shares(parts), budget)
            able = [
                part
                for part in parts
                if part.share in weighed
                or part.share.stored(1) * dense <= budget * part.share.dense
            ]
            if len(able) == len(parts):
                return parts, budget
            if not able:
                break
            for part in set(parts) - set(able):
                entries[part.site] = keep_entry(
                    part.site,
                    f"even bond dimension 1, {part.share.stored(1)} parameters of "
                    f"{part.share.dense}, is less compact than what all layers must be",
                )
            parts = able
        if not self.parts:
            raise self._nothing()
        # Nothing can be spared: all must be as small as they get.
        shares = self._shares(taking_part)
        if shares[0].may_stay_dense and least_numbers(shares) <= int(allowed(self.dense)):
            for part in taking_part:
                entries.pop(part.site, None)
            return list(taking_part), int(allowed(self.dense))
        raise unreachable(taking_part if shares[0].may_stay_dense else parts or taking_part)

    def _nothing(self) -> BudgetError | NoLayerMatched:
        """A budget that the objective puts out of reach, or no layer that could have one."""
        if self._refused:
            return BudgetError(
                f"no layer is worth compressing by {self.objective.name} "
                f"({'; '.join(self._refused[:2])}). Leave the objective at size if fewer "
                "parameters are wanted whatever they cost."
            )
        because = f" ({why_nothing(self.kept.values())})" if self.kept else ""
        return NoLayerMatched(
            f"nothing to compress: no selected layer gets smaller{because}. See "
            "`mpocompress inspect`."
        )


def _reason(why: str, how: str) -> str:
    return f"bond dimension from {why}, {how}"


def _weighed(shares: Sequence[Share], budget: int) -> list[Share]:
    """Those between whose bond dimensions, or dense form, gains can choose within the budget."""
    known = [share for share in shares if share.gains is not None and share.may_stay_dense]
    return known if len(known) >= 2 and least_numbers(shares) <= budget else []


def _allocate(shares: Sequence[Share], budget: int) -> list[int]:
    """By sensitivity among the layers whose gains are known; the others stay at uniform."""
    bonds = allocate_uniform(shares, budget)
    known = [index for index, share in enumerate(shares) if share.gains is not None]
    if len(known) < 2:
        return bonds
    rest = sum(
        share.numbers(bond)
        for share, bond in zip(shares, bonds, strict=True)
        if share.gains is None
    )
    better = allocate_by_sensitivity([shares[index] for index in known], budget - rest)
    for index, bond in zip(known, better, strict=True):
        bonds[index] = bond
    return bonds
