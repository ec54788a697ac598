"""Which layers a user means: include and exclude patterns on qualified names.

A pattern is a glob, case sensitive, where `*` also crosses dots ("encoder.*.query"), or a regular
expression after `re:` that must match the whole name. Every pattern must match something: a typo
that silently left a layer dense, or compressed it, would be found out by its result at best.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from fnmatch import fnmatchcase

from mpocompress.errors import NoLayerMatched
from mpocompress.surgery.inventory import Inventory, WeightSite, label

_REGEX = "re:"
_NEAREST = 3


def select(
    names: Sequence[str],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    aliases: Mapping[str, Sequence[str]] | None = None,
    refused: Mapping[str, str] | None = None,
) -> frozenset[str]:
    """The names that are included and not excluded.

    Args:
        names: the layers there are to choose from.
        include: patterns; empty for all. One string is one pattern.
        exclude: patterns; they win over `include`.
        aliases: name -> further names of the same weight. It is chosen if any of its names is
            included and none is excluded.
        refused: name of a layer that exists but cannot be chosen -> why. A pattern may match such
            layers; an include pattern must match another one too.

    Returns:
        A subset of `names`.

    Raises:
        NoLayerMatched: nothing to choose from, a pattern that matches nothing or is not a regular
            expression, or everything excluded. The message has the nearest names.
    """
    refused = refused or {}
    aliases = aliases or {}
    include, exclude = as_patterns(include), as_patterns(exclude)
    all_names = {name: (name, *aliases.get(name, ())) for name in names}
    if not all_names:
        raise NoLayerMatched(
            "nothing to choose from: there is no layer that can be converted"
            f"{_listed(refused, include)}."
        )

    def hits(pattern: str, option: str) -> frozenset[str]:
        is_hit = _matcher(pattern, option)
        found = frozenset(name for name, own in all_names.items() if any(map(is_hit, own)))
        kept = {name: reason for name, reason in refused.items() if is_hit(name)}
        if found or (option == "exclude" and kept):
            return found
        known = [name for own in all_names.values() for name in own]
        raise NoLayerMatched(
            f"{option} pattern '{pattern}' {_what_instead(pattern, is_hit, known, refused, kept)}"
        )

    included = frozenset(all_names)
    if include:
        included = frozenset().union(*(hits(pattern, "include") for pattern in include))
    excluded = frozenset().union(*(hits(pattern, "exclude") for pattern in exclude))
    if included <= excluded:
        in_order = [name for name in all_names if name in included]
        raise NoLayerMatched(
            f"every layer that could be converted ({_quoted(in_order)}) is excluded by "
            f"{', '.join(map(repr, exclude))}. Exclude less."
        )
    return included - excluded


def select_sites(
    inventory: Inventory, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[WeightSite, ...]:
    """The convertible weights that are included and not excluded, in model order.

    Raises:
        NoLayerMatched: see `select`.
    """
    sites = inventory.sites
    chosen = select(
        [site.name for site in sites],
        include,
        exclude,
        aliases={site.name: site.names[1:] for site in sites},
        refused=inventory.refused,
    )
    return tuple(site for site in sites if site.name in chosen)


def as_patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    """Patterns one by one. A string is a sequence of strings, too; nobody means its letters."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matcher(pattern: str, option: str) -> Callable[[str], bool]:
    if not pattern.startswith(_REGEX):
        return lambda name: fnmatchcase(name, pattern)
    try:
        expression = re.compile(pattern.removeprefix(_REGEX))
    except re.error as error:
        raise NoLayerMatched(
            f"{option} pattern '{pattern}' is not a regular expression: {error}. Drop the "
            f"'{_REGEX}' if a glob is meant."
        ) from error
    return lambda name: expression.fullmatch(name) is not None


def _what_instead(
    pattern: str,
    is_hit: Callable[[str], bool],
    names: Sequence[str],
    refused: Mapping[str, str],
    kept: Mapping[str, str],
) -> str:
    """What a pattern without a match met instead, and what to write."""
    if kept:
        return (
            f"matches only what stays dense{_listed(kept, [pattern])}. Layers that can be "
            f"converted: {_quoted(_nearest([pattern], names))}."
        )
    parents = {name[:end] for name in names for end, letter in enumerate(name) if letter == "."}
    if any(map(is_hit, parents)):
        below = f"{pattern}{'[.].*' if pattern.startswith(_REGEX) else '.*'}"
        return f"names a module, not a layer. For all layers below it write '{below}'."
    near = _nearest([pattern], [*names, *refused])[:_NEAREST]
    shown = [f"{label(n)} (stays dense: {refused[n]})" if n in refused else label(n) for n in near]
    return f"matches no layer. Nearest names: {', '.join(shown)}."


def _nearest(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names, those first that are most like a pattern, as a whole or in the last component."""
    texts = [pattern.removeprefix(_REGEX).strip("*^$.").lower() for pattern in patterns]

    def likeness(name: str) -> tuple[float, float]:
        lower = name.lower()
        found = [(0.0, 0.0)]
        for text in texts:
            whole = SequenceMatcher(None, text, lower).ratio()
            tails = text.rpartition(".")[2], lower.rpartition(".")[2]
            found.append((max(whole, SequenceMatcher(None, *tails).ratio()), whole))
        return max(found)

    return sorted(dict.fromkeys(names), key=likeness, reverse=True)


def _quoted(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NEAREST} more" if len(names) > _NEAREST else ""
    return ", ".join(map(label, names[:_NEAREST])) + more


def _listed(reasons: Mapping[str, str], patterns: Sequence[str]) -> str:
    """The layers that stay dense, nearest to the patterns, with the reasons: ends a sentence."""
    if not reasons:
        return ""
    near = _nearest(patterns, reasons)[:_NEAREST]
    shown = [f"{label(name)} ({reasons[name]})" for name in near]
    more = f" and {len(reasons) - _NEAREST} more" if len(reasons) > _NEAREST else ""
    return ": " + ", ".join(shown) + more
