"""One command's worth of work: from a checkpoint to a verified result directory."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mpocompress import api, saving
from mpocompress._version import __version__
from mpocompress.api.data import forward_arguments
from mpocompress.errors import BudgetError, DataError
from mpocompress.export import export_onnx, verify
from mpocompress.layers import MPOLinear
from mpocompress.loading import (
    Batch,
    Batches,
    ExampleInputs,
    Source,
    example_inputs,
    load_batches,
    load_source,
    module_from_state,
)
from mpocompress.planning import LayoutChoice, ObjectiveName, Of, Plan, Progress
from mpocompress.report import CompressionReport, Parity
from mpocompress.report import Source as ReportSource
from mpocompress.report.narrative import onnx_bytes as onnx_bytes_of
from mpocompress.surgery import Inventory, find_weights

NO_MODULE = (
    "a bare state dict cannot be run, so no ONNX file was written; give its architecture with "
    "--model MODULE:FACTORY"
)
NO_INPUTS = (
    "the shape of the model's input is not known, so no ONNX file was written; give it with "
    "--input, as in --input 1x784, or give --data"
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for; see its help for the meaning of each."""

    bond_dim: int | None = None
    ratio: float | None = None
    max_size: str | None = None
    max_error: float | None = None
    max_drop: float | None = None
    of: Of = "model"
    objective: ObjectiveName = "size"
    batch: int = 1
    layout: LayoutChoice = "auto"
    sites: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    data: str | None = None
    inputs: tuple[str, ...] = ()
    factory: str | None = None
    trust_pickle: bool = False
    sweeps: int = 16
    distill: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.distill and self.data is None:
            raise DataError(
                f"--distill {self.distill} trains on data, and there is none. Add --data, with "
                "batches for the model; labels are not needed."
            )

    def plan_options(self) -> dict[str, Any]:
        """What `plan` and `compress` are to be called with."""
        return {
            "bond_dim": self.bond_dim,
            "ratio": self.ratio,
            "max_size": self.max_size,
            "max_error": self.max_error,
            "max_drop": self.max_drop,
            "of": self.of,
            "objective": self.objective,
            "batch": self.batch,
            "layout": self.layout,
            "sites": self.sites,
            "include": self.include,
            "exclude": self.exclude,
        }


@dataclass(kw_only=True)
class Opened:
    """A loaded checkpoint as a module, and how it can be called."""

    source: Source
    module: nn.Module
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str | None:
        """What the weights are called if nothing is known of their modules."""
        return "matrix" if self.source.kind == "state_dict" else None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a run has written."""

    directory: Path
    report: CompressionReport
    notes: tuple[str, ...]


def open_model(
    path: str | Path, *, factory: str | None = None, trust_pickle: bool = False
) -> Opened:
    """Load a checkpoint; a bare state dict becomes a module that cannot be called.

    Raises:
        LoadError: see `load_source`.
    """
    source = load_source(path, factory=factory, trust_pickle=trust_pickle)
    module = source.module
    if module is None:
        module = module_from_state(source.state_dict or {})
    return Opened(source=source, module=module, notes=list(source.notes))


def plan_model(
    path: str | Path, request: Request, *, progress: Progress | None = None
) -> tuple[Plan, Opened, Inventory]:
    """Load and plan, but change and write nothing: what `--dry-run` shows.

    Raises:
        MPOCompressError: bad input, see `load_source` and `plan`.
    """
    opened = open_model(path, factory=request.factory, trust_pickle=request.trust_pickle)
    # A bond dimension is planned from the weights alone; only budgets look at the data.
    needs_data = request.data is not None and request.bond_dim is None
    batches = load_batches(request.data) if request.data and needs_data else None
    examples = _examples(opened, request, batches) if request.max_size is not None else None
    plan = api.plan(
        opened.module,
        **request.plan_options(),
        data=batches,
        onnx_bytes=None if examples is None else _onnx_bytes(opened.source, examples),
        sweeps=request.sweeps,
        seed=request.seed,
        progress=progress,
    )
    return plan, opened, find_weights(opened.module)


def convert(
    path: str | Path,
    directory: str | Path,
    request: Request,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Compress a checkpoint into a directory: cores, verified ONNX, report.

    Everything appears at the end, all at once; a run that fails leaves nothing behind.

    Raises:
        ParityError: ONNX Runtime and PyTorch disagree.
        MPOCompressError: bad input, see `load_source`, `plan` and `staged_output`.
    """
    clock = api.Clock()
    with saving.staged_output(directory, force=force) as scratch:
        with clock("loading"):
            opened = open_model(path, factory=request.factory, trust_pickle=request.trust_pickle)
            batches = None if request.data is None else load_batches(request.data)
            examples = _examples(opened, request, batches)
        result = api.compress(
            opened.module,
            **request.plan_options(),
            data=batches,
            onnx_bytes=None if examples is None else _onnx_bytes(opened.source, examples),
            sweeps=request.sweeps,
            distill=request.distill,
            seed=request.seed,
            source=ReportSource(name=opened.source.name, sha256=opened.source.sha256),
            progress=progress,
        )
        clock.add(result.report.seconds)
        notes = opened.notes
        if opened.kind:
            notes.append(
                "without its module, what uses a matrix is not known; those named like embedding "
                "tables were kept"
            )
        kind = opened.source.kind
        del opened  # the dense model has done its duty; the copy does not refer to it
        with clock("saving"):
            saving.save_model(result.model, scratch / saving.CORES_FILE, source=kind)
        onnx_note = None
        parity = None
        if examples is None:
            onnx_note = NO_MODULE if kind == "state_dict" else NO_INPUTS
            notes.append(onnx_note)
        else:
            parity = _export(result, examples, batches, scratch, request.seed, clock, progress)
        report = api.with_files(result.report, scratch).model_copy(
            update={
                "parity": parity,
                "onnx_note": onnx_note,
                "seconds": clock.total(),
                "layers": [
                    layer.model_copy(update={"kind": "matrix"})
                    if kind == "state_dict" and layer.kind == "linear"
                    else layer
                    for layer in result.report.layers
                ],
            }
        )
        _check_size(report)
        api.write_report(report, scratch)
    return Conversion(directory=Path(directory), report=report, notes=tuple(notes))


def _examples(opened: Opened, request: Request, batches: Batches | None) -> ExampleInputs | None:
    """What to trace the model with; None where it cannot be traced.

    Raises:
        BudgetError: a size is asked for of a file that cannot be written.
    """
    examples = None
    if opened.source.kind == "module":
        examples = example_inputs(opened.source, specs=request.inputs, batches=batches)
    if examples is None and request.max_size is not None:
        why = NO_MODULE if opened.source.kind == "state_dict" else NO_INPUTS
        raise BudgetError(f"--max-size {request.max_size} is the size of the ONNX file: {why}.")
    return examples


def _onnx_bytes(source: Source, examples: ExampleInputs) -> "api.OnnxBytes":
    """Writes a model as `_export` does and gives the bytes of its files."""

    def onnx_bytes(model: nn.Module) -> int:
        with tempfile.TemporaryDirectory() as folder:
            arguments = forward_arguments(model, Batch(examples.args, examples.kwargs))
            path = Path(folder) / saving.ONNX_FILE
            found = ReportSource(name=source.name, sha256=source.sha256)
            return export_onnx(model, path, arguments, metadata=_metadata(model, found)).num_bytes

    return onnx_bytes


def _check_size(report: CompressionReport) -> None:
    """A size is a ceiling of what is written, whatever files of this shape took before."""
    if report.budget is None or report.budget.target != "max_size":
        return
    written = onnx_bytes_of(report)
    if written is None or written > report.budget.asked:
        raise BudgetError(
            f"an ONNX file of {report.budget.asked:.0f} bytes was asked for, but what was written "
            f"has {written}. Ask for {2 * int(report.budget.asked) - (written or 0)} bytes, and "
            "please report this."
        )


def _export(
    result: api.CompressionResult,
    examples: ExampleInputs,
    batches: Batches | None,
    scratch: Path,
    seed: int,
    clock: "api.Clock",
    progress: Progress | None,
) -> Parity:
    """Write the ONNX file and hold it against the compressed model in ONNX Runtime."""
    path = scratch / saving.ONNX_FILE
    if progress is not None:
        progress("writing ONNX", 0, 2)
    with clock("export"):
        export_onnx(
            result.model,
            path,
            forward_arguments(result.model, Batch(examples.args, examples.kwargs)),
            metadata=_metadata(result.model, result.report.source),
        )
    if progress is not None:
        progress("verifying in ONNX Runtime", 1, 2)
    with clock("verification"):
        data = None
        if batches is not None:
            data = (forward_arguments(result.model, batch) for batch in _few(batches))
        found = verify(path, result.model, data, seed=seed)
    found.raise_if_failed()
    return Parity(
        max_abs_difference=found.max_abs_difference,
        max_relative_difference=found.max_relative_difference,
        tolerance=found.tolerance,
        batch_sizes=list(found.batch_sizes),
        argmax_agreement=found.argmax_agreement,
        passed=found.passed,
        outputs=list(found.outputs),
    )


def _few(batches: Batches, rows: int = 256) -> Iterator[Batch]:
    """Enough batches to compare on: a comparison of every sample would prove nothing more."""
    seen = 0
    for batch in batches:
        yield batch
        seen += batch.num_rows
        if seen >= rows:
            return


def _metadata(model: nn.Module, source: ReportSource) -> dict[str, str]:
    """What the ONNX file says of itself, for netron and for people who find it later."""
    layers: dict[str, dict[str, Any]] = {
        name or "(model)": {
            "layout": [list(pair) for pair in layer.layout.pairs],
            "bond_dims": list(layer.bond_dims),
        }
        for name, layer in model.named_modules()
        if isinstance(layer, MPOLinear)
    }
    return {
        "mpocompress.version": __version__,
        "mpocompress.source_name": source.name,
        "mpocompress.source_sha256": source.sha256 or "",
        "mpocompress.layers": json.dumps(layers, separators=(",", ":")),
    }
