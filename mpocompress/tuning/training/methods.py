"""One segment of a training: an epoch of Adam on everything, or sweeps over all layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Protocol

import torch
from torch import Tensor, nn

from mpocompress.mpo.canonical import move_center
from mpocompress.mpo.truncate import Truncation
from mpocompress.tuning.minibatches import Minibatch, TrainingData
from mpocompress.tuning.objectives import gradients_of
from mpocompress.tuning.schedule import cosine, warm_cosine
from mpocompress.tuning.state_file import moment_on
from mpocompress.tuning.sweeps.chains import Chain
from mpocompress.tuning.sweeps.local_problem import LocalProblem
from mpocompress.tuning.training.options import TrainOptions

_BETAS = (0.9, 0.99)

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
                self._optimizer.state[parameter][name] = moment_on(parameter, name, value)


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
            self._moments.step(
                gradients_of(loss, parameters), warm_cosine(number, self._total, 1.0)
            )
            losses.append(loss.detach())
        return step + len(losses), float(torch.stack(losses).mean())

    def state(self) -> dict[str, Tensor]:
        """Adam's moments."""
        return self._moments.state()

    def take_up(self, state: dict[str, Tensor]) -> None:
        """Go on with these moments."""
        self._moments.take_up(state)


@dataclass(frozen=True, slots=True)
class _Visit:
    """The sites `first` to `last` of a chain, opened on its way to the right, or to the left."""

    chain: Chain
    first: int
    last: int
    to_the_right: bool


class SweepMethod:
    """Core by core at the orthogonality center, there and back, in all layers at once: DMRG-like.

    Each layer has a center and an open core of its own: a gradient of all of them costs what that
    of one does. Layers with fewer sites turn back sooner. At each position the open cores take
    steps of Adam. Single cores find the moments of their last visit: moves by QR there and back
    leave the gauge nearly as it was. Merged ones, whose split gives the bond another basis, start
    anew. Steps are relative to the size that the open core would have had at the start: relative
    to its own, noise that makes it grow would make the steps grow, too. Dense parameters take
    their steps along.
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
        self._core_moments: dict[tuple[str, int], dict[str, Tensor]] = {}
        single = self._positions(1)
        epoch = data.minibatches_per_epoch
        self._total = max(options.epochs * epoch, 2 * single)
        self._local = min(options.local_steps, self._total // (2 * single))
        pairs = {1: 0, 2: self._total, "grow": self._total // 2}[options.sites]
        in_pairs = ceil(pairs / (self._local * self._positions(2)))
        rest = max(0, self._total - in_pairs * self._local * self._positions(2))
        self._widths = [2] * in_pairs + [1] * ceil(rest / (self._local * single))
        # Evaluations need not be more frequent than those of Adam.
        self._at_once = max(1, epoch // (self._local * single))
        self.segments = ceil(len(self._widths) / self._at_once)
        self._start_bonds = {chain.name: max(chain.bond_dims, default=1) for chain in chains}
        self._start_norms = {chain.name: _norms(chain) for chain in chains}

    def run(self, segment: int, step: int) -> tuple[int, float]:
        """Whole sweeps over all layers: as many as fit an epoch, at least one."""
        losses: list[Tensor] = []
        for chain in self._chains:
            chain.read()
        begin = segment * self._at_once
        for sweep in range(begin, min(begin + self._at_once, len(self._widths))):
            for visits in self._visits(sweep):
                number = step + len(losses)
                steps = range(number, min(number + self._local, self._total))
                if not steps:
                    break
                if not self._solve(visits, sweep, steps, losses):
                    return step + len(losses), float("nan")
        return step + len(losses), float(torch.stack(losses).mean())

    def _positions(self, width: int) -> int:
        """Of the longest chain."""
        return max(len(chain.windows(width)) for chain in self._chains)

    def _visits(self, sweep: int) -> Iterator[list[_Visit]]:
        """What is open at each position of a sweep: a place in every chain."""
        width = self._widths[sweep]
        positions = self._positions(width)
        for position in range(sweep * positions, (sweep + 1) * positions):
            visits = []
            for chain in self._chains:
                windows = chain.windows(width)
                turns, place = divmod(position, len(windows))
                to_the_right = turns % 2 == 0
                first, last = windows[place if to_the_right else -1 - place]
                visits.append(_Visit(chain, first, last, to_the_right))
            yield visits

    def _solve(
        self, visits: Sequence[_Visit], sweep: int, steps: range, losses: list[Tensor]
    ) -> bool:
        """Gradient steps on the open cores and the dense parameters; False if they diverge."""
        problems = []
        for visit in visits:
            visit.chain.move_center_(visit.first, visit.last)
            calls = len(steps)
            problems.append(LocalProblem(visit.chain, visit.first, visit.last, calls=calls))
        optimizer = self._optimizer(visits, problems)
        cores = [problem.core for problem in problems]
        with ExitStack() as opened:
            for problem in problems:
                opened.enter_context(problem.opened(manual=self._options.gradient == "manual"))
            for number in steps:
                share = cosine(number / self._total)
                loss = self._loss(self._data.minibatch(number))
                found = gradients_of(loss, [*cores, *self._moments.parameters])
                for core, gradient in zip(cores, found, strict=False):
                    core.grad = None if gradient is None else gradient.contiguous()
                for group, visit in zip(optimizer.param_groups, visits, strict=True):
                    norm = self._start_norms[visit.chain.name][visit.first, visit.last]
                    size = norm / sqrt(group["params"][0].numel())
                    group["lr"] = share * self._options.core_rate * size
                optimizer.step()
                self._moments.step(found[len(cores) :], share)
                losses.append(loss.detach())
        for visit, problem in zip(visits, problems, strict=True):
            if not bool(torch.isfinite(problem.core).all()):
                return False
            limits = self._limits(visit.chain, sweep)
            problem.close(limits, to_the_right=visit.to_the_right)
            if visit.first == visit.last:
                key = (visit.chain.name, visit.first)
                self._core_moments[key] = optimizer.state[problem.core]
        return True

    def _optimizer(
        self, visits: Sequence[_Visit], problems: Sequence[LocalProblem]
    ) -> torch.optim.Optimizer:
        """Adam with the moments of the last visits."""
        groups = [{"params": [problem.core]} for problem in problems]
        optimizer = torch.optim.Adam(groups, betas=_BETAS)
        for visit, problem in zip(visits, problems, strict=True):
            kept = self._core_moments.get((visit.chain.name, visit.first), {})
            single = visit.first == visit.last
            # The first moves cut bonds that are larger than their sites allow.
            if single and kept and kept["exp_avg"].shape == problem.core.shape:
                optimizer.state[problem.core] = kept
        return optimizer

    def _limits(self, chain: Chain, sweep: int) -> Truncation:
        """The cap of this sweep: twice that of the sweep before, up to the last one."""
        options, start = self._options, self._start_bonds[chain.name]
        cap = options.bond_dim
        if cap is None and options.cutoff == 0:
            cap = start
        grown = start * 2 ** min(sweep + 1, 60)
        return Truncation(bond_dim=grown if cap is None else min(cap, grown), cutoff=options.cutoff)

    def state(self) -> dict[str, Tensor]:
        """Moments of all parameters, and the sizes and bonds that the training began with."""
        found = {f"dense.{key}": value for key, value in self._moments.state().items()}
        for chain in self._chains:
            found[f"bond.{chain.name}"] = torch.tensor(self._start_bonds[chain.name])
            norms = list(self._start_norms[chain.name].values())
            found[f"norm.{chain.name}"] = torch.tensor(norms, dtype=torch.float64)
        for (name, site), moments in self._core_moments.items():
            found |= {f"core.{what}.{site}.{name}": value for what, value in moments.items()}
        return found

    def take_up(self, state: dict[str, Tensor]) -> None:
        """Go on with these moments."""
        dense = {}
        devices = {chain.name: chain.cores[0].device for chain in self._chains}
        for key, value in state.items():
            kind, _, rest = key.partition(".")
            if kind == "dense":
                dense[rest] = value
            elif kind == "bond":
                self._start_bonds[rest] = int(value)
            elif kind == "norm":
                windows = self._start_norms[rest]
                norms = value.reshape(-1).expand(len(windows)).tolist()  # was one for all of them
                self._start_norms[rest] = dict(zip(windows, norms, strict=True))
            else:
                what, site, name = rest.split(".", 2)
                self._core_moments.setdefault((name, int(site)), {})[what] = moment_on(
                    devices[name], what, value
                )
        self._moments.take_up(dense)


def _norms(chain: Chain) -> dict[tuple[int, int], float]:
    """Of what is opened, by its sites: that of the matrix, which the core at the center has.

    Beside frozen cores there is no center, and each has its own.
    """
    windows = {*chain.windows(1), *chain.windows(2)}
    if chain.has_frozen_cores:
        return {w: float(chain.merged(*w)[w[0]].norm()) for w in sorted(windows)}
    norm = float(move_center(chain.cores, chain.center, 0, 0)[0][0].norm())
    return dict.fromkeys(sorted(windows), norm)
