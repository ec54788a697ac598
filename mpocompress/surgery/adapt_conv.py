"""Convolutions of one to three axes, and transposed ones: rows are the patches under the kernel."""

# Shape suffixes: N batch, C channels, S axes of the input, P positions of the kernel.

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from mpocompress.layers import MPOConv
from mpocompress.layers.conv_geometry import ConvGeometry, padded
from mpocompress.mpo import Layout
from mpocompress.mpo.weight import Weight
from mpocompress.surgery.adapter import OneWeight, register
from mpocompress.surgery.refusals import why_dense

_CLASSES: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class ConvAdapter(OneWeight):
    """Reads the kernel (out, in, ...) of an ordinary convolution and builds `MPOConv`."""

    kind = "conv"
    takes_rows = False

    def matches(self, module: nn.Module) -> bool:
        """Whether this is an ordinary convolution, or a subclass of one."""
        return isinstance(module, _CLASSES[:3])

    def refusal(self, module: nn.Module) -> str | None:
        """Why the module must stay dense, or None. See `WeightAdapter.refusal`."""
        index, base = next(
            (index, cls) for index, cls in enumerate(_CLASSES) if isinstance(module, cls)
        )
        return why_dense(module, base, dims=index % 3 + 3)

    def matrix(self, module: nn.Module) -> Tensor:
        """The kernel as (out, in * k1 * ...), detached."""
        return self.weight(module).flatten(1)

    def layouts(self, module: nn.Module) -> tuple[Layout, ...] | None:
        """Those that run as chains of smaller convolutions."""
        return ConvGeometry.of(module).layouts()

    def pieces(self, module: nn.Module, value: Tensor, entries: int) -> Sequence[Tensor]:
        """Parts of the batch: patches take more memory than the input."""
        geometry = ConvGeometry.of(module)
        if value.ndim != geometry.axes + 2 or value.shape[0] == 0:
            return (value,)
        # At most: one patch for each position of the padded input.
        per_image = value[0].numel() * max(1, prod(geometry.kernel_size))
        return value.split(max(1, entries // max(1, per_image)))

    def input_rows(self, module: nn.Module, value: Tensor) -> Tensor:
        """The patches under the kernel: (batch, groups * positions, in * k1 * ...)."""
        geometry = ConvGeometry.of(module)
        return _patches(_batched(value, geometry), geometry, geometry.groups)

    def output_rows(self, module: nn.Module, value: Tensor) -> Tensor | None:
        """The channels at each position; None for groups, whose outputs see other inputs."""
        geometry = ConvGeometry.of(module)
        if geometry.groups > 1:
            return None
        return _batched(value, geometry).flatten(2).mT

    def has_offset(self, module: nn.Module) -> bool:
        """Whether there is a bias, and one patch under it."""
        return module._parameters.get("bias") is not None and ConvGeometry.of(module).groups == 1

    def build(self, module: nn.Module, mpo: Weight) -> nn.Module:
        """An `MPOConv` like the module. See `WeightAdapter.build`."""
        layer = MPOConv.from_mpo(
            self.own_copy(module, mpo), ConvGeometry.of(module), self.own_bias(module)
        )
        return self.finished(module, layer)


class ConvTransposeAdapter(ConvAdapter):
    """Reads the kernel (in, out, ...) of a transposed convolution and builds `MPOConv`.

    Its matrix is (out * k1 * ..., in): each position of the input is multiplied with it.
    """

    transposed = True

    def matches(self, module: nn.Module) -> bool:
        """Whether this is a transposed convolution, or a subclass of one."""
        return isinstance(module, _CLASSES[3:])

    def matrix(self, module: nn.Module) -> Tensor:
        """The kernel as (out * k1 * ..., in), detached."""
        return self.weight(module).flatten(1).mT

    def input_rows(self, module: nn.Module, value: Tensor) -> Tensor:
        """The channels at each position: (batch, positions, in)."""
        return _batched(value, ConvGeometry.of(module)).flatten(2).mT

    def output_rows(self, module: nn.Module, value: Tensor) -> Tensor | None:
        """What each position of the input writes to; None for groups."""
        geometry = ConvGeometry.of(module)
        return _patches(_batched(value, geometry), geometry, 1) if geometry.groups == 1 else None

    def has_offset(self, module: nn.Module) -> bool:
        """No: the bias is added after overlapping outputs are summed."""
        return False


def _batched(value: Tensor, geometry: ConvGeometry) -> Tensor:
    return value if value.ndim == geometry.axes + 2 else value[None]


def _patches(value_NCS: Tensor, geometry: ConvGeometry, groups: int) -> Tensor:
    """What lies under the kernel at each position: (batch, groups * positions, channels * P)."""
    x = padded(value_NCS, geometry)
    for axis in range(geometry.axes):
        reach = geometry.dilation[axis] * (geometry.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, geometry.stride[axis])[..., :: geometry.dilation[axis]]
    batch, channels = x.shape[:2]
    x = x.reshape(batch, groups, channels // groups, *x.shape[2:])
    positions = range(3, 3 + geometry.axes)
    kernel = range(3 + geometry.axes, 3 + 2 * geometry.axes)
    x = x.permute(0, 1, *positions, 2, *kernel)
    return x.flatten(1, 1 + geometry.axes).flatten(2)


register(ConvAdapter())
register(ConvTransposeAdapter())
