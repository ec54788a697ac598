"""Sweeps on the loss: the variational algorithm of tensor neural networks.

Layer after layer in the order of the forward pass, along the cores of each: the orthogonality
center moves to the open core (by QR, so the function stays), the open core, or two merged
neighbours, take gradient steps on minibatches while all else is frozen, and two merged ones are
split by SVD.

What is guaranteed: every update is judged by the mean loss over the same evaluation batches, and
rolled back unless that loss is at most what it was. So from update to update, over all layers and
sweeps, the loss on these batches never rises, but for the rounding of the gauge moves between
updates (some units in the last place of the cores' dtype). Of other data nothing is guaranteed.

Source: Jahromi, Orús, "Variational Tensor Neural Networks for Deep Learning", arXiv 2211.14657.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError, LoadError, NoLayerMatched
from mpocompress.layers.modes import evaluation_mode, seeded
from mpocompress.mpo.truncate import Truncation
from mpocompress.tuning.lockstep import Call
from mpocompress.tuning.objectives import Loss, gradients_of, scalar_loss
from mpocompress.tuning.state_file import identity
from mpocompress.tuning.sweeps.chains import Chain, trainable_chains
from mpocompress.tuning.sweeps.local_problem import (
    LocalProblem,
    dense_parameters,
    local_optimizer,
    only_gradients_of,
)
from mpocompress.tuning.sweeps.options import LossSweepOptions, LossSweepRecord, Progress
from mpocompress.tuning.sweeps.prefix import FrozenPrefix
from mpocompress.tuning.sweeps.state import STATE_OF_SWEEPS, SweepState, read_state, write_state

# After an update that was rolled back the steps in this layer get shorter, after one that was kept
# they grow again: large steps pay as long as they work.
_SHRINK, _GROW, _SHORTEST = 0.5, 1.25, 2.0**-10


def sweep_on_loss(
    model: nn.Module,
    loss: Loss,
    calls: Sequence[Call],
    *,
    options: LossSweepOptions | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    state: Path | None = None,
    progress: Progress | None = None,
) -> tuple[LossSweepRecord, ...]:
    """Lower a loss by sweeps over the MPO layers of a model, in place.

    The model runs in evaluation mode; modes and `requires_grad` are restored. Frozen cores
    (`requires_grad` off) keep their values: where a layer has some, its others are opened, and its
    gauge stays as it is. Layers that the evaluation batches do not reach are left as they are.
    Parameters of cores whose shape changes (two sites) are new objects.

    Args:
        model: with MPO layers; tied layers are swept once.
        loss: `loss(model, call)`, a scalar.
        calls: batches; a gradient step takes one.
        options: see `LossSweepOptions`.
        include: patterns of layer names; default: all.
        exclude: likewise; they win.
        state: file that is written after each layer; if it exists, the run goes on from there, to
            the bit as if it had not been interrupted.
        progress: called as `progress(layer, done, total)`.

    Returns:
        One record for each sweep along a layer, those of a continued run included.

    Raises:
        NoLayerMatched: no MPO layer that could be swept, or patterns that match none.
        ConversionError: half types, or layers that share some cores and not others.
        DataError: no batches, or a loss that is not a finite scalar.
        LoadError: a state that cannot be read or belongs to another run.
        SaveError: the state cannot be written.
    """
    options = options or LossSweepOptions()
    if not calls:
        raise DataError("there are no batches to sweep on.")
    chains = trainable_chains(model, include, exclude)
    dense = dense_parameters(model) if options.train_dense else {}
    with evaluation_mode(model), only_gradients_of(model, chains, list(dense.values())):
        return _Run(model, chains, dense, loss, calls, options, state, progress).run()


class _Run:
    """The sweeps of one call of `sweep_on_loss`."""

    def __init__(
        self,
        model: nn.Module,
        chains: Sequence[Chain],
        dense: dict[str, nn.Parameter],
        loss: Loss,
        calls: Sequence[Call],
        options: LossSweepOptions,
        state: Path | None,
        progress: Progress | None,
    ) -> None:
        self._model = model
        self._dense = dense
        self._loss_function = loss
        self._calls = calls
        self._options = options
        self._state = state
        self._progress = progress
        self._prefix: FrozenPrefix | None = None
        self._gradients = self._evaluations = self._rejected = 0
        generator = torch.Generator().manual_seed(options.seed)
        chosen = torch.randperm(len(calls), generator=generator, device="cpu")[
            : options.eval_batches
        ]
        self._judges = sorted(int(number) for number in chosen)
        self._chains = list(chains)
        self._history: list[LossSweepRecord] = []
        self._chains, self._loss = self._in_order_of_calls(chains)
        self._caps = {chain.name: self._cap(chain) for chain in self._chains}
        self._identity: dict[str, str] = {}
        if state is not None:
            # A model that was interrupted has other cores than at the start; the rest is the same.
            changing = {id(p) for p in dense.values()}
            changing |= {id(p) for chain in chains for lay in chain.layers for p in lay.cores}
            rest = [p for p in model.parameters() if id(p) not in changing]
            self._identity = identity([*rest, *model.buffers()], calls, of="what is not swept")

    def run(self) -> tuple[LossSweepRecord, ...]:
        if self._state is not None and self._state.exists():
            self._take_up(self._state)
        total = self._options.sweeps * len(self._chains)
        for number in range(len(self._history), total):
            sweep, position = divmod(number, len(self._chains))
            chain = self._chains[position]
            if self._progress is not None:
                self._progress(chain.name, number, total)
            self._history.append(self._sweep(chain, sweep, number))
            if self._state is not None:
                write_state(self._state, self._current_state())
        return tuple(self._history)

    # -- the loss

    def _in_order_of_calls(self, chains: Sequence[Chain]) -> tuple[list[Chain], float]:
        """Chains that the evaluation batches reach, by their first call; and the first loss."""
        order: dict[str, Chain] = {}
        handles = [
            layer.register_forward_pre_hook(
                lambda _layer, _args, chain=chain: order.setdefault(chain.name, chain) and None
            )
            for chain in chains
            for layer in chain.layers
        ]
        try:
            loss = self._judge()
        finally:
            for handle in handles:
                handle.remove()
        if not order:
            raise NoLayerMatched(
                "the evaluation batches reach none of the MPO layers that may be swept "
                f"({', '.join(chain.name for chain in chains[:3])}). Give data that does."
            )
        if not isfinite(loss):
            raise DataError(
                f"the loss is {loss} before the first update. Check the model, the data and the "
                "loss function for NaN and Inf."
            )
        return list(order.values()), loss

    def _loss_of(self, number: int) -> Tensor:
        def compute() -> Tensor:
            # A model that draws at random draws the same whenever an update is judged.
            with seeded(self._model, number):
                return scalar_loss(self._loss_function, self._model, self._calls[number])

        return compute() if self._prefix is None else self._prefix.run(number, compute)

    def _judge(self) -> float:
        self._evaluations += len(self._judges)
        with torch.no_grad():
            losses = [self._loss_of(number).double() for number in self._judges]
            return float(torch.stack(losses).mean())

    # -- one sweep along a layer

    def _sweep(self, chain: Chain, sweep: int, number: int) -> LossSweepRecord:
        options = self._options
        self._gradients = self._evaluations = self._rejected = 0
        before = self._loss
        # Stateless random numbers: a continued run draws the same ones.
        generator = torch.Generator().manual_seed((options.seed * 2**20 + number + 1) % 2**63)
        batches = self._draw(generator)
        chain.read()
        windows = chain.windows(options.sites)
        to_the_right = sweep % 2 == 0
        with self._frozen_prefix(chain):
            for first, last in windows if to_the_right else reversed(windows):
                self._update(chain, first, last, batches, to_the_right)
        return LossSweepRecord(
            sweep=sweep,
            layer=chain.name,
            direction=1 if to_the_right else -1,
            loss_before=before,
            loss_after=self._loss,
            bond_dims=chain.bond_dims,
            entropies_nats=chain.entropies_nats(),
            gradient_evaluations=self._gradients,
            loss_evaluations=self._evaluations,
            rejected=self._rejected,
        )

    def _draw(self, generator: torch.Generator) -> Iterator[int]:
        while True:
            yield from torch.randperm(len(self._calls), generator=generator, device="cpu").tolist()

    @contextmanager
    def _frozen_prefix(self, chain: Chain) -> Iterator[None]:
        if self._dense:
            yield
            return
        self._prefix = FrozenPrefix(self._model, chain.layers)
        try:
            with self._prefix.installed():
                yield
        finally:
            self._prefix = None

    def _update(
        self, chain: Chain, first: int, last: int, batches: Iterator[int], to_the_right: bool
    ) -> None:
        """Solve one local problem; keep the result unless it raises the loss."""
        chain.move_center_(first, last)
        cores, center = chain.cores, chain.center
        dense = {name: tensor.detach().clone() for name, tensor in self._dense.items()}
        problem = self._solve(chain, first, last, batches)
        if bool(torch.isfinite(problem.core).all()):
            for limits in self._limits(chain) if first < last else (None,):
                problem.close(limits, to_the_right=to_the_right)
                loss = self._judge()
                if loss <= self._loss:  # false for NaN
                    self._loss = loss
                    chain.step_scale = min(1.0, _GROW * chain.step_scale)
                    return
                chain.put(cores, center)
        else:
            chain.put(cores, center)
        self._rejected += 1
        chain.step_scale = max(_SHORTEST, _SHRINK * chain.step_scale)
        with torch.no_grad():
            for name, tensor in dense.items():
                self._dense[name].copy_(tensor)

    def _limits(self, chain: Chain) -> tuple[Truncation, ...]:
        """What a pair is split with; where the cutoff costs too much, without it."""
        cap, cutoff = self._caps[chain.name], self._options.cutoff
        if cutoff == 0:
            return (Truncation(bond_dim=cap),)
        return (Truncation(bond_dim=cap, cutoff=cutoff), Truncation(bond_dim=cap))

    def _cap(self, chain: Chain) -> int | None:
        if self._options.bond_dim is not None or self._options.cutoff > 0:
            return self._options.bond_dim
        return max(chain.bond_dims, default=1)

    # -- one local problem

    def _solve(self, chain: Chain, first: int, last: int, batches: Iterator[int]) -> LocalProblem:
        """Gradient steps on the open core; the layers keep their cores."""
        local = self._options.local
        problem = LocalProblem(chain, first, last, calls=local.steps)
        parameters = [problem.core, *self._dense.values()]
        optimizer = local_optimizer(parameters, local, chain.step_scale, outputs=chain.shape[0])
        with torch.enable_grad(), problem.opened(manual=local.gradient == "manual"):
            if local.optimizer == "lbfgs":
                number = next(batches)
                # Its type promises a float, but a tensor is what torch's own closures return.
                optimizer.step(lambda: self._gradient(number, parameters))  # type: ignore[arg-type, return-value]
            else:
                for _ in range(local.steps):
                    self._gradient(next(batches), parameters)
                    optimizer.step()
        return problem

    def _gradient(self, number: int, parameters: Sequence[Tensor]) -> Tensor:
        """Put the gradient of one batch's loss into `grad` of the open parameters."""
        self._gradients += 1
        with torch.enable_grad():
            loss = self._loss_of(number)
        for parameter, gradient in zip(parameters, gradients_of(loss, parameters), strict=True):
            parameter.grad = (
                # L-BFGS wants to see it as a vector.
                torch.zeros_like(parameter) if gradient is None else gradient.contiguous()
            )
        return loss.detach()

    # -- going on

    def _settings(self) -> dict[str, Any]:
        settings = {
            **self._options.settings(),
            "layers": [chain.name for chain in self._chains],
            "layouts": [str(chain.layers[0].layout) for chain in self._chains],
            "batches": len(self._calls),
            **self._identity,
        }
        found: dict[str, Any] = json.loads(json.dumps(settings))
        return found

    def _current_state(self) -> SweepState:
        tensors = {
            f"{chain.name}/{site}": core
            for chain in self._chains
            for site, core in enumerate(chain.cores)
        }
        return SweepState(
            settings=self._settings(),
            caps=self._caps,
            step_scales={chain.name: chain.step_scale for chain in self._chains},
            history=tuple(self._history),
            tensors=tensors | {name: p.detach() for name, p in self._dense.items()},
        )

    def _take_up(self, path: Path) -> None:
        state = read_state(path)
        mine = self._settings()
        differing = [key for key, value in mine.items() if state.settings.get(key) != value]
        if differing:
            key = differing[0]
            raise LoadError(
                f"the state {str(path)!r} was written with {key} "
                f"{state.settings.get(key)!r}, this run has {mine[key]!r}. Give the same options, "
                "or another path to begin anew."
            )
        device = self._chains[0].cores[0].device
        with STATE_OF_SWEEPS.refusing(path):  # whole, before anything is changed
            cores = {
                chain.name: [
                    state.tensors[f"{chain.name}/{site}"].to(device)
                    for site in range(len(chain.cores))
                ]
                for chain in self._chains
            }
            scales = [state.step_scales[chain.name] for chain in self._chains]
            dense = {name: state.tensors[name] for name in self._dense}
        for chain, scale in zip(self._chains, scales, strict=True):
            chain.put(cores[chain.name])
            chain.step_scale = scale
        with torch.no_grad():
            for name, parameter in self._dense.items():
                parameter.copy_(dense[name])
        self._caps = dict(state.caps)
        self._history = list(state.history)
        if self._history:
            self._loss = self._history[-1].loss_after
