"""`MPOConv`: a convolution of any kind whose kernel is a matrix product operator."""

from collections.abc import Sequence
from math import prod

from torch import Tensor

from mpocompress.errors import ContractionError
from mpocompress.layers.base import MPOLayer
from mpocompress.layers.conv_geometry import (
    ConvGeometry,
    ConvStep,
    conv_steps,
    convolve,
    padded,
    pads_itself,
)
from mpocompress.mpo.identity_gauge import Gauge
from mpocompress.mpo.weight import Weight, in_gauge


class MPOConv(MPOLayer):
    """Does what `nn.Conv1d`, ..., `nn.ConvTranspose3d` do, with the kernel as cores.

    The kernel is the matrix (out, in * k1 * ... * kn), that of a transposed convolution the matrix
    (out * k1 * ... * kn, in). Layouts whose sites are whole axes of it run as chains of smaller
    convolutions (see `conv_geometry`), with as few multiply-adds as they have parameters; all
    others, and chains that would cost more than the dense kernel, rebuild it in every forward.
    """

    kind = "conv"
    geometry: ConvGeometry
    _steps: tuple[ConvStep, ...] | None

    @classmethod
    def from_mpo(
        cls,
        mpo: Weight,
        geometry: ConvGeometry,
        bias: Tensor | None = None,
        *,
        gauge: Gauge | None = None,
    ) -> "MPOConv":
        """A convolution with these cores and this bias, treated as in `MPOLinear.from_mpo`.

        Args:
            mpo: of the shape `geometry.matrix_shape`.
            geometry: channels, stride, ...; `ConvGeometry.of(conv)` reads them off.
            bias: (out_channels,) or None.
            gauge: as in `MPOLinear.from_mpo`.

        Raises:
            ContractionError: cores or bias of another shape.
            LayoutError: no such gauge.
        """
        if tuple(mpo.shape) != geometry.matrix_shape:
            raise ContractionError(
                f"an MPO of shape {tuple(mpo.shape)} for a kernel {geometry.kernel_shape}; as a "
                f"matrix it is {geometry.matrix_shape[0]}x{geometry.matrix_shape[1]}."
            )
        if bias is not None and tuple(bias.shape) != (geometry.out_channels,):
            raise ContractionError(
                f"bias has shape {tuple(bias.shape)}, but there are {geometry.out_channels} "
                "output channels."
            )
        layer = cls.__new__(cls)
        # Not yet a module: the plan of the forward, made in _set_up, asks for it.
        object.__setattr__(layer, "geometry", geometry)
        object.__setattr__(layer, "dense_shape", geometry.kernel_shape)
        object.__setattr__(layer, "dense_transposed", geometry.transposed)
        layer._set_up(in_gauge(mpo, gauge), bias)
        return layer

    def _plan_forward(self) -> None:
        geometry = self.geometry
        steps = conv_steps(self._layout, geometry)
        if steps is not None:
            bonds = (1, *self.bond_dims, 1)
            entries = sum(
                bonds[step.site]
                * prod(self._layout.pairs[step.site])
                * bonds[step.site + 1]
                * (1 if step.mixes else geometry.groups)
                for step in steps
            )
            if entries > prod(self._layout.out_dims) * prod(self._layout.in_dims):
                steps = None
        self._steps = steps

    @property
    def weight(self) -> Tensor:
        """The dense kernel, rebuilt at each access and differentiable in the cores."""
        return self.geometry.kernel(self.matrix)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Convolve: (batch, in_channels, ...) or (in_channels, ...).

        Args:
            input: as for torch's convolutions.
            output_size: of a transposed convolution with a stride, as there.

        Raises:
            ContractionError: the input has other dimensions or channels, or a size that cannot be.
        """
        geometry = self.geometry
        if input.ndim not in (geometry.axes + 1, geometry.axes + 2) or (
            input.shape[-geometry.axes - 1] != geometry.in_channels
        ):
            raise ContractionError(
                f"input of shape {tuple(input.shape)} for a convolution of "
                f"{geometry.in_channels} channels with {geometry.axes} axes; it is (batch, "
                "channels, ...) or (channels, ...)."
            )
        single = input.ndim == geometry.axes + 1
        x = input[None] if single else input
        extra = geometry.output_padding
        if output_size is not None:
            extra = _output_padding(geometry, x.shape[2:], output_size)
        if not geometry.transposed and not pads_itself(geometry):
            x = padded(x, geometry)
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if self._steps is None:
            axes = tuple(range(geometry.axes))
            x = convolve(x, self.weight, geometry, axes, geometry.groups, bias, extra)
        else:
            x = self._chain(x, self._steps, bias, extra)
        return x[0] if single else x

    def _chain(
        self, x: Tensor, steps: Sequence[ConvStep], bias: Tensor | None, extra: tuple[int, ...]
    ) -> Tensor:
        """One step after the other; groups share all but one, so there they are further rows."""
        geometry = self.geometry
        cores = list(self.cores)
        groups, shared_bias = geometry.groups, None
        if groups > 1 and geometry.transposed and not steps[-1].mixes:
            bias, shared_bias = None, bias
        for number, step in enumerate(steps):
            kernel = step.kernel(cores[step.site], transposed=geometry.transposed)
            last = number == len(steps) - 1
            if groups > 1 and not step.mixes:
                x = x.reshape(-1, x.shape[1] // groups, *x.shape[2:]) if number == 0 else x
            elif groups > 1 and number > 0:
                x = x.reshape(-1, x.shape[1] * groups, *x.shape[2:])
            x = convolve(
                x,
                kernel,
                geometry,
                step.axes,
                groups if step.mixes else 1,
                bias if last else None,
                extra,
            )
            if groups > 1 and step.mixes and not last:
                x = x.reshape(-1, x.shape[1] // groups, *x.shape[2:])
        if groups > 1 and not steps[-1].mixes:
            x = x.reshape(-1, x.shape[1] * groups, *x.shape[2:])
        if shared_bias is not None:
            x = x + shared_bias.reshape(-1, *[1] * geometry.axes)
        return x

    def extra_repr(self) -> str:
        """Channels, kernel, layout and bond dimensions, for `print(model)`."""
        geometry = self.geometry
        gauge = "" if self.gauge == "none" else f", gauge={self.gauge!r}"
        return (
            f"{geometry.in_channels}, {geometry.out_channels}, "
            f"kernel_size={geometry.kernel_size}, stride={geometry.stride}, "
            f"groups={geometry.groups}, transposed={geometry.transposed}, layout={self._layout}, "
            f"bond_dims={list(self.bond_dims)}{gauge}"
        )


def _output_padding(
    geometry: ConvGeometry, sizes: Sequence[int], wanted: Sequence[int]
) -> tuple[int, ...]:
    """What must be added at the end of each axis for the output to have the wanted size."""
    if not geometry.transposed:
        raise ContractionError("output_size is for transposed convolutions.")
    wanted = list(wanted)[-geometry.axes :]
    found = []
    for axis, size in enumerate(sizes):
        least = (
            (size - 1) * geometry.stride[axis]
            - sum(geometry.padding[axis])
            + geometry.dilation[axis] * (geometry.kernel_size[axis] - 1)
            + 1
        )
        extra = wanted[axis] - least
        if not 0 <= extra < max(geometry.stride[axis], geometry.dilation[axis]):
            raise ContractionError(
                f"output_size {wanted[axis]} in axis {axis}: from {least} to "
                f"{least + geometry.stride[axis] - 1} can be had from an input of {size}."
            )
        found.append(extra)
    return tuple(found)
