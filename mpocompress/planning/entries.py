"""The rows of a plan: what becomes of one weight."""

from collections.abc import Collection, Iterable, Sequence

from mpocompress.planning.layouts import Candidate
from mpocompress.planning.plan import CandidateFigures, LayerPlan
from mpocompress.surgery import WeightSite
from mpocompress.surgery.inventory import label

_SHOWN = 3


def compress_entry(
    site: WeightSite,
    candidate: Candidate,
    reason: str,
    candidates: tuple[CandidateFigures, ...] = (),
) -> LayerPlan:
    """A weight that becomes an MPO of the candidate's layout and bond dimensions."""
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


def keep_entry(site: WeightSite, reason: str, *, selected: bool = True) -> LayerPlan:
    """A weight that stays dense, and why: one clause. What is not selected stays as it is."""
    return LayerPlan(
        name=site.name,
        also_known_as=tuple(site.names[1:]),
        kind=site.kind,
        shape=site.shape,
        action="keep",
        reason=reason,
        selected=selected,
        corrects=selected and site.adapter.kind == "linear" and len(site.modules) == 1,
    )


LOOKED_UP = "its rows are looked up, which costs next to nothing and would cost more as an MPO"
REBUILT = "a recurrent operator reads it dense: as an MPO it needs no fewer multiply-adds"
"""Why a weight stays dense that is small in the file only, where that is not what is asked for."""


def why_kept(
    site: WeightSite, selected: Collection[str], include: Sequence[str], tables: bool
) -> str | None:
    """Why a weight is not to be compressed at all, or None.

    A table that is truncated by its entries alone loses what the frequent rows have in common:
    without data it is compressed only if it is asked for.
    """
    if site.name not in selected:
        return "not selected by the include and exclude patterns"
    if site.adapter.looks_up and not tables and not include:
        return (
            "an embedding table, and without data it is not known which rows matter; give data, "
            "or include it by name"
        )
    return None


def why_nothing(layers: Iterable[LayerPlan]) -> str:
    """Why nothing is compressed: the largest layers that were meant, each with its reason.

    Of all layers where none was meant, as in a plan that was edited.
    """
    everything = list(layers)
    meant = [layer for layer in everything if layer.selected] or everything
    largest = sorted(meant, key=lambda layer: -layer.shape[0] * layer.shape[1])
    shown = [f"{label(layer.name)}: {layer.reason}" for layer in largest[:_SHOWN]]
    more = f"; and {len(meant) - _SHOWN} more" if len(meant) > _SHOWN else ""
    return "; ".join(shown) + more


def why_no_gain(site: WeightSite) -> str | None:
    """Why a weight gains neither multiply-adds nor time (one clause); None if it may."""
    if site.rebuilt:
        return REBUILT
    return LOOKED_UP if site.looked_up else None
