"""The report of one run: what was compressed, how well, and where it lies.

The models below are the schema of `report.json`, field by field. They are frozen and closed:
a field that they do not know is an error, so that a file of another tool or of another format
version never passes as one of ours. Rendering lives beside this module and is imported when it is
asked for: reading a report needs neither jinja2 nor matplotlib.
"""

import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from mpocompress.errors import ReportError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT_VERSION: Literal[1] = 1
"""Version of the schema. It rises when a field changes its name, type or meaning."""

REPORT_FILE = "report.json"

# Ratios are stored beside the two numbers that they come from; a reader may have rounded them.
_RATIO_RTOL = 1e-6
# Neighbouring singular values of a degenerate spectrum may come out of order by rounding.
_ORDER_RTOL = 1e-5
# A list of numbers that json.dumps spread over lines. A JSON string holds no raw line feed, so
# this matches no text inside one.
_SPREAD_NUMBERS = re.compile(r"\[\n\s+((?:[-+.\deE]+,?\s+)+)\]")

# Numbers that can be drawn, and multiplied or divided by each other a few times.
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e300)]
Nats = Annotated[float, Field(ge=0, le=600)]

Site = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
"""(out, in) of one site."""

Change = Literal["corrected", "healed", "swept"]
"""How a kept weight got other values: it took up what is lost before it, or it was trained along
in healing or in sweeps on the loss."""

Predicted = Literal["parameters", "bytes", "macs", "seconds", "output_change"]
"""What a plan predicts and a run measures; the last is the relative change of the outputs."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(_Frozen):
    """Where the dense model came from: its name, and the file's SHA-256 in hex if it is a file."""

    name: str
    sha256: str | None = None


class Size(_Frozen):
    """One quantity before (dense) and after (compressed)."""

    dense: NonNegativeInt
    compressed: NonNegativeInt

    @property
    def ratio(self) -> float:
        """Compression ratio, above 1 is smaller; 1 where there is nothing to count."""
        return self.dense / self.compressed if self.compressed else 1.0


class Total(_Frozen):
    """One quantity before and after, summed up, with the compression ratio (above 1 is smaller)."""

    dense: NonNegativeInt
    compressed: NonNegativeInt
    ratio: NonNegativeFloat

    @classmethod
    def of(cls, dense: int, compressed: int) -> Self:
        """Make a total and its ratio; the ratio of nothing to nothing is 1."""
        size = Size(dense=dense, compressed=compressed)
        return cls(dense=dense, compressed=compressed, ratio=size.ratio)

    @model_validator(mode="after")
    def _check_ratio(self) -> Self:
        if self.compressed == 0 and self.dense > 0:
            raise ValueError(f"{self.dense} before and 0 after: nothing compresses to nothing")
        expected = self.dense / self.compressed if self.compressed else 1.0
        if not math.isclose(self.ratio, expected, rel_tol=_RATIO_RTOL):
            raise ValueError(f"ratio {self.ratio} is not dense / compressed = {expected}")
        return self


class Scope(_Frozen):
    """A total for the whole model, and one for only the layers that were compressed."""

    model: Total
    layers: Total


class Totals(_Frozen):
    """Before and after: parameters, stored tensor bytes, multiply-adds for one row per layer."""

    parameters: Scope
    bytes: Scope
    macs: Scope


def _without_none(found: dict[str, Any], *names: str) -> dict[str, Any]:
    """Without entries that say nothing: such reports read as they did before there were any."""
    return {key: value for key, value in found.items() if key not in names or value is not None}


class Candidate(_Frozen):
    """What one layout would have given for a layer.

    Args:
        layout: (out, in) of each site.
        bond_dims: of each bond.
        parameters: stored numbers.
        macs: multiply-adds for one input row.
        relative_weight_error: see `LayerReport`.
        chosen: whether it was taken.
        precision: in which the numbers would be stored; None for the model's own.
        bytes: in a file, where a precision is given.
        output_change: norm of the predicted change of the model's outputs over their norm, if this
            layer alone were compressed; None if it is not known.
    """

    layout: list[Site] = Field(min_length=1)
    bond_dims: list[PositiveInt]
    parameters: NonNegativeInt
    macs: NonNegativeInt
    relative_weight_error: NonNegativeFloat | None
    chosen: bool
    precision: str | None = None
    bytes: NonNegativeInt | None = None
    output_change: NonNegativeFloat | None = None

    @model_serializer(mode="wrap")
    def _without_own_precision(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_none(handler(self), "precision", "bytes", "output_change")

    @model_validator(mode="after")
    def _check_bonds(self) -> Self:
        _check_bond_count("bond_dims", self.bond_dims, self.layout)
        return self


class LayerReport(_Frozen):
    """One weight: compressed, or kept as it was.

    Args:
        name: qualified name in the model.
        also_known_as: other names of the same tensor, where it is shared.
        kind: "linear", "matrix", "embedding", "conv", "norm", "bias", "buffer", "other", ...
        status: "compressed" or "kept".
        reason: one sentence on why this status, or why this layout.
        changes: of a kept weight whose values are others than before, how that came, in order.
        uncorrected: of a kept weight that was to take up what is lost before it and could not, why.
        shape: shape of the dense weight; (out, in) for a matrix.
        layout: (out, in) of each site; None unless compressed.
        bond_dims: of each bond, one fewer than sites; None unless compressed.
        precision: in which the numbers are stored, such as "int4 in blocks of 32"; None for the
            model's own.
        parameters: stored numbers.
        macs: multiply-adds for one input row.
        relative_weight_error: `norm(W - W_mpo) / norm(W)`, Frobenius.
        relative_output_error: the same of the layer's outputs; None without data.
        entropies_nats: entanglement entropy at each bond, in nats.
        schmidt_values: Schmidt spectrum at each bond: singular values, descending, not squared.
        discarded_weight_bound: upper bound on the relative weight error, from what was cut away.
        candidates: what each layout that was looked at would have given.
        form: in the ONNX file: "chain", or "dense" where the cores become the dense weight at the
            load; None without such a file.
        form_rows: rows that the layer had when its forms were timed; None if they were not.
        form_seconds: median time of the layer alone in ONNX Runtime, by form.
    """

    name: str = Field(min_length=1)
    also_known_as: list[str] = []
    kind: str
    status: Literal["compressed", "kept"]
    reason: str
    changes: list[Change] = []
    uncorrected: str | None = None
    shape: list[NonNegativeInt]
    layout: list[Site] | None = None
    bond_dims: list[PositiveInt] | None = None
    precision: str | None = None
    parameters: Size
    macs: Size
    relative_weight_error: NonNegativeFloat | None = None
    relative_output_error: NonNegativeFloat | None = None
    entropies_nats: list[Nats] | None = None
    schmidt_values: list[list[NonNegativeFloat]] | None = None
    discarded_weight_bound: NonNegativeFloat | None = None
    candidates: list[Candidate] = []
    form: Literal["chain", "dense"] | None = None
    form_rows: PositiveInt | None = None
    form_seconds: dict[str, NonNegativeFloat] = {}

    @model_serializer(mode="wrap")
    def _without_unknown_form(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Reports without an ONNX file read as they did before there were forms.
        found: dict[str, Any] = handler(self)
        if self.form is None:
            for name in ("form", "form_rows", "form_seconds"):
                found.pop(name, None)
        if not self.changes:
            del found["changes"]
        return _without_none(found, "precision", "uncorrected")

    @field_validator("entropies_nats", mode="before")
    @classmethod
    def _round_up_to_zero(cls, value: Any) -> Any:
        # The entropy of a product state is 0; rounding in a sum of p ln p may leave -1e-17.
        if isinstance(value, list | tuple):
            return [0.0 if isinstance(s, float) and -1e-9 < s < 0 else s for s in value]
        return value

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.status == "kept":
            if self.layout is not None or self.bond_dims is not None:
                raise ValueError("a kept layer has neither layout nor bond_dims")
            if self.parameters.dense != self.parameters.compressed:
                raise ValueError(
                    f"kept, but {self.parameters.dense} parameters became "
                    f"{self.parameters.compressed}"
                )
            return self
        if self.changes or self.uncorrected is not None:
            raise ValueError("changes and uncorrected are of kept layers, and this is compressed")
        if not self.layout or self.bond_dims is None:
            raise ValueError("a compressed layer needs a layout and bond_dims")
        _check_bond_count("bond_dims", self.bond_dims, self.layout)
        if self.entropies_nats is not None:
            _check_bond_count("entropies_nats", self.entropies_nats, self.layout)
        if self.schmidt_values is not None:
            _check_bond_count("schmidt_values", self.schmidt_values, self.layout)
            for bond, values in enumerate(self.schmidt_values):
                _check_spectrum(bond, values)
        return self

    @property
    def middle_entropy_nats(self) -> float | None:
        """Entanglement entropy at the middle bond, in nats; None if unknown or without bonds."""
        if not self.entropies_nats:
            return None
        return self.entropies_nats[len(self.entropies_nats) // 2]


class Parity(_Frozen):
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


class Budget(_Frozen):
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


class Comparison(_Frozen):
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
        return _without_none(handler(self), "figure")


class CompressionReport(_Frozen):
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
    settings: dict[str, Any] = {}
    totals: Totals
    layers: list[LayerReport]
    parity: Parity | None = None
    files: dict[str, NonNegativeInt] = {}
    onnx_note: str | None = None
    budget: Budget | None = None
    predictions: list[Comparison] = []
    seconds: dict[str, NonNegativeFloat] = {}

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


def _check_bond_count(field: str, values: list[Any], layout: list[Site]) -> None:
    if len(values) != len(layout) - 1:
        raise ValueError(
            f"{field} has {len(values)} entries, but {len(layout)} sites have "
            f"{len(layout) - 1} bonds"
        )


def _check_spectrum(bond: int, values: list[float]) -> None:
    if not values:
        raise ValueError(f"schmidt_values of bond {bond} are empty")
    slack = _ORDER_RTOL * max(values)
    for position, (left, right) in enumerate(pairwise(values)):
        if right > left + slack:
            raise ValueError(
                f"schmidt_values of bond {bond} do not descend: {left} at {position}, then {right}"
            )


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
