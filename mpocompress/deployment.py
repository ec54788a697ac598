"""What is done with a result after it has been written: check it, export it in another form."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from mpocompress import saving
from mpocompress.api.data import forward_arguments
from mpocompress.errors import DataError, LoadError
from mpocompress.export import ExportedModel, QuantizedModel, export_onnx
from mpocompress.export.bench import BenchResult, bench
from mpocompress.export.calls import Slot
from mpocompress.export.comparison import Comparison, compare
from mpocompress.export.forms import FormChoice
from mpocompress.export.quantize import Quantize
from mpocompress.files import replacing
from mpocompress.loading import Batch, example_inputs, input_hint, load_batches
from mpocompress.pipeline import (
    Opened,
    checked,
    file_metadata,
    open_model,
    quantize_batches,
)
from mpocompress.planning import Progress
from mpocompress.report import CompressionReport, Parity


def compare_files(
    onnx: str | Path,
    against: str | Path,
    *,
    data: str | None = None,
    cores: Path | None = None,
    tolerance: float | None = None,
    factory: str | None = None,
    trust_pickle: bool = False,
    seed: int = 0,
) -> tuple[Comparison, tuple[str, ...]]:
    """Hold an ONNX file against a PyTorch checkpoint or another ONNX file; see `compare`.

    Args:
        onnx: the file.
        against: the reference; `.onnx`, or whatever `open_model` takes.
        data: batches, as on the command line.
        cores: directory or file with the compressed model's cores; default: beside the file, if
            they are there.
        tolerance: see `compare`.
        factory: see `open_model`.
        trust_pickle: see `open_model`.
        seed: of made-up inputs.

    Returns:
        The comparison, and what the user should know about it.

    Raises:
        LoadError: a file that cannot be read, or a checkpoint that is no module.
        DataError: see `compare`.
        ParityError: see `compare`.
    """
    notes: list[str] = []
    reference: nn.Module | Path
    compressed: nn.Module | None = None
    if Path(against).suffix.lower() == ".onnx":
        reference = Path(against)
        notes.append(
            "an ONNX reference has no modules to load the cores into, so the export's error is not "
            "told apart; give the PyTorch model with --against for that"
        )
    else:
        reference, opened_notes = _module(against, factory, trust_pickle)
        notes += opened_notes
        place = Path(onnx).parent if cores is None else cores
        if cores is not None or (place / saving.CORES_FILE).is_file():
            try:
                compressed = saving.load_model(place, reference)
            except LoadError as error:
                if cores is not None or saving.read_manifest(place).source != "onnx":
                    raise
                notes.append(
                    f"the cores beside {Path(onnx).name} have the names of a graph, which are not "
                    f"the model's, so the export's error is not told apart: {error}"
                )
        else:
            notes.append(
                f"there is no {saving.CORES_FILE} beside {Path(onnx).name}, so the export's error "
                "is not told apart; say where it is with --cores"
            )
    batches = None if data is None else _arrays(data)
    found = compare(onnx, reference, batches, compressed=compressed, tolerance=tolerance, seed=seed)
    return found, tuple(notes)


@dataclass(frozen=True, kw_only=True)
class Reexport:
    """What `export_again` has written.

    Attributes:
        exported: the file.
        parity: of the file with what it was written from.
        forms: each form side by side, if that was asked for.
        notes: what the user should know.
    """

    exported: ExportedModel
    parity: Parity
    forms: BenchResult | None
    notes: tuple[str, ...]


def export_again(
    directory: Path,
    source: str | Path,
    output: Path,
    *,
    form: FormChoice = "auto",
    batch: int = 1,
    quantize: Quantize = "none",
    data: str | None = None,
    inputs: Sequence[str] = (),
    measure: Sequence[int] = (),
    factory: str | None = None,
    trust_pickle: bool = False,
    force: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Reexport:
    """Write the ONNX file of a result again, in another form or with cores as integers.

    Args:
        directory: that `convert` has written.
        source: the dense checkpoint that was compressed: cores do not tell an architecture.
        output: the ONNX file.
        form: see `export_onnx`.
        batch: rows at which "auto" measures.
        quantize: see `quantize_cores`.
        data: batches for the rounding and for the check, as on the command line.
        inputs: shapes, where they cannot be inferred.
        measure: batch sizes at which each form is timed; none by default.
        factory: see `open_model`.
        trust_pickle: see `open_model`.
        force: replace an output that exists.
        seed: of made-up inputs.
        progress: called as `progress(what, done, total)`.

    Raises:
        OutputExistsError: there is such a file, without `force`.
        SaveError: the output cannot be written.
        LoadError: a foreign directory or checkpoint.
        DataError: the shape of the inputs is not known, or the output is no `.onnx` file.
        ParityError: ONNX Runtime and PyTorch disagree; the output is not written.
    """
    if output.suffix.lower() != ".onnx":
        raise DataError(
            f"the output {str(output)!r} does not end in .onnx, which is what is written. Give one "
            "that does with -o."
        )
    saving.check_output_file(output, force=force)
    report = CompressionReport.load(directory)
    opened = open_model(source, factory=factory, trust_pickle=trust_pickle)
    model = saving.load_model(directory, _callable(opened, source))
    batches = None if data is None else load_batches(data)
    examples = example_inputs(opened.source, specs=inputs, batches=batches)
    if examples is None:
        raise DataError(f"the shape of the model's input is not known; {input_hint(model)}.")
    arguments = forward_arguments(model, Batch(examples.args, examples.kwargs))
    quantized = quantize_batches(model, quantize, batches)
    stored: QuantizedModel | Literal["none"] = "none" if quantize == "none" else quantized
    forms = None
    with tempfile.TemporaryDirectory() as folder:
        # Checked before it is moved to its place; large models bring a data file along.
        scratch = Path(folder) / output.name
        metadata = file_metadata(model, report.source)

        def write(path: Path, spelled: FormChoice) -> ExportedModel:
            return export_onnx(
                model,
                path,
                arguments,
                form=spelled,
                form_batch=batch,
                quantize=stored,
                metadata=metadata,
            )

        exported = write(scratch, form)
        parity = checked(scratch, quantized.model, batches, seed)
        if measure:
            paths = [Path(folder) / f"{name}.onnx" for name in _FORMS]
            for path, name in zip(paths, _FORMS, strict=True):
                write(path, name)
            forms = bench(paths, batch_sizes=measure, progress=progress)
            forms = replace(
                forms,
                files=tuple(
                    replace(file, path=name) for file, name in zip(forms.files, _FORMS, strict=True)
                ),
            )
        for file in exported.files:
            with replacing(output.parent / file) as target:
                shutil.copyfile(Path(folder) / file, target)
    return Reexport(
        exported=replace(exported, path=output),
        parity=parity,
        forms=forms,
        notes=(*opened.notes, *_lost_precisions(report, quantize)),
    )


def _lost_precisions(report: CompressionReport, quantize: Quantize) -> Iterator[str]:
    if report.settings.get("quantize") == "auto" and quantize == "none":
        yield (
            "the result's own file has a precision for each layer, which its cores do not keep: "
            "this one has float32 cores"
        )


_FORMS: tuple[FormChoice, ...] = ("chain", "dense", "auto")


def _callable(opened: Opened, path: str | Path) -> nn.Module:
    if opened.source.kind != "module":
        raise LoadError(
            f"{path} is a bare state dict, which cannot be run. Give the code that builds its "
            "module with --model MODULE:FACTORY."
        )
    return opened.module


def _module(
    path: str | Path, factory: str | None, trust_pickle: bool
) -> tuple[nn.Module, list[str]]:
    opened = open_model(path, factory=factory, trust_pickle=trust_pickle)
    return _callable(opened, path), opened.notes


def _arrays(data: str) -> Iterator[tuple[dict[Slot, Tensor], Tensor | None]]:
    for batch in load_batches(data):
        named: dict[Slot, Tensor] = dict(enumerate(batch.args))
        named.update(batch.kwargs)
        yield named, batch.labels
