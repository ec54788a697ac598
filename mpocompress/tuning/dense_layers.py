"""Layers that stay dense: with data they take up what is lost before them, at no cost in size."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from mpocompress.mpo import Layout
from mpocompress.surgery import WeightSite
from mpocompress.tuning.fit_plan import FittedWeight, SitePlan
from mpocompress.tuning.gradients import MAX_OUTPUTS


def correction_plans(model: nn.Module, sites: Iterable[WeightSite]) -> list[SitePlan]:
    """Plans of a single site for those dense weights that can be corrected.

    That are linear layers of at most 8192 outputs whose weight nothing else uses.

    Args:
        model: dense.
        sites: of the model.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [
        SitePlan(site=site, layout=Layout((site.shape[0],), (site.shape[1],)), bond_dims=())
        for site in sites
        if site.kind == "linear"
        and len(site.modules) == 1
        and site.shape[0] <= MAX_OUTPUTS
        and uses[id(site.modules[0].get_parameter("weight"))] == 1
    ]


def is_corrected(site: WeightSite, fitted: FittedWeight) -> bool:
    """Whether a layer that stays dense has other values now; of the first, nothing is lost."""
    bias = site.modules[0]._parameters.get("bias")
    same_bias = bias is None or fitted.bias is None or torch.equal(bias, fitted.bias)
    return not (same_bias and torch.equal(site.matrix(), fitted.mpo.to_dense()))
