"""The command `compress`, and the plan that its `--dry-run` shows."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpocompress.cli.app import app
from mpocompress.cli.options import (
    LARGEST_COUNT,
    LARGEST_SEED,
    BatchOption,
    ExcludeOption,
    FactoryOption,
    ForceOption,
    Form,
    FormOption,
    IncludeOption,
    InputOption,
    JsonOption,
    ModelArgument,
    Quantize,
    QuantizeOption,
    TrustOption,
)
from mpocompress.cli.results import show_report
from mpocompress.cli.terminal import listed, print_table, progress_bar, show_notes

if TYPE_CHECKING:
    from mpocompress.planning import Plan


class Of(StrEnum):
    """What a ratio counts."""

    MODEL = "model"
    LAYERS = "layers"


class Objective(StrEnum):
    """What is to be small besides."""

    SIZE = "size"
    MACS = "macs"
    LATENCY = "latency"


@app.command()
def compress(
    model: ModelArgument,
    bond_dim: Annotated[
        int | None,
        typer.Option(
            "--bond-dim",
            metavar="D",
            help="Largest bond dimension of every layer: smaller is more compact and less exact.",
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio",
            metavar="R",
            help="Or: R times fewer parameters, at least. With --data, layers in which an error "
            "matters more get more of them.",
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size",
            metavar="BYTES",
            help="Or: bytes of the ONNX file, at most, such as 25MB or 24MiB; measured on the "
            "written file.",
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error",
            metavar="E",
            help="Or: relative output error, at most, of every layer and of the model, on a fifth "
            "of --data that nothing is fitted on. Without --data: of every weight.",
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            metavar="P",
            help="Or: how much less accuracy (or R², for labels that are not whole numbers), at "
            "most, as in 0.01; --data needs labels.",
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="Or: a plan that --dry-run --json has printed, perhaps edited.",
        ),
    ] = None,
    objective: Annotated[
        Objective,
        typer.Option(
            "--objective",
            help="What else is to be small. macs and latency (measured in ONNX Runtime) keep "
            "layers dense that would cost more than they do now.",
        ),
    ] = Objective.SIZE,
    batch: BatchOption = 1,
    of: Annotated[
        Of,
        typer.Option("--of", help="Whether --ratio counts the whole model or compressed layers."),
    ] = Of.MODEL,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Where the result goes. Default: MODEL's name-mpo.",
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            metavar="LAYOUT",
            help="auto (least error within the bond dimension), svd, balanced, or explicit sites, "
            "out x in each: 32x28,32x28.",
        ),
    ] = "auto",
    sites: Annotated[
        int | None,
        typer.Option("--sites", metavar="K", help="Force balanced layouts of K sites."),
    ] = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Batches for the model: .npz, .safetensors or MODULE:FUNCTION. Layers are fitted "
            "to what the model computes on them; labels are not needed.",
        ),
    ] = None,
    sweeps: Annotated[
        int | None,
        typer.Option(
            "--sweeps",
            metavar="N",
            max=LARGEST_COUNT,
            help="With --data: at most so many passes over the sites of a layer. Default: 16.",
        ),
    ] = None,
    distill: Annotated[
        int,
        typer.Option(
            "--distill",
            metavar="STEPS",
            max=LARGEST_COUNT,
            help="With --data: then heal the whole model, training it for so many steps to do what "
            "the dense one does.",
        ),
    ] = 0,
    inputs: InputOption = None,
    form: FormOption = Form.AUTO,
    quantize: QuantizeOption = Quantize.NONE,
    no_onnx: Annotated[
        bool,
        typer.Option(
            "--no-onnx", help="Write cores and report only, as for models that ONNX cannot hold."
        ),
    ] = False,
    factory: FactoryOption = None,
    trust_pickle: TrustOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.")
    ] = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep what is fitted and healed in DIR.state until the run is done, and go on "
            "from what an interrupted run with --resume has left there.",
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            min=0,
            max=LARGEST_SEED,
            help="Seed of everything random. Equal seeds, equal results.",
        ),
    ] = 0,
) -> None:
    """Compress MODEL to one of five targets, or by a plan; write cores, verified ONNX, a report."""
    from mpocompress import pipeline
    from mpocompress.planning.budgets import the_one_given

    if plan is None:
        the_one_given(
            {
                "--bond-dim": bond_dim,
                "--ratio": ratio,
                "--max-size": max_size,
                "--max-error": max_error,
                "--max-drop": max_drop,
            }
        )
    request = pipeline.Request(
        plan=plan,
        bond_dim=bond_dim,
        ratio=ratio,
        max_size=max_size,
        max_error=max_error,
        max_drop=max_drop,
        of=of.value,
        objective=objective.value,
        batch=batch,
        layout=layout,
        sites=sites,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        data=data,
        inputs=tuple(inputs or ()),
        factory=factory,
        trust_pickle=trust_pickle,
        sweeps=sweeps,
        distill=distill,
        form=form.value,
        quantize=quantize.value,
        onnx=not no_onnx,
        seed=seed,
    )
    if dry_run:
        with progress_bar() as progress:
            found, opened, _ = pipeline.plan_model(model, request, progress=progress)
        show_notes(opened.notes)
        if as_json:
            typer.echo(found.to_json(), nl=False)
        else:
            _show_plan(found)
        return
    directory = output or Path(f"{_stem(model)}-mpo")
    try:
        with progress_bar() as progress:
            done = pipeline.convert(
                model, directory, request, force=force, resume=resume, progress=progress
            )
    except KeyboardInterrupt:
        state = pipeline.state_folder(directory)
        typer.echo(f"mpocompress: stopped. {_how_to_go_on(state, resume)}", err=True)
        raise
    show_notes(done.notes)
    if as_json:
        typer.echo(done.report.to_json(), nl=False)
    else:
        show_report(done.report, done.directory)


def _how_to_go_on(state: Path, resume: bool) -> str:
    if not resume:
        return "Nothing was published. With --resume a run keeps what is done, to go on from there."
    if not state.is_dir():
        return "Nothing was done yet, and nothing was published."
    return f"What is done is kept in {state}: the same command goes on from there."


def _stem(model: str) -> str:
    path = Path(os.path.abspath(model))
    return path.name if path.is_dir() else path.stem


def _show_plan(plan: "Plan") -> None:
    from mpocompress.planning import predicted_totals

    rows = []
    timed = any(layer.predicted and layer.predicted.seconds for layer in plan.layers)
    for layer in plan.layers:
        size = f"{layer.shape[0]}x{layer.shape[1]}"
        predicted = layer.fresh_prediction
        seconds = ""
        if predicted is not None and predicted.seconds and predicted.dense_seconds:
            seconds = f"{predicted.seconds * 1e6:.0f} of {predicted.dense_seconds * 1e6:.0f}"
        if layer.action == "keep":
            figures = ["keep", "", "", "", ""]
        else:
            layout = layer.sites()
            chosen = next((c for c in layer.candidates if c.chosen), None)
            error = chosen.relative_weight_error if chosen else None
            shown = f"{layout} {layer.storage}" if layer.rounds else str(layout)
            figures = [
                shown,
                listed(layout.clip(layer.bond_dims or ())),
                f"{layer.shape[0] * layer.shape[1] / layer.parameters:.2f}",
                f"{layer.macs:,}",
                "" if error is None else f"{error:.4f}",
            ]
        rows.append([layer.name, size, *figures, *([seconds] if timed else []), layer.reason])
    columns = ["layer", "out x in", "layout", "bond dims", "ratio", "macs", "weight error"]
    columns += [*(["µs of dense"] if timed else []), "why"]
    print_table("Plan (nothing was written)", columns, rows)
    totals = predicted_totals(plan)
    lines = []
    if totals.parameters is not None and totals.bytes is not None:
        lines.append(f"parameters {totals.parameters[0]:,} -> {totals.parameters[1]:,}")
        lines.append(f"stored bytes {totals.bytes[0]:,} -> {totals.bytes[1]:,}")
    lines.append(f"multiply-adds a row {totals.macs[0]:,} -> {totals.macs[1]:,}")
    if totals.seconds is not None:
        before, after = (seconds * 1e6 for seconds in totals.seconds)
        lines.append(f"time of these layers {before:,.0f} -> {after:,.0f} µs")
    if totals.relative_output_error is not None:
        lines.append(f"change of the model's outputs {totals.relative_output_error:.3g}")
    typer.echo("Predicted: " + "; ".join(lines))
