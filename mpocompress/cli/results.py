"""The commands on what `compress` has written: `report` and `densify`; and its table."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpocompress.cli.app import app
from mpocompress.cli.options import ForceOption, JsonOption, ResultArgument
from mpocompress.cli.terminal import listed, number, print_json, print_table

if TYPE_CHECKING:
    from mpocompress.report import CompressionReport


@app.command()
def report(directory: ResultArgument, as_json: JsonOption = False) -> None:
    """Redraw the report of a result from its report.json."""
    from mpocompress.api import write_report
    from mpocompress.report import CompressionReport

    found = CompressionReport.load(directory)
    folder = directory if directory.is_dir() else directory.parent
    write_report(found, folder)
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        show_report(found, folder)


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
    as_json: JsonOption = False,
) -> None:
    """Turn a result back into an ordinary dense checkpoint."""
    from mpocompress.api import save_dense
    from mpocompress.saving import check_output_file

    target = output or Path(f"{directory.resolve().name}-dense.safetensors")
    check_output_file(target, force=force)
    save_dense(directory, target)
    size = target.stat().st_size
    if as_json:
        print_json({"file": str(target), "bytes": size}, indent=None)
    else:
        typer.echo(f"{target}  {size} bytes")


def show_report(report: "CompressionReport", directory: Path) -> None:
    """Print the compressed layers, the totals, the parity and the files."""
    rows = []
    for layer in report.compressed_layers:
        rows.append(
            [
                layer.name,
                "x".join(map(str, layer.shape)),
                ",".join(f"{out}x{in_}" for out, in_ in layer.layout or []),
                listed(layer.bond_dims or ()),
                f"{layer.parameters.dense}",
                f"{layer.parameters.compressed}",
                f"{layer.parameters.ratio:.2f}",
                number(layer.relative_weight_error),
                layer.precision or "",
                layer.form or "",
            ]
        )
    columns = ["layer", "out x in", "layout", "bond dims", "dense", "MPO", "ratio", "weight error"]
    columns += ["stored as", "form"]
    print_table(f"{report.source.name}: {len(rows)} layers compressed", columns, rows)
    totals = report.totals.parameters
    typer.echo(
        f"parameters: model {totals.model.dense} -> {totals.model.compressed} "
        f"({totals.model.ratio:.2f}x), compressed layers {totals.layers.ratio:.2f}x"
    )
    if any(layer.precision for layer in report.layers):
        stored = report.totals.bytes.model
        typer.echo(
            f"stored bytes: model {stored.dense} -> {stored.compressed} ({stored.ratio:.2f}x)"
        )
    if report.parity is not None:
        reference = {"pytorch": "PyTorch", "graph": "the dense graph of the same weights"}
        typer.echo(
            f"ONNX Runtime agrees with {reference[report.parity.reference]} to "
            f"{report.parity.max_abs_difference:.1e} "
            f"at batch sizes {listed(report.parity.batch_sizes)}"
        )
    for name, size in report.files.items():
        typer.echo(f"{directory / name}  {size} bytes")
    typer.echo(f"{directory / 'report.html'}")
