"""ONNX Runtime against PyTorch: does the file compute what the model computes?"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mpocompress.errors import DataError, ParityError
from mpocompress.export import inputs
from mpocompress.export.agreement import (
    check_tolerance,
    differences,
    nothing_compared,
    num_infinite,
)
from mpocompress.export.calls import Batch, ForwardCall, first_line, inference_copy, run
from mpocompress.export.inputs import InputSpec
from mpocompress.export.session import described_inputs, named_arrays, open_session
from mpocompress.scalars import as_integer, as_seed

# Of the batches made up for one batch size, the sizes of the other dimensions, from the example's.
_OTHER_SIZES = (lambda size: size // 2 + 1, lambda size: size + 3, lambda size: size)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityResult:
    """How far ONNX Runtime's outputs are from PyTorch's.

    Attributes:
        max_abs_difference: largest difference of any number in any output; infinite where one side
            is NaN or infinite and the other is not.
        max_relative_difference: largest over the outputs of `max|onnx - torch| / max|torch|`, both
            maxima over all samples. Integers and booleans must be equal: 1 or more if they are not.
        tolerance: what `max_relative_difference` may be.
        batch_sizes: sizes of the compared batches, ascending.
        argmax_agreement: share of rows in which both sides have the same largest entry, over all
            floating outputs with two dimensions (class logits); None where there is none.
        passed: whether the tolerance is met.
        outputs: names of the compared outputs.
        samples: number of compared rows.
        worst_output: the output with the largest relative difference.
    """

    max_abs_difference: float
    max_relative_difference: float
    tolerance: float
    batch_sizes: tuple[int, ...]
    argmax_agreement: float | None
    passed: bool
    outputs: tuple[str, ...]
    samples: int
    worst_output: str

    def raise_if_failed(self) -> None:
        """Do nothing if the tolerance is met.

        Raises:
            ParityError: it is not; the message has the figures.
        """
        if self.passed:
            return
        raise ParityError(
            f"ONNX Runtime and PyTorch disagree in output {self.worst_output!r}: relative "
            f"difference {self.max_relative_difference:.3g} (absolute "
            f"{self.max_abs_difference:.3g}) over {self.samples} samples in batches of "
            f"{', '.join(map(str, self.batch_sizes))}; allowed is {self.tolerance:.3g}. "
            "Where the model itself gives other outputs in float64, rounding grows in it: "
            "compress less, exclude the layers before this output, allow more (tolerance in "
            "Python), or write cores alone (--no-onnx)."
        )


def verify(
    onnx_path: str | os.PathLike[str],
    reference: nn.Module,
    data: Iterable[Batch] | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 3, 7),
    tolerance: float = 1e-4,
    seed: int = 0,
) -> ParityResult:
    """Compare an ONNX file in ONNX Runtime (CPU) with a PyTorch model.

    The model runs in eval mode and float32, and stays as it is. With data, every batch is compared
    as it comes, and the first one again at each of the batch sizes. Without data, batches are made
    up after the description of the inputs in the file: for each batch size with other lengths of
    the dynamic dimensions, token indices from the whole vocabulary, and masks with padding.
    All positions are compared, padded ones too (PyTorch's fused transformer layers, which would set
    those to zero, are off); NaN at the same place on both sides is agreement.

    Args:
        onnx_path: the file.
        reference: what it should compute.
        data: batches of forward arguments: tensors, tuples or dicts (labels in dicts are ignored).
        batch_sizes: to try besides the batches of the data.
        tolerance: largest relative difference of an output; see `ParityResult`.
        seed: of the made-up batches.

    Raises:
        LoadError: the file cannot be read.
        DataError: a batch does not fit the graph's inputs or the model, there are no batches, or
            impossible batch sizes or tolerances.
        ParityError: ONNX Runtime does not run on a batch on which PyTorch does, or the outputs
            differ in number or shape, or all are NaN throughout. A mere difference of values is in
            the result.
    """
    tolerance, seed = check_tolerance(tolerance), as_seed(seed)
    sizes = [as_integer(size) or 0 for size in batch_sizes]
    if min(sizes, default=1 if data is not None else 0) < 1:
        raise DataError(
            f"batch_sizes {list(batch_sizes)}: give one or more, each 1 or more. Try (1, 3, 7)."
        )
    model, _ = inference_copy(reference)
    graph = _Graph(Path(onnx_path), model)
    comparison = Comparison()
    runs = (
        _made_up(graph, model, sizes, seed) if data is None else _given(graph, model, data, sizes)
    )
    for done in runs:
        comparison.count(done.call.rows)
        for name, (ours, theirs) in _matched(graph, done.actual, done.expected).items():
            output = comparison.output(name)
            output.exact = not np.issubdtype(theirs.dtype, np.floating)
            comparison.compare(output, ours, theirs)
    return comparison.result(tolerance, _with_nan(model))


def _with_nan(model: nn.Module) -> Iterator[str]:
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and bool(tensor.isnan().any()):
            yield name


class _Graph:
    """An ONNX file in a session, with what is known of its inputs."""

    def __init__(self, path: Path, model: nn.Module) -> None:
        self.path = path
        self._session = open_session(path)
        self.outputs = tuple(value.name for value in self._session.get_outputs())
        arguments = frozenset(signature(model.forward).parameters)
        self.specs, self.constants = described_inputs(self._session, path, arguments=arguments)

    @property
    def batch_symbols(self) -> frozenset[str]:
        """Names of the batch dimension; none if some input fixes it."""
        sizes = [spec.shape[0] for spec in self.specs if spec.shape]
        names = frozenset(size for size in sizes if isinstance(size, str))
        return names if all(size in names for size in sizes) else frozenset()

    def run(self, call: ForwardCall) -> dict[str, np.ndarray]:
        feed = {
            spec.name: tensor.numpy() for spec, tensor in zip(self.specs, call.tensors, strict=True)
        }
        try:
            values = self._session.run(None, feed)
        except Exception as error:
            raise ParityError(
                f"ONNX Runtime does not run {self.path} on {call.describe()}, although PyTorch "
                f"does: {first_line(error)}. Export the model again with other example inputs."
            ) from error
        return named_arrays(self.outputs, values)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """A call, and what ONNX Runtime and PyTorch give for it."""

    call: ForwardCall
    actual: dict[str, np.ndarray]
    expected: dict[str, Tensor]

    @property
    def num_infinite(self) -> int:
        """How many numbers of the outputs are not finite."""
        expected = (tensor.numpy() for tensor in self.expected.values())
        return sum(map(num_infinite, (*self.actual.values(), *expected)))


def _both(graph: _Graph, model: nn.Module, call: ForwardCall, what: str) -> _Run:
    expected = _expected(model, call, what)
    return _Run(call, graph.run(call), expected)


def _made_up(
    graph: _Graph, model: nn.Module, batch_sizes: Sequence[int], seed: int
) -> Iterator[_Run]:
    generator = torch.Generator().manual_seed(seed)
    examples = inputs.symbols(graph.specs)
    for index, rows in enumerate(batch_sizes if graph.batch_symbols else (1,)):
        other = _OTHER_SIZES[index % len(_OTHER_SIZES)]
        varied = {name: other(size) for name, size in examples.items()}
        batch = dict.fromkeys(graph.batch_symbols, rows)
        try:
            made_up = _made_up_call(graph, model, {**varied, **batch}, generator)
        except DataError:
            # A length that PyTorch refuses (beyond its table of positions) says nothing about the
            # file; what it refuses at the example's length too is a real mistake.
            made_up = _made_up_call(graph, model, {**examples, **batch}, generator)
        yield made_up


def _made_up_call(
    graph: _Graph, model: nn.Module, sizes: Mapping[str, int], generator: torch.Generator
) -> _Run:
    """Inputs on which the outputs are finite, as far as masks decide that.

    Where a mask hides everything, a softmax gives NaN or zeros: neither says anything of the file.
    """

    def attempt(specs: Sequence[InputSpec]) -> _Run:
        tensors = inputs.random_tensors(specs, sizes, generator)
        call = inputs.call_of(specs, graph.constants, tensors)
        return _both(graph, model, call, f"inputs made up for {graph.path}")

    found = attempt(graph.specs)
    for specs in inputs.other_conventions(graph.specs):
        if not found.num_infinite:
            break
        with suppress(DataError, ParityError):
            found = min(found, attempt(specs), key=lambda tried: tried.num_infinite)
    return found


def _given(
    graph: _Graph, model: nn.Module, data: Iterable[Batch], batch_sizes: Sequence[int]
) -> Iterator[_Run]:
    first: ForwardCall | None = None
    batches = [data] if isinstance(data, (Tensor, np.ndarray, Mapping)) else data
    for number, batch in enumerate(batches):
        call = _fitting(graph, ForwardCall.from_batch(model, batch), number)
        first = first or call
        yield _both(graph, model, call, f"batch {number}")
    if first is None:
        raise DataError("the data contains no batches. Pass at least one, or no data at all.")
    for rows in batch_sizes if graph.batch_symbols else ():
        call = first.with_rows(rows)
        yield _both(graph, model, call, f"batch 0, cut to {rows} rows")


def _expected(model: nn.Module, call: ForwardCall, what: str) -> dict[str, Tensor]:
    try:
        return run(model, call)
    except DataError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise DataError(
            f"{type(model).__name__} does not run on {what} ({call.describe()}): "
            f"{type(error).__name__}: {first_line(error)}. Pass data that it accepts, or the model "
            "that belongs to the file."
        ) from error


def _fitting(graph: _Graph, call: ForwardCall, number: int) -> ForwardCall:
    """The call with its tensors in the order and the dtypes of the graph's inputs."""
    given = dict(zip(call.slots, call.tensors, strict=True))
    wanted = [spec.slot for spec in graph.specs]
    if not set(given) & set(wanted) and len(given) == len(wanted):
        wanted = list(given)  # a file with names of its own: by order
    if set(given) != set(wanted):
        raise DataError(
            f"batch {number} has the arguments {', '.join(call.names)}, but the inputs of "
            f"{graph.path} are {'; '.join(spec.describe() for spec in graph.specs)}. "
            "Pass exactly these."
        )
    tensors = []
    sizes: dict[str, int] = {}
    for slot, spec in zip(wanted, graph.specs, strict=True):
        tensor = given[slot]
        castable = tensor.is_floating_point() == spec.dtype.startswith("float")
        fits = len(spec.shape) == tensor.ndim and all(
            sizes.setdefault(size, actual) == actual if isinstance(size, str) else size == actual
            for size, actual in zip(spec.shape, tensor.shape, strict=True)
        )
        if not fits or not castable:
            raise DataError(
                f"batch {number}: argument {slot!r} is {str(tensor.dtype).removeprefix('torch.')} "
                f"{tuple(tensor.shape)}, but {graph.path} takes {spec.describe()}"
                f"{_known_sizes(spec, sizes)}. Pass tensors of that dtype and shape."
            )
        tensors.append(tensor.to(spec.torch_dtype))
    names = tuple(spec.name for spec in graph.specs)
    return ForwardCall(tuple(wanted), names, tuple(tensors), call.constants)


def _known_sizes(spec: InputSpec, sizes: Mapping[str, int]) -> str:
    known = [f"{size} {sizes[size]}" for size in map(str, spec.shape) if size in sizes]
    return f" with {', '.join(known)}" if known else ""


def _matched(
    graph: _Graph, actual: Mapping[str, np.ndarray], expected: Mapping[str, Tensor]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both sides of each output: by name, or by order in a file with names of its own."""
    if set(actual) <= set(expected):
        names = {name: name for name in actual}
    elif len(actual) == len(expected):
        names = dict(zip(actual, expected, strict=True))
    else:
        raise ParityError(
            f"{graph.path} has the outputs {', '.join(actual)}, but the model returns "
            f"{', '.join(expected)}. Pass the model that belongs to the file."
        )
    pairs = {name: (actual[name], expected[own].numpy()) for name, own in names.items()}
    for name, (ours, theirs) in pairs.items():
        if ours.shape != theirs.shape:
            raise ParityError(
                f"output {name!r} of {graph.path} has shape {ours.shape}, but PyTorch gives "
                f"{theirs.shape}: a size was fixed when the model was traced. Export it again with "
                "another example, or free that dimension in the model."
            )
    return pairs


def _who(suspects: Iterable[str]) -> str:
    found = next(iter(suspects), None)
    if found is None:
        return "Give data on which the model has finite outputs."
    return f"{found!r} of the model has NaN. Compress a checkpoint that has none."


@dataclass(slots=True)
class OutputFigures:
    """Running figures of one output; `exact` for one that is not floating.

    `numbers` counts those that were compared, `finite` which of them are neither NaN nor infinite.
    """

    max_difference: float = 0.0
    max_value: float = 0.0
    exact: bool = False
    numbers: int = 0
    finite: int = 0

    @property
    def relative(self) -> float:
        """Largest difference over largest value; at least 1 for an exact output that differs."""
        if not self.max_difference:
            return 0.0
        ratio = self.max_difference / self.max_value if self.max_value else float("inf")
        return max(ratio, 1.0) if self.exact else ratio


@dataclass(slots=True)
class Comparison:
    """Running figures over all batches; nothing is kept of the batches themselves."""

    outputs: dict[str, OutputFigures] = field(default_factory=dict)
    batch_sizes: set[int] = field(default_factory=set)
    samples: int = 0
    argmax_rows: int = 0
    argmax_equal: int = 0

    def count(self, rows: int) -> None:
        """Note a batch of so many rows."""
        self.batch_sizes.add(rows)
        self.samples += rows

    def output(self, name: str) -> OutputFigures:
        """The figures of an output, begun if it is new."""
        return self.outputs.setdefault(name, OutputFigures())

    def compare(self, output: OutputFigures, actual: np.ndarray, expected: np.ndarray) -> None:
        """Note the differences of two arrays of one shape."""
        difference = differences(actual, expected)
        finite = np.abs(expected[np.isfinite(expected)])
        output.max_difference = max(output.max_difference, float(difference.max(initial=0)))
        output.max_value = max(output.max_value, float(finite.max(initial=0)))
        output.numbers += expected.size
        output.finite += finite.size
        floating = np.issubdtype(expected.dtype, np.floating)
        if floating and expected.ndim == 2 and expected.shape[1] > 1:
            self.argmax_rows += len(expected)
            self.argmax_equal += int((actual.argmax(1) == expected.argmax(1)).sum())

    def result(self, tolerance: float, suspects: Iterable[str] = ()) -> ParityResult:
        """What was found, held against the largest relative difference allowed.

        Args:
            tolerance: the difference.
            suspects: names of tensors that have NaN; asked for where nothing could be compared.

        Raises:
            ParityError: none of the numbers is finite, so that nothing was compared.
        """
        if (nothing := nothing_compared(self.outputs)) is not None:
            raise ParityError(f"{nothing}, over {self.samples} samples. {_who(suspects)}")
        relative = {name: output.relative for name, output in self.outputs.items()}
        worst = max(relative, key=lambda name: relative[name])
        return ParityResult(
            max_abs_difference=max(output.max_difference for output in self.outputs.values()),
            max_relative_difference=relative[worst],
            tolerance=tolerance,
            batch_sizes=tuple(sorted(self.batch_sizes)),
            argmax_agreement=self.argmax_equal / self.argmax_rows if self.argmax_rows else None,
            passed=relative[worst] <= tolerance,
            outputs=tuple(self.outputs),
            samples=self.samples,
            worst_output=worst,
        )
