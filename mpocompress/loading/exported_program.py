"""Programs of `torch.export` (.pt2): read, and given back the linear layers that they consisted of.

A program is a flat list of operations on parameters. Where `aten.linear` takes the weight (and
bias) of one place in the model, an `nn.Linear` stands there again, so that the rest of this program
finds, fits and replaces it as in any other model.
"""

import warnings
from pathlib import Path

import torch
from torch import fx, nn

from mpocompress.errors import LoadError, UnsafeCheckpointError

PT2_SUFFIX = ".pt2"


def read_program(path: Path, *, trust_pickle: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """Read a program as a module with linear layers, and notes.

    Checks of the shapes that it was traced with are left out: what depends on them still fails.

    Args:
        path: an existing file.
        trust_pickle: must be True. torch.export.load unpickles constants and evaluates expressions
            of sizes, and has no restricted mode.

    Raises:
        UnsafeCheckpointError: without `trust_pickle`.
        LoadError: no or a damaged program.
    """
    if not trust_pickle:
        raise UnsafeCheckpointError(
            f"{path}: reading a .pt2 file may run code from it (torch.export.load unpickles and "
            "evaluates what it holds). If you trust whoever made it, add --trust-pickle; or give "
            "the model's state dict, or export it to ONNX."
        )
    # What torch says of its own code whenever such a module is copied, for the rest of the process.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
            module = program.module(check_guards=False)
    except Exception as error:  # whatever the file's content raises
        text = " ".join(str(error).split())[:200]
        raise LoadError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a program of torch.export: "
            f"{type(error).__name__}: {text}. Write it with torch.export.save, by torch "
            f"{torch.__version__} or an older one."
        ) from error
    if not isinstance(module, fx.GraphModule):
        raise LoadError(f"{path} holds a {type(module).__name__}, not a program of torch.export.")
    return _with_layers(module)


def _with_layers(module: fx.GraphModule) -> tuple[nn.Module, tuple[str, ...]]:
    graph = module.graph
    layers: dict[str, nn.Linear] = {}
    for node in list(graph.nodes):
        owner = _owner(node)
        if owner is None:
            continue
        if owner not in layers:
            found = _layer(module.get_submodule(owner), has_bias=_bias(node) is not None)
            if found is None:
                continue
            layers[owner] = found
        elif (layers[owner].bias is not None) != (_bias(node) is not None):
            continue
        with graph.inserting_before(node):
            call = graph.call_module(owner, (node.args[0],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    for owner, layer in layers.items():
        module.set_submodule(owner, layer)
    graph.eliminate_dead_code()
    before = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    # A new module: one that torch.export made refuses eval() and train().
    made = fx.GraphModule(module, graph, class_name="ExportedProgram")
    made.delete_all_unused_submodules()
    after = {name for name, _ in made.named_parameters(remove_duplicate=False)}
    unused = sorted(before - after)
    notes: tuple[str, ...] = ()
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        notes = (f"left aside, as the program does not use it: {', '.join(unused[:3])}{more}",)
    return made, notes


def _owner(node: fx.Node) -> str | None:
    """The place in the model whose weight, and bias if any, a linear operation takes."""
    if node.op != "call_function" or node.target is not torch.ops.aten.linear.default:
        return None
    if len(node.args) < 2 or node.kwargs:
        return None
    weight, bias = node.args[1], _bias(node)
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    owner, _, leaf = str(weight.target).rpartition(".")
    own_bias = bias is None or (bias.op == "get_attr" and bias.target == f"{owner}.bias")
    return owner if owner and leaf == "weight" and own_bias else None


def _bias(node: fx.Node) -> fx.Node | None:
    bias = node.args[2] if len(node.args) > 2 else None
    return bias if isinstance(bias, fx.Node) else None


def _layer(place: nn.Module, *, has_bias: bool) -> nn.Linear | None:
    """An `nn.Linear` of the very parameters of a place; None if there is more to it."""
    weight, bias = place._parameters.get("weight"), place._parameters.get("bias")
    if weight is None or weight.ndim != 2 or place._buffers or place._modules:
        return None
    if has_bias != (bias is not None) or set(place._parameters) - {"weight", "bias"}:
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer
