"""From an inventory of weights to a plan: one bond dimension for all layers."""

from collections.abc import Callable, Sequence

from mpocompress.errors import LayoutError, MPOCompressError
from mpocompress.mpo import Layout
from mpocompress.mpo.identity_gauge import Gauge, check_gauge
from mpocompress.mpo.truncate import check_bond_dim
from mpocompress.planning.entries import compress_entry, keep_entry, why_kept, why_no_gain
from mpocompress.planning.layout_rules import LayoutChoice, LayoutRules, describe_layout
from mpocompress.planning.layouts import (
    Candidate,
    candidates_within,
    choose,
    make_candidate,
    with_error,
)
from mpocompress.planning.objective import Objective
from mpocompress.planning.plan import CandidateFigures, LayerPlan, Plan
from mpocompress.surgery import Inventory, WeightSite, check_finite, select_sites
from mpocompress.surgery.match import as_patterns

Progress = Callable[[str, int, int], None]
"""Called with what is being worked on, how many are done, and of how many."""


def plan_bond_dim(
    inventory: Inventory,
    bond_dim: int,
    *,
    layout: LayoutChoice = "auto",
    sites: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    if_smaller: bool = True,
    gauge: Gauge = "none",
    tables: bool = True,
    objective: Objective | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan every selected weight at one bond dimension.

    Args:
        inventory: of the model.
        bond_dim: largest bond dimension of every layer.
        layout: "auto" tries degenerate, skewed, balanced and 3- to 4-site layouts and takes the
            one with the least weight error; otherwise one that is forced, for all layers or by
            layer pattern (layers that no pattern matches are planned as "auto").
        sites: force balanced layouts of so many sites.
        include: patterns of layers to compress; default: all.
        exclude: patterns of layers to keep.
        if_smaller: keep layers that would not get smaller.
        gauge: how the cores of all layers are stored; in the "identity" gauge a layer takes fewer
            parameters at the same bond dimensions.
        tables: whether embedding tables are among the layers that are meant by no pattern.
        objective: "macs" and "latency" keep layers dense that would cost more than they do now.
        progress: called once before each layer.

    Raises:
        BondDimError: `bond_dim` below 1.
        LayoutError: a forced layout that fits none of the layers that it is for, or no such gauge.
        NoLayerMatched: a pattern matches nothing, or nothing in the model can be compressed.
        ConversionError: NaN or Inf in a selected weight.
    """
    bond_dim = check_bond_dim(bond_dim)
    check_gauge(gauge)
    objective = objective or Objective()
    selected = {site.name for site in select_sites(inventory, include, exclude)}
    rules = LayoutRules(layout, sites, inventory, selected)
    layers = []
    for done, site in enumerate(inventory.sites):
        if progress is not None:
            progress(site.name, done, len(inventory.sites))
        if (kept := why_kept(site, selected, include, tables)) is not None:
            layers.append(keep_entry(site, kept, selected=site.name in selected))
            continue
        check_finite(site)
        try:
            layers.append(_plan_site(site, bond_dim, rules, if_smaller, gauge, objective))
        except MPOCompressError as error:
            raise type(error)(f"layer {site.label}: {error}") from error
    rules.check_used()
    settings = {
        "bond_dim": bond_dim,
        "layout": describe_layout(layout),
        "sites": sites,
        "include": list(as_patterns(include)),
        "exclude": list(as_patterns(exclude)),
        "if_smaller": if_smaller,
        "gauge": gauge,
    }
    if objective.name != "size":
        settings["objective"] = objective.name
    if objective.name == "latency":
        settings["batch"] = objective.batch
    return Plan(settings=settings, layers=tuple(layers))


def _plan_site(
    site: WeightSite,
    bond_dim: int,
    rules: LayoutRules,
    if_smaller: bool,
    gauge: Gauge,
    objective: Objective,
) -> LayerPlan:
    forced = rules.forced(site)
    if isinstance(forced, LayoutError):
        return keep_entry(site, f"the layout does not fit: {forced}")
    if (no_gain := why_no_gain(site)) is not None and objective.name != "size":
        return keep_entry(site, no_gain)
    if forced is not None:
        candidate = make_candidate(forced, bond_dim, gauge=gauge)
        if not objective.allows(site.shape, forced, candidate.bond_dims):
            return keep_entry(site, objective.refusal(site.shape, forced, candidate.bond_dims))
        return _forced(site, candidate, if_smaller)
    weight_OI = site.matrix()
    if if_smaller and min(site.shape) <= bond_dim:
        return keep_entry(
            site,
            f"its smaller side, {min(site.shape)}, is within bond dimension {bond_dim}: there is "
            "nothing to truncate",
        )
    candidates = candidates_within(site.shape, bond_dim, gauge=gauge, layouts=site.layouts())
    if not candidates:
        if if_smaller:
            return keep_entry(site, f"no layout at bond dimension {bond_dim} makes it smaller")
        candidates = [make_candidate(Layout.svd(*site.shape), bond_dim, gauge=gauge)]
    cheap = [c for c in candidates if objective.allows(site.shape, c.layout, c.bond_dims)]
    if not cheap:
        first = candidates[0]
        return keep_entry(site, objective.refusal(site.shape, first.layout, first.bond_dims))
    candidates = cheap
    measured = [with_error(candidate, weight_OI) for candidate in candidates]
    chosen = choose(measured)
    return compress_entry(
        site,
        chosen,
        f"least weight error of {len(measured)} layouts within bond dimension {bond_dim}",
        tuple(CandidateFigures.of(c, chosen=c is chosen) for c in measured),
    )


def _forced(site: WeightSite, candidate: Candidate, if_smaller: bool) -> LayerPlan:
    dense = site.shape[0] * site.shape[1]
    if if_smaller and candidate.parameters >= dense:
        return keep_entry(
            site,
            f"layout {candidate.layout} with bond dims {list(candidate.bond_dims)} would take "
            f"{candidate.parameters} parameters, not fewer than {dense}",
        )
    return compress_entry(site, candidate, f"layout {candidate.layout} was asked for")
