"""Weights that are told as one, so that a model of a thousand tensors fits on a page."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mpocompress.report.layer import LayerReport
from mpocompress.report.schema import CompressionReport
from mpocompress.report.wording import Code, plural, reason_text

# Colours in the picture: more groups than this are drawn as one.
MAX_COMPRESSED_GROUPS = 6
MAX_KEPT_GROUPS = 3
# Two or more groups narrower than this share of the bar are drawn as one.
_SMALLEST_SHARE = 0.004

# A part of a dotted name that is nothing but a number.
_NUMBER_PART = re.compile(r"(?<![^.])\d+(?![^.])")

_KIND_NOUNS = {
    "linear": "linear weight",
    "matrix": "matrix",
    "embedding": "embedding table",
    "conv": "convolution weight",
    "norm": "normalization weight",
    "bias": "bias",
    "buffer": "buffer",
    "attention": "attention weight",
    "recurrent": "recurrent weight",
    "quantized": "quantized weight",
    "mpo": "core of an MPO",
    "other": "other tensor",
}
_KIND_PLURALS = {"matrix": "matrices", "bias": "biases", "core of an MPO": "cores of MPOs"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Weights that are told as one: the same name but for numbers in it, and the same status.

    `label` is their name, or in words what they are if they have none in common.
    """

    label: str | Code
    status: Literal["compressed", "kept"]
    layers: tuple[LayerReport, ...]

    @property
    def dense(self) -> int:
        """Parameters before."""
        return sum(layer.parameters.dense for layer in self.layers)

    @property
    def compressed(self) -> int:
        """Parameters after."""
        return sum(layer.parameters.compressed for layer in self.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptGroup:
    """Kept weights of one kind."""

    title: str
    reason: str | None
    layers: tuple[LayerReport, ...]
    parameters: int
    share: float


def parameter_groups(report: CompressionReport) -> tuple[Group, ...]:
    """Groups for the picture of where the parameters went: compressed first, largest first.

    Where there are more layers than colours, those of one shape whose names differ only in numbers
    are one group, `encoder.layer.*.query`. At most `MAX_COMPRESSED_GROUPS` and `MAX_KEPT_GROUPS`;
    the smallest share one.
    """
    smallest = _SMALLEST_SHARE * report.totals.parameters.model.dense
    compressed = _group(report.compressed_layers, MAX_COMPRESSED_GROUPS)
    kept = _group(report.kept_layers, MAX_KEPT_GROUPS)
    return (
        *_fold(compressed, MAX_COMPRESSED_GROUPS, smallest, _name_compressed_rest),
        *_fold(kept, MAX_KEPT_GROUPS, smallest, _name_kept_rest),
    )


def kept_groups(report: CompressionReport) -> tuple[KeptGroup, ...]:
    """Kept weights by kind, largest first."""
    total = report.totals.parameters.model.compressed
    by_kind: dict[str, list[LayerReport]] = {}
    for layer in report.kept_layers:
        by_kind.setdefault(layer.kind, []).append(layer)
    groups = []
    for kind, layers in by_kind.items():
        parameters = sum(layer.parameters.compressed for layer in layers)
        reasons = {reason_text(layer) for layer in layers}
        groups.append(
            KeptGroup(
                title=_count_kind(kind, len(layers)),
                reason=reasons.pop() if len(reasons) == 1 else None,
                layers=tuple(layers),
                parameters=parameters,
                share=parameters / total if total else 0.0,
            )
        )
    return tuple(sorted(groups, key=lambda group: -group.parameters))


def _count_kind(kind: str, count: int) -> str:
    noun = _KIND_NOUNS.get(kind, kind)
    return plural(count, noun, _KIND_PLURALS.get(noun))


def _group(layers: Sequence[LayerReport], limit: int) -> list[Group]:
    by_pattern: dict[tuple[str, tuple[int, ...]], list[LayerReport]] = {}
    for layer in layers:
        pattern = layer.name if len(layers) <= limit else _NUMBER_PART.sub("*", layer.name)
        by_pattern.setdefault((pattern, tuple(layer.shape)), []).append(layer)
    groups = [
        Group(
            # A pattern of one is its name; numbers are worth a star only if they vary.
            label=Code(pattern if len(members) > 1 else members[0].name),
            status=members[0].status,
            layers=tuple(members),
        )
        for (pattern, _), members in by_pattern.items()
    ]
    return sorted(groups, key=lambda group: -group.dense)


def _fold(
    groups: Sequence[Group],
    limit: int,
    smallest: float,
    label: Callable[[list[LayerReport]], str],
) -> list[Group]:
    """Make one group of those beyond the limit, and of those too small to be seen."""
    seen = [group for group in groups if group.dense >= smallest]
    if len(groups) <= limit and len(groups) - len(seen) < 2:
        return list(groups)
    own = max(1, min(len(seen), limit - 1))
    rest = [layer for group in groups[own:] for layer in group.layers]
    folded = Group(label=label(rest), status=rest[0].status, layers=tuple(rest))
    return [*groups[:own], folded]


def _name_compressed_rest(layers: list[LayerReport]) -> str:
    return plural(len(layers), "more compressed layer")


def _name_kept_rest(layers: list[LayerReport]) -> str:
    kinds = {layer.kind for layer in layers}
    if len(kinds) == 1:
        return _count_kind(kinds.pop(), len(layers))
    return plural(len(layers), "more kept tensor")
