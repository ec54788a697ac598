"""Copy a model with other layers in place of some of its modules.

The copy is `copy.deepcopy` with a memo that is filled beforehand. The memo maps the id of every
object met so far to its copy, and deepcopy asks it first: so `memo[id(linear)] = layer` makes
deepcopy put `layer` wherever it would have put a copy of `linear`: under every name of a shared
module, in plain lists and dicts, in attributes and bound methods, or as the model itself. It never
looks inside `linear`, so the dense weight is not copied: at no time does the whole model exist
twice. `memo[id(linear.bias)] = layer.bias` keeps a bias tied that other modules use too.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mpocompress.errors import ConversionError, MPOCompressError
from mpocompress.mpo.weight import Weight
from mpocompress.surgery.adapter import WeightAdapter, adapter_for, tie_cores
from mpocompress.surgery.copying import (
    anchored,
    check_references,
    detach_results,
    plain_attributes,
    uncopyable,
)
from mpocompress.surgery.inventory import WeightSite, label

Replacement = Weight | nn.Module | Callable[[nn.Module], nn.Module]
Replacements = Mapping[WeightSite, Replacement] | Mapping[nn.Module, Replacement]


def copy_with_replacements(model: nn.Module, replacements: Replacements) -> nn.Module:
    """A copy of a model with some modules replaced; the model itself is not touched.

    Args:
        model: any module that `copy.deepcopy` can copy.
        replacements: what to replace, and by what. Keys are sites of `find_weights(model)`: all
            modules of the tie group are replaced and share their cores, each with its own bias. Or
            they are modules of the model. Values are

            - an `MPO` (for a site only), or one in the identity gauge: the adapter builds the
              layers, which keep dtype, device, mode, `requires_grad` and bias of what they replace;
            - a function from the dense module to its new layer, called for each module;
            - the new layer itself, which is used as it is, in the mode of the old module.

    Returns:
        The new model. It shares no memory with `model`, has no gradients, and all ties and plain
        attributes are kept. A parameter that a new layer has under the name and shape of one of
        the old module's, such as the bias, also replaces that one wherever else it is used.

    Raises:
        ConversionError: the keys or values do not fit the model; the model cannot be copied (the
            message names the module and attribute); or a copy would go on using the original.
    """
    members = set(model.modules())
    memo: dict[int, Any] = {}
    new_layers = _new_layers(members, replacements)
    check_references(model)
    for module, layer in new_layers.items():
        memo[id(module)] = layer
    for module, layer in new_layers.items():
        _carry_parameters(module, layer, memo)
    detach_results(model, memo)
    try:
        result: nn.Module = copy.deepcopy(model, memo)
        for module, layer in new_layers.items():
            _carry_attributes(module, layer, memo)
    except Exception as error:
        raise ConversionError(
            f"the model cannot be copied: {uncopyable(model, set(new_layers), error)}"
        ) from error
    _check_ties(model, new_layers, memo)
    _check_copy(model, result, new_layers)
    return result


def _new_layers(members: set[nn.Module], replacements: Replacements) -> dict[nn.Module, nn.Module]:
    """The new layer of every module that goes, tied where the old ones were."""
    new_layers: dict[nn.Module, nn.Module] = {}
    for key, value in replacements.items():
        site = key if isinstance(key, WeightSite) else None
        modules = key.modules if isinstance(key, WeightSite) else (key,)
        what = f"layer {site.label}" if site else f"module {type(modules[0]).__name__}"
        if not members.issuperset(modules):
            raise ConversionError(
                f"{what} is not part of this model. Take an inventory of the very model that is "
                "converted: find_weights(model)."
            )
        if any(module in new_layers for module in modules):
            raise ConversionError(f"{what} is replaced twice; name every weight once.")
        layers = _build(what, site, modules, value)
        for module, layer in zip(modules, layers, strict=True):
            new_layers[module] = layer.train(module.training)
    for module in new_layers:
        inner = next((child for child in list(module.modules())[1:] if child in new_layers), None)
        if inner is not None:
            raise ConversionError(
                f"module {type(inner).__name__} is replaced, and so is the "
                f"{type(module).__name__} that it is part of; replace one of them."
            )
    return new_layers


def _build(
    what: str, site: WeightSite | None, modules: Sequence[nn.Module], value: Replacement
) -> list[nn.Module]:
    if isinstance(value, Weight):
        if site is None:
            raise ConversionError(
                f"{what}: an MPO replaces a site of find_weights(model), not a module. Use the "
                "site as the key."
            )
        if value.shape != site.shape:
            raise ConversionError(
                f"{what} has a weight of shape {site.shape}, but its MPO has shape {value.shape}."
            )
        layers = [_adapter(module, site).build(module, value) for module in modules]
    elif isinstance(value, nn.Module):
        if len(modules) > 1:
            raise ConversionError(
                f"{what} has a weight that {len(modules)} modules share, and one layer was given "
                "for all. Give an MPO, or a function that makes a layer for each."
            )
        layers = [value]
    else:
        try:
            layers = [value(module) for module in modules]
        except MPOCompressError as error:
            raise ConversionError(f"{what}: {error}") from error
    if site is not None:
        for layer in layers[1:]:
            tie_cores(layer, layers[0])
    return layers


def _adapter(module: nn.Module, site: WeightSite) -> WeightAdapter:
    """The module's own: an embedding and the output layer tied to it are of two kinds."""
    return adapter_for(module) or site.adapter


def _carry_parameters(module: nn.Module, layer: nn.Module, memo: dict[int, Any]) -> None:
    """Let parameters of the same name and shape, such as the bias, stand for the old ones."""
    for name, old in module.named_parameters(recurse=False):
        new = layer._parameters.get(name)
        if new is None or new.shape != old.shape:
            continue
        # Two replaced layers with one bias: the first one's copy serves the second as well.
        setattr(layer, name, memo.setdefault(id(old), new))


def _carry_attributes(module: nn.Module, layer: nn.Module, memo: dict[int, Any]) -> None:
    """Copy plain attributes that somebody put on the module and may read from its successor."""
    for name, value in vars(module).items():
        if name not in vars(layer) and not hasattr(type(layer), name):
            setattr(layer, name, copy.deepcopy(value, memo))


def _check_ties(
    model: nn.Module, new_layers: Mapping[nn.Module, nn.Module], memo: Mapping[int, Any]
) -> None:
    """A parameter that goes must not have been copied for somebody else, who would be untied."""
    for module, layer in new_layers.items():
        surviving = {id(parameter) for parameter in layer.parameters()}
        for name, parameter in module.named_parameters():
            if id(parameter) in memo and id(memo[id(parameter)]) not in surviving:
                raise ConversionError(
                    f"layer {_name_of(model, module)} is replaced, but its parameter '{name}' is "
                    f"also used by {_holder(model, parameter, new_layers)}. Replace both, exclude "
                    "the layer, or detach the other (an optimizer kept as an attribute)."
                )


def _check_copy(
    model: nn.Module, result: nn.Module, new_layers: Mapping[nn.Module, nn.Module]
) -> None:
    """The new layers are where the old ones were, and nothing is shared with the original."""
    for name, module in model.named_modules(remove_duplicate=False):
        if module in new_layers and result.get_submodule(name) is not new_layers[module]:
            raise ConversionError(
                f"layer {label(name)} was not replaced in the copy: a module above it has its own "
                "__deepcopy__ that ignores the memo. Exclude the layer."
            )
    memory = {_address(tensor): name for name, tensor in _tensors(model)}
    for name, tensor in _tensors(result):
        shared = memory.get(_address(tensor))
        if shared is not None and _address(tensor):
            raise ConversionError(
                f"'{name}' of the copy shares its memory with '{shared}' of the original. If it "
                "belongs to a layer that was given, build it from a clone; else its module has its "
                "own __deepcopy__ that does not copy."
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not is_lazy(tensor):
            yield name, tensor


def _address(tensor: Tensor) -> int:
    """Where the tensor's memory begins; 0 if it has none that could be compared."""
    if type(tensor.data) is not Tensor or tensor.layout != torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(label(name) for name, module in model.named_modules() if module is wanted)


def _holder(model: nn.Module, parameter: nn.Parameter, replaced: Mapping[nn.Module, Any]) -> str:
    """Who else uses a parameter of a replaced module, found one attribute at a time."""
    for name, module in model.named_modules(remove_duplicate=False):
        if any(module in set(gone.modules()) for gone in replaced):
            continue
        for leaf, own in module.named_parameters(recurse=False, remove_duplicate=False):
            if own is parameter:
                return f"'{leaf}' of {type(module).__name__} {label(name)}"
        for attribute, value in plain_attributes(module):
            memo = anchored(model)
            memo.pop(id(parameter), None)
            try:
                copy.deepcopy(value, memo)
            except Exception:  # this one does not copy by itself; another may be the holder
                continue
            if id(parameter) in memo:
                return f"attribute '{attribute}' of {type(module).__name__} {label(name)}"
    return "an object outside of the model's modules"
