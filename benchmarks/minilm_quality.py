"""At equal parameters, fits to data keep far more of a sentence encoder than truncated SVD does.

The 36 encoder Linears of all-MiniLM-L6-v2 are compressed to each ratio of their parameters, and the
embeddings of sentences that no method has seen are compared with the dense model's: mean cosine,
and Spearman correlation of the similarities of all pairs. Every method has the same parameters
(biases, norms and pivot indices not counted) and the same calibration sentences:

    truncated SVD            of the weights, uniform; with larger bond dimensions in the identity
                             gauge
    whitened SVD             in the metric of each layer's inputs in the dense model, uniform
    sequential               the same on the inputs of the compressed prefix, with repaired streams
    ours                     compress(ratio=R, of="layers", data=...): metric of inputs and
                             gradients, bond dimensions by sensitivity
    ours, identity gauge     the same with gauge="identity": larger bond dimensions
    ..., healed              then distill(steps=STEPS) of embeddings and hidden states on the
                             calibration's and --healing-sentences more sentences, 32 a step, at
                             --healed-ratios, for --healed-methods

For comparison in bytes, the same layers quantized (simulated; weight only): int8 by rows, int4 in
blocks of 32. Sentences: paragraphs of the `fortunes` package, split at random by the seed. Rows
are written as they come: a run that was stopped goes on from there.

--whole 4 8 12 measures the whole model instead, embeddings included, as ONNX files of 1/4, 1/8 and
1/12 of the dense file's bytes; see benchmarks/bytes.py.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common import PeakMemory, environment, print_table, write_json
from sentences import (
    Embedder,
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
from mpocompress.loading import as_batches
from mpocompress.mpo import linalg
from mpocompress.mpo.fit import fit
from mpocompress.mpo.identity_gauge import Gauge
from mpocompress.mpo.metric import Metric
from mpocompress.planning import Plan
from mpocompress.surgery import WeightSite, copy_with_replacements, find_weights
from mpocompress.tuning import FitOptions, SitePlan, fit_in_sequence, take_statistics, with_fitted

LAYERS = ["encoder.*"]
PACKAGES = ("mpocompress", "torch", "transformers", "numpy")
Method = Callable[[nn.Module, list[Tokens], float, int], nn.Module]


def _uniform(model: nn.Module, ratio: float, gauge: Gauge = "none") -> Plan:
    return mpo.plan(model, ratio=ratio, of="layers", layout="svd", include=LAYERS, gauge=gauge)


def _truncated(gauge: Gauge) -> Method:
    def method(model: nn.Module, data: list[Tokens], ratio: float, seed: int) -> nn.Module:
        return mpo.compress(model, _uniform(model, ratio, gauge), seed=seed).model

    return method


def whitened(model: nn.Module, data: list[Tokens], ratio: float, seed: int) -> nn.Module:
    return whitened_by_plan(model, data, _uniform(model, ratio), seed)


def whitened_by_plan(model: nn.Module, data: list[Tokens], plan: Plan, seed: int) -> nn.Module:
    """Return the model with each planned layer fitted in the metric of its dense inputs."""
    sites = {site.name: site for site in find_weights(model).sites}
    chosen = [sites[layer.name] for layer in plan.compressed]
    modules = [site.modules[0] for site in chosen]
    calls = list(as_batches(data))
    moments = take_statistics(model, modules, calls, seed=seed, all_data=True).layers
    replacements, biases = {}, {}
    for site, layer in zip(chosen, plan.compressed, strict=True):
        module = site.modules[0]
        input_II, mean_I, _ = moments[module].inputs.mean(centered=True)
        found = fit(site.matrix(), Metric(input_II), layer.sites(), layer.bond_dims).mpo
        replacements[site] = found
        lost_OI = (site.matrix() - found.to_dense()).double()
        biases[site.name] = (module.bias.detach().double() + lost_OI @ mean_I).float()
    result = copy_with_replacements(model, replacements)
    for name, bias in biases.items():
        result.get_submodule(name).bias.data.copy_(bias)
    return result


def sequential(model: nn.Module, data: list[Tokens], ratio: float, seed: int) -> nn.Module:
    plan = _uniform(model, ratio)
    sites = {site.name: site for site in find_weights(model).sites}
    planned = [
        SitePlan(site=sites[layer.name], layout=layer.sites(), bond_dims=tuple(layer.bond_dims))
        for layer in plan.compressed
    ]
    fitted = fit_in_sequence(model, planned, list(as_batches(data)), options=FitOptions())
    return with_fitted(model, {site: weight.mpo for site, weight in fitted.items()}, fitted)


def _ours(gauge: Gauge) -> Method:
    def method(model: nn.Module, data: list[Tokens], ratio: float, seed: int) -> nn.Module:
        return mpo.compress(
            model,
            ratio=ratio,
            of="layers",
            layout="svd",
            include=LAYERS,
            gauge=gauge,
            data=data,
            seed=seed,
        ).model

    return method


OURS = "ours, identity gauge"
METHODS: dict[str, Method] = {
    "truncated SVD": _truncated("none"),
    "truncated SVD, identity gauge": _truncated("identity"),
    "whitened SVD": whitened,
    "sequential": sequential,
    "ours": _ours("none"),
    OURS: _ours("identity"),
}
DEFAULTS = [name for name in METHODS if name != "ours"]  # the whole table in under two hours
HEALED = ["truncated SVD", OURS]  # likewise
# A step of healing is on 4 minibatches of 8 sentences: those of one minibatch have one length.
HEALING_ROWS, HEALING_ACCUMULATE = 8, 4


def heal(small: nn.Module, model: nn.Module, data: list[Tokens], steps: int, seed: int) -> None:
    """Train a compressed encoder, in place, for the dense one's embeddings and hidden states."""
    healed = mpo.distill(
        Embedder(small),
        reference=Embedder(model),
        data=[
            {name: tensor[start : start + HEALING_ROWS] for name, tensor in batch.items()}
            for batch in data
            for start in range(0, len(batch["input_ids"]), HEALING_ROWS)
        ],
        accumulate=HEALING_ACCUMULATE,
        steps=steps,
        output_loss="cosine",
        held_out=0.05,
        seed=seed,
    )
    rate = healed.learning_rates["model"]
    print(f"healed at a peak learning rate of {rate:g}", file=sys.stderr, flush=True)


def healed_encoder(
    model: nn.Module,
    data: list[Tokens],
    more: list[Tokens],
    *,
    ratio: float,
    gauge: str,
    steps: int,
    seed: int,
    folder: Path | None,
) -> nn.Module:
    """Return our encoder at a ratio, healed; from the folder if it is there, else it is kept.

    Args:
        model: dense.
        data: to fit on.
        more: to heal on.
        ratio: of the parameters of the Linears.
        gauge: "none" or "identity".
        steps: of healing.
        seed: of everything, the split of the sentences too.
        folder: of compressed models; None keeps none.
    """
    path = None if folder is None else folder / kept_name(gauge, ratio, steps, data, more, seed)
    if path is not None and path.exists():
        found: nn.Module = mpo.load(path, model=model)
        return found
    small = _ours(gauge)(model, data, ratio, seed)
    if steps:
        heal(small, model, more, steps, seed)
    if path is not None:
        mpo.save(small, path)
    return small


def kept_name(
    gauge: str, ratio: float, steps: int, data: list[Tokens], more: list[Tokens], seed: int
) -> str:
    """Return what a compressed encoder, healed or not, is called in a folder of models."""
    return f"minilm-{gauge}-{ratio:g}-{steps}-{len(data)}-{len(more)}-{seed}"


def encoder_sites(model: nn.Module) -> list[WeightSite]:
    """Return the weights that are compressed."""
    return [site for site in find_weights(model).sites if site.name.startswith("encoder.")]


def quantized(model: nn.Module, bits: int, block: int | None) -> tuple[nn.Module, float]:
    """Return the model with rounded weights, and how many times fewer bytes these layers take."""

    def rounded(weight_OI: Tensor) -> Tensor:
        grouped = weight_OI if block is None else weight_OI.reshape(-1, block)
        scale = grouped.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
        return ((grouped / scale).round() * scale).reshape(weight_OI.shape)

    def layer(module: nn.Module) -> nn.Module:
        new = nn.Linear(module.in_features, module.out_features)
        new.weight.data = rounded(module.weight.detach())
        new.bias.data = module.bias.detach().clone()
        return new

    sites = encoder_sites(model)
    dense = sum(site.parameters for site in sites) * 4
    scales = sum(s.shape[0] if block is None else s.parameters // block for s in sites)
    stored = sum(site.parameters for site in sites) * bits / 8 + scales * (4 if not block else 2)
    copied = copy_with_replacements(model, {site.modules[0]: layer for site in sites})
    return copied, dense / stored


def svd_seconds(model: nn.Module) -> float:
    """Return what one SVD of each of the encoder's weights takes."""
    sites = encoder_sites(model)
    started = time.perf_counter()
    for site in sites:
        linalg.svd(site.matrix())
    return time.perf_counter() - started


def layer_ratio(model: nn.Module, result: nn.Module) -> float:
    """Return the ratio of stored parameters of the encoder's weights, counted on the modules."""
    dense = sum(site.parameters for site in encoder_sites(model))
    layers = [module for module in result.modules() if isinstance(module, mpo.MPOLinear)]
    return dense / sum(sum(p.numel() for p in layer.cores.parameters()) for layer in layers)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One compressed model, measured.

    Attributes:
        method: of `METHODS`, or a quantizer; "NAME, healed" after distillation.
        asked: ratio that was asked for; 0 for quantizers, which have the one they have.
        ratio: reached; of the bytes for quantizers, of the parameters for all others.
        seed: of the split and of the method.
        steps: of healing; 0 without.
        cosine, spearman: on held-out sentences, against the dense model.
        seconds: that it took; of healing alone where that follows a row without.
        forward_passes: the same, in forward passes of the dense model over the calibration data.
    """

    method: str
    asked: float
    ratio: float
    seed: int
    steps: int
    cosine: float
    spearman: float
    seconds: float
    forward_passes: float

    @property
    def key(self) -> tuple[object, ...]:
        return (self.method, self.asked, self.seed, self.steps)


class Table:
    """Rows, written as they come; those that the file has are not measured again."""

    def __init__(self, path: Path | None, settings: dict[str, object]) -> None:
        self._path = path
        self._settings = settings
        self.rows: list[Row] = []
        if path is not None and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            for name, value in settings.items():
                if name != "environment" and found.get(name) != value:
                    raise SystemExit(f"error: {path} has {name} = {found.get(name)}, not {value}")
            self.rows = [Row(**row) for row in found["rows"]]

    def has(self, *key: object) -> bool:
        return any(row.key == key for row in self.rows)

    def add(self, row: Row, **more: object) -> None:
        self.rows.append(row)
        self._settings |= more
        told = f"seed {row.seed}: {row.method} at {row.ratio:.2f}"
        print(f"{told}: {row.cosine:.4f} / {row.spearman:.4f}", file=sys.stderr, flush=True)
        if self._path is not None:
            write_json(
                self._path,
                {
                    "claim": __doc__.splitlines()[0],
                    **self._settings,
                    "rows": [asdict(row) for row in self.rows],
                },
            )


def run_seed(table: Table, seed: int, options: argparse.Namespace) -> None:
    """Measure all that is missing for one split of the sentences."""
    sizes = [options.sentences, options.held_out, options.healing_sentences]
    calibration, held_out, more = split_sentences(read_sentences(), sizes, seed)
    model, tokenizer = load_encoder()
    data, batches = batches_of(tokenizer, calibration), batches_of(tokenizer, held_out)
    dense = embed(model, batches)
    started = time.perf_counter()
    embed(model, data)
    forward_seconds = time.perf_counter() - started
    svd_passes = svd_seconds(model) / forward_seconds
    memory = PeakMemory()

    def record(method: str, ratios: tuple[float, float], steps: int, seconds: float) -> None:
        cosine, spearman = fidelity(embed(result, batches), dense)
        row = Row(
            method=method,
            asked=ratios[0],
            ratio=ratios[1],
            seed=seed,
            steps=steps,
            cosine=cosine,
            spearman=spearman,
            seconds=seconds,
            forward_passes=seconds / forward_seconds,
        )
        table.add(
            row,
            forward_seconds=forward_seconds,
            one_svd_a_layer_in_forward_passes=svd_passes,
            peak_memory_bytes=memory.read(),
        )

    for bits, block in ((8, None), (4, 32)):
        name = f"int{bits}" + (f" in blocks of {block}" if block else "")
        if not table.has(name, 0.0, seed, 0):
            result, ratio = quantized(model, bits, block)
            record(name, (0.0, ratio), 0, 0.0)
    healing_data = batches_of(tokenizer, calibration + more)
    for ratio in options.ratios:
        for method in options.methods:
            steps = (
                options.steps
                if method in options.healed_methods and ratio in options.healed_ratios
                else 0
            )
            healed = f"{method}, healed"
            missing_healed = steps > 0 and not table.has(healed, ratio, seed, steps)
            measured = table.has(method, ratio, seed, 0)
            if measured and not missing_healed:
                continue
            kept = None
            if options.models and method == OURS:
                kept = options.models / kept_name("identity", ratio, 0, data, healing_data, seed)
            started = time.perf_counter()
            if measured and kept is not None and kept.exists():  # only healing is missing
                result = mpo.load(kept, model=model)
            else:
                result = METHODS[method](model, data, ratio, seed)
            seconds = time.perf_counter() - started
            if kept is not None and not kept.exists():
                mpo.save(result, kept)
            reached = layer_ratio(model, result)
            if reached < ratio:
                raise SystemExit(f"error: {method} has a ratio of {reached}, not {ratio}")
            if not measured:
                record(method, (ratio, reached), 0, seconds)
            if missing_healed:
                started = time.perf_counter()
                heal(result, model, healing_data, steps, seed)
                seconds = time.perf_counter() - started
                record(healed, (ratio, layer_ratio(model, result)), steps, seconds)
                if options.models and method == OURS:
                    name = kept_name("identity", ratio, steps, data, healing_data, seed)
                    mpo.save(result, options.models / name)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2.0, 4.0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULTS)
    parser.add_argument("--sentences", type=int, default=3000, help="for calibration")
    parser.add_argument("--held-out", type=int, default=1000, help="for evaluation")
    parser.add_argument(
        "--healing-sentences", type=int, default=6000, help="for healing, besides the calibration's"
    )
    parser.add_argument("--steps", type=int, default=1000, help="of healing; 0 for none")
    parser.add_argument("--healed-ratios", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--healed-methods", nargs="+", choices=METHODS, default=HEALED)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1], help="of the split and of the methods"
    )
    parser.add_argument("--models", type=Path, help="folder in which our models are kept")
    parser.add_argument("--whole", type=float, nargs="+", help="budgets of the whole model's file")
    parser.add_argument("--out", type=Path, help="JSON file; what it has is not run again")
    options = parser.parse_args()
    if options.whole:
        import bytes as storage

        return storage.run(
            budgets=[],
            whole_budgets=options.whole,
            sentences=options.sentences,
            held_out=options.held_out,
            healing_sentences=options.healing_sentences,
            steps=options.steps,
            seeds=options.seeds,
            out=options.out,
        )
    settings: dict[str, object] = {
        "environment": environment(PACKAGES, seed=options.seeds[0]),
        "calibration_sentences": options.sentences,
        "held_out_sentences": options.held_out,
        "healing_sentences": options.healing_sentences,
    }
    table = Table(options.out, settings)
    for seed in options.seeds:
        run_seed(table, seed, options)
    print_results(table.rows)
    return 0


def print_results(rows: Sequence[Row]) -> None:
    print_table(
        ["method", "ratio", "seed", "steps", "cosine", "Spearman", "seconds", "forward passes"],
        [
            [
                row.method,
                f"{row.ratio:.3f}" + ("" if row.asked else " (bytes)"),
                str(row.seed),
                str(row.steps),
                f"{row.cosine:.4f}",
                f"{row.spearman:.4f}",
                f"{row.seconds:.0f}",
                f"{row.forward_passes:.1f}",
            ]
            for row in sorted(rows, key=lambda row: (row.asked, row.method, row.steps, row.seed))
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
