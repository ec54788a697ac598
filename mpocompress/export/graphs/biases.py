"""Which stored vector is the bias of a product."""

from dataclasses import dataclass

from onnx import NodeProto

from mpocompress.export.graphs.find import GraphSite
from mpocompress.export.graphs.model import OnnxModel, attribute
from mpocompress.export.graphs.tensors import FLOATS


@dataclass(frozen=True, slots=True, eq=False)
class Bias:
    """A stored vector that is added to the outputs of one product, and of no other.

    Attributes:
        stored: its name.
        scale: what the output has of it, for each part of W x.
    """

    stored: str
    scale: float = 1.0


def bias_of(model: OnnxModel, site: GraphSite) -> Bias | None:
    """The bias that belongs to a weight alone; None if there is none, or others share one of both.

    It is the third input of a Gemm, or what an Add right after the product adds.
    """
    if len(site.products) != 1:
        return None
    node = site.products[0].node
    found = _of_gemm(node) if node.op_type == "Gemm" else _of_next(model, node)
    if found is None or found.stored not in model.stored or found.stored in model.outputs:
        return None
    vector = model.stored[found.stored]
    alone = len(model.consumers[found.stored]) == 1
    fits = tuple(vector.dims) in ((site.shape[0],), (1, site.shape[0]))
    return found if alone and fits and vector.data_type in FLOATS else None


def _of_gemm(node: NodeProto) -> Bias | None:
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    if len(node.input) < 3 or not isinstance(alpha, float) or not isinstance(beta, float):
        return None
    return Bias(node.input[2], beta / alpha) if alpha and beta else None


def _of_next(model: OnnxModel, node: NodeProto) -> Bias | None:
    after = model.consumers.get(node.output[0], [])
    if len(after) != 1 or after[0].node.op_type != "Add" or node.output[0] in model.outputs:
        return None
    return Bias(after[0].node.input[1 - after[0].position]) if after[0].position >= 0 else None
