"""Open modules that read their weights without calling a layer: a copy of the model with layers.

The copy shares all parameters and buffers with the model, which is not touched. What is opened, and
why other modules are not, is decided here; what an opened module computes is in `layers`.
"""

import copy
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpocompress.errors import ConversionError
from mpocompress.layers.attention import OpenAttention, OpenEncoderLayer
from mpocompress.layers.bilinear import OpenBilinear
from mpocompress.layers.embedding_bag import MPOEmbeddingBag
from mpocompress.layers.experts import OpenExperts
from mpocompress.layers.opened import Opened
from mpocompress.layers.recurrent import OpenRecurrent
from mpocompress.surgery.copying import check_references, detach_results, uncopyable
from mpocompress.surgery.refusals import why_closed

# How far the outputs of an opened mixture may be from the fused kernel's, relative.
_PROBE_TOLERANCE = 2e-2


@dataclass(frozen=True, slots=True)
class _Opener:
    """One kind of module that can be opened.

    Attributes:
        matches: whether a module is of the kind.
        refusal: why this one cannot be opened, or None.
        open: the module that computes the same; None if the copy itself changes its class.
        keeps_parameters: whether its layers have the very parameters, so that ties stay.
    """

    matches: Callable[[Any], bool]
    refusal: Callable[[Any], str | None]
    open: Callable[[Any], Opened] | None
    keeps_parameters: bool = False


def why_not_opened(module: nn.Module) -> str | None:
    """Why a module that could have been opened is not (one clause); None if nothing is known."""
    opener = _opener(module)
    return None if opener is None else opener.refusal(module)


def open_modules(model: nn.Module, only: Collection[str] | None = None) -> nn.Module:
    """A copy in which modules that read weights without calling a layer are opened.

    Args:
        model: any module; not changed.
        only: qualified names of the modules to open; default: all that can be.

    Returns:
        A copy that shares all parameters and buffers, or the model itself if nothing is opened.

    Raises:
        ConversionError: something is to be opened and the model cannot be copied.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    chosen: list[tuple[nn.Module, _Opener]] = []
    for key, module in modules.items():
        opener = _opener(module)
        if opener is None or (only is not None and only_misses(only, names[key])):
            continue
        # Who else holds one of its parameters would be left with the dense one.
        shared = any(uses[id(p)] > len(names[key]) for p in module.parameters(recurse=False))
        if (opener.keeps_parameters or not shared) and opener.refusal(module) is None:
            chosen.append((module, opener))
    if not chosen:
        return model
    check_references(model)
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    detach_results(model, memo)
    in_place: list[nn.Module] = []
    for module, opener in chosen:
        if opener.open is None:
            in_place.append(module)
        else:
            memo[id(module)] = opener.open(module)
    try:
        opened = copy.deepcopy(model, memo)
    except Exception as error:
        raise ConversionError(
            f"the model cannot be copied: {uncopyable(model, set(), error)}"
        ) from error
    for module in in_place:
        memo[id(module)].__class__ = OpenEncoderLayer
    for module in opened.modules():
        # Its fast path packs rows for the one of its layers, which are not on it any more.
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(layer, OpenEncoderLayer)
            or isinstance(getattr(layer, "self_attn", None), OpenAttention)
            for layer in module.layers
        ):
            module.use_nested_tensor = False
    return opened


def opened_for(model: nn.Module, opened: nn.Module, layers: Collection[str]) -> nn.Module:
    """The model with those modules opened that hold one of the layers; the rest as it was.

    Args:
        model: as it was given.
        opened: `open_modules(model)`.
        layers: qualified names in `opened`.
    """
    names = opened_names(opened)
    wanted = {
        name
        for name in names
        if any(layer.startswith(f"{name}." if name else "") for layer in layers)
    }
    if len(wanted) == len(names):
        return opened
    return open_modules(model, wanted) if wanted else model


def only_misses(only: Collection[str], names: Collection[str]) -> bool:
    """Whether none of the names is among those asked for."""
    return set(only).isdisjoint(names)


def opened_names(model: nn.Module) -> dict[str, Opened]:
    """Opened modules of a model by every name they have."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Opened)
    }


def _opener(module: nn.Module) -> _Opener | None:
    if isinstance(module, Opened):
        return None
    return next((opener for opener in _OPENERS if opener.matches(module)), None)


def _recurrent_refusal(rnn: nn.RNNBase) -> str | None:
    base = next((cls for cls in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(rnn, cls)), None)
    if base is None:
        return "it is a recurrent layer of another kind than nn.LSTM, nn.GRU and nn.RNN"
    return why_closed(rnn, base, rnn._flat_weights_names)


def _attention_refusal(attention: nn.MultiheadAttention) -> str | None:
    if attention.bias_k is not None or attention.add_zero_attn:
        return "nn.MultiheadAttention with bias_k, bias_v or add_zero_attn is not converted"
    names = (
        ["in_proj_weight"]
        if attention._qkv_same_embed_dim
        else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    )
    if attention.in_proj_bias is not None:
        names.append("in_proj_bias")
    inner = why_closed(
        attention.out_proj,
        nn.modules.linear.NonDynamicallyQuantizableLinear,
        ["weight"] if attention.out_proj.bias is None else ["weight", "bias"],
    )
    return why_closed(attention, nn.MultiheadAttention, names) or inner


def _encoder_refusal(layer: nn.TransformerEncoderLayer) -> str | None:
    reason = why_closed(layer, nn.TransformerEncoderLayer, [])
    if reason is None and not isinstance(layer.self_attn, nn.MultiheadAttention):
        reason = "its attention is not nn.MultiheadAttention"
    return reason


def _bilinear_refusal(bilinear: nn.Bilinear) -> str | None:
    names = ["weight"] if bilinear.bias is None else ["weight", "bias"]
    return why_closed(bilinear, nn.Bilinear, names)


def _bag_refusal(bag: nn.EmbeddingBag) -> str | None:
    reason = why_closed(bag, nn.EmbeddingBag, ["weight"])
    if reason is None and bag.max_norm is not None:
        reason = "max_norm rescales its rows whenever they are looked up"
    if reason is None and bag.scale_grad_by_freq:
        reason = "scale_grad_by_freq rescales the gradient of each row"
    return reason


def is_fused_experts(module: Any) -> bool:
    """What transformers' decorator of fused experts leaves on a class."""
    down = getattr(module, "down_proj", None)
    return (
        isinstance(down, nn.Parameter)
        and down.ndim == 3
        and callable(getattr(type(module), "_apply_gate", None))
        and all(hasattr(module, name) for name in ("has_gate", "is_transposed", "act_fn"))
    )


def _experts_refusal(experts: Any) -> str | None:
    if experts.is_transposed:
        return "its fused experts are stored as (experts, in, out)"
    if getattr(experts, "has_post_expert_norm", False):
        return "its fused experts have a norm of their own"
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    names = [first, "down_proj"]
    names += [f"{name}_bias" for name in names if f"{name}_bias" in experts._parameters]
    return why_closed(experts, type(experts), names) or _probe(experts)


@torch.no_grad()
def _probe(experts: Any) -> str | None:
    """Compare with the opened form: classes with the same parameters may compute other things."""
    weights = experts.down_proj
    if weights.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    count, features = weights.shape[0], weights.shape[1]
    chosen = min(2, count)
    tokens = torch.randn(4, features, generator=generator, device="cpu").to(weights)
    index = torch.stack(
        [torch.randperm(count, generator=generator, device="cpu")[:chosen] for _ in range(4)]
    ).to(weights.device)
    share = torch.rand(4, chosen, generator=generator, device="cpu").to(weights)
    try:
        expected = experts(tokens, index, share)
        found = _open_experts(experts)(tokens, index, share)
    except Exception as error:  # whatever its own code raises: it is called in another way
        return f"its fused experts are called in another way ({type(error).__name__})"
    if expected.shape != found.shape or bool(
        (found - expected).abs().max() > _PROBE_TOLERANCE * expected.abs().max()
    ):
        return "its fused experts compute something else than gate, up and down projections"
    return None


def _open_experts(experts: Any) -> Opened:
    return OpenExperts(experts, type(experts)._apply_gate)


def _is(*classes: type[nn.Module]) -> Callable[[Any], bool]:
    return lambda module: isinstance(module, classes)


_OPENERS = (
    _Opener(_is(nn.RNNBase), _recurrent_refusal, OpenRecurrent),
    _Opener(_is(nn.MultiheadAttention), _attention_refusal, OpenAttention),
    _Opener(_is(nn.TransformerEncoderLayer), _encoder_refusal, None),
    _Opener(_is(nn.Bilinear), _bilinear_refusal, OpenBilinear),
    _Opener(_is(nn.EmbeddingBag), _bag_refusal, MPOEmbeddingBag.around, keeps_parameters=True),
    _Opener(is_fused_experts, _experts_refusal, _open_experts),
)
