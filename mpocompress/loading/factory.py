"""The user's own code: `MODULE:FACTORY` builds the module, the checkpoint fills it."""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.errors import LoadError, MPOCompressError

_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_SPEC = re.compile(rf"({_DOTTED}):({_DOTTED})")


@contextmanager
def project_on_path() -> Iterator[None]:
    """Make modules in the current directory importable, ahead of installed ones, for a while.

    Only while the user's own code is imported and called: later imports of libraries must not pick
    up files that happen to lie in the directory.
    """
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        # Imported code may have edited the path itself.
        if folder in sys.path:
            sys.path.remove(folder)


def is_object_spec(spec: str) -> bool:
    """Whether the text has the form `MODULE:NAME`."""
    return _SPEC.fullmatch(spec) is not None


def import_object(spec: str, *, option: str) -> Any:
    """Import what `MODULE:NAME` names; the current directory comes first.

    Args:
        spec: dotted module, a colon, and a (dotted) name in it.
        option: the option that the user gave, for messages: "--model" or "--data".

    Raises:
        LoadError: malformed spec, no such module or name, or the import itself failed.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise LoadError(
            f"{option} {spec!r} is not of the form MODULE:NAME, two dotted Python names as in "
            f"{_suggest_spec(spec)!r}."
        )
    module_name, attribute = match.groups()
    try:
        with project_on_path():
            importlib.invalidate_caches()  # the file may be seconds old
            value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise LoadError(
                f"{option} {spec}: importing {module_name} needs the module {error.name!r}, which "
                "is not installed."
            ) from error
        near = near_names(module_name, (path.stem for path in Path.cwd().glob("*.py")))
        raise LoadError(
            f"{option} {spec}: there is no module {error.name!r} in the current directory or among "
            f"the installed packages.{near} Run the command from the folder that holds it."
        ) from error
    except (Exception, SystemExit) as error:
        raise LoadError(
            f"{option} {spec}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            near = near_names(part, (name for name in dir(value) if not name.startswith("_")))
            raise LoadError(f"{option} {spec}: {module_name} has no {attribute!r}.{near}")
        value = getattr(value, part)
    return value


def _suggest_spec(spec: str) -> str:
    module, _, name = spec.partition(":")
    module = re.sub(r"\.py$", "", module.strip().strip("/")).replace("/", ".")
    suggestion = f"{module}:{name.strip() or 'build_model'}"
    return suggestion if is_object_spec(suggestion) else "my_package.model:build_model"


def near_names(wanted: str, names: Iterable[str], *, count: int = 3) -> str:
    """A sentence (with a leading space) that lists the names most like `wanted`, or ''."""
    near = difflib.get_close_matches(wanted, sorted(set(names)), n=count, cutoff=0.5)
    return f" Near names: {', '.join(near)}." if near else ""


def build_module(spec: str) -> nn.Module:
    """Call the user's factory.

    Args:
        spec: `MODULE:FACTORY`; FACTORY is a function or class without required arguments, or a
            module instance.

    Raises:
        LoadError: it cannot be imported, raises, or does not give an `nn.Module`.
    """
    factory = import_object(spec, option="--model")
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise LoadError(
            f"--model {spec} is an object of type {type(factory).__name__}; needed is a function "
            "or class that builds the module when called without arguments."
        )
    try:
        with project_on_path():
            module = factory()
    except MPOCompressError:
        raise
    except (Exception, SystemExit) as error:
        raise LoadError(
            f"--model {spec}: calling it without arguments raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise LoadError(
            f"--model {spec} returned an object of type {type(module).__name__}; needed is a "
            "torch.nn.Module."
        )
    return module


def fill_module(
    module: nn.Module, state: Mapping[str, Tensor], *, spec: str, place: str
) -> tuple[str, ...]:
    """Put a checkpoint's tensors into a module, in place and strictly.

    The tensors become the module's parameters themselves: no second copy is made, their dtype
    stays, and so do `requires_grad` and ties of the module.

    Args:
        module: what the factory built; may be on the meta device.
        state: tensors by qualified name.
        spec: the factory, for messages.
        place: the checkpoint, for messages.

    Returns:
        Notes for the user, such as a changed dtype.

    Raises:
        LoadError: names missing from the checkpoint or unknown to the module, other shapes or kinds
            of numbers, tied parameters with different values, or parameters left without values.
    """
    own: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    ties = _tied_names(own)
    own |= dict(module.named_buffers(remove_duplicate=False))
    state, prefix = _without_prefix(state, own)
    _check_fit(own, state, spec=spec, place=place)
    for names in ties:
        _check_tie([(name, state[name]) for name in names if name in state], place=place)
    notes = (*prefix, *_dtype_notes(own, state))
    try:
        result = module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise LoadError(f"{place}: does not fit the module of {spec}: {error}") from error
    filled = set(state) - set(result.unexpected_keys)
    missing = set(result.missing_keys)
    for names in ties:
        present = [name for name in names if name in filled]
        if present:
            _tie(module, names, module.get_parameter(present[0]))
            missing -= set(names)
    if missing or result.unexpected_keys:
        raise LoadError(
            _explain_names(missing, set(result.unexpected_keys), len(own), spec=spec, place=place)
        )
    on_meta = [name for name, tensor in _named_tensors(module) if tensor.is_meta]
    if on_meta:
        raise LoadError(
            f"--model {spec}: {_some(on_meta)} is on the meta device and not in {place}. Build "
            "buffers that are not saved on the CPU."
        )
    return notes


def _without_prefix(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """The state without what all of its names begin with, where the module knows what remains.

    Training frameworks keep the network in an attribute of a module of their own.
    """
    first = next(iter(state), "")
    for end in (place + 1 for place, sign in enumerate(first) if sign == "."):
        prefix = first[:end]
        if not all(name.startswith(prefix) for name in state):
            break
        if not own.keys() & state.keys() and own.keys() >= {name[end:] for name in state}:
            note = f"all names begin with {prefix!r}, which was left away"
            return {name[end:]: tensor for name, tensor in state.items()}, (note,)
    return state, ()


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _tied_names(parameters: Mapping[str, Tensor]) -> list[list[str]]:
    """Groups of names that stand for one and the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _tie(module: nn.Module, names: list[str], parameter: nn.Parameter) -> None:
    # Assignment of a state dict gives each name a parameter of its own.
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, parameter)


def _check_tie(values: list[tuple[str, Tensor]], *, place: str) -> None:
    for name, value in values[1:]:
        first, reference = values[0]
        same = value.data_ptr() == reference.data_ptr() or torch.equal(value, reference)
        if not same:
            raise LoadError(
                f"{place}: {first!r} and {name!r} are one tied parameter in the module, but differ "
                "in the checkpoint. Build the module without the tie."
            )


def _check_fit(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, spec: str, place: str
) -> None:
    wrong = [
        f"{name!r} is {tuple(state[name].shape)} in the checkpoint and {tuple(tensor.shape)} in "
        "the module"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        raise LoadError(
            f"{place}: {len(wrong)} of {len(own)} tensors have another shape than in the module of "
            f"{spec}: {_some(wrong, quote=False)}. Was the factory called with other sizes?"
        )
    for name, tensor in own.items():
        if name in state and _kind(state[name]) != _kind(tensor):
            raise LoadError(
                f"{place}: {name!r} holds {_dtype_name(state[name].dtype)} numbers, the module of "
                f"{spec} expects {_dtype_name(tensor.dtype)}."
            )


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else "integer"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_notes(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[str, ...]:
    changes: dict[tuple[str, str], int] = {}
    for name, tensor in own.items():
        if name in state and state[name].dtype != tensor.dtype:
            pair = (_dtype_name(state[name].dtype), _dtype_name(tensor.dtype))
            changes[pair] = changes.get(pair, 0) + 1
    return tuple(
        f"{count} tensors keep the checkpoint's {stored}, where the factory builds {built}"
        for (stored, built), count in sorted(changes.items())
    )


def _explain_names(
    missing: set[str], unexpected: set[str], total: int, *, spec: str, place: str
) -> str:
    lines = [f"{place} does not fit the module of {spec}."]
    if missing:
        first = min(missing)
        lines.append(
            f"{len(missing)} of {total} names are missing from the checkpoint: "
            f"{_some(sorted(missing))}.{near_names(first, unexpected)}"
        )
    if unexpected:
        lines.append(
            f"{len(unexpected)} names are unknown to the module: {_some(sorted(unexpected))}."
        )
        if not missing:
            lines.append("Does the factory leave out a part of the model?")
    return " ".join(lines)


def _some(names: list[str], *, count: int = 3, quote: bool = True) -> str:
    shown = ", ".join(repr(name) if quote else name for name in names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")
