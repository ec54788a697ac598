"""Claim: at a fixed bond dimension an MPO layer's training step grows about linearly in the width.

Square layers of width 2^8 to 2^16, sites of 4x4 (and one of 2^k x 2^k where the exponent is odd):
forward, backward and a step of Adam, the median of the CPU's time over repeats on one thread (not
the wall's, so other work counts less), the peak of memory, and the multiply-adds of the forward
pass, counted; beside it a dense layer as long as its weights fit. Power laws are fitted to the
upper half of the widths. The widest layer, 65,536 x 65,536, has 4.3 billion entries
as a matrix (17 GB in float32, and three times that more for Adam and gradients).

Where the widest layers' states pass 32 MiB, glibc's malloc gives each of them back to the kernel
and asks for it anew, page by page, zeroed. "MPO, memory kept" is the same with that switched off.

    python benchmarks/tnn_scaling.py
"""

import argparse
import ctypes
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import PeakMemory, environment, print_table, write_json
from torch import nn

import mpocompress
from mpocompress.mpo import Layout

PACKAGES = ("mpocompress", "torch", "numpy")
DENSE_UP_TO = 12


def layout_of(exponent: int) -> Layout:
    """Sites of 4x4; the middle one is 8x8 where the exponent is odd."""
    sites = [4] * (exponent // 2)
    if exponent % 2:
        sites[len(sites) // 2] = 8
    return Layout(tuple(sites), tuple(sites))


def tensor_layer(exponent: int, bond_dim: int, seed: int) -> nn.Module:
    width = 2**exponent
    return mpocompress.MPOLinear(
        width, width, layout=layout_of(exponent), bond_dim=bond_dim, gain=1,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def dense_layer(exponent: int, bond_dim: int, seed: int) -> nn.Module:
    return nn.Linear(2**exponent, 2**exponent)


def macs(layer: nn.Module, rows: int) -> int:
    """Multiply-adds of a forward pass; a backward pass takes twice as many."""
    if isinstance(layer, mpocompress.MPOLinear):
        return layer.to_mpo().macs(rows)
    return rows * layer.weight.numel()  # type: ignore[operator, union-attr]


def measure(
    make: Callable[[int, int, int], nn.Module], exponent: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds and bytes of a step, and whether the loss fell: a planted linear map is learned."""
    generator = torch.Generator().manual_seed(options.seed)
    memory = PeakMemory()
    layer = make(exponent, options.bond_dim, options.seed)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    rows = torch.randn(options.rows, 2**exponent, generator=generator)
    target = rows.roll(1, dims=1)
    losses, seconds = [], []
    for _ in range(options.steps):
        started = time.process_time()
        optimizer.zero_grad()
        loss = (layer(rows) - target).square().mean()
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - started)
        losses.append(float(loss.detach()))
    return {
        "width": 2**exponent,
        "parameters": sum(parameter.numel() for parameter in layer.parameters()),
        "seconds": statistics.median(seconds[1:]),
        "fastest": min(seconds[1:]),
        "bytes": memory.read(),
        "macs": macs(layer, options.rows),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def keep_memory() -> bool:
    """Have glibc's malloc keep what is freed, also large blocks; whether there is a glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_max, 0)) and bool(libc.mallopt(trim_threshold, 2**31 - 1))


def exponent_of(found: list[dict[str, Any]], key: str) -> float:
    """Slope of log(key) against log(width), least squares over the upper half of the widths."""
    upper = found[len(found) // 2 :]
    x = [math.log(row["width"]) for row in upper]
    y = [math.log(max(row[key], 1e-12)) for row in upper]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def draw(content: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for kind, found in content["layers"].items():
        widths = [row["width"] for row in found]
        for axis, key, unit in zip(axes, ("seconds", "bytes"), (1e3, 2**-20), strict=True):
            power = content["exponents"][kind][key]
            label = f"{kind}, width^{power:.2f}"
            axis.loglog(widths, [unit * row[key] for row in found], "o-", label=label, base=2)
    for axis, name in zip(axes, ("ms per training step", "MB at the peak"), strict=True):
        axis.set(xlabel="width", ylabel=name)
        axis.legend(loc="lower right")
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--exponents", type=int, nargs=2, default=(8, 16), metavar=("LOW", "HIGH"))
    parser.add_argument("--bond-dim", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="of a minibatch")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / "tnn_scaling.json")
    parser.add_argument("--plot", type=Path, help="a figure, such as scaling.svg")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    low, high = options.exponents
    layers: dict[str, list[dict[str, Any]]] = {"MPO": [], "dense": []}
    measure(tensor_layer, low, options)  # what torch loads on first use is nobody's
    # Small to large: memory that a larger layer freed would hide what a smaller one takes.
    for exponent in range(low, high + 1):
        layers["MPO"].append(measure(tensor_layer, exponent, options))
        if exponent <= DENSE_UP_TO:
            layers["dense"].append(measure(dense_layer, exponent, options))
    if keep_memory():
        layers["MPO, memory kept"] = [
            measure(tensor_layer, exponent, options) for exponent in range(low, high + 1)
        ]
    content = {
        "claim": (__doc__ or "").splitlines()[0],
        "environment": environment(PACKAGES, seed=options.seed),
        "bond_dim": options.bond_dim,
        "rows": options.rows,
        "layers": layers,
        "exponents": {
            kind: {
                key: exponent_of(found, key) for key in ("seconds", "bytes", "macs", "parameters")
            }
            for kind, found in layers.items()
            if len(found) > 2
        },
    }
    write_json(options.out, content)
    if options.plot is not None:
        draw(content, options.plot)
    print_table(
        ("layer", "width", "parameters", "ms/step", "MB", "loss"),
        [
            (
                kind,
                f"{row['width']:,}",
                f"{row['parameters']:,}",
                f"{1e3 * row['seconds']:.2f}",
                f"{row['bytes'] / 2**20:.1f}",
                f"{row['first_loss']:.4f} -> {row['last_loss']:.4f}",
            )
            for kind, found in layers.items()
            for row in found
        ],
    )
    for kind, powers in content["exponents"].items():
        print(
            f"{kind}: " + ", ".join(f"{key} ~ width^{power:.2f}" for key, power in powers.items())
        )


if __name__ == "__main__":
    main()
