"""The rows of a plan: what becomes of one weight."""

from mpocompress.planning.layouts import Candidate
from mpocompress.planning.plan import CandidateFigures, LayerPlan
from mpocompress.surgery import WeightSite


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


def keep_entry(site: WeightSite, reason: str) -> LayerPlan:
    """A weight that stays dense, and why: one clause."""
    return LayerPlan(
        name=site.name,
        also_known_as=tuple(site.names[1:]),
        kind=site.kind,
        shape=site.shape,
        action="keep",
        reason=reason,
    )
