"""Put cores in the place of weights in an ONNX graph; all else stays what and where it is."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto
from torch import Tensor

from mpocompress.export.graphs.chain import Chain, GraphBuilder
from mpocompress.export.graphs.find import GraphSite, Product
from mpocompress.export.graphs.model import (
    FREE_INITIALIZERS,
    OnnxModel,
    attribute,
    copy_graph_frame,
    copy_without_graph,
    label,
    sizes_of,
)
from mpocompress.export.graphs.tensors import ONNX_FLOATS, from_torch
from mpocompress.mpo import MPO

_Replace = Callable[[GraphSite, Product], list[NodeProto]]


def with_cores(
    model: OnnxModel,
    weights: Mapping[GraphSite, MPO],
    vectors: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ModelProto:
    """The model with chains of cores instead of the products with these weights.

    Values keep their names, so do nodes and tensors that are not replaced. External data is still
    where it was.

    Args:
        model: stays as it is.
        weights: cores in the dtype that is to be stored.
        vectors: new numbers for stored tensors (biases), by name.
        metadata: entries to add to the file's metadata, instead of such that it has.
    """
    builder = GraphBuilder(model.names)
    chains = {
        site: Chain(builder, mpo, site.name, site.operand_dtype) for site, mpo in weights.items()
    }

    def replace(site: GraphSite, product: Product) -> list[NodeProto]:
        _write_product(builder, chains[site], product, model)
        return builder.take()

    made = _rewritten(model, weights, replace, vectors or {})
    made.graph.initializer.extend(builder.tensors)
    entries = {entry.key: entry.value for entry in made.metadata_props} | dict(metadata or {})
    del made.metadata_props[:]
    for key, value in entries.items():
        made.metadata_props.add(key=key, value=value)
    return made


def with_matrices(
    model: OnnxModel,
    weights: Mapping[GraphSite, MPO],
    vectors: Mapping[str, Tensor] | None = None,
) -> tuple[ModelProto, dict[str, Callable[[], Tensor]]]:
    """The model with its own products, of the dense matrices that the cores stand for.

    The reference for `with_cores`: nothing is shared with it but where the weights are.

    Returns:
        The model, in which these matrices have a name, type and shape only, and what computes each
        of them by name: together they may need more memory than there is.
    """
    builder = GraphBuilder(model.names)
    operands: dict[GraphSite, str] = {}
    computed: dict[str, Callable[[], Tensor]] = {}
    described: list[TensorProto] = []

    def replace(site: GraphSite, product: Product) -> list[NodeProto]:
        if site not in operands:
            operands[site] = name = builder.free(f"{site.name}.dense")
            computed[name] = partial(_dense, weights[site], product.transposed, site.operand_dtype)
            shape = site.shape[::-1] if product.transposed else site.shape
            described.append(
                TensorProto(name=name, data_type=ONNX_FLOATS[site.operand_dtype], dims=shape)
            )
        node = NodeProto()
        node.CopyFrom(product.node)
        node.input[1] = operands[site]
        return [node]

    made = _rewritten(model, weights, replace, vectors or {})
    made.graph.initializer.extend(described)
    return made, computed


def _dense(mpo: MPO, transposed: bool, dtype: torch.dtype) -> Tensor:
    dense_OI = mpo.to(dtype=torch.float64).to_dense()
    return (dense_OI.mT if transposed else dense_OI).to(dtype)


def _write_product(builder: GraphBuilder, chain: Chain, product: Product, model: OnnxModel) -> None:
    node, place = product.node, label(product.node)
    value, output = node.input[0], node.output[0]
    if node.op_type == "MatMul":
        shape = model.shapes.get(value)
        chain.apply(value, place, None if not shape else shape[:-1], output)
        return
    if attribute(node, "transA", 0):
        value = builder.node("Transpose", [value], place, perm=[1, 0])
    alpha, beta = (float(str(attribute(node, name, 1.0))) for name in ("alpha", "beta"))
    offset = node.input[2] if len(node.input) > 2 else ""
    scaled = alpha != 1.0

    def number(size: float, what: str) -> str:
        tensor = torch.tensor(size, dtype=chain.dtype, device="cpu")
        return builder.store(tensor, f"{place}.{what}")

    last = not (scaled or (offset and beta))
    value = chain.apply(value, place, (None,), output if last else None)
    if scaled:
        last = not (offset and beta)
        value = builder.node(
            "Mul", [value, number(alpha, "alpha")], place, output if last else None
        )
    if offset and beta:
        if beta != 1.0:
            offset = builder.node("Mul", [offset, number(beta, "beta")], place)
        builder.node("Add", [value, offset], place, output)


def _rewritten(
    model: OnnxModel,
    weights: Mapping[GraphSite, MPO],
    replace: _Replace,
    vectors: Mapping[str, Tensor],
) -> ModelProto:
    """The model with other nodes for the products of some weights, without what only fed them."""
    products = {
        product.node.output[0]: (site, product) for site in weights for product in site.products
    }
    dropped_nodes, dropped_tensors = _only_for(model, weights)
    made = copy_without_graph(model.proto)
    made.ir_version = max(made.ir_version, FREE_INITIALIZERS)
    copy_graph_frame(model.graph, made.graph)
    # What had to be an input in an old file would become a default, of which nothing is folded.
    needed = {value.name for value in model.inputs} | model.defaults - dropped_tensors
    del made.graph.input[:]
    made.graph.input.extend(value for value in model.graph.input if value.name in needed)
    for node in model.graph.node:
        key = node.output[0] if node.output else ""
        if key in products:
            made.graph.node.extend(replace(*products[key]))
        elif key not in dropped_nodes and not (node.op_type == "Constant" and key in vectors):
            made.graph.node.append(node)
    for tensor in model.graph.initializer:
        if tensor.name not in dropped_tensors and tensor.name not in vectors:
            made.graph.initializer.append(tensor)
    made.graph.initializer.extend(from_torch(vector, name) for name, vector in vectors.items())
    made.graph.value_info.extend(
        value
        for value in model.graph.value_info
        if value.name not in dropped_nodes and value.name not in dropped_tensors
    )
    read = {product.node.input[0] for site in weights for product in site.products}
    outputs = (value for value in made.graph.output if value.name in read)
    for value in (*made.graph.value_info, *outputs):
        _open_unproven(value, model)
    return made


def _open_unproven(value: ValueInfoProto, model: OnnxModel) -> None:
    """Open the sizes that do not follow from the inputs.

    ONNX Runtime takes the Shape of such a value, which a chain of cores may need, for a constant.
    """
    noted, proven = sizes_of(value) or [], model.shapes.get(value.name, ())
    if len(proven) != len(noted):
        proven = (None,) * len(noted)
    for size, right in zip(value.type.tensor_type.shape.dim, proven, strict=True):
        if size.HasField("dim_value") and size.dim_value != right:
            size.ClearField("dim_value")


def _only_for(
    model: OnnxModel, weights: Mapping[GraphSite, MPO]
) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the values on the way to these weights, and of the tensors that they start from."""
    values = {
        node.output[0]
        for site in weights
        for product in site.products
        for node in product.path.nodes
    }
    tensors = {name for site in weights for name in (site.stored, *site.helpers)}
    constants = {name for name in tensors if name in model.producers}
    return frozenset(values | constants), frozenset(tensors)
