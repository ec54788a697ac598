"""One segment of a training: an epoch of Adam on everything, or a sweep over all layers."""

from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import Protocol

import torch
from torch import Tensor, nn

from mpocompress.mpo.truncate import Truncation
from mpocompress.tuning.chains import Chain
from mpocompress.tuning.local_problem import LocalProblem, local_optimizer
from mpocompress.tuning.minibatches import Minibatch, TrainingData
from mpocompress.tuning.schedule import cosine, warm_cosine
from mpocompress.tuning.sweep_options import LocalOptions
from mpocompress.tuning.train_options import TrainOptions

_BETAS = (0.9, 0.99)
_LOWEST_SHARE = 0.02

BatchLoss = Callable[[Minibatch], Tensor]


class TrainMethod(Protocol):
    """Runs segments, and can be taken up after any of them."""

    @property
    def segments(self) -> int:
        """How many there are."""
        ...

    def run(self, segment: int, step: int) -> tuple[int, float]:
        """Run a segment that begins at an optimizer step; return the next step, the mean loss."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The moments that live from segment to segment."""
        ...

    def take_up(self, state: dict[str, Tensor]) -> None:
        """Go on with the moments of a run that was interrupted."""
        ...


class _Moments:
    """Adam over parameters whose shapes stay; its moments by position."""

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], rates: Sequence[float]) -> None:
        self._peaks = [rate for group, rate in zip(groups, rates, strict=True) if group]
        groups = [group for group in groups if group]
        self.parameters = [parameter for group in groups for parameter in group]
        self._optimizer = (
            torch.optim.Adam([{"params": list(group)} for group in groups], betas=_BETAS)
            if groups
            else None
        )

    def step(self, gradients: Sequence[Tensor | None], share: float) -> None:
        """One step at this share of the peak rates."""
        if self._optimizer is None:
            return
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = share * peak
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        found = {}
        if self._optimizer is not None:
            for position, parameter in enumerate(self.parameters):
                for name, value in self._optimizer.state.get(parameter, {}).items():
                    found[f"{position}.{name}"] = value
        return found

    def take_up(self, state: dict[str, Tensor]) -> None:
        for key, value in state.items():
            position, _, name = key.partition(".")
            parameter = self.parameters[int(position)]
            if self._optimizer is not None:
                # Adam counts its steps on the CPU.
                moved = value if name == "step" else value.to(parameter)
                self._optimizer.state[parameter][name] = moved.clone()


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """None where a batch does not reach a parameter."""
    if not loss.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(loss, parameters, allow_unused=True)


class AdamMethod:
    """All cores and all other parameters at once; an epoch is a segment."""

    def __init__(
        self,
        cores: Sequence[nn.Parameter],
        dense: Sequence[nn.Parameter],
        data: TrainingData,
        loss: BatchLoss,
        options: TrainOptions,
    ) -> None:
        self._moments = _Moments((cores, dense), (options.core_rate, options.dense_rate))
        self._data, self._loss = data, loss
        self.segments = options.epochs
        self._total = options.epochs * data.minibatches_per_epoch

    def run(self, segment: int, step: int) -> tuple[int, float]:
        """One epoch."""
        losses = []
        for number in range(step, step + self._data.minibatches_per_epoch):
            loss = self._loss(self._data.minibatch(number))
            parameters = self._moments.parameters
            self._moments.step(_gradients(loss, parameters), warm_cosine(number, self._total, 1.0))
            losses.append(loss.detach())
        return step + len(losses), float(torch.stack(losses).mean())

    def state(self) -> dict[str, Tensor]:
        """Adam's moments."""
        return self._moments.state()

    def take_up(self, state: dict[str, Tensor]) -> None:
        """Go on with these moments."""
        self._moments.take_up(state)


class SweepMethod:
    """Core by core at the orthogonality center, layer by layer, there and back: DMRG-like.

    The open core takes steps of a fresh Adam; dense parameters take theirs along, with moments
    that live through the whole training, because no gauge changes what they mean.
    """

    def __init__(
        self,
        chains: Sequence[Chain],
        dense: Sequence[nn.Parameter],
        data: TrainingData,
        loss: BatchLoss,
        options: TrainOptions,
    ) -> None:
        self._chains, self._data, self._loss, self._options = chains, data, loss, options
        self._moments = _Moments((dense,), (options.dense_rate,))
        positions = sum(len(chain.cores) for chain in chains)
        steps = options.epochs * data.minibatches_per_epoch
        local = max(1, min(options.local_steps, steps // (2 * positions)))
        self.segments = max(2, ceil(steps / (local * positions)))
        self._local = LocalOptions(
            steps=local, learning_rate=options.core_rate, gradient=options.gradient
        )
        self._start = {chain.name: max(chain.bond_dims, default=1) for chain in chains}

    def run(self, segment: int, step: int) -> tuple[int, float]:
        """One sweep over all layers: in their order and to the right, or back."""
        to_the_right = segment % 2 == 0
        positions = list(self._positions(segment, to_the_right))
        losses: list[Tensor] = []
        entered: Chain | None = None
        for number, (chain, first, last) in enumerate(positions):
            if chain is not entered:
                chain.read()
                entered = chain
            chain.move_center_(first, last)
            share = cosine((segment + number / len(positions)) / self.segments)
            problem = self._solve(chain, first, last, step + len(losses), share, losses)
            if not bool(torch.isfinite(problem.core).all()):
                return step + len(losses), float("nan")
            problem.close(self._limits(chain, segment), to_the_right=to_the_right)
        return step + len(losses), float(torch.stack(losses).mean())

    def _solve(
        self,
        chain: Chain,
        first: int,
        last: int,
        step: int,
        share: float,
        losses: list[Tensor],
    ) -> LocalProblem:
        """Gradient steps on the open core and the dense parameters."""
        share = max(share, _LOWEST_SHARE)
        problem = LocalProblem(chain, first, last, calls=self._local.steps)
        optimizer = local_optimizer([problem.core], self._local, share)
        parameters = [problem.core, *self._moments.parameters]
        with problem.opened(manual=self._local.gradient == "manual"):
            for number in range(step, step + self._local.steps):
                loss = self._loss(self._data.minibatch(number))
                core, *dense = _gradients(loss, parameters)
                if core is not None:
                    problem.core.grad = core.contiguous()
                    optimizer.step()
                self._moments.step(dense, share)
                losses.append(loss.detach())
        return problem

    def _positions(self, segment: int, to_the_right: bool) -> Iterator[tuple[Chain, int, int]]:
        width = self._width(segment)
        for chain in self._chains if to_the_right else reversed(self._chains):
            own = min(width, len(chain.cores))
            places = range(len(chain.cores) - own + 1)
            for first in places if to_the_right else reversed(places):
                yield chain, first, first + own - 1

    def _width(self, segment: int) -> int:
        sites = self._options.sites
        if sites == "grow":
            return 2 if segment < (self.segments + 1) // 2 else 1
        return sites

    def _limits(self, chain: Chain, segment: int) -> Truncation:
        """The cap of this sweep: twice that of the sweep before, up to the last one."""
        options, start = self._options, self._start[chain.name]
        cap = options.bond_dim
        if cap is None and options.cutoff == 0:
            cap = start
        grown = start * 2 ** min(segment + 1, 60)
        return Truncation(bond_dim=grown if cap is None else min(cap, grown), cutoff=options.cutoff)

    def state(self) -> dict[str, Tensor]:
        """Moments of the dense parameters, and where the growth of bonds began."""
        starts = {f"start.{name}": torch.tensor(value) for name, value in self._start.items()}
        return self._moments.state() | starts

    def take_up(self, state: dict[str, Tensor]) -> None:
        """Go on with these moments."""
        rest = {}
        for key, value in state.items():
            if key.startswith("start."):
                self._start[key.removeprefix("start.")] = int(value)
            else:
                rest[key] = value
        self._moments.take_up(rest)
