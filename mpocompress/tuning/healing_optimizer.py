"""The optimizer of healing: Muon for cores, Adam for everything else."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mpocompress.layers.base import MPOLayer

_BETAS = (0.9, 0.99)


class HealingOptimizer:
    """Steps of one size for all parameters: those of cores are orthogonal, the others are Adam's.

    Muon (K. Jordan et al., 2024; `torch.optim.Muon`) gives all singular values of a step the same
    size, so that what a factor does weakly is learned as fast as what it does strongly. Its steps
    have the root mean square of Adam's (arXiv 2502.16982, section 2.2): one rate is for both. A
    core (left bond, out, in, right bond) is the matrix of what it does to the legs that come in,
    from (in, right bond) to (left bond, out).

    Args:
        model: whose layers are looked through for cores.
        parameters: to train. Gradients are read from them.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        cores = _cores(model)
        self._parameters = list(parameters)
        self._matrices: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in self._parameters:
            if id(parameter) in cores:
                parameter.data = parameter.detach().contiguous()
                rows = parameter.shape[0] * parameter.shape[1]
                self._matrices[parameter] = nn.Parameter(parameter.detach().view(rows, -1))
        others = [p for p in self._parameters if p not in self._matrices]
        self._optimizers: list[torch.optim.Optimizer] = []
        if self._matrices:
            self._optimizers.append(
                torch.optim.Muon(
                    self._matrices.values(), weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
                )
            )
        if others:
            # The fused step on a CPU takes a sixth of the time. It goes through memory in order,
            # whatever the strides of a parameter and of its moments are. None leaves the choice to
            # torch.
            in_order = all(p.is_cpu and p.is_contiguous() for p in others)
            self._optimizers.append(torch.optim.Adam(others, betas=_BETAS, fused=in_order or None))

    def step(self, rate: float) -> None:
        """Take a step of a size down the gradients that the parameters have."""
        for parameter, matrix in self._matrices.items():
            grad = parameter.grad
            matrix.grad = None if grad is None else grad.reshape(matrix.shape)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def moments(self) -> list[dict[str, Tensor]]:
        """Of each parameter what steps so far have left, by name; empty without a gradient."""
        return [dict(self._state(parameter)) for parameter in self._parameters]

    def restore(self, moments: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from the moments of another run with the same parameters."""
        for parameter, found in zip(self._parameters, moments, strict=True):
            self._state(parameter).update(
                {
                    # Adam counts its steps on the CPU.
                    name: value.clone() if name == "step" else value.to(parameter, copy=True)
                    for name, value in found.items()
                }
            )

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        held = self._matrices.get(parameter, parameter)
        owner = self._optimizers[0 if parameter in self._matrices else -1]
        return owner.state[held]


def _cores(model: nn.Module) -> set[int]:
    """Identities of all cores that are stored whole."""
    return {
        id(core)
        for layer in model.modules()
        if isinstance(layer, MPOLayer)
        for core in layer.cores.parameters()
        if core.ndim == 4
    }
