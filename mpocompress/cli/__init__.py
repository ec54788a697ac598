"""The command line: parse, call the library, print, map errors to exit codes.

Everything heavy is imported inside the commands, so that `--help` answers at once. A command is a
function that registers with `app`; the order in which its modules are imported is that of the help.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from typer.exceptions import TyperException

from mpocompress.cli.app import app
from mpocompress.cli.compression import compress
from mpocompress.cli.inspection import inspect
from mpocompress.cli.results import densify, report
from mpocompress.cli.terminal import print_json
from mpocompress.cli.verification import bench, export, verify
from mpocompress.errors import LoadError, MPOCompressError, SaveError

__all__ = ["app", "bench", "compress", "densify", "export", "inspect", "main", "report", "verify"]

# A full disk, or a pipe that nobody reads any more, behind the standard output or a file.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EPIPE, errno.EIO})


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a command, print our errors in a line or two, exit with their code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        command.callback.__name__ for command in app.registered_commands if command.callback
    }
    if arguments and arguments[0] not in commands | {"--help", "-h", "--version"}:
        arguments.insert(0, "compress")
    try:
        with _leaving_nothing_when_ended():
            _run(arguments)
    except MPOCompressError as error:
        _fail(error, error.exit_code, "--json" in arguments)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            text = f"{error.filename!r} is too long for the name of a file."
            _fail(LoadError(text), LoadError.exit_code, "--json" in arguments)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            _drop_unprinted()
            text = (
                f"cannot write the output: {error.strerror}. Nobody takes it, or there is no room."
            )
            _fail(SaveError(text), 1, as_json=False)
        if os.environ.get("MPOCOMPRESS_TRACEBACK"):
            raise
        text = f"unexpected {type(error).__name__}: {error}"
        hint = "Set MPOCOMPRESS_TRACEBACK=1 to see where, and please report it."
        _fail(LoadError(f"{text}. {hint}"), 1, "--json" in arguments)


def _drop_unprinted() -> None:
    """Give up a standard output that takes nothing: Python would fail with it again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _run(arguments: list[str]) -> None:
    if "--json" not in arguments:
        app(args=arguments, prog_name="mpocompress")
        return
    try:
        code = app(args=arguments, prog_name="mpocompress", standalone_mode=False)
    except TyperException as error:  # mistakes in usage: in plain text and as an object, too
        _fail(error, error.exit_code, True, kind="UsageError")
    else:
        raise SystemExit(code if isinstance(code, int) else 0)


@contextmanager
def _leaving_nothing_when_ended() -> Iterator[None]:
    """Let SIGTERM run what cleans up, as Ctrl-C does: half a result would stay otherwise."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # signals are not ours there
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(error: Exception, code: int, as_json: bool, *, kind: str | None = None) -> None:
    text = error.format_message() if isinstance(error, TyperException) else str(error)
    if as_json:
        what = {"type": kind or type(error).__name__, "message": text, "exit_code": code}
        try:
            print_json({"error": what}, indent=None)
        except OSError:
            _drop_unprinted()
    typer.echo(f"mpocompress: {text}", err=True)
    raise SystemExit(code)
