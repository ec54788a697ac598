"""The optimizer of healing: Muon for cores, Adam for everything else."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mpocompress.layers.base import MPOLayer
from mpocompress.tuning.state_file import moment_on

_BETAS = (0.9, 0.99)
_MOMENTUM = 0.95
_RMS = 0.2  # of Adam's steps, about, relative to the rate
# a, b, c of a s + b s^3 + c s^5, by which singular values s of 1 and below come near 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_NO_GRADIENT = 1e-12  # a norm below which steps get smaller with it


class HealingOptimizer:
    """Steps of one size for all parameters: those of cores are orthogonal, the others are Adam's.

    Muon (K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) gives all singular
    values of a step the same size, so that what a factor does weakly is learned as fast as what it
    does strongly. Its steps have the root mean square of Adam's (arXiv 2502.16982, section 2.2):
    one rate is for both. A core (left bond, out, in, right bond) is the matrix of what it does to
    the legs that come in, from (in, right bond) to (left bond, out).

    Not `torch.optim.Muon`: it takes matrices only, and works in bfloat16, in which products are 60
    times slower on CPUs without AVX-512.

    Args:
        model: whose layers are looked through for cores.
        parameters: to train. Gradients are read from them.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        cores = _cores(model)
        self._parameters = list(parameters)
        self._of_cores: dict[nn.Parameter, dict[str, Tensor]] = {
            parameter: {} for parameter in self._parameters if id(parameter) in cores
        }
        others = [p for p in self._parameters if p not in self._of_cores]
        self._adam: torch.optim.Adam | None = None
        if others:
            # The fused step on a CPU takes a sixth of the time. It goes through memory in order,
            # whatever the strides of a parameter and of its moments are. None leaves the choice to
            # torch.
            in_order = all(p.is_cpu and p.is_contiguous() for p in others)
            self._adam = torch.optim.Adam(others, betas=_BETAS, fused=in_order or None)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take a step of a size down the gradients that the parameters have."""
        if self._adam is not None:
            for group in self._adam.param_groups:
                group["lr"] = rate
            self._adam.step()
        for core, moments in self._of_cores.items():
            if core.grad is None:
                continue
            if not moments:
                moments["momentum"] = torch.zeros_like(core)
            momentum = moments["momentum"].mul_(_MOMENTUM).add_(core.grad)
            ahead = core.grad.add(momentum, alpha=_MOMENTUM)  # Nesterov's
            matrix = ahead.reshape(core.shape[0] * core.shape[1], -1)
            size = _RMS * max(matrix.shape) ** 0.5
            core.sub_(orthogonal(matrix).reshape(core.shape), alpha=rate * size)

    def moments(self) -> list[dict[str, Tensor]]:
        """Of each parameter what steps so far have left, by name; empty without a gradient."""
        return [dict(self._moments_of(parameter)) for parameter in self._parameters]

    def restore(self, moments: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from the moments of another run with the same parameters."""
        for parameter, found in zip(self._parameters, moments, strict=True):
            self._moments_of(parameter).update(
                {name: moment_on(parameter, name, value) for name, value in found.items()}
            )

    def _moments_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if parameter in self._of_cores or self._adam is None:
            return self._of_cores[parameter]
        found: dict[str, Tensor] = self._adam.state[parameter]
        return found


def orthogonal(matrix_MN: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1 (.7 to 1.2), unless they are tiny.

    Five of Muon's Newton-Schulz iterations. All that they do is multiply by polynomials of the Gram
    matrix of the shorter side, so only that one is iterated: the long side is met twice instead of
    ten times.
    """
    is_wide = matrix_MN.shape[0] <= matrix_MN.shape[1]
    wide = matrix_MN if is_wide else matrix_MN.T
    wide = wide / wide.norm().clamp(min=_NO_GRADIENT)
    gram = wide @ wide.T
    factor = product = _factor(gram)
    for _ in range(_ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    result = product @ wide
    return result if is_wide else result.T


def _factor(gram: Tensor) -> Tensor:
    """What an iteration multiplies by: a + b G + c G^2."""
    a, b, c = _QUINTIC
    found = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    found.diagonal().add_(a)
    return found


def _cores(model: nn.Module) -> set[int]:
    """Identities of all cores that are stored whole."""
    return {
        id(core)
        for layer in model.modules()
        if isinstance(layer, MPOLayer)
        for core in layer.cores.parameters()
        if core.ndim == 4
    }
