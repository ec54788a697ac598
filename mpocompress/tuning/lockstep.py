"""Run a model over many batches at once, all of them stopped at the same layer.

To fit layer after layer on what the compressed prefix really produces, every batch must be brought
to each layer in turn, once as the dense model and once as the compressed one. Running the prefix
again for every layer would cost a number of passes quadratic in the depth; cutting the model into
blocks would need to understand its graph. Instead every batch runs in a thread of its own, which
waits inside the layer until it may go on: one pass in all, through any code.

Only one thread runs at a time, so nothing in the model sees concurrency.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mpocompress.errors import DataError
from mpocompress.layers.modes import OwnDraws, seeded


class Call(Protocol):
    """Arguments of one forward call."""

    @property
    def args(self) -> Sequence[Any]:
        """Positional arguments."""
        ...

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Arguments by name."""
        ...


def version_of(value: Tensor) -> int:
    """How often a tensor has been changed in place; of those that torch does not count, 0."""
    return 0 if value.is_inference() else value._version


def rows_of(call: Call) -> int:
    """Size of the first dimension of the first argument that has one."""
    return next(t.shape[0] for t in (*call.args, *call.kwargs.values()) if t.ndim)


def seeded_call(model: nn.Module, call: Call, seed: int) -> Any:
    """What a model returns for a batch; models that are given the same seed draw the same."""
    with seeded(model, seed):
        return model(*call.args, **call.kwargs)


@dataclass(slots=True)
class Arrival:
    """One batch at one layer.

    Attributes:
        layer: that is about to be called.
        input: what it is called with.
    """

    layer: nn.Module
    input: Tensor


class Runner:
    """One batch on its way through a model, in a thread that stops at chosen layers.

    Args:
        model: in evaluation mode; may be shared with other runners.
        call: the batch.
        recorder: of the operations.
        seed: of what the model draws from torch's global generators: runners with equal seeds draw
            the same numbers, whatever others draw between two stops.
    """

    def __init__(
        self, model: nn.Module, call: Call, recorder: "OperationRecorder", *, seed: int = 0
    ) -> None:
        self.arrival: Arrival | None = None
        self.error: BaseException | None = None
        self.output: Any = None
        self._model = model
        self._call = call
        self.recorder = recorder
        self._compute: Callable[[Tensor], Tensor] | None = None
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._draws = OwnDraws(model, seed)

    def start(self) -> None:
        """Run to the first stop."""
        with self._draws.going_on():
            self._thread.start()
            self._stopped.acquire()
        self._raise()

    def resume(self, compute: Callable[[Tensor], Tensor]) -> None:
        """Let `compute` stand for the layer where this runner waits; run to the next stop."""
        self._compute = compute
        self.arrival = None
        with self._draws.going_on():
            self._go.release()
            self._stopped.acquire()
        self._raise()

    def abandon(self) -> None:
        """End the thread where it waits."""
        self._abandoned = True
        if self._thread.is_alive():
            self._go.release()
            self._thread.join()

    def stop_at(self, layer: nn.Module, value: Tensor) -> Tensor:
        """Called by the layer, in the runner's thread: wait, then compute."""
        self.arrival = Arrival(layer, value)
        self._stopped.release()
        self._go.acquire()
        if self._abandoned or self._compute is None:
            raise _Abandoned
        return self.call_layer(layer, self._compute, value)

    def call_layer(
        self, layer: nn.Module, compute: Callable[[Tensor], Tensor], value: Tensor
    ) -> Tensor:
        """Compute a layer as a single operation of the recorder."""
        with self.recorder.as_one():
            output = compute(value)
        self.recorder.note_layer(layer, output)
        return output

    def _run(self) -> None:
        _current.runner = self
        try:
            with torch.no_grad(), self.recorder:
                self.output = self._model(*self._call.args, **self._call.kwargs)
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self._stopped.release()

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


class _Abandoned(BaseException):
    """Unwinds the thread of a runner that nobody waits for."""


_current = threading.local()


@contextmanager
def stopping_layers(
    layers: Sequence[nn.Module], compute: Callable[[nn.Module, Runner, Tensor], Tensor]
) -> Iterator[None]:
    """Within the block, calls of these layers inside a runner go through `compute`.

    Raises:
        DataError: a layer is called with other than one tensor.
    """
    forwards = {layer: layer.forward for layer in layers}

    def divert(layer: nn.Module) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            values = (*args, *kwargs.values())
            if len(values) != 1 or not isinstance(values[0], Tensor):
                raise DataError(
                    f"a {type(layer).__name__} was called with {len(values)} arguments; only "
                    "layers that are called with one tensor can be fitted. Exclude it."
                )
            runner: Runner | None = getattr(_current, "runner", None)
            if runner is None:
                return forwards[layer](*args, **kwargs)
            return compute(layer, runner, values[0])

        return forward

    try:
        for layer in layers:
            layer.forward = divert(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


class OperationRecorder(TorchDispatchMode):
    """Numbers the operations of a run, and finds an output again by its number while it lives.

    What happens inside a layer that may be replaced counts as one operation, so the numbers of one
    batch are the same in the dense and in the compressed model. (Those of two batches need not be:
    libraries skip masks that mask nothing.) Only weak references are kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self._count = 0
        self._inside = False
        self._outputs: dict[int, weakref.ref[Tensor]] = {}

    @property
    def count(self) -> int:
        """How many operations have been numbered."""
        return self._count

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Do not number the operations within."""
        before, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = before

    def note(self, output: Any) -> int:
        """Number one operation; of several outputs the first is the one that counts."""
        number = self._count
        if not self._inside:
            value = main_output(output)
            if value is not None:
                self._outputs[number] = weakref.ref(value)
            self._count += 1
        return number

    def note_layer(self, layer: nn.Module, output: Tensor) -> None:
        """Number the call of a layer; what the layer is matters to those who watch streams."""
        self.note(output)

    def output(self, number: int) -> Tensor | None:
        """The output of an operation, if it is still alive."""
        reference = self._outputs.get(number)
        return None if reference is None else reference()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and number it."""
        output = func(*args, **(kwargs or {}))
        self.note(output)
        return output


def floating_outputs(outputs: Any) -> list[Tensor]:
    """All floating tensors in what a model returned, in the order of its structure."""
    return [leaf for leaf in tensors_in(outputs) if leaf.is_floating_point()]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a structure, in its order; dataclasses are structures, too."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from tensors_in(getattr(leaf, field.name))


def main_output(output: Any) -> Tensor | None:
    """The tensor that an operation is called for: norms and attention return statistics, too."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None
