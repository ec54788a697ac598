"""The report of one run: what was compressed, how well, and where it lies.

The models below, with those of `layer` and `quantities`, are the schema of `report.json`, field by
field. They are frozen and closed: a field that they do not know is an error, so that a file of
another tool or of another format version never passes as one of ours. Rendering lives beside this
module and is imported when it is asked for: reading a report needs neither jinja2 nor matplotlib.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from mpocompress.errors import ReportError
from mpocompress.report.layer import LayerReport
from mpocompress.report.quantities import (
    Frozen,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Totals,
    without_none,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT_VERSION: Literal[1] = 1
"""Version of the schema. It rises when a field changes its name, type or meaning."""

REPORT_FILE = "report.json"

# A list of numbers that json.dumps spread over lines. A JSON string holds no raw line feed, so
# this matches no text inside one.
_SPREAD_NUMBERS = re.compile(r"\[\n\s+((?:[-+.\deE]+,?\s+)+)\]")

Predicted = Literal["parameters", "bytes", "macs", "seconds", "output_change"]
"""What a plan predicts and a run measures; the last is the relative change of the outputs."""


class Source(Frozen):
    """Where the dense model came from: its name, and the file's SHA-256 in hex if it is a file."""

    name: str
    sha256: str | None = None


class Parity(Frozen):
    """ONNX Runtime against what the file should compute, on the same inputs.

    Args:
        max_abs_difference: largest absolute difference over all outputs and batches.
        max_relative_difference: the same, relative to the output.
        tolerance: what was allowed.
        batch_sizes: batch sizes that were run.
        argmax_agreement: share of rows with the same largest output, in [0, 1]; None where an
            output has no classes.
        passed: whether the difference is within the tolerance.
        outputs: names of the outputs that were compared.
        reference: the compressed PyTorch model or, for ONNX input, the original graph with the
            dense weights that the cores stand for.
    """

    max_abs_difference: NonNegativeFloat
    max_relative_difference: NonNegativeFloat
    tolerance: NonNegativeFloat
    batch_sizes: list[PositiveInt]
    argmax_agreement: float | None = Field(default=None, ge=0, le=1)
    passed: bool
    outputs: list[str]
    reference: Literal["pytorch", "graph"] = "pytorch"

    @model_serializer(mode="wrap")
    def _leave_out_pytorch(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Reports from before there was a choice are written back as they were.
        fields: dict[str, Any] = handler(self)
        if self.reference == "pytorch":
            del fields["reference"]
        return fields


class Budget(Frozen):
    """A budget that was met by measuring.

    Args:
        target: "max_size", "max_error" or "max_drop".
        asked: the ceiling.
        reached: what was measured on what is written.
        what: of what, in words.
        where: on what it was measured, in words.
        trials: plans that were built and measured to find it.
    """

    target: Literal["max_size", "max_error", "max_drop"]
    asked: NonNegativeFloat
    reached: float
    what: str
    where: str
    trials: NonNegativeInt


class Comparison(Frozen):
    """A figure that the plan predicted, and what was measured.

    Args:
        quantity: of what, in words.
        unit: "bytes", "seconds", or "" for a plain number.
        predicted: by the plan; None if it was not, or was edited since.
        measured: on what came out; None if it was not.
        note: where or how it was measured.
        figure: which one it is, for programs; None in reports from before it was stored.
    """

    quantity: str
    unit: str
    predicted: NonNegativeFloat | None
    measured: NonNegativeFloat | None
    note: str = ""
    figure: Predicted | None = None

    @model_serializer(mode="wrap")
    def _without_unknown_figure(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_none(handler(self), "figure")


class CompressionReport(Frozen):
    """All that was measured in one run, and its renderings.

    Args:
        format_version: version of this schema.
        tool_version: version of mpocompress that wrote it.
        source: the dense model.
        settings: what was asked for; anything that JSON can hold.
        totals: sums, for the model and for the compressed layers.
        layers: one entry per weight, compressed or kept; their parameters add up to the totals.
        parity: ONNX Runtime against PyTorch; None if no ONNX file was checked.
        files: bytes on disk of each file that was written.
        onnx_note: why there is no ONNX file, if so.
        budget: how a size, an error or a drop that was asked for was met.
        predictions: of the plan, beside what was measured.
        seconds: wall time by stage, and "total".
    """

    format_version: Literal[1] = FORMAT_VERSION
    tool_version: str
    source: Source
    settings: dict[str, Any] = Field(default_factory=dict)
    totals: Totals
    layers: list[LayerReport]
    parity: Parity | None = None
    files: dict[str, NonNegativeInt] = Field(default_factory=dict)
    onnx_note: str | None = None
    budget: Budget | None = None
    predictions: list[Comparison] = Field(default_factory=list)
    seconds: dict[str, NonNegativeFloat] = Field(default_factory=dict)

    @field_validator("settings", mode="after")
    @classmethod
    def _as_json(cls, settings: dict[str, Any]) -> dict[str, Any]:
        # Tuples become lists here already, so that a report equals what is read back from it.
        try:
            normal: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings must be plain JSON values: {error}") from error
        return normal

    @model_validator(mode="after")
    def _check_accounting(self) -> Self:
        names = Counter(layer.name for layer in self.layers)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"layer {twice[0]!r} is listed {names[twice[0]]} times")
        for scope, total, layers in (
            ("model", self.totals.parameters.model, self.layers),
            ("layers", self.totals.parameters.layers, self.compressed_layers),
        ):
            for side in ("dense", "compressed"):
                listed = sum(getattr(layer.parameters, side) for layer in layers)
                stated = getattr(total, side)
                if listed != stated:
                    raise ValueError(
                        f"totals.parameters.{scope}.{side} is {stated}, but the entries of the "
                        f"{scope} add up to {listed}"
                    )
        return self

    @property
    def compressed_layers(self) -> list[LayerReport]:
        """The entries that were compressed, in the model's order."""
        return [layer for layer in self.layers if layer.status == "compressed"]

    @property
    def kept_layers(self) -> list[LayerReport]:
        """The entries that were kept, in the model's order."""
        return [layer for layer in self.layers if layer.status == "kept"]

    @property
    def output_change(self) -> Comparison | None:
        """The relative change of the model's outputs, if it was measured on data."""
        return next(
            (
                found
                for found in self.predictions
                if found.figure == "output_change" and found.measured is not None
            ),
            None,
        )

    @property
    def rounded_layers(self) -> list[LayerReport]:
        """Layers whose numbers a file does not hold as the model does."""
        return [layer for layer in self.compressed_layers if layer.precision is not None]

    @property
    def largest_bond_dim(self) -> int:
        """Of all compressed layers; 0 where there are no bonds."""
        bonds = (bond for layer in self.compressed_layers for bond in layer.bond_dims or ())
        return max(bonds, default=0)

    @property
    def corrected_layers(self) -> list[LayerReport]:
        """The kept entries that took up what is lost before them."""
        return [layer for layer in self.kept_layers if "corrected" in layer.changes]

    def to_json(self) -> str:
        """Write the report as JSON: fields in the schema's order, indented, finite numbers only."""
        text = json.dumps(
            self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False
        )
        # A spectrum on one line: a file that a person can scroll through.
        return _SPREAD_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ReportError: not JSON, another format version, or a field that is missing, unknown,
                of the wrong type or inconsistent; the message names the first such field.
        """
        return cls._parse(text, REPORT_FILE)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report from its file, or from the directory that a run has written.

        Raises:
            ReportError: there is no such file, or it is not one of our reports.
        """
        file = Path(path)
        if file.is_dir():
            file = file / REPORT_FILE
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ReportError(
                f"{file} does not exist. Give the directory that `mpocompress compress` has "
                f"written, or the {REPORT_FILE} in it."
            ) from error
        except UnicodeDecodeError as error:
            raise ReportError(
                f"{file} is not a text file in UTF-8 (byte {error.start}). Give the {REPORT_FILE} "
                "that `mpocompress compress` has written."
            ) from error
        except OSError as error:
            raise ReportError(
                f"{file} cannot be read: {error.strerror}. Check the path and its permissions."
            ) from error
        return cls._parse(text, str(file))

    @classmethod
    def _parse(cls, text: str, place: str) -> Self:
        again = "Run `mpocompress compress` again to write a new one."
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except RecursionError as error:
            raise ReportError(f"{place} is not JSON of ours: nested too deeply. {again}") from error
        except ValueError as error:
            raise ReportError(f"{place} is not JSON: {error}. {again}") from error
        if not isinstance(data, dict) or "format_version" not in data:
            raise ReportError(
                f"{place} is not a report of mpocompress: it has no field format_version. Give "
                f"the {REPORT_FILE} that `mpocompress compress` has written."
            )
        version = data["format_version"]
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ReportError(
                f"{place} has format version {_shorten(version)}, but this mpocompress reads "
                f"version {FORMAT_VERSION}. Read it with the release that wrote it "
                f"({_shorten(data.get('tool_version', 'not stated'))}), or compress again."
            )
        try:
            # Strict, in JSON mode: "12" is not a number, and a list is a list.
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            found = "" if first["type"] == "missing" else f", found {_shorten(first['input'])}"
            raise ReportError(
                f"{place}, field {_field_path(first['loc'])}: {first['msg']}{found}. "
                f"The file is not a report of mpocompress, or was edited. {again}"
            ) from error

    def to_markdown(self) -> str:
        """Render as Markdown, for a repository or a pull request; without pictures."""
        from mpocompress.report.markdown import render_markdown

        return render_markdown(self)

    def to_html(self) -> str:
        """Render as one self-contained HTML page: no scripts, no network, pictures as SVG.

        Equal reports give equal bytes.
        """
        from mpocompress.report.html import render_html

        return render_html(self)

    def plot(self) -> "Figure":
        """Draw where the parameters went, and the Schmidt spectra, as a matplotlib figure.

        The figure belongs to the caller: pyplot does not know it. `figure.savefig(path)` writes it,
        and a notebook shows it.
        """
        from mpocompress.report.figures import overview_figure

        return overview_figure(self)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _shorten(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _field_path(loc: tuple[int | str, ...]) -> str:
    """Write pydantic's location as layers[3].bond_dims."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.lstrip(".") or "(whole file)"
