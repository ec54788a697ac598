"""What a report says in plain language, from its numbers alone.

Everything here is a function of the report and knows neither Markdown nor HTML. Nothing is escaped
yet: that is for the renderers, which escape text and `Code` alike.
"""

import statistics
from dataclasses import dataclass
from typing import Literal

from mpocompress.report.schema import CompressionReport, LayerReport, Total
from mpocompress.report.wording import (
    Code,
    Option,
    Sentence,
    as_sentence,
    byte_size,
    change,
    count_words,
    enumeration,
    is_svd,
    is_unchanged,
    percent,
    plural,
    reason_text,
    relative_error,
    scientific,
    times,
)

Tone = Literal["good", "same", "bad"]

# Above this, weights have moved so far that nobody should ship without measuring.
_LARGE_WEIGHT_ERROR = 0.3
_ONLY_A_MEASUREMENT = (
    "How much that matters for what the model is for, only a measurement on held-out data can say."
)
# A kept weight is worth a sentence if it holds this share of all that is left.
_LARGE_KEPT_SHARE = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One headline number: "Parameters", "25.2× fewer", and the numbers behind it.

    `of_layers` is the change of the compressed layers alone; empty where there are none.
    """

    title: str
    value: str
    detail: str
    of_layers: str
    tone: Tone


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The answer to a question that every reader has: does it agree, is it any good."""

    title: str
    text: Sentence
    tone: Tone


def headline(report: CompressionReport) -> str:
    """The first sentence: how much smaller the model became; in bytes where layers are rounded."""
    total = report.totals.parameters.model
    if not report.compressed_layers:
        return f"Nothing was compressed: all {count_words(total.dense)} parameters were kept."
    if _rounded_layers(report):
        stored = report.totals.bytes.model
        size = change(stored.ratio, smaller="smaller", larger="larger", same="About as large")
        sizes = f"from {byte_size(stored.dense)} to {byte_size(stored.compressed)}"
        return f"{size}: {sizes} of weights."
    if is_unchanged(total.ratio):
        return f"About as large as before: {_from_to(total)} parameters."
    size = change(total.ratio, smaller="smaller", larger="larger", same="")
    return f"{size}: {_from_to(total)} parameters."


def facts(report: CompressionReport) -> tuple[Fact, ...]:
    """The three headline numbers: parameters, bytes and multiply-adds."""
    totals = report.totals

    def fact(title: str, model: Total, layers: Total, words: tuple[str, str], detail: str) -> Fact:
        smaller, larger = words

        def change_of(total: Total) -> str:
            return change(total.ratio, smaller=smaller, larger=larger, same="unchanged")

        return Fact(
            title=title,
            value=change_of(model),
            detail=detail,
            of_layers=change_of(layers) if report.compressed_layers else "",
            tone=_tone(model.ratio),
        )

    stored = totals.bytes.model
    on_disk = onnx_bytes(report)
    # What a convolution costs depends on the size of its input, which weights do not tell.
    uncounted = any(layer.kind == "conv" and not layer.macs.dense for layer in report.layers)
    without = ", convolutions not counted" if uncounted else ""
    file = "" if on_disk is None else f"; the ONNX file is {byte_size(on_disk)}"
    return (
        fact(
            "Parameters",
            totals.parameters.model,
            totals.parameters.layers,
            ("fewer", "more"),
            f"{totals.parameters.model.dense:,} → {totals.parameters.model.compressed:,}",
        ),
        fact(
            "Stored size",
            stored,
            totals.bytes.layers,
            ("smaller", "larger"),
            f"{byte_size(stored.dense)} → {byte_size(stored.compressed)} of weights{file}",
        ),
        fact(
            "Multiply-adds",
            totals.macs.model,
            totals.macs.layers,
            ("fewer", "more"),
            f"{totals.macs.model.dense:,} → {totals.macs.model.compressed:,} per input row"
            f"{without}",
        ),
    )


def onnx_bytes(report: CompressionReport) -> int | None:
    """Bytes of model.onnx and its external data; None if there is no ONNX file."""
    sizes = [size for name, size in report.files.items() if name.endswith((".onnx", ".onnx.data"))]
    return sum(sizes) if sizes else None


def what_was_done(report: CompressionReport) -> tuple[Sentence, ...]:
    """Two sentences for somebody who has never heard of MPOs."""
    compressed = report.compressed_layers
    if not compressed:
        return (
            (
                "No weight became smaller as an MPO with these settings, so the model is what it "
                "was. The reason is given below for each weight; try a smaller ",
                Option("--bond-dim"),
                " or include more layers.",
            ),
        )
    share = report.totals.parameters.layers.dense / report.totals.parameters.model.dense
    bonds = _bonds(report)
    link = (
        f", linked by an index of at most {max(bonds):,} values, the bond dimension"
        if bonds
        else ""
    )
    kept = report.kept_layers
    if report.settings.get("distill"):
        state = "kept its shape; parameters among it were trained along in the healing"
    elif report.settings.get("sweeps_on_loss"):
        state = "kept its shape, and the cores were tuned further by sweeps on a loss"
    elif any(layer.relative_output_error is not None for layer in compressed):
        state = "is as it was, but that biases of rewritten weights took up the mean of the errors"
        corrected = len(report.corrected_layers)
        if corrected:
            state += f", and {plural(corrected, 'dense layer')} what is lost before"
    else:
        state = "is exactly as it was"
    rest = (
        f"Everything else ({plural(len(kept), 'tensor')}, listed below) {state}. " if kept else ""
    )
    chains = (
        "matrix product operators (MPOs): each large table of numbers became a chain of small "
        f"ones, the cores{link}"
    )
    rounded = _rounded_layers(report)
    whole = [layer for layer in rounded if len(layer.layout or []) == 1]
    numbers = "small integers with a scale to each row or block of a row, or half floats"
    if len(whole) == len(compressed):
        rewritten = f"{numbers}, each matrix in a precision of its own"
    elif rounded:
        rewritten = (
            f"{numbers}, each matrix in a precision of its own: {len(whole):,} as a whole, the "
            f"others as {chains}"
        )
    else:
        rewritten = chains
    return (
        (
            f"{plural(len(compressed), 'weight matrix', 'weight matrices')} holding "
            f"{percent(share)} of the parameters "
            f"{'was' if len(compressed) == 1 else 'were'} rewritten as {rewritten}.",
        ),
        (
            f"{rest}The model takes the same inputs and returns outputs of the same shape, but "
            "the rewritten weights are approximations, so its answers differ somewhat from the "
            "original's.",
        ),
    )


# What the file was held against: in a title, and as the subject of a sentence with both sides.
_REFERENCES = {
    "pytorch": ("PyTorch", "ONNX Runtime and the compressed PyTorch model"),
    "graph": (
        "the original graph",
        "In ONNX Runtime the file and the original graph, with the dense weights that the cores "
        "stand for,",
    ),
}


def onnx_verdict(report: CompressionReport) -> Verdict:
    """Whether the ONNX file agrees with PyTorch, in words."""
    parity = report.parity
    if parity is None:
        if report.onnx_note is not None:
            return Verdict(
                title="There is no ONNX file.", text=(as_sentence(report.onnx_note),), tone="bad"
            )
        if onnx_bytes(report) is not None:
            text = "Its outputs were not compared with the model's in this run."
            return Verdict(title="The ONNX file was not checked.", text=(text,), tone="bad")
        return Verdict(
            title="There is no ONNX file.",
            text=("This run was not asked to write one, or ended before it.",),
            tone="bad",
        )
    sizes = enumeration([f"{size:,}" for size in parity.batch_sizes])
    where = f"on batches of {sizes} {'row' if parity.batch_sizes == [1] else 'rows'}"
    numbers = (
        f"largest difference {scientific(parity.max_abs_difference)} (relative "
        f"{scientific(parity.max_relative_difference)}), tolerance {scientific(parity.tolerance)}"
    )
    classes = (
        ""
        if parity.argmax_agreement is None
        else f" Both picked the same class for {percent(parity.argmax_agreement)} of the rows."
    )
    short, both = _REFERENCES[parity.reference]
    if (quantize := report.settings.get("quantize")) in ("int8", "int4"):
        both += f", its cores rounded to {quantize} as in the file,"
    if parity.passed:
        return Verdict(
            title=f"The ONNX file agrees with {short}.",
            text=(
                f"{both} gave the same outputs {where}: "
                f"{numbers}.{classes} This checks the export, not how well the compressed model "
                "still does its job.",
            ),
            tone="good",
        )
    return Verdict(
        title=f"The ONNX file does not agree with {short}: do not use it.",
        text=(f"{both} differ {where}: {numbers}.{classes}",),
        tone="bad",
    )


def _bonds(report: CompressionReport) -> list[int]:
    return [bond for layer in report.compressed_layers for bond in layer.bond_dims or []]


def quality_verdict(report: CompressionReport) -> Verdict | None:
    """What is known of the change in the model's answers; None if nothing was compressed."""
    compressed = report.compressed_layers
    if not compressed:
        return None
    output_errors = {
        layer.name: layer.relative_output_error
        for layer in compressed
        if layer.relative_output_error is not None
    }
    about_model = _of_the_answers(report)
    if about_model and not output_errors:
        return Verdict(
            title="Outputs were compared on data, the model's task was not.",
            text=(f"{about_model}{_ONLY_A_MEASUREMENT}",),
            tone="same",
        )
    if output_errors:
        worst = max(output_errors, key=lambda name: output_errors[name])
        return Verdict(
            title="Layer outputs were compared on data, the model's task was not.",
            text=(
                f"On the data given, outputs of the compressed layers differ from the original's "
                f"by {relative_error(statistics.median(output_errors.values()))} (median) to "
                f"{relative_error(output_errors[worst])} (layer ",
                Code(worst),
                f"). {about_model}{_ONLY_A_MEASUREMENT}",
            ),
            tone="same",
        )
    weight_errors = [
        layer.relative_weight_error
        for layer in compressed
        if layer.relative_weight_error is not None
    ]
    moved = (
        f" The rewritten weights differ from the original's by "
        f"{relative_error(statistics.median(weight_errors))} (median), "
        f"{relative_error(max(weight_errors))} at most."
        if weight_errors
        else ""
    )
    return Verdict(
        title="How well the model still does its job was not measured.",
        text=(
            f"Only weights were compared, not answers.{moved} Measure accuracy on held-out data "
            "before you use it.",
        ),
        tone="same",
    )


def _of_the_answers(report: CompressionReport) -> str:
    """Sentences on the outputs of the whole model, and on what healing gained; "" without data."""
    found = ""
    for comparison in report.predictions:
        if comparison.figure == "output_change" and comparison.measured is not None:
            found = (
                f"The outputs of the whole model differ by {relative_error(comparison.measured)}, "
                f"{comparison.note}. "
            )
    healing = report.settings.get("distill")
    loss = healing.get("held_out_loss") if isinstance(healing, dict) else None
    if isinstance(healing, dict) and isinstance(loss, dict):
        found += f"Training against the original (healing, {plural(healing['steps'], 'step')}) "
        if loss["after"] < loss["before"]:
            found += (
                "brought the loss on rows held out from it from "
                f"{loss['before']:.4g} to {loss['after']:.4g}. "
            )
        else:
            found += (
                f"did not lower the loss on rows held out from it, {loss['before']:.4g}, so the "
                "weights from before it were kept. "
            )
    return found


def cautions(report: CompressionReport) -> tuple[Sentence, ...]:
    """What is not better, or not known, and what can be done about it."""
    found: list[Sentence | None] = [
        _caution_weight_error(report),
        _caution_not_reached(report),
        _caution_few_rows(report),
        _caution_macs(report),
        _caution_larger_layers(report),
        _caution_large_kept(report),
    ]
    return tuple(sentence for sentence in found if sentence is not None)


def _caution_weight_error(report: CompressionReport) -> Sentence | None:
    errors = {
        layer.name: layer.relative_weight_error
        for layer in report.compressed_layers
        if layer.relative_weight_error is not None
    }
    if not errors or max(errors.values()) < _LARGE_WEIGHT_ERROR:
        return None
    worst = max(errors, key=lambda name: errors[name])
    large = sum(error >= _LARGE_WEIGHT_ERROR for error in errors.values())
    return (
        "Weights moved a lot: the relative weight error is above "
        f"{percent(_LARGE_WEIGHT_ERROR)} in {large:,} of "
        f"{plural(len(errors), 'compressed layer')}, the largest {relative_error(errors[worst])} "
        "in layer ",
        Code(worst),
        ". Some models hardly notice and others break. A larger ",
        Option("--max-size" if _rounded_layers(report) else "--bond-dim"),
        " keeps more and ",
        Option("--exclude"),
        f" leaves a layer as it was{_remedies(report)}.",
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
    largest = max(_bonds(report), default=0)
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


def settings_rows(settings: dict[str, object]) -> tuple[tuple[str, str], ...]:
    """Settings as (name, value), nested ones with dotted names."""
    rows: list[tuple[str, str]] = []

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            rows.append((prefix, ", ".join(value) or "none"))
        elif value is None or value == {}:
            rows.append((prefix, "none"))
        elif isinstance(value, bool):
            rows.append((prefix, "yes" if value else "no"))
        else:
            rows.append((prefix, str(value)))

    walk("", settings)
    return tuple(rows) if settings else ()


def _rounded_layers(report: CompressionReport) -> list[LayerReport]:
    """Layers whose numbers a file does not hold as the model does."""
    return [layer for layer in report.compressed_layers if layer.precision is not None]


def _from_to(total: Total) -> str:
    return f"from {count_words(total.dense)} to {count_words(total.compressed)}"


def _tone(ratio: float) -> Tone:
    if is_unchanged(ratio):
        return "same"
    return "good" if ratio > 1 else "bad"


def _needs_more_macs(layer: LayerReport) -> bool:
    return layer.macs.compressed > layer.macs.dense
