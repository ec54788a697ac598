"""A module around a bare state dict: enough to find, factorize and save its matrices."""

from collections.abc import Mapping

from torch import Tensor, nn

from mpocompress.errors import LoadError

# What tables are called in the common libraries. A table is looked up by row, not multiplied.
_TABLE_WORDS = ("embed", "wte", "wpe", "token_type", "codebook")


def module_from_state(state_dict: Mapping[str, Tensor]) -> nn.Module:
    """A module tree with the names and tensors of a state dict; it cannot be called.

    A matrix named `<layer>.weight` becomes the weight of an `nn.Linear`, with `<layer>.bias` if
    there is one that fits; if its name says that it is a table, that of an `nn.Embedding`. All
    other tensors are parameters (floating) or buffers of plain modules. Nothing is copied.

    Raises:
        LoadError: two names that cannot stand in one tree.
    """
    root = nn.Module()
    for name, tensor in state_dict.items():
        owner, _, leaf = name.rpartition(".")
        weight, bias = state_dict.get(f"{owner}.weight"), state_dict.get(f"{owner}.bias")
        if leaf == "bias" and _is_matrix(weight) and not _is_table(owner) and _fits(tensor, weight):
            continue  # comes with its weight
        if leaf == "weight" and owner and _is_matrix(tensor):
            module = _table(tensor) if _is_table(owner) else _linear(tensor, bias)
            _put(root, owner, module, name)
            continue
        place = _reach(root, owner, name)
        if leaf in place._parameters or leaf in place._buffers or leaf in place._modules:
            raise LoadError(f"state entry {name!r} collides with another entry of that name.")
        if tensor.is_floating_point():
            place.register_parameter(leaf, nn.Parameter(tensor.detach()))
        else:
            place.register_buffer(leaf, tensor)
    return root


def _is_matrix(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.ndim == 2 and tensor.is_floating_point()


def _fits(bias: Tensor | None, weight_OI: Tensor | None) -> bool:
    if bias is None or weight_OI is None:
        return False
    return bias.shape == weight_OI.shape[:1] and bias.is_floating_point()


def _is_table(owner: str) -> bool:
    return any(word in owner.lower() for word in _TABLE_WORDS)


def _linear(weight_OI: Tensor, bias: Tensor | None) -> nn.Linear:
    fits = _fits(bias, weight_OI)
    out_features, in_features = weight_OI.shape
    linear = nn.Linear(in_features, out_features, bias=fits, device="meta")
    linear.weight = nn.Parameter(weight_OI.detach())
    if fits and bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear


def _table(weight: Tensor) -> nn.Embedding:
    table = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    table.weight = nn.Parameter(weight.detach())
    return table


def _reach(root: nn.Module, path: str, name: str) -> nn.Module:
    module = root
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            if hasattr(module, part):
                raise LoadError(
                    f"state entry {name!r}: {part!r} is already a tensor or a reserved name there."
                )
            child = nn.Module()
            module.add_module(part, child)
        module = child
    return module


def _put(root: nn.Module, path: str, module: nn.Module, name: str) -> None:
    parent, _, leaf = path.rpartition(".")
    place = _reach(root, parent, name)
    old = place._modules.get(leaf)
    if old is not None:  # made for an entry that came earlier, such as a sibling of the weight
        for key, parameter in old._parameters.items():
            if key not in module._parameters:
                module.register_parameter(key, parameter)
        for key, buffer in old._buffers.items():
            module.register_buffer(key, buffer)
        for key, child in old._modules.items():
            module.add_module(key, child)
        place._modules[leaf] = module
    elif hasattr(place, leaf):
        raise LoadError(f"state entry {name!r}: {leaf!r} is already a tensor or a reserved name.")
    else:
        place.add_module(leaf, module)
