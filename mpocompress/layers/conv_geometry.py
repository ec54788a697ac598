"""What a convolution is beside its kernel, and a chain of cores as a chain of convolutions.

The kernel (out, in, k1, ..., kn) of an ordinary convolution is the matrix (out, in * k1 * ...).
Sites whose in dims are whole axes of the kernel, in their order, and of which only the last has an
out dim, are a chain of ordinary convolutions of smaller kernels: each site convolves along its own
axes, and stride, dilation and padding of an axis go with it. So ((1, in * k1), (out, k2)) is a
vertical filter and then a horizontal one, ((1, in), (1, k1 * k2), (out, 1)) the Tucker-2 form, and
((out, 1), (1, in * k1 * k2)) a small full filter followed by a mixing of channels.

A transposed convolution, kernel (in, out, k1, ..., kn), is the mirror image: the matrix
(out * k1 * ... * kn, in), read from the right, each site writing to its own axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpocompress.mpo import Layout

Sizes = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvGeometry:
    """Sizes and options of a convolution, one entry for each of its 1 to 3 axes.

    Attributes:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: of the kernel.
        stride: steps.
        padding: (before, after) of each axis; of a transposed convolution: what is cut off.
        dilation: distance of the kernel's entries.
        groups: blocks of channels that do not mix.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        transposed: whether it is a transposed convolution.
        output_padding: added at the end of each axis of a transposed convolution.
    """

    in_channels: int
    out_channels: int
    kernel_size: Sizes
    stride: Sizes
    padding: tuple[tuple[int, int], ...]
    dilation: Sizes
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: Sizes = ()

    @classmethod
    def of(cls, conv: Any) -> "ConvGeometry":
        """That of an `nn.Conv1d`, ..., `nn.ConvTranspose3d`, or of an `MPOConv` in its place."""
        known = getattr(conv, "geometry", None)
        if isinstance(known, cls):
            return known
        if conv.padding == "valid":
            padding = [(0, 0)] * len(conv.kernel_size)
        elif conv.padding == "same":
            totals = [
                step * (size - 1)
                for step, size in zip(conv.dilation, conv.kernel_size, strict=True)
            ]
            padding = [(total // 2, total - total // 2) for total in totals]
        else:
            padding = [(size, size) for size in conv.padding]
        return cls(
            in_channels=conv.in_channels,
            out_channels=conv.out_channels,
            kernel_size=tuple(conv.kernel_size),
            stride=tuple(conv.stride),
            padding=tuple(padding),
            dilation=tuple(conv.dilation),
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            transposed=conv.transposed,
            output_padding=tuple(conv.output_padding) if conv.transposed else (),
        )

    @property
    def axes(self) -> int:
        """Number of axes, 1 to 3."""
        return len(self.kernel_size)

    @property
    def kernel_shape(self) -> Sizes:
        """Of the dense weight, as in torch."""
        if self.transposed:
            return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the kernel as a matrix."""
        first, *rest = self.kernel_shape
        return (prod(rest), first) if self.transposed else (first, prod(rest))

    def kernel(self, matrix_OI: Tensor) -> Tensor:
        """The matrix as a kernel."""
        matrix_OI = matrix_OI.mT if self.transposed else matrix_OI
        return matrix_OI.reshape(self.kernel_shape)

    def layouts(self) -> tuple[Layout, ...]:
        """Layouts that are chains of ordinary convolutions, simplest first."""
        rows, columns = self.matrix_shape
        found: list[tuple[tuple[int, int], ...]] = [((rows, 1), (1, columns))]
        channels, *sizes = self.kernel_shape[1:]
        other = self.kernel_shape[0]
        spatial = prod(sizes)
        # The far side's channels, the near side's with leading axes, what is left of the axes.
        if self.axes > 1 and sizes[0] > 1 and spatial > sizes[0]:
            rest = spatial // sizes[0]
            found.append(((1, channels * sizes[0]), (other, rest)))
        if spatial > 1:
            found.append(((1, channels), (other, spatial)))
            found.append(((1, channels), (1, spatial), (other, 1)))
        if self.transposed:
            flipped = [tuple((i, o) for o, i in pairs) for pairs in found[1:]]
            found = [found[0], *flipped]
        return tuple(Layout.from_pairs(pairs) for pairs in dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class ConvStep:
    """One site as a convolution.

    Attributes:
        site: of the chain.
        axes: along which it works: those of its kernel, and those that no site has.
        kernel_size: 1 along all others.
        mixes: it has the channels of all groups on one side: the only step that is grouped.
        flipped: the chain is read from the other end, so left and right bonds change roles.
    """

    site: int
    axes: Sizes
    kernel_size: Sizes
    mixes: bool
    flipped: bool

    def kernel(self, core: Tensor, *, transposed: bool) -> Tensor:
        """The step's kernel, as torch wants it, from its core (left, out, in, right)."""
        if self.flipped:
            core = core.permute(3, 1, 2, 0)
        left, out, in_, right = core.shape
        spatial = prod(self.kernel_size)
        if transposed:  # from (in, right) to (left, channels)
            moved, rows, channels = core.permute(2, 3, 0, 1), in_ * right, left * out // spatial
        else:  # from (left, channels) to (out, right)
            moved, rows, channels = core.permute(1, 3, 0, 2), out * right, left * in_ // spatial
        kernel = moved.reshape(rows, channels, *self.kernel_size)
        # By the strides of its sizes of 1 torch takes a permuted kernel for one with channels last,
        # and so would give outputs that `view` and exported `flatten` refuse.
        return kernel.clone(memory_format=torch.contiguous_format)


def conv_steps(layout: Layout, geometry: ConvGeometry) -> tuple[ConvStep, ...] | None:
    """The chain as convolutions in the order of their application; None if it is no such chain."""
    if (layout.out_features, layout.in_features) != geometry.matrix_shape:
        return None
    # The near side has channels and axes of the kernel, the far side channels only.
    near, far = (
        (layout.out_dims, layout.in_dims)
        if geometry.transposed
        else (layout.in_dims, layout.out_dims)
    )
    sites = list(range(layout.num_sites))
    flipped = len(sites) == 2 and far[1] == 1 and near[0] == 1
    if flipped:
        sites.reverse()
    if any(far[site] != 1 for site in sites[:-1]):
        return None
    channels, *sizes = geometry.kernel_shape[1:]
    position = 0  # of the next axis
    steps: list[ConvStep] = []
    for site in sites:
        # The first site has the channels, and all have whole axes.
        product = channels if not steps else 1
        start = position
        while position < len(sizes) and product < near[site]:
            product *= sizes[position]
            position += 1
        if product != near[site]:
            return None
        axes = tuple(range(start, position))
        kernel = tuple(size if axis in axes else 1 for axis, size in enumerate(sizes))
        steps.append(ConvStep(site, axes, kernel, site == sites[-1], flipped))
    # What is left are axes of size 1, which may have strides, too.
    idle = tuple(range(position, len(sizes)))
    steps[0] = replace(steps[0], axes=(*steps[0].axes, *idle))
    return tuple(reversed(steps)) if geometry.transposed else tuple(steps)


_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)


def padded(input: Tensor, geometry: ConvGeometry) -> Tensor:
    """The input with all padding of an ordinary convolution in place, whatever its mode."""
    if not any(map(any, geometry.padding)):
        return input
    flat = [size for pair in reversed(geometry.padding) for size in pair]
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return functional.pad(input, flat, mode=mode)


def convolve(
    input: Tensor,
    kernel: Tensor,
    geometry: ConvGeometry,
    axes: Sizes,
    groups: int,
    bias: Tensor | None,
    output_padding: Sizes,
) -> Tensor:
    """One convolution with the geometry's options along these axes, and none along the others.

    Args:
        input: (batch, channels, ...), padded already unless the geometry's padding is symmetric
            zeros.
        kernel: as torch wants it.
        geometry: of the whole.
        axes: where stride, padding and dilation apply.
        groups: of this convolution.
        bias: of this convolution.
        output_padding: of a transposed convolution, for each axis.
    """

    def along(values: Sequence[int], otherwise: int) -> list[int]:
        return [value if axis in axes else otherwise for axis, value in enumerate(values)]

    stride, dilation = along(geometry.stride, 1), along(geometry.dilation, 1)
    padding = along([before for before, _ in geometry.padding], 0)
    if geometry.transposed:
        extra = along(output_padding, 0)
        return _TRANSPOSED[geometry.axes - 1](
            input, kernel, bias, stride, padding, extra, groups, dilation
        )
    return _CONVOLUTIONS[geometry.axes - 1](
        input, kernel, bias, stride, padding if pads_itself(geometry) else 0, dilation, groups
    )


def pads_itself(geometry: ConvGeometry) -> bool:
    """Whether torch's convolutions can do the padding: zeros, the same on both sides."""
    symmetric = all(before == after for before, after in geometry.padding)
    return symmetric and geometry.padding_mode == "zeros"
