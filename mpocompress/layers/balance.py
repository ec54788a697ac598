"""Share Schmidt values equally among the cores of MPO layers: one learning rate fits all."""

from collections import Counter

import torch
from torch import nn

from mpocompress.layers.base import MPOLayer
from mpocompress.mpo.canonical import symmetric_gauge


@torch.no_grad()
def balance_cores_(model: nn.Module) -> int:
    """Bring each MPO layer into the symmetric gauge, with cores of equal Frobenius norms, in place.

    No matrix changes but for rounding; names, shapes and `requires_grad` stay, and so do ties.
    Left as they are: layers with frozen cores (`requires_grad` off), layers that are rounded for a
    file, layers whose cores are computed from other parameters, and layers that share some but not
    all of their cores with another layer, whose matrix would change.

    Returns:
        How many chains of cores were rescaled.
    """
    chains: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for module in model.modules():
        if not isinstance(module, MPOLayer) or module.stored is not None:
            continue
        cores = list(module.cores)
        if all(isinstance(c, nn.Parameter) and c.is_leaf and c.requires_grad for c in cores):
            chains[tuple(id(core) for core in cores)] = cores
    uses = Counter(core for chain in chains for core in chain)
    balanced = 0
    for key, cores in chains.items():
        if any(uses[core] > 1 for core in key):
            continue
        for core, new in zip(cores, symmetric_gauge(cores), strict=True):
            core.copy_(new)
        balanced += 1
    return balanced
