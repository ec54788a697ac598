"""Padding: which tokens of a batch are real, by its mask, and their rows of an activation."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Arguments that mark real tokens (1) or padding (True), as the common libraries name them, the
# least ambiguous first.
_MASKS = (
    ("attention_mask", True),
    ("key_padding_mask", False),
    ("src_key_padding_mask", False),
    ("padding_mask", False),
    ("mask", True),
)
MASK_NAMES = frozenset(name for name, _ in _MASKS)
# What arguments of a decoder are called.
_DECODER = ("decoder_", "tgt")


def real_rows(activation: Tensor, keep: Tensor | None) -> Tensor:
    """The rows (N, features) of an activation (..., features) that are not padding.

    Args:
        activation: features last.
        keep: boolean (batch, sequence), True for real tokens; ignored where the leading dimensions
            of the activation are others.
    """
    if keep is not None and activation.ndim >= 3 and activation.shape[:2] == keep.shape:
        return activation[keep.to(activation.device)].reshape(-1, activation.shape[-1])
    return activation.reshape(-1, activation.shape[-1])


def real_indices(indices: Tensor, keep: Tensor | None) -> Tensor:
    """Indices (...) into a table, as a list of those that are not padding; as in `real_rows`."""
    if keep is not None and indices.ndim >= 2 and indices.shape[:2] == keep.shape:
        return indices[keep.to(indices.device)].reshape(-1)
    return indices.reshape(-1)


def keep_mask(arguments: Mapping[str, object]) -> Tensor | None:
    """The mask of real tokens among forward arguments by name, as booleans; None without one.

    None, too, where a decoder's sequence has the sizes of the encoder's: activations would not tell
    which of them the mask is of.
    """
    for name, keeps in _MASKS:
        mask = arguments.get(name)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            continue
        if mask.is_floating_point() and not (keeps and _has_only_zeros_and_ones(mask)):
            continue
        if name == "mask" and _is_causal(mask):
            continue
        tied = any(
            other.startswith(_DECODER) and isinstance(value, Tensor) and _leads(value, mask)
            for other, value in arguments.items()
        )
        return None if tied else (mask != 0) if keeps else (mask == 0)
    return None


def _has_only_zeros_and_ones(mask: Tensor) -> bool:
    """Whether a floating mask marks tokens: one that is added to scores has no ones."""
    return bool((mask == 1).any()) and bool(((mask == 0) | (mask == 1)).all())


def _leads(value: Tensor, mask: Tensor) -> bool:
    return value.ndim >= 2 and value.shape[:2] == mask.shape


def _is_causal(mask: Tensor) -> bool:
    """Whether it says which positions see which: square, and other above the diagonal than below.

    Padding, on either side, has equal columns of ones or zeros in a row, never both triangles.
    """
    size = mask.shape[0]
    if mask.shape[1] != size or size < 2:
        return False
    on = mask != 0
    lower = torch.ones_like(on).tril()
    return any(bool((on == part).all()) for part in (lower, ~lower, lower.mT, ~lower.mT))
