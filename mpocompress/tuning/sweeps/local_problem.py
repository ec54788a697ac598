"""One core of a chain, or two merged neighbours, opened for gradient steps; all else frozen."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.mpo.core_gradient import OpenCore
from mpocompress.mpo.truncate import Truncation
from mpocompress.tuning.sweeps.chains import Chain, find_chains, opened_layers
from mpocompress.tuning.sweeps.options import LocalOptions

_MOMENTUM = 0.9
# Dense parameters that begin at zero have no size of their own to take steps relative to.
_SMALLEST_RMS = 1e-2


class LocalProblem:
    """The sites `first` to `last` (one or two) of a chain whose center is there, if it has one.

    Attributes:
        core: (left bond, out, in, right bond), what the steps change; the layers keep their cores
            until `close`.

    Args:
        chain: its center is at these sites, unless it has frozen cores.
        first: left end.
        last: right end.
        calls: about so many gradients will be asked for.
    """

    def __init__(self, chain: Chain, first: int, last: int, *, calls: int) -> None:
        merged = chain.merged(first, last)
        self._chain, self._first, self._last = chain, first, last
        self._opened = OpenCore(merged, first, shape=chain.shape, calls=calls)
        self.core = merged[first].clone(memory_format=torch.contiguous_format).requires_grad_()

    def opened(self, *, manual: bool) -> AbstractContextManager[None]:
        """Within the block the layers compute with `core`, gradients by hand or by autograd."""
        return opened_layers(self._chain.layers, self._opened, self.core, manual=manual)

    def close(self, limits: Truncation | None, *, to_the_right: bool) -> None:
        """Put the core into the layers; two sites are split within `limits`.

        Raises:
            DecompositionError: the core is not finite.
        """
        core = self.core.detach()
        if self._first == self._last:
            center = None if self._chain.has_frozen_cores else (self._first, self._first)
            self._chain.put(self._chain.with_core(self._first, core), center)
            return
        limits = limits or Truncation()
        split = self._chain.with_pair(self._first, core, limits, to_the_right=to_the_right)
        self._chain.put(*split)


def local_optimizer(
    parameters: Sequence[Tensor], local: LocalOptions, scale: float, *, outputs: int
) -> torch.optim.Optimizer:
    """An optimizer whose steps are relative to the size of what it changes; the core comes first.

    With the center at the open core its norm is that of the whole matrix, whatever the gauge was.
    A matrix of zeros, of so many `outputs`, has no size; steps are then those of a matrix whose
    outputs are as large as its inputs.
    """
    rate = local.rate * scale
    if local.optimizer == "lbfgs":
        return torch.optim.LBFGS(
            parameters,
            lr=rate,
            max_iter=local.steps,
            max_eval=local.steps,
            line_search_fn="strong_wolfe",
        )
    groups: list[dict[str, Any]] = []
    for position, parameter in enumerate(parameters):
        norm = float(parameter.detach().norm())
        if norm == 0 and position == 0:
            norm = sqrt(outputs)
        size = norm / sqrt(parameter.numel())
        if position:
            size = max(size, _SMALLEST_RMS)
        own = size if local.optimizer == "adam" else size**2 * parameter.numel()
        groups.append({"params": [parameter], "lr": rate * own})
    if local.optimizer == "adam":
        return torch.optim.Adam(groups)
    return torch.optim.SGD(groups, momentum=_MOMENTUM)


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients and are no cores, by name."""
    chains = find_chains(model, may_be_none=True)
    cores = {id(core) for chain in chains.values() for core in chain.layers[0].cores}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in cores
    }


@contextmanager
def only_gradients_of(
    model: nn.Module, chains: Sequence[Chain], dense: Sequence[nn.Parameter]
) -> Iterator[None]:
    """Within the block at most these parameters require gradients; every flag is restored."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    core_flags = [[core.requires_grad for core in chain.layers[0].cores] for chain in chains]
    trained = {id(parameter) for parameter in dense}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in trained)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        # Cores that changed their shape are new parameters.
        for chain, own in zip(chains, core_flags, strict=True):
            for core, flag in zip(chain.layers[0].cores, own, strict=True):
                core.requires_grad_(flag)
