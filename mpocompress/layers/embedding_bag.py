"""`MPOEmbeddingBag`: an `nn.EmbeddingBag` that calls a table and reduces the rows it gives."""

# Shape suffixes: B bags, T entries of a bag, N entries of all bags, I columns of the table.

from collections.abc import Mapping, Sequence
from typing import Literal, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpocompress.errors import ContractionError
from mpocompress.layers.embedding import MPOEmbedding, checked_padding
from mpocompress.layers.opened import Opened, Origin
from mpocompress.mpo import LayoutLike

BagMode = Literal["sum", "mean", "max"]


class MPOEmbeddingBag(Opened):
    """Sums, means or maxima over bags of rows, which are looked up straight from a table's cores.

    It computes what an `nn.EmbeddingBag` with the same options does, without `max_norm` and
    `scale_grad_by_freq`, and not for nested tensors. Gradients of cores are never sparse.

    Fitted to data, every entry of a bag that is not padding counts as one lookup of its row. What
    an error of a row does to the model's output is measured at the looked-up rows, behind the
    reduction and the weights of samples: their squares enter on average, not row by row.

    Args:
        num_embeddings: rows.
        embedding_dim: columns.
        mode: "sum", "mean" or "max" over the entries of a bag.
        include_last_offset: as in `nn.EmbeddingBag`: the last offset is where the last bag ends.
        padding_idx: this row is left out of every bag; negative ones count from the end.
        layout: "svd", "balanced", (out, in) pairs, text or a `Layout`, of the table.
        bond_dim: as in `MPOLinear`.
        device: where the parameters live.
        dtype: of the parameters.

    Attributes:
        table: gives the rows; an `MPOEmbedding`, or an `nn.Embedding` as long as it is dense.

    Raises:
        LayoutError: the layout does not fit the table.
        BondDimError: a bond dimension below 1.
        ContractionError: no such mode, or a padding index beyond the table.
    """

    table: MPOEmbedding | nn.Embedding
    mode: BagMode

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        mode: BagMode = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        layout: LayoutLike = "svd",
        bond_dim: int | Sequence[int] | None = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in get_args(BagMode):
            raise ContractionError(f"mode {mode!r}: bags are reduced by sum, mean or max.")
        super().__init__()
        self.table = MPOEmbedding(
            num_embeddings,
            embedding_dim,
            layout=layout,
            bond_dim=bond_dim,
            device=device,
            dtype=dtype,
        )
        self.mode = mode
        self.include_last_offset = include_last_offset
        self.padding_idx = checked_padding(padding_idx, num_embeddings)

    @classmethod
    def around(cls, bag: nn.EmbeddingBag) -> Self:
        """The same bag with a dense table, whose weight is `bag.weight` itself."""
        opened = cls.__new__(cls)
        nn.Module.__init__(opened)
        # A table of its own would draw random numbers; padding is the bag's business.
        rows, columns = bag.weight.shape
        table = nn.Embedding(rows, columns, device="meta")
        table.weight = bag.weight
        opened.table, opened.mode = table, cast(BagMode, bag.mode)
        opened.include_last_offset = bag.include_last_offset
        opened.padding_idx = bag.padding_idx
        return opened.train(bag.training)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self.table.embedding_dim

    @property
    def weight(self) -> Tensor:
        """The table (num_embeddings, embedding_dim), rebuilt from the cores at each access."""
        return self.table.weight

    def origins(self) -> Mapping[str, Origin]:
        """The weight is that of the table."""
        return {"weight": Origin(("table.weight",), (self.num_embeddings, self.embedding_dim))}

    def forward(
        self,
        input: Tensor,  # the names that nn.EmbeddingBag uses
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Reduce bags of rows, as `nn.EmbeddingBag.forward` does.

        Args:
            input: indices (bags, entries), or (all entries,) with offsets.
            offsets: (bags,), where in the input each bag begins; with `include_last_offset`
                (bags + 1,). Only for a 1-D input.
            per_sample_weights: shape of the input and dtype of the table; only for the mode "sum".

        Returns:
            (bags, embedding_dim); zeros for bags without entries.

        Raises:
            IndexError: an index beyond the table (on the CPU).
            ValueError, NotImplementedError, RuntimeError: inputs, offsets or weights that do not
                fit each other or the mode; torch's own.
        """
        padding = None if self.padding_idx is None else input == self.padding_idx
        rows = self._rows(input, padding)
        if torch.compiler.is_exporting():  # torch's ONNX exporter writes loops for bags
            if per_sample_weights is not None:
                rows = rows * per_sample_weights[..., None]
            if offsets is None:
                return self._by_axis(rows, padding)
            return self._by_number(rows, padding, offsets)
        rows_NI = rows.reshape(-1, self.embedding_dim)
        # The looked-up rows are a table themselves, with as many rows as there are entries.
        places = torch.arange(input.numel(), device=input.device)
        if padding is not None or not input.numel():
            places = places if padding is None else places.masked_fill(padding.flatten(), -1)
            places = places % (input.numel() + 1)
            rows_NI = functional.pad(rows_NI, (0, 0, 0, 1))
        return functional.embedding_bag(
            places.reshape(input.shape),
            rows_NI,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=None if padding is None else -1,
        )

    def _rows(self, input: Tensor, padding: Tensor | None) -> Tensor:
        """Rows (..., I) of indices (...); in statistics padding is no lookup."""
        if padding is None or not self.calls_layers:
            rows: Tensor = self.table(input)
            return rows
        real = ~padding
        found_NI: Tensor = self.table(input[real])
        empty = found_NI.new_zeros(*input.shape, found_NI.shape[-1])
        return empty.index_put((real,), found_NI)

    def _by_axis(self, rows_BTI: Tensor, padding_BT: Tensor | None) -> Tensor:
        """The same for bags of one length, without a kernel for bags."""
        if padding_BT is not None:
            rows_BTI = rows_BTI.masked_fill(padding_BT[..., None], self._neutral)
        if self.mode == "sum":
            return rows_BTI.sum(1)
        if padding_BT is None:
            return rows_BTI.mean(1) if self.mode == "mean" else rows_BTI.amax(1)
        found_BI = rows_BTI.sum(1) if self.mode == "mean" else rows_BTI.amax(1)
        return self._finished(found_BI, (~padding_BT).sum(1))

    def _by_number(self, rows_NI: Tensor, padding_N: Tensor | None, offsets_B: Tensor) -> Tensor:
        """The same for bags of any length: each entry goes to the bag of its number."""
        entries, bags = rows_NI.shape[0], offsets_B.shape[0]
        offsets_B = offsets_B.long()
        begins_N = offsets_B.new_zeros(entries + 1)
        begins_N = begins_N.scatter_add(0, offsets_B, torch.ones_like(offsets_B))
        number_N = begins_N.cumsum(0)[:entries] - 1
        if padding_N is not None:  # to one more bag, which nobody asked for
            number_N = torch.where(padding_N, bags, number_N)
        found_BI = rows_NI.new_full((bags + 1, rows_NI.shape[1]), self._neutral)
        number_NI = number_N[:, None].expand_as(rows_NI)
        reduction = "amax" if self.mode == "max" else "sum"
        found_BI = found_BI.scatter_reduce(0, number_NI, rows_NI, reduction)
        entries_B = offsets_B.new_zeros(bags + 1)
        entries_B = entries_B.scatter_add(0, number_N, torch.ones_like(number_N))
        found_BI = self._finished(found_BI, entries_B)
        return found_BI[: bags - 1 if self.include_last_offset else bags]

    @property
    def _neutral(self) -> float:
        return -torch.inf if self.mode == "max" else 0.0

    def _finished(self, found_BI: Tensor, entries_B: Tensor) -> Tensor:
        """Of sums or maxima of so many entries: zeros where there are none, means if asked for."""
        if self.mode == "max":
            return found_BI.masked_fill((entries_B == 0)[:, None], 0.0)
        if self.mode == "mean":
            return found_BI / entries_B.clamp_min(1)[:, None].to(found_BI.dtype)
        return found_BI

    def extra_repr(self) -> str:
        """Mode and options, for `print(model)`."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        last = ", include_last_offset=True" if self.include_last_offset else ""
        return f"mode={self.mode!r}{padding}{last}"
