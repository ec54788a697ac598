"""Which form of a layer is faster in ONNX Runtime: measured, on the rows that it really gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpocompress.export.bench import Spread, interleaved_seconds
from mpocompress.export.calls import ForwardCall, run
from mpocompress.export.forms import Form, layers_of
from mpocompress.layers import MPOLinear
from mpocompress.mpo.contract import Step, merge_cores

# The dense form takes the memory of the dense layer, so it must be worth it: by more than noise,
# and by more than what a call costs anyway.
_WORTH_RATIO = 0.95
_WORTH_SECONDS = 10e-6

_REPEATS = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerForm:
    """The form of one layer, and why.

    Attributes:
        form: as it is in the file.
        rows: that the layer got when it was measured; None where the form was given.
        chain_seconds: lower quartile of runs of the layer alone in this form; None if not measured.
        dense_seconds: likewise.
    """

    form: Form
    rows: int | None = None
    chain_seconds: float | None = None
    dense_seconds: float | None = None


_Timings = tuple[Spread, Spread]


def choose_forms(model: nn.Module, call: ForwardCall, *, batch: int = 1) -> dict[str, LayerForm]:
    """Measure each layer in both forms, on one thread, and take the faster.

    Layers of the same sites and bond dimensions are measured once. A layer is dense only where that
    is faster by 5 % and by 10 microseconds: the chain takes less memory.

    Args:
        model: in eval mode, float32, on the CPU.
        call: an example of its arguments.
        batch: rows of the example to measure at. A layer may see more rows than that: one for each
            token, say.

    Returns:
        By first name of the layer; layers that the example does not reach stay chains.
    """
    found: dict[str, LayerForm] = {}
    measured: dict[tuple[object, ...], _Timings] = {}
    rows = _rows_of_layers(model, call.with_rows(batch))
    for name, layer in layers_of(model).items():
        if name not in rows:
            found[name] = LayerForm(form="chain")
            continue
        sites = (layer.layout.pairs, layer.bond_dims, layer.in_features, layer.out_features)
        key = (sites, layer.bias is None, rows[name])
        if key not in measured:
            measured[key] = _timings(layer, rows[name])
        chain, dense = measured[key]
        # Of noisy timings the lower quartiles are the most alike from run to run.
        saved = chain.low - dense.low
        worth = dense.low < _WORTH_RATIO * chain.low and saved > _WORTH_SECONDS
        found[name] = LayerForm(
            form="dense" if worth else "chain",
            rows=rows[name],
            chain_seconds=chain.low,
            dense_seconds=dense.low,
        )
    return found


def _rows_of_layers(model: nn.Module, call: ForwardCall) -> dict[str, int]:
    rows: dict[str, int] = {}
    handles = []
    for name, layer in layers_of(model).items():

        def record(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            rows[name] = max(rows.get(name, 0), prod(args[0].shape[:-1]))

        handles.append(layer.register_forward_pre_hook(record))
    try:
        run(model, call)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def _timings(layer: MPOLinear, rows: int) -> _Timings:
    sessions = [_session(graph, layer) for graph in (_chain_graph(layer), _dense_graph(layer))]
    generator = torch.Generator().manual_seed(0)
    feed = {"x": torch.randn(rows, layer.in_features, generator=generator, device="cpu").numpy()}
    runs = [lambda session=session: session.run(None, feed) for session in sessions]
    chain, dense = (Spread.of(seconds) for seconds in interleaved_seconds(runs, _REPEATS))
    return chain, dense


@dataclass(slots=True)
class _Graph:
    """Nodes in the order of their execution, each on the output of the one before, from "x"."""

    nodes: list[tuple[str, list[str]]]  # operator, inputs; "" stands for the value before
    weights: dict[str, np.ndarray]

    def add(self, operator: str, weight: np.ndarray, *, first: bool = False) -> None:
        name = f"w{len(self.weights)}"
        self.weights[name] = weight
        self.nodes.append((operator, [name, ""] if first else ["", name]))


def _chain_graph(layer: MPOLinear) -> _Graph:
    """The nodes that the exporter writes for a chain (see `apply_cores`), on a batch of rows."""
    graph = _Graph([], {})
    cores = [core.detach() for core in layer.cores]
    plan = layer._plans.chain
    padded_in, padded_out = layer.layout.in_features, layer.layout.out_features
    if padded_in > layer.in_features:
        graph.add("Pad", np.array([0, 0, 0, padded_in - layer.in_features], dtype=np.int64))
    flat = False
    for step in plan.steps:
        weight = _matrix(cores, step, plan.groups[step.group])
        if step.columns == 1:
            if flat or step.rows != 1:
                graph.add("Reshape", np.array([-1, step.contracted], dtype=np.int64))
                flat = True
            graph.add("MatMul", np.ascontiguousarray(weight.T))
        else:
            shape = [-1, step.contracted, step.columns]
            graph.add("Reshape", np.array(shape, dtype=np.int64))
            graph.add("MatMul", weight, first=True)
            flat = True
    if flat:
        graph.add("Reshape", np.array([-1, padded_out], dtype=np.int64))
    if padded_out > layer.out_features:
        graph.add("Slice", np.array([layer.out_features], dtype=np.int64))
    return _with_bias(graph, layer)


def _dense_graph(layer: MPOLinear) -> _Graph:
    graph = _Graph([], {})
    graph.add("MatMul", np.ascontiguousarray(layer.to_dense().T.numpy()))
    return _with_bias(graph, layer)


def _with_bias(graph: _Graph, layer: MPOLinear) -> _Graph:
    if layer.bias is not None:
        graph.add("Add", layer.bias.detach().numpy())
    return graph


def _matrix(cores: Sequence[Tensor], step: Step, group: object) -> np.ndarray:
    core = merge_cores(cores, group)  # type: ignore[arg-type]
    rest = tuple(axis for axis in range(4) if axis not in step.order)
    matrix = core.permute(*step.order, *rest).reshape(step.produced, step.contracted)
    return np.ascontiguousarray(matrix.numpy())


def _session(graph: _Graph, layer: MPOLinear) -> Any:
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    weights: Mapping[str, np.ndarray] = dict(graph.weights)
    nodes, value = [], "x"
    for number, (operator, inputs) in enumerate(graph.nodes):
        names = [value if name == "" else name for name in inputs]
        if operator == "Slice":  # ends are given; it starts at 0, on the last axis
            weights = {**weights, "start": np.array([0]), "axis": np.array([1])}
            names = [value, "start", inputs[1], "axis"]
        value = f"v{number}"
        nodes.append(helper.make_node(operator, names, [value]))
    float32 = onnx.TensorProto.FLOAT
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", float32, ["rows", layer.in_features])],
            [helper.make_tensor_value_info(value, float32, None)],
            [numpy_helper.from_array(array, name) for name, array in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
