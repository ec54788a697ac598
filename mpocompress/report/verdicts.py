"""Answers of a report to what every reader asks: does the file agree, is the model any good."""

import statistics
from dataclasses import dataclass

from mpocompress.report.narrative import onnx_bytes
from mpocompress.report.schema import CompressionReport
from mpocompress.report.wording import (
    Code,
    Sentence,
    Tone,
    as_sentence,
    enumeration,
    percent,
    plural,
    relative_error,
    scientific,
)

_ONLY_A_MEASUREMENT = (
    "How much that matters for what the model is for, only a measurement on held-out data can say."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The answer to a question that every reader has: does it agree, is it any good."""

    title: str
    text: Sentence
    tone: Tone


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
    change = report.output_change
    if change is not None:
        found = (
            f"The outputs of the whole model differ by {relative_error(change.measured)}, "
            f"{change.note}. "
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
