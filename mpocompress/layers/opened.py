"""Modules that read their weights without calling a layer, opened: the same function, by layers.

`nn.LSTM`, `nn.MultiheadAttention`, `nn.Bilinear`, fused experts, ... hand raw tensors to a kernel,
so no layer in them can be replaced, and nobody sees what a weight is multiplied with. An opened
module computes the same from `nn.Linear`s (or other layers) that share the weights' memory; those
are found, fitted and replaced like any other.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Origin:
    """What a parameter of the module that was opened has become.

    Attributes:
        parts: names of state entries here; one below the other they are the parameter.
        shape: of the parameter.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]


class Opened(nn.Module):
    """Stands where a module was that read its weights without calling a layer.

    Attributes:
        calls_layers: call every layer even where a kernel would do the same faster; for statistics.
    """

    calls_layers: bool = False

    def origins(self) -> Mapping[str, Origin]:
        """Parameters of the opened module by name, where they have other names or shapes here."""
        return {}

    def __getattr__(self, name: str) -> Any:
        """Parameters under the names that they had, made anew, for models that read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            origin = None if "_asks_origins" in self.__dict__ else self._origin(name)
            if origin is None:
                raise
        parts = [attrgetter(part)(self) for part in origin.parts]
        return torch.cat([part.reshape(-1) for part in parts]).reshape(origin.shape)

    def _origin(self, name: str) -> Origin | None:
        self.__dict__["_asks_origins"] = True  # which may ask for what is not there yet
        try:
            return self.origins().get(name)
        except (AttributeError, KeyError):
            return None
        finally:
            del self.__dict__["_asks_origins"]


@contextmanager
def layers_called(model: nn.Module) -> Iterator[None]:
    """Within the block opened modules call every one of their layers."""
    opened = [module for module in model.modules() if isinstance(module, Opened)]
    try:
        for module in opened:
            module.calls_layers = True
        yield
    finally:
        for module in opened:
            module.__dict__.pop("calls_layers", None)
