"""The command `inspect`: every parameter, its spectrum, and how small it could be."""

from typing import Annotated, Any

import typer

from mpocompress.cli.app import app
from mpocompress.cli.options import (
    ExcludeOption,
    FactoryOption,
    IncludeOption,
    JsonOption,
    ModelArgument,
    TrustOption,
)
from mpocompress.cli.terminal import print_table, progress_bar, show_notes


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

    opened = pipeline.open_any(model, factory=factory, trust_pickle=trust_pickle)
    with progress_bar() as progress:
        found = inspect_inventory(
            opened.inventory(),
            relative_error=error,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            kind=opened.kind,
            progress=progress,
        )
    show_notes(opened.notes)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        _show_inspection(found)


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
    print_table(f"{found.parameters} parameters", columns, rows)
