"""What surgery has to know of one kind of weight, and the registry of kinds.

A new kind is one file: a class with the methods of `WeightAdapter`, and one call of `register` in
it, imported by the room's `__init__`. Nothing else in this room names a kind of layer.
"""

from typing import Protocol

from torch import Tensor, nn

from mpocompress.mpo import MPO
from mpocompress.mpo.identity_gauge import IdentityGauge


class WeightAdapter(Protocol):
    """How the weight of one kind of module is read and replaced."""

    @property
    def kind(self) -> str:
        """Name of the kind in inventories and reports, such as "linear"."""
        ...

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is of this kind; whether it may be replaced is `refusal`'s matter."""
        ...

    def refusal(self, module: nn.Module) -> str | None:
        """Why this module must stay dense (one clause, for a report), or None if it need not.

        Sees the module alone; where it sits and with whom it shares is for `find_weights`.
        """
        ...

    def parameter(self, module: nn.Module) -> nn.Parameter | None:
        """The parameter that cores would stand for; modules with the same one are tied."""
        ...

    def matrix(self, module: nn.Module) -> Tensor:
        """The weight as a matrix (out, in), detached, in its own dtype; the storage is shared."""
        ...

    def build(self, module: nn.Module, mpo: MPO | IdentityGauge) -> nn.Module:
        """A layer that computes what `module` does, with `mpo` for its weight, stored as it is.

        Dtype, device, mode and `requires_grad` are the module's; no storage is shared with the
        module, nor with `mpo`.
        """
        ...

    def tie(self, layer: nn.Module, leader: nn.Module) -> None:
        """Make `layer`, which `build` made, use the very cores of `leader`; both keep the rest."""
        ...


_ADAPTERS: list[WeightAdapter] = []


def register(adapter: WeightAdapter) -> None:
    """Add a kind; where several match a module, the one registered first has it."""
    _ADAPTERS.append(adapter)


def adapter_for(module: nn.Module) -> WeightAdapter | None:
    """The adapter of the module's kind, or None if no kind of weight matches."""
    return next((adapter for adapter in _ADAPTERS if adapter.matches(module)), None)
