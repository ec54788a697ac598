"""Candidate layouts of one weight within a bond dimension, their errors, and the choice.

A bond dimension D is a budget: the degenerate layout ((out, 1), (1, in)), which is the truncated
SVD, spends D * (out + in) parameters on it. Every candidate is held to that, so that choosing a
layout never makes a layer larger than the SVD of the same bond dimension. In the identity gauge
both are counted by their degrees of freedom: D * (out + in) - D^2 for the SVD.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

from torch import Tensor

from mpocompress.mpo import Layout, plan_contractions, sequential_svd
from mpocompress.mpo.factors import balanced_layout, divisors
from mpocompress.mpo.identity_gauge import Gauge, stored_parameters
from mpocompress.mpo.linalg import leading_weight, working_dtype

MAX_SITES = 4
_SKEWED = 4  # skewed two-site layouts tried, spread over the divisors
# Errors this close are a tie: the difference is below what truncating weights can tell apart.
_NEAR_TIE = 1.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One layout of a weight at its bond dimensions.

    Attributes:
        layout: the sites.
        bond_dims: after clipping to what the layout can carry.
        parameters: stored numbers: entries of all cores or, in the identity gauge, the degrees of
            freedom.
        macs: multiply-adds for one input row along the cheapest chain.
        relative_weight_error: norm(W - W_mpo) / norm(W), Frobenius; None if not computed.
        gauge: how the cores are stored.
    """

    layout: Layout
    bond_dims: tuple[int, ...]
    parameters: int
    macs: int
    relative_weight_error: float | None = None
    gauge: Gauge = "none"


def make_candidate(
    layout: Layout,
    bond_dim: int | Sequence[int],
    error: float | None = None,
    *,
    gauge: Gauge = "none",
) -> Candidate:
    """A candidate with its costs; the bond dimensions are clipped to the layout."""
    bonds = [bond_dim] * (layout.num_sites - 1) if isinstance(bond_dim, int) else list(bond_dim)
    bond_dims = layout.clip(bonds)
    return Candidate(
        layout=layout,
        bond_dims=bond_dims,
        parameters=stored_parameters(layout, bond_dims, gauge),
        macs=chain_macs(layout, bond_dims),
        relative_weight_error=error,
        gauge=gauge,
    )


def chain_macs(layout: Layout, bond_dims: Sequence[int]) -> int:
    """Multiply-adds for one input row along the cheapest chain of unmerged cores."""
    plans = plan_contractions(layout.out_dims, layout.in_dims, tuple(bond_dims))
    return plans.chain.macs_per_row


def candidate_layouts(out_features: int, in_features: int) -> list[Layout]:
    """Degenerate, skewed and balanced two-site layouts, then balanced ones of 3 and 4 sites.

    Skewed sites (o, i) have o * i near the root of all entries, so that both cores are about
    equally large, but share rows and columns unequally. Order: simplest first.
    """
    found = [Layout.svd(out_features, in_features)]
    found += _skewed_layouts(out_features, in_features)
    found += [balanced_layout(out_features, in_features, k) for k in range(2, MAX_SITES + 1)]
    # The SVD from the other side is the SVD, and a site of size 1x1 carries nothing.
    mirrored = Layout((1, out_features), (in_features, 1))
    return [
        layout
        for layout in dict.fromkeys(found)
        if layout != mirrored and (1, 1) not in layout.pairs
    ]


def _skewed_layouts(out_features: int, in_features: int) -> list[Layout]:
    budget = out_features + in_features  # what the SVD spends, per unit of bond dimension
    choices: list[tuple[float, Layout]] = []
    for out in divisors(out_features):
        fitting = [
            (abs(log(out * in_ / sqrt(out_features * in_features))), in_)
            for in_ in divisors(in_features)
            if out * in_ + (out_features // out) * (in_features // in_) <= budget
        ]
        if fitting:
            in_ = min(fitting)[1]
            layout = Layout((out, out_features // out), (in_, in_features // in_))
            choices.append((log(out), layout))
    if len(choices) <= _SKEWED:
        return [layout for _, layout in choices]
    # Equally spaced between the extremes, which the SVD covers, and the balanced middle.
    steps = [round((k + 1) * (len(choices) - 1) / (_SKEWED + 1)) for k in range(_SKEWED)]
    return [choices[step][1] for step in steps]


def candidates_within(
    shape: tuple[int, int],
    bond_dim: int,
    *,
    gauge: Gauge = "none",
    layouts: Sequence[Layout] | None = None,
) -> list[Candidate]:
    """Candidates of a weight (out, in) that are smaller than it and within the SVD's budget.

    Only of the given layouts, where a kind of layer is made for some.
    """
    out_features, in_features = shape
    svd = make_candidate(Layout.svd(out_features, in_features), bond_dim, gauge=gauge)
    limit = min(svd.parameters, out_features * in_features - 1)
    candidates = (
        make_candidate(layout, bond_dim, gauge=gauge)
        for layout in layouts or candidate_layouts(out_features, in_features)
    )
    return [candidate for candidate in candidates if candidate.parameters <= limit]


def with_error(candidate: Candidate, weight_OI: Tensor) -> Candidate:
    """The candidate with the relative weight error of its sequential SVD.

    Raises:
        DecompositionError: NaN or Inf entries.
    """
    layout = candidate.layout
    if layout.num_sites == 2:
        # Across a single bond the error is the tail of the singular values: no vectors needed.
        unfolded = layout.split(weight_OI.detach().to(working_dtype(weight_OI.dtype)))
        kept, total = leading_weight(unfolded, candidate.bond_dims[0])
        error = sqrt(max(0.0, 1 - kept / total)) if total > 0 else 0.0
    else:
        error = sequential_svd(weight_OI, layout, bond_dim=candidate.bond_dims).relative_error
    return make_candidate(layout, candidate.bond_dims, error, gauge=candidate.gauge)


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The least error; near ties (1 %) go to fewer parameters, then to fewer multiply-adds."""
    errors = [c.relative_weight_error or 0.0 for c in candidates]
    bar = min(errors) * _NEAR_TIE + 1e-12
    tied = [c for c, error in zip(candidates, errors, strict=True) if error <= bar]
    return min(tied, key=lambda c: (c.parameters, c.macs))
