"""The slow, obviously right twins: dense matrix and reference contraction."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mpocompress.mpo.cores import layout_of


def to_dense(cores: Sequence[Tensor], shape: tuple[int, int] | None = None) -> Tensor:
    """Contract all bonds: the matrix (out, in), padding cut off to `shape`."""
    merged = cores[0].reshape(-1, cores[0].shape[3])
    for core in cores[1:]:
        merged = (merged @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[3])
    return layout_of(cores).join(merged.reshape(-1), shape)


def apply_reference(cores: Sequence[Tensor], x_BI: Tensor) -> Tensor:
    """W x for every row of a batch, (batch, in) to (batch, out), site by site from the left.

    One einsum a site keeps every index visible; `contract` is the fast way.
    """
    # Shapes: B batch, M outputs done, L left bond, I in, N inputs open, O out, R right bond.
    rows = x_BI.shape[0]
    state_BMLN = x_BI.reshape(rows, 1, 1, -1)
    for core in cores:
        left, out, in_, right = core.shape
        done = state_BMLN.shape[1]
        state_BMLIN = state_BMLN.reshape(rows, done, left, in_, -1)
        state_BMORN = torch.einsum("bmlin,loir->bmorn", state_BMLIN, core)
        state_BMLN = state_BMORN.reshape(rows, done * out, right, -1)
    return state_BMLN.reshape(rows, -1)
