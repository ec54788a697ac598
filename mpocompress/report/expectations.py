"""In words: the budget that was asked for, and what the plan predicted beside what was measured."""

from mpocompress.report.schema import Comparison, CompressionReport
from mpocompress.report.wording import byte_size, scientific

COLUMNS = ("Figure", "Predicted", "Measured", "How it was measured")


def budget_sentence(report: CompressionReport) -> str | None:
    """Whether and where the budget was met; None if there was none that had to be measured."""
    budget = report.budget
    if budget is None:
        return None
    return (
        f"At most {_figure(budget.asked, budget.target)} was asked for, and "
        f"{_figure(budget.reached, budget.target)} was measured ({budget.what}; on {budget.where})."
    )


def comparison_rows(report: CompressionReport) -> list[list[str]]:
    """Quantity, predicted, measured, note, as text."""
    return [
        [
            comparison.quantity,
            _value(comparison, comparison.predicted),
            _value(comparison, comparison.measured),
            _note(comparison, report),
        ]
        for comparison in report.predictions
    ]


def _note(comparison: Comparison, report: CompressionReport) -> str:
    both = comparison.predicted is not None and comparison.measured is not None
    if comparison.figure == "output_change" and both and report.corrected_layers:
        return f"{comparison.note}; the prediction is without what dense layers took up"
    return comparison.note


def _figure(value: float, target: str) -> str:
    return f"{value:,.0f} bytes" if target == "max_size" else f"{value:.4g}"


def _value(comparison: Comparison, value: float | None) -> str:
    if value is None:
        return "–"
    if comparison.unit == "bytes":
        return byte_size(round(value))
    if comparison.unit == "seconds":
        return f"{value * 1e6:,.1f} µs"
    if value >= 1 and value == round(value):
        return f"{value:,.0f}"
    return f"{value:.3f}" if value >= 0.01 else scientific(value)
