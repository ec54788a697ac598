"""What a model is made of: weights that can become MPOs, and all that is kept as it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from mpocompress.mpo import Layout
from mpocompress.surgery.adapter import WeightAdapter, adapter_for

RECURRENT = "recurrent"
# Kinds whose tensors are matrices that meet every row of an input once. Lookups cost nothing, and
# what a convolution costs depends on the size of its input.
MULTIPLIED = frozenset({"linear", "matrix", "attention", RECURRENT, "mpo"})
"""Kind of the weights that recurrent operators read dense."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightSite:
    """One convertible weight with all modules that use it. Compared and hashed by identity.

    Attributes:
        name: qualified name of the module that comes first in the model; "" is the model itself.
        names: every qualified name under which one of `modules` appears, `name` first.
        kind: of the adapter of the first module, such as "linear"; "recurrent" for every weight of
            a recurrent layer.
        shape: (out, in).
        dtype: of the weight.
        device: of the weight.
        parameters: entries of the weight, counted once; biases are entries of their own.
        modules: the distinct modules that share this weight.
        adapter: of the first module; others may be of another kind that reads the same matrix.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    parameters: int
    modules: tuple[nn.Module, ...] = field(repr=False)
    adapter: WeightAdapter = field(repr=False)

    @property
    def rebuilt(self) -> bool:
        """Whether its dense matrix is made again for an operator that reads it.

        Compressed it is small, but needs no fewer multiply-adds.
        """
        return self.kind == RECURRENT

    @property
    def looked_up(self) -> bool:
        """Whether rows are looked up in it and nothing is multiplied with it.

        The table of a tied output layer is multiplied with, too.
        """
        return self.adapter.looks_up and not any(
            isinstance(module, nn.Linear) for module in self.modules
        )

    @property
    def label(self) -> str:
        """The name as text for a person."""
        return label(self.name)

    @property
    def bytes(self) -> int:
        """Bytes of the weight."""
        return self.parameters * self.dtype.itemsize

    def matrix(self) -> Tensor:
        """The weight (out, in), detached; the storage is the model's."""
        return self.adapter.matrix(self.modules[0])

    def layouts(self) -> tuple[Layout, ...] | None:
        """Layouts that the new layers are made for; None if they take any equally well."""
        found = [(adapter_for(module) or self.adapter).layouts(module) for module in self.modules]
        return next((layouts for layouts in found if layouts is not None), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptEntry:
    """One parameter or buffer that stays as it is.

    Attributes:
        name: its first qualified name.
        also_known_as: its other qualified names.
        kind: "embedding", "conv", "norm", "bias", "buffer", "attention", "recurrent", "linear",
            "mpo", "quantized", "matrix" or "other".
        shape: of the tensor; () also for a lazy parameter that has none yet.
        parameters: its entries; 0 for what is not an `nn.Parameter`.
        bytes: of the tensor.
        reason: one sentence, without a full stop.
        is_buffer: not an `nn.Parameter`, so not counted in `parameters`.
        persistent: whether it is part of the state_dict.
    """

    name: str
    also_known_as: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    reason: str
    is_buffer: bool
    persistent: bool = True

    @property
    def numel(self) -> int:
        """Entries of the tensor, also for a buffer."""
        return self.parameters if not self.is_buffer else prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """All parameters and buffers of a model, each exactly once, in the order of the model.

    Attributes:
        entries: convertible weights and kept tensors, mixed, in model order.
        refused: qualified name of a module with weights that cannot be converted -> reason.
    """

    entries: tuple[WeightSite | KeptEntry, ...]
    refused: Mapping[str, str]

    @property
    def sites(self) -> tuple[WeightSite, ...]:
        """The convertible weights."""
        return tuple(entry for entry in self.entries if isinstance(entry, WeightSite))

    @property
    def kept(self) -> tuple[KeptEntry, ...]:
        """What is kept whatever is asked for."""
        return tuple(entry for entry in self.entries if isinstance(entry, KeptEntry))

    @property
    def parameters(self) -> int:
        """Parameters of the model; a shared one counts once."""
        return sum(entry.parameters for entry in self.entries)

    @property
    def bytes(self) -> int:
        """Bytes of all parameters and buffers, each once."""
        return sum(entry.bytes for entry in self.entries)


def label(name: str) -> str:
    """A qualified module name as text for a person: the model itself has the name ""."""
    return f"'{name}'" if name else "(the model itself)"
