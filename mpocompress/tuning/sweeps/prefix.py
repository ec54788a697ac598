"""What a model computes before it first calls a layer, kept while only that layer changes.

All local problems of one sweep along a layer see the same inputs of that layer, so for each batch
whatever runs before its first call need be computed once. Which modules those are is not read from
the model but observed: in the first pass of a batch the outputs of the outermost modules that do
not contain the layer are recorded until the layer is called; later passes are given the recorded
outputs instead. Operations between modules are computed again.

A model may break this by side effects (caches that are passed along, writes in place). So the first
recorded pass is repeated, and unless the loss comes out the same to the bit nothing is replayed.
Nor is it once a pass has written to what was recorded, as some do where a batch calls for it; what
recorded modules themselves write, as an in-place ReLU does, is not written again by a replay.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.tuning.lockstep import tensors_in, version_of

# What may be kept for all batches together; later batches are computed in full.
_BUDGET_BYTES = 1 << 30


class FrozenPrefix:
    """Recorded outputs before the first call of a layer, batch by batch.

    Args:
        model: in evaluation mode; nothing before the layers changes while this is in use.
        layers: that are open.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._layers = list(layers)
        self._budget = _BUDGET_BYTES
        self._recordings: dict[int, list[tuple[nn.Module, Any]]] = {}
        self._trusted: bool | None = None
        self._recorded: list[tuple[nn.Module, Any]] | None = None
        self._leaves: list[Tensor] = []
        self._versions: list[int] = []
        self._written = False
        self._left: list[tuple[nn.Module, Any]] = []
        self._depth = 0
        self._past = True  # the layer has been called: nothing is frozen any more
        around = {
            id(module)
            for module in model.modules()
            if any(inner is layer for layer in self._layers for inner in module.modules())
        }
        self._before = [
            module
            for module in model.modules()
            if id(module) not in around and not isinstance(module, torch.jit.ScriptModule)
        ]
        inside = {id(inner) for layer in self._layers for inner in layer.modules()}
        self._before = [module for module in self._before if id(module) not in inside]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block the model's modules ask here before they compute."""
        own = [(module, module.__dict__.get("forward")) for module in self._before]
        handles = [layer.register_forward_pre_hook(self._reached) for layer in self._layers]
        try:
            for module in self._before:
                module.forward = self._asking(module, module.forward)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, forward in own:
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = forward

    def run(self, batch: int, compute: Callable[[], Tensor]) -> Tensor:
        """The loss of a batch by number; `compute` runs the model on it."""
        if self._trusted is False:
            return compute()
        if batch in self._recordings:
            return self._replay(batch, compute)
        if self._budget <= 0:
            return compute()
        self._start(record=True)
        try:
            loss = compute()
            self._note_writes()
        finally:
            recorded, self._recorded, self._past = self._recorded, None, True
            self._leaves = []
        if self._written:
            self._trusted = False
            self._recordings.clear()
            return loss
        self._recordings[batch] = recorded or []
        self._budget -= sum(_bytes(output) for _, output in self._recordings[batch])
        if self._trusted is None:
            self._trusted = self._repeats(batch, compute, loss.detach())
            if not self._trusted:
                self._recordings.clear()
        return loss

    def _repeats(self, batch: int, compute: Callable[[], Tensor], loss: Tensor) -> bool:
        try:
            # In the grad mode of the recording: kernels differ between the two in the last bit.
            return torch.equal(self._replay(batch, compute).detach(), loss)
        except Exception:
            # A model that cannot be replayed is computed in full; an error of its own comes up
            # there again.
            return False

    def _replay(self, batch: int, compute: Callable[[], Tensor]) -> Tensor:
        self._start(record=False)
        self._left = list(reversed(self._recordings[batch]))
        try:
            return compute()
        finally:
            self._past = True

    def _start(self, *, record: bool) -> None:
        self._recorded = [] if record else None
        self._leaves, self._versions, self._written = [], [], False
        self._left = []
        self._depth = 0
        self._past = False

    def _reached(self, _layer: nn.Module, _args: Any) -> None:
        self._past = True

    def _asking(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if self._past or self._depth:
                return forward(*args, **kwargs)
            if self._recorded is None:
                if self._left and self._left[-1][0] is module:
                    return self._left.pop()[1]
                self._past = True  # another path than before: go on without help
                return forward(*args, **kwargs)
            self._note_writes()
            self._depth += 1
            try:
                output = forward(*args, **kwargs)
            finally:
                self._depth -= 1
            self._recorded.append((module, output))
            self._leaves += tensors_in(output)
            self._versions = [version_of(leaf) for leaf in self._leaves]
            return output

        return ask

    def _note_writes(self) -> None:
        """Whether what was recorded has been written to since the last recorded module ended."""
        if self._versions != [version_of(leaf) for leaf in self._leaves]:
            self._written = True


def _bytes(output: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tensors_in(output))
