"""Tracing a model with torch.export, with open sizes, and translating it to an ONNX graph."""

import contextlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mpocompress.errors import ExportError
from mpocompress.export.calls import ForwardCall, TensorForward, first_line, run
from mpocompress.export.inputs import BATCH, SEQUENCE
from mpocompress.export.recurrence import OpenLengths, translations
from mpocompress.mpo.integers import Stored

if TYPE_CHECKING:
    import onnx_ir as ir

# They warn about what their users cannot change: optional packages, sizes that we ask them to fix.
_CHATTY_LOGGERS = ("torch.onnx", "torch._export", "torch.fx.experimental", "onnxscript", "onnx_ir")

_UNTRANSLATED = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")


@dataclass(frozen=True, slots=True)
class Trace:
    """A traced model.

    Attributes:
        program: of a `TensorForward`: tensors in, tensors out.
        call: the forward call that it was traced with.
        symbols: the tracer's symbol for the size of each axis of each input; None where fixed.
    """

    program: ExportedProgram
    call: ForwardCall
    symbols: tuple[tuple[str | None, ...], ...]

    def size_names(self) -> dict[tuple[int, int], str]:
        """What the open sizes are called in a file, by (input, axis).

        "batch" for dimension 0, "sequence" for dimension 1 of token ids, masks and sequences of
        vectors, and after the input for the rest.
        """
        found: dict[tuple[int, int], str] = {}
        by_symbol: dict[str, str] = {}
        sequence: int | None = None  # its size in the example
        for index, (symbols, tensor) in enumerate(
            zip(self.symbols, self.call.tensors, strict=True)
        ):
            for axis, symbol in enumerate(symbols):
                if symbol is None:
                    continue
                size = int(tensor.shape[axis])
                is_sequence = axis == 1 and (is_tokens(tensor) or tensor.ndim == 3)
                if axis == 0:
                    name = BATCH
                elif symbol in by_symbol:
                    name = by_symbol[symbol]
                elif is_sequence and sequence in (None, size):
                    # Even under different symbols: ids and mask of the same sentences, whose sizes
                    # the tracer has not seen together.
                    name, sequence = SEQUENCE, size
                else:
                    name = f"{self.call.names[index]}_{axis}"
                found[index, axis] = by_symbol[symbol] = name
        return found


def is_tokens(tensor: Tensor) -> bool:
    """Whether an input is (batch, sequence): token ids, their types, masks."""
    return tensor.ndim == 2 and not tensor.is_floating_point()


def traceable(call: ForwardCall) -> ForwardCall:
    """The call with sizes that tracing does not mistake for constants.

    torch.export takes sizes 0 and 1 for constants, and code that compares two sizes would tie the
    batch to another dimension of that size: so two rows, or the next number that is not taken.
    """
    tensors = [
        tensor.repeat(1, 2) if is_tokens(tensor) and tensor.shape[1] == 1 else tensor
        for tensor in call.tensors
    ]
    taken = {size for tensor in tensors for size in tensor.shape[1:]}
    rows = next(size for size in range(2, len(taken) + 3) if size not in taken)
    return call.with_tensors(tensors).with_rows(rows)


def trace(model: nn.Module, call: ForwardCall) -> Trace:
    """Trace a model, leaving open every size that it does not depend on.

    Args:
        model: in eval mode, float32, on the CPU.
        call: as `traceable` gives it; the model runs on it.

    Raises:
        ExportError: the model cannot be traced, or fixes the batch dimension.
    """
    open_axes = [
        {axis for axis, size in enumerate(tensor.shape) if size > 1} for tensor in call.tensors
    ]
    with torch.no_grad(), _quiet():
        traced = _trace_once(model, call, open_axes)
        refused = _refused_axes(model, traced)
        if any(refused):
            open_axes = [have - drop for have, drop in zip(open_axes, refused, strict=True)]
            traced = _trace_once(model, call, open_axes)
    for name, tensor, symbols in zip(call.names, call.tensors, traced.symbols, strict=True):
        if tensor.ndim and symbols[0] is None:
            raise ExportError(
                f"the batch dimension (0) of input {name!r} is fixed to {tensor.shape[0]}, the "
                f"size it was traced with, by code in {type(model).__name__}.forward. Take sizes "
                "from x.shape[0] or -1 in reshape and expand, not from constants; where dimension "
                "0 is time, give recurrent layers with a projection batch_first=True."
            )
    return traced


def _trace_once(model: nn.Module, call: ForwardCall, open_axes: Sequence[set[int]]) -> Trace:
    shapes = tuple(
        {axis: Dim.AUTO if axis in axes else Dim.STATIC for axis in range(tensor.ndim)}
        for tensor, axes in zip(call.tensors, open_axes, strict=True)
    )
    try:
        # On failure torch prints the graph that it has so far.
        with contextlib.redirect_stderr(io.StringIO()), OpenLengths():
            program = torch.export.export(
                TensorForward(model, call),
                call.tensors,
                dynamic_shapes={"tensors": shapes},
                strict=False,
            )
        einsum = torch.ops.aten.einsum.default
        if any(node.target is einsum for node in program.graph.nodes):
            # ONNX Runtime runs Einsum slower than the matrix products that it stands for.
            table = torch.export.default_decompositions()
            program = program.run_decompositions({einsum: table[einsum]})
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be traced: {_describe(error)}{_place(error)}. "
            f"{_advice(error)}"
        ) from error
    return Trace(program, call, _symbols(program))


def _symbols(program: ExportedProgram) -> tuple[tuple[str | None, ...], ...]:
    inputs = set(program.graph_signature.user_inputs)
    # A size that the model has fixed while it was traced still is a SymInt, with a number in it.
    return tuple(
        tuple(None if str(size).isdigit() else str(size) for size in node.meta["val"].shape)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in inputs
    )


def _refused_axes(model: nn.Module, traced: Trace) -> list[set[int]]:
    """Axes that the tracer left open although the model accepts no other size.

    It does so where a guard is not linear, as between height and width of an image that a
    `Linear` sees flattened. So PyTorch is asked: neither twice the size nor half of it will do.
    PyTorch's adaptive pooling takes any size, but ONNX has none: what is written is pooling with
    the window of the traced size.
    """
    call = traced.call
    pooled = _adaptively_pooled(traced.program)
    refused: list[set[int]] = [set() for _ in call.tensors]
    for symbol in dict.fromkeys(chain.from_iterable(sizes[1:] for sizes in traced.symbols)):
        places = [
            (index, axis)
            for index, sizes in enumerate(traced.symbols)
            for axis, size in enumerate(sizes)
            if size == symbol
        ]
        if symbol is None or any(axis == 0 or is_tokens(call.tensors[i]) for i, axis in places):
            continue
        index, axis = places[0]
        size = call.tensors[index].shape[axis]
        others = (2 * size, size // 2)
        if (
            symbol in pooled
            or not any(_accepts(model, call, places, n) for n in others)
            or _is_padded_for(size, model, traced, places)
        ):
            for index, axis in places:
                refused[index].add(axis)
    return refused


def _adaptively_pooled(program: ExportedProgram) -> set[str]:
    """Symbols of the sizes that adaptive pooling brings to fixed ones other than 1."""
    found: set[str] = set()
    for node in program.graph.nodes:
        if not str(node.target).startswith("aten.adaptive_"):
            continue
        wanted = [node.args[1]] if isinstance(node.args[1], int) else list(node.args[1])
        if all(size == 1 for size in wanted):  # over everything: there is an operator for that
            continue
        for size in node.args[0].meta["val"].shape[-len(wanted) :]:
            if isinstance(size, torch.SymInt):
                found.update(map(str, size.node.expr.free_symbols))
    return found


def _accepts(
    model: nn.Module, call: ForwardCall, places: Sequence[tuple[int, int]], size: int
) -> bool:
    try:
        run(model, _resized(call, places, size))
    except Exception:  # whatever the model's own code raises on a size that it does not know
        return False
    return True


def _is_padded_for(
    size: int, model: nn.Module, traced: Trace, places: Sequence[tuple[int, int]]
) -> bool:
    """Whether the program is right for pictures that need no other padding than the traced one.

    Code such as `if height % window` leaves one of its branches in the program, and a guard on the
    size, which a file has not.
    """
    call = _resized(traced.call, places, size + 3)
    if any(call.tensors[index].ndim < 4 for index, _ in places):
        return False
    try:
        expected = run(model, call)
    except Exception:  # whatever the model's own code raises: it does not take this size at all
        return False
    try:
        with torch.no_grad():
            actual = traced.program.module()(*call.tensors)
    except Exception:  # a guard, or an operation on sizes that do not fit
        return True
    return [t.shape for t in actual] != [t.shape for t in expected.values()]


def _resized(call: ForwardCall, places: Sequence[tuple[int, int]], size: int) -> ForwardCall:
    tensors = list(call.tensors)
    for index, axis in places:
        positions = torch.arange(size, device="cpu") % tensors[index].shape[axis]
        tensors[index] = tensors[index].index_select(axis, positions)
    return call.with_tensors(tensors)


def translate(
    traced: Trace,
    opset: int,
    name: str,
    *,
    integers: Mapping[str, Stored] | None = None,
    first_names: Mapping[str, str] | None = None,
) -> "ir.Model":
    """Translate a traced model to ONNX and simplify the graph.

    Args:
        traced: the model.
        opset: version of the default operator set.
        name: of the model, for messages.
        integers: parameters that are stored as integers, by their first name in the model.
        first_names: the name that a parameter with several names has first in the model, by name.

    Raises:
        ExportError: an operation has no counterpart in ONNX.
    """
    from mpocompress.export import graph

    try:
        with torch.no_grad(), _quiet():
            translated = torch.onnx.export(
                traced.program,
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
                custom_translation_table=translations(),
            )
            if translated is None:
                raise RuntimeError("torch's exporter returned no graph")
            graph.simplify(translated.model, integers, first_names)
            _check_opset(translated.model, opset)
    except Exception as error:
        raise ExportError(
            f"{name} cannot be translated to ONNX opset {opset}: {_describe(error)}. "
            f"{_advice(error)}"
        ) from error
    return translated.model


def _check_opset(model: "ir.Model", opset: int) -> None:
    written = dict(model.opset_imports)
    if written != {"": opset}:
        raise RuntimeError(f"the graph needs the operator sets {written}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's log messages and warnings about its own insides."""
    levels = {name: logging.getLogger(name).level for name in _CHATTY_LOGGERS}
    with warnings.catch_warnings():
        for module in (r"torch\.", "onnxscript", "onnx_ir", "copyreg"):
            warnings.filterwarnings("ignore", module=module)
        # Of the list in which recurrent modules keep their weights.
        warnings.filterwarnings("ignore", message="The tensor attributes self.model")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _root(error: BaseException) -> BaseException:
    """What torch's exporter wraps into its own exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _describe(error: BaseException) -> str:
    root = _root(error)
    operator = _UNTRANSLATED.search(str(root))
    if operator:
        return f"ONNX has no counterpart for {operator[1]}"
    if _depends_on_values(root):
        return "what it computes depends on the value of a tensor"
    return f"{type(root).__name__}: {first_line(root)}"


def _depends_on_values(error: BaseException) -> bool:
    return type(error).__name__.startswith("GuardOnDataDependent")


def _place(error: BaseException) -> str:
    """The innermost line of the model's code, without the path of the file."""
    torch_folder = str(Path(torch.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(_root(error).__traceback__)
        if not frame.filename.startswith((torch_folder, str(Path(__file__).parent), "<"))
    ]
    if not frames:
        return ""
    return f", at {Path(frames[-1].filename).name}:{frames[-1].lineno} `{frames[-1].line}`"


def _advice(error: BaseException) -> str:
    root = _root(error)
    if _UNTRANSLATED.search(str(root)):
        return "Replace this operation in the model, or move it out of the exported part."
    if _depends_on_values(root):
        return "Choose by torch.where instead of by an if, or outside of forward."
    return "Write this part of forward with plain tensor operations, or export the part around it."
