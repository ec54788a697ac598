"""The folder beside an output directory in which an interrupted run leaves what it has done."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict

from mpocompress.errors import LoadError
from mpocompress.files import make_state_folder, replacing
from mpocompress.loading.hashes import file_sha256
from mpocompress.pipeline.request import Request
from mpocompress.tuning.state_file import check_same_run

_RECORD_FILE = "run.json"
# What only the files depend on that are written at the end may change before a run goes on.
_OF_FILES = ("inputs", "form", "quantize", "onnx")


class _Record(BaseModel):
    """Whose state it is.

    Attributes:
        force: whether the run may replace what is in its output directory.
        arguments: all that its fits and its healing depend on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    force: bool
    arguments: dict[str, Any]


def state_folder(directory: str | Path) -> Path:
    """Where a run with `--resume` into a directory keeps what is done: `DIR.state`, beside it."""
    target = Path(os.path.abspath(directory))
    return target.with_name(f"{target.name}.state")


class RunState:
    """Fits and healing of a run with `--resume`, in `DIR.state`; a context, left when the run ends.

    The folder goes when the run is done, and when a run that failed left nothing in it to go on
    from.

    Args:
        directory: the run's output.
        force: whether this run may replace what is in it.
    """

    def __init__(self, directory: str | Path, *, force: bool) -> None:
        self.folder = state_folder(directory)
        self._file = self.folder / _RECORD_FILE
        self._record = self._read()
        self._force = force

    @property
    def force(self) -> bool:
        """Whether this run, or the one that it goes on with, may replace what is in the output.

        A state whose run is not known gives no such right: another run may have ended since.
        """
        return self._force or (self._record is not None and self._record.force)

    def __enter__(self) -> "RunState":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.folder.is_dir():
            return
        if kind is None or [file.name for file in self.folder.iterdir()] == [_RECORD_FILE]:
            shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self, request: Request, *, model: str) -> None:
        """Go on with the run that the folder is of, or begin one in it.

        Args:
            request: of this run.
            model: hash of the model's file.

        Raises:
            DataError: the folder is of a run with other arguments, by name.
            SaveError: it cannot be written.
        """
        arguments = _arguments(request, model)
        if self._record is not None:
            check_same_run(self.folder, self._record.arguments, arguments)
        record = _Record(force=self.force, arguments=arguments)
        make_state_folder(self.folder)
        with replacing(self._file) as scratch:
            scratch.write_text(record.model_dump_json(indent=2), encoding="utf-8")

    def _read(self) -> _Record | None:
        if not self._file.exists():
            return None
        try:
            return _Record.model_validate_json(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(
                f"the state {str(self._file)!r} is truncated or foreign: "
                f"{str(error).splitlines()[0]}. Remove its folder to start anew."
            ) from None


def _arguments(request: Request, model: str) -> dict[str, Any]:
    """What fits and healing depend on, as JSON has it; files by their hashes."""
    found = asdict(request)
    if request.max_size is None:  # which is measured on files before anything is fitted
        found = {name: value for name, value in found.items() if name not in _OF_FILES}
    del found["trust_pickle"]
    found["model"] = model
    for name in ("data", "plan"):
        if found[name] is not None and (file := Path(found[name])).is_file():
            found[name] = file_sha256(file)
    arguments: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return arguments
