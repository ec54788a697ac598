"""What a report says in plain language, from its numbers alone: what was done, and what it gave.

Whether that is any good is said in `verdicts`, what to beware of in `cautions`. Everything there
and here is a function of the report and knows neither Markdown nor HTML. Nothing is escaped yet:
that is for the renderers, which escape text and `Code` alike.
"""

from dataclasses import dataclass

from mpocompress.report.quantities import Total
from mpocompress.report.schema import CompressionReport
from mpocompress.report.wording import (
    Option,
    Sentence,
    Tone,
    byte_size,
    change,
    count_words,
    is_unchanged,
    percent,
    plural,
)


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


def headline(report: CompressionReport) -> str:
    """The first sentence: how much smaller the model became; in bytes where layers are rounded."""
    total = report.totals.parameters.model
    if not report.compressed_layers:
        return f"Nothing was compressed: all {count_words(total.dense)} parameters were kept."
    if report.rounded_layers:
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
    largest = report.largest_bond_dim
    link = f", linked by an index of at most {largest:,} values, the bond dimension"
    link = link if largest else ""
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
    rounded = report.rounded_layers
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


def _from_to(total: Total) -> str:
    return f"from {count_words(total.dense)} to {count_words(total.compressed)}"


def _tone(ratio: float) -> Tone:
    if is_unchanged(ratio):
        return "same"
    return "good" if ratio > 1 else "bad"
