"""Evaluation mode, and random numbers that follow from a seed, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """The CUDA devices that parameters and buffers of a model are on, in a fixed order."""
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    return sorted((device for device in devices if device.type == "cuda"), key=str)


def seed_of_part(seed: int, part: int) -> int:
    """The seed of one of the parts of a run, such as its steps, as `seeded` takes it."""
    return (seed * 1_000_003 + part) % 2**63


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Within the block torch's global generators begin with a seed; their states are restored.

    A forward that draws at random, as one that samples a latent variable does, can only draw from
    these. Two models that are compared have to draw the same.

    Args:
        model: that draws, from the generator of the CPU and those of its CUDA devices.
        seed: in [0, 2**63).
    """
    devices = cuda_devices(model)
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


class OwnDraws:
    """Random numbers of one run of a model, which go on from block to block.

    Args:
        model: see `seeded`.
        seed: that the first block begins with.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._devices = cuda_devices(model)
        with seeded(model, seed):
            self._keep_states()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Within the block torch's global generators go on where the block before has left them."""
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._state)
            for device, state in zip(self._devices, self._cuda_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
            self._keep_states()

    def _keep_states(self) -> None:
        self._state = torch.get_rng_state()
        self._cuda_states = [torch.cuda.get_rng_state(device) for device in self._devices]


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
        with seeded(model, 0):
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
