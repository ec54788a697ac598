"""Files that appear whole or not at all, and the folder that the state of a run is kept in."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mpocompress.errors import SaveError


def make_state_folder(folder: Path) -> None:
    """Make the folder that the state of a run is kept in, unless it is there.

    Raises:
        SaveError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(
            f"cannot keep the state of the run in {str(folder)!r}: {error.strerror}."
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file beside `path` that takes its place if the block succeeds.

    Of a link the file that it leads to is replaced; pipes and devices are written to as they are.

    Raises:
        SaveError: the file cannot be written.
    """
    if path.is_dir():
        raise SaveError(f"cannot write {str(path)!r}: it is a folder. Give a file in it.")
    if not path.absolute().parent.is_dir():
        raise SaveError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}.")
    path = path.resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        os.replace(scratch, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise SaveError(f"cannot write {str(path)!r}: {error}.") from error
    finally:
        scratch.unlink(missing_ok=True)
