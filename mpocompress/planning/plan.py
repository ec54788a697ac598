"""The plan: what becomes of every weight, to read, edit, save as JSON and run."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mpocompress.errors import LayoutError, PlanError
from mpocompress.files import replacing
from mpocompress.mpo import Layout
from mpocompress.mpo.identity_gauge import Gauge, index_dtype, stored_parameters
from mpocompress.mpo.integers import place_bytes
from mpocompress.mpo.precision import Precision, bits_of, matrix_bytes
from mpocompress.planning.layouts import Candidate, chain_macs
from mpocompress.surgery.inventory import MULTIPLIED, RECURRENT

FORMAT_VERSION = 1

# Settings by which reports tell what a run had and did.
_OF_RUNS = frozenset(
    {"distill", "healing", "sweeps_on_loss", "rows_of_data", "fewest_rows_at_a_layer"}
)

# Sizes of tensors, which count in 64 bits.
PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
# Layouts have some ten sites; contractions are planned for each.
Pairs = Annotated[tuple[tuple[PositiveInt, PositiveInt], ...], Field(min_length=1, max_length=64)]
Tiers = tuple[tuple[PositiveInt, Precision], ...]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CandidateFigures(_Frozen):
    """What a layout costs and loses: a row of the table of alternatives.

    Attributes:
        bytes: in a file; None where only parameters count.
        loss: share of the model's squared outputs that changes, predicted; None if unknown.
    """

    layout: Pairs
    bond_dims: tuple[PositiveInt, ...]
    parameters: NonNegativeInt
    macs: NonNegativeInt
    relative_weight_error: NonNegativeFloat | None = None
    chosen: bool = False
    gauge: Gauge = "none"
    precision: Precision = "float32"
    block: PositiveInt | None = None
    tiers: Tiers = ()
    bytes: NonNegativeInt | None = None
    loss: float | None = None

    @model_validator(mode="after")
    def _check_bonds(self) -> Self:
        if len(self.bond_dims) != len(self.layout) - 1:
            raise ValueError(f"{len(self.layout)} sites have {len(self.layout) - 1} bonds")
        return self

    @property
    def storage(self) -> str:
        """The precision as text."""
        return _storage(self.precision, self.block, self.tiers)

    @classmethod
    def of(
        cls, candidate: Candidate, *, chosen: bool, loss: float | None = None
    ) -> "CandidateFigures":
        """From a candidate."""
        return cls(
            layout=candidate.layout.pairs,
            bond_dims=candidate.bond_dims,
            parameters=candidate.parameters,
            macs=candidate.macs,
            relative_weight_error=candidate.relative_weight_error,
            chosen=chosen,
            gauge=candidate.gauge,
            loss=loss,
        )


def _storage(precision: Precision, block: int | None, tiers: Tiers) -> str:
    blocks = f" in blocks of {block}" if block else ""
    frequent = "".join(f"{rows} rows {own}, " for rows, own in tiers)
    return f"{frequent}{'others ' if tiers else ''}{precision}{blocks}"


class LayerPrediction(_Frozen):
    """What is expected of one layer.

    Attributes:
        choice: layout and bond dimensions that this was predicted for; an edited entry has others.
        seconds: of a batch in ONNX Runtime, from measured times; None if not asked for.
        dense_seconds: the same of the dense layer.
        loss: share of the model's squared outputs that changes, to second order; None if unknown.
    """

    choice: str
    seconds: NonNegativeFloat | None = None
    dense_seconds: NonNegativeFloat | None = None
    loss: float | None = None


class LayerPlan(_Frozen):
    """What becomes of one convertible weight.

    Attributes:
        name: first qualified name of the layer.
        also_known_as: its other names, if it is shared or tied.
        kind: of weight, such as "linear".
        shape: (out, in).
        action: "compress" or "keep".
        reason: one sentence.
        layout: (out, in) of each site; None if kept.
        bond_dims: largest bond dimension at each bond; None if kept.
        gauge: "none" to store all entries of the cores, "identity" to store as many numbers as the
            layer has degrees of freedom.
        precision: of the numbers in the file: float32 (whatever `quantize` says), float16, or
            integers with a scale to each row, written out as they are. A dense weight that is
            rounded is a layout of one site.
        block: columns that share a scale, for integers; None for all of a row.
        tiers: of a dense table: how many of its most frequent rows are stored in which precision,
            most frequent first, such as [[500, "int8"]]; the others are in `precision`.
        selected: whether the include and exclude patterns meant it; edited, it changes nothing.
        corrects: of a kept linear layer: where there is data, its weight and bias take up what is
            lost before it, at no cost in size. It stays as it is where it has more than 8192
            features or outputs, shares its weight, or is not called exactly once by every batch,
            after a layer that is compressed.
        candidates: what other layouts, bond dimensions or precisions would have given: with data
            for a budget, the layer's curve of predicted loss over size.
        predicted: what was expected when the plan was made.
    """

    name: str
    also_known_as: tuple[str, ...] = ()
    kind: str = "linear"
    shape: tuple[PositiveInt, PositiveInt]
    action: Literal["compress", "keep"]
    reason: str = ""
    layout: Pairs | None = None
    bond_dims: tuple[PositiveInt, ...] | None = None
    gauge: Gauge = "none"
    precision: Precision = "float32"
    block: PositiveInt | None = None
    tiers: Tiers = ()
    selected: bool = True
    corrects: bool = False
    candidates: tuple[CandidateFigures, ...] = ()
    predicted: LayerPrediction | None = None

    @property
    def choice(self) -> str:
        """Layout, bond dimensions and storage as text, or "dense"."""
        if self.action == "keep":
            return "dense"
        layout = self.sites()
        found = f"{layout} {list(layout.clip(self.bond_dims or ()))} {self.gauge}"
        return f"{found} {self.storage}" if self.rounds else found

    @property
    def rounds(self) -> bool:
        """Whether it is stored otherwise than in float32."""
        return self.precision != "float32" or bool(self.tiers)

    @property
    def storage(self) -> str:
        """The precision as text, such as "int4 in blocks of 32"."""
        return _storage(self.precision, self.block, self.tiers)

    @property
    def bytes(self) -> int:
        """Bytes of what is stored afterwards, in float32 where nothing else is said."""
        if not self.rounds:
            return 4 * self.parameters
        layout = self.sites()
        bonds = layout.clip(self.bond_dims or ())
        if layout.num_sites == 1:
            rows, columns = layout.pairs[0]
            tiers, left = 0, rows
            for count, precision in self.tiers:
                tiers += matrix_bytes(min(count, left), columns, precision, self.block)
                left -= min(count, left)
            places = place_bytes(rows) if self.tiers else 0
            return tiers + places + matrix_bytes(left, columns, self.precision, self.block)
        found, left = 0, 1
        for site, ((out, in_), right) in enumerate(zip(layout.pairs, (*bonds, 1), strict=True)):
            last = site == layout.num_sites - 1
            rows = left if last else left * out * in_
            columns = out * in_ if last else right
            if self.gauge == "identity" and not last:
                found += right * index_dtype(rows).itemsize
                rows -= right
            found += matrix_bytes(rows, columns, self.precision, self.block)
            left = right
        return found

    @property
    def parameters(self) -> int:
        """Numbers that are stored afterwards."""
        if self.action == "keep":
            return self.shape[0] * self.shape[1]
        layout = self.sites()
        return stored_parameters(layout, layout.clip(self.bond_dims or ()), self.gauge)

    @property
    def dense_macs(self) -> int:
        """Multiply-adds for one input row before; 0 for kinds that are no product of a row."""
        return self.shape[0] * self.shape[1] if self.kind in MULTIPLIED else 0

    @property
    def macs(self) -> int:
        """Multiply-adds for one input row afterwards; of recurrent weights those of dense ones."""
        if self.action == "keep" or self.kind == RECURRENT or self.kind not in MULTIPLIED:
            return self.dense_macs
        layout = self.sites()
        return chain_macs(layout, layout.clip(self.bond_dims or ()))

    @property
    def fresh_prediction(self) -> LayerPrediction | None:
        """The prediction, unless the entry was edited since."""
        if self.predicted is None or self.predicted.choice != self.choice:
            return None
        return self.predicted

    def sites(self) -> Layout:
        """The layout of a layer that is to be compressed; padded if it is larger than the shape.

        Raises:
            PlanError: the layer is kept, or its entry is incomplete or does not fit its shape.
            LayoutError: the layout is smaller than the shape.
        """
        if self.layout is None or self.bond_dims is None:
            raise PlanError(
                f"layer {self.name!r}: action {self.action!r} needs a layout and bond_dims."
            )
        layout = Layout.from_pairs(self.layout)
        if self.block is not None and bits_of(self.precision) is None and not self.tiers:
            raise PlanError(
                f"layer {self.name!r}: block {self.block} is of integers that share a scale, but "
                f"its precision is {self.precision}. Drop the block."
            )
        if self.tiers and (layout.num_sites > 1 or self.kind != "embedding"):
            raise PlanError(
                f"layer {self.name!r}: tiers are rows of a dense table by how often they are "
                f"looked up; this is a {self.kind} weight with layout {layout}. Drop the tiers."
            )
        padded = (layout.out_features, layout.in_features) != self.shape
        if len(self.bond_dims) != layout.num_sites - 1:
            raise PlanError(
                f"layer {self.name!r}: layout {layout} has {layout.num_sites - 1} bonds, but "
                f"bond_dims {list(self.bond_dims)} has {len(self.bond_dims)} entries."
            )
        layout = Layout.from_pairs(self.layout, pad=padded)
        try:
            layout.check(self.shape)
        except LayoutError as error:
            raise LayoutError(f"layer {self.name!r}: {error}") from None
        rows, columns = self.shape
        if layout.out_features > 2 * rows or layout.in_features > 2 * columns:
            raise PlanError(
                f"layer {self.name!r}: layout {layout} pads {rows}x{columns} to more than twice as "
                "much on a side. Take smaller sites."
            )
        return layout


class Plan(_Frozen):
    """The whole plan, one entry for each convertible weight, in model order.

    Attributes:
        format_version: of this file.
        settings: what was asked for.
        layers: one entry a weight.
        parameters_elsewhere: of the model, besides the weights listed; None if not known.
        bytes_elsewhere: likewise.
        bytes_listed: of the weights listed, dense.
    """

    format_version: int = FORMAT_VERSION
    settings: dict[str, Any] = Field(default_factory=dict)
    layers: tuple[LayerPlan, ...]
    parameters_elsewhere: NonNegativeInt | None = None
    bytes_elsewhere: NonNegativeInt | None = None
    bytes_listed: NonNegativeInt | None = None

    @field_validator("settings", mode="after")
    @classmethod
    def _check_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(settings, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"settings must be plain JSON values: {error}") from error
        return settings

    @field_validator("layers", mode="after")
    @classmethod
    def _check_names(cls, layers: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
        names = Counter(layer.name for layer in layers)
        twice = next((name for name, count in names.items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"layer {twice!r} is listed {names[twice]} times")
        return layers

    @property
    def asked(self) -> dict[str, Any]:
        """The settings, without what only a run can say: a plan may come from anywhere."""
        return {name: value for name, value in self.settings.items() if name not in _OF_RUNS}

    def __iter__(self) -> Iterator[LayerPlan]:  # type: ignore[override]  # rows, not fields
        return iter(self.layers)

    @property
    def compressed(self) -> tuple[LayerPlan, ...]:
        """The entries with action "compress"."""
        return tuple(layer for layer in self.layers if layer.action == "compress")

    def to_json(self) -> str:
        """JSON text that `from_json` reads again."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan, perhaps edited by hand.

        Raises:
            PlanError: not a plan, of another format version, or with an impossible entry; the
                first problem is named.
            LayoutError: a layout that does not fit its shape.
        """
        return cls._parse(text, "this")

    @classmethod
    def _parse(cls, text: str, place: str) -> "Plan":
        try:
            plan = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the file"
            raise PlanError(
                f"{place} is not a plan: {field}: {first['msg']}. Write one with plan(...).save() "
                "or --dry-run --json, and edit layouts, bond_dims and actions."
            ) from None
        if plan.format_version != FORMAT_VERSION:
            raise PlanError(
                f"{place} has plan format version {plan.format_version}; this release reads "
                f"version {FORMAT_VERSION}. Make the plan again."
            )
        for layer in plan.compressed:
            layer.sites()
        return plan

    def save(self, path: str | Path) -> None:
        """Write the JSON to a file.

        Raises:
            SaveError: it cannot be written.
        """
        with replacing(Path(path)) as scratch:
            scratch.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan from a file.

        Raises:
            PlanError: the file cannot be read or is not a plan.
            LayoutError: see `from_json`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {str(path)!r}: {error}.") from None
        return cls._parse(text, repr(str(path)))

    def __str__(self) -> str:
        lines = []
        for layer in self.layers:
            size = f"{layer.shape[0]}x{layer.shape[1]}"
            what = "keep"
            if layer.action == "compress":
                layout = layer.sites()
                bonds = layout.clip(layer.bond_dims or ())
                after = stored_parameters(layout, bonds, layer.gauge)
                ratio = layer.shape[0] * layer.shape[1] / after
                what = f"{layout} bond_dims {list(bonds)}: {after} parameters, ratio {ratio:.2f}"
                what += " (identity gauge)" if layer.gauge == "identity" else ""
                what += f", {layer.storage}: {layer.bytes} bytes" if layer.rounds else ""
            lines.append(f"{layer.name}  {size}  {what}  ({layer.reason})")
        return "\n".join(lines)
