"""An ONNX file against a reference, and where the difference comes from.

With the compressed model in PyTorch at hand, the difference splits in two: what the export adds
(ONNX Runtime against the compressed model) and what the compression costs (the compressed model
against the reference). Without it there is only the whole.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpocompress.errors import DataError, ParityError
from mpocompress.export.agreement import Agreement, LabelScore, OutputAgreement, check_tolerance
from mpocompress.export.calls import ForwardCall, Slot, first_line, inference_copy, run
from mpocompress.export.session import OnnxFile
from mpocompress.tuning.padding import keep_mask

Arrays = dict[Slot, Tensor]
Outputs = dict[str, np.ndarray]

# What the export alone may add: rounding of float32 in another order.
EXPORT_TOLERANCE = 1e-4

# Batches made up where there are no data, as in `verify`.
_MADE_UP = (1, 3, 7)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """An ONNX file against a reference.

    Attributes:
        total: file against reference, by output of the file.
        export: file against the compressed model in PyTorch; None if that is not at hand.
        approximation: compressed model against the reference, both in PyTorch; likewise.
        quantization: how the file stores its cores ("none", "int8", "int4"). What that costs
            counts as export error where the compressed model has unquantized cores.
        labels: where the data has labels that fit: "output", "measure" ("accuracy" or "R²", as for
            `max_drop`), the scores of "file" and "reference" (None for an R² that is not defined,
            since all labels are equal), and "mean_squared_error", a mapping from both to that
            (None for accuracy).
        made_up: whether the inputs were random because there were no data.
        samples: rows compared.
        tolerance: for the largest relative difference in total; None if it was not asked for.
        failures: one line for each output beyond a tolerance, or that nothing was compared, since
            no output has a finite number.
    """

    total: Mapping[str, OutputAgreement]
    export: Mapping[str, OutputAgreement] | None
    approximation: Mapping[str, OutputAgreement] | None
    quantization: str
    labels: Mapping[str, Any] | None
    made_up: bool
    samples: int
    tolerance: float | None
    failures: tuple[str, ...]

    def raise_if_failed(self) -> None:
        """Do nothing if all tolerances are met.

        Raises:
            ParityError: one is not; the message has the figures.
        """
        if self.failures:
            raise ParityError(f"{'; '.join(self.failures)}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: None for what is not finite.

        Each output has "finite", too: whether its `max_abs_difference` is.
        """
        found = {**asdict(self), "passed": not self.failures}
        for part in (found["total"], found["export"], found["approximation"]):
            for figures in (part or {}).values():
                figures["finite"] = isfinite(figures["max_abs_difference"])
        plain: dict[str, Any] = _finite_or_none(found)
        return plain


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite_or_none(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def compare(
    path: str | os.PathLike[str],
    reference: nn.Module | str | os.PathLike[str],
    data: Iterable[tuple[Arrays, Tensor | None]] | None = None,
    *,
    compressed: nn.Module | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> Comparison:
    """Hold an ONNX file against a PyTorch model or another ONNX file, output by output.

    Models run in eval mode and float32 and stay as they are. Padded positions (where the data has
    an `attention_mask` or its like) are left out of outputs that have positions.

    Args:
        path: the file.
        reference: the dense model, or its ONNX file.
        data: batches as (arrays by argument name or position, labels or None); default: made-up
            inputs of three batch sizes.
        compressed: the model that the file was exported from, to tell export from approximation.
        tolerance: for the largest relative difference of any output; None: the total is only
            reported. What the export adds to a float32 file must stay below 1e-4 in any case.
        seed: of made-up inputs.

    Raises:
        LoadError: a file cannot be read.
        DataError: the data does not fit one of the sides, there are no batches, or a tolerance
            that is not a share.
        ParityError: outputs differ in number or shape. Mere differences are in the result.
    """
    if tolerance is not None:
        tolerance = check_tolerance(tolerance)
    file = OnnxFile(path)
    other: _Side = (
        _Module(reference) if isinstance(reference, nn.Module) else _File(OnnxFile(reference))
    )
    between = None if compressed is None else _Module(compressed)
    total, export, approximation = Agreement(), Agreement(), Agreement()
    scores = {"file": LabelScore(), "reference": LabelScore()}
    samples = 0
    for arrays, labels in _made_up(file, seed) if data is None else data:
        feed = file.feed(arrays, other=other.accepts)
        keep = keep_mask({str(name): tensor for name, tensor in arrays.items()})
        kept = None if keep is None else keep.cpu().numpy()
        actual, expected = file.run(feed), other.run(file, arrays)
        ours, theirs = _paired(file, actual, expected)
        total.add(ours, theirs, kept)
        if between is not None:
            # Under the file's names, as both others: the model's may be different ones.
            _, middle = _paired(file, actual, between.run(file, arrays))
            export.add(ours, middle, kept)
            approximation.add(middle, theirs, kept)
        if labels is not None:
            # Paired, so that labels are held against the same output of both.
            scores["file"].add(ours, labels.cpu().numpy())
            scores["reference"].add(theirs, labels.cpu().numpy())
        samples += next((int(t.shape[0]) for t in arrays.values() if t.ndim), 1)
    if not samples:
        raise DataError("the data contains no batches. Pass at least one, or no data at all.")
    return _result(
        file,
        total,
        (export.result(), approximation.result()) if between is not None else (None, None),
        scores,
        made_up=data is None,
        samples=samples,
        tolerance=tolerance,
    )


def _result(
    file: OnnxFile,
    agreement: Agreement,
    parts: tuple[dict[str, OutputAgreement] | None, dict[str, OutputAgreement] | None],
    scores: Mapping[str, LabelScore],
    *,
    made_up: bool,
    samples: int,
    tolerance: float | None,
) -> Comparison:
    quantization = file.metadata.get("mpocompress.quantization", "none")
    total = agreement.result()
    nothing = agreement.nothing_compared
    failures = [] if nothing is None else [f"{nothing} in the reference"]
    if parts[0] is not None and quantization == "none":
        failures += _beyond(parts[0], EXPORT_TOLERANCE, "the export alone changes")
    if tolerance is not None:
        failures += _beyond(total, tolerance, f"{file.path.name} and the reference differ in")
    return Comparison(
        total=total,
        export=parts[0],
        approximation=parts[1],
        quantization=quantization,
        labels=_on_labels(scores) if all(s.judged for s in scores.values()) else None,
        made_up=made_up,
        samples=samples,
        tolerance=tolerance,
        failures=tuple(failures),
    )


def _on_labels(scores: Mapping[str, LabelScore]) -> dict[str, Any]:
    errors = {side: score.mean_squared_error() for side, score in scores.items()}
    return {
        "output": scores["file"].output,
        "measure": scores["file"].measure,
        **{side: score.value() for side, score in scores.items()},
        "mean_squared_error": None if None in errors.values() else errors,
    }


def _beyond(found: Mapping[str, OutputAgreement], tolerance: float, what: str) -> list[str]:
    return [
        f"{what} output {name!r}: relative difference {output.max_relative_difference:.3g} "
        f"(absolute {output.max_abs_difference:.3g}), allowed is {tolerance:.3g}"
        for name, output in found.items()
        if not output.max_relative_difference <= tolerance
    ]


class _Module:
    """A PyTorch model as a side of a comparison."""

    def __init__(self, model: nn.Module) -> None:
        self._model, _ = inference_copy(model)
        self.accepts: tuple[str, ...] = ()

    def run(self, file: OnnxFile, arrays: Arrays) -> Outputs:
        """The outputs on arrays that the file takes, with the constants that it was made with."""
        by_name = {spec.name: spec.slot for spec in file.specs}
        named = {by_name.get(str(key), key): value for key, value in arrays.items()}
        named.update(file.constants)
        positions = [named[key] for key in sorted(k for k in named if isinstance(k, int))]
        words = {key: value for key, value in named.items() if isinstance(key, str)}
        if positions and words:
            raise DataError(
                "the data has arrays by position and by name; name all of them like the arguments "
                "of forward."
            )
        call = ForwardCall.from_batch(self._model, tuple(positions) if positions else words)
        try:
            outputs = run(self._model, call)
        except DataError:
            raise
        except Exception as error:  # whatever the model's own code raises
            raise DataError(
                f"{type(self._model).__name__} does not run on ({call.describe()}): "
                f"{type(error).__name__}: {first_line(error)}. Pass data that it accepts."
            ) from error
        return {name: tensor.numpy() for name, tensor in outputs.items()}


class _File:
    """Another ONNX file as a side of a comparison; its inputs go by name, or else by order."""

    def __init__(self, file: OnnxFile) -> None:
        self._file = file
        self.accepts = tuple(
            str(key) for spec in file.specs for key in dict.fromkeys((spec.name, spec.slot))
        )

    def run(self, file: OnnxFile, arrays: Arrays) -> Outputs:
        """The outputs on arrays that the first file takes."""
        names = {str(key) for spec in self._file.specs for key in (spec.name, spec.slot)}
        if not names & {str(key) for key in arrays} and len(self._file.specs) == len(arrays):
            arrays = dict(enumerate(arrays.values()))
        taken = [str(key) for spec in file.specs for key in (spec.name, spec.slot)]
        return self._file.run(self._file.feed(arrays, other=taken))


_Side = _Module | _File


def _made_up(file: OnnxFile, seed: int) -> Iterable[tuple[Arrays, None]]:
    generator = torch.Generator().manual_seed(seed)
    for rows in _MADE_UP:
        yield file.made_up(rows, generator), None


def _paired(file: OnnxFile, actual: Outputs, expected: Outputs) -> tuple[Outputs, Outputs]:
    """Both sides under the file's names: outputs go by name, or else by order."""
    if set(actual) <= set(expected):
        named = {name: expected[name] for name in actual}
    elif len(actual) == len(expected):
        named = dict(zip(actual, expected.values(), strict=True))
    else:
        raise ParityError(
            f"{file.path} has the outputs {', '.join(actual)}, but the reference has "
            f"{', '.join(expected)}. Compare with the model that the file belongs to."
        )
    for name, theirs in named.items():
        if actual[name].shape != theirs.shape:
            raise ParityError(
                f"output {name!r} of {file.path} has shape {actual[name].shape}, but the reference "
                f"gives {theirs.shape}. Compare with the model that the file belongs to."
            )
    return actual, named
