"""`TensorContractionLayer`: a small matrix for each mode of an activation that is a tensor."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from mpocompress.errors import ContractionError, LayoutError
from mpocompress.layers.linear import check_gain
from mpocompress.mpo import MPO, Layout, apply_cores
from mpocompress.mpo.contract import ContractionPlans, plans_for
from mpocompress.mpo.initialize import initial_cores


class TensorContractionLayer(nn.Module):
    """y = x contracted with a matrix along each mode: (..., i_1, ..., i_N) to (..., r_1, ..., r_N).

    On the flattened activation this is the Kronecker product of the matrices: an MPO of bond
    dimension 1 whose sites are the modes. The parameters are `factors.0` (r_1, i_1), `factors.1`,
    ...; the modes are contracted in the order of the fewest multiply-adds.

    Args:
        in_shape: i_1, ..., i_N, without the batch.
        out_shape: r_1, ..., r_N.
        bias: whether a tensor of `out_shape` is added.
        gain: of the start, as for `MPOLinear`; None: 3**-0.5.
        generator: of the start; torch's global one by default.
        device: where the parameters live.
        dtype: of the parameters.

    Raises:
        LayoutError: shapes of unequal length, empty ones, or a size below 1.
        DataError: a gain that is not above 0.

    Source: Kossaifi, Khanna, Lipton, Furlanello, Anandkumar, "Tensor Contraction Layers for
    Parsimonious Deep Nets", CVPR workshops 2017.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        bias: bool = True,
        *,
        gain: float | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layout = Layout(tuple(out_shape), tuple(in_shape))
        self.in_shape, self.out_shape = layout.in_dims, layout.out_dims
        variance = check_gain(gain) ** 2 / layout.in_features
        cores = initial_cores(
            layout, 1, variance=variance, dtype=dtype, device=device, generator=generator
        )
        self.factors = nn.ParameterList(nn.Parameter(core[0, :, :, 0].clone()) for core in cores)
        # Made here, as it is no business of a compiled graph.
        self._plans: ContractionPlans = plans_for(cores)
        self.bias: nn.Parameter | None = None
        if bias:
            bound = layout.in_features**-0.5
            offset = torch.empty(self.out_shape, device=device, dtype=dtype)
            self.bias = nn.Parameter(offset.uniform_(-bound, bound, generator=generator))

    def forward(self, input: Tensor) -> Tensor:
        """Contract the trailing modes.

        Raises:
            ContractionError: the trailing dimensions of the input are not `in_shape`.
        """
        modes = len(self.in_shape)
        if tuple(input.shape[-modes:]) != self.in_shape:
            raise ContractionError(
                f"input of shape {tuple(input.shape)}: its last {modes} dimensions must be "
                f"{self.in_shape}. Reshape or permute it."
            )
        lead = input.shape[:-modes]
        cores = [factor[None, :, :, None] for factor in self.factors]
        shape = (prod(self.out_shape), prod(self.in_shape))
        plan = self._plans.for_call(prod(lead))
        flat = apply_cores(cores, input.reshape(*lead, shape[1]), shape=shape, plan=plan)
        output = flat.reshape(*lead, *self.out_shape)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def to_mpo(self) -> MPO:
        """The matrix between the flattened activations, bond dimension 1; storage is shared."""
        return MPO.kronecker([factor.detach() for factor in self.factors])

    def extra_repr(self) -> str:
        """Shapes, for `print(model)`."""
        return f"{self.in_shape}, {self.out_shape}, bias={self.bias is not None}"


class TensorRegressionLayer(nn.Module):
    """y = <x, W> + b for an activation x that is a tensor, W a low-rank Tucker tensor.

    W (i_1, ..., i_N, out) is a core (r_1, ..., r_N, r_out) with a factor matrix at each mode. So x
    is contracted along its modes to (r_1, ..., r_N), mapped to r_out numbers by the core, and these
    to the outputs: nothing of the size of W is ever made.

    Args:
        in_shape: i_1, ..., i_N, without the batch.
        out_features: number of outputs.
        ranks: r_1, ..., r_N and r_out; each at most the size of its mode.
        bias: whether there is a bias (out,).
        gain: of the start, as for `MPOLinear`; None: 3**-0.5.
        generator: of the start; torch's global one by default.
        device: where the parameters live.
        dtype: of the parameters.

    Raises:
        LayoutError: another number of ranks than modes, or a rank outside 1 to the mode's size.
        DataError: a gain that is not above 0.

    Source: Kossaifi, Lipton, Kolbeinsson, Khanna, Furlanello, Anandkumar, "Tensor Regression
    Networks", Journal of Machine Learning Research 21 (2020) 1.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_features: int,
        ranks: Sequence[int],
        bias: bool = True,
        *,
        gain: float | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes, ranks = (*in_shape, out_features), tuple(ranks)
        if len(ranks) != len(sizes) or not all(
            1 <= rank <= size for rank, size in zip(ranks, sizes, strict=True)
        ):
            raise LayoutError(
                f"ranks {ranks}: give one for each mode {tuple(in_shape)} and one for the "
                f"{out_features} outputs, each from 1 to the size of its mode."
            )
        scale = check_gain(gain)
        # Each of the three maps keeps the mean square of isotropic inputs; the last has the gain.
        self.contraction = TensorContractionLayer(
            in_shape, ranks[:-1], False, gain=1.0, generator=generator, device=device, dtype=dtype
        )
        core, factor = (
            initial_cores(
                Layout((out,), (in_,)),
                None,
                variance=gain**2 / in_,
                dtype=dtype,
                device=device,
                generator=generator,
            )[0][0, :, :, 0]
            for out, in_, gain in (
                (ranks[-1], prod(ranks[:-1]), 1.0),
                (out_features, ranks[-1], scale),
            )
        )
        self.core, self.output_factor = nn.Parameter(core.clone()), nn.Parameter(factor.clone())
        self.ranks = ranks
        self.bias: nn.Parameter | None = None
        if bias:
            bound = prod(in_shape) ** -0.5
            offset = torch.empty(out_features, device=device, dtype=dtype)
            self.bias = nn.Parameter(offset.uniform_(-bound, bound, generator=generator))

    def forward(self, input: Tensor) -> Tensor:
        """(..., i_1, ..., i_N) to (..., out).

        Raises:
            ContractionError: the trailing dimensions of the input are not `in_shape`.
        """
        small = self.contraction(input).flatten(-len(self.contraction.in_shape))
        return nn.functional.linear(small @ self.core.mT, self.output_factor, self.bias)

    def weight_tensor(self) -> Tensor:
        """The dense W, (i_1, ..., i_N, out), differentiable: the slow twin of `forward`."""
        weight = self.output_factor @ self.core
        weight = weight.mT.reshape(*self.contraction.out_shape, -1)
        for mode, factor in enumerate(self.contraction.factors):
            weight = torch.tensordot(factor, weight.movedim(mode, 0), dims=([0], [0]))
            weight = weight.movedim(0, mode)
        return weight

    def extra_repr(self) -> str:
        """Shapes, for `print(model)`."""
        return f"out_features={len(self.output_factor)}, ranks={self.ranks}"
