"""Find the residual stream that a layer's output is added to, by watching the dense model run."""

import weakref
from typing import Any

from torch import Tensor, nn

from mpocompress.tuning.lockstep import OperationRecorder, main_output, version_of

_ADDS = frozenset({"aten::add", "aten::add_"})
# Operations that hand a tensor on unchanged, up to its shape.
_PASSES = frozenset(
    {
        "aten::view",
        "aten::_unsafe_view",
        "aten::reshape",
        "aten::alias",
        "aten::clone",
        "aten::contiguous",
        "aten::detach",
        "aten::dropout",
        "aten::native_dropout",
        "aten::_to_copy",
        "aten::unsqueeze",
        "aten::squeeze",
    }
)


class StreamWatcher(OperationRecorder):
    """Follows the outputs of layers to the addition that consumes them.

    A layer feeds a residual stream if its output, perhaps reshaped or through a dropout, is added
    to a tensor of the same shape that existed before the layer was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[int, weakref.ref[Tensor]]] = {}
        self._from: dict[int, tuple[nn.Module, int, weakref.ref[Tensor]]] = {}
        self._streams: dict[nn.Module, tuple[int, Tensor, int]] = {}

    def take_stream(self, layer: nn.Module) -> tuple[int, Tensor] | None:
        """Number and value of the stream that the layer's latest output went into, once.

        None also if the model has changed that value in place since.
        """
        number, stream, version = self._streams.pop(layer, (0, None, 0))
        if stream is None or version_of(stream) != version:
            return None
        return number, stream

    def note(self, output: Any) -> int:
        """Number one operation."""
        number = super().note(output)
        value = main_output(output)
        if value is not None and not self._inside:
            self._made.setdefault(id(value), (number, weakref.ref(value)))
            if self._made[id(value)][1]() is not value:  # the id of a tensor that is gone
                self._made[id(value)] = (number, weakref.ref(value))
        return number

    def note_layer(self, layer: nn.Module, output: Tensor) -> None:
        """Number the call of a layer and follow its output."""
        number = self.note(output)
        self._from[id(output)] = (layer, number, weakref.ref(output))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, number it, and see whether it adds a layer's output to a stream."""
        name = func._schema.name
        if name in _ADDS and len(args) >= 2 and not self._inside:
            self._look_at_addition(args[0], args[1], in_place=name.endswith("_"))
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if self._inside or not args:
            return output
        if name in _PASSES:
            source, value = self._source(args[0]), main_output(output)
            if source is not None and value is not None:
                self._from[id(value)] = (*source, weakref.ref(value))
        return output

    def _look_at_addition(self, left: Any, right: Any, *, in_place: bool) -> None:
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return
        if left.shape != right.shape:
            return
        for branch, stream in ((left, right), (right, left)):
            source = self._source(branch)
            made = self._made.get(id(stream))
            if source is None or made is None or made[1]() is not stream:
                continue
            layer, called = source
            # Of two layers that are added to each other, the later one corrects the earlier.
            if made[0] < called:
                before = stream.clone() if in_place and stream is left else stream
                self._streams[layer] = (made[0], before, version_of(before))
                return

    def _source(self, value: Any) -> tuple[nn.Module, int] | None:
        found = self._from.get(id(value))
        return None if found is None or found[2]() is not value else found[:2]
