"""At 100x and more, healed four-site MPOs beat healed SVD and small dense networks by points.

The two large layers of the digit classifier 784-1024-1024-10 are replaced at equal ratios of their
parameters, and trained to give the dense model's logits on 4,000 images without labels; all is
judged on 1,000 other images: accuracy, and agreement with the dense model's digit.

Layouts: SVD, and balanced MPOs of 2 to 5 sites, each from three starts:

    weights   sequential SVD of the weights
    fitted    compress(ratio=R, data=...): fits to what the layers compute, by sweeps; the head
              stays dense and is corrected for what is lost before it
    random    cores drawn at random, variance-preserving; the head and all biases are the dense ones

`auto` is compress(ratio=R, data=..., distill=STEPS) with no layout given. Controls: dense networks
784-h-10 and 784-h-h-10 of as many parameters in all, drawn at random, trained likewise.

Every method heals for the same steps with the same loop (Adam, cosine decay, batches of 100; 40
steps are an epoch), at the most accurate of four rates for its layout, start, ratio and length (1,
3 and 30 epochs; 10 take the rate of 30), found on three teachers and splits that are not reported.
One-shot figures stand at 0 epochs.

Runs are written to --out as they end, and those found there are not run again: a run that was
stopped, or a second one with more seeds, goes on from there. A plot is drawn beside it.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import environment, print_table, write_json
from torch import Tensor, nn

import mpocompress as mpo
from mpocompress.errors import BudgetError
from mpocompress.loading import as_batches
from mpocompress.mpo.factorize import random_cores
from mpocompress.surgery import find_weights
from mpocompress.tuning import (
    FitOptions,
    SitePlan,
    correction_plans,
    fit_in_sequence,
    take_statistics,
    with_fitted,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "digits"))
from classifier import build_classifier
from train import BATCH, load_digits, split_by_digit, train

PACKAGES = ("mpocompress", "torch", "numpy", "mlxtend")
RATIOS = (10.0, 30.0, 60.0, 130.0, 250.0, 500.0, 860.0)
EPOCHS = (1, 3, 10, 30)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNING_SEEDS, TUNING_EPOCHS = (1000, 1001, 1002), (1, 3, 30)  # never reported
TEACHER_EPOCHS = 12
SWEEPS = 12
HEAD = "4"  # small, and dense in all; left out of ratios of the layers
LAYOUTS = ("svd", "2 sites", "3 sites", "4 sites", "5 sites")
STARTS = ("weights", "fitted", "random")
CONTROLS = ("784-h-10", "784-h-h-10")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A layout and a start, or a control."""

    layout: str
    start: str

    def __str__(self) -> str:
        return f"{self.layout}, {self.start}"


AUTO = Method(layout="auto", start="fitted")
METHODS = (
    AUTO,
    *(Method(layout=layout, start=start) for layout in LAYOUTS for start in STARTS),
    *(Method(layout=layout, start="random") for layout in CONTROLS),
)


@dataclass(frozen=True)
class Problem:
    """A teacher and its data."""

    dense: nn.Module
    images_BI: Tensor
    held_out_BI: Tensor
    digits_B: Tensor

    @property
    def data(self) -> list[Tensor]:
        return list(self.images_BI.split(500))


@cache
def problem(seed: int) -> Problem:
    """Train a teacher on 4,000 images of a split by this seed."""
    images, digits = load_digits()
    training, held_out = split_by_digit(digits, seed)
    images_BI = torch.from_numpy(images[training])
    dense = build_classifier(seed)
    steps = TEACHER_EPOCHS * -(-len(training) // BATCH)
    train(dense, images_BI, torch.from_numpy(digits[training]), steps, seed)
    return Problem(
        dense.eval(),
        images_BI,
        torch.from_numpy(images[held_out]),
        torch.from_numpy(digits[held_out]),
    )


def layout_options(layout: str) -> dict[str, Any]:
    if layout == "auto":
        return {}
    return {"layout": "svd"} if layout == "svd" else {"sites": int(layout[0])}


@lru_cache(maxsize=1)  # the rates of the tuning begin with the same model
def build(method: Method, ratio: float, seed: int, steps: int) -> nn.Module | None:
    """Return the model before healing, to be copied; None if this layout cannot be that small."""
    given = problem(seed)
    if method.layout in CONTROLS:
        reference = build(Method(layout="4 sites", start="weights"), ratio, seed, steps)
        if reference is None:
            return None
        return small_dense(method.layout, sum(p.numel() for p in reference.parameters()), seed)
    options = budget(given.dense, method.layout, ratio)
    if options is None:
        return None
    if method.start == "fitted":
        try:
            return fitted(given, options, seed, steps)
        except BudgetError:  # auto finds out on the data
            return None
    model = mpo.compress(given.dense, **options, seed=seed).model
    if method.start == "random":
        generator = torch.Generator().manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, mpo.MPOLinear):
                variance = 2 / layer.in_features  # before a ReLU
                layer.set_cores_(
                    random_cores(
                        layer.layout, layer.bond_dims, variance=variance, generator=generator
                    )
                )
    return model


def budget(dense: nn.Module, layout: str, ratio: float) -> dict[str, Any] | None:
    """Return what to ask for so that both layers together get smaller by a ratio.

    Bond dimension 1 stands for a ratio that is up to a tenth above what it gives; None beyond that.
    A plan for "layers" may leave one of them dense, which then is not among those layers.
    """
    common = {"exclude": [HEAD], **layout_options(layout)}
    options = {"ratio": ratio, "of": "layers", **common}
    if layout == "auto":  # decides by data, and what it leaves dense is counted as such
        return options
    try:
        if len(mpo.plan(dense, **options).compressed) == 2:
            return options
    except BudgetError:
        pass
    options = {"bond_dim": 1, **common}
    least = sum(layer.parameters for layer in mpo.plan(dense, **options).compressed)
    return options if layers_of(dense) >= 0.9 * ratio * least else None


def layers_of(dense: nn.Module) -> int:
    """Parameters of the two layers."""
    return sum(dense[index].weight.numel() for index in (0, 2))


def fitted(given: Problem, options: dict[str, Any], seed: int, steps: int) -> nn.Module:
    """Do what compress(..., distill=steps) does before it heals."""
    calls = list(as_batches(given.data))
    plan = mpo.plan(given.dense, **options, data=given.data, distill=steps, seed=seed)
    sites = {site.name: site for site in find_weights(given.dense).sites}
    planned = [
        SitePlan(site=sites[layer.name], layout=layer.sites(), bond_dims=tuple(layer.bond_dims))
        for layer in plan.compressed
    ]
    kept = [sites[layer.name] for layer in plan.layers if layer.action == "keep"]
    modules = [entry.site.modules[0] for entry in planned]
    moments = take_statistics(given.dense, modules, calls, seed=seed).layers
    found = fit_in_sequence(
        given.dense,
        [*planned, *correction_plans(given.dense, kept, planned, calls)],
        calls,
        output_metrics={module: moment.output_metric for module, moment in moments.items()},
        options=FitOptions(sweeps=SWEEPS),
    )
    mpos = {entry.site: found[entry.site].mpo for entry in planned}
    return with_fitted(given.dense, mpos, found)


def small_dense(layout: str, parameters: int, seed: int) -> nn.Module:
    """Build the widest network of this form with no more parameters than that."""

    def widths(hidden: int) -> list[int]:
        return [784, *[hidden] * (layout.count("h")), 10]

    def size(hidden: int) -> int:
        sizes = widths(hidden)
        return sum((a + 1) * b for a, b in pairwise(sizes))

    hidden = next(h for h in range(1, 2000) if size(h + 1) > parameters)
    sizes = widths(hidden)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def heal(model: nn.Module, given: Problem, epochs: int, rate: float, seed: int) -> None:
    """Train in place to give the dense model's logits."""
    with torch.no_grad():
        target_BK = given.dense(given.images_BI).softmax(dim=1)
    steps = epochs * -(-len(given.images_BI) // BATCH)
    shuffler = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(given.images_BI), generator=shuffler).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(given.images_BI[batch]), target_BK[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def judge(model: nn.Module, given: Problem) -> tuple[float, float]:
    """Return accuracy and agreement with the dense model, on the held-out images."""
    with torch.no_grad():
        found_B = model(given.held_out_BI).argmax(1)
        dense_B = given.dense(given.held_out_BI).argmax(1)
    right = (found_B == given.digits_B).double().mean()
    return float(right), float((found_B == dense_B).double().mean())


@dataclass(frozen=True, kw_only=True)
class Run:
    """One healed model."""

    layout: str
    start: str
    ratio: float
    seed: int
    epochs: int
    rate: float
    accuracy: float
    agreement: float
    layers_ratio: float
    model_ratio: float

    @property
    def key(self) -> tuple[object, ...]:
        return (self.layout, self.start, self.ratio, self.seed, self.epochs, self.rate)


class Runs:
    """The runs that have ended, in a file."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self._path = path
        self._facts = facts
        self.found: dict[tuple[object, ...], Run] = {}
        if path.exists():
            for row in json.loads(path.read_text(encoding="utf-8"))["runs"]:
                run = Run(**row)
                self.found[run.key] = run

    def add(self, run: Run) -> None:
        self.found[run.key] = run
        self.write()

    def write(self, **more: Any) -> None:
        runs = [asdict(run) for run in self.found.values()]
        write_json(
            self._path,
            {"claim": __doc__.splitlines()[0], "environment": self._facts, **more, "runs": runs},
        )

    def best_rate(self, method: Method, ratio: float, epochs: int) -> float:
        """Return the most accurate rate on the tuning teachers; 0 for no epochs."""
        if epochs == 0:
            return 0.0
        tuned = next((n for n in TUNING_EPOCHS if n >= epochs), TUNING_EPOCHS[-1])
        totals = dict.fromkeys(RATES, (0.0, 0.0))
        for seed in TUNING_SEEDS:
            for rate, (accuracy, agreement) in totals.items():
                run = self.found[(method.layout, method.start, ratio, seed, tuned, rate)]
                totals[rate] = (accuracy + run.accuracy, agreement + run.agreement)
        return max(totals, key=lambda rate: totals[rate])

    @property
    def reported(self) -> list[Run]:
        """Those of other teachers, at the best rates: a file may have others, too."""
        found = [run for run in self.found.values() if run.seed not in TUNING_SEEDS]
        best: dict[tuple[str, str, float, int], float] = {}
        for key in {(run.layout, run.start, run.ratio, run.epochs) for run in found}:
            method = Method(layout=key[0], start=key[1])
            if self._tuned(method, key[2]):
                best[key] = self.best_rate(method, *key[2:])
        return [
            run
            for run in found
            if best.get((run.layout, run.start, run.ratio, run.epochs)) == run.rate
        ]

    def _tuned(self, method: Method, ratio: float) -> bool:
        return all(
            (method.layout, method.start, ratio, seed, epochs, rate) in self.found
            for seed in TUNING_SEEDS
            for epochs in TUNING_EPOCHS
            for rate in RATES
        )


def measure(
    runs: Runs, method: Method, ratio: float, seed: int, epochs: Sequence[int], rate: float | None
) -> bool:
    """Heal a method for each number of epochs, unless that was done; False if it does not exist."""
    rates = {n: rate or runs.best_rate(method, ratio, n) for n in epochs}
    wanted = [
        n
        for n in epochs
        if (method.layout, method.start, ratio, seed, n, rates[n]) not in runs.found
    ]
    if not wanted:
        return True
    given = problem(seed)
    steps = max(epochs) * -(-len(given.images_BI) // BATCH)
    built = build(method, ratio, seed, steps)
    if built is None:
        return False
    start = copy.deepcopy(built)
    state = {name: value.clone() for name, value in start.state_dict().items()}
    kept = sum(p.numel() for p in start.parameters())
    dense = sum(p.numel() for p in given.dense.parameters())
    in_layers = 0
    if method.layout not in CONTROLS:
        in_layers = sum(
            p.numel()
            for layer in (start[0], start[2])
            for p in (layer.cores.parameters() if hasattr(layer, "cores") else [layer.weight])
        )
    for n in wanted:
        start.load_state_dict(state)
        heal(start, given, n, rates[n], seed)
        accuracy, agreement = judge(start, given)
        runs.add(
            Run(
                layout=method.layout,
                start=method.start,
                ratio=ratio,
                seed=seed,
                epochs=n,
                rate=rates[n],
                accuracy=accuracy,
                agreement=agreement,
                layers_ratio=layers_of(given.dense) / in_layers if in_layers else float("nan"),
                model_ratio=dense / kept,
            )
        )
    return True


def chosen(names: Sequence[str] | None) -> Iterator[Method]:
    for method in METHODS:
        if not names or any(name in str(method) for name in names):
            yield method


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--epochs", type=int, nargs="+", default=list(EPOCHS))
    parser.add_argument("--methods", nargs="+", help="parts of names, such as 'svd' or 'fitted'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("digits_extreme.json"))
    parser.add_argument("--table-only", action="store_true", help="of what --out has; run nothing")
    options = parser.parse_args()

    runs = Runs(options.out, environment(PACKAGES, seed=options.seeds[0]))
    methods = list(chosen(options.methods))
    for seed in () if options.table_only else options.seeds:
        for ratio in options.ratios:
            for method in methods:
                tuned = all(
                    measure(runs, method, ratio, tuning_seed, TUNING_EPOCHS, rate)
                    for tuning_seed in TUNING_SEEDS
                    for rate in RATES
                )
                if tuned and measure(runs, method, ratio, seed, [0, *options.epochs], None):
                    print(f"seed {seed}, {ratio:g}: {method}", file=sys.stderr, flush=True)
    dense = {
        seed: judge(problem(seed).dense, problem(seed))[0]
        for seed in {run.seed for run in runs.reported}
    }
    runs.write(dense_accuracy=dense)
    print_results(runs, dense)
    draw(runs, dense, options.out.with_suffix(".png"))
    return 0


def _means(
    runs: Runs, epochs: int
) -> dict[tuple[str, str, float], tuple[float, float, float, int]]:
    """Mean and spread of the accuracy, mean agreement and seeds by layout, start and ratio."""
    groups: dict[tuple[str, str, float], list[Run]] = {}
    for run in runs.reported:
        if run.epochs == epochs:
            groups.setdefault((run.layout, run.start, run.ratio), []).append(run)
    return {
        key: (
            statistics.mean(run.accuracy for run in group),
            statistics.pstdev([run.accuracy for run in group]),
            statistics.mean(run.agreement for run in group),
            len(group),
        )
        for key, group in groups.items()
    }


def print_results(runs: Runs, dense: dict[int, float]) -> None:
    """Print accuracy in percent, mean ± spread over the seeds, and agreement in brackets."""
    reported = runs.reported
    columns = sorted({run.epochs for run in reported})
    by_epochs = {epochs: _means(runs, epochs) for epochs in columns}
    rows = []
    for ratio in sorted({run.ratio for run in reported}):
        for method in METHODS:
            key = (method.layout, method.start, ratio)
            of_key = [run for run in reported if (run.layout, run.start, run.ratio) == key]
            if not of_key:
                continue
            cells = []
            for epochs in columns:
                if key in by_epochs[epochs]:
                    mean, deviation, agreement, _ = by_epochs[epochs][key]
                    cells.append(f"{mean:.1%} ±{100 * deviation:.1f} ({agreement:.1%})")
                else:
                    cells.append("")
            rows.append(
                [
                    f"{ratio:g}: {method}",
                    f"{statistics.mean(run.layers_ratio for run in of_key):.0f}",
                    f"{statistics.mean(run.model_ratio for run in of_key):.0f}",
                    str(len({run.seed for run in of_key})),
                    *cells,
                ]
            )
    header = ["layers' ratio: method", "layers", "model", "seeds"]
    print_table([*header, *(f"{epochs} epochs" for epochs in columns)], rows)
    print(f"dense: {statistics.mean(dense.values()):.1%} of the held-out images right")


def draw(runs: Runs, dense: dict[int, float], path: Path) -> None:
    """Draw accuracy against the ratio, one panel for each number of epochs."""
    from matplotlib.figure import Figure

    epochs = sorted({run.epochs for run in runs.reported})
    figure = Figure(figsize=(4.2 * len(epochs), 4), layout="constrained")
    for panel, n in enumerate(epochs):
        axes = figure.add_subplot(1, len(epochs), panel + 1)
        means = _means(runs, n)
        for method in METHODS:
            if method.start == "weights" or (method.start == "random" and "h" not in method.layout):
                continue
            points = sorted(
                (ratio, means[key][0])
                for key in means
                for ratio in [key[2]]
                if key[:2] == (method.layout, method.start)
            )
            if points:
                style = "--" if "h" in method.layout else "-"
                axes.plot(*np.array(points).T, style, marker=".", label=method.layout)
        axes.axhline(statistics.mean(dense.values()), color="grey", linewidth=1, label="dense")
        axes.set(xscale="log", xlabel="ratio of the two layers", title=f"{n} epochs")
    first = figure.axes[0]
    first.set_ylabel("accuracy on held-out images")
    first.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
