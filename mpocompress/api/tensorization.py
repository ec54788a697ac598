"""MPO layers for chosen layers of an untrained model."""

from collections.abc import Sequence

import torch
from torch import nn

from mpocompress.api.calling import by_itself
from mpocompress.errors import LayoutError, NoLayerMatched
from mpocompress.layers.linear import check_gain
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.initialize import initial_cores
from mpocompress.planning.layout_rules import LayoutChoice, LayoutRules
from mpocompress.surgery import (
    WeightSite,
    copy_with_replacements,
    find_weights,
    open_modules,
    opened_for,
    select_sites,
)


@by_itself
def tensorize(
    model: nn.Module,
    *,
    layout: LayoutChoice = "balanced",
    sites: int | None = None,
    bond_dim: int | Sequence[int] | None = 16,
    gain: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A copy of an untrained model with MPO layers, started at random, in place of dense ones.

    What the dense weights are is not kept; for trained weights take `compress`. Biases, tied
    weights, dtype, device, mode and `requires_grad` are. All kinds of weights that `compress` knows
    are replaced, under the same names: those of an `nn.LSTM` "lstm" are "lstm.ih_l0", ... Sweeps
    go along linear layers; the others are trained along, or all with `method="adam"`.

    Args:
        model: untouched.
        layout: "balanced", "svd", (out, in) pairs, text, a `Layout`, or a dict from layer pattern
            to one of these; layers that no pattern matches stay dense.
        sites: so many balanced sites in every layer, instead of a `layout`.
        bond_dim: for all bonds or one for each, clipped to the maximal one, which None stands for.
        gain: mean square of the new weights, times the inputs, as for `MPOLinear`. None: the mean
            square of the dense weight that goes, so that an initialization of your own lives on.
        include: patterns of layer names. The layers that they match are all replaced; without, only
            those that an MPO makes smaller.
        exclude: likewise; they win.
        generator: of the start; torch's global one by default.

    Raises:
        NoLayerMatched: patterns that match nothing, or no layer would become smaller.
        LayoutError: a layout that fits no layer it is meant for, or "auto", which needs weights.
        BondDimError: a bond dimension below 1, or the wrong number of them.
        DataError: a gain that is not above 0.
    """
    opened = open_modules(model)
    inventory = find_weights(opened)
    chosen = select_sites(inventory, include, exclude)
    if sites is not None and layout == "balanced":
        layout = "auto"  # as many balanced sites as that
    rules = LayoutRules(layout, sites, inventory, {site.name for site in chosen})
    replacements: dict[WeightSite, MPO] = {}
    for site in chosen:
        found = rules.forced(site)
        if isinstance(found, LayoutError):
            if include:
                raise LayoutError(f"layer {site.label}: {found}")
            continue
        if found is None:
            if layout == "auto":
                raise LayoutError(
                    'layout "auto" is chosen by trained weights. Try "balanced", or sites=4.'
                )
            continue
        mpo = _started(site, found, bond_dim, gain, generator)
        if include or mpo.num_parameters < site.parameters:
            replacements[site] = mpo
    rules.check_used()
    if not replacements:
        raise NoLayerMatched(
            f"no layer would become smaller as an MPO with bond_dim {bond_dim}. Lower it, give "
            "more sites, or name the layers with include=[...]."
        )
    # Modules that keep all their weights stay what they are.
    names = [name for site in replacements for name in site.names]
    result = opened_for(model, opened, names)
    if result is not opened:
        by_name = {site.name: site for site in find_weights(result).sites}
        replacements = {by_name[site.name]: mpo for site, mpo in replacements.items()}
    return copy_with_replacements(result, replacements)


def _started(
    site: WeightSite,
    layout: Layout,
    bond_dim: int | Sequence[int] | None,
    gain: float | None,
    generator: torch.Generator | None,
) -> MPO:
    out_features, in_features = site.shape
    if gain is None:
        square = float(site.matrix().float().square().mean())
        variance = square if 0 < square < float("inf") else 1 / (3 * in_features)
    else:
        variance = check_gain(gain) ** 2 / in_features
    cores = initial_cores(
        layout,
        bond_dim,
        variance=variance,
        dtype=site.dtype,
        device=site.device,
        generator=generator,
    )
    return MPO(cores, shape=(out_features, in_features))
