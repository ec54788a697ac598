"""What a report warns of: what is not better, or not known, and what can be done about it."""

from mpocompress.report.layer import LayerReport
from mpocompress.report.schema import CompressionReport
from mpocompress.report.wording import (
    Code,
    Option,
    Sentence,
    is_svd,
    is_unchanged,
    percent,
    plural,
    reason_text,
    relative_error,
    times,
)

# Above this, weights or outputs have moved so far that nobody should ship without measuring.
_LARGE_ERROR = 0.3
# A kept weight is worth a sentence if it holds this share of all that is left.
_LARGE_KEPT_SHARE = 0.25


def cautions(report: CompressionReport) -> tuple[Sentence, ...]:
    """What is not better, or not known, and what can be done about it."""
    found: list[Sentence | None] = [
        _caution_large_error(report),
        _caution_not_reached(report),
        _caution_few_rows(report),
        _caution_macs(report),
        _caution_larger_layers(report),
        _caution_large_kept(report),
    ]
    return tuple(sentence for sentence in found if sentence is not None)


def _caution_large_error(report: CompressionReport) -> Sentence | None:
    """By what tells most: the model's outputs on data, those of its layers, or weights."""
    remedies = (
        " A larger ",
        Option("--max-size" if report.rounded_layers else "--bond-dim"),
        " keeps more and ",
        Option("--exclude"),
        f" leaves a layer as it was{_remedies(report)}.",
    )
    change = report.output_change
    if change is not None:
        if change.measured is None or change.measured < _LARGE_ERROR:
            return None
        return (
            "Outputs of the model moved a lot: the relative change is "
            f"{relative_error(change.measured)}, {change.note}.",
            *remedies,
        )
    outputs = {layer.name: layer.relative_output_error for layer in report.compressed_layers}
    weights = {layer.name: layer.relative_weight_error for layer in report.compressed_layers}
    what, found = "Outputs of layers", outputs
    if all(error is None for error in outputs.values()):
        what, found = "Weights", weights
    errors = {name: error for name, error in found.items() if error is not None}
    if not errors or max(errors.values()) < _LARGE_ERROR:
        return None
    worst = max(errors, key=lambda name: errors[name])
    large = sum(error >= _LARGE_ERROR for error in errors.values())
    return (
        f"{what} moved a lot: the relative {'weight' if found is weights else 'output'} error is "
        f"above {percent(_LARGE_ERROR)} in {large:,} of "
        f"{plural(len(errors), 'compressed layer')}, the largest {relative_error(errors[worst])} "
        "in layer ",
        Code(worst),
        ". Some models hardly notice and others break.",
        *remedies,
    )


def _remedies(report: CompressionReport) -> str:
    """What can still be done with data."""
    if report.settings.get("distill"):
        return "; more steps of healing on more data win back more of what was lost"
    fitting = (
        ""
        if "rows_of_data" in report.settings
        else "fitting the cores to real data instead of to the weights, and by "
    )
    return (
        f"; much of what was lost is won back by {fitting}training the compressed model for some "
        "more epochs (healing)"
    )


def _caution_not_reached(report: CompressionReport) -> Sentence | None:
    """Layers that were compressed by their weights, although there were data."""
    trained = report.settings.get("distill") or report.settings.get("sweeps_on_loss")
    if "rows_of_data" not in report.settings or trained:
        return None  # training leaves no errors of layers to tell by
    missed = [
        layer.name for layer in report.compressed_layers if layer.relative_output_error is None
    ]
    if not missed:
        return None
    return (
        f"The data did not reach {len(missed):,} of "
        f"{plural(len(report.compressed_layers), 'compressed layer')}, the first being ",
        Code(missed[0]),
        ": they keep their weights, not their outputs. Give data that passes through them, or ",
        Option("--exclude"),
        " them.",
    )


def _caution_few_rows(report: CompressionReport) -> Sentence | None:
    """What so few rows show is not what comes later."""
    rows = report.settings.get("fewest_rows_at_a_layer")
    largest = report.largest_bond_dim
    if not isinstance(rows, int) or rows >= largest:
        return None
    return (
        f"Data are few: a layer saw only {plural(rows, 'row')}, and bond dimensions go up to "
        f"{largest:,}. What is fitted to so few may miss others; give some times as many.",
    )


def _caution_macs(report: CompressionReport) -> Sentence | None:
    ratio = report.totals.macs.model.ratio
    slower = [layer for layer in report.compressed_layers if _needs_more_macs(layer)]
    if not slower:
        return None
    layers = (
        "the one compressed layer does"
        if len(slower) == len(report.compressed_layers) == 1
        else f"{len(slower):,} of {len(report.compressed_layers):,} compressed layers "
        f"{'does' if len(slower) == 1 else 'do'}"
    )
    whole = (
        f"More work, not less: one row through the model takes {times(1 / ratio)} as many "
        f"multiply-adds as before, because {layers} more of them than their dense matrices"
        if 0 < ratio < 1 and not is_unchanged(ratio)
        else f"Not every layer is less work: {layers} more multiply-adds than before"
    )
    if all(is_svd(layer.layout or []) for layer in slower):
        return (f"{whole}. A smaller ", Option("--bond-dim"), " makes them cheaper.")
    return (
        f"{whole}. If speed counts, force ",
        Option("--layout svd"),
        ", the layout with the fewest multiply-adds per stored parameter, or take a smaller ",
        Option("--bond-dim"),
        ".",
    )


def _caution_larger_layers(report: CompressionReport) -> Sentence | None:
    larger = [
        layer
        for layer in report.compressed_layers
        if layer.parameters.compressed >= layer.parameters.dense and layer.precision is None
    ]
    if not larger:
        return None
    more = f" and {plural(len(larger) - 1, 'other layer')}" if len(larger) > 1 else ""
    return (
        Code(larger[0].name),
        f"{more} did not become smaller: the bond dimension is too large for the matrix. Take a "
        "smaller ",
        Option("--bond-dim"),
        ", or leave such layers out with ",
        Option("--exclude"),
        ".",
    )


def _caution_large_kept(report: CompressionReport) -> Sentence | None:
    total = report.totals.parameters.model.compressed
    largest = max(report.kept_layers, key=lambda layer: layer.parameters.compressed, default=None)
    if largest is None or not report.compressed_layers:
        return None
    share = largest.parameters.compressed / total
    if share < _LARGE_KEPT_SHARE:
        return None
    return (
        f"{percent(share)} of all remaining parameters sit in ",
        Code(largest.name),
        f", which was kept ({reason_text(largest).rstrip('.')}). The whole model cannot become "
        "smaller than that, however much the other layers shrink.",
    )


def _needs_more_macs(layer: LayerReport) -> bool:
    return layer.macs.compressed > layer.macs.dense
