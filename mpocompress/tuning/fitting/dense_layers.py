"""Layers that stay dense: with data they take up what is lost before them, at no cost in size."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.layers.modes import evaluation_mode
from mpocompress.layers.opened import layers_called
from mpocompress.mpo import Layout
from mpocompress.surgery import WeightSite
from mpocompress.tuning.fitting.plan import FittedWeight, SitePlan
from mpocompress.tuning.lockstep import Call, seeded_call
from mpocompress.tuning.statistics.moments import MAX_FEATURES


def shared_parameters(model: nn.Module) -> set[int]:
    """The ids of parameters that several modules use."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in uses.items() if count > 1}


def correction_plans(
    model: nn.Module,
    sites: Sequence[WeightSite],
    planned: Sequence[SitePlan],
    calls: Sequence[Call],
) -> list[SitePlan]:
    """Plans for those dense layers that can be corrected.

    That are linear layers of at most 8192 features and outputs, whose weight nothing else uses, and
    that every batch calls exactly once, with rows, after a layer that is compressed. One pass of
    the dense model finds out, unless there are none to ask about.

    Args:
        model: dense.
        sites: weights of the model that stay dense.
        planned: what is compressed.
        calls: batches.
    """
    shared = shared_parameters(model)
    candidates = {
        site.modules[0]: site
        for site in sites
        if site.adapter.kind == "linear"
        and len(site.modules) == 1
        and max(site.shape) <= MAX_FEATURES
        and id(site.modules[0].get_parameter("weight")) not in shared
    }
    compressed = {module for plan in planned for module in plan.site.modules}
    seen: Counter[nn.Module] = Counter()
    lossy = False

    def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal lossy
        if module in compressed:
            lossy = True
            return
        filled = all(v.numel() for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        seen[module] += 1 if lossy and filled else 2  # 2: not to be corrected

    hooks = [
        module.register_forward_pre_hook(watch, with_kwargs=True)
        for module in (*(compressed if candidates else ()), *candidates)
    ]
    try:
        with evaluation_mode(model), layers_called(model), torch.no_grad():
            for number, call in enumerate(calls):
                if not candidates:
                    break
                seen.clear()
                lossy = False
                seeded_call(model, call, number)
                candidates = {m: site for m, site in candidates.items() if seen[m] == 1}
    finally:
        for hook in hooks:
            hook.remove()
    return [
        SitePlan(
            site=site,
            layout=Layout((site.shape[0],), (site.shape[1],)),
            bond_dims=(),
            stays_dense=True,
        )
        for site in candidates.values()
    ]


def is_corrected(site: WeightSite, fitted: FittedWeight) -> bool:
    """Whether a layer that stays dense has other values now; where nothing is lost it has not."""
    bias = site.modules[0]._parameters.get("bias")
    same_bias = bias is None or fitted.bias is None or torch.equal(bias, fitted.bias)
    return not (same_bias and torch.equal(site.matrix(), fitted.mpo.to_dense()))
