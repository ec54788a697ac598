"""A chain that the plan calls faster is no slower than dense; a dense-at-load file is as small.

Layers of the shapes of real models (the classifier's, MiniLM's, 1024 square), at several ratios and
batches. Each is planned with objective="latency" for that batch; what the plan compresses is
written in both forms and timed in ONNX Runtime against the dense layer, one thread, in turns,
medians:

    chain          matrix products with the cores
    dense at load  cores in the file, the dense weight rebuilt while the session starts

Where the plan keeps the dense layer there is nothing to time; the table says so. Claims: a chain
takes at most 1.05 of the dense layer's time, a dense-at-load file at most 1.02 of the chain's bytes
and 1.05 of the dense time.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import environment, print_table, write_json
from torch import nn

import mpocompress as mpo
from mpocompress.export.bench import bench, file_bytes

PACKAGES = ("mpocompress", "torch", "onnx", "onnxruntime")
SHAPES = ((1024, 784), (384, 384), (1536, 384), (384, 1536), (1024, 1024))
RATIOS = (2.0, 4.0, 16.0)
BATCHES = (1, 16, 128)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer at one batch; figures relative to the dense layer, None where it stays dense."""

    out_features: int
    in_features: int
    ratio: float
    batch: int
    layout: str
    dense_seconds: float | None = None
    chain_time: float | None = None
    at_load_time: float | None = None
    chain_bytes: int | None = None
    at_load_bytes: int | None = None


def measure(shape: tuple[int, int], ratio: float, batch: int, repeats: int, seed: int) -> Row:
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0]).eval()
    plan = mpo.plan(layer, ratio=ratio, of="layers", objective="latency", batch=batch)
    sizes = {"out_features": shape[0], "in_features": shape[1], "ratio": ratio, "batch": batch}
    if not plan.compressed:
        return Row(**sizes, layout="dense")
    small = mpo.compress(layer, plan, seed=seed).model
    x = torch.randn(batch, shape[1])
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.onnx" for name in ("dense", "chain", "at_load")]
        mpo.export_onnx(layer, paths[0], x)
        mpo.export_onnx(small, paths[1], x, form="chain")
        mpo.export_onnx(small, paths[2], x, form="dense")
        timed = bench(paths, batch_sizes=[batch], repeats=repeats, processes=1)
        dense, chain, at_load = (file.latency_seconds[batch].median for file in timed.files)
        return Row(
            **sizes,
            layout=str(plan.compressed[0].sites()),
            dense_seconds=dense,
            chain_time=chain / dense,
            at_load_time=at_load / dense,
            chain_bytes=file_bytes(paths[1]),
            at_load_bytes=file_bytes(paths[2]),
        )


def print_rows(rows: Sequence[Row]) -> None:
    table = []
    for row in rows:
        figures = [""] * 4
        if row.dense_seconds is not None:
            bytes_ratio = (row.at_load_bytes or 0) / (row.chain_bytes or 1)
            figures = [
                f"{row.dense_seconds * 1e6:.0f}",
                f"{row.chain_time:.2f}",
                f"{row.at_load_time:.2f}",
                f"{bytes_ratio:.3f}",
            ]
        size = f"{row.out_features} x {row.in_features}"
        table.append([size, f"{row.ratio:g}", str(row.batch), row.layout, *figures])
    header = ["layer", "ratio", "batch", "plan", "dense, µs", "chain", "dense at load", "bytes"]
    print_table(header, table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--repeats", type=int, default=41, help="timings of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    rows = [
        measure(shape, ratio, batch, options.repeats, options.seed)
        for shape in SHAPES
        for ratio in options.ratios
        for batch in options.batches
    ]
    print_rows(rows)
    timed = [row for row in rows if row.dense_seconds is not None]
    claims = {
        "slowest_chain": max((row.chain_time or 0 for row in timed), default=None),
        "slowest_dense_at_load": max((row.at_load_time or 0 for row in timed), default=None),
        "largest_dense_at_load": max(
            ((row.at_load_bytes or 0) / (row.chain_bytes or 1) for row in timed), default=None
        ),
    }
    for name, value in claims.items():
        print(f"{name}: {value}")
    if options.out:
        write_json(
            options.out,
            {
                "claim": __doc__.splitlines()[0],
                "environment": environment(PACKAGES, seed=options.seed),
                "claims": claims,
                "rows": [asdict(row) for row in rows],
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
