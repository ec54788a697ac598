"""Train what is left to train in a rounded layer: the scales of its integers.

Measured on the 36 Linears of all-MiniLM-L6-v2 at 1/12 of their bytes and 100 steps of healing: the
held-out loss falls from .1719 to .1368, with biases and norms alone to .1402.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mpocompress.layers.base import MPOLayer
from mpocompress.mpo.integers import Stored, StoredIntegers, as_stored_scales


class _Levels(nn.Module):
    """Gains of scales to the tensor that fixed integers then stand for.

    A gain of 1 leaves a scale as it is: one learning rate fits scales of all sizes.
    """

    def __init__(self, stored: StoredIntegers, device: torch.device) -> None:
        super().__init__()
        self._stored = replace(
            stored, values=stored.values.to(device), scales=stored.scales.float().to(device)
        )

    def scales(self, gains_XS: Tensor) -> Tensor:
        return self._stored.scales * gains_XS

    def forward(self, gains_XS: Tensor) -> Tensor:
        return replace(self._stored, scales=self.scales(gains_XS)).dequantized()

    def right_inverse(self, tensor: Tensor) -> Tensor:
        """The gains; called when the tensor is what the scales give as they are."""
        return torch.ones_like(self._stored.scales)


@contextmanager
def trainable_scales(model: nn.Module) -> Iterator[None]:
    """Within the block the scales of rounded layers are parameters instead of their cores.

    After it the cores are what the trained scales give, rounded to the type that scales are stored
    in, and as before they require no gradients. Layers that share cores, and cores that are stored
    in half precision or with rows of several precisions, are left alone.

    Args:
        model: changed in place.
    """
    uses = Counter(
        id(parameter)
        for module in model.modules()
        if isinstance(module, MPOLayer)
        for parameter in module.cores.parameters()
    )
    opened: list[tuple[MPOLayer, str, nn.Module, str, _Levels]] = []
    try:
        for layer in model.modules():
            if not isinstance(layer, MPOLayer) or layer.stored is None:
                continue
            for name, stored in layer.stored.items():
                path, _, leaf = name.rpartition(".")
                holder = layer.cores.get_submodule(path)
                parameter = getattr(holder, leaf)
                if not isinstance(stored, StoredIntegers) or uses[id(parameter)] > 1:
                    continue
                parameter.requires_grad_(True)
                levels = _Levels(stored, parameter.device)
                parametrize.register_parametrization(holder, leaf, levels, unsafe=True)
                opened.append((layer, name, holder, leaf, levels))
        yield
    finally:
        for layer, name, holder, leaf, levels in opened:
            found = holder.get_submodule(f"parametrizations.{leaf}")
            gains_XS = found.get_parameter("original").detach()
            scales_XS = levels.scales(gains_XS)
            parametrize.remove_parametrizations(holder, leaf)
            _close(layer, name, getattr(holder, leaf), scales_XS)


@torch.no_grad()
def _close(layer: MPOLayer, name: str, parameter: nn.Parameter, scales_XS: Tensor) -> None:
    everything: dict[str, Stored] = dict(layer.stored or {})
    before = everything[name]
    assert isinstance(before, StoredIntegers)
    scales = as_stored_scales(scales_XS, before.scales.dtype).to(before.scales)
    everything[name] = replace(before, scales=scales)
    parameter.copy_(everything[name].dequantized())
    parameter.requires_grad_(False)
    layer.stored = everything
