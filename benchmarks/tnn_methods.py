"""Tensor neural networks beside dense ones and TensorLy-Torch's: the methods, one run, the table.

All methods see the same rows as often, in minibatches of the same size, train on labels alone, and
are judged once, at the end, on test rows; the last weights are taken.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import environment, print_table, write_json
from torch import Tensor, nn

import mpocompress
from mpocompress.mpo import Layout

HAS_TLTORCH = find_spec("tltorch") is not None
PACKAGES = ("mpocompress", "torch", "numpy", "scikit-learn")
PACKAGES += ("tensorly", "tensorly-torch") if HAS_TLTORCH else ()
SPEED_ROWS = 256
# TensorLy-Torch's layers are trained at both rates; the table has the better one, in its favour.
TLTORCH_RATES = (2e-3, 1e-2)


@dataclass(frozen=True)
class Problem:
    """Rows for one seed, and the networks that are compared on them.

    Attributes:
        layouts: of the two hidden layers; their out features are the widths.
        reference_bond: bond dimension of the hidden layers.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    outputs: int
    layouts: tuple[str, str]
    bond_dim: int
    epochs: int
    batch_size: int = 32

    @property
    def widths(self) -> tuple[int, int, int]:
        first, second = map(Layout.parse, self.layouts)
        return first.in_features, first.out_features, second.out_features

    @property
    def classifies(self) -> bool:
        return not self.labels.is_floating_point()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def network(layers: Sequence[nn.Module], outputs: int, width: int) -> nn.Sequential:
    found: list[nn.Module] = []
    for layer in layers:
        found += [layer, nn.ReLU()]
    return nn.Sequential(*found, nn.Linear(width, outputs))


def dense(problem: Problem, width: int | None = None) -> nn.Sequential:
    inputs, *hidden = problem.widths
    hidden = [width] * len(hidden) if width else hidden
    sizes = [inputs, *hidden]
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return network(layers, problem.outputs, sizes[-1])


def tensor_network(problem: Problem, bond_dim: int | None = None) -> nn.Sequential:
    inputs, first, second = problem.widths
    layers = [
        mpocompress.MPOLinear(
            a, b, layout=layout, bond_dim=bond_dim or problem.bond_dim, gain=2**0.5
        )
        for a, b, layout in zip((inputs, first), (first, second), problem.layouts, strict=True)
    ]
    return network(layers, problem.outputs, second)


def small_dense(problem: Problem) -> nn.Sequential:
    """As deep, as wide as the tensor network's parameters (all of them) allow, at least 1."""
    budget, width = count(tensor_network(problem)), 1
    while count(dense(problem, width + 1)) <= budget:
        width += 1
    return dense(problem, width)


def hybrid(problem: Problem) -> nn.Sequential:
    return mpocompress.tensorize(
        dense(problem), include=["2"], layout=problem.layouts[1], bond_dim=problem.bond_dim,
        gain=2**0.5,
    )  # type: ignore[return-value]  # fmt: skip


def tltorch_network(problem: Problem, *, own_start: bool) -> nn.Sequential:
    from tltorch import FactorizedLinear

    layers = []
    for layout in map(Layout.parse, problem.layouts):
        bonds = mpocompress.MPO.random(layout, problem.bond_dim).bond_dims
        layer = FactorizedLinear(
            in_tensorized_features=layout.in_dims,
            out_tensorized_features=layout.out_dims,
            factorization="blocktt",
            rank=(1, *bonds, 1),
            implementation="factorized",
        )
        if not own_start:
            # The same scale as ours: its own start gives nearly vanishing weights.
            with torch.no_grad():
                scale = (2 / layout.in_features) ** 0.5 / layer.weight.to_matrix().std()
                for factor in layer.weight.factors:
                    factor.mul_(scale ** (1 / layout.num_sites))
        layers.append(layer)
    return network(layers, problem.outputs, problem.widths[-1])


@dataclass(frozen=True)
class Method:
    build: Callable[[Problem], nn.Sequential]
    options: Callable[[Problem], dict[str, Any]]


def _adam(rate: float = 2e-3) -> Callable[[Problem], dict[str, Any]]:
    return lambda _: {"method": "adam", "dense_learning_rate": rate}


METHODS: dict[str, Method] = {
    "dense": Method(dense, _adam(1e-3)),
    "small dense": Method(small_dense, _adam()),
    "TNN, sweeps": Method(tensor_network, lambda _: {"method": "dmrg"}),
    "TNN, sweeps from bond 1": Method(
        lambda problem: tensor_network(problem, 1),
        lambda problem: {"method": "dmrg", "sites": "grow", "bond_dim": problem.bond_dim},
    ),
    "TNN, Adam": Method(tensor_network, _adam()),
    "hybrid, sweeps": Method(hybrid, lambda _: {"method": "dmrg"}),
    "hybrid, Adam": Method(hybrid, _adam(1e-3)),
} | {
    f"TensorLy-Torch{start} {rate:g}": Method(
        lambda problem, own=own: tltorch_network(problem, own_start=own), _adam(rate)
    )
    for own, start in ((True, ""), (False, ", our start"))
    for rate in TLTORCH_RATES
}


def score(model: nn.Module, problem: Problem) -> float:
    """Accuracy, or R^2, on the test rows."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part) for part in problem.test_inputs.split(SPEED_ROWS)])
    if problem.classifies:
        return float((found.argmax(1) == problem.test_labels).double().mean())
    labels = problem.test_labels.double()
    return float(1 - (found[:, 0] - labels).square().mean() / labels.var(correction=0))


def seconds_per_row(model: nn.Module, problem: Problem) -> float:
    rows = problem.inputs[:SPEED_ROWS]
    taken = []
    with torch.no_grad():
        for _ in range(9):
            started = time.perf_counter()
            model(rows)
            taken.append(time.perf_counter() - started)
    return statistics.median(taken) / len(rows)


def run(problem: Problem, name: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)  # the starts of nn.Linear and of TensorLy-Torch
    model = METHODS[name].build(problem)
    started = time.perf_counter()
    mpocompress.train(
        model,
        (problem.inputs, problem.labels),
        epochs=problem.epochs,
        batch_size=problem.batch_size,
        validation=0,
        seed=seed,
        **METHODS[name].options(problem),
    )
    seconds = time.perf_counter() - started
    # Without biases and the head, which is dense in all of them.
    hidden = [module for module in list(model)[:-1] if not isinstance(module, nn.ReLU)]
    tensor_layers = [layer for layer in hidden if not isinstance(layer, nn.Linear)]
    bias = sum(layer.bias.numel() for layer in tensor_layers)
    kept = sum(map(count, tensor_layers)) - bias
    inputs, first, second = problem.widths
    sizes = [inputs * first, first * second]
    replaced = sum(
        size for layer, size in zip(hidden, sizes, strict=True) if not isinstance(layer, nn.Linear)
    )
    return {
        "dataset": problem.name,
        "method": name,
        "seed": seed,
        "parameters": count(model),
        "layer_parameters": kept,
        "layer_ratio": replaced / kept if kept else None,
        "score": score(model, problem),
        "rows_seen": problem.epochs * len(problem.inputs),
        "training_seconds": seconds,
        "seconds_per_row": seconds_per_row(model, problem),
    }


def summary(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds; of TensorLy-Torch's rates the better one."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for found in runs:
        groups.setdefault((found["dataset"], found["method"]), []).append(found)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for (dataset, method), group in groups.items():
        scores = [found["score"] for found in group]
        shown = method.rpartition(" ")[0] if method.startswith("TensorLy") else method
        row = {
            **{key: group[0][key] for key in ("dataset", "parameters", "layer_ratio")},
            "method": shown,
            "variant": method,
            "score": statistics.mean(scores),
            "spread": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "seeds": len(scores),
            "training_seconds": statistics.median(f["training_seconds"] for f in group),
            "seconds_per_row": statistics.median(f["seconds_per_row"] for f in group),
        }
        other = rows.get((dataset, shown))
        if other is None or row["score"] > other["score"]:
            rows[dataset, shown] = row
    return list(rows.values())


def show(rows: Sequence[dict[str, Any]]) -> None:
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        own = [row for row in rows if row["dataset"] == dataset]
        print(f"\n{dataset}")
        print_table(
            ("method", "parameters", "layers /", "score", "spread", "seeds", "train s", "us/row"),
            [
                (
                    row["method"],
                    f"{row['parameters']:,}",
                    f"{row['layer_ratio']:.0f}" if row["layer_ratio"] else "1",
                    f"{row['score']:.4f}",
                    f"{row['spread']:.4f}",
                    str(row["seeds"]),
                    f"{row['training_seconds']:.1f}",
                    f"{1e6 * row['seconds_per_row']:.1f}",
                )
                for row in own
            ],
        )


def main(claim: str, datasets: dict[str, Callable[[int], Problem]], default_out: str) -> None:
    parser = argparse.ArgumentParser(description=claim)
    parser.add_argument("--datasets", nargs="+", choices=list(datasets), default=list(datasets))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--epochs", type=int, help="instead of the dataset's own")
    parser.add_argument("--rows", type=int, help="train on the first so many rows only")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / default_out,
        help="JSON that runs are added to; those that are in it are not repeated",
    )
    options = parser.parse_args()
    if not HAS_TLTORCH and any(method.startswith("TensorLy") for method in options.methods):
        parser.error("TensorLy-Torch is missing; run: pip install '.[bench]', or give --methods")
    torch.set_num_threads(1)
    content: dict[str, Any] = {"claim": claim, "runs": []}
    if options.out.exists():
        content = json.loads(options.out.read_text(encoding="utf-8"))
    runs = content["runs"]
    keys = ("dataset", "method", "seed", "rows_seen")
    # Seeds outermost and methods innermost: timings that are compared are taken together.
    for seed in options.seeds:
        for name in options.datasets:
            problem = datasets[name](seed)
            changes: dict[str, Any] = {}
            if options.epochs:
                changes["epochs"] = options.epochs
            if options.rows:
                changes["inputs"] = problem.inputs[: options.rows]
                changes["labels"] = problem.labels[: options.rows]
            problem = Problem(**{**problem.__dict__, **changes})
            seen = problem.epochs * len(problem.inputs)
            for method in options.methods:
                if any([run_[key] for key in keys] == [name, method, seed, seen] for run_ in runs):
                    continue
                found = run(problem, method, seed)
                runs.append(found)
                print(f"{name}, {method}, seed {seed}: {found['score']:.4f}", flush=True)
                content["environment"] = environment(PACKAGES, seed=seed)
                content["summary"] = summary(runs)
                write_json(options.out, content)
    show(summary(runs))
