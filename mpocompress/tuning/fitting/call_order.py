"""An order of layers that suits all batches: they need not call the same ones, nor in one order."""

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import torch
from torch import nn

from mpocompress.tuning.lockstep import Call, seeded_call


def call_ranks(
    model: nn.Module, layers: Sequence[nn.Module], calls: Sequence[Call]
) -> dict[nn.Module, int]:
    """An order in which no batch calls a layer for the first time after a later one.

    Where there is none, as some batches call two layers one way round and some the other, that of
    their latest places in any batch.

    Args:
        model: dense; it is run on all batches.
        layers: to be ordered.
        calls: batches.
    """
    order: TopologicalSorter[nn.Module] = TopologicalSorter()
    path: dict[nn.Module, None] = {}
    latest: dict[nn.Module, int] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda called, _args: path.setdefault(called))
        for layer in layers
    ]
    try:
        with torch.no_grad():
            for number, call in enumerate(calls):
                path.clear()
                seeded_call(model, call, number)
                for place, layer in enumerate(path):
                    latest[layer] = max(place, latest.get(layer, 0))
                    order.add(layer)
                for before, after in pairwise(path):
                    order.add(after, before)
    finally:
        for hook in hooks:
            hook.remove()
    try:
        found = list(order.static_order())
    except CycleError:
        found = sorted(latest, key=lambda layer: latest[layer])
    return {layer: place for place, layer in enumerate(found)}
