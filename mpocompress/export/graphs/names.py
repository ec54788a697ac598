"""What the weights of a graph are called."""

import ast
from collections.abc import Collection, Sequence
from itertools import chain, count

from onnx import NodeProto

from mpocompress.export.graphs.model import OnnxModel, label

# Tensors that torch's exporters compute from parameters, and so have to name themselves.
_MADE_UP = ("val_", "const", "_val_")
_SCOPES = "pkg.torch.onnx.name_scopes"


def weight_names(
    model: OnnxModel, stored: str, products: Sequence[NodeProto], used: Collection[str]
) -> tuple[str, ...]:
    """Names of a weight: first what people call it, then the others that patterns may use.

    The name of its tensor without a final ".weight", so that a layer is called as in PyTorch. Where
    an exporter has made that name up: that of the bias which is added right after the product, or
    of the module that torch's exporter notes, or of the product. Never that of another tensor.

    Args:
        model: the graph.
        stored: name of the tensor.
        products: the nodes that multiply by it.
        used: names that other weights have.
    """

    def is_free(name: str) -> bool:
        return name not in used and (name == stored or name not in model.stored)

    made_up = "::" in stored or stored.isdigit() or stored.startswith(_MADE_UP)
    nodes = [label(node) for node in products]
    wanted = [stored.removesuffix(".weight") or stored, stored]
    if made_up:
        first = products[0]
        wanted = [*filter(None, (_by_bias(model, first), _by_scope(first))), *nodes, stored]
    numbered = (f"{stored}_{number}" for number in count(2))
    free = [name for name in dict.fromkeys(wanted) if is_free(name)]
    return tuple(free or [next(name for name in chain(nodes, numbered) if is_free(name))])


def _by_bias(model: OnnxModel, node: NodeProto) -> str | None:
    names = list(node.input[2:])
    for consumer in model.consumers.get(node.output[0], ()):
        if consumer.node.op_type == "Add" and consumer.position >= 0:
            names.append(consumer.node.input[1 - consumer.position])
    found = [n for n in names if n in model.stored and n.endswith(".bias")]
    return found[0].removesuffix(".bias") if len(found) == 1 else None


def _by_scope(node: NodeProto) -> str | None:
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                return None
            if isinstance(scopes, list) and len(scopes) > 1 and isinstance(scopes[-2], str):
                return scopes[-2] or None
    return None
