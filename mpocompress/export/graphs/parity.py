"""A compressed graph in ONNX Runtime against the original one with the densified weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor

from mpocompress.errors import DataError, ParityError
from mpocompress.export.agreement import num_infinite
from mpocompress.export.calls import first_line
from mpocompress.export.graphs.find import GraphSite
from mpocompress.export.graphs.model import OnnxModel
from mpocompress.export.graphs.sessions import Feed, GraphInputs, Session
from mpocompress.export.graphs.tensors import FLOATS, is_external
from mpocompress.export.graphs.write import write_graph
from mpocompress.export.inputs import symbols
from mpocompress.export.session import arrays_of
from mpocompress.export.verify import Comparison, ParityResult

# Tried besides the data, or instead of it.
_BATCH_SIZES = (1, 3, 7)
# Of batches made up for one batch size, the sizes of other open dimensions, from the guessed ones.
_OTHER_SIZES = (lambda size: size, lambda size: size // 2 + 1, lambda size: size + 3)
_REFERENCE = "reference.onnx"
_QUANTIZERS = frozenset(
    {
        *("QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QLinearMatMul"),
        *("QLinearConv", "MatMulInteger", "MatMulNBits"),
    }
)


def compare_graphs(
    path: Path,
    reference: tuple[ModelProto, Mapping[str, Callable[[], Tensor]]],
    folder: Path,
    inputs: GraphInputs,
    feeds: Iterable[Feed] | None,
    *,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> ParityResult:
    """Run the written file and the reference on the same feeds.

    With feeds, each is compared as it comes and the first one again at each batch size; without,
    inputs are made up, with other sizes of all open dimensions for each batch size.

    Args:
        path: the compressed file; for the time of the run the reference is written beside it.
        reference: as `with_matrices` gives it; is changed, see `write_graph`.
        folder: of the external data of the reference.
        inputs: of both.
        feeds: data, or None.
        tolerance: largest difference of an output, relative to its largest entry.
        seed: of what is made up.

    Raises:
        DataError: the reference does not run on the feeds.
        ParityError: the compressed graph does not run where the reference does.
        LoadError: ONNX Runtime cannot open one of them.
    """
    beside = path.with_name(_REFERENCE)
    try:
        write_graph(reference[0], folder, beside, computed=reference[1])
        dense = Session(beside, folder, f"the dense graph of {inputs.name}")
        compressed = Session(path, path.parent, f"the compressed graph of {inputs.name}")
        comparison = Comparison()
        made_up = feeds is None
        refused: DataError | None = None
        for rows, feed, optional in _all_feeds(dense, inputs, feeds, seed):
            try:
                expected = _run(dense, feed, inputs, made_up)
            except DataError as error:
                if not optional:
                    raise
                refused = error  # a batch size that the graph itself does not take
                continue
            try:
                actual = compressed.run(feed)
            except Exception as error:
                raise ParityError(
                    f"the compressed graph does not run where the dense one does: "
                    f"{first_line(error)}. Please report this; the model's name helps."
                ) from error
            for name, ours, theirs in zip(dense.outputs, actual, expected, strict=True):
                _add(comparison, name, arrays_of(ours), arrays_of(theirs))
            comparison.count(rows)
        if refused is not None and not comparison.samples:
            raise refused
    finally:
        beside.unlink(missing_ok=True)
        beside.with_name(f"{_REFERENCE}.data").unlink(missing_ok=True)
    return comparison.result(tolerance, _with_nan(reference[0]))


def _with_nan(model: ModelProto) -> Iterator[str]:
    for tensor in model.graph.initializer:
        if tensor.data_type not in FLOATS or is_external(tensor):
            continue
        if np.isnan(numpy_helper.to_array(tensor).astype(np.float64)).any():
            yield tensor.name


def _run(dense: Session, feed: Feed, inputs: GraphInputs, made_up: bool) -> list[object]:
    try:
        return dense.run(feed)
    except Exception as error:
        shown = ", ".join(f"{name} {array.shape}" for name, array in feed.items())
        how = "inputs that were made up" if made_up else "the data"
        raise DataError(
            f"{inputs.name} does not run on {how} ({shown}): {first_line(error)}. It takes "
            f"{inputs.describe()}; give --data, or the shape of each input as --input."
        ) from error


def _all_feeds(
    dense: Session,
    inputs: GraphInputs,
    feeds: Iterable[Feed] | None,
    seed: int,
) -> Iterator[tuple[int, Feed, bool]]:
    """Rows, feed, and whether the dense graph may refuse it."""
    free = bool(inputs.batch_symbols)
    if feeds is not None:
        first: Feed | None = None
        for feed in feeds:
            first = first or feed
            yield _rows(feed), feed, False
        if first is None:
            raise DataError("the data contains no batches.")
        for rows in _BATCH_SIZES if free else ():
            cut = {
                name: array[np.arange(rows) % len(array)] if array.ndim else array
                for name, array in first.items()
            }
            yield rows, cut, True
        return
    generator = torch.Generator().manual_seed(seed)
    examples = symbols(inputs.specs)
    for index, rows in enumerate(_BATCH_SIZES if free else (1,)):
        other = _OTHER_SIZES[index % len(_OTHER_SIZES)]
        batch = dict.fromkeys(inputs.batch_symbols, rows)
        varied = {name: other(size) for name, size in examples.items()}
        made = _best(dense, inputs.made_up(varied | batch, generator))
        if made is None:
            # Sizes that belong together, or that the graph limits: those of the guess then.
            made = _best(dense, inputs.made_up(examples | batch, generator))
        if made is None:
            made = next(inputs.made_up(examples | batch, generator))  # to say why it is refused
        yield _rows(made), made, free


def _best(dense: Session, feeds: Iterator[Feed]) -> Feed | None:
    """The first feed whose outputs are finite, or have the fewest that are not; None if all fail.

    A mask that hides everything makes every number NaN, and NaN agrees with NaN.
    """
    best: Feed | None = None
    fewest = math.inf
    for feed in feeds:
        try:
            outputs = dense.run(feed)
        except Exception:
            continue
        count = sum(num_infinite(array) for value in outputs for array in arrays_of(value))
        if count < fewest:
            best, fewest = feed, count
        if not fewest:
            break
    return best


def _rows(feed: Feed) -> int:
    return next((len(array) for array in feed.values() if array.ndim), 1)


def _add(
    comparison: Comparison, name: str, ours: list[np.ndarray], theirs: list[np.ndarray]
) -> None:
    """Compare an output, which may be a sequence; of labels, count those that differ."""
    if [array.shape for array in ours] != [array.shape for array in theirs]:
        raise ParityError(
            f"output {name!r} has shapes {[array.shape for array in ours]} in the compressed "
            f"graph, but {[array.shape for array in theirs]} in the dense one. Please report "
            "this; the model's name helps."
        )
    output = comparison.output(name)
    for actual, expected in zip(ours, theirs, strict=True):
        if np.issubdtype(expected.dtype, np.floating) or expected.dtype.name == "bfloat16":
            comparison.compare(output, actual.astype(np.float64), expected.astype(np.float64))
            continue
        output.exact = True
        output.numbers += expected.size
        output.finite += expected.size
        output.max_value = max(output.max_value, 1.0)
        output.max_difference = max(output.max_difference, float(np.sum(actual != expected)))


def raise_if_failed(found: ParityResult) -> None:
    """Do nothing if the tolerance is met.

    Raises:
        ParityError: it is not; the message has the figures.
    """
    if found.passed:
        return
    raise ParityError(
        f"the compressed graph and the dense one of the same weights disagree in output "
        f"{found.worst_output!r}: relative difference {found.max_relative_difference:.3g} "
        f"(absolute {found.max_abs_difference:.3g}) over {found.samples} samples in batches of "
        f"{', '.join(map(str, found.batch_sizes))}; allowed is {found.tolerance:.3g}. Exclude the "
        "layers after which numbers become very large or very small."
    )


def tolerance_of(model: OnnxModel, sites: Sequence[GraphSite]) -> float:
    """How far two graphs of the same weights may be apart.

    1e-4 in float32 and wider. Half types round every activation; and where activations are
    quantized, rounding in another order moves some of them by a whole step.
    """
    half = any(site.operand_dtype.itemsize < 4 for site in sites)
    quantized = any(node.op_type in _QUANTIZERS for node in model.graph.node)
    return 5e-2 if half or quantized else 1e-4
