"""Work on ordinary cores of layers that are stored in the identity gauge."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mpocompress.layers.base import MPOLayer
from mpocompress.layers.gauged_cores import GaugedCores


@contextmanager
def plain_gauge(model: nn.Module) -> Iterator[None]:
    """Within the block all entries of all cores are parameters; after it, gauges are fixed again.

    For what replaces or rescales whole cores, which a layer in the identity gauge only rebuilds.
    Layers that share their cores go on sharing them. Where some numbers of a layer are frozen
    (`requires_grad` off) it stays in its gauge: fixed again, they would be others.

    Args:
        model: changed in place; its function stays the same but for rounding.
    """
    groups: dict[int, list[MPOLayer]] = {}
    for module in model.modules():
        if not isinstance(module, MPOLayer) or module.stored is not None:
            continue  # what is rounded for a file stays as it is
        if isinstance(module.cores, GaugedCores) and not _partly_frozen(module.cores):
            groups.setdefault(id(module.cores.last), []).append(module)
    for first, *others in groups.values():
        first.free_gauge_()
        for layer in others:
            layer.free_gauge_()
            layer.cores = first.cores
    try:
        yield
    finally:
        for first, *others in groups.values():
            first.fix_gauge_()
            for layer in others:
                layer.set_cores_(list(first.cores))  # bonds may have changed: plan anew
                layer.cores = first.cores


def _partly_frozen(cores: GaugedCores) -> bool:
    return len({parameter.requires_grad for parameter in cores.parameters()}) > 1
