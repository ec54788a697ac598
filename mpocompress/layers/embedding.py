"""`MPOEmbedding`: an `nn.Embedding` whose table is a matrix product operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mpocompress.errors import ContractionError
from mpocompress.layers.base import MPOLayer
from mpocompress.mpo import MPO, LayoutLike
from mpocompress.mpo.factors import resolve_layout
from mpocompress.mpo.identity_gauge import Gauge
from mpocompress.mpo.lookup import lookup_rows
from mpocompress.mpo.weight import Weight, in_gauge


class MPOEmbedding(MPOLayer):
    """Looks up rows of a table (num_embeddings, embedding_dim) straight from its cores.

    The table itself is never built. It is the matrix of an output layer that is tied to it, so both
    can have the same cores.

    Args:
        num_embeddings: rows.
        embedding_dim: columns.
        padding_idx: as in `nn.Embedding`: this row gets no gradient where it is looked up; negative
            ones count from the end.
        layout: "svd", "balanced", (out, in) pairs, text or a `Layout`, of the table.
        bond_dim: as in `MPOLinear`.
        device: where the parameters live.
        dtype: of the parameters.

    Raises:
        LayoutError: the layout does not fit the table.
        BondDimError: a bond dimension below 1.
        ContractionError: a padding index beyond the table.

    Entries start with variance 1, as in `nn.Embedding`.
    """

    kind = "embedding"
    padding_idx: int | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        layout: LayoutLike = "svd",
        bond_dim: int | Sequence[int] | None = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        mpo = MPO.random(
            resolve_layout(layout, num_embeddings, embedding_dim),
            bond_dim,
            variance=1.0,
            device=torch.device(device) if device is not None else None,
            dtype=dtype,
        )
        self._set_up(MPO(mpo.cores, shape=(num_embeddings, embedding_dim)), None)
        self.padding_idx = checked_padding(padding_idx, num_embeddings)

    @classmethod
    def from_mpo(
        cls,
        mpo: Weight,
        padding_idx: int | None = None,
        *,
        gauge: Gauge | None = None,
    ) -> "MPOEmbedding":
        """A layer with these cores, which are treated as in `MPOLinear.from_mpo`.

        Raises:
            LayoutError: no such gauge.
        """
        layer = cls.__new__(cls)
        layer._set_up(in_gauge(mpo, gauge), None)
        layer.padding_idx = checked_padding(padding_idx, layer.num_embeddings)
        return layer

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self.in_features

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Embedding uses
        """Rows (..., embedding_dim) for indices (...).

        Raises:
            IndexError: an index beyond the table (on the CPU).
        """
        cores = list(self.cores)
        rows = lookup_rows(cores, input, (self.out_features, self.in_features))
        rows = rows.to(cores[0].dtype)  # autocast has its say in products, but not in lookups
        if self.padding_idx is not None and rows.requires_grad:
            padding = (input == self.padding_idx)[..., None]
            rows = torch.where(padding, rows.detach(), rows)
        return rows

    def extra_repr(self) -> str:
        """Sizes, layout and bond dimensions, for `print(model)`."""
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        gauge = "" if self.gauge == "none" else f", gauge={self.gauge!r}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {padding}layout={self._layout}, "
            f"bond_dims={list(self.bond_dims)}{gauge}"
        )


def checked_padding(padding_idx: int | None, rows: int) -> int | None:
    """The row that is padding, counted from the first.

    Raises:
        ContractionError: beyond the table.
    """
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise ContractionError(
            f"padding_idx {padding_idx} in a table of {rows} rows: it is one of them, or counts "
            "from the end. Give one within the table."
        )
    return padding_idx % rows
