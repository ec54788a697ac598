"""Output directories that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mpocompress.errors import OutputExistsError, SaveError

CORES_FILE = "model.mpo.safetensors"
ONNX_FILE = "model.onnx"
ONNX_DATA_FILE = "model.onnx.data"
REPORT_FILES = ("report.json", "report.md", "report.html")
# All that a run may write; nothing else in an output directory is ever touched. The report comes
# last: where it stands, the files that it describes do, too.
_OUR_FILES = (CORES_FILE, ONNX_DATA_FILE, ONNX_FILE, *reversed(REPORT_FILES))


@contextmanager
def staged_output(
    directory: str | Path, *, force: bool = False, source: str | Path | None = None
) -> Iterator[Path]:
    """A scratch directory whose files appear in `directory` only if the block succeeds.

    The scratch directory stands beside the target, so that every file moves by a rename: a killed
    run leaves each file either old or new. In an existing directory only files that we write are
    replaced or, if stale, removed; a failed run leaves it as it was.

    Args:
        directory: the target; made if missing.
        force: whether it may exist.
        source: what the run reads, which it must not replace.

    Raises:
        OutputExistsError: the directory exists, and is not empty, without `force`; or what would be
            replaced in it is not ours, or is the source.
        SaveError: the target cannot be written.
    """
    target = Path(os.path.abspath(directory))  # "." has no name and no parent
    try:
        lost = target.is_symlink() and not target.exists()
        target.with_name(f".{target.name}.12345678").is_dir()  # as the scratch directory is called
    except OSError as error:  # a name that is too long
        raise _refused(target, error) from None
    if lost:
        raise SaveError(
            f"the output {str(directory)!r} is a link to {os.readlink(target)!r}, which does not "
            "exist. Make that directory, or choose another with -o."
        )
    if target.is_dir() and any(target.iterdir()) and not force:
        raise OutputExistsError(
            f"the output directory {str(directory)!r} exists. Use --force (force=True) to replace "
            "the files in it that mpocompress writes, or choose another with -o."
        )
    if target.exists() and not target.is_dir():
        raise SaveError(f"the output {str(directory)!r} is a file; give a directory with -o.")
    _check_ours(target, None if source is None else Path(source))
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise SaveError(
            f"cannot write to {str(target.parent)!r}: {error.strerror}. Choose another directory "
            "with -o."
        ) from None
    try:
        yield scratch
        _publish(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:  # innermost first; what others have filled meanwhile stays
            with suppress(OSError):
                parent.rmdir()
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def check_output_file(path: Path, *, force: bool = False) -> None:
    """Refuse, before any work, a file that `replacing` could not put in its place.

    Raises:
        OutputExistsError: it exists, without `force`.
        SaveError: it is a directory, its folder is missing or not writable, or its name too long.
    """
    try:
        exists = path.exists()
        folder = path.absolute().parent
        fits = folder.is_dir()
        path.is_symlink()  # a name that is too long is found out by any look at it
    except OSError as error:
        raise _refused(path, error) from None
    if path.is_dir():
        raise SaveError(f"the output {str(path)!r} is a directory; give a file with -o.")
    if exists and not force:
        raise OutputExistsError(f"{str(path)!r} exists. Use --force to replace it.")
    if not fits:
        raise SaveError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}.")
    if not os.access(folder, os.W_OK):
        raise SaveError(f"cannot write {str(path)!r}: the folder is not writable.")


def _refused(path: Path, error: OSError) -> SaveError:
    return SaveError(f"cannot write {str(path)!r}: {error.strerror}. Choose another place with -o.")


def _check_ours(target: Path, source: Path | None) -> None:
    """Refuse to replace files of these names that no run has written, or that this one reads."""
    there = [name for name in _OUR_FILES if (target / name).exists()]
    if source is not None and source.exists():
        read = next((name for name in there if source.samefile(target / name)), None)
        if read is not None:
            raise OutputExistsError(
                f"{str(target / read)!r} is what is read, and would be replaced. Choose another "
                "directory with -o."
            )
    if there and not {CORES_FILE, "report.json"} & set(there):
        raise OutputExistsError(
            f"{str(target / there[0])!r} would be replaced, and without {CORES_FILE} and "
            "report.json beside it no run of mpocompress has written it. Choose another directory "
            "with -o, or move it away."
        )


def _publish(scratch: Path, target: Path) -> None:
    try:
        # mkdtemp makes private directories, safetensors private files; a result is neither.
        mask = umask()
        scratch.chmod(0o777 & ~mask)
        for file in scratch.iterdir():
            file.chmod(0o666 & ~mask)
        if not target.exists():
            scratch.rename(target)
            return
        for name in _OUR_FILES:
            if (scratch / name).exists():
                os.replace(scratch / name, target / name)
            else:
                (target / name).unlink(missing_ok=True)
    except OSError as error:
        raise SaveError(f"cannot write to {str(target)!r}: {error.strerror}.") from None


def umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
