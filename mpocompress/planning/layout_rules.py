"""Which layout is forced on which layer."""

from collections.abc import Collection, Mapping

from mpocompress.errors import LayoutError, NoLayerMatched
from mpocompress.mpo import Layout, LayoutLike, as_layout
from mpocompress.mpo.factors import carrying_layout, check_sites, resolve_layout
from mpocompress.surgery import Inventory, WeightSite, select_sites

LayoutChoice = LayoutLike | Mapping[str, LayoutLike]
"""A layout for all layers, or a dict from layer pattern to layout; "auto" is one, too."""

_NAMED = ("auto", "svd", "balanced")


class LayoutRules:
    """Which layout is forced on which layer, and whether each rule was of use to any."""

    def __init__(
        self,
        layout: LayoutChoice,
        sites: int | None,
        inventory: Inventory,
        selected: Collection[str],
    ) -> None:
        if sites is not None:
            sites = check_sites(sites)
            if layout != "auto":
                raise LayoutError(
                    f"sites {sites} and layout {layout!r} both force a layout; give one of them."
                )
        by_pattern = layout if isinstance(layout, Mapping) else {"*": layout}
        # Text that cannot be read is refused here, before any layer is looked at.
        self._rules: dict[str, LayoutLike | int] = {
            pattern: rule if rule in _NAMED else as_layout(rule)
            for pattern, rule in by_pattern.items()
        }
        if sites is not None:
            self._rules["*"] = sites
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
        for pattern, rule in self._rules.items():
            if site.name not in self._meant[pattern]:
                continue
            if rule == "auto":
                return None
            try:
                if isinstance(rule, int):
                    found = carrying_layout(*site.shape, rule)
                else:
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


def describe_layout(layout: LayoutChoice) -> str | dict[str, str]:
    """The choice as text, for the plan's settings."""
    if isinstance(layout, Mapping):
        return {pattern: _describe_one(rule) for pattern, rule in layout.items()}
    return _describe_one(layout)


def _describe_one(layout: LayoutLike) -> str:
    return str(layout) if isinstance(layout, str | Layout) else str(as_layout(layout))
