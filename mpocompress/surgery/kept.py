"""Kind and reason of everything that is kept: how a report explains what was not compressed."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mpocompress.layers import MPOLayer
from mpocompress.surgery.adapter import adapter_for
from mpocompress.surgery.inventory import KeptEntry, label
from mpocompress.surgery.opening import why_not_opened

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)

# Kind and reason by the type of the owner.
_BY_TYPE: tuple[tuple[tuple[type[nn.Module], ...], str, str], ...] = (
    (
        (nn.EmbeddingBag,),
        "embedding",
        "nn.EmbeddingBag reads its weight without calling a layer",
    ),
    (_NORMS, "norm", "normalization parameters are vectors"),
    (
        (nn.RNNBase, nn.RNNCellBase),
        "recurrent",
        "recurrent kernels read their weights without calling a layer",
    ),
    (
        (nn.MultiheadAttention,),
        "attention",
        "nn.MultiheadAttention reads its weights without calling a layer",
    ),
)
BUFFER_REASON = "a buffer, not a weight"
BIAS_REASON = "biases are vectors"
QUANTIZED_REASON = "it is quantized already"


def describe(
    ancestry: Sequence[tuple[str, nn.Module]], leaf: str, tensor: Tensor, refused: Mapping[str, str]
) -> tuple[str, str]:
    """Kind and reason of one parameter that is kept.

    Args:
        ancestry: name and module of its owner, of the owner's parent, and so on up to the model.
        leaf: its name within the owner, such as "weight".
        tensor: the parameter.
        refused: reasons for weights that an adapter knows but that cannot be converted.
    """
    owner = ancestry[0][1]
    closed = why_not_opened(owner)
    attention = any(isinstance(module, nn.MultiheadAttention) for _, module in ancestry)
    dims = _dims(tensor)
    for types, kind, reason in _BY_TYPE:
        if isinstance(owner, types):
            reason = closed or reason
            return (kind, reason) if kind == "norm" else _or_bias(leaf, dims, kind, reason)
    for name, module in ancestry:
        if isinstance(module, MPOLayer):
            return _or_bias(
                leaf, dims, "mpo", f"{label(name)} is a matrix product operator already"
            )
        if name in refused and (adapter := adapter_for(module)) is not None:
            kind = "attention" if attention else adapter.kind
            return _or_bias(leaf, dims, kind, refused[name])
    # Models bring their own normalization (LlamaRMSNorm, ...): nothing but the name tells.
    if "norm" in type(owner).__name__.lower() and dims < 2:
        return "norm", "normalization parameters are vectors"
    kind = "matrix" if dims == 2 else "other"
    reason = closed or f"{type(owner).__name__} is not a kind of layer that is converted"
    return _or_bias(leaf, dims, kind, reason)


def _dims(tensor: Tensor) -> int:
    # A lazy parameter has no shape before the first forward, and asking for it raises.
    return 0 if is_lazy(tensor) else tensor.ndim


def _or_bias(leaf: str, dims: int, kind: str, reason: str) -> tuple[str, str]:
    if dims < 2 and "bias" in leaf:
        return "bias", BIAS_REASON
    return kind, reason


def quantized_entries(name: str, module: nn.Module) -> Iterator[KeptEntry]:
    """Weight and bias of a module of `torch.ao`, which packs them where no parameter list sees."""
    for leaf in ("weight", "bias"):
        tensor = getattr(module, leaf)()
        if tensor is not None:
            yield KeptEntry(
                name=f"{name}.{leaf}" if name else leaf,
                also_known_as=(),
                kind="bias" if leaf == "bias" else "quantized",
                shape=tuple(tensor.shape),
                parameters=0,
                bytes=tensor.numel() * tensor.element_size(),
                reason=BIAS_REASON if leaf == "bias" else QUANTIZED_REASON,
                is_buffer=True,
            )


def is_packed(module: nn.Module) -> bool:
    """Whether this is a quantized module of `torch.ao`: weight and bias are methods there."""
    return (
        hasattr(module, "_packed_params")
        and callable(getattr(module, "weight", None))
        and callable(getattr(module, "bias", None))
    )
