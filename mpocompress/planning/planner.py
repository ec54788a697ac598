"""From an inventory of weights to a plan: one bond dimension for all layers."""

from collections.abc import Callable, Collection, Mapping, Sequence

from mpocompress.errors import LayoutError, MPOCompressError, NoLayerMatched
from mpocompress.mpo import Layout, LayoutLike, as_layout
from mpocompress.mpo.factors import balanced_layout, resolve_layout
from mpocompress.mpo.identity_gauge import Gauge, check_gauge
from mpocompress.mpo.truncate import check_bond_dim
from mpocompress.planning.layouts import (
    Candidate,
    candidates_within,
    choose,
    make_candidate,
    with_error,
)
from mpocompress.planning.plan import CandidateFigures, LayerPlan, Plan
from mpocompress.surgery import Inventory, WeightSite, check_finite, select_sites

LayoutChoice = LayoutLike | Mapping[str, LayoutLike]
"""A layout for all layers, or a dict from layer pattern to layout; "auto" is one, too."""

_NAMED = ("auto", "svd", "balanced")

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
        progress: called once before each layer.

    Raises:
        BondDimError: `bond_dim` below 1.
        LayoutError: a forced layout that fits none of the layers that it is for, or no such gauge.
        NoLayerMatched: a pattern matches nothing, or nothing in the model can be compressed.
        ConversionError: NaN or Inf in a selected weight.
    """
    check_bond_dim(bond_dim)
    check_gauge(gauge)
    if sites is not None:
        if layout != "auto":
            raise LayoutError(
                f"sites {sites} and layout {layout!r} both force a layout; give one of them."
            )
        balanced_layout(1, 1, sites)  # refuses fewer than one site
    selected = {site.name for site in select_sites(inventory, include, exclude)}
    rules = _LayoutRules(layout, sites, inventory, selected)
    layers = []
    for done, site in enumerate(inventory.sites):
        if progress is not None:
            progress(site.name, done, len(inventory.sites))
        if site.name not in selected:
            layers.append(_keep(site, "not selected by the include and exclude patterns"))
            continue
        check_finite(site)
        try:
            layers.append(_plan_site(site, bond_dim, rules, if_smaller, gauge))
        except MPOCompressError as error:
            raise type(error)(f"layer {site.label}: {error}") from error
    rules.check_used()
    return Plan(
        settings={
            "bond_dim": bond_dim,
            "layout": _describe(layout),
            "sites": sites,
            "include": list(include),
            "exclude": list(exclude),
            "if_smaller": if_smaller,
            "gauge": gauge,
        },
        layers=tuple(layers),
    )


class _LayoutRules:
    """Which layout is forced on which layer, and whether each rule was of use to any."""

    def __init__(
        self,
        layout: LayoutChoice,
        sites: int | None,
        inventory: Inventory,
        selected: Collection[str],
    ) -> None:
        self._sites = sites
        by_pattern = layout if isinstance(layout, Mapping) else {"*": layout}
        # Text that cannot be read is refused here, before any layer is looked at.
        self._rules: dict[str, LayoutLike] = {
            pattern: rule if rule in _NAMED else as_layout(rule)
            for pattern, rule in by_pattern.items()
        }
        self._refusals: dict[str, list[LayoutError]] = {pattern: [] for pattern in self._rules}
        self._fits: set[str] = set()
        self._meant: dict[str, set[str]] = {}
        for pattern in self._rules:
            try:
                found = {site.name for site in select_sites(inventory, [pattern])}
            except NoLayerMatched as error:
                raise NoLayerMatched(f"layout by pattern: {error}") from None
            if found.isdisjoint(selected):
                raise NoLayerMatched(
                    f"layout by pattern: {pattern!r} matches only layers that are not selected, "
                    f"such as {min(found)!r}. Include them, or drop the pattern."
                )
            self._meant[pattern] = found

    def forced(self, site: WeightSite) -> Layout | LayoutError | None:
        """The forced layout, the reason why it does not fit, or None for "auto"."""
        if self._sites is not None:
            return balanced_layout(*site.shape, self._sites)
        for pattern, rule in self._rules.items():
            if site.name not in self._meant[pattern]:
                continue
            if rule == "auto":
                return None
            try:
                found = resolve_layout(rule, *site.shape)
            except LayoutError as error:
                self._refusals[pattern].append(error)
                return error
            self._fits.add(pattern)
            return found
        return None

    def check_used(self) -> None:
        """Raise the first refusal of a rule that fitted no layer at all."""
        for pattern, refusals in self._refusals.items():
            if refusals and pattern not in self._fits:
                raise LayoutError(str(refusals[0]))


def _plan_site(
    site: WeightSite, bond_dim: int, rules: _LayoutRules, if_smaller: bool, gauge: Gauge
) -> LayerPlan:
    forced = rules.forced(site)
    if isinstance(forced, LayoutError):
        return _keep(site, f"the layout does not fit: {forced}")
    if forced is not None:
        candidate = make_candidate(forced, bond_dim, gauge=gauge)
        return _forced(site, candidate, if_smaller)
    weight_OI = site.matrix()
    if if_smaller and min(site.shape) <= bond_dim:
        return _keep(
            site,
            f"its smaller side, {min(site.shape)}, is within bond dimension {bond_dim}: there is "
            "nothing to truncate",
        )
    candidates = candidates_within(site.shape, bond_dim, gauge=gauge)
    if not candidates:
        if if_smaller:
            return _keep(site, f"no layout at bond dimension {bond_dim} makes it smaller")
        candidates = [make_candidate(Layout.svd(*site.shape), bond_dim, gauge=gauge)]
    measured = [with_error(candidate, weight_OI) for candidate in candidates]
    chosen = choose(measured)
    return _compress(
        site,
        chosen,
        f"least weight error of {len(measured)} layouts within bond dimension {bond_dim}",
        tuple(CandidateFigures.of(c, chosen=c is chosen) for c in measured),
    )


def _forced(site: WeightSite, candidate: Candidate, if_smaller: bool) -> LayerPlan:
    dense = site.shape[0] * site.shape[1]
    if if_smaller and candidate.parameters >= dense:
        return _keep(
            site,
            f"layout {candidate.layout} with bond dims {list(candidate.bond_dims)} would take "
            f"{candidate.parameters} parameters, not fewer than {dense}",
        )
    return _compress(site, candidate, f"layout {candidate.layout} was asked for", ())


def _compress(
    site: WeightSite,
    candidate: Candidate,
    reason: str,
    candidates: tuple[CandidateFigures, ...],
) -> LayerPlan:
    return LayerPlan(
        name=site.name,
        also_known_as=tuple(site.names[1:]),
        kind=site.kind,
        shape=site.shape,
        action="compress",
        reason=reason,
        layout=candidate.layout.pairs,
        bond_dims=candidate.bond_dims,
        gauge=candidate.gauge,
        candidates=candidates,
    )


def _keep(site: WeightSite, reason: str) -> LayerPlan:
    return LayerPlan(
        name=site.name,
        also_known_as=tuple(site.names[1:]),
        kind=site.kind,
        shape=site.shape,
        action="keep",
        reason=reason,
    )


def _describe(layout: LayoutChoice) -> str | dict[str, str]:
    if isinstance(layout, Mapping):
        return {pattern: _describe_one(rule) for pattern, rule in layout.items()}
    return _describe_one(layout)


def _describe_one(layout: LayoutLike) -> str:
    return str(layout) if isinstance(layout, str | Layout) else str(as_layout(layout))
