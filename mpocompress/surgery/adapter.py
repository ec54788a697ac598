"""What surgery has to know of one kind of weight, and the registry of kinds.

A new kind is one file: a class with the methods of `WeightAdapter`, and one call of `register` in
it, imported by the room's `__init__`. Nothing else in this room names a kind of layer.

Every weight is a matrix (out, in) that maps rows to rows. What these rows are is the adapter's
matter: of a convolution they are the patches under the kernel.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mpocompress.layers import MPOLayer
from mpocompress.layers.gauged_cores import GaugedCores
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.identity_gauge import IdentityGauge
from mpocompress.mpo.weight import Weight


class WeightAdapter(Protocol):
    """How the weight of one kind of module is read, sees data, and is replaced."""

    @property
    def kind(self) -> str:
        """Name of the kind in inventories and reports, such as "linear"."""
        ...

    @property
    def transposed(self) -> bool:
        """Whether the parameter, seen as (first dimension, all others), is (in, out)."""
        ...

    @property
    def looks_up(self) -> bool:
        """Whether inputs are numbers of rows of the matrix instead of vectors."""
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

    def layouts(self, module: nn.Module) -> tuple[Layout, ...] | None:
        """Layouts that the new layer is made for, or None if it takes any equally well."""
        ...

    @property
    def takes_rows(self) -> bool:
        """Whether the matrix is multiplied with the input itself, features last."""
        ...

    @property
    def watches_input(self) -> bool:
        """Whether what `output_rows` takes is a gradient at the module's input."""
        ...

    def pieces(self, module: nn.Module, value: Tensor, entries: int) -> Sequence[Tensor]:
        """The input cut into parts of the batch, each with about so many entries of rows."""
        ...

    def input_rows(self, module: nn.Module, value: Tensor) -> Tensor:
        """What the matrix is multiplied with when the module is called: (..., in)."""
        ...

    def output_rows(self, module: nn.Module, value: Tensor) -> Tensor | None:
        """A gradient at the module's output as one at the matrix's outputs: (..., out).

        None where errors of the rows cannot be told apart.
        """
        ...

    def has_offset(self, module: nn.Module) -> bool:
        """Whether the module has a bias that is added to the matrix's outputs, row by row."""
        ...

    def build(self, module: nn.Module, mpo: Weight) -> nn.Module:
        """A layer that computes what `module` does, with `mpo` for its weight, stored as it is.

        Dtype, device, mode and `requires_grad` are the module's; no storage is shared with the
        module, nor with `mpo`.
        """
        ...


class OneWeight:
    """What adapters of modules with one parameter `weight`, and perhaps a `bias`, share."""

    kind = ""
    transposed = False
    looks_up = False
    takes_rows = True
    watches_input = False

    def parameter(self, module: nn.Module) -> nn.Parameter | None:
        """The weight, unless something else (a parametrization, old weight_norm) computes it."""
        return module._parameters.get("weight")

    def weight(self, module: nn.Module) -> Tensor:
        """The weight as it is stored, detached."""
        weight = self.parameter(module)
        if weight is None:
            raise TypeError(f"{type(module).__name__} has no parameter 'weight'.")
        return weight.detach()

    def layouts(self, module: nn.Module) -> tuple[Layout, ...] | None:
        """Any: see `WeightAdapter.layouts`."""
        return None

    def pieces(self, module: nn.Module, value: Tensor, entries: int) -> Sequence[Tensor]:
        """The input as it is: see `WeightAdapter.pieces`."""
        return (value,)

    def input_rows(self, module: nn.Module, value: Tensor) -> Tensor:
        """The input itself: see `WeightAdapter.input_rows`."""
        return value

    def output_rows(self, module: nn.Module, value: Tensor) -> Tensor | None:
        """The output itself: see `WeightAdapter.output_rows`."""
        return value

    def has_offset(self, module: nn.Module) -> bool:
        """No: see `WeightAdapter.has_offset`."""
        return False

    def own_copy(self, module: nn.Module, mpo: Weight) -> Weight:
        """The cores in the dtype and on the device of the module's weight, always copied.

        A single core may be the weight itself, reshaped, and one MPO may go into several models
        that are trained apart.
        """
        like = self.weight(module)

        # A skeleton on the meta device has its values still to come: they are the cores' own.
        def place(tensor: Tensor) -> torch.device:
            return tensor.device if like.is_meta else like.device

        def copied(tensor: Tensor) -> Tensor:
            return tensor.detach().to(place(tensor), like.dtype, copy=True)

        if isinstance(mpo, IdentityGauge):
            return IdentityGauge(
                tuple(map(copied, mpo.free)),
                tuple(rows.to(place(rows), copy=True) for rows in mpo.pivots),
                copied(mpo.last),
                mpo.layout,
                mpo.shape,
            )
        return MPO(map(copied, mpo.cores), shape=mpo.shape)

    def own_bias(self, module: nn.Module) -> Tensor | None:
        """A copy of the bias, if there is one."""
        bias = module._parameters.get("bias")
        return None if bias is None else bias.detach().clone()

    def finished(self, module: nn.Module, layer: MPOLayer) -> nn.Module:
        """The layer with the module's mode and `requires_grad`, knowing what it stands for."""
        old, bias = self.parameter(module), module._parameters.get("bias")
        layer.kind, layer.dense_transposed = self.kind, self.transposed
        if self.transposed or self.weight(module).ndim != 2:
            layer.dense_shape = tuple(self.weight(module).shape)
        layer.cores.requires_grad_(old is not None and old.requires_grad)
        if layer.bias is not None and bias is not None:
            layer.bias.requires_grad_(bias.requires_grad)
        return layer.train(module.training)


def tie_cores(layer: nn.Module, leader: nn.Module) -> None:
    """Make an MPO layer use the very cores of another one; both keep the rest.

    Raises:
        TypeError: one of them is no MPO layer.
    """
    if not isinstance(layer, MPOLayer) or not isinstance(leader, MPOLayer):
        raise TypeError(
            f"only MPO layers share cores, not {type(layer).__name__} and {type(leader).__name__}."
        )
    if isinstance(leader.cores, GaugedCores):
        layer.cores = leader.cores
        return
    layer.free_gauge_()
    for position, core in enumerate(leader.cores):
        layer.cores.register_parameter(str(position), core)


_ADAPTERS: list[WeightAdapter] = []


def register(adapter: WeightAdapter) -> None:
    """Add a kind; where several match a module, the one registered first has it."""
    _ADAPTERS.append(adapter)


def adapter_for(module: nn.Module) -> WeightAdapter | None:
    """The adapter of the module's kind, or None if no kind of weight matches."""
    return next((adapter for adapter in _ADAPTERS if adapter.matches(module)), None)
