"""The runs of digits_extreme.py: what they are, where they are kept, and their tables and plot."""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import print_table, write_json

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNING_SEEDS, TUNING_EPOCHS = (1000, 1001, 1002), (1, 3, 30)  # never reported
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


def chosen(names: Sequence[str] | None) -> Iterator[Method]:
    for method in METHODS:
        if not names or any(name in str(method) for name in names):
            yield method


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
    """The runs that have ended, in a file, all healed at one temperature."""

    def __init__(self, path: Path, facts: dict[str, Any], temperature: float) -> None:
        self._path = path
        self._facts = facts
        self.temperature = temperature
        self.found: dict[tuple[object, ...], Run] = {}
        self.dense: dict[int, float] = {}  # accuracy by seed
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["temperature"] != temperature:
                raise SystemExit(f"{path} has runs of --temperature {content['temperature']:g}")
            for row in content["runs"]:
                run = Run(**row)
                self.found[run.key] = run
            self.dense = {int(k): value for k, value in content["dense_accuracy"].items()}

    def add(self, run: Run) -> None:
        self.found[run.key] = run
        self.write()

    def write(self) -> None:
        content = {
            **self._facts,
            "temperature": self.temperature,
            "dense_accuracy": self.dense,
            "runs": [asdict(run) for run in self.found.values()],
        }
        write_json(self._path, content)

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


def print_results(runs: Runs) -> None:
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
    print(f"dense: {statistics.mean(runs.dense.values()):.1%} of the held-out images right")


Values = dict[tuple[str, str, float, int], dict[int, float]]


def _by_seed(runs: Runs, what: str) -> Values:
    """Accuracy or agreement in percent by layout, start, ratio and epochs, then by seed."""
    found: Values = {}
    for run in runs.reported:
        key = (run.layout, run.start, run.ratio, run.epochs)
        found.setdefault(key, {})[run.seed] = 100 * getattr(run, what)
    return found


def _difference(a: dict[int, float], b: dict[int, float]) -> tuple[float, float]:
    """Mean of a - b over the seeds that both have, and its standard error."""
    differences = [a[seed] - b[seed] for seed in a.keys() & b.keys()]
    deviation = statistics.stdev(differences) if len(differences) > 1 else float("inf")
    return statistics.mean(differences), deviation / len(differences) ** 0.5


def print_claims(runs: Runs) -> None:
    """Print by how many points `auto` is better than others, ± the standard error."""
    accuracy = _by_seed(runs, "accuracy")
    of_dense = {seed: 100 * value for seed, value in runs.dense.items()}
    rows = []
    for layout, start, ratio, epochs in sorted(accuracy, key=lambda key: key[2:]):
        if layout != AUTO.layout:
            continue
        ours = accuracy[layout, start, ratio, epochs]
        others = {
            key[:2]: values
            for key, values in accuracy.items()
            if key[2:] == (ratio, epochs) and key[0] != AUTO.layout
        }

        def against(
            is_meant: Callable[[str], bool],
            ours: dict[int, float] = ours,
            others: dict[tuple[str, str], dict[int, float]] = others,
        ) -> str:
            meant = {key: values for key, values in others.items() if is_meant(key[0])}
            if not meant:
                return ""
            best = max(meant, key=lambda key: statistics.mean(meant[key].values()))
            mean, error = _difference(ours, meant[best])
            return f"{mean:+.1f} ±{error:.1f} ({best[0]}, {best[1]})"

        mean, error = _difference(ours, of_dense)
        cells = [f"{mean:+.1f} ±{error:.1f}"]
        cells += [
            against(CONTROLS.__contains__),
            against("svd".__eq__),
            against(lambda name: name not in CONTROLS),
        ]
        rows.append([f"{ratio:g}, {epochs} epochs", *cells])
    print("\npoints of accuracy by which auto is better, ± standard error, paired by seeds")
    header = ["layers' ratio", "than dense", "than small dense", "than SVD", "than the best layout"]
    print_table(header, rows)


def print_starts(runs: Runs) -> None:
    """Print for how many epochs a fitted start heals to be as good as a random one.

    As good: its mean is lower by no more than the standard error of the paired difference.
    """
    accuracy, agreement = _by_seed(runs, "accuracy"), _by_seed(runs, "agreement")
    rows = []
    for layout, start, ratio, epochs in sorted(accuracy, key=lambda key: (key[2], key[0], key[3])):
        rival = "4 sites" if layout == AUTO.layout else layout
        if start != "fitted" or (rival, "random", ratio, epochs) not in accuracy or not epochs:
            continue
        cells = []
        for values in (accuracy, agreement):
            random = values[rival, "random", ratio, epochs]
            enough = [
                n
                for n in sorted({key[3] for key in values if key[:3] == (layout, start, ratio)})
                for mean, error in [_difference(values[layout, start, ratio, n], random)]
                if mean >= -error
            ]
            cells += [f"{statistics.mean(random.values()):.1f}", str(enough[0] if enough else "-")]
        name = f"{ratio:g}: {layout}" + (f" (random: {rival})" if rival != layout else "")
        rows.append([f"{name}, {epochs} epochs", *cells])
    print("\na random start after some epochs, and after how many a fitted one is as good")
    print_table(["layers' ratio: layout", "accuracy", "fitted", "agreement", "fitted"], rows)


def draw(runs: Runs, path: Path) -> None:
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
        axes.axhline(statistics.mean(runs.dense.values()), color="grey", linewidth=1, label="dense")
        if n:  # all but SVD lie in a tenth; where that leaves the panel, the table has it
            axes.set_ylim(0.86, 0.97)
        axes.set(
            xscale="log",
            xlabel="ratio of the two layers",
            title="not healed" if n == 0 else f"{n} epoch" + "s" * (n > 1),
        )
    figure.axes[0].set_ylabel("accuracy on held-out images")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
