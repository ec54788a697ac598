"""What every benchmark says of itself: the machine, the versions, the command; and its JSON."""

import ctypes
import json
import os
import platform
import resource
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def cpu_name() -> str:
    """Return the processor's model name, or what the platform has instead."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(packages: Sequence[str], *, seed: int) -> dict[str, Any]:
    """Collect what is needed to run this process again and to judge its numbers."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "seed": seed,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": load,  # well above 0: other work shared the machine
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def spread(seconds: Sequence[float]) -> dict[str, float | int]:
    """Summarize repeated timings."""
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "repeats": len(seconds),
    }


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no line {field}")


class PeakMemory:
    """Bytes by which the resident memory of this process rises above its level at the start.

    On Linux the kernel's high-water mark is set back first, so that imports and earlier calls do
    not hide what is measured. Elsewhere that mark only grows: measure in a fresh process.
    """

    def __init__(self) -> None:
        self._resettable = os.access(_CLEAR_REFS, os.W_OK)
        if self._resettable:
            ctypes.CDLL(None).malloc_trim(0)  # else memory freed before is reused uncounted
            _CLEAR_REFS.write_text("5", encoding="ascii")
            self._start = _status_bytes("VmRSS")
        else:
            self._start = self._high_water_mark()

    @staticmethod
    def _high_water_mark() -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def read(self) -> int:
        """Return the largest rise so far, in bytes."""
        peak = _status_bytes("VmHWM") if self._resettable else self._high_water_mark()
        return max(peak - self._start, 0)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns; the first is aligned to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        first = row[0].ljust(widths[0])
        print("  ".join([first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write aside and rename, so that a killed run leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)
