"""Find the weights of an ONNX graph that can be converted, and account for everything else.

A weight is a stored tensor that only MatMul and Gemm multiply by from the right, behind whatever
transposes, casts or dequantizes it; several products may share one. Tensors inside the bodies of
If, Loop and Scan and inside functions stay as they are and are not listed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from onnx import NodeProto, TensorProto
from torch import Tensor, nn

from mpocompress.errors import ConversionError
from mpocompress.export.graphs.kept import PRODUCTS, describe
from mpocompress.export.graphs.model import STANDARD, Consumer, OnnxModel, attribute
from mpocompress.export.graphs.names import weight_names
from mpocompress.export.graphs.paths import (
    WeightPath,
    continues,
    operand_shape,
    operand_type,
    read_operand,
)
from mpocompress.export.graphs.tensors import FLOATS, num_bytes, to_torch
from mpocompress.mpo.weight import Weight
from mpocompress.surgery import Inventory, KeptEntry, WeightSite
from mpocompress.surgery.adapter import OneWeight


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Product:
    """A MatMul or Gemm with a weight on its right.

    Attributes:
        node: x W^T, or alpha x W^T + beta c.
        path: from the stored tensor to the operand.
        transposed: whether the operand is (in, out), as for MatMul, and not (out, in).
    """

    node: NodeProto
    path: WeightPath
    transposed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseTensor:
    """What a graph calls a weight, and how it lays it out.

    Attributes:
        name: of the value.
        shape: of it.
        transposed: whether it is (in, out), several dimensions taken together.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GraphSite(WeightSite):
    """A weight of a graph.

    Attributes:
        stored: name of the tensor.
        helpers: names of the scales, zero points and shapes that nothing else uses.
        products: the nodes that multiply by it.
        operand_dtype: in which they compute; `dtype` is that in which cores are stored.
        stored_bytes: of the tensor and its helpers.
        original: what a dense matrix is in the graph. The stored tensor; the operand where the
            tensor has other rows and columns than it.
    """

    stored: str
    helpers: tuple[str, ...]
    products: tuple[Product, ...] = field(repr=False)
    operand_dtype: torch.dtype
    stored_bytes: int
    original: DenseTensor

    @property
    def bytes(self) -> int:
        """Bytes of the weight as the file stores it."""
        return self.stored_bytes


class StoredWeight(nn.Module):
    """Stands for a weight of a graph where the rest of the program expects a module."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        super().__init__()
        self.read = read


class GraphAdapter(OneWeight):
    """Reads weights of graphs; what replaces them is written by `rewrite`, not built of modules."""

    kind = "linear"

    def matches(self, module: nn.Module) -> bool:
        """Whether this stands for a weight of a graph."""
        return isinstance(module, StoredWeight)

    def refusal(self, module: nn.Module) -> str | None:
        """Never: what cannot be converted has no `StoredWeight`."""
        return None

    def parameter(self, module: nn.Module) -> nn.Parameter | None:
        """None: the numbers are in the file."""
        return None

    def matrix(self, module: nn.Module) -> Tensor:
        """The weight (out, in), read from the file."""
        if not isinstance(module, StoredWeight):
            raise TypeError(f"a {type(module).__name__} is no weight of a graph.")
        return module.read()

    def build(self, module: nn.Module, mpo: Weight) -> nn.Module:
        """Not for graphs."""
        raise ConversionError("a weight of an ONNX graph is replaced by nodes, not by a module.")


def find_graph_weights(model: OnnxModel) -> Inventory:
    """List every stored tensor of the main graph: convertible, or kept and why.

    Constants inside nodes count from two elements on.

    Returns:
        The inventory in the order of the file: initializers, then constants. Sites are `GraphSite`.
    """
    return _Survey(model).inventory()


def graph_sites(inventory: Inventory) -> tuple[GraphSite, ...]:
    """The convertible weights of an inventory of a graph."""
    return tuple(site for site in inventory.sites if isinstance(site, GraphSite))


class _Survey:
    def __init__(self, model: OnnxModel) -> None:
        self.model = model
        self.readers: dict[str, list[tuple[Consumer, WeightPath]]] = {
            name: list(self._readers(name, ())) for name in model.stored
        }
        self.refused: dict[str, str] = {}
        self.sites: dict[str, GraphSite] = {}
        # A result keeps cores as `<weight>.cores.<site>` beside all other tensors.
        used = {name.rpartition(".cores.")[0] for name in model.stored if ".cores." in name}
        for name in model.stored:
            if any(_is_weight(consumer) for consumer, _ in self.readers[name]):
                reason = self._refusal(name)
                if reason is not None:
                    self.refused[name] = reason
                else:
                    site = self._site(name, used)
                    used |= set(site.names)
                    self.sites[name] = site

    def _readers(
        self, name: str, nodes: tuple[NodeProto, ...]
    ) -> Iterator[tuple[Consumer, WeightPath]]:
        """Who reads a stored tensor in the end, and along which path."""
        value = nodes[-1].output[0] if nodes else name
        for consumer in self.model.consumers.get(value, ()):
            # A path that nothing multiplies by at its end is a reader itself.
            output = consumer.node.output[0]
            goes_on = output in self.model.consumers and output not in self.model.outputs
            if goes_on and continues(consumer.node, consumer.position, self.model):
                yield from self._readers(name, (*nodes, consumer.node))
            else:
                yield consumer, WeightPath(name, nodes)

    def _refusal(self, name: str) -> str | None:
        """Why a tensor that something multiplies by must stay as it is, or None."""
        model, readers = self.model, self.readers[name]
        for consumer, _ in readers:
            if not _is_weight(consumer):
                left = consumer.position == 0 and consumer.node.op_type in PRODUCTS
                how = "multiplies from the left in" if left else "is also read by"
                return f"it {how} {consumer.label}"
        values = {name} | {node.output[0] for _, path in readers for node in path.nodes}
        if values & model.outputs:
            return "it is an output of the graph, too"
        first = readers[0][1]
        shape = operand_shape(model, first)
        if shape is None:
            return f"its shape {tuple(model.stored[name].dims)} does not fit {first.describe()}"
        if len(shape) != 2:
            return f"its weight has shape {shape}, not two dimensions"
        if 0 in shape:
            return f"its weight is empty, {shape[0]}x{shape[1]}"
        if operand_type(model, first) not in FLOATS:
            return (
                f"its weight is {TensorProto.DataType.Name(operand_type(model, first))}; float16, "
                "bfloat16, float32 and float64 are converted"
            )
        forms = {
            (path.signature(model), path.flips(model) != _reads_transposed(consumer))
            for consumer, path in readers
        }
        if len(forms) > 1:
            return (
                "its products use it in different forms (transposed, scaled along other axes, or "
                "cast to other dtypes)"
            )
        return None

    def _end(self, name: str) -> str | None:
        """What becomes of a tensor that is rearranged and then read by no node that could tell."""
        for consumer, _ in self.readers[name]:
            if continues(consumer.node, consumer.position, self.model):
                output = consumer.node.output[0]
                if output in self.model.outputs:
                    too = ", too" if output in self.model.consumers else ""
                    return f"what {consumer.label} makes of it is an output of the graph{too}"
                return f"nothing reads what {consumer.label} makes of it"
        return None

    def _site(self, name: str, used: set[str]) -> GraphSite:
        model = self.model
        tensor = model.stored[name]
        products = tuple(
            Product(node=consumer.node, path=path, transposed=_reads_transposed(consumer))
            for consumer, path in self.readers[name]
        )
        first = products[0]
        shape = operand_shape(model, first.path) or (0, 0)
        original = DenseTensor(
            name=first.path.operand if first.path.reorders else name,
            shape=shape if first.path.reorders else tuple(tensor.dims),
            transposed=first.transposed != first.path.turns,
        )
        out, in_ = (shape[1], shape[0]) if first.transposed else (shape[0], shape[1])
        on_the_way = {node.output[0] for product in products for node in product.path.nodes}
        helpers = {helper for product in products for helper in product.path.helpers(model)}
        owned = sorted(
            helper
            for helper in helpers
            if on_the_way.issuperset(c.node.output[0] for c in model.consumers[helper])
        )
        operand_dtype = FLOATS[operand_type(model, first.path)]

        def read() -> Tensor:
            found = to_torch(read_operand(model, first.path))
            if found is None:
                raise ConversionError(f"weight {name!r} has a dtype that torch does not know.")
            return found.mT if first.transposed else found

        return GraphSite(
            name=(names := weight_names(model, name, [p.node for p in products], used))[0],
            names=names,
            kind=GraphAdapter.kind,
            shape=(out, in_),
            dtype=FLOATS.get(tensor.data_type, operand_dtype),
            device=torch.device("cpu"),
            parameters=out * in_,
            modules=(StoredWeight(read),),
            adapter=GraphAdapter(),
            stored=name,
            helpers=tuple(owned),
            products=products,
            operand_dtype=operand_dtype,
            stored_bytes=sum(num_bytes(model.stored[part]) for part in (name, *owned)),
            original=original,
        )

    def inventory(self) -> Inventory:
        owned = {helper for site in self.sites.values() for helper in site.helpers}
        initializers = {tensor.name for tensor in self.model.graph.initializer}
        entries: list[WeightSite | KeptEntry] = []
        refused: dict[str, str] = {}
        for name, tensor in self.model.stored.items():
            if name in self.sites:
                entries.append(self.sites[name])
            elif name in owned or (name not in initializers and prod(tensor.dims) < 2):
                continue
            else:
                entry = self._kept(name, tensor)
                entries.append(entry)
                if name in self.refused or (len(entry.shape) > 1 and not entry.is_buffer):
                    refused[name] = entry.reason
        return Inventory(entries=tuple(entries), refused=refused)

    def _kept(self, name: str, tensor: TensorProto) -> KeptEntry:
        kind, reason = describe(tensor, [consumer for consumer, _ in self.readers[name]])
        if name in self.refused:
            kind, reason = "linear", self.refused[name]
        elif tensor.data_type in FLOATS and len(tensor.dims) > 1:
            reason = self._end(name) or reason
        numbers = prod(tensor.dims)
        is_buffer = tensor.data_type not in FLOATS or not tensor.dims
        return KeptEntry(
            name=name,
            also_known_as=(),
            kind=kind,
            shape=tuple(tensor.dims),
            parameters=0 if is_buffer else numbers,
            bytes=num_bytes(tensor),
            reason=reason,
            is_buffer=is_buffer,
        )


def _is_weight(consumer: Consumer) -> bool:
    node = consumer.node
    return consumer.position == 1 and node.op_type in PRODUCTS and node.domain in STANDARD


def _reads_transposed(consumer: Consumer) -> bool:
    """Whether the operand is (in, out)."""
    return consumer.node.op_type == "MatMul" or not attribute(consumer.node, "transB", 0)
