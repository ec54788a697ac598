"""Plans by the error that each layer may have."""

from collections.abc import Callable, Mapping
from math import prod, sqrt

import torch
from torch import Tensor

from mpocompress.mpo import Layout
from mpocompress.mpo.linalg import value_weights, working_dtype
from mpocompress.planning.entries import keep_entry
from mpocompress.planning.parts import Part
from mpocompress.planning.plan import Plan
from mpocompress.planning.sharing import Sharing
from mpocompress.surgery import WeightSite

Curve = Callable[[WeightSite], Tensor | None]
"""Relative error of a layer in the layout ((out, 1), (1, in)), entry r at bond dimension r; None if
it is not known."""


def weight_curve(weight_OI: Tensor, layout: Layout) -> Tensor:
    """Upper bound on the relative weight error of the sequential SVD, entry D at bond dimension D.

    It is attained for two sites. Entry 0 is 1, the last one 0.

    Source: Oseledets, SIAM J. Sci. Comput. 33 (2011) 2295, theorem 2.2.
    """
    weight_OI = weight_OI.detach().to(working_dtype(weight_OI.dtype))
    total = float(weight_OI.double().square().sum())
    most = max(layout.max_bond_dims(), default=0)
    lost_D = torch.zeros(most + 1, dtype=torch.float64, device="cpu")
    if total == 0:
        return lost_D
    for bond in range(1, layout.num_sites):
        unfolded = merge_sites(layout, bond).split(weight_OI)
        squares = value_weights(unfolded).cpu()
        tails = squares.flip(0).cumsum(0).flip(0) / total  # entry r: beyond the first r values
        lost_D[: len(tails)] += tails
    return lost_D.sqrt().clamp(max=1.0)


def merge_sites(layout: Layout, bond: int) -> Layout:
    """The layout of two sites that a bond cuts a layout into."""
    outs, ins = layout.out_dims, layout.in_dims
    return Layout(
        (prod(outs[:bond]), prod(outs[bond:])),
        (prod(ins[:bond]), prod(ins[bond:])),
        pad=layout.pad,
    )


def curves_of(sharing: Sharing, curve: Curve | None = None) -> dict[str, Tensor]:
    """For each layer the error at each bond dimension: on data where known, else of the weights."""
    found = {}
    for part in sharing.parts:
        known = None
        if curve is not None and part.layout.is_svd:
            known = curve(part.site)
        if known is None:
            known = weight_curve(part.site.matrix(), part.layout)
        found[part.site.name] = known
    return found


def plan_tolerances(
    sharing: Sharing, curves: Mapping[str, Tensor], tolerances: Mapping[str, float], why: str
) -> Plan:
    """The least bond dimension of each layer at which its error is within its tolerance.

    Layers for which none is both small enough and exact enough stay dense.

    Args:
        sharing: the weights.
        curves: from `curves_of`.
        tolerances: relative errors by layer.
        why: for the reason of each entry.
    """
    entries = dict(sharing.kept)
    for part in sharing.parts:
        name = part.site.name
        bond = least_bond(curves[name], tolerances[name])
        bond_dims = part.bond_dims(bond)
        if bond_dims is None:
            entries[part.site] = keep_entry(
                part.site, _too_coarse(part, curves[name], tolerances[name], why)
            )
        else:
            reason = f"least bond dimension for {why}"
            entries[part.site] = sharing.entry(part, bond_dims, reason)
    return sharing.plan(entries)


def least_bond(curve_D: Tensor, tolerance: float) -> int:
    """The first bond dimension, at least 1, whose error is within the tolerance."""
    above = curve_D > tolerance
    return max(1, int(above.sum()))


def smallest_error(sharing: Sharing, curves: Mapping[str, Tensor]) -> float:
    """The least error that a compressed layer can have, over all layers."""
    return min(
        (float(curves[part.site.name][part.share.max_bond_dim]) for part in sharing.parts),
        default=sqrt(2),
    )


def _too_coarse(part: Part, curve_D: Tensor, tolerance: float, why: str) -> str:
    top = part.share.max_bond_dim
    return (
        f"bond dimension {top}, the largest that pays, has an error of {float(curve_D[top]):.3g} "
        f"by itself: above the {tolerance:.3g} that the search allowed this layer for {why}"
    )
