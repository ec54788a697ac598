"""One command's worth of work: from a checkpoint to a verified result directory."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mpocompress import api, saving
from mpocompress._version import __version__
from mpocompress.api.data import forward_arguments
from mpocompress.errors import BudgetError, DataError, LoadError
from mpocompress.export import (
    ExportedModel,
    QuantizedModel,
    export_onnx,
    quantize_cores,
    verify,
)
from mpocompress.export.forms import FormChoice
from mpocompress.export.quantize import Quantize
from mpocompress.layers import MPOLayer
from mpocompress.loading import (
    Batch,
    Batches,
    ExampleInputs,
    Source,
    example_inputs,
    is_onnx,
    load_batches,
    load_source,
    module_from_state,
)
from mpocompress.planning import LayoutChoice, ObjectiveName, Of, Plan, PlanOptions, Progress
from mpocompress.report import CompressionReport, Parity
from mpocompress.report import Source as ReportSource
from mpocompress.report.narrative import onnx_bytes as onnx_bytes_of
from mpocompress.surgery import Inventory, find_weights, open_modules
from mpocompress.tuning.moments import keep_mask

if TYPE_CHECKING:
    from mpocompress.loading.onnx_source import OnnxSource

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
    sweeps: int | None = None
    distill: int = 0
    form: FormChoice = "auto"
    quantize: Quantize = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.distill and self.data is None:
            raise DataError(
                f"--distill {self.distill} trains on data, and there is none. Add --data, with "
                "batches for the model; labels are not needed."
            )
        if self.sweeps is not None and self.data is None:
            raise DataError(
                f"--sweeps {self.sweeps} are passes of a fit to data, and there is none. Add "
                "--data, with batches for the model; labels are not needed."
            )

    @property
    def fit_options(self) -> dict[str, Any]:
        """`sweeps`, where it is given."""
        return {} if self.sweeps is None else {"sweeps": self.sweeps}

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
            "quantize": "auto" if self.quantize == "auto" else "none",
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

    def inventory(self) -> Inventory:
        """All weights and buffers."""
        return find_weights(open_modules(self.module))


@dataclass(kw_only=True)
class OpenedGraph:
    """A loaded ONNX graph."""

    source: "OnnxSource"
    notes: list[str] = field(default_factory=list)
    kind: str | None = None

    def inventory(self) -> Inventory:
        """All stored tensors."""
        from mpocompress.export.graphs import find_graph_weights

        return find_graph_weights(self.source.model)


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


def open_any(
    path: str | Path, *, factory: str | None = None, trust_pickle: bool = False
) -> Opened | OpenedGraph:
    """Load a checkpoint or an ONNX graph.

    Raises:
        LoadError: see `load_source` and `load_onnx`.
    """
    if is_onnx(path):
        return _open_graph(path, factory)
    return open_model(path, factory=factory, trust_pickle=trust_pickle)


def _open_graph(path: str | Path, factory: str | None) -> OpenedGraph:
    from mpocompress.loading.onnx_source import load_onnx

    if factory is not None:
        raise LoadError(
            f"--model {factory} builds a PyTorch module, but {path} brings its own graph. Drop "
            "--model, or give the PyTorch checkpoint."
        )
    source = load_onnx(path)
    return OpenedGraph(source=source, notes=list(source.notes))


def plan_model(
    path: str | Path, request: Request, *, progress: Progress | None = None
) -> tuple[Plan, Opened | OpenedGraph, Inventory]:
    """Load and plan, but change and write nothing: what `--dry-run` shows.

    Raises:
        MPOCompressError: bad input, see `load_source`, `load_onnx` and `plan`.
    """
    if is_onnx(path):
        from mpocompress.api.graphs import plan_graph

        graph = _open_graph(path, request.factory)
        options = PlanOptions(**request.plan_options())
        plan, inventory = plan_graph(graph.source.model, options, progress=progress)
        return plan, graph, inventory
    opened = open_model(path, factory=request.factory, trust_pickle=request.trust_pickle)
    batches = _batches(opened, request)
    examples = _examples(opened, request, batches) if request.max_size is not None else None
    plan = api.plan(
        opened.module,
        **request.plan_options(),
        data=batches,
        distill=request.distill,
        onnx_bytes=None if examples is None else _onnx_bytes(opened.source, examples, request),
        **request.fit_options,
        seed=request.seed,
        progress=progress,
    )
    return plan, opened, opened.inventory()


def convert(
    path: str | Path,
    directory: str | Path,
    request: Request,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Compress a checkpoint or an ONNX file into a directory: cores, verified ONNX, report.

    Everything appears at the end, all at once; a run that fails leaves nothing behind. With
    `resume` it leaves what has been fitted and healed so far, in `DIR.state` beside the directory,
    and the next run with `resume` and the same arguments goes on from there.

    Raises:
        ParityError: ONNX Runtime and PyTorch, or the compressed and the dense graph, disagree.
        MPOCompressError: bad input, see `load_source`, `load_onnx`, `plan` and `staged_output`.
    """
    if is_onnx(path):
        if resume:
            raise DataError(
                "--resume keeps fitted layers and the state of healing, which an ONNX graph has "
                "not: its layers are done in one short pass. Drop it."
            )
        return _convert_graph(path, directory, request, force=force, progress=progress)
    clock = api.Clock()
    # A run that began with `force` goes on with `resume` alone; a finished one is not replaced.
    force = force or (resume and _state_folder(directory).is_dir())
    with (
        saving.staged_output(directory, force=force) as scratch,
        _state_of(directory, resume) as state,
    ):
        with clock("loading"):
            opened = open_model(path, factory=request.factory, trust_pickle=request.trust_pickle)
            batches = _batches(opened, request)
            examples = _examples(opened, request, batches)
        result = api.compress(
            opened.module,
            **request.plan_options(),
            data=batches,
            onnx_bytes=None if examples is None else _onnx_bytes(opened.source, examples, request),
            **request.fit_options,
            distill=request.distill,
            seed=request.seed,
            source=ReportSource(name=opened.source.name, sha256=opened.source.sha256),
            state=state,
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
            exported, parity = _export(result, examples, batches, scratch, request, clock, progress)
            result = replace(result, report=_with_forms(result.report, exported))
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


def _state_folder(directory: str | Path) -> Path:
    target = Path(directory)
    return target.with_name(f"{target.name}.state")


@contextmanager
def _state_of(directory: str | Path, resume: bool) -> Iterator[Path | None]:
    """The folder for the state of a run; it goes once the run is done."""
    if not resume:
        yield None
        return
    state = _state_folder(directory)
    yield state
    shutil.rmtree(state, ignore_errors=True)


def _convert_graph(
    path: str | Path,
    directory: str | Path,
    request: Request,
    *,
    force: bool,
    progress: Progress | None,
) -> Conversion:
    """As `convert`, for an ONNX file."""
    from mpocompress.api import graphs

    if request.distill:
        raise DataError(
            f"--distill {request.distill} trains with gradients, which an ONNX graph does not "
            "have. Drop it, or compress the PyTorch model that the file was made of."
        )
    clock = api.Clock()
    with saving.staged_output(directory, force=force) as scratch:
        with clock("loading"):
            opened = _open_graph(path, request.factory)
            source = opened.source
            data = None if request.data is None else load_batches(request.data)
            calls = graphs.calls_of_graph(source.model, data=data, shapes=request.inputs)
        result = graphs.compress_graph(
            source.model,
            PlanOptions(**request.plan_options()),
            feeds=calls.feeds,
            **request.fit_options,
            seed=request.seed,
            source=ReportSource(name=source.name, sha256=source.sha256),
            progress=progress,
        )
        clock.add(result.report.seconds)
        if calls.feeds is not None and request.ratio is not None:
            opened.notes.append(
                "an ONNX graph has no gradients, so all layers got the same ratio; the data only "
                "fitted them"
            )
        with clock("saving"):
            graphs.save_graph(source.model, result, scratch / saving.CORES_FILE)
        if progress is not None:
            progress("writing ONNX", 0, 2)
        with clock("export"):
            graphs.write_compressed(source.model, result, scratch / saving.ONNX_FILE)
        if progress is not None:
            progress("verifying in ONNX Runtime", 1, 2)
        with clock("verification"):
            parity = graphs.verify_graph(
                source.model, result, scratch / saving.ONNX_FILE, calls, seed=request.seed
            )
        report = api.with_files(result.report, scratch).model_copy(
            update={"parity": parity, "seconds": clock.total()}
        )
        api.write_report(report, scratch)
    return Conversion(directory=Path(directory), report=report, notes=tuple(opened.notes))


def _batches(opened: Opened, request: Request) -> Batches | None:
    """The user's data.

    Raises:
        DataError: it cannot be given to anything.
    """
    if request.data is None:
        return None
    if opened.source.kind == "state_dict":
        raise DataError(
            f"--data {request.data} is for a model that can be run, and {opened.source.name} is a "
            "bare state dict. Give its architecture with --model MODULE:FACTORY, or drop --data."
        )
    return load_batches(request.data)


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


def _onnx_bytes(source: Source, examples: ExampleInputs, request: Request) -> "api.OnnxBytes":
    """Writes a model as `_export` does and gives the bytes of its files.

    As chains: the dense form of the same cores takes a ten-thousandth more at most.
    """

    def onnx_bytes(model: nn.Module) -> int:
        with tempfile.TemporaryDirectory() as folder:
            found = ReportSource(name=source.name, sha256=source.sha256)
            return export_onnx(
                model,
                Path(folder) / saving.ONNX_FILE,
                forward_arguments(model, Batch(examples.args, examples.kwargs)),
                form="chain" if request.form == "auto" else request.form,
                quantize=request.quantize,
                metadata=file_metadata(model, found),
            ).num_bytes

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
    request: Request,
    clock: "api.Clock",
    progress: Progress | None,
) -> tuple[ExportedModel, Parity]:
    """Write the ONNX file and hold it against the compressed model in ONNX Runtime."""
    path = scratch / saving.ONNX_FILE
    if progress is not None:
        progress("writing ONNX", 0, 2)
    with clock("export"):
        written = result.model
        quantized: QuantizedModel | None = None
        if request.quantize != "none":
            quantized = quantize_batches(result.model, request.quantize, batches)
            written = quantized.model
        exported = export_onnx(
            result.model,
            path,
            forward_arguments(result.model, Batch(examples.args, examples.kwargs)),
            form=request.form,
            form_batch=request.batch,
            quantize=quantized or "none",
            metadata=file_metadata(result.model, result.report.source),
        )
    if progress is not None:
        progress("verifying in ONNX Runtime", 1, 2)
    with clock("verification"):
        found = checked(path, written, batches, request.seed)
    return exported, found


def checked(path: Path, model: nn.Module, batches: Batches | None, seed: int) -> Parity:
    """The parity of a file with what it was written from, on some of the data.

    Raises:
        ParityError: they disagree.
    """
    data = None
    if batches is not None:
        data = (forward_arguments(model, batch) for batch in _few(batches))
    found = verify(path, model, data, seed=seed)
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


def quantize_batches(
    model: nn.Module, quantize: Quantize, batches: Batches | None
) -> QuantizedModel:
    """`quantize_cores` on loaded batches."""
    data = None if batches is None else (forward_arguments(model, batch) for batch in batches)
    return quantize_cores(model, quantize, data)


def _with_forms(report: CompressionReport, exported: ExportedModel) -> CompressionReport:
    """The report with how each layer is spelled in the ONNX file."""
    layers = []
    for layer in report.layers:
        found = exported.forms.get(layer.name)
        if found is not None:
            timed = {"chain": found.chain_seconds, "dense": found.dense_seconds}
            seconds = {form: taken for form, taken in timed.items() if taken is not None}
            layer = layer.model_copy(
                update={"form": found.form, "form_rows": found.rows, "form_seconds": seconds}
            )
        layers.append(layer)
    settings = {**report.settings, "quantize": exported.quantization}
    return report.model_copy(update={"layers": layers, "settings": settings})


def _few(batches: Batches, rows: int = 256) -> Iterator[Batch]:
    """Enough batches to compare on: a comparison of every sample would prove nothing more.

    Without rows that are padding throughout: what attention makes of nothing is arbitrary.
    """
    seen = 0
    for batch in batches:
        keep = keep_mask(batch.kwargs)
        if keep is not None and batch.rows_come_first and not bool(keep.any(1).all()):
            real = keep.any(1).nonzero()[:, 0]
            if not len(real):
                continue
            batch = batch.take(real)
        yield batch
        seen += batch.num_rows
        if seen >= rows:
            return


def file_metadata(model: nn.Module, source: ReportSource) -> dict[str, str]:
    """What the ONNX file says of itself, for netron and for people who find it later."""
    layers: dict[str, dict[str, Any]] = {
        name or "(model)": {
            "layout": [list(pair) for pair in layer.layout.pairs],
            "bond_dims": list(layer.bond_dims),
        }
        for name, layer in model.named_modules()
        if isinstance(layer, MPOLayer)
    }
    return {
        "mpocompress.version": __version__,
        "mpocompress.source_name": source.name,
        "mpocompress.source_sha256": source.sha256 or "",
        "mpocompress.layers": json.dumps(layers, separators=(",", ":")),
    }
