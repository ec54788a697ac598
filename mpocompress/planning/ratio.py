"""From an inventory of weights to a plan: bond dimensions that meet a ratio of parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Literal, get_args

from torch import Tensor

from mpocompress.errors import BudgetError, LayoutError, NoLayerMatched, PlanError
from mpocompress.mpo import Layout
from mpocompress.mpo.factors import balanced_layout
from mpocompress.mpo.identity_gauge import Gauge, check_gauge, stored_parameters
from mpocompress.planning.allocation import (
    Share,
    allocate_by_sensitivity,
    allocate_uniform,
    least_numbers,
)
from mpocompress.planning.entries import compress_entry, keep_entry, why_kept
from mpocompress.planning.layout_rules import LayoutChoice, LayoutRules, describe_layout
from mpocompress.planning.layouts import make_candidate
from mpocompress.planning.plan import LayerPlan, Plan
from mpocompress.planning.planner import Progress
from mpocompress.surgery import Inventory, WeightSite, check_finite, select_sites

# With healing, a layer with fewer numbers between its two factors than this, and that lose more
# than this share of what matters, gets four sites. On a digit classifier such layers heal worst by
# far, and four sites best; above, all layouts come out alike (benchmarks/digits_extreme.py).
_NARROW = 16
_LOST = 0.02
_SITES = 4

Of = Literal["model", "layers"]
"""What a ratio counts: all parameters of the model, or those of the layers that get compressed."""

Gains = Callable[[WeightSite], Tensor | None]
"""What each further bond dimension of the layout ((out, 1), (1, in)) is worth, if known."""


def plan_ratio(
    inventory: Inventory,
    ratio: float,
    *,
    of: Of = "model",
    gains: Gains | None = None,
    layout: LayoutChoice = "auto",
    sites: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    gauge: Gauge = "none",
    healed: bool = False,
    tables: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Plan bond dimensions that make the parameters `ratio` times fewer, or slightly more so.

    Args:
        inventory: of the model.
        ratio: parameters before / after, above 1; a ceiling for what is stored.
        of: "model" counts all parameters of the model, "layers" those of the compressed layers.
        gains: per layer, see `allocation`; layers without them share the uniform ratio.
        layout: "auto" is the layout ((out, 1), (1, in)), whose errors are known at every bond
            dimension, except where `_as_auto` finds it a bottleneck; otherwise one that is
            forced, as in `plan_bond_dim`.
        sites: force balanced layouts of so many sites.
        include: patterns of layers to compress; default: all.
        exclude: patterns of layers to keep.
        gauge: how the cores are stored.
        healed: the compressed model will be trained to do what the dense one does.
        tables: whether embedding tables are among the layers that are meant by no pattern.
        progress: called once before each layer.

    Raises:
        PlanError: a ratio that is no finite number above 1, or `of` something else.
        BudgetError: it cannot be reached; the message says what can.
        LayoutError, NoLayerMatched, ConversionError: as in `plan_bond_dim`.
    """
    if not (isfinite(ratio) and ratio > 1):
        raise PlanError(f"ratio {ratio!r}: it is parameters before / after and above 1. Try 2.")
    if of not in get_args(Of):
        raise PlanError(f'of {of!r}: a ratio counts "model" or "layers".')
    check_gauge(gauge)
    selected = {site.name for site in select_sites(inventory, include, exclude)}
    rules = LayoutRules(layout, sites, inventory, selected)
    entries: dict[WeightSite, LayerPlan] = {}
    parts: list[_Part] = []
    for done, site in enumerate(inventory.sites):
        if progress is not None:
            progress(site.name, done, len(inventory.sites))
        if (kept := why_kept(site, selected, include, tables)) is not None:
            entries[site] = keep_entry(site, kept)
            continue
        check_finite(site)
        forced = rules.forced(site)
        if isinstance(forced, LayoutError):
            entries[site] = keep_entry(site, f"the layout does not fit: {forced}")
            continue
        part = _part(site, forced, gauge, gains)
        if part.share.max_bond_dim == 0:
            entries[site] = keep_entry(site, "no bond dimension makes it smaller")
        else:
            parts.append(part)
    rules.check_used()
    dense = sum(part.share.dense for part in parts)
    share = _budget(inventory, ratio, of, dense) / dense if dense else 0.0
    parts = [part if part.forced else _as_auto(part, share, gauge, healed) for part in parts]
    parts, budget = _fitting(parts, inventory, ratio, of, entries)
    for part, bond in zip(parts, _allocate([part.share for part in parts], budget), strict=True):
        entries[part.site] = compress_entry(
            part.site,
            make_candidate(part.layout, bond, gauge=gauge),
            f"bond dimension from a ratio of {ratio:g} of the {of}, {part.how}{part.why}",
        )
    return Plan(
        settings={
            "ratio": ratio,
            "of": of,
            "layout": describe_layout(layout),
            "sites": sites,
            "include": list(include),
            "exclude": list(exclude),
            "gauge": gauge,
        },
        layers=tuple(entries[site] for site in inventory.sites),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Part:
    """A weight that may be compressed, its layout, and its share of the budget."""

    site: WeightSite
    layout: Layout
    share: Share
    forced: bool
    total_gain: float = 0.0
    why: str = ""

    @property
    def how(self) -> str:
        """How its bond dimension is found, for the plan's reader."""
        if self.share.gains is None:
            return "the same for all layers"
        return "by what an error here does to the model's output"


def _part(site: WeightSite, forced: Layout | None, gauge: Gauge, gains: Gains | None) -> _Part:
    layout = forced or Layout.svd(*site.shape)
    known = None
    if gains is not None and layout.pairs == Layout.svd(*site.shape).pairs:
        known = gains(site)
    share = _share(site, layout, gauge, known)
    total = 0.0 if known is None else float(known.sum())
    return _Part(site=site, layout=layout, share=share, forced=forced is not None, total_gain=total)


def _share(site: WeightSite, layout: Layout, gauge: Gauge, gains: Tensor | None) -> Share:
    whole = Share(
        name=site.name,
        dense=site.shape[0] * site.shape[1],
        max_bond_dim=max(layout.max_bond_dims(), default=0),
        stored=partial(_stored, layout, gauge),
    )
    top = whole.within(whole.dense - 1)
    return replace(whole, max_bond_dim=top, gains=None if gains is None else gains[:top])


def _as_auto(part: _Part, share: float, gauge: Gauge, healed: bool) -> _Part:
    """The layer in four sites instead of ((out, 1), (1, in)), where that is a bottleneck.

    A bond dimension D of the latter lets D numbers through, whatever is trained; an MPO of as many
    parameters has full matrix rank, and healing makes up for its larger error at first. So with
    healing ahead, few numbers that carry too little of what matters decide for more sites.

    Args:
        part: of the layout ((out, 1), (1, in)).
        share: of its parameters that a layer may keep.
        gauge: how cores are stored.
        healed: whether healing follows.
    """
    if not healed or min(part.site.shape) <= _NARROW:  # as narrow as that from the beginning
        return part
    bond = part.share.within(share * part.share.dense)
    lost = 1.0
    if bond > 0:
        gains = part.share.gains
        if gains is None or bond >= _NARROW:
            return part
        lost = 1 - float(gains[:bond].sum()) / part.total_gain
        if lost <= _LOST:
            return part
    layout = balanced_layout(*part.site.shape, _SITES)
    found = _share(part.site, layout, gauge, None)
    if found.within(share * found.dense) < 1:
        return part
    why = (
        f"; {_SITES} sites, for healing follows, and {bond} numbers between two factors would lose "
        f"{lost:.0%} of what matters"
    )
    return replace(part, layout=layout, share=found, why=why)


def _stored(layout: Layout, gauge: Gauge, bond_dim: int) -> int:
    bonds = layout.clip([bond_dim] * (layout.num_sites - 1))
    return stored_parameters(layout, bonds, gauge) if bond_dim > 0 else 0


def _fitting(
    parts: Sequence[_Part],
    inventory: Inventory,
    ratio: float,
    of: Of,
    entries: dict[WeightSite, LayerPlan],
) -> tuple[list[_Part], int]:
    """The weights that can take part, and how many numbers they may store together.

    One that even at bond dimension 1 is less compact than all of them must be on average would
    only take from the others; it stays dense.
    """
    parts = list(parts)
    while parts:
        dense = sum(part.share.dense for part in parts)
        budget = _budget(inventory, ratio, of, dense)
        least = [
            part for part in parts if part.share.stored(1) * dense <= budget * part.share.dense
        ]
        if len(least) == len(parts):
            return parts, budget
        if not least:
            raise _unreachable(parts, inventory, ratio, of)
        for part in set(parts) - set(least):
            entries[part.site] = keep_entry(
                part.site,
                f"even bond dimension 1, {part.share.stored(1)} parameters of "
                f"{part.share.dense}, is less compact than the ratio asks of all layers",
            )
        parts = least
    raise NoLayerMatched(
        "nothing to compress: no selected layer gets smaller. See `mpocompress inspect`."
    )


def _budget(inventory: Inventory, ratio: float, of: Of, dense: int) -> int:
    """What layers of `dense` numbers may store together."""
    if of == "layers":
        return int(dense / ratio)
    return int(inventory.parameters / ratio) - (inventory.parameters - dense)


def _unreachable(parts: Sequence[_Part], inventory: Inventory, ratio: float, of: Of) -> BudgetError:
    dense = sum(part.share.dense for part in parts)
    least = least_numbers([part.share for part in parts])
    before = dense if of == "layers" else inventory.parameters
    reachable = before / (before - dense + least)
    return BudgetError(
        f"a ratio of {ratio:g} of the {of} cannot be met: with bond dimension 1 everywhere it is "
        f"{reachable:.4g}, since {before - dense} parameters stay as they are. Ask for less, "
        'count the compressed layers only (of="layers"), or force layouts of more sites.'
    )


def _allocate(shares: Sequence[Share], budget: int) -> list[int]:
    """By sensitivity among the layers whose gains are known; the others stay at uniform."""
    bonds = allocate_uniform(shares, budget)
    known = [index for index, share in enumerate(shares) if share.gains is not None]
    if len(known) < 2:
        return bonds
    rest = sum(
        share.stored(bond) for share, bond in zip(shares, bonds, strict=True) if share.gains is None
    )
    better = allocate_by_sensitivity([shares[index] for index in known], budget - rest)
    for index, bond in zip(known, better, strict=True):
        bonds[index] = bond
    return bonds
