"""What a report holds of one weight: the schema of an entry of `layers` in `report.json`."""

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from mpocompress.report.quantities import (
    Frozen,
    Nats,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Size,
    without_none,
)

# Neighbouring singular values of a degenerate spectrum may come out of order by rounding.
_ORDER_RTOL = 1e-5

Site = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
"""(out, in) of one site."""

Change = Literal["corrected", "healed", "swept"]
"""How a kept weight got other values: it took up what is lost before it, or it was trained along
in healing or in sweeps on the loss."""


class Candidate(Frozen):
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
        return without_none(handler(self), "precision", "bytes", "output_change")

    @model_validator(mode="after")
    def _check_bonds(self) -> Self:
        _check_bond_count("bond_dims", self.bond_dims, self.layout)
        return self


class LayerReport(Frozen):
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
    also_known_as: list[str] = Field(default_factory=list)
    kind: str
    status: Literal["compressed", "kept"]
    reason: str
    changes: list[Change] = Field(default_factory=list)
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
    candidates: list[Candidate] = Field(default_factory=list)
    form: Literal["chain", "dense"] | None = None
    form_rows: PositiveInt | None = None
    form_seconds: dict[str, NonNegativeFloat] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_unknown_form(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Reports without an ONNX file read as they did before there were forms.
        found: dict[str, Any] = handler(self)
        if self.form is None:
            for name in ("form", "form_rows", "form_seconds"):
                found.pop(name, None)
        if not self.changes:
            del found["changes"]
        return without_none(found, "precision", "uncorrected")

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
