"""At equal parameters, fits to data keep far more of a sentence encoder than truncated SVD does.

The 36 encoder Linears of all-MiniLM-L6-v2 are compressed to each ratio of their parameters, and the
embeddings of sentences that no method has seen are compared with the dense model's: mean cosine,
and Spearman correlation of the similarities of all pairs. Every method has the same parameters
(biases, norms and pivot indices not counted) and the same calibration sentences:

    truncated SVD            of the weights, uniform
    whitened SVD             in the metric of each layer's inputs in the dense model, uniform
    sequential               the same on the inputs of the compressed prefix, with repaired streams
    ours                     compress(ratio=R, of="layers", data=...): metric of inputs and
                             gradients, bond dimensions by sensitivity
    ours, identity gauge     the same with gauge="identity": larger bond dimensions
    ours, gauge, healed      and distill=STEPS

For comparison in bytes, the same layers quantized (simulated; weight only): int8 by rows, int4 in
blocks of 32. Sentences: paragraphs of the `fortunes` package, split at random by --seed.

--whole 4 8 12 measures the whole model instead, embeddings included, as ONNX files of 1/4, 1/8 and
1/12 of the dense file's bytes; see benchmarks/bytes.py.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

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
from mpocompress.loading import as_batches
from mpocompress.mpo import MPO
from mpocompress.mpo.fit import fit
from mpocompress.mpo.metric import Metric
from mpocompress.planning import Plan
from mpocompress.surgery import copy_with_replacements, find_weights
from mpocompress.tuning import FitOptions, SitePlan, fit_in_sequence, layer_moments

LAYERS = ["encoder.*"]
PACKAGES = ("mpocompress", "torch", "transformers", "numpy")
Method = Callable[[nn.Module, list[Tokens], float, int, int], nn.Module]


def _uniform(model: nn.Module, ratio: float) -> Plan:
    return mpo.plan(model, ratio=ratio, of="layers", layout="svd", include=LAYERS)


def truncated(
    model: nn.Module, data: list[Tokens], ratio: float, steps: int, seed: int
) -> nn.Module:
    return mpo.compress(model, _uniform(model, ratio), seed=seed).model


def whitened(
    model: nn.Module, data: list[Tokens], ratio: float, steps: int, seed: int
) -> nn.Module:
    return whitened_by_plan(model, data, _uniform(model, ratio), seed)


def whitened_by_plan(model: nn.Module, data: list[Tokens], plan: Plan, seed: int) -> nn.Module:
    """Return the model with each planned layer fitted in the metric of its dense inputs."""
    sites = {site.name: site for site in find_weights(model).sites}
    chosen = [sites[layer.name] for layer in plan.compressed]
    modules = [site.modules[0] for site in chosen]
    moments = layer_moments(model, modules, list(as_batches(data)), seed=seed, all_data=True)
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


def sequential(
    model: nn.Module, data: list[Tokens], ratio: float, steps: int, seed: int
) -> nn.Module:
    plan = _uniform(model, ratio)
    sites = {site.name: site for site in find_weights(model).sites}
    planned = [
        SitePlan(site=sites[layer.name], layout=layer.sites(), bond_dims=tuple(layer.bond_dims))
        for layer in plan.compressed
    ]
    fitted = fit_in_sequence(model, planned, list(as_batches(data)), options=FitOptions())
    mpos: dict[object, MPO] = {site: weight.mpo for site, weight in fitted.items()}
    result = copy_with_replacements(model, mpos)
    for site, weight in fitted.items():
        if weight.bias is not None:
            result.get_submodule(site.name).bias.data.copy_(weight.bias)
    return result


def _ours(gauge: str, *, healed: bool = False) -> Method:
    def method(
        model: nn.Module, data: list[Tokens], ratio: float, steps: int, seed: int
    ) -> nn.Module:
        return mpo.compress(
            model,
            ratio=ratio,
            of="layers",
            layout="svd",
            include=LAYERS,
            gauge=gauge,
            data=data,
            distill=steps if healed else 0,
            seed=seed,
        ).model

    return method


METHODS: dict[str, Method] = {
    "truncated SVD": truncated,
    "whitened SVD": whitened,
    "sequential": sequential,
    "ours": _ours("none"),
    "ours, identity gauge": _ours("identity"),
    "ours, gauge, healed": _ours("identity", healed=True),
}


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

    sites = [site for site in find_weights(model).sites if site.name.startswith("encoder.")]
    dense = sum(site.parameters for site in sites) * 4
    scales = sum(s.shape[0] if block is None else s.parameters // block for s in sites)
    stored = sum(site.parameters for site in sites) * bits / 8 + scales * (4 if not block else 2)
    copied = copy_with_replacements(model, {site.modules[0]: layer for site in sites})
    return copied, dense / stored


def layer_ratio(model: nn.Module, result: nn.Module) -> float:
    """Return the ratio of stored parameters of the encoder's weights, counted on the modules."""
    dense = sum(s.parameters for s in find_weights(model).sites if s.name.startswith("encoder."))
    layers = [module for module in result.modules() if isinstance(module, mpo.MPOLinear)]
    return dense / sum(sum(p.numel() for p in layer.cores.parameters()) for layer in layers)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2.0, 4.0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sentences", type=int, default=1000, help="for calibration")
    parser.add_argument("--held-out", type=int, default=1000, help="for evaluation")
    parser.add_argument("--steps", type=int, default=400, help="of healing")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the methods")
    parser.add_argument("--whole", type=float, nargs="+", help="budgets of the whole model's file")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    if options.whole:
        import bytes as storage

        return storage.run(
            budgets=[],
            whole_budgets=options.whole,
            sentences=options.sentences,
            held_out=options.held_out,
            steps=options.steps,
            seed=options.seed,
            out=options.out,
        )

    calibration, held_out = split_sentences(
        read_sentences(), [options.sentences, options.held_out], options.seed
    )
    model, tokenizer = load_encoder()
    data, batches = batches_of(tokenizer, calibration), batches_of(tokenizer, held_out)
    facts = environment(PACKAGES, seed=options.seed)
    dense = embed(model, batches)
    started = time.perf_counter()
    embed(model, data)
    forward_seconds = time.perf_counter() - started
    rows: list[dict[str, object]] = []

    def record(method: str, ratio: float, unit: str, seconds: float, result: nn.Module) -> None:
        cosine, spearman = fidelity(embed(result, batches), dense)
        rows.append(
            {
                "method": method,
                "ratio": ratio,
                "ratio_of": unit,
                "cosine": cosine,
                "spearman": spearman,
                "seconds": seconds,
                "forward_passes": seconds / forward_seconds,
            }
        )
        print(
            f"{method} at {ratio:.2f}: {cosine:.4f} / {spearman:.4f}", file=sys.stderr, flush=True
        )

    memory = PeakMemory()
    for bits, block in ((8, None), (4, 32)):
        result, ratio = quantized(model, bits, block)
        record(
            f"int{bits}" + (f" in blocks of {block}" if block else ""), ratio, "bytes", 0, result
        )
    for ratio in options.ratios:
        for method in options.methods:
            started = time.perf_counter()
            result = METHODS[method](model, data, ratio, options.steps, options.seed)
            seconds = time.perf_counter() - started
            reached = layer_ratio(model, result)
            if reached < ratio:
                raise SystemExit(f"error: {method} has a ratio of {reached}, not {ratio}")
            record(method, reached, "parameters", seconds, result)
    print_results(rows, forward_seconds, memory.read())
    if options.out:
        write_json(
            options.out,
            {
                "claim": __doc__.splitlines()[0],
                "environment": facts,
                "calibration_sentences": options.sentences,
                "held_out_sentences": options.held_out,
                "healing_steps": options.steps,
                "forward_seconds": forward_seconds,
                "peak_memory_bytes": memory.read(),
                "rows": rows,
            },
        )
    return 0


def print_results(
    rows: Sequence[dict[str, object]], forward_seconds: float, peak_bytes: int
) -> None:
    print_table(
        ["method", "ratio", "of", "cosine", "Spearman", "seconds", "forward passes"],
        [
            [
                str(row["method"]),
                f"{row['ratio']:.3f}",
                str(row["ratio_of"]),
                f"{row['cosine']:.4f}",
                f"{row['spearman']:.4f}",
                f"{row['seconds']:.0f}",
                f"{row['forward_passes']:.1f}",
            ]
            for row in rows
        ],
    )
    print(
        f"one forward pass of the calibration sentences takes {forward_seconds:.1f} s; "
        f"peak memory {peak_bytes / 1e6:.0f} MB above the loaded model"
    )


if __name__ == "__main__":
    sys.exit(main())
