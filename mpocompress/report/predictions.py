"""What the plan predicted beside what was measured, and how a budget was met."""

from collections.abc import Mapping
from typing import Any

from mpocompress.planning import Plan, predicted_totals
from mpocompress.report.schema import Budget, Comparison, CompressionReport, Predicted


def with_budget(report: CompressionReport, met: Mapping[str, Any]) -> CompressionReport:
    """The report with the budget that was met."""
    return report.model_copy(update={"budget": Budget(**met)})


def with_comparisons(
    report: CompressionReport,
    plan: Plan,
    *,
    relative_output_error: float | None,
    note: str = "",
    seconds: tuple[float, float] | None,
) -> CompressionReport:
    """The report with predictions of the plan beside measurements.

    Args:
        report: of what was compressed.
        plan: that was executed.
        relative_output_error: of the model's outputs, measured; None without data.
        note: on what it was measured, or why it was not, in words.
        seconds: of a batch through the listed layers, dense and compressed, timed at their exact
            bond dimensions; None if not asked for.
    """
    expected = predicted_totals(plan)
    found: list[Comparison] = []

    def compare(
        figure: Predicted, quantity: str, unit: str, predicted: Any, measured: Any, note: str = ""
    ) -> None:
        if predicted is not None or measured is not None or note:
            found.append(
                Comparison(
                    quantity=quantity,
                    unit=unit,
                    predicted=None if predicted is None else float(predicted),
                    measured=None if measured is None else float(measured),
                    note=note,
                    figure=figure,
                )
            )

    totals = report.totals
    compare(
        "parameters",
        "parameters of the model",
        "",
        None if expected.parameters is None else expected.parameters[1],
        totals.parameters.model.compressed,
    )
    compare(
        "bytes",
        "stored tensors of the model",
        "bytes",
        None if expected.bytes is None else expected.bytes[1],
        totals.bytes.model.compressed,
    )
    compare(
        "macs",
        "multiply-adds of the planned layers for one row",
        "",
        expected.macs[1],
        sum(layer.macs.compressed for layer in report.layers if layer.name in _names(plan)),
    )
    if expected.seconds is not None or seconds is not None:
        batch = plan.settings.get("batch", 1)
        compare(
            "seconds",
            f"time of the planned layers for a batch of {batch} in ONNX Runtime",
            "seconds",
            None if expected.seconds is None else expected.seconds[1],
            None if seconds is None else seconds[1],
            ""
            if seconds is None
            else f"dense: {seconds[0]:.3g} seconds; measured layer by layer at the exact bond "
            "dimensions",
        )
    compare(
        "output_change",
        "relative change of the model's outputs",
        "",
        expected.relative_output_error,
        relative_output_error,
        note,
    )
    return report.model_copy(update={"predictions": found})


def _names(plan: Plan) -> set[str]:
    return {layer.name or "(model)" for layer in plan.layers}
