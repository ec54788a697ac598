"""Find the residual stream that a layer's output is added to, by watching the dense model run."""

import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn

from mpocompress.tuning.lockstep import OperationRecorder, main_output, version_of

# Additions, and the sign of what is added.
_ADDS = {"aten::add": 1, "aten::add_": 1, "aten::sub": -1, "aten::sub_": -1}
# Products with a number.
_SCALES = frozenset({"aten::mul", "aten::div"})
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


class Stream(NamedTuple):
    """A residual stream h that the output y of a layer is added to, in a h + b y.

    `number` is that of the operation that made h, `weight` is a / b.
    """

    number: int
    value: Tensor
    weight: float


class _Source(NamedTuple):
    """The call of a layer that a tensor is a multiple of the output of."""

    layer: nn.Module
    called: int
    factor: float
    value: weakref.ref[Tensor]
    version: int


class StreamWatcher(OperationRecorder):
    """Follows the outputs of layers to the addition that consumes them.

    A layer feeds a residual stream if its output, perhaps reshaped, through a dropout or times a
    number, is added to a tensor of the same shape that existed before the layer was called, or
    subtracted from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[int, weakref.ref[Tensor]]] = {}
        self._from: dict[int, _Source] = {}
        self._streams: dict[nn.Module, tuple[Stream, int]] = {}

    def take_stream(self, layer: nn.Module) -> Stream | None:
        """The stream that the layer's latest output went into, once.

        None also if the model has changed that value in place since.
        """
        stream, version = self._streams.pop(layer, (None, 0))
        if stream is None or version_of(stream.value) != version:
            return None
        return stream

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
        self._follow(output, layer, number, 1.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, number it, and see whether it adds a layer's output to a stream."""
        name = func._schema.name
        if name in _ADDS and len(args) >= 2 and not self._inside:
            weight = _ADDS[name] * (kwargs or {}).get("alpha", 1)
            self._look_at_addition(args[0], args[1], weight, in_place=name.endswith("_"))
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if self._inside or not args:
            return output
        factor = 1.0 if name in _PASSES else _number(name, args) if name in _SCALES else None
        if factor is not None:
            source, value = self._source(args[0]), main_output(output)
            if source is not None and value is not None:
                self._follow(value, source.layer, source.called, factor * source.factor)
        return output

    def _look_at_addition(self, left: Any, right: Any, weight: Any, *, in_place: bool) -> None:
        """See whether left + weight * right is a stream and a layer's output."""
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return
        if left.shape != right.shape:
            return
        if not isinstance(weight, int | float):
            return
        ways = ((left, right, float(weight)), (right, left, 1 / weight if weight else 0.0))
        for branch, stream, share in ways:
            source = self._source(branch)
            made = self._made.get(id(stream))
            if source is None or made is None or made[1]() is not stream:
                continue
            if not (share and source.factor):
                return
            # Of two layers that are added to each other, the later one corrects the earlier.
            if made[0] < source.called:
                before = stream.clone() if in_place and stream is left else stream
                found = Stream(made[0], before, share / source.factor)
                self._streams[source.layer] = (found, version_of(before))
                return

    def _follow(self, value: Tensor, layer: nn.Module, called: int, factor: float) -> None:
        kept = weakref.ref(value)
        self._from[id(value)] = _Source(layer, called, factor, kept, version_of(value))

    def _source(self, value: Any) -> _Source | None:
        """None for what has been changed in place since, too, as by an activation."""
        found = self._from.get(id(value))
        kept = None if found is None else found.value()
        if found is None or kept is None or kept is not value:
            return None
        return found if version_of(kept) == found.version else None


def _number(name: str, args: Any) -> float | None:
    """What the first argument is multiplied by, if that is a number."""
    other = args[1] if len(args) == 2 else None
    if not isinstance(other, int | float):
        return None
    if name == "aten::mul":
        return float(other)
    return 1 / other if other else None
