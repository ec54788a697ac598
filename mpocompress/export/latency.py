"""Time of dense layers and of chains in ONNX Runtime on this machine: a small measured table.

For each distinct shape and layout, chains at a grid of bond dimensions and the dense layer are
timed in one go, in turn, so that a slow moment of the machine strikes all of them; between grid
points times are interpolated. A table is kept in memory and in the user's cache directory, by
processor, versions and threads. `MPOCOMPRESS_CACHE` names another directory.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpocompress.mpo import Layout, plan_contractions

_GRID = 9  # bond dimensions timed for each shape and layout
# Each session is timed so often, in turn with the others. Whatever else the machine does makes some
# rounds slower and none faster, so the lower quartile counts.
_ROUNDS = 15
_ROUND_SECONDS = 2e-3
_FORMAT = 1


class LatencyTable:
    """Seconds of one layer for a batch of rows, measured when first asked for.

    Args:
        batch: rows.
        threads: of ONNX Runtime within an operation; default: those of torch.
        cache: directory for the file; None for the user's cache directory.
    """

    def __init__(
        self, batch: int, *, threads: int | None = None, cache: str | Path | None = None
    ) -> None:
        self.batch = batch
        self.threads = torch.get_num_threads() if threads is None else threads
        self._file = (cache_directory() if cache is None else Path(cache)) / "latency.json"
        self._key = _machine_key(self.threads)
        self._curves: dict[str, list[list[float]]] = self._read()

    def __call__(
        self, shape: tuple[int, int], layout: Layout | None, bond_dims: Sequence[int]
    ) -> float:
        """Seconds, interpolated; they do not fall when bond dimensions rise.

        Args:
            shape: (out, in).
            layout: of the chain; None for the dense layer.
            bond_dims: of the chain, clipped to the layout.
        """
        if layout is None:
            # The dense layer beside the low-rank chain, which every plan looks at.
            return self._curve(shape, Layout.svd(*shape))[0][1]
        bond = max(bond_dims, default=1)
        if layout.clip([bond] * (layout.num_sites - 1)) != tuple(bond_dims):
            return self.measure(shape, layout, bond_dims)
        scale = self(shape, None, ()) / self._curve(shape, layout)[0][1]  # both beside dense
        points = self._curve(shape, layout)[1:]
        bonds, seconds = zip(*points, strict=True)
        # What is slower than a larger bond dimension was disturbed.
        rising = np.minimum.accumulate(seconds[::-1])[::-1]
        return scale * float(np.interp(bond, bonds, rising))

    def measure(
        self, shape: tuple[int, int], layout: Layout | None, bond_dims: Sequence[int]
    ) -> float:
        """Seconds at exactly these bond dimensions, timed now beside the dense layer.

        What is given is the ratio to the dense layer now, times the dense layer's time in the
        table, so that both are on one scale even if the machine is busier now.
        """
        if layout is None:
            return self(shape, None, ())
        dense, chain = _time_in_turn(
            [self._session(shape, None, ()), self._session(shape, layout, bond_dims)]
        )
        return chain / dense * self(shape, None, ())

    def _curve(self, shape: tuple[int, int], layout: Layout) -> list[list[float]]:
        """Rows (bond dimension, seconds); the first, 0, is the dense layer."""
        key = f"{shape[0]}x{shape[1]} {layout} batch {self.batch}"
        if key not in self._curves:
            bonds = grid_of_bonds(shape, layout)
            sessions = [self._session(shape, None, ())]
            for bond in bonds:
                clipped = layout.clip([bond] * (layout.num_sites - 1))
                sessions.append(self._session(shape, layout, clipped))
            seconds = _time_in_turn(sessions)
            self._curves[key] = [[float(b), s] for b, s in zip((0, *bonds), seconds, strict=True)]
            self._write()
        return self._curves[key]

    def _session(
        self, shape: tuple[int, int], layout: Layout | None, bond_dims: Sequence[int]
    ) -> Callable[[], Any]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            layer_graph(shape, layout, bond_dims), options, providers=["CPUExecutionProvider"]
        )
        rng = np.random.default_rng(0)
        feed = {"input": rng.standard_normal((self.batch, shape[1]), dtype=np.float32)}
        return lambda: session.run(None, feed)

    def _read(self) -> dict[str, list[list[float]]]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            curves = content["tables"][self._key] if content["format"] == _FORMAT else {}
            return {
                str(name): [[float(bond), float(seconds)] for bond, seconds in rows]
                for name, rows in curves.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # no cache, or a foreign one: measure again

    def _write(self) -> None:
        """Add to the file, aside and renamed; a directory that cannot be written is no error."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            try:
                content = json.loads(self._file.read_text(encoding="utf-8"))
                tables = content["tables"] if content["format"] == _FORMAT else {}
            except (OSError, ValueError, KeyError, TypeError):
                tables = {}
            tables[self._key] = {**tables.get(self._key, {}), **self._curves}
            text = json.dumps({"format": _FORMAT, "tables": tables})
            handle, aside = tempfile.mkstemp(dir=self._file.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(aside, self._file)
        except OSError:
            return


def grid_of_bonds(shape: tuple[int, int], layout: Layout) -> list[int]:
    """Bond dimensions to time, about equally spaced in their logarithm, up to the dense size."""
    top = 1
    largest = max(layout.max_bond_dims(), default=1)
    while top < largest:
        if layout.num_parameters(layout.clip([top] * (layout.num_sites - 1))) > prod(shape):
            break
        top = min(2 * top, largest)
    low = min(4, top)
    points = np.geomspace(low, top, _GRID - 1)
    return sorted({1, *(round(float(point)) for point in points)})


def layer_graph(shape: tuple[int, int], layout: Layout | None, bond_dims: Sequence[int]) -> bytes:
    """The ONNX model of a layer with a bias, in the operations that exported models have.

    Args:
        shape: (out, in).
        layout: of the chain; None for a dense layer.
        bond_dims: of the chain.
    """
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes: list[Any] = []
    initializers: list[Any] = []

    def constant(name: str, array: np.ndarray) -> str:
        initializers.append(numpy_helper.from_array(array, name))
        return name

    def random(name: str, *sizes: int) -> str:
        return constant(name, rng.standard_normal(sizes, dtype=np.float32) / sizes[0] ** 0.5)

    def add(operation: str, *inputs: str) -> str:
        output = f"value{len(nodes)}"
        nodes.append(helper.make_node(operation, list(inputs), [output]))
        return output

    def reshape(value: str, *sizes: int) -> str:
        return add("Reshape", value, constant(f"shape{len(nodes)}", np.array(sizes, np.int64)))

    state = "input"
    if layout is None:
        state = add("MatMul", state, random("weight", shape[1], shape[0]))
    else:
        padding = layout.in_features - shape[1]
        if padding:
            state = add("Pad", state, constant("pads", np.array([0, 0, 0, padding], np.int64)))
        plan = plan_contractions(layout.out_dims, layout.in_dims, tuple(bond_dims)).chain
        flat = False
        for number, step in enumerate(plan.steps):
            if step.columns == 1:
                if flat or step.rows != 1:
                    state = reshape(state, -1, step.contracted)
                    flat = True
                state = add(
                    "MatMul", state, random(f"core{number}", step.contracted, step.produced)
                )
            else:
                state = reshape(state, -1, step.contracted, step.columns)
                state = add(
                    "MatMul", random(f"core{number}", step.produced, step.contracted), state
                )
                flat = True
        if flat:
            state = reshape(state, -1, layout.out_features)
        if layout.out_features > shape[0]:
            ends = [
                constant(name, np.array([value], np.int64))
                for name, value in (("starts", 0), ("ends", shape[0]), ("axes", 1))
            ]
            state = add("Slice", state, *ends)
    nodes.append(helper.make_node("Add", [state, random("bias", shape[0])], ["output"]))
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", shape[1]])],
            [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", shape[0]])],
            initializers,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    content: bytes = model.SerializeToString()
    return content


def cache_directory() -> Path:
    """Where tables are kept: `MPOCOMPRESS_CACHE`, or what the platform has for caches."""
    named = os.environ.get("MPOCOMPRESS_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mpocompress"


def _time_in_turn(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """Lower quartile of the seconds of one call of each, timed in turn in every round."""
    repeats = []
    for run in runs:
        run()
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
        repeats.append(max(1, min(200, int(_ROUND_SECONDS / max(once, 1e-7)))))
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS):
        for run, times, repeat in zip(runs, found, repeats, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            times.append((time.perf_counter() - start) / repeat)
    return [statistics.quantiles(times, n=4)[0] for times in found]


def _machine_key(threads: int) -> str:
    """What a time depends on besides the layer: processor, versions, threads."""
    import onnxruntime

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return (
        f"{processor} | {os.cpu_count()} cores | {platform.system()} | onnxruntime "
        f"{onnxruntime.__version__} | numpy {np.__version__} | {threads} threads"
    )
