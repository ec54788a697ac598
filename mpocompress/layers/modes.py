"""Evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; every module's own mode is restored.

    So are the buffers that its forward replaces, adds or writes to in place, such as counters.
    """
    modes = [(module, module.training) for module in model.modules()]
    # Scripted modules have their buffers in C++.
    tables = [
        (module._buffers, dict(module._buffers))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    copies = [
        (buffers, name, buffer, buffer.detach().clone(), buffer._version)
        for buffers, _ in tables
        for name, buffer in buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffers, before in tables:
            if buffers.keys() != before.keys() or any(
                buffers[name] is not buffer for name, buffer in before.items()
            ):
                buffers.clear()
                buffers.update(before)
        for buffers, name, buffer, copy, version in copies:
            if buffer.shape != copy.shape:
                buffers[name] = copy
            elif buffer._version != version:
                try:
                    with torch.no_grad():
                        buffer.copy_(copy)
                except RuntimeError:  # an expanded view
                    buffers[name] = copy
