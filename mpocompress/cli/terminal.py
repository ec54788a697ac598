"""What a command shows besides its tables: progress, notes, and the one way to draw a table."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mpocompress.planning import Progress


@contextmanager
def progress_bar() -> "Iterator[Progress | None]":
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


def show_notes(notes: Iterable[str]) -> None:
    """Print what the user should know, on stderr: stdout is for results."""
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def print_json(found: object, *, indent: int | None = 2) -> None:
    """Print one object on stdout. Numbers must be finite: JSON knows no others."""
    typer.echo(json.dumps(found, indent=indent, allow_nan=False))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on stdout, its first column to the left and the others to the right."""
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


def listed(numbers: Iterable[object]) -> str:
    """Numbers with commas between them."""
    return ",".join(map(str, numbers))


def number(value: float | None) -> str:
    """A figure for a table cell; empty if there is none."""
    return "" if value is None else f"{value:.4f}"
