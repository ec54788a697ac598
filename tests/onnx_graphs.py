"""Small ONNX graphs, written by hand: what exporters of other frameworks produce."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
IR_VERSION = 8


def weight(rows: int, columns: int, *, seed: int = 0) -> np.ndarray:
    """A Gaussian matrix whose product with unit-variance rows has unit variance."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)


def vector(size: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    """Correlated rows with a mean: what data looks like."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((shape[-1], shape[-1])) * 0.9 ** np.arange(shape[-1])
    return (generator.standard_normal(shape) @ mixing.T + mixing[0]).astype(np.float32)


def model(
    nodes: Sequence[NodeProto],
    stored: dict[str, np.ndarray],
    *,
    inputs: dict[str, Sequence[int | str]],
    outputs: dict[str, Sequence[int | str]],
    opset: int = 17,
    dtype: int = FLOAT,
    input_types: dict[str, int] | None = None,
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [
            helper.make_tensor_value_info(name, (input_types or {}).get(name, dtype), list(shape))
            for name, shape in inputs.items()
        ],
        [helper.make_tensor_value_info(n, dtype, list(s)) for n, s in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = IR_VERSION
    return made


def node(op_type: str, inputs: str, output: str, **attributes: object) -> NodeProto:
    """A node named after its output; inputs are separated by blanks, "-" stands for none."""
    names = ["" if name == "-" else name for name in inputs.split()]
    name = attributes.pop("name", f"node_{output}")
    return helper.make_node(op_type, names, [output], name=name, **attributes)


def keras_dense(opset: int = 13) -> ModelProto:
    """As tf2onnx writes a Keras network: images, channels last, flattened, MatMul and Add."""
    sizes = (48, 64, 40, 10)
    stored: dict[str, np.ndarray] = {"const_shape__12": np.array([-1, sizes[0]], np.int64)}
    nodes = [node("Reshape", "input_1:0 const_shape__12", "sequential/flatten/Reshape:0")]
    value = "sequential/flatten/Reshape:0"
    for layer, (in_, out) in enumerate(pairwise(sizes)):
        name = f"sequential/dense_{layer}"
        stored[f"{name}/MatMul/ReadVariableOp:0"] = weight(in_, out, seed=layer)
        stored[f"{name}/BiasAdd/ReadVariableOp:0"] = vector(out, seed=layer)
        nodes += [
            node("MatMul", f"{value} {name}/MatMul/ReadVariableOp:0", f"{name}/MatMul:0"),
            node("Add", f"{name}/MatMul:0 {name}/BiasAdd/ReadVariableOp:0", f"{name}/BiasAdd:0"),
        ]
        value = f"{name}/BiasAdd:0"
        if layer < len(sizes) - 2:
            nodes.append(node("Relu", value, f"{name}/Relu:0"))
            value = f"{name}/Relu:0"
    nodes.append(node("Softmax", value, "Identity:0", axis=-1))
    return model(
        nodes,
        stored,
        inputs={"input_1:0": ["unk__6", 4, 4, 3]},
        outputs={"Identity:0": ["unk__7", 10]},
        opset=opset,
    )


def mlp(opset: int = 17, *, sizes: Sequence[int] = (48, 64, 40)) -> ModelProto:
    """Gemm, Relu, Gemm with the weights (out, in), as torch's exporter writes linear layers."""
    stored: dict[str, np.ndarray] = {}
    nodes = []
    value = "x"
    for layer, (in_, out) in enumerate(pairwise(sizes)):
        stored[f"fc{layer}.weight"] = weight(in_, out, seed=layer).T.copy()
        stored[f"fc{layer}.bias"] = vector(out, seed=layer)
        last = layer == len(sizes) - 2
        target = "y" if last else f"h{layer}"
        nodes.append(node("Gemm", f"{value} fc{layer}.weight fc{layer}.bias", target, transB=1))
        if not last:
            nodes.append(node("Relu", target, f"r{layer}"))
            value = f"r{layer}"
    return model(
        nodes,
        stored,
        inputs={"x": ["batch", sizes[0]]},
        outputs={"y": ["batch", sizes[-1]]},
        opset=opset,
    )


def conv_net() -> ModelProto:
    """Two convolutions, global pooling and a linear classifier on flattened features."""
    generator = np.random.default_rng(0)
    stored = {
        "conv1.weight": generator.standard_normal((8, 3, 3, 3)).astype(np.float32) / 5,
        "conv1.bias": vector(8),
        "conv2.weight": generator.standard_normal((16, 8, 3, 3)).astype(np.float32) / 8,
        "fc.weight": weight(16 * 4 * 4, 64).T.copy(),
        "fc.bias": vector(64),
    }
    pads = {"pads": [1, 1, 1, 1], "strides": [2, 2]}
    nodes = [
        node("Conv", "x conv1.weight conv1.bias", "c1", **pads),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 conv2.weight", "c2", **pads),
        node("Relu", "c2", "r2"),
        node("Flatten", "r2", "f", axis=1),
        node("Gemm", "f fc.weight fc.bias", "y", transB=1),
    ]
    return model(nodes, stored, inputs={"x": ["batch", 3, 16, 16]}, outputs={"y": ["batch", 64]})


def save(proto: ModelProto, path: Path, *, external: bool = False) -> Path:
    """Write a file, with its tensors in `<path>.data` if asked for."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    onnx.save(
        copy,
        path,
        save_as_external_data=external,
        location=f"{path.name}.data" if external else None,
        size_threshold=0,
    )
    return path


def run(source: ModelProto | Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs in ONNX Runtime."""
    import onnxruntime

    graph = source.SerializeToString() if isinstance(source, ModelProto) else source
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, feed)
