"""The command `compress`, and the plan that its `--dry-run` shows."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpocompress.cli.app import app
from mpocompress.cli.options import (
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
from mpocompress.errors import PlanError

if TYPE_CHECKING:
    from mpocompress.planning import Plan


class Of(StrEnum):
    """What a ratio counts."""

    MODEL = "model"
    LAYERS = "layers"


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
        int,
        typer.Option(
            "--sweeps",
            metavar="N",
            help="With --data: at most so many passes over the sites of a layer.",
        ),
    ] = 16,
    distill: Annotated[
        int,
        typer.Option(
            "--distill",
            metavar="STEPS",
            help="With --data: then heal the whole model, training it for so many steps to do what "
            "the dense one does.",
        ),
    ] = 0,
    inputs: InputOption = None,
    form: FormOption = Form.AUTO,
    batch: BatchOption = 1,
    quantize: QuantizeOption = Quantize.NONE,
    factory: FactoryOption = None,
    trust_pickle: TrustOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.")
    ] = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of everything random. Equal seeds, equal results.")
    ] = 0,
) -> None:
    """Compress MODEL to a bond dimension or a ratio; write cores, verified ONNX and a report."""
    from mpocompress import pipeline

    if (bond_dim is None) == (ratio is None):
        given = "both" if ratio is not None else "neither"
        raise PlanError(
            f"--bond-dim and --ratio say how small; {given} given. Give one, as in --bond-dim 16."
        )
    request = pipeline.Request(
        bond_dim=bond_dim,
        ratio=ratio,
        of=of.value,
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
        batch=batch,
        quantize=quantize.value,
        seed=seed,
    )
    if dry_run:
        with progress_bar() as progress:
            plan, opened, _ = pipeline.plan_model(model, request, progress=progress)
        show_notes(opened.notes)
        if as_json:
            typer.echo(plan.to_json(), nl=False)
        else:
            _show_plan(plan)
        return
    directory = output or Path(f"{_stem(model)}-mpo")
    with progress_bar() as progress:
        done = pipeline.convert(model, directory, request, force=force, progress=progress)
    show_notes(done.notes)
    if as_json:
        typer.echo(done.report.to_json(), nl=False)
    else:
        show_report(done.report, done.directory)


def _stem(model: str) -> str:
    path = Path(os.path.abspath(model))
    return path.name if path.is_dir() else path.stem


def _show_plan(plan: "Plan") -> None:
    rows = []
    for layer in plan.layers:
        size = f"{layer.shape[0]}x{layer.shape[1]}"
        if layer.action == "keep":
            rows.append([layer.name, size, "keep", "", "", "", layer.reason])
            continue
        layout = layer.sites()
        bonds = layout.clip(layer.bond_dims or ())
        after = layout.num_parameters(bonds)
        chosen = next((c for c in layer.candidates if c.chosen), None)
        error = chosen.relative_weight_error if chosen else None
        rows.append(
            [
                layer.name,
                size,
                str(layout),
                listed(bonds),
                f"{layer.shape[0] * layer.shape[1] / after:.2f}",
                "" if error is None else f"{error:.4f}",
                layer.reason,
            ]
        )
    columns = ["layer", "out x in", "layout", "bond dims", "ratio", "weight error", "why"]
    print_table("Plan (nothing was written)", columns, rows)
