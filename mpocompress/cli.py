"""The command line: parse, call the library, print, map errors to exit codes.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpocompress._version import __version__
from mpocompress.errors import LoadError, MPOCompressError, OutputExistsError, PlanError

if TYPE_CHECKING:
    from mpocompress.planning import Plan, Progress
    from mpocompress.report import CompressionReport

app = typer.Typer(
    name="mpocompress",
    help="Turn a trained dense network into a compact tensor network: matrix product operators, "
    "verified ONNX, a report.\n\n`mpocompress MODEL --bond-dim 16` is short for "
    "`mpocompress compress MODEL --bond-dim 16`.\n\nExit codes: 0 done; 1 the run failed; 2 usage "
    "or input; 3 a budget or a check was not met.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .pt or .pth file (state dict or module), .safetensors, or a Hugging Face folder.",
    ),
]
ResultArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A directory that `compress` has written.")
]
FactoryOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FACTORY",
        help="Your code that builds the module; it is filled with the checkpoint's tensors.",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Unpickle MODEL even if that runs code from the file."),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        help="Compress only layers that match: a glob, or re:REGEX. Repeatable.",
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="Leave layers that match dense. Repeatable."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one machine-readable object instead of a table.")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace our files in an output that exists.")
]


class Of(StrEnum):
    """What a ratio counts."""

    MODEL = "model"
    LAYERS = "layers"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mpocompress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


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
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="SHAPE[:DTYPE]",
            help="Shape of one input, such as 1x784 or 1x128:int64. Repeat for further inputs.",
        ),
    ] = None,
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
        seed=seed,
    )
    if dry_run:
        with _progress() as progress:
            plan, opened, _ = pipeline.plan_model(model, request, progress=progress)
        _show_notes(opened.notes)
        if as_json:
            typer.echo(plan.to_json(), nl=False)
        else:
            _show_plan(plan)
        return
    directory = output or Path(f"{_stem(model)}-mpo")
    with _progress() as progress:
        done = pipeline.convert(model, directory, request, force=force, progress=progress)
    _show_notes(done.notes)
    if as_json:
        typer.echo(done.report.to_json(), nl=False)
    else:
        _show_report(done.report, done.directory)


@app.command()
def inspect(
    model: ModelArgument,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    error: Annotated[
        float,
        typer.Option(
            "--error",
            min=1e-6,
            max=0.999,
            help="Relative weight error at which the best compression ratio is given.",
        ),
    ] = 0.1,
    factory: FactoryOption = None,
    trust_pickle: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """List every parameter of MODEL: shape, kind, share, spectrum, best ratio at an error."""
    from mpocompress import pipeline
    from mpocompress.analysis import inspect_inventory
    from mpocompress.surgery import find_weights, open_modules

    opened = pipeline.open_model(model, factory=factory, trust_pickle=trust_pickle)
    with _progress() as progress:
        found = inspect_inventory(
            find_weights(open_modules(opened.module)),
            relative_error=error,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            kind=opened.kind,
            progress=progress,
        )
    _show_notes(opened.notes)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        _show_inspection(found)


@app.command()
def report(directory: ResultArgument, as_json: JsonOption = False) -> None:
    """Redraw the report of a result from its report.json."""
    from mpocompress.api import write_report
    from mpocompress.report import CompressionReport

    found = CompressionReport.load(directory)
    write_report(found, directory if directory.is_dir() else directory.parent)
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        _show_report(found, directory)


@app.command()
def densify(
    directory: ResultArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="A .safetensors or .pt file. Default: DIR's name-dense.safetensors.",
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Turn a result back into an ordinary dense checkpoint."""
    from mpocompress.api import save_dense

    target = output or Path(f"{directory.resolve().name}-dense.safetensors")
    if target.exists() and not force:
        raise OutputExistsError(f"{str(target)!r} exists. Use --force to replace it.")
    save_dense(directory, target)
    typer.echo(f"{target}  {target.stat().st_size} bytes")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a command, print our errors in a line or two, exit with their code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        command.callback.__name__ for command in app.registered_commands if command.callback
    }
    if arguments and arguments[0] not in commands | {"--help", "-h", "--version"}:
        arguments.insert(0, "compress")
    try:
        app(args=arguments, prog_name="mpocompress")
    except MPOCompressError as error:
        _fail(error, error.exit_code, "--json" in arguments)
    except Exception as error:
        if os.environ.get("MPOCOMPRESS_TRACEBACK"):
            raise
        text = f"unexpected {type(error).__name__}: {error}"
        hint = "Set MPOCOMPRESS_TRACEBACK=1 to see where, and please report it."
        _fail(LoadError(f"{text}. {hint}"), 1, "--json" in arguments)


def _fail(error: MPOCompressError, code: int, as_json: bool) -> None:
    if as_json:
        what = {"type": type(error).__name__, "message": str(error), "exit_code": code}
        typer.echo(json.dumps({"error": what}))
    typer.echo(f"mpocompress: {error}", err=True)
    raise SystemExit(code)


def _stem(model: str) -> str:
    path = Path(os.path.abspath(model))
    return path.name if path.is_dir() else path.stem


@contextmanager
def _progress() -> "Iterator[Progress | None]":
    """A bar on a terminal; nothing at all elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what or "(model)", completed=done, total=total)

        yield show


def _show_notes(notes: "list[str] | tuple[str, ...]") -> None:
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Piped output is not wrapped to a terminal that is not there.
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # names are text, not markup
    console.print(table)


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
                _listed(bonds),
                f"{layer.shape[0] * layer.shape[1] / after:.2f}",
                "" if error is None else f"{error:.4f}",
                layer.reason,
            ]
        )
    columns = ["layer", "out x in", "layout", "bond dims", "ratio", "weight error", "why"]
    _print_table("Plan (nothing was written)", columns, rows)


def _show_report(report: "CompressionReport", directory: Path) -> None:
    rows = []
    for layer in report.compressed_layers:
        rows.append(
            [
                layer.name,
                "x".join(map(str, layer.shape)),
                ",".join(f"{out}x{in_}" for out, in_ in layer.layout or []),
                _listed(layer.bond_dims or ()),
                f"{layer.parameters.dense}",
                f"{layer.parameters.compressed}",
                f"{layer.parameters.ratio:.2f}",
                _number(layer.relative_weight_error),
            ]
        )
    columns = ["layer", "out x in", "layout", "bond dims", "dense", "MPO", "ratio", "weight error"]
    _print_table(f"{report.source.name}: {len(rows)} layers compressed", columns, rows)
    totals = report.totals.parameters
    typer.echo(
        f"parameters: model {totals.model.dense} -> {totals.model.compressed} "
        f"({totals.model.ratio:.2f}x), compressed layers {totals.layers.ratio:.2f}x"
    )
    if report.parity is not None:
        typer.echo(
            f"ONNX Runtime agrees with PyTorch to {report.parity.max_abs_difference:.1e} "
            f"at batch sizes {_listed(report.parity.batch_sizes)}"
        )
    for name, size in report.files.items():
        typer.echo(f"{directory / name}  {size} bytes")
    typer.echo(f"{directory / 'report.html'}")


def _show_inspection(found: Any) -> None:
    rows = []
    for entry in found.entries:
        best = entry.best
        figures = ["", "", "", entry.reason]
        if best is not None:
            layout = ",".join(f"{out}x{in_}" for out, in_ in best.layout)
            what = f"{layout} at bond dim {best.bond_dim}" if best.ratio > 1 else "not smaller"
            figures = [
                f"{entry.bonds[0].entropy_nats:.2f}",
                f"{entry.bonds[0].effective_bond_dim:.0f}",
                f"{best.ratio:.2f}",
                what,
            ]
        rows.append(
            [
                entry.name,
                entry.kind,
                "x".join(map(str, entry.shape)),
                f"{entry.parameters}",
                f"{100 * entry.share:.1f} %",
                *figures,
            ]
        )
    columns = ["name", "kind", "shape", "parameters", "share", "entropy (nats)"]
    columns += ["effective bond dim", f"ratio at error {found.relative_error:g}", "how, or why not"]
    _print_table(f"{found.parameters} parameters", columns, rows)


def _listed(numbers: "Any") -> str:
    return ",".join(map(str, numbers))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
