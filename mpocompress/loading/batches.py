"""Data for calibration, verification and tracing: batches of forward arguments and labels."""

import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpocompress.errors import DataError, LoadError, MPOCompressError
from mpocompress.loading.checkpoint import read_safetensors
from mpocompress.loading.factory import import_object, is_object_spec, project_on_path

LABEL_NAMES = ("labels", "y")
_POSITIONAL = re.compile(r"arr_(\d+)")  # what numpy.savez calls arrays without a name
_FILE_SUFFIXES = (".npz", ".safetensors")


@dataclass(frozen=True, eq=False)
class Batch:
    """One call's worth of data: `model(*batch.args, **batch.kwargs)`.

    Attributes:
        args: positional forward arguments.
        kwargs: forward arguments by name.
        labels: targets, one entry a row; never given to the model.
        divisible: whether rows may be taken out of it, as examples of their own.
    """

    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    divisible: bool = True

    @property
    def num_rows(self) -> int:
        """Size of the first dimension of the first input that has one."""
        return next(t.shape[0] for _, t in self.named_inputs() if t.ndim)

    def named_inputs(self) -> Iterator[tuple[str, Tensor]]:
        """Inputs with their names; positional ones are called "argument 0" and so on."""
        for index, tensor in enumerate(self.args):
            yield f"argument {index}", tensor
        yield from self.kwargs.items()

    @property
    def rows_come_first(self) -> bool:
        """Whether all inputs have the same first dimension."""
        tensors = [tensor for _, tensor in self.named_inputs()]
        return all(tensor.ndim and tensor.shape[0] == self.num_rows for tensor in tensors)

    def map_inputs(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with all inputs changed alike; labels stay."""
        return replace(
            self,
            args=tuple(change(tensor) for tensor in self.args),
            kwargs={name: change(tensor) for name, tensor in self.kwargs.items()},
        )

    def to(self, device: torch.device) -> "Batch":
        """The same batch with all inputs on `device`."""
        return self.map_inputs(lambda tensor: tensor.to(device))

    def cast(self, dtype: torch.dtype) -> "Batch":
        """The same batch with floating inputs in `dtype` (NumPy's are often float64)."""
        return self.map_inputs(
            lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
        )

    def take(self, rows: Tensor) -> "Batch":
        """Some rows, by their numbers, with their labels; all inputs have their rows first."""
        labels = None if self.labels is None else self.labels[rows.to(self.labels.device)]
        found = self.map_inputs(lambda tensor: tensor[rows.to(tensor.device)])
        return replace(found, labels=labels)


class Batches:
    """Batches that can be read more than once. Iterating starts a new pass.

    `len()` is known for files and sequences, and raises TypeError for functions and iterators.
    """

    def __init__(
        self,
        start: Callable[[], Iterable[Any]],
        *,
        place: str,
        length: int | None = None,
        limit: int | None = None,
    ) -> None:
        """Wrap what starts a pass.

        Args:
            start: gives a fresh iterable of batches (see `as_batch`) for each pass.
            place: file, function or "data", for messages.
            length: number of batches, if known.
            limit: a pass ends with the batch that reaches this many rows.
        """
        if limit is not None and limit < 1:
            raise DataError(
                f"{place}: a limit of {limit} rows leaves no data; at least 1 is needed."
            )
        self.place = place
        self._start = start
        self._length = length
        self._limit = limit

    def __iter__(self) -> Iterator[Batch]:
        rows = 0
        number = -1
        for number, value in enumerate(self._start()):
            batch = as_batch(value, place=f"{self.place}, batch {number}")
            yield batch
            rows += batch.num_rows
            if self._limit is not None and rows >= self._limit:
                break
        if number < 0:
            raise DataError(f"{self.place}: there are no batches in it.")

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"{self.place}: the number of batches is not known beforehand")
        return self._length

    def cast(self, dtype: torch.dtype) -> "Batches":
        """The same batches with floating inputs in `dtype`."""
        return Batches(
            lambda: (batch.cast(dtype) for batch in self), place=self.place, length=self._length
        )


def as_batch(value: Any, *, place: str = "batch") -> Batch:
    """Read one batch in any of the forms that users have.

    Args:
        value: a tensor or NumPy array (the only forward argument), a tuple or list of them
            (positional), or a mapping (by name; an entry "labels" or "y" is not an input).
        place: for messages.

    Raises:
        DataError: another type, no rows, NaN or +Inf in an input (-Inf is allowed: masks have it).
    """
    if isinstance(value, Batch):
        batch = value
    elif isinstance(value, Tensor | np.ndarray):
        batch = Batch(args=(_tensor(value, "argument 0", place),))
    elif isinstance(value, tuple | list):
        batch = Batch(args=tuple(_tensor(v, f"argument {i}", place) for i, v in enumerate(value)))
    elif isinstance(value, Mapping):
        batch = _from_names({str(k): _tensor(v, str(k), place) for k, v in value.items()}, place)
    else:
        raise DataError(
            f"{place} is of type {type(value).__name__}; a batch is a tensor, a tuple of tensors, "
            "or a dict of tensors by the names of forward arguments."
        )
    inputs = list(batch.named_inputs())
    if not any(tensor.ndim for _, tensor in inputs):
        raise DataError(f"{place} holds no input with a batch dimension.")
    for name, tensor in inputs:
        _check_numbers(tensor, name, place)
    labels = batch.labels
    if labels is not None and (labels.ndim == 0 or labels.shape[0] != batch.num_rows):
        raise DataError(
            f"{place}: labels have shape {tuple(labels.shape)}, but the inputs have "
            f"{batch.num_rows} rows."
        )
    return batch


def as_batches(data: Any, *, limit: int | None = None) -> Batches:
    """Make any iterable of batches readable as `Batches`.

    Args:
        data: a list, a DataLoader, a function that starts a pass, or an iterator (one pass only).
        limit: a pass ends with the batch that reaches this many rows.

    Raises:
        DataError: not an iterable of batches; later, if an iterator is asked for a second pass.
    """
    if isinstance(data, Batches):
        if limit is None:
            return data
        return Batches(lambda: data, place=data.place, limit=limit)
    if isinstance(data, Tensor | np.ndarray | Mapping | Batch):
        raise DataError(
            f"data is one {type(data).__name__}, where an iterable of batches is needed. For a "
            "single batch give a list of one: data=[batch]."
        )
    if isinstance(data, str | bytes) or not (callable(data) or isinstance(data, Iterable)):
        raise DataError(
            f"data is of type {type(data).__name__}; needed is an iterable of batches. Files are "
            "read with load_batches(path)."
        )
    return _from_object(data, place="data", limit=limit)


def load_batches(spec: str, *, batch_size: int = 32, limit: int | None = None) -> Batches:
    """Read batches from a file or from the user's function.

    In a file, arrays are forward arguments by name; `arr_0`, `arr_1`, ... are positional; `labels`
    or `y` are labels. All share the first dimension, along which they are cut into batches.

    Args:
        spec: a `.npz` or `.safetensors` file, or `MODULE:FUNCTION`; the function is called anew for
            each pass and gives an iterable of batches (see `as_batch`).
        batch_size: rows of a batch, for files; the last batch may be smaller.
        limit: read at most this many rows; a function's pass ends with the batch that reaches it.

    Raises:
        LoadError: a missing, truncated or foreign file, or a function that cannot be imported.
        DataError: arrays that are no inputs: object arrays, unequal lengths, NaN, no rows.
    """
    if batch_size < 1:
        raise DataError(
            f"{spec}: a batch size of {batch_size} is impossible; at least 1 is needed."
        )
    suffix = Path(spec).suffix.lower()
    if suffix not in _FILE_SUFFIXES and is_object_spec(spec):
        return _from_object(import_object(spec, option="--data"), place=spec, limit=limit)
    if suffix not in _FILE_SUFFIXES:
        extra = " Wrap a single array with numpy.savez." if suffix == ".npy" else ""
        raise DataError(
            f"data {spec!r} is neither a .npz nor a .safetensors file nor MODULE:FUNCTION.{extra}"
        )
    path = Path(spec)
    if not path.is_file():
        raise LoadError(f"data file {path} does not exist.")
    if path.stat().st_size == 0:
        raise LoadError(f"data file {path} is empty (0 bytes).")
    arrays = _read_npz(path) if suffix == ".npz" else read_safetensors(path)
    return _from_arrays(arrays, spec, batch_size=batch_size, limit=limit)


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        # Object arrays are pickles: never.
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        # NumPy takes whatever it does not know for a pickle, and advises to unpickle it.
        why = "it is no archive of arrays" if "pickle" in str(error) else str(error).rstrip(".")
        raise LoadError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as .npz: {why}. Write it with "
            "numpy.savez."
        ) from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise LoadError(f"{path} holds a single array; wrap it with numpy.savez.")
    tensors = {}
    with archive:
        for name in archive.files:
            try:
                array = archive[name]
            except ValueError as error:
                if "allow_pickle" not in str(error):
                    raise LoadError(f"{path}: array {name!r} cannot be read: {error}") from error
                raise DataError(
                    f"{path}: array {name!r} holds Python objects, which are never unpickled. Save "
                    "numbers of one shape."
                ) from error
            except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise LoadError(f"{path}: array {name!r} cannot be read: {error}") from error
            tensors[name] = _tensor(array, name, str(path))
    return tensors


def _tensor(value: Any, name: str, place: str) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value
    elif isinstance(value, np.ndarray):
        if value.dtype.hasobject or value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
            raise DataError(
                f"{place}: {name!r} has dtype {value.dtype}; inputs are numbers of 8 to 64 bits."
            )
        # torch takes only arrays in the machine's byte order; read-only ones make it warn.
        array = np.require(value, value.dtype.newbyteorder("="), ["C", "W"])
        tensor = torch.from_numpy(array)
    else:
        raise DataError(
            f"{place}: {name!r} is of type {type(value).__name__}; inputs are tensors or NumPy "
            "arrays."
        )
    if tensor.is_complex():
        raise DataError(f"{place}: {name!r} is complex, which models here do not take.")
    return tensor


def _check_numbers(tensor: Tensor, name: str, place: str) -> None:
    if tensor.numel() == 0:
        raise DataError(
            f"{place}: {name!r} has shape {tuple(tensor.shape)}: there is nothing in it."
        )
    if tensor.is_floating_point():
        bad = torch.isnan(tensor) | torch.isposinf(tensor)
        count = int(bad.sum())
        if count:
            raise DataError(
                f"{place}: {name!r} has {count} entries that are NaN or Inf, of {tensor.numel()}. "
                "Clean the data first."
            )


def _from_names(tensors: Mapping[str, Tensor], place: str) -> Batch:
    labels = [name for name in LABEL_NAMES if name in tensors]
    if len(labels) > 1:
        raise DataError(
            f"{place} has both {labels[0]!r} and {labels[1]!r}; only one can be labels."
        )
    positional: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _POSITIONAL.fullmatch(name):
            positional[int(match.group(1))] = tensor
    if sorted(positional) != list(range(len(positional))):
        raise DataError(
            f"{place}: positional arrays are numbered {sorted(positional)}; needed are arr_0, "
            "arr_1 and so on without a gap."
        )
    return Batch(
        args=tuple(positional[index] for index in sorted(positional)),
        kwargs={
            name: tensor
            for name, tensor in tensors.items()
            if name not in LABEL_NAMES and not _POSITIONAL.fullmatch(name)
        },
        labels=tensors[labels[0]] if labels else None,
    )


def _from_arrays(
    tensors: Mapping[str, Tensor], place: str, *, batch_size: int, limit: int | None
) -> Batches:
    if not set(tensors) - set(LABEL_NAMES):
        raise DataError(f"{place} holds no inputs: {', '.join(tensors) or 'no arrays at all'}.")
    lengths = {name: tensor.shape[0] if tensor.ndim else None for name, tensor in tensors.items()}
    if None in lengths.values() or len(set(lengths.values())) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise DataError(
            f"{place}: all arrays need the same first dimension (rows), but are {shapes}."
        )
    total = next(iter(tensors.values())).shape[0]
    # Read once, so that a bad array is named now and not in the middle of a run.
    whole = as_batch(dict(tensors), place=place)
    rows = total if limit is None else min(total, limit)

    def start() -> Iterator[Batch]:
        for first in range(0, rows, batch_size):
            part = slice(first, min(first + batch_size, rows))
            yield Batch(
                args=tuple(tensor[part] for tensor in whole.args),
                kwargs={name: tensor[part] for name, tensor in whole.kwargs.items()},
                labels=None if whole.labels is None else whole.labels[part],
            )

    return Batches(start, place=place, length=-(-rows // batch_size), limit=limit)


def _from_object(data: Any, *, place: str, limit: int | None) -> Batches:
    passes = 0

    def start() -> Iterator[Any]:
        nonlocal passes
        passes += 1
        try:
            with project_on_path():
                iterable = data() if callable(data) else data
            if isinstance(iterable, Tensor | np.ndarray | Mapping | Batch | str) or not isinstance(
                iterable, Iterable
            ):
                raise DataError(
                    f"{place} gave an object of type {type(iterable).__name__}; needed is an "
                    "iterable of batches."
                )
            if iterable is data and isinstance(iterable, Iterator) and passes > 1:
                raise DataError(
                    f"{place} is an iterator, which can be read only once, and a second pass is "
                    "needed. Give a list, or a function that starts a pass."
                )
            iterator = iter(iterable)
            while True:
                with project_on_path():
                    try:
                        value = next(iterator)
                    except StopIteration:
                        return
                yield value
        except MPOCompressError:
            raise
        except Exception as error:
            raise DataError(f"{place} raised {type(error).__name__}: {error}") from error

    sized = hasattr(data, "__len__") and not callable(data) and limit is None
    return Batches(start, place=place, length=len(data) if sized else None, limit=limit)
