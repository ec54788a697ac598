"""The application object that the commands register with, and the options before a command."""

from typing import Annotated

import typer

from mpocompress._version import __version__

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
