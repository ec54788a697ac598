"""`nn.Embedding`: a table whose rows are looked up."""

from torch import Tensor, nn

from mpocompress.layers import MPOEmbedding
from mpocompress.mpo import Layout
from mpocompress.mpo.weight import Weight
from mpocompress.surgery.adapter import OneWeight, register
from mpocompress.surgery.refusals import why_dense


class EmbeddingAdapter(OneWeight):
    """Reads the table (rows, columns) of an `nn.Embedding` and builds `MPOEmbedding`.

    The table is the matrix as it stands, so an output layer that is tied to it is tied to the same
    cores. Its errors are seen at the looked-up rows, which have its in dimension.
    """

    kind = "embedding"
    looks_up = True
    takes_rows = False

    def matches(self, module: nn.Module) -> bool:
        """Whether this is an `nn.Embedding` or a subclass."""
        return isinstance(module, nn.Embedding)

    def refusal(self, module: nn.Module) -> str | None:
        """Why the module must stay dense, or None. See `WeightAdapter.refusal`."""
        computed = None
        if getattr(module, "max_norm", None) is not None:
            computed = "max_norm rescales its rows whenever they are looked up"
        elif getattr(module, "scale_grad_by_freq", False):
            computed = "scale_grad_by_freq rescales the gradient of each row"
        return why_dense(module, nn.Embedding, computed=computed)

    def matrix(self, module: nn.Module) -> Tensor:
        """The table, detached."""
        return self.weight(module)

    def layouts(self, module: nn.Module) -> tuple[Layout, ...] | None:
        """Low rank only: there the frequency of each row can be taken into account exactly."""
        rows, columns = self.weight(module).shape
        return (Layout.svd(rows, columns),)

    def build(self, module: nn.Module, mpo: Weight) -> nn.Module:
        """An `MPOEmbedding` like the module. See `WeightAdapter.build`."""
        padding_idx = getattr(module, "padding_idx", None)
        return self.finished(module, MPOEmbedding.from_mpo(self.own_copy(module, mpo), padding_idx))


register(EmbeddingAdapter())
