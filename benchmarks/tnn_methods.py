"""Tensor neural networks beside dense ones and TensorLy-Torch's: the methods, one run, the table.

All methods see the same rows as often, in minibatches of the same size, train on labels alone, and
are judged once, at the end, on test rows; the last weights are taken. Before that each method's
learning rate is chosen among three on a seed that is not reported, in shorter runs; TensorLy-Torch
has six tries, its own start and ours at three rates each. Seconds are the processor's, not the
wall's, so that other work on the machine counts less.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import environment, print_table, write_json
from torch import Tensor, nn

import mpocompress
from mpocompress.mpo import Layout
from mpocompress.tuning import TrainOptions

HAS_TLTORCH = find_spec("tltorch") is not None
PACKAGES = ("mpocompress", "torch", "numpy", "scikit-learn")
PACKAGES += ("tensorly", "tensorly-torch") if HAS_TLTORCH else ()
SPEED_ROWS = 256
TUNING_SEED = 1000


@dataclass(frozen=True)
class Problem:
    """Rows for one seed, and the networks that are compared on them.

    Attributes:
        layouts: of the two hidden layers; their out features are the widths.
        bond_dim: of the hidden layers.
        epochs: passes over the rows.
        tuning_epochs: likewise, in the runs that choose learning rates.
        tuned_as: the dataset whose learning rates are taken, if not its own.
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
    tuning_epochs: int
    batch_size: int = 64
    tuned_as: str | None = None

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
class Variant:
    """A network and how it is trained; one of a method's tries."""

    build: Callable[[Problem], nn.Sequential]
    options: dict[str, Any]
    more: Callable[[Problem], dict[str, Any]] = lambda _: {}


def _adam(build: Callable[[Problem], nn.Sequential], *rates: float) -> dict[str, Variant]:
    """Networks without MPO layers, or mostly dense ones: one rate for everything."""
    return {
        f"Adam {rate:g}": Variant(
            build, {"method": "adam", "learning_rate": rate, "dense_learning_rate": rate}
        )
        for rate in rates
    }


def _ours(
    build: Callable[[Problem], nn.Sequential],
    method: str,
    more: Callable[[Problem], dict[str, Any]] = lambda _: {},
) -> dict[str, Variant]:
    """The library's own rates, half and twice them."""
    own = TrainOptions(method=method)  # type: ignore[arg-type]
    return {
        f"{factor:g} x default": Variant(
            build,
            {
                "method": method,
                "learning_rate": factor * own.core_rate,
                "dense_learning_rate": factor * own.dense_rate,
            },
            more,
        )
        for factor in (1, 0.5, 2)
    }


# The first variant is the one that is taken if others are only as good.
METHODS: dict[str, dict[str, Variant]] = {
    "dense": _adam(dense, 1e-3, 5e-4, 2e-3),
    "small dense": _adam(small_dense, 5e-3, 2e-3, 1e-2),
    "TNN, sweeps": _ours(tensor_network, "dmrg"),
    "TNN, Adam": _ours(tensor_network, "adam"),
    "hybrid, Adam": _adam(hybrid, 2e-3, 1e-3, 4e-3),
    "TensorLy-Torch": {
        f"{start}, {name}": variant
        for own, start in ((True, "its own start"), (False, "our start"))
        for name, variant in _adam(
            partial(tltorch_network, own_start=own), 5e-3, 2e-3, 1e-2
        ).items()
    },
    # Run if asked for.
    "TNN, sweeps from bond 1": _ours(
        lambda problem: tensor_network(problem, 1),
        "dmrg",
        lambda problem: {"sites": "grow", "bond_dim": problem.bond_dim},
    ),
    "hybrid, sweeps": _ours(hybrid, "dmrg"),
}
DEFAULT_METHODS = list(METHODS)[:-2]


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
            started = time.process_time()
            model(rows)
            taken.append(time.process_time() - started)
    return statistics.median(taken) / len(rows)


def run(problem: Problem, name: str, variant: str, seed: int, epochs: int) -> dict[str, Any]:
    torch.manual_seed(seed)  # the starts of nn.Linear and of TensorLy-Torch
    tried = METHODS[name][variant]
    model = tried.build(problem)
    started = time.process_time()
    mpocompress.train(
        model,
        (problem.inputs, problem.labels),
        epochs=epochs,
        batch_size=problem.batch_size,
        validation=0,
        seed=seed,
        **tried.options,
        **tried.more(problem),
    )
    seconds = time.process_time() - started
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
        "variant": variant,
        "seed": seed,
        "parameters": count(model),
        "layer_parameters": kept,
        "layer_ratio": replaced / kept if kept else None,
        "score": score(model, problem),
        "rows_seen": epochs * len(problem.inputs),
        "training_cpu_seconds": seconds,
        "cpu_seconds_per_row": seconds_per_row(model, problem),
    }


def chosen(tuning: Sequence[dict[str, Any]], dataset: str, name: str) -> str:
    """The variant with the best score; the first one of those, or where nothing was tuned."""
    scores = {
        found["variant"]: found["score"]
        for found in tuning
        if (found["dataset"], found["method"]) == (dataset, name)
    }
    return max(METHODS[name], key=lambda variant: scores.get(variant, float("-inf")))


def summary(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread (standard deviation) over the seeds."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for found in runs:
        key = (found["dataset"], found["method"], found["rows_seen"])
        groups.setdefault(key, []).append(found)
    rows = []
    for group in groups.values():
        scores = [found["score"] for found in group]
        keys = ("dataset", "method", "variant", "parameters", "layer_ratio", "rows_seen")
        rows.append(
            {
                **{key: group[0][key] for key in keys},
                "score": statistics.mean(scores),
                "spread": statistics.stdev(scores) if len(scores) > 1 else 0.0,
                "seeds": len(scores),
                "training_cpu_seconds": statistics.median(f["training_cpu_seconds"] for f in group),
                "cpu_seconds_per_row": statistics.median(f["cpu_seconds_per_row"] for f in group),
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        own = [row for row in rows if row["dataset"] == dataset]
        print(f"\n{dataset}")
        print_table(
            (
                "method",
                "variant",
                "parameters",
                "layers /",
                "score",
                "spread",
                "seeds",
                "train s",
                "us/row",
            ),
            [
                (
                    row["method"],
                    row["variant"],
                    f"{row['parameters']:,}",
                    f"{row['layer_ratio']:.0f}" if row["layer_ratio"] else "1",
                    f"{row['score']:.4f}",
                    f"{row['spread']:.4f}",
                    str(row["seeds"]),
                    f"{row['training_cpu_seconds']:.1f}",
                    f"{1e6 * row['cpu_seconds_per_row']:.1f}",
                )
                for row in own
            ],
        )


def main(claim: str, datasets: dict[str, Callable[[int], Problem]], default_out: str) -> None:
    parser = argparse.ArgumentParser(description=claim)
    parser.add_argument("--datasets", nargs="+", choices=list(datasets), default=list(datasets))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=DEFAULT_METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--epochs", type=int, help="instead of the dataset's own")
    parser.add_argument("--rows", type=int, help="train on the first so many rows only")
    parser.add_argument("--no-tuning", action="store_true", help="take each method's first variant")
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
    content: dict[str, Any] = {"claim": claim, "tuning": [], "runs": []}
    if options.out.exists():
        content = json.loads(options.out.read_text(encoding="utf-8"))
    runs, tuning = content["runs"], content["tuning"]

    def add(found: list[dict[str, Any]], what: str, *run_: Any) -> None:
        """One run, unless the file has it; it is written at once."""
        problem, method, variant, seed, epochs = run_
        wanted = [problem.name, method, variant, seed, epochs * len(problem.inputs)]
        keys = ("dataset", "method", "variant", "seed", "rows_seen")
        if wanted in [[known[key] for key in keys] for known in found]:
            return
        found.append(run(*run_))
        label = f"{what}{problem.name}, {method}, {variant}, seed {seed}"
        print(f"{label}: {found[-1]['score']:.4f}", flush=True)
        content["environment"] = environment(PACKAGES, seed=seed)
        commands = content.setdefault("commands", [])
        if content["environment"]["command"] not in commands:
            commands.append(content["environment"]["command"])
        content["summary"] = summary(runs)
        write_json(options.out, content)

    def problem_of(name: str, seed: int) -> Problem:
        problem = datasets[name](seed)
        rows = options.rows or len(problem.inputs)
        return replace(problem, inputs=problem.inputs[:rows], labels=problem.labels[:rows])

    if not options.no_tuning:
        for name in options.datasets:
            problem = problem_of(name, TUNING_SEED)
            if problem.tuned_as:
                problem = problem_of(problem.tuned_as, TUNING_SEED)
            epochs = min(problem.tuning_epochs, options.epochs or problem.tuning_epochs)
            for method in options.methods:
                for variant in METHODS[method]:
                    add(tuning, "tuning: ", problem, method, variant, TUNING_SEED, epochs)
    # Seeds outermost and methods innermost: timings that are compared are taken together.
    for seed in options.seeds:
        for name in options.datasets:
            problem = problem_of(name, seed)
            for method in options.methods:
                variant = chosen(tuning, problem.tuned_as or name, method)
                add(runs, "", problem, method, variant, seed, options.epochs or problem.epochs)
    show(summary(runs))
