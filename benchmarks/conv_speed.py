"""Factorized convolutions run faster than dense ones in ONNX Runtime, about as far as they shrink.

One convolution at a time, kernel 3 x 3, stride 1, on one image, one thread: the dense layer and its
factorized forms at each ratio of parameters, timed in turn so that all see the same load of the
machine. Reported is the dense layer's median time over each form's.

    channels     ((out, 1), (1, in * 9))           a small full filter, then a mixing of channels
    spatial      ((1, in * 3), (out, 3))           a vertical filter, then a horizontal one
    tucker       ((1, in), (1, 9), (out, 1))       channels down, a small filter, channels up
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from common import environment, print_table, write_json
from torch import nn

import mpocompress as mpo
from mpocompress.export import export_onnx

# Channels and side of the image, as in the stages of a residual network.
SIZES = ((64, 56), (128, 28), (256, 14))
RATIOS = (2.0, 4.0, 8.0)


def layouts(channels: int) -> dict[str, list[tuple[int, int]]]:
    """The forms by name, for as many channels in as out."""
    return {
        "channels": [(channels, 1), (1, 9 * channels)],
        "spatial": [(1, 3 * channels), (channels, 3)],
        "tucker": [(1, channels), (1, 9), (channels, 1)],
    }


def session(model: nn.Module, example: torch.Tensor, folder: Path) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime, on one thread."""
    path = folder / "model.onnx"
    export_onnx(model, path, example)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def measure(channels: int, side: int, repeats: int, seed: int) -> list[dict[str, object]]:
    """One row for each form and ratio of one convolution."""
    torch.manual_seed(seed)
    dense = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)).eval()
    example = torch.randn(1, channels, side, side)
    forms = {("dense", 1.0): (dense, 1.0)}
    for ratio in RATIOS:
        for name, layout in layouts(channels).items():
            result = mpo.compress(dense, ratio=ratio, of="layers", layout=layout)
            reached = result.report.totals.parameters.layers.ratio
            forms[name, ratio] = (result.model, reached)
    feed = {"input": example.numpy()}
    sessions, seconds = {}, {key: [] for key in forms}
    with tempfile.TemporaryDirectory() as folder:
        for key, (model, _) in forms.items():
            sessions[key] = session(model, example, Path(folder))
    for own in sessions.values():
        own.run(None, feed)
    for _ in range(repeats):
        for key, own in sessions.items():
            start = time.perf_counter()
            own.run(None, feed)
            seconds[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return [
        {
            "channels": channels,
            "side": side,
            "form": name,
            "ratio": forms[name, ratio][1],
            "seconds": median,
            "speed_up": medians["dense", 1.0] / median,
        }
        for (name, ratio), median in medians.items()
    ]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the smallest convolution only")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment(["torch", "onnxruntime"], seed=given.seed)
    rows = []
    for channels, side in SIZES[-1:] if given.quick else SIZES:
        rows += measure(channels, side, given.repeats, given.seed)
    print_table(
        ("channels", "side", "form", "ratio", "ms", "speed-up"),
        [
            (
                str(row["channels"]),
                str(row["side"]),
                str(row["form"]),
                f"{row['ratio']:.2f}",
                f"{1e3 * row['seconds']:.3f}",
                f"{row['speed_up']:.2f}",
            )
            for row in rows
        ],
    )
    slower = [row for row in rows if row["form"] == "channels" and row["speed_up"] < 1]
    print("channel split never slower than dense:", "yes" if not slower else "NO")
    if given.out is not None:
        write_json(given.out, {"claim": __doc__, "environment": facts, "rows": rows})
    return int(bool(slower) and not given.quick)


if __name__ == "__main__":
    sys.exit(main())
