"""Evaluation mode for a while, after which a model is what it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; every module's own mode is restored.

    So are buffers that its forward writes to, such as counters.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone(), buffer._version)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, buffer, before, version in buffers:
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(before)
