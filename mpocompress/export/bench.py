"""ONNX files side by side in ONNX Runtime: latency, session start, memory, size.

Latencies of all files are taken in turns in the same process, so that what else the machine does
hits them alike; session start and memory in fresh processes, again in turns.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpocompress.errors import DataError, ExportError
from mpocompress.export import session_probe
from mpocompress.export.calls import Slot
from mpocompress.export.session import OnnxFile

# Time that one timing of one file should take at least: many times the clock's resolution.
_TIMING_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Repeated measurements: median, and the quartiles around it."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarize; quartiles of less than two values are the value itself."""
        low, median, high = (
            statistics.quantiles(values, n=4, method="inclusive")
            if len(values) > 1
            else (values[0],) * 3
        )
        return cls(median=median, low=low, high=high, repeats=len(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class FileBench:
    """One ONNX file.

    Attributes:
        path: as given.
        num_bytes: on disk, with its data files.
        latency_seconds: of one run, by batch size.
        session_start_seconds: from nothing to a session.
        resident_bytes: that a session and a first run (of the largest batch) add to a process.
    """

    path: str
    num_bytes: int
    latency_seconds: Mapping[int, Spread]
    session_start_seconds: Spread
    resident_bytes: Spread


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """Several files under the same conditions.

    Attributes:
        files: in the order given.
        threads: within one operator.
        sizes: of the open dimensions other than the batch, by name.
        versions: of what ran.
    """

    files: tuple[FileBench, ...]
    threads: int
    sizes: Mapping[str, int]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def bench(
    paths: Sequence[str | os.PathLike[str]],
    *,
    batch_sizes: Sequence[int] = (1, 16, 128),
    threads: int = 1,
    repeats: int = 15,
    processes: int = 3,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchResult:
    """Measure ONNX files on made-up inputs, which are the same for all.

    Args:
        paths: the files; the inputs are made after the description in the first.
        batch_sizes: to take latencies at; a file with a fixed batch is timed at that one.
        threads: within one operator.
        repeats: timings of each file at each batch size, in turns.
        processes: fresh ones for each file, for session start and memory.
        sizes: of open dimensions other than the batch, by name ("sequence"); default: what the
            file was exported with.
        seed: of the inputs.
        progress: called as `progress(what, done, total)`.

    Raises:
        LoadError: a file cannot be read.
        DataError: inputs of one file do not fit another, or impossible numbers.
        ExportError: a fresh process with ONNX Runtime fails.
    """
    if not batch_sizes or min(*batch_sizes, threads, repeats, processes) < 1:
        raise DataError(
            f"batch sizes {list(batch_sizes)}, threads {threads}, repeats {repeats}, processes "
            f"{processes}: all must be 1 or more. Try batch_sizes=(1, 16)."
        )
    import onnxruntime

    files = [OnnxFile(path, threads=threads) for path in paths]
    open_sizes = _open_sizes(files[0])
    unknown = next((name for name in sizes or {} if name not in open_sizes), None)
    if unknown is not None:
        raise DataError(
            f"{paths[0]} has no open size {unknown!r}; it has {', '.join(open_sizes) or 'none'} "
            "besides the batch. Leave it out."
        )
    feeds = {rows: _feeds(files, rows, sizes or {}, seed) for rows in sorted(set(batch_sizes))}
    latencies: dict[int, list[list[float]]] = {}
    for done, (rows, batch_feeds) in enumerate(feeds.items()):
        if progress is not None:
            progress(f"latency at batch {rows}", done, len(feeds) + processes)
        for file, feed in zip(files, batch_feeds, strict=True):
            file.run(feed)  # says what is wrong with the inputs; the timed runs do not
        runs = [
            (lambda file=file, feed=feed: file.session.run(None, feed))
            for file, feed in zip(files, batch_feeds, strict=True)
        ]
        latencies[rows] = interleaved_seconds(runs, repeats)
    del files  # their memory would be in the way of the processes
    starts: list[list[float]] = [[] for _ in paths]
    memory: list[list[float]] = [[] for _ in paths]
    for turn in range(processes):
        if progress is not None:
            progress("session start and memory", len(feeds) + turn, len(feeds) + processes)
        for index, path in enumerate(paths):
            found = probe_session(path, feeds[max(feeds)][index], threads=threads)
            starts[index].append(found["session_start_seconds"])
            memory[index].append(found["resident_bytes"])
    return BenchResult(
        files=tuple(
            FileBench(
                path=str(path),
                num_bytes=file_bytes(path),
                latency_seconds={
                    rows: Spread.of(seconds[index]) for rows, seconds in latencies.items()
                },
                session_start_seconds=Spread.of(starts[index]),
                resident_bytes=Spread.of(memory[index]),
            )
            for index, path in enumerate(paths)
        ),
        threads=threads,
        sizes={**open_sizes, **(sizes or {})},
        versions={"onnxruntime": onnxruntime.__version__, "python": sys.version.split()[0]},
    )


def interleaved_seconds(runs: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of one call of each function, `repeats` times, in turns.

    Short calls are repeated within a timing. Every second round goes backwards, so that none
    always follows the same other.
    """
    calls = []
    for call in runs:
        call()  # warm up: ONNX Runtime allocates in the first run
        start = time.perf_counter()
        call()
        calls.append(max(1, round(_TIMING_SECONDS / max(time.perf_counter() - start, 1e-7))))
    seconds: list[list[float]] = [[] for _ in runs]
    order = list(range(len(runs)))
    for _ in range(repeats):
        for index in order:
            start = time.perf_counter()
            for _ in range(calls[index]):
                runs[index]()
            seconds[index].append((time.perf_counter() - start) / calls[index])
        order.reverse()
    return seconds


def probe_session(
    path: str | os.PathLike[str], feed: Mapping[str, Any], *, threads: int = 1
) -> dict[str, float]:
    """Session start, first run and resident memory of a file in a fresh process.

    Raises:
        ExportError: the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "feed.npz", **feed)
        script = str(session_probe.__file__)
        command = [sys.executable, script, os.fspath(path), f"{folder}/feed.npz", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ExportError(f"{path} does not run in a process of its own: {reason[0]}.")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of an ONNX file and of all data files that it refers to, whatever they are called."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from mpocompress.export.graphs import named_files

    path = Path(path)
    try:
        data = named_files(onnx.load(path, load_external_data=False), path.parent)
    except DecodeError:  # in another format of ONNX Runtime, which has all in one file
        data = frozenset()
    return sum(file.stat().st_size for file in (path, *data) if file.is_file())


def _feeds(
    files: Sequence[OnnxFile], rows: int, sizes: Mapping[str, int], seed: int
) -> list[dict[str, Any]]:
    """The same made-up inputs for each file, under its own names."""
    first = files[0]
    arrays = first.made_up(rows, torch.Generator().manual_seed(seed), sizes)
    by_position: dict[Slot, Tensor] = dict(enumerate(arrays.values()))
    known = {str(key) for spec in first.specs for key in (spec.name, spec.slot)}
    feeds = []
    for file in files:
        names = {str(key) for spec in file.specs for key in (spec.name, spec.slot)}
        if names & known or len(file.specs) != len(arrays):
            feeds.append(file.feed(arrays, other=tuple(known)))
        else:
            feeds.append(file.feed(by_position))
    return feeds


def _open_sizes(file: OnnxFile) -> dict[str, int]:
    """Of other dimensions than the batch, by name: what the file was exported with."""
    return {
        size: example
        for spec in file.specs
        for size, example in zip(spec.shape[1:], spec.example_shape[1:], strict=True)
        if isinstance(size, str)
    }
