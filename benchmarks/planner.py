"""Plans share a budget better than uniform bond dimensions do, keep their promises, and predict.

Quality: one model, several ratios of the parameters of the layers that are compressed, and the same
calibration data for all methods:

    plan              compress(ratio=R, data=...): bond dimensions by what an error does, and four
                      sites where two factors would be a bottleneck
    uniform SVD       truncated, the same ratio for all layers
    uniform whitened  SVD in the metric of each layer's inputs, uniform
    uniform balanced  two-site MPOs fitted to the data by four sweeps to and fro, uniform

each without and with healing (--steps). minilm: the 36 encoder Linears of all-MiniLM-L6-v2, cosine
of held-out embeddings. digits: the two large layers of the classifier of examples/digits, accuracy
on 1,000 images, which scatters by .007: several seeds, and what is judged are means over them. For
`plan` the predicted change of the model's outputs stands beside the measured. Rows are written as
they come; those that the file has are not measured again.

Speed: layers (1024 and 4096 square; ratios 4 and 16) and, with --minilm-speed, the encoder at ratio
2, compressed by `objective="latency"` and timed in ONNX Runtime against the dense model, in turn,
medians, with as many threads as torch has.

Claims: `plan` is never worse than the best uniform method by more than 0.005 and better on average;
at MiniLM ratio 2 without healing at least 0.04 better than uniform whitened; predicted and measured
changes agree within a factor of 2; latency plans are 1.4 (MiniLM), 2.5 (ratio 4) and 8 (ratio 16)
times as fast as dense, and predicted times are within 30 % for 90 % of the layers.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import minilm_quality
import numpy as np
import torch
from common import PeakMemory, environment, print_table, write_json
from sentences import batches_of, embed, fidelity, load_encoder, read_sentences, split_sentences
from torch import Tensor, nn

import mpocompress as mpo
from mpocompress.export.latency import LatencyTable
from mpocompress.loading import as_batches
from mpocompress.planning import Plan, predicted_totals
from mpocompress.tuning import output_errors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "digits"))

PACKAGES = ("mpocompress", "torch", "onnxruntime", "numpy")
METHODS = ("plan", "uniform SVD", "uniform whitened", "uniform balanced")
SPEEDS = {("minilm", 2.0): 1.4, ("layer", 4.0): 2.5, ("layer", 16.0): 8.0}


class Task:
    """A model, its calibration data, what is compressed, and how good a model is.

    Attributes:
        name: of the task.
        model: dense.
        data: batches to fit on.
        held_out: batches to compare outputs on.
        layers: patterns of what is compressed.
        metric: of a model, the higher the better.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        data: list[Any],
        held_out: list[Any],
        layers: list[str],
        metric: Callable[[nn.Module], float],
    ) -> None:
        self.name, self.model, self.data, self.held_out = name, model, data, held_out
        self.layers, self.metric = layers, metric


def minilm(sentences: int, held_out: int, seed: int) -> Task:
    fit, rest = split_sentences(read_sentences(), [sentences, held_out], seed)
    model, tokenizer = load_encoder()
    data, batches = batches_of(tokenizer, fit), batches_of(tokenizer, rest)
    dense = embed(model, batches)
    layers = minilm_quality.LAYERS
    return Task(
        "minilm", model, data, batches, layers, lambda m: fidelity(embed(m, batches), dense)[0]
    )


def digits(images: int, seed: int) -> Task:
    from classifier import build_classifier
    from train import load_digits, split_by_digit, train

    pixels, labels = load_digits()
    training, held_out = split_by_digit(labels, seed)
    model = build_classifier(seed)
    train(model, torch.from_numpy(pixels[training]), torch.from_numpy(labels[training]), 600, seed)
    x, y = torch.from_numpy(pixels[held_out]), torch.from_numpy(labels[held_out])
    order = np.random.default_rng(seed).permutation(training)[:images]

    @torch.no_grad()
    def accuracy(found: nn.Module) -> float:
        return float((found(x).argmax(-1) == y).double().mean())

    data = list(torch.from_numpy(pixels[order]).split(100))
    return Task("digits", model.eval(), data, [x], ["0", "2"], accuracy)


def compressed(task: Task, method: str, ratio: float, seed: int) -> tuple[nn.Module, Plan | None]:
    options: dict[str, Any] = {"ratio": ratio, "of": "layers", "include": task.layers}
    if method == "plan":
        result = mpo.compress(task.model, **options, data=task.data, seed=seed)
        return result.model, result.plan
    if method == "uniform balanced":
        options |= {"layout": "balanced", "data": task.data, "sweeps": 4, "seed": seed}
        return mpo.compress(task.model, **options).model, None
    plan = mpo.plan(task.model, layout="svd", **options)
    if method == "uniform SVD":
        return mpo.compress(task.model, plan, seed=seed).model, None
    return minilm_quality.whitened_by_plan(task.model, task.data, plan, seed), None


class Rows:
    """Measured rows, written as they come.

    Args:
        path: JSON file, whose rows of an earlier run are kept; None to keep nothing.
        settings: what rows must have in common to stand in one table.
        facts: `environment()` of this run.

    Raises:
        SystemExit: the file's rows were measured with other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        self._path = path
        self.content: dict[str, Any] = {"claim": __doc__, "settings": settings, "environments": []}
        self.content |= {"quality": [], "speed": []}
        if path is not None and path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            if self.content["settings"] != settings:
                raise SystemExit(
                    f"error: {path} was measured with {self.content['settings']}, not {settings}"
                )
        self.content["environments"].append(facts)

    @property
    def quality(self) -> list[dict[str, Any]]:
        return self.content["quality"]

    def has(self, **key: Any) -> bool:
        return any(key.items() <= row.items() for row in self.quality)

    def write(self, **more: Any) -> None:
        self.content |= more
        if self._path is not None:
            write_json(self._path, self.content)


def quality(
    rows: Rows, build: Callable[[], Task], name: str, options: argparse.Namespace, seed: int
) -> None:
    """Measure what is missing for one task and one split of its data."""
    ratios = options.minilm_ratios if name == "minilm" else options.digits_ratios
    keys = [
        {"task": name, "seed": seed, "ratio": ratio, "method": method, "steps": options.steps}
        for ratio in ratios
        for method in options.methods
    ]
    missing = [key for key in keys if not rows.has(**key)]
    if not missing:
        return
    task = build()
    dense = task.metric(task.model)
    for key in missing:
        memory = PeakMemory()
        started = time.perf_counter()
        model, plan = compressed(task, key["method"], key["ratio"], seed)
        row = key | {
            "dense_metric": dense,
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": memory.read(),
            "metric": task.metric(model),
        }
        if plan is not None:
            row["predicted_change"] = predicted_totals(plan).relative_output_error
            calls = list(as_batches(task.held_out))
            row["measured_change"] = output_errors(task.model, model, [], calls).model
        if options.steps:
            mpo.distill(model, reference=task.model, data=task.data, steps=options.steps, seed=seed)
            row["healed_metric"] = task.metric(model)
        rows.quality.append(row)
        rows.write()
        print(row, file=sys.stderr, flush=True)


_MEASURED = (
    *("dense_metric", "metric", "healed_metric", "predicted_change", "measured_change"),
    *("seconds", "peak_memory_bytes"),
)


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in nothing but the seed, as one with the means of all they measured."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("task", "ratio", "method", "steps"))
        groups.setdefault(key, []).append(row)
    return [
        {
            name: statistics.mean(row[name] for row in found) if name in _MEASURED else value
            for name, value in found[0].items()
            if all(row.get(name) is not None for row in found)
        }
        | {"seeds": [row["seed"] for row in found]}
        for found in groups.values()
    ]


def time_in_turn(runs: Sequence[Callable[[], Any]], rounds: int = 15) -> list[float]:
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(rounds):
        for run, found in zip(runs, times, strict=True):
            started = time.perf_counter()
            for _ in range(5):
                run()
            found.append((time.perf_counter() - started) / 5)
    return [statistics.median(found) for found in times]


def session(model: nn.Module, example: Any, folder: Path, name: str) -> Callable[[], Any]:
    import onnxruntime

    mpo.export_onnx(model, folder / name, example)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    found = onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
    given = example if isinstance(example, dict) else {found.get_inputs()[0].name: example}
    feed = {key: value.numpy() for key, value in given.items()}
    return lambda: found.run(None, feed)


def within(plan: Plan, table: LatencyTable) -> list[float]:
    """Predicted over measured times of the compressed layers."""
    return [
        layer.predicted.seconds
        / table.measure(layer.shape, layer.sites(), tuple(layer.bond_dims or ()))
        for layer in plan.compressed
        if layer.predicted is not None and layer.predicted.seconds is not None
    ]


def speed(
    kind: str, name: str, model: nn.Module, ratio: float, batch: int, example: Any, rows: int
) -> dict[str, Any]:
    include = minilm_quality.LAYERS if kind == "minilm" else []
    options: dict[str, Any] = {"ratio": ratio, "of": "layers", "include": include}
    plan = mpo.plan(model, objective="latency", batch=rows, **options)
    result = mpo.compress(model, plan)
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            session(found, example, Path(folder), f"{key}.onnx")
            for key, found in (("dense", model), ("compressed", result.model))
        ]
        dense, after = time_in_turn(runs)
    agreement = within(plan, LatencyTable(rows))
    return {
        "kind": kind,
        "model": name,
        "ratio": ratio,
        "batch": batch,
        "dense_seconds": dense,
        "compressed_seconds": after,
        "speedup": dense / after,
        "claimed": SPEEDS.get((kind, ratio)),
        "predicted_over_measured": agreement,
        "within_30_percent": sum(1 / 1.3 <= found <= 1.3 for found in agreement),
        "layers": len(agreement),
    }


def claims(rows: Sequence[dict[str, Any]], speeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What held, by the numbers; `rows` are means over seeds."""
    gaps: dict[str, list[float]] = {"metric": [], "healed_metric": []}
    for row in rows:
        if row["method"] != "plan":
            continue
        others = [
            other
            for other in rows
            if all(other[name] == row[name] for name in ("task", "ratio", "steps", "seeds"))
            and other is not row
        ]
        for key, found in gaps.items():
            if key in row and others:
                found.append(row[key] - max(other[key] for other in others))
    factors = [
        row["predicted_change"] / row["measured_change"]
        for row in rows
        if row.get("predicted_change") and row.get("measured_change")
    ]
    timed = sum(row["layers"] for row in speeds)
    above_whitened = [
        row["metric"] - other["metric"]
        for row in rows
        for other in rows
        if (row["task"], row["ratio"]) == ("minilm", 2.0)
        and (row["method"], other["method"]) == ("plan", "uniform whitened")
        and all(other[name] == row[name] for name in ("task", "ratio", "steps", "seeds"))
    ]
    return {
        "worst_gap_to_best_uniform": {key: min(found) for key, found in gaps.items() if found},
        "mean_gap_to_best_uniform": {
            key: statistics.mean(found) for key, found in gaps.items() if found
        },
        "minilm_ratio_2_above_uniform_whitened": min(above_whitened, default=None),
        "predicted_over_measured_change": factors,
        "prediction_within_factor_2": all(0.5 <= factor <= 2 for factor in factors)
        if factors
        else None,
        "speeds_held": all(row["speedup"] >= (row["claimed"] or 0) for row in speeds)
        if speeds
        else None,
        "times_within_30_percent": sum(row["within_30_percent"] for row in speeds) / timed
        if timed
        else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", choices=("minilm", "digits"), default=["digits"])
    parser.add_argument("--minilm-ratios", type=float, nargs="+", default=[1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--digits-ratios", type=float, nargs="+", default=[10.0, 30.0, 100.0])
    parser.add_argument("--sentences", type=int, default=1000, help="for calibration")
    parser.add_argument("--held-out", type=int, default=1000, help="sentences for evaluation")
    parser.add_argument("--images", type=int, default=2000, help="for calibration")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=0, help="of healing")
    parser.add_argument("--sides", type=int, nargs="*", default=[], help="of layers to time")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--minilm-speed", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data and methods")
    parser.add_argument("--out", type=Path, help="JSON file; quality that it has is not run again")
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("sentences", "held_out", "images")}
    facts = environment(PACKAGES, seed=options.seeds[0])
    rows = Rows(options.out, settings, facts)
    for seed in options.seeds:
        if "digits" in options.tasks:
            build = functools.partial(digits, options.images, seed)
            quality(rows, build, "digits", options, seed)
        if "minilm" in options.tasks:
            build = functools.partial(minilm, options.sentences, options.held_out, seed)
            quality(rows, build, "minilm", options, seed)
    if measured := list(_speeds(options)):
        rows.content["speed"] = measured
    speeds = rows.content["speed"]
    table = means(rows.quality)
    found = claims(table, speeds)
    show(table, speeds)
    for name, value in found.items():
        print(f"{name}: {value}")
    rows.write(claims=found)
    return 0


def _speeds(options: argparse.Namespace) -> Any:
    for side in options.sides:
        torch.manual_seed(options.seeds[0])
        layer = nn.Linear(side, side).eval()
        for ratio in (4.0, 16.0):
            for batch in options.batches:
                x: Tensor = torch.randn(batch, side)
                yield speed("layer", f"{side} x {side}", layer, ratio, batch, x, batch)
    if options.minilm_speed:
        model, tokenizer = load_encoder()
        for batch in options.batches:
            texts = ["all that is gold does not glitter, not all those who wander are lost"] * batch
            example = dict(tokenizer(texts, return_tensors="pt"))
            rows = example["input_ids"].numel()
            yield speed("minilm", "encoder", model, 2.0, batch, example, rows)


def show(rows: Sequence[dict[str, Any]], speeds: Sequence[dict[str, Any]]) -> None:
    if rows:
        print_table(
            [
                *("task", "ratio", "method", "seeds", "metric", "healed", "steps"),
                *("predicted", "measured", "seconds", "MB"),
            ],
            [
                [
                    row["task"],
                    f"{row['ratio']:g}",
                    row["method"],
                    str(len(row["seeds"])),
                    f"{row['metric']:.4f}",
                    f"{row['healed_metric']:.4f}" if "healed_metric" in row else "",
                    str(row["steps"]),
                    f"{row['predicted_change']:.3f}" if row.get("predicted_change") else "",
                    f"{row['measured_change']:.3f}" if "measured_change" in row else "",
                    f"{row['seconds']:.0f}",
                    f"{row['peak_memory_bytes'] / 1e6:.0f}",
                ]
                for row in rows
            ],
        )
    if speeds:
        print_table(
            ["model", "ratio", "batch", "dense µs", "compressed µs", "speed-up", "within 30 %"],
            [
                [
                    row["model"],
                    f"{row['ratio']:g}",
                    str(row["batch"]),
                    f"{row['dense_seconds'] * 1e6:.0f}",
                    f"{row['compressed_seconds'] * 1e6:.0f}",
                    f"{row['speedup']:.2f}",
                    f"{row['within_30_percent']} of {row['layers']}",
                ]
                for row in speeds
            ],
        )


if __name__ == "__main__":
    sys.exit(main())
