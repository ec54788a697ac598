"""Kind and reason of every stored tensor that is kept: what a report says of it."""

from collections.abc import Sequence

from onnx import TensorProto

from mpocompress.export.graphs.model import STANDARD, Consumer
from mpocompress.export.graphs.tensors import FLOATS

CONV_REASON = "a convolution kernel is not a linear weight"
_LOOKUP = "an embedding table is looked up row by row, and only linear weights are converted"
_NORM = "normalization parameters are vectors"
_RECURRENT = "recurrent operators read their weights without a matrix product of their own"
_ATTENTION = "fused attention reads its weights without a matrix product of its own"
_QUANTIZED = "it is quantized, and multiplied as integers"

_BY_OPERATOR = {
    **dict.fromkeys(("Conv", "ConvTranspose", "DeformConv", "FusedConv"), ("conv", CONV_REASON)),
    **dict.fromkeys(("Gather", "GatherElements", "GatherND"), ("embedding", _LOOKUP)),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), ("recurrent", _RECURRENT)),
    **dict.fromkeys(
        (
            *("BatchNormalization", "LayerNormalization", "InstanceNormalization"),
            *("GroupNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
            *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
            "EmbedLayerNormalization",
        ),
        ("norm", _NORM),
    ),
    **dict.fromkeys(
        ("Attention", "MultiHeadAttention", "QAttention", "GroupQueryAttention"),
        ("attention", _ATTENTION),
    ),
    **dict.fromkeys(
        (
            *("MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulNBits", "QGemm"),
            *("ConvInteger", "QLinearConv", "DynamicQuantizeMatMul", "GatherBlockQuantized"),
        ),
        ("quantized", _QUANTIZED),
    ),
}
PRODUCTS = frozenset({"MatMul", "Gemm"})
_SUMS = frozenset({"Add", "Sub", "Sum", "Gemm", "Conv", "ConvTranspose"})


def describe(tensor: TensorProto, consumers: Sequence[Consumer]) -> tuple[str, str]:
    """Kind and reason of a tensor that nothing multiplies by as a weight.

    Args:
        tensor: the stored tensor.
        consumers: who reads it in the end, behind whatever only rearranges it.
    """
    # One row is a vector: scikit-learn writes biases so.
    dims = len(tensor.dims) if sum(size > 1 for size in tensor.dims) > 1 else 1
    if not consumers:
        return "other", "nothing in the graph reads it"
    first = consumers[0]
    if first.position < 0:
        return "other", f"it is read inside the body of {first.node.op_type}"
    known = _BY_OPERATOR.get(first.node.op_type)
    is_float = tensor.data_type in FLOATS
    if dims < 2 and is_float and first.node.op_type in _SUMS:
        return "bias", "biases are vectors"
    if known is not None:
        if known[0] == "embedding" and first.position != 0:
            return "buffer", "indices, not a weight"
        return known if dims > 1 or known[0] in ("norm", "quantized") else ("other", "a vector")
    if not is_float:
        return "buffer", "a constant of the graph, not a weight"
    operator = first.node.op_type
    if first.node.domain not in STANDARD:
        operator = f"{first.node.domain}.{operator}"
    if first.node.op_type in PRODUCTS and first.node.domain in STANDARD and dims > 1:
        how = f"is added in {first.label}, and nothing multiplies by it"
        if first.position == 0:
            how = f"multiplies from the left in {first.label}; weights on the right are converted"
        return "matrix" if dims == 2 else "other", f"it {how}"
    if dims < 2:
        return "other", f"a vector, used by {operator}"
    return "matrix" if dims == 2 else "other", f"{operator} is not an operator that is converted"
