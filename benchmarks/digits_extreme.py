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

Every method heals for the same steps with the same loop (cross-entropy to the dense model's
softmax, both at a --temperature; Adam, cosine decay, batches of 100; 40 steps are an epoch), at the
most accurate of four rates for its layout, start, ratio and length (1, 3 and 30 epochs; 10 take the
rate of 30), found on three teachers and splits that are not reported. One-shot figures stand at 0
epochs.

Runs are written to --out as they end, and those found there are not run again: a run that was
stopped, or a second one with more seeds, goes on from there. A plot is drawn beside it.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import environment
from digits_runs import (
    CONTROLS,
    RATES,
    TUNING_EPOCHS,
    TUNING_SEEDS,
    Method,
    Run,
    Runs,
    chosen,
    draw,
    print_claims,
    print_results,
    print_starts,
)
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
TEACHER_EPOCHS = 12
SWEEPS = 12
HEAD = "4"  # small, and dense in all; left out of ratios of the layers


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


def heal(
    model: nn.Module, given: Problem, epochs: int, rate: float, seed: int, temperature: float
) -> None:
    """Train in place to give the dense model's logits."""
    with torch.no_grad():
        target_BK = (given.dense(given.images_BI) / temperature).softmax(dim=1)
    steps = epochs * -(-len(given.images_BI) // BATCH)
    shuffler = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(given.images_BI), generator=shuffler).split(BATCH):
            optimizer.zero_grad()
            logits_BK = model(given.images_BI[batch]) / temperature
            loss = nn.functional.cross_entropy(logits_BK, target_BK[batch])
            (temperature**2 * loss).backward()
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
        heal(start, given, n, rates[n], seed, runs.temperature)
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--epochs", type=int, nargs="+", default=list(EPOCHS))
    parser.add_argument("--methods", nargs="+", help="parts of names, such as 'svd' or 'fitted'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of the softmaxes in healing"
    )
    parser.add_argument("--out", type=Path, default=Path("digits_extreme.json"))
    parser.add_argument("--table-only", action="store_true", help="of what --out has; run nothing")
    options = parser.parse_args()

    facts = environment(PACKAGES, seed=options.seeds[0])
    claim = __doc__.splitlines()[0]
    runs = Runs(options.out, {"claim": claim, "environment": facts}, options.temperature)
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
    for seed in {run.seed for run in runs.reported} - runs.dense.keys():
        runs.dense[seed] = judge(problem(seed).dense, problem(seed))[0]
    if not options.table_only:  # which is not what made the runs
        runs.write()
    print_results(runs)
    print_claims(runs)
    print_starts(runs)
    draw(runs, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
