"""Evaluation mode, and random numbers that follow from a seed, for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """The CUDA devices that parameters of a model are on, in a fixed order."""
    devices = {parameter.device for parameter in model.parameters()}
    return sorted((device for device in devices if device.type == "cuda"), key=str)


def seed_of_part(seed: int, part: int) -> int:
    """The seed of one of the parts of a run, such as its steps, as `seeded` takes it."""
    return (seed * 1_000_003 + part) % 2**63


@contextmanager
def seeded(devices: Sequence[torch.device], seed: int) -> Iterator[None]:
    """Within the block torch's global generators begin with a seed; their states are restored.

    A forward that draws at random, as one that samples a latent variable does, can only draw from
    these. Two models that are compared have to draw the same.

    Args:
        devices: with a generator of their own, see `cuda_devices`; that of the CPU is always meant.
        seed: in [0, 2**63).
    """
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; every module's own mode is restored.

    So are the buffers that its forward replaces, adds or writes to in place, such as counters, and
    torch's global generators, which begin with the same seed in every block.
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
        with seeded(cuda_devices(model), 0):
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
