"""The rows that a layer's matrix is multiplied with, in pieces that fit in memory."""

from collections.abc import Iterator

from torch import Tensor, nn

from mpocompress.layers import MPOConv, MPOEmbedding, MPOLayer, MPOLinear
from mpocompress.layers.recurrent import MPORecurrentWeight
from mpocompress.surgery.adapt_conv import ConvAdapter, ConvTransposeAdapter
from mpocompress.surgery.adapt_embedding import EmbeddingAdapter
from mpocompress.surgery.adapt_linear import LinearAdapter
from mpocompress.surgery.adapt_recurrent import RecurrentAdapter
from mpocompress.surgery.adapter import WeightAdapter, adapter_for
from mpocompress.tuning.padding import real_rows

# Entries of rows that are made at once where they are not the input itself: patches under a kernel
# take as much memory as the input, times the positions of the kernel.
_ENTRIES = 1 << 24


def adapter_of(layer: nn.Module) -> WeightAdapter:
    """The adapter of a layer that is known to have one.

    An MPO layer meets the rows that the dense layer met; of the adapter of that, only what is about
    rows is asked of it.

    Raises:
        TypeError: it has none.
    """
    adapter = _adapter_of_cores(layer) or adapter_for(layer)
    if adapter is None:
        raise TypeError(f"a {type(layer).__name__} has no weight that is known.")
    return adapter


def _adapter_of_cores(layer: nn.Module) -> WeightAdapter | None:
    if isinstance(layer, MPOLinear):
        return LinearAdapter()
    if isinstance(layer, MPOConv):
        return ConvTransposeAdapter() if layer.geometry.transposed else ConvAdapter()
    if isinstance(layer, MPOEmbedding):
        return EmbeddingAdapter()
    return RecurrentAdapter() if isinstance(layer, MPORecurrentWeight) else None


def table_rows(layer: nn.Module) -> int:
    """How many rows a table has that is looked up in; one of cores is not built for it."""
    if isinstance(layer, MPOLayer):
        return layer.out_features
    return adapter_of(layer).matrix(layer).shape[0]


def use_of(layer: nn.Module) -> tuple[int, bool]:
    """What layers that share a weight and use it alike, as a matrix or as a table, agree in."""
    adapter = adapter_of(layer)
    parameter = adapter.parameter(layer)
    return id(layer if parameter is None else parameter), adapter.looks_up


def row_pieces(
    layer: nn.Module, values: tuple[Tensor, ...], keep: Tensor | None
) -> Iterator[tuple[Tensor, ...]]:
    """Rows (N, in) of several inputs of one shape, piece by piece, without padding.

    Args:
        layer: whose matrix meets them.
        values: inputs; the same rows of each come together.
        keep: boolean (batch, sequence), True for real tokens.
    """
    adapter = adapter_of(layer)
    if adapter.takes_rows:
        yield tuple(real_rows(value, keep) for value in values)
        return
    start = 0
    for pieces in zip(*(adapter.pieces(layer, value, _ENTRIES) for value in values), strict=True):
        end = start + pieces[0].shape[0]
        part = None if keep is None else keep[start:end]
        yield tuple(real_rows(adapter.input_rows(layer, piece), part) for piece in pieces)
        start = end
