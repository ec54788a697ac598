"""How a model is called: example batches as forward arguments, and outputs as named tensors."""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpocompress.errors import DataError, ExportError
from mpocompress.layers import MPOEmbeddingBag

# A batch of forward arguments: one tensor, positional arguments, or keyword arguments.
Batch = Tensor | np.ndarray | Sequence[Any] | Mapping[str, Any]

# Where a forward argument goes: a position, or a keyword.
Slot = int | str

# Attention caches: an input of the next call rather than a result, and no graph output of ours.
_CACHES = frozenset({"past_key_values", "mems", "cache_params"})
_LABELS = frozenset({"labels", "label"})
_CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """Arguments of one forward call, with the tensors apart from the constants.

    Attributes:
        slots: where each tensor goes, in the order of the graph's inputs: by keyword where
            `forward` allows it.
        names: what `forward` calls these arguments; one for each slot.
        tensors: on the CPU, floating dtypes as float32; all but scalars agree in dimension 0.
        constants: arguments that are no tensors (None, bool, int, float, str), by slot.
    """

    slots: tuple[Slot, ...]
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    constants: tuple[tuple[Slot, Any], ...] = ()

    @classmethod
    def from_batch(cls, model: nn.Module, batch: Batch) -> "ForwardCall":
        """Read a batch as forward arguments of this model.

        `use_cache=False` is added where `forward` knows that argument; `labels` in a dict are left
        out, as they turn the output into a loss.

        Raises:
            DataError: the batch is no tensor, sequence or mapping, does not fit `forward`'s
                signature, contains no tensor, is empty, or its tensors disagree in dimension 0.
        """
        signature = inspect.signature(model.forward)
        arguments = _by_slot(batch)
        _check_signature(model, signature, arguments)
        arguments = _by_keyword(arguments, signature)
        if "use_cache" in signature.parameters:
            arguments.setdefault("use_cache", False)
        slots: list[Slot] = []
        tensors: list[Tensor] = []
        constants: list[tuple[Slot, Any]] = []
        for slot, value in arguments.items():
            tensor = _as_tensor(value)
            if tensor is not None:
                slots.append(slot)
                tensors.append(_to_float32(tensor, slot))
            elif isinstance(value, _CONSTANTS):
                constants.append((slot, value))
            else:
                raise DataError(
                    f"argument {slot!r} of the batch is a {type(value).__name__}; forward arguments"
                    " must be tensors, numpy arrays or plain constants. Pass nested ones as "
                    "separate arguments, or wrap the model."
                )
        if not tensors:
            raise DataError(
                f"the batch for {type(model).__name__} contains no tensor (got "
                f"{', '.join(map(repr, arguments)) or 'nothing'}). Pass the forward arguments."
            )
        names = tuple(_argument_name(signature, slot) for slot in slots)
        _check_rows(model, names, tensors)
        return cls(tuple(slots), names, tuple(tensors), tuple(constants))

    @property
    def rows(self) -> int:
        """Size of the batch dimension; 1 where all tensors are scalars."""
        return next((int(tensor.shape[0]) for tensor in self.tensors if tensor.ndim), 1)

    def describe(self) -> str:
        """Names, dtypes and shapes of the tensors, for messages."""
        return ", ".join(
            f"{name}: {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            for name, tensor in zip(self.names, self.tensors, strict=True)
        )

    def with_tensors(self, tensors: Sequence[Tensor]) -> "ForwardCall":
        """The same call with other tensors."""
        return replace(self, tensors=tuple(tensors))

    def with_rows(self, rows: int) -> "ForwardCall":
        """The same call with the first `rows` rows, repeated from the start where there are less.

        The tensors are contiguous copies, so that nothing of the caller's batch is kept alive.
        """
        return self.with_tensors(
            [
                tensor[torch.arange(rows, device="cpu") % tensor.shape[0]]
                if tensor.ndim
                else tensor.clone()
                for tensor in self.tensors
            ]
        )

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of `forward` for these tensors."""
        values: dict[Slot, Any] = dict(zip(self.slots, tensors, strict=True))
        values.update(self.constants)
        positions = sorted(slot for slot in values if isinstance(slot, int))
        keywords = {slot: value for slot, value in values.items() if isinstance(slot, str)}
        return tuple(values[position] for position in positions), keywords


class TensorForward(nn.Module):
    """A model as a function of plain tensors that returns plain tensors, for the tracer.

    The model is the submodule `model`: its parameters are called `model.<their name>` here.
    """

    def __init__(self, model: nn.Module, call: ForwardCall) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the model with the constants of the call; see `flatten_outputs`."""
        args, kwargs = self._call.arguments(tensors)
        return tuple(flatten_outputs(self.model(*args, **kwargs)).values())


def run(model: nn.Module, call: ForwardCall) -> dict[str, Tensor]:
    """The model's output tensors by name, without gradients.

    PyTorch's fused transformer layers are off: they set padded positions to zero, which the same
    layers do not do in training, nor in a traced graph.
    """
    # Copies: a forward may write to what it is given, and the next one is to see the same.
    args, kwargs = call.arguments([tensor.clone() for tensor in call.tensors])
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return flatten_outputs(model(*args, **kwargs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def flatten_outputs(output: Any) -> dict[str, Tensor]:
    """Name the tensors that a model returns.

    A single tensor is called "output". Entries of dicts, dataclasses and named tuples carry their
    keys, those of tuples and lists their positions ("output_0"); nested ones are joined by dots.
    None, caches (`past_key_values`) and whatever is no tensor are left out.

    Raises:
        DataError: there is no tensor among the outputs.
    """
    found = dict(_leaves(output, ""))
    if not found:
        raise DataError(
            f"the model returns no tensor, but {type(output).__name__}. "
            "Wrap it in a module whose forward returns tensors."
        )
    if len(found) == 1 and not isinstance(output, Mapping) and next(iter(found)).isdigit():
        return {"output": next(iter(found.values()))}
    return {
        (f"output_{name}" if name[:1].isdigit() else name) or "output": tensor
        for name, tensor in found.items()
    }


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    items: list[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        items = list(enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    else:
        items = []
    for key, entry in items:
        if key not in _CACHES:
            yield from _leaves(entry, f"{name}.{key}" if name else str(key))


def inference_copy(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy of a model for exporting and checking: eval mode, CPU, float32.

    The modules are copied and the tensors are not: parameters and buffers that already are float32
    (or integers) on the CPU are shared, only the others exist twice while the copy lives.
    Parameters that share their storage become one parameter of the copy.

    Returns:
        The copy, and the names of the floating dtypes that were converted, sorted.

    Raises:
        ExportError: the modules cannot be copied; the cause is in the message.
    """
    memo: dict[int, Any] = {}
    by_storage: dict[tuple[Any, ...], Tensor] = {}
    converted: set[str] = set()
    for tensor in chain(_parameters_and_buffers(model), _computed_attributes(model)):
        if id(tensor) in memo:
            continue
        key = _storage_key(tensor)
        if key not in by_storage:
            by_storage[key] = _on_cpu(tensor)
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                converted.add(str(tensor.dtype).removeprefix("torch."))
        memo[id(tensor)] = by_storage[key]
    try:
        duplicate = copy.deepcopy(model, memo)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be copied for the export: "
            f"{type(error).__name__}: {first_line(error)}. Remove what cannot be copied (locks, "
            "open files, handles) from its attributes."
        ) from error
    return duplicate.eval(), tuple(sorted(converted))


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, without a closing full stop."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".")


def _parameters_and_buffers(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _computed_attributes(model: nn.Module) -> Iterator[Tensor]:
    """Tensors with a history (as `torch.nn.utils.weight_norm` leaves): deepcopy refuses them."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same numbers in memory."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if (
        not plain or not tensor.data_ptr()
    ):  # meta, empty, or a subclass that keeps its data elsewhere
        return (id(tensor),)
    place = (tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride())
    return (type(tensor), *place)


def _on_cpu(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    if tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.is_leaf:
        return tensor
    moved = tensor.detach().to("cpu", dtype)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _by_slot(batch: Batch) -> dict[Slot, Any]:
    if isinstance(batch, (Tensor, np.ndarray)):
        return {0: batch}
    if isinstance(batch, Mapping):
        return {str(key): value for key, value in batch.items() if key not in _LABELS}
    if isinstance(batch, (tuple, list)):
        return dict(enumerate(batch))
    raise DataError(
        f"a batch must be a tensor, a tuple of forward arguments or a dict of them, "
        f"not {type(batch).__name__}."
    )


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    return value.detach() if isinstance(value, Tensor) else None


def _to_float32(tensor: Tensor, slot: Slot) -> Tensor:
    if tensor.is_complex():
        raise DataError(f"argument {slot!r} is complex ({tensor.dtype}); pass real tensors.")
    return tensor.to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)


def _check_signature(
    model: nn.Module, signature: inspect.Signature, arguments: Mapping[Slot, Any]
) -> None:
    positions = [value for slot, value in arguments.items() if isinstance(slot, int)]
    keywords = {slot: value for slot, value in arguments.items() if isinstance(slot, str)}
    try:
        signature.bind(*positions, **keywords)
    except TypeError as error:
        raise DataError(
            f"the batch does not fit {type(model).__name__}.forward("
            f"{', '.join(signature.parameters)}): {error}. "
            "Pass a tensor, a tuple of forward arguments, or a dict of them by name."
        ) from None


def _by_keyword(arguments: dict[Slot, Any], signature: inspect.Signature) -> dict[Slot, Any]:
    """Name the positional arguments, so that a tuple and a dict of the same inputs agree."""
    parameters = list(signature.parameters.values())
    if any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters):
        return arguments
    names: dict[Slot, str] = {
        position: parameter.name
        for position, parameter in enumerate(parameters)
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    return {names.get(slot, slot): value for slot, value in arguments.items()}


def _argument_name(signature: inspect.Signature, slot: Slot) -> str:
    if isinstance(slot, str):
        return slot
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return f"{parameter.name}_{slot - len(names)}"
        names.append(parameter.name)
    return names[slot]


def _check_rows(model: nn.Module, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    shaped = [(name, tensor) for name, tensor in zip(names, tensors, strict=True) if tensor.ndim]
    for name, tensor in shaped:
        first_name, first = shaped[0]
        if tensor.shape[0] != first.shape[0]:
            raise DataError(
                f"input {name!r} of shape {tuple(tensor.shape)} has {tensor.shape[0]} rows, but "
                f"{first_name!r} of shape {tuple(first.shape)} has {first.shape[0]}. "
                f"Dimension 0 is the batch: it must be the same for all inputs.{_of_bags(model)}"
            )
        if not tensor.numel():
            raise DataError(
                f"input {name!r} of shape {tuple(tensor.shape)} is empty; pass at least one row."
            )


def _of_bags(model: nn.Module) -> str:
    """What to do about a layer whose flat indices and offsets are no batch, if there is one."""
    for name, module in model.named_modules():
        if isinstance(module, nn.EmbeddingBag | MPOEmbeddingBag):
            return (
                f" If these are indices and offsets of the bags of {name or 'the model'!r}: pass "
                "indices (bags, entries) without offsets, short bags filled up with padding_idx."
            )
    return ""
