"""With quantized cores a sentence encoder reaches sizes at which quantization alone has collapsed.

The 36 encoder Linears of all-MiniLM-L6-v2 as ONNX files in ONNX Runtime, one thread:

    dense                float32, as exported
    int8 dynamic         of the dense model: onnxruntime's quantize_dynamic, MatMul by channel
    int4 weight-only     of the dense model: onnxruntime's MatMulNBits, symmetric blocks of 32
    int3, int2           of the dense model, simulated: no runtime has them; quality and bytes only
    ours                 compress(ratio=R, of="layers", data=...), healed for --steps: cores in
                         float32, int8 and int4; in the identity gauge, and
                         plain for --plain-ratios

Each with bytes, session start, resident memory (in fresh processes), latency (in turns, medians),
and the quality of the embeddings of sentences that nothing was fitted on: mean cosine to the dense
model's, and Spearman correlation of all pair similarities. Bytes of the Linears are those of the
file less what is not theirs (embeddings, biases, norms, graph of the dense file).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import environment, print_table, write_json
from minilm_quality import healed_encoder, quantized
from sentences import (
    batches_of,
    embed,
    fidelity,
    load_encoder,
    read_sentences,
    split_sentences,
)
from torch import Tensor, nn

import mpocompress as mpo
from mpocompress.export import quantize_cores
from mpocompress.export.bench import bench, file_bytes
from mpocompress.export.session import OnnxFile
from mpocompress.surgery import find_weights

PACKAGES = ("mpocompress", "torch", "transformers", "numpy", "onnx", "onnxruntime")
BLOCK = 32


class _Session:
    """An ONNX file, called like the encoder."""

    def __init__(self, path: Path) -> None:
        self._file = OnnxFile(path, threads=1)

    def __call__(self, **tokens: Tensor) -> Any:
        outputs = self._file.run(self._file.feed(dict(tokens)))
        self.last_hidden_state = torch.from_numpy(outputs["last_hidden_state"])
        return self


def int8_dynamic(dense: Path, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        dense,
        path,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )


def int4_weight_only(dense: Path, path: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(dense), block_size=BLOCK, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bytes of the Linears against the cosine; what nothing beats in both is connected."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for kind, color in (("quantization", "tab:orange"), ("ours", "tab:blue")):
        points = sorted(
            (row["linear_bytes"] / 1e6, row["cosine"], row["model"])
            for row in rows
            if row["kind"] == kind or row["kind"] == "dense"
        )
        front, best = [], -1.0
        for size, cosine, name in points:
            axes.scatter(size, cosine, color="black" if name == "dense" else color, zorder=3)
            axes.annotate(name, (size, cosine), xytext=(4, -9), textcoords="offset points", size=7)
            if cosine > best:
                front.append((size, cosine))
                best = cosine
        axes.plot(*zip(*front, strict=True), color=color, label=kind)
    axes.set_xscale("log")
    axes.set_xlabel("bytes of the 36 encoder Linears, MB")
    axes.set_ylabel("mean cosine to the dense embeddings")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratios", type=float, nargs="*", default=[1.5, 2.0, 2.5, 4.0])
    parser.add_argument("--plain-ratios", type=float, nargs="*", default=[2.0])
    parser.add_argument("--sentences", type=int, default=2000, help="for calibration")
    parser.add_argument("--held-out", type=int, default=1000, help="for evaluation")
    parser.add_argument(
        "--healing-sentences", type=int, default=3000, help="for healing, besides the calibration's"
    )
    parser.add_argument("--steps", type=int, default=400, help="of healing")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--length", type=int, default=32, help="tokens, for latencies")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each file")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the methods")
    parser.add_argument(
        "--models", type=Path, help="folder of compressed models; those found there are not redone"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    options = parser.parse_args()

    sizes = [options.sentences, options.held_out, options.healing_sentences]
    calibration, held_out, more = split_sentences(read_sentences(), sizes, options.seed)
    model, tokenizer = load_encoder()
    healing_data = batches_of(tokenizer, calibration + more)
    data, batches = batches_of(tokenizer, calibration), batches_of(tokenizer, held_out)
    truth = embed(model, batches)
    facts = environment(PACKAGES, seed=options.seed)
    sites = [site for site in find_weights(model).sites if site.name.startswith("encoder.")]
    dense_bytes = 4 * sum(site.parameters for site in sites)
    rows: list[dict[str, Any]] = []

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def add(kind: str, name: str, path: Path | None, quality: Any, **more: Any) -> None:
            cosine, spearman = fidelity(embed(quality, batches), truth)
            row = {"kind": kind, "model": name, "cosine": cosine, "spearman": spearman, **more}
            if path is not None:
                row["path"], row["file_bytes"] = str(path), file_bytes(path)
                rest = (rows[0] if rows else row)["file_bytes"] - dense_bytes
                row["linear_bytes"] = row["file_bytes"] - rest
            row["linear_ratio"] = dense_bytes / row["linear_bytes"]
            rows.append(row)
            print(
                f"{name}: {row['linear_ratio']:.2f}x, {cosine:.4f} / {spearman:.4f}",
                file=sys.stderr,
                flush=True,
            )

        def export(what: nn.Module, name: str, **how: Any) -> Path:
            path = folder / f"{name.replace(' ', '-').replace(',', '')}.onnx"
            mpo.export_onnx(what, path, data[len(data) // 2], **how)
            return path

        dense = export(model, "dense")
        add("dense", "dense", dense, _Session(dense))
        for name, quantizer in (
            ("int8 dynamic", int8_dynamic),
            ("int4 weight-only", int4_weight_only),
        ):
            path = folder / f"{name.replace(' ', '-')}.onnx"
            quantizer(dense, path)
            add("quantization", name, path, _Session(path))
        for bits in (3, 2):
            simulated, ratio = quantized(model, bits, BLOCK)
            size = dense_bytes / ratio
            add("quantization", f"int{bits} simulated", None, simulated, linear_bytes=size)

        chosen = [("identity", ratio) for ratio in options.ratios]
        for gauge, ratio in [*chosen, *(("none", ratio) for ratio in options.plain_ratios)]:
            started = time.perf_counter()
            small = healed_encoder(
                model,
                data,
                healing_data,
                ratio=ratio,
                gauge=gauge,
                steps=options.steps,
                seed=options.seed,
                folder=options.models,
            )
            seconds = time.perf_counter() - started
            label = f"ours {ratio:g}" + ("" if gauge == "identity" else " plain")
            for quantize in ("none", "int8", "int4"):
                stored = quantize_cores(small, quantize, data)
                name = f"{label}, {'float32' if quantize == 'none' else quantize}"
                how = {} if quantize == "none" else {"quantize": stored}
                path = export(small, name, **how)
                found = mpo.verify(path, stored.model, batches[:2], tolerance=1e-4)
                add(
                    "ours",
                    name,
                    path,
                    _Session(path),
                    ratio=ratio,
                    gauge=gauge,
                    quantize=quantize,
                    seconds=seconds,
                    parity=found.max_relative_difference,
                )
        measured = [row for row in rows if "path" in row]
        timings = bench(
            [row.pop("path") for row in measured],
            batch_sizes=options.batches,
            repeats=options.repeats,
            sizes={"sequence": options.length},
        )
    for row, found in zip(measured, timings.to_dict()["files"], strict=True):
        row.update({key: value for key, value in found.items() if key not in ("path", "num_bytes")})
    print_results(rows, options.batches)
    if options.plot:
        plot(rows, options.plot)
    if options.out:
        write_json(
            options.out,
            {
                "claim": __doc__.splitlines()[0],
                "environment": facts,
                "calibration_sentences": options.sentences,
                "held_out_sentences": options.held_out,
                "healing_sentences": options.healing_sentences,
                "healing_steps": options.steps,
                "tokens": options.length,
                "rows": rows,
            },
        )
    return 0


def print_results(rows: Sequence[dict[str, Any]], batches: Sequence[int]) -> None:
    dense = rows[0]
    table = []
    for row in rows:
        figures = [f"{row['linear_bytes'] / 1e6:.2f}", f"{row['linear_ratio']:.2f}"]
        figures += [f"{row['cosine']:.4f}", f"{row['spearman']:.4f}"]
        if "latency_seconds" in row:
            for size in batches:
                median = row["latency_seconds"][size]["median"]
                times = dense["latency_seconds"][size]["median"] / median
                figures.append(f"{1e3 * median:.1f} ({times:.2f}x)")
            figures.append(f"{1e3 * row['session_start_seconds']['median']:.0f}")
            figures.append(f"{row['resident_bytes']['median'] / 1e6:.0f}")
            figures.append(f"{row['file_bytes'] / 1e6:.1f}")
        else:
            figures += [""] * (len(batches) + 3)
        table.append([str(row["model"]), *figures])
    header = ["model", "Linears, MB", "times smaller", "cosine", "Spearman"]
    header += [f"ms at {size}" for size in batches]
    print_table([*header, "start, ms", "memory, MB", "file, MB"], table)


if __name__ == "__main__":
    sys.exit(main())
