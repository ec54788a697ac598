"""The repeated blocks of a model: find them, watch what they return, replay what they are given."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpocompress.layers import MPOLayer
from mpocompress.tuning.lockstep import Call, main_output


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Qualified names of the repeated blocks that hold compressed layers, in the model's order.

    These are the children of one class in the `nn.ModuleList` or `nn.Sequential` that has most of
    them; each holds an MPO layer, but is none. Empty if no container has two of them.
    """
    best: list[str] = []
    for name, container in model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        by_class: dict[type[nn.Module], list[str]] = {}
        for key, child in container.named_children():
            if not isinstance(child, MPOLayer) and _holds_compressed(child):
                by_class.setdefault(type(child), []).append(f"{name}.{key}" if name else key)
        for names in by_class.values():
            if len(names) > max(1, len(best)):
                best = names
    return tuple(best)


def _holds_compressed(module: nn.Module) -> bool:
    return any(isinstance(inner, MPOLayer) for inner in module.modules())


@contextmanager
def watched_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Within the block, collect the main output of every call of these modules, by name."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            value = main_output(output)
            if value is not None and value.is_floating_point():
                outputs[name].append(value)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call of a block in the dense model: what it was given, and its main output."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor


@torch.no_grad()
def record_calls(
    model: nn.Module, names: Sequence[str], call: Call
) -> dict[str, list[RecordedCall]]:
    """Run a batch and record every call of these modules; inputs are copied before the call."""
    given: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}

    def before(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            given[name].append(pytree.tree_map(_copied, (args, kwargs)))

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(before(name), with_kwargs=True)
        for name in names
    ]
    try:
        with watched_outputs(model, names) as outputs:
            model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: [
            RecordedCall(args, kwargs, output.clone())
            for (args, kwargs), output in zip(given[name], outputs[name], strict=True)
        ]
        if len(given[name]) == len(outputs[name])
        else []
        for name in names
    }


@torch.no_grad()
def can_replay(model: nn.Module, names: Sequence[str], call: Call) -> bool:
    """Whether each block, called again with what it was given, returns the same.

    A block that keeps a cache, draws random numbers or reads state that the model sets before the
    call does not, and cannot be trained by itself.
    """
    recorded = record_calls(model, names, call)
    for name in names:
        if not recorded[name]:
            return False
        for entry in recorded[name]:
            try:
                again = main_output(model.get_submodule(name)(*entry.args, **entry.kwargs))
            except Exception:  # whatever foreign code raises: it cannot be called like this
                return False
            if again is None or not torch.equal(again, entry.output):
                return False
    return True


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
