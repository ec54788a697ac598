"""From a checkpoint to a plan, or to a verified result directory."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from mpocompress import api, saving
from mpocompress.errors import BudgetError, DataError
from mpocompress.loading import is_onnx, load_batches
from mpocompress.pipeline.onnx_files import size_on_disk, with_forms, write_and_check
from mpocompress.pipeline.opening import (
    Opened,
    OpenedGraph,
    open_graph,
    open_model,
    read_batches,
    read_examples,
    read_plan,
    why_no_onnx,
)
from mpocompress.pipeline.request import Request
from mpocompress.pipeline.run_state import RunState
from mpocompress.planning import Plan, PlanOptions, Progress
from mpocompress.report import CompressionReport
from mpocompress.report import Source as ReportSource
from mpocompress.report.narrative import onnx_bytes
from mpocompress.surgery import Inventory


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a run has written."""

    directory: Path
    report: CompressionReport
    notes: tuple[str, ...]


def plan_model(
    path: str | Path, request: Request, *, progress: Progress | None = None
) -> tuple[Plan, Opened | OpenedGraph, Inventory]:
    """Load and plan, but change and write nothing: what `--dry-run` shows.

    A plan that the request has is read and held against the model.

    Raises:
        MPOCompressError: bad input, see `load_source`, `load_onnx` and `plan`.
    """
    asked, (given, request) = request, read_plan(request)
    if is_onnx(path):
        from mpocompress.api.graphs import calls_of_graph, check_plan, plan_graph

        asked.check_for_graph()
        graph = open_graph(path, request.factory)
        data = None if request.data is None else load_batches(request.data)
        calls_of_graph(graph.source.model, data=data, shapes=request.inputs)  # or says why not
        if given is not None:
            return given, graph, check_plan(given, graph.source.model)
        options = PlanOptions(**request.plan_options())
        plan, inventory = plan_graph(graph.source.model, options, progress=progress)
        return plan, graph, inventory
    opened = open_model(path, factory=request.factory, trust_pickle=request.trust_pickle)
    batches = read_batches(opened, request)
    if given is not None:
        inventory = opened.inventory()
        api.check_belongs(given, inventory)
        return given, opened, inventory
    examples = read_examples(opened, request, batches) if request.max_size is not None else None
    plan = api.plan(
        opened.module,
        **request.plan_options(),
        data=batches,
        distill=request.distill,
        onnx_bytes=None if examples is None else size_on_disk(opened.source, examples, request),
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
        DataError: with `resume`, a state of a run with other arguments.
        MPOCompressError: bad input, see `load_source`, `load_onnx`, `plan` and `staged_output`.
    """
    asked, (plan, request) = request, read_plan(request)
    if is_onnx(path):
        if resume:
            raise DataError(
                "--resume keeps fitted layers and the state of healing, which an ONNX graph has "
                "not: its layers are done in one short pass. Drop it."
            )
        return _convert_graph(path, directory, asked, plan, force=force, progress=progress)
    clock = api.Clock()
    # A run that began with `force` goes on with `resume` alone; a finished one is not replaced.
    state = RunState(directory, force=force) if resume else None
    force = force if state is None else state.force
    # The state goes when the result is in its place, not before.
    with (
        state or nullcontext(),
        saving.staged_output(directory, force=force, source=path) as scratch,
    ):
        with clock("loading"):
            opened = open_model(path, factory=request.factory, trust_pickle=request.trust_pickle)
            batches = read_batches(opened, request)
            examples = read_examples(opened, request, batches)
            onnx_note = None
            if examples is None:
                onnx_note = why_no_onnx(opened, request)
                asked.check_without_onnx(onnx_note)
            if state is not None:
                state.begin(asked, model=opened.source.sha256)
        result = api.compress(
            opened.module,
            plan,
            **({} if plan is not None else request.plan_options()),
            data=batches,
            onnx_bytes=None if examples is None else size_on_disk(opened.source, examples, request),
            **request.fit_options,
            distill=request.distill,
            seed=request.seed,
            source=ReportSource(name=opened.source.name, sha256=opened.source.sha256),
            state=None if state is None else state.folder,
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
        parity = None
        if onnx_note is not None:
            notes.append(onnx_note)
        if examples is not None:
            exported, parity = write_and_check(
                result, examples, batches, scratch, request, clock, progress
            )
            result = replace(result, report=with_forms(result.report, exported))
        report = api.with_files(result.report, scratch).model_copy(
            update={
                "parity": parity,
                "onnx_note": onnx_note,
                "seconds": clock.total(),
                # Without its module a matrix is only a matrix; a table is known by its name.
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


def _convert_graph(
    path: str | Path,
    directory: str | Path,
    request: Request,
    plan: Plan | None,
    *,
    force: bool,
    progress: Progress | None,
) -> Conversion:
    """As `convert`, for an ONNX file."""
    from mpocompress.api import graphs

    request.check_for_graph()
    clock = api.Clock()
    with saving.staged_output(directory, force=force, source=path) as scratch:
        with clock("loading"):
            opened = open_graph(path, request.factory)
            source = opened.source
            data = None if request.data is None else load_batches(request.data)
            calls = graphs.calls_of_graph(source.model, data=data, shapes=request.inputs)
        result = graphs.compress_graph(
            source.model,
            plan or PlanOptions(**request.plan_options()),
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
        if lost := graphs.lost_inputs(source.model, result):
            opened.notes.append(
                f"{source.name} lets a caller give other weights for {', '.join(lost)} as inputs; "
                "they are compressed, and inputs no longer. Exclude those that are given"
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


def _check_size(report: CompressionReport) -> None:
    """A size is a ceiling of what is written, whatever files of this shape took before."""
    if report.budget is None or report.budget.target != "max_size":
        return
    written = onnx_bytes(report)
    if written is None or written > report.budget.asked:
        raise BudgetError(
            f"an ONNX file of {report.budget.asked:.0f} bytes was asked for, but what was written "
            f"has {written}. Ask for {2 * int(report.budget.asked) - (written or 0)} bytes, and "
            "please report this."
        )
