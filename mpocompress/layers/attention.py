"""`nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, opened: see `opened`."""

# Shape suffixes: N batch, L queries, S keys, E features, H heads, D features of a head.

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpocompress.errors import ContractionError
from mpocompress.layers.opened import Opened, Origin


class OpenAttention(Opened):
    """Computes what an `nn.MultiheadAttention` does with four layers that are called.

    Same arguments and results. The module must have neither `bias_k` and `bias_v` nor
    `add_zero_attn`.

    Args:
        attention: its weights are shared, not copied; the packed one as three views.
    """

    # What `nn.TransformerEncoderLayer`, of which subclasses stay as they are, asks before it takes
    # a path that reads packed weights.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim = attention.embed_dim
        self.kdim, self.vdim = attention.kdim, attention.vdim
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        own: dict[str, Any] = dict(attention._parameters)
        packed = own["in_proj_weight"]
        weights: list[nn.Parameter | None]
        if packed is not None:
            weights = [_part(packed, part, self.embed_dim) for part in range(3)]
        else:
            weights = [own["q_proj_weight"], own["k_proj_weight"], own["v_proj_weight"]]
        self._packed = packed is not None
        biases: list[nn.Parameter | None] = [None] * 3
        packed_bias = own["in_proj_bias"]
        if packed_bias is not None:
            biases = [_part(packed_bias, part, self.embed_dim) for part in range(3)]
        self.q_proj, self.k_proj, self.v_proj = map(linear_around, weights, biases)
        self.out_proj = linear_around(
            attention.out_proj._parameters["weight"], attention.out_proj._parameters["bias"]
        )
        self.train(attention.training)

    def origins(self) -> Mapping[str, Origin]:
        """The packed weight and bias, or the three weights."""
        size = self.embed_dim
        names = ("q_proj", "k_proj", "v_proj")
        found = {}
        if self._packed:
            parts = tuple(f"{name}.weight" for name in names)
            found["in_proj_weight"] = Origin(parts, (3 * size, size))
        else:
            widths = (size, self.kdim, self.vdim)
            for name, width in zip(names, widths, strict=True):
                found[f"{name}_weight"] = Origin((f"{name}.weight",), (size, width))
        if self.q_proj.bias is not None:
            parts = tuple(f"{name}.bias" for name in names)
            found["in_proj_bias"] = Origin(parts, (3 * size,))
        return found

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as `nn.MultiheadAttention.forward` does."""
        if is_causal and attn_mask is None:
            raise ContractionError("is_causal is a hint that goes with an attn_mask; pass both.")
        # Projected as they come: layers that get one tensor share what is known of it.
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        batched = query.ndim == 3
        if not batched:
            q, k, v = q[None], k[None], v[None]
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        q_NHLD, k_NHSD, v_NHSD = (
            x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)
            for x in (q, k, v)
        )
        mask = self._mask(attn_mask, key_padding_mask, q_NHLD)
        dropout = self.dropout if self.training else 0.0
        weights_NHLS = None
        if need_weights:
            scores = (q_NHLD * self.head_dim**-0.5) @ k_NHSD.mT
            scores = scores if mask is None else scores + mask
            weights_NHLS = functional.dropout(scores.softmax(-1), dropout)
            mixed_NHLD = weights_NHLS @ v_NHSD
        else:
            mixed_NHLD = functional.scaled_dot_product_attention(
                q_NHLD, k_NHSD, v_NHSD, attn_mask=mask, dropout_p=dropout
            )
        mixed = mixed_NHLD.transpose(1, 2).reshape(q.shape[0], q.shape[1], self.embed_dim)
        if not batched:
            mixed = mixed[0]
        elif not self.batch_first:
            mixed = mixed.transpose(0, 1)
        output = self.out_proj(mixed)
        if weights_NHLS is None:
            return output, None
        weights = weights_NHLS.mean(1) if average_attn_weights else weights_NHLS
        return output, weights if batched else weights[0]

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q_NHLD: Tensor
    ) -> Tensor | None:
        """Both masks as numbers to add to the scores (N, H, L, S)."""
        if attn_mask is not None:
            attn_mask = _additive(attn_mask, q_NHLD.dtype)
            if attn_mask.ndim == 3:  # one for each head of each sample
                attn_mask = attn_mask.reshape(-1, self.num_heads, *attn_mask.shape[1:])
        if key_padding_mask is None:
            return attn_mask
        padding = _additive(key_padding_mask, q_NHLD.dtype)
        padding = padding.reshape(-1, 1, 1, padding.shape[-1])
        return padding if attn_mask is None else attn_mask + padding


class OpenEncoderLayer(nn.TransformerEncoderLayer, Opened):
    """An `nn.TransformerEncoderLayer` that calls its layers, without a fast path around them.

    Made of an existing one by setting its `__class__`; names, weights and results are the same,
    but for padded positions, which the fast path sets to zero.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention and feed-forward part, as `nn.TransformerEncoderLayer.forward`."""
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _part(packed: nn.Parameter, part: int, size: int) -> nn.Parameter:
    """Rows of a parameter as a parameter that shares its memory."""
    view = packed.detach()[part * size : (part + 1) * size]
    return nn.Parameter(view, packed.requires_grad)


def linear_around(weight_OI: nn.Parameter | None, bias: nn.Parameter | None = None) -> nn.Linear:
    """An `nn.Linear` with this very weight and bias."""
    if weight_OI is None:
        raise TypeError("a linear layer needs a weight.")
    out_features, in_features = weight_OI.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = weight_OI
    if bias is not None:
        linear.bias = bias
    return linear
