"""At equal bytes, a plan that chooses precisions by layer beats one precision for all, and SVD.

Encoder: the 36 encoder Linears of all-MiniLM-L6-v2, at each of the budgets (a share of their bytes
in float32; scales, pivots and placements counted, biases not). Every method has the same
calibration sentences and no healing; embeddings of sentences that no method has seen are compared
with the dense model's: mean cosine, Spearman correlation of the similarities of all pairs. The plan
is built as it would be written: integers times scales in half precision.

    plan              storage_choices, allocate_bytes, sequential fits rounded with feedback
    int8 rows         to the nearest, one scale to a row
    int4, int3, int2  to the nearest, blocks of 32
    SVD, SVD + int8   truncated, uniform, float32 or int8 factors, at the same bytes

One precision for all layers has bytes of its own: it stands in each budget that it fits in.

Whole model (--whole): the dense model's ONNX file, embeddings included, at 1/4, 1/8, 1/12 of its
bytes by `compress(max_size=..., quantize="auto")`, measured in ONNX Runtime on the written files,
and healed (`distill` on the calibration's and more sentences: embedding and hidden states; scales,
biases and norms are trained) and written again; beside it all matrices of the dense model in int8
by rows, and in int4, int3 and int2 in blocks of 32, with the bytes that they would take.

Claims: encoder, plan at least the best other method less .005 everywhere; whole model, plan never
more than .005 below the better of those that fit in the budget, and above int8 and int4 at 1/12.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import minilm_quality
import torch
from common import PeakMemory, environment, print_table, write_json
from sentences import (
    Tokens,
    batches_of,
    embed,
    fidelity,
    load_encoder,
    read_sentences,
    split_sentences,
)
from torch import Tensor, nn

import mpocompress as mpo
from mpocompress.api.job import Job
from mpocompress.api.size_budget import plan_storage_for_size
from mpocompress.api.storage import stored_bytes
from mpocompress.loading import as_batches
from mpocompress.mpo import MPO, Layout, sequential_svd
from mpocompress.mpo.integer_fit import round_matrix
from mpocompress.mpo.precision import Precision, matrix_bytes
from mpocompress.planning import Plan, PlanOptions, predicted_totals
from mpocompress.surgery import WeightSite, copy_with_replacements, find_weights

PACKAGES = ("mpocompress", "torch", "onnxruntime", "transformers", "numpy")
# Names, bits and blocks of what a one-line quantizer does.
QUANTIZERS: dict[str, tuple[int, int | None]] = {
    "int8 rows": (8, None),
    "int4 blocks": (4, 32),
    "int3 blocks": (3, 32),
    "int2 blocks": (2, 32),
}


def to_nearest(weight_OI: Tensor, bits: int, block: int | None) -> Tensor:
    """Round as a plain quantizer does: symmetric, the scale from the largest entry."""
    size = weight_OI.shape[1] if block is None else block
    grouped = weight_OI.reshape(-1, size)
    top = max(2 ** (bits - 1) - 1, 1)
    scale = grouped.abs().amax(1, keepdim=True).clamp(min=1e-12) / top
    return ((grouped / scale).round().clamp(-top - 1, top) * scale).reshape(weight_OI.shape)


def quantized(
    model: nn.Module, sites: Sequence[WeightSite], bits: int, block: int | None
) -> tuple[nn.Module, int]:
    """Return the model with all these weights rounded, and the bytes that they take.

    The better of rounding to the nearest and of scales that were searched for, site by site.
    """
    weights = {}
    for site in sites:
        matrix = site.matrix()
        plain = to_nearest(matrix, bits, block)
        searched = round_matrix(matrix, bits, block, shape=site.shape).dequantized()
        better = min(plain, searched, key=lambda found: float((found - matrix).norm()))
        weights[site] = MPO((better[None, :, :, None].clone(),), shape=site.shape)
    name: Precision = f"int{bits}"  # type: ignore[assignment]
    stored = sum(matrix_bytes(*site.shape, name, block) for site in sites)
    return copy_with_replacements(model, weights), stored


def truncated(
    model: nn.Module, sites: Sequence[WeightSite], share: float, bits: int | None
) -> tuple[nn.Module, int]:
    """Return the model with uniform SVDs of so many bytes at most, float32 or int8 factors."""
    weights, total = {}, 0
    for site in sites:
        out, in_ = site.shape
        each = 4 * (out + in_) if bits is None else out + in_
        fixed = 0 if bits is None else 2 * out
        bond = int((share * 4 * out * in_ - fixed) / (each + (0 if bits is None else 2)))
        found = sequential_svd(site.matrix(), Layout.svd(out, in_), bond_dim=max(bond, 1))
        cores = list(found.cores)
        if bits is not None:
            cores = [
                to_nearest(core.reshape(core.shape[0] * core.shape[1], -1), 8, None).reshape(
                    core.shape
                )
                for core in cores
            ]
        weights[site] = MPO(cores, shape=site.shape)
        total += max(bond, 1) * each + (0 if bits is None else 2 * (out + max(bond, 1)))
    return copy_with_replacements(model, weights), total


class Task:
    """The encoder, its sentences, and how good a model is."""

    def __init__(self, sentences: int, held_out: int, more: int, seed: int) -> None:
        calibration, rest, others = split_sentences(
            read_sentences(), [sentences, held_out, more], seed
        )
        self.model, tokenizer = load_encoder()
        self.data, self.held_out = batches_of(tokenizer, calibration), batches_of(tokenizer, rest)
        self.healing = batches_of(tokenizer, calibration + others)
        self.dense = embed(self.model, self.held_out)

    def quality(self, model: nn.Module) -> dict[str, float]:
        return self._of(embed(model, self.held_out))

    def quality_of_file(self, path: Path) -> dict[str, float]:
        """Measured in ONNX Runtime."""
        return self._of(embed(_Session(path), self.held_out))

    def _of(self, embeddings: Tensor) -> dict[str, float]:
        cosine, spearman = fidelity(embeddings, self.dense)
        return {"cosine": cosine, "spearman": spearman}


class _Output:
    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden


class _Session(nn.Module):
    """A file in ONNX Runtime, called as the encoder is."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self._names = [given.name for given in self._session.get_inputs()]

    def forward(self, **batch: Tensor) -> _Output:
        feed = {name: batch[name].numpy() for name in self._names}
        return _Output(torch.from_numpy(self._session.run(None, feed)[0]))


class Planner:
    """Statistics and choices of all weights, taken once for all budgets."""

    def __init__(self, task: Task, seed: int, *, embeddings: bool) -> None:
        self.task = task
        started = time.perf_counter()
        include = () if embeddings else tuple(minilm_quality.LAYERS)
        options = PlanOptions(max_size=1, quantize="auto", include=include)
        calls = list(as_batches(task.data))
        self.job = Job(task.model, options, calls=calls, sweeps=16, seed=seed)
        self.job.evidence.is_kept = True
        self.job.take_statistics()
        self.statistics_seconds = time.perf_counter() - started
        self.sharing = self.job.byte_sharing()
        self.seconds = time.perf_counter() - started

    def encoder(self, budget: int) -> Plan:
        """The plan for the encoder's weights, whatever is planned for the tables."""
        if not self.job.options.include:
            self.job.options = replace(self.job.options, include=tuple(minilm_quality.LAYERS))
            self.sharing = self.job.byte_sharing()
        plan = self.sharing.at(budget, f"{budget} bytes")
        # The planner also counts the graph that unpacks a file, which is no part of this table.
        stored = sum(layer.bytes for layer in plan.compressed)
        better = self.sharing.at(2 * budget - stored, f"{budget} bytes")
        return better if sum(layer.bytes for layer in better.compressed) <= budget else plan


def encoder(task: Task, planner: Planner, budgets: Sequence[float], note: Any) -> None:
    """Rows of the encoder's table, as they come."""
    sites = [s for s in find_weights(task.model).sites if s.name.startswith("encoder.")]
    dense = sum(4 * site.parameters for site in sites)
    for name, (bits, block) in QUANTIZERS.items():
        model, stored = quantized(task.model, sites, bits, block)
        row = {"method": name, "bytes": stored, "ratio": dense / stored}
        note({"part": "encoder", "budget": None, **row, **task.quality(model)})
    for budget in budgets:
        started = time.perf_counter()
        plan = planner.encoder(int(dense / budget))
        built = planner.job.build(plan)
        stored = sum(map(stored_bytes, built.rounded.values()))
        if stored > dense / budget:
            raise SystemExit(f"error: {stored} bytes are more than 1/{budget:g} of {dense}")
        precisions: dict[str, int] = {}
        for layer in plan.compressed:
            kind = layer.storage + ("" if len(layer.layout or ()) == 1 else ", two factors")
            precisions[kind] = precisions.get(kind, 0) + 1
        note(
            {
                "part": "encoder",
                "budget": budget,
                "method": "plan",
                "bytes": stored,
                "ratio": dense / stored,
                **task.quality(built.model),
                "predicted_change": predicted_totals(
                    planner.job.predicted(plan)
                ).relative_output_error,
                "statistics_seconds": planner.statistics_seconds,
                "planning_seconds": planner.seconds,
                "seconds": time.perf_counter() - started,
                "precisions": precisions,
            }
        )
    for budget in budgets:
        for name, factor_bits in (("SVD", None), ("SVD + int8", 8)):
            model, stored = truncated(task.model, sites, 1 / budget, factor_bits)
            row = {"method": name, "bytes": stored, "ratio": dense / stored}
            note({"part": "encoder", "budget": budget, **row, **task.quality(model)})


def whole(
    task: Task, planner: Planner, budgets: Sequence[float], steps: int, seed: int, note: Any
) -> None:
    """Rows of the whole model's table, as they come."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        example: Tokens = task.data[0]
        dense = mpo.export_onnx(task.model, path, example).num_bytes
        row = {"method": "dense", "bytes": dense, "ratio": 1.0}
        note({"part": "whole", "budget": None, **row, **task.quality_of_file(path)})
        sites = find_weights(task.model).sites
        rest = dense - sum(4 * site.parameters for site in sites)
        for name, (bits, block) in QUANTIZERS.items():
            model, stored = quantized(task.model, sites, bits, block)
            row = {"method": name, "bytes": stored + rest, "ratio": dense / (stored + rest)}
            note({"part": "whole", "budget": None, **row, **task.quality(model)})

        def onnx_bytes(model: nn.Module) -> int:
            return mpo.export_onnx(model, path, example).num_bytes

        for budget in budgets:
            started = time.perf_counter()
            plan, _ = plan_storage_for_size(planner.job, int(dense / budget), onnx_bytes)
            planned = planner.seconds + time.perf_counter() - started
            model = planner.job.build(plan).model
            for healed in (False, True) if steps else (False,):
                if healed:
                    minilm_quality.heal(model, task.model, task.healing, steps, seed)
                written = mpo.export_onnx(model, path, example).num_bytes
                if written > dense / budget:
                    raise SystemExit(f"error: {written} bytes are more than 1/{budget:g}")
                note(
                    {
                        "part": "whole",
                        "budget": budget,
                        "method": "plan, healed" if healed else "plan",
                        "bytes": written,
                        "ratio": dense / written,
                        **task.quality_of_file(path),
                        "planning_seconds": planned,
                        "seconds": time.perf_counter() - started,
                        "tables": {
                            layer.name: layer.storage
                            for layer in plan.compressed
                            if layer.kind == "embedding"
                        },
                    }
                )


def claims(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What held: the plan less the best other method within the same bytes, at worst over seeds."""
    gaps: dict[str, dict[str, float]] = {"encoder": {}, "whole": {}}
    dense = {row["part"]: row["bytes"] * row["ratio"] for row in rows}
    for row in rows:
        if not row["method"].startswith("plan"):
            continue
        allowed = dense[row["part"]] / row["budget"]
        others = [
            other["cosine"]
            for other in rows
            if (other["part"], other["seed"]) == (row["part"], row["seed"])
            and not other["method"].startswith("plan")
            and other["bytes"] <= 1.02 * allowed  # int8 by rows misses 1/4 by its scales
        ]
        if others:
            key = f"{row['budget']:g}" + (", healed" if "healed" in row["method"] else "")
            gap = row["cosine"] - max(others)
            gaps[row["part"]][key] = min(gap, gaps[row["part"]].get(key, gap))
    return {
        "plan_less_best_other_within_the_bytes": gaps,
        "held": all(gap >= -0.005 for found in gaps.values() for gap in found.values()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=float, nargs="*", default=[4, 6, 8, 10, 12, 16])
    parser.add_argument("--whole", type=float, nargs="*", default=[], help="budgets, as in 4 8 12")
    parser.add_argument("--sentences", type=int, default=400, help="for calibration")
    parser.add_argument("--held-out", type=int, default=1000, help="for evaluation")
    parser.add_argument("--steps", type=int, default=0, help="of healing, of the whole model")
    parser.add_argument("--healing-sentences", type=int, default=3000, help="besides those")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the split")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    return run(
        budgets=options.budgets,
        whole_budgets=options.whole,
        sentences=options.sentences,
        held_out=options.held_out,
        steps=options.steps,
        healing_sentences=options.healing_sentences,
        seeds=options.seeds,
        out=options.out,
    )


def run(
    *,
    budgets: Sequence[float],
    whole_budgets: Sequence[float],
    sentences: int,
    held_out: int,
    healing_sentences: int,
    steps: int,
    seeds: Sequence[int],
    out: Path | None,
) -> int:
    """Measure, print the table, and write the JSON after every row."""
    facts = environment(PACKAGES, seed=seeds[0])
    memory = PeakMemory()
    rows: list[dict[str, Any]] = []

    def note(seed: int, row: dict[str, Any]) -> None:
        rows.append({"seed": seed, **row})
        print(rows[-1], file=sys.stderr, flush=True)
        if out:
            content = {
                "claim": __doc__,
                "environment": facts,
                "calibration_sentences": sentences,
                "held_out_sentences": held_out,
                "healing_sentences": sentences + healing_sentences,
                "healing_steps": steps,
                "rows": rows,
                "claims": claims(rows),
                "peak_memory_bytes": memory.read(),
            }
            write_json(out, content)

    for seed in seeds:
        task = Task(sentences, held_out, healing_sentences, seed)
        planner = Planner(task, seed, embeddings=bool(whole_budgets))
        if whole_budgets:
            whole(task, planner, whole_budgets, steps, seed, partial(note, seed))
        if budgets:
            encoder(task, planner, budgets, partial(note, seed))
    print_table(
        ["seed", "part", "budget", "method", "bytes", "ratio", "cosine", "Spearman", "seconds"],
        [
            [
                str(row["seed"]),
                row["part"],
                "" if row["budget"] is None else f"1/{row['budget']:g}",
                row["method"],
                f"{row['bytes']:,}",
                f"{row['ratio']:.2f}",
                f"{row['cosine']:.4f}",
                f"{row['spearman']:.4f}",
                f"{row['seconds']:.0f}" if "seconds" in row else "",
            ]
            for row in rows
        ],
    )
    for name, value in claims(rows).items():
        print(f"{name}: {value}")
    print(f"peak memory {memory.read() / 1e6:.0f} MB above the start")
    return 0


if __name__ == "__main__":
    sys.exit(main())
