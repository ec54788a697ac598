"""A report as Markdown: the same words and numbers as the page, without pictures."""

import re
from collections.abc import Iterable, Sequence

from mpocompress.report import cautions, expectations, narrative, verdicts, wording
from mpocompress.report.glossary import GLOSSARY
from mpocompress.report.groups import kept_groups
from mpocompress.report.layer import LayerReport
from mpocompress.report.schema import CompressionReport

# Kept weights are summed up by kind; more names than this are left to report.json.
_MAX_KEPT_NAMES = 6

_SPECIAL = re.compile(r"([\\`*_\[\]<>#~&$])")
_BACKTICKS = re.compile(r"`+")


def render_markdown(report: CompressionReport) -> str:
    """Render a report as GitHub-flavoured Markdown; equal reports give equal text."""
    blocks = [
        f"# Compression report: {_text(report.source.name)}",
        f"**{_text(narrative.headline(report))}**",
        _table(
            ["", "Change", "Before → after", "Compressed layers alone"],
            [
                [
                    fact.title,
                    f"**{fact.value}**",
                    fact.detail,
                    fact.of_layers,
                ]
                for fact in narrative.facts(report)
            ],
            left=4,
        ),
        *_verdicts(report),
        "## What was done",
        " ".join(_sentence(part) for part in narrative.what_was_done(report)),
        *_section(
            "## What to know before you use it",
            "\n".join(f"- {_sentence(caution)}" for caution in cautions.cautions(report)),
        ),
        *_section("## Predicted and measured", _expectations(report)),
        *_section("## Compressed layers", _layers(report.compressed_layers)),
        *_section("## What each layout would have given", _candidates(report.compressed_layers)),
        *_section("## Not rewritten", _kept(report)),
        "## Glossary",
        "\n".join(f"- **{_text(word)}**: {_text(meaning)}" for word, meaning in GLOSSARY),
        "## The run",
        *_run(report),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _expectations(report: CompressionReport) -> str:
    sentence = expectations.budget_sentence(report)
    rows = [[_text(cell) for cell in row] for row in expectations.comparison_rows(report)]
    table = _table(expectations.COLUMNS, rows, left=1) if rows else ""
    return "\n\n".join(part for part in (sentence and _text(sentence), table) if part)


def _verdicts(report: CompressionReport) -> list[str]:
    found = (verdicts.onnx_verdict(report), verdicts.quality_verdict(report))
    return [
        f"**{_text(verdict.title)}** {_sentence(verdict.text)}"
        for verdict in found
        if verdict is not None
    ]


def _layers(layers: Sequence[LayerReport]) -> str:
    if not layers:
        return ""
    with_outputs = any(layer.relative_output_error is not None for layer in layers)
    header = ["Layer", "Layout", "Shape", "Bond dim", "Parameters", "Ratio", "Multiply-adds"]
    header += ["Weight error", *(["Output error"] if with_outputs else [])]
    header += ["Entropy (nats)", "Effective bond dim"]
    with_precision = any(layer.precision is not None for layer in layers)
    header += ["Stored as"] if with_precision else []
    with_forms = any(layer.form is not None for layer in layers)
    header += ["ONNX"] if with_forms else []
    rows = []
    for layer in layers:
        output = [wording.relative_error(layer.relative_output_error)] if with_outputs else []
        layout = layer.layout or []
        rows.append(
            [
                _code(layer.name),
                f"{wording.layout_name(layout)} `{wording.layout_text(layout)}`",
                wording.shape_text(layer.shape),
                wording.bond_dims_text(layer.bond_dims or []),
                f"{layer.parameters.dense:,} → {layer.parameters.compressed:,}",
                wording.times(layer.parameters.ratio),
                f"{layer.macs.dense:,} → {layer.macs.compressed:,}",
                wording.relative_error(layer.relative_weight_error),
                *output,
                wording.entropy_text(layer),
                wording.effective_bond_dim_text(layer),
                *([layer.precision or ""] if with_precision else []),
                *([_form(layer)] if with_forms else []),
            ]
        )
    note = "Entropy and effective bond dimension are those of the middle bond."
    if with_forms:
        note += (
            " ONNX: a chain of cores, or cores that become the dense weight when a session starts; "
            "in microseconds what one run of the layer takes as chain / dense, where it was timed."
        )
    return f"{_table(header, rows, left=2)}\n\n{note}"


def _form(layer: LayerReport) -> str:
    if layer.form is None or len(layer.form_seconds) < 2:
        return layer.form or ""
    chain, dense = (1e6 * layer.form_seconds[form] for form in ("chain", "dense"))
    return f"{layer.form} ({chain:,.0f} / {dense:,.0f})"


def _candidates(layers: Sequence[LayerReport]) -> str:
    rows = [
        [
            _code(layer.name),
            f"`{wording.layout_text(candidate.layout)}`",
            wording.bond_dims_text(candidate.bond_dims),
            f"{candidate.parameters:,}",
            f"{candidate.macs:,}",
            wording.relative_error(candidate.relative_weight_error),
            wording.relative_error(candidate.output_change),
            wording.stored_as(candidate),
            "**chosen**" if candidate.chosen else "",
        ]
        for layer in layers
        for candidate in layer.candidates
    ]
    header = ["Layer", "Layout", "Bond dims", "Parameters", "Multiply-adds", "Weight error"]
    header += ["Output change, predicted", "Stored as", ""]
    return _details(f"{wording.plural(len(rows), 'layout')}", _table(header, rows, left=2), rows)


def _kept(report: CompressionReport) -> str:
    rows = []
    for group in kept_groups(report):
        names = [_code(layer.name) for layer in group.layers[:_MAX_KEPT_NAMES]]
        more = len(group.layers) - len(names)
        rest = f" and {more:,} more" if more else ""
        rows.append(
            [
                _text(group.title),
                ", ".join(names) + rest,
                "see report.json" if group.reason is None else _text(group.reason),
                f"{group.parameters:,}",
                wording.percent(group.share),
            ]
        )
    header = ["What", "Names", "Why", "Numbers", "Share of what is left"]
    return _table(header, rows, left=3) if rows else ""


def _run(report: CompressionReport) -> list[str]:
    files = [[_code(name), wording.byte_size(size)] for name, size in report.files.items()]
    times = [[_text(stage), wording.seconds(time)] for stage, time in report.seconds.items()]
    settings = [
        [_text(name), _text(value)] for name, value in narrative.settings_rows(report.settings)
    ]
    settings.append(["mpocompress", _text(report.tool_version)])
    if report.source.sha256 is not None:
        settings.append(["SHA-256 of the source", _code(report.source.sha256)])
    tables = (("File", "On disk", files), ("Stage", "Time", times), ("Setting", "Value", settings))
    return [_table([first, second], rows, left=1) for first, second, rows in tables if rows]


def _section(title: str, body: str) -> list[str]:
    return [title, body] if body else []


def _details(summary: str, body: str, rows: Sequence[object]) -> str:
    if not rows:
        return ""
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    """A table whose first `left` columns are text, and the others numbers."""
    rule = ["---" if column < left else "--:" for column in range(len(header))]
    lines = [[cell.replace("|", r"\|") for cell in cells] for cells in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(text: str) -> str:
    """Text from outside, with nothing left that Markdown or HTML would read as markup."""
    return _SPECIAL.sub(r"\\\1", wording.visible(text))


def _code(text: str) -> str:
    """A name in a code span, whatever the name holds."""
    safe = wording.visible(text)
    fence = "`" * (max(map(len, _BACKTICKS.findall(safe)), default=0) + 1)
    # One space on both sides is taken off again; it keeps backticks of the name off the fence.
    pad = " " if safe.startswith("`") or safe.endswith("`") else ""
    return f"{fence}{pad}{safe}{pad}{fence}"


def _sentence(pieces: wording.Sentence) -> str:
    return "".join(
        _code(piece.text) if isinstance(piece, wording.Code) else _text(piece) for piece in pieces
    )
