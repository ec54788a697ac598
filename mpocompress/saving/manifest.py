"""What the metadata of `model.mpo.safetensors` says of the model in it."""

from collections.abc import Iterator
from math import prod
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from mpocompress._version import __version__
from mpocompress.layers import MPOLayer
from mpocompress.layers.opened import Opened
from mpocompress.mpo.identity_gauge import Gauge
from mpocompress.surgery import opened_names

FORMAT_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerRecord(_Record):
    """One compressed layer: all of its names, the matrix's shape, its sites, how it is stored.

    Attributes:
        names: all qualified names of the module.
        kind: of the weight, such as "linear".
        shape: (out, in) of the matrix.
        layout: (out, in) of each site.
        bond_dims: of the inner bonds.
        gauge: how the cores are stored.
        dense_shape: of the dense weight; None if it is the matrix itself.
        transposed: whether the dense weight, seen as (first dimension, all others), is (in, out).
        stored: name of the dense weight; None if it is `<name>.weight`, under each of the names.
    """

    names: tuple[str, ...] = Field(min_length=1)
    kind: str
    shape: tuple[PositiveInt, PositiveInt]
    layout: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(min_length=1)
    bond_dims: tuple[PositiveInt, ...]
    gauge: Gauge = "none"
    dense_shape: tuple[PositiveInt, ...] | None = None
    transposed: bool = False
    stored: str | None = None

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if len(self.bond_dims) != len(self.layout) - 1:
            raise ValueError(
                f"{len(self.layout)} sites have {len(self.layout) - 1} bonds, not "
                f"{len(self.bond_dims)}"
            )
        sites = (prod(out for out, _ in self.layout), prod(in_ for _, in_ in self.layout))
        if sites[0] < self.shape[0] or sites[1] < self.shape[1]:
            raise ValueError(f"sites of {sites[0]}x{sites[1]} do not hold {self.shape}")
        if self.dense_shape is not None and prod(self.dense_shape) != prod(self.shape):
            raise ValueError(f"dense_shape {self.dense_shape} does not hold {self.shape}")
        return self

    def dense_names(self) -> tuple[str, ...]:
        """What the dense weight is called, for each of the names."""
        if self.stored is not None:
            return (self.stored,) * len(self.names)
        return tuple(f"{prefix_of(name)}weight" for name in self.names)

    def core_names(self, name: str) -> tuple[str, ...]:
        """What the tensors are called that are stored for one of the names."""
        prefix, last = f"{prefix_of(name)}cores.", len(self.layout) - 1
        parts = [f"{prefix}{site}" for site in range(last + 1)]
        if self.gauge == "none":
            return tuple(parts)
        halves = [f"{part}.{half}" for part in parts[:last] for half in ("free", "pivots")]
        return (*halves, parts[last])

    def dense(self, matrix_OI: Tensor) -> Tensor:
        """The weight of the dense layer for this matrix."""
        if self.dense_shape is None:
            return matrix_OI  # the same object for all that are tied
        weight = matrix_OI.mT if self.transposed else matrix_OI
        return weight.reshape(self.dense_shape).contiguous()


class OriginRecord(_Record):
    """What a parameter of an opened module has become: entries below each other, and its shape."""

    parts: tuple[str, ...] = Field(min_length=1)
    shape: tuple[NonNegativeInt, ...]


class OpenedRecord(_Record):
    """One opened module: all of its names, and its parameters under their dense names."""

    names: tuple[str, ...] = Field(min_length=1)
    origins: dict[str, OriginRecord] = {}


class Manifest(_Record):
    """What the metadata of `model.mpo.safetensors` says.

    Attributes:
        format_version: of the file.
        tool_version: that wrote it.
        source: "module", "state_dict" if the architecture was never known, or "onnx", where names
            are those of the graph.
        layers: the compressed ones.
        aliases: name of a state entry to the name under which its tensor is stored.
        opened: modules that call layers where the dense ones read their weights.
    """

    format_version: int = FORMAT_VERSION
    tool_version: str = __version__
    source: Literal["module", "state_dict", "onnx"] = "module"
    layers: tuple[LayerRecord, ...] = ()
    aliases: dict[str, str] = {}
    opened: tuple[OpenedRecord, ...] = ()


def prefix_of(name: str) -> str:
    """What stands before the names of a module's parameters."""
    return f"{name}." if name else ""


def layer_records(model: nn.Module) -> Iterator[LayerRecord]:
    """One record for each compressed layer of a model."""
    names: dict[int, list[str]] = {}
    layers: dict[int, MPOLayer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MPOLayer):
            names.setdefault(id(module), []).append(name)
            layers[id(module)] = module
    for key, layer in layers.items():
        yield LayerRecord(
            names=tuple(names[key]),
            kind=layer.kind,
            shape=(layer.out_features, layer.in_features),
            layout=layer.layout.pairs,
            bond_dims=layer.bond_dims,
            gauge=layer.gauge,
            dense_shape=layer.dense_shape,
            transposed=layer.dense_transposed,
        )


def opened_records(model: nn.Module) -> Iterator[OpenedRecord]:
    """One record for each opened module of a model."""
    names: dict[Opened, list[str]] = {}
    for name, module in opened_names(model).items():
        names.setdefault(module, []).append(name)
    for module, own in names.items():
        origins = {
            name: OriginRecord(parts=origin.parts, shape=origin.shape)
            for name, origin in module.origins().items()
        }
        yield OpenedRecord(names=tuple(own), origins=origins)
