"""Open what `torch.save` wrote without running code that nobody has approved.

A pickle is a program. `torch.load(weights_only=True)` interprets it with a short list of names
that it may call; for the duration of one call we add the layers of `torch.nn` and the activation
functions that they hold, so that a whole module made of those parts opens too. What comes out is
then checked: unpickling fills an object's attributes with whatever the file says, so a `Linear`
with a `forward` of its own, or with hooks, is refused although every class in it is harmless.
"""

import inspect
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mpocompress.errors import LoadError, UnsafeCheckpointError
from mpocompress.loading.factory import project_on_path

# Lazy layers change their class on first use and hold no weights yet: nothing to compress in them.
_EXCLUDED_LAYERS = ("Lazy",)

# Functions of tensors and numbers, as `TransformerEncoderLayer.activation` holds them.
_ACTIVATIONS = (
    *("celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu"),
    *("log_softmax", "logsigmoid", "mish", "relu", "relu6", "selu", "sigmoid", "silu"),
    *("softmax", "softplus", "softsign", "tanh", "tanhshrink"),
)

_TRUST = "if you trust whoever made the file, add --trust-pickle"

# How torch's restricted unpickler says that something on the stack is not to be called.
_CALL_REFUSALS = ("Can only create new object", "Trying to call reduce", "Can only build")

# The format of torch before 1.6 opens with this number, pickled.
_OLD_MAGIC = bytes.fromhex("6cfc9c46f9206aa850")

_HINTS = {
    "torch.nn.parallel.": "Save the module inside the wrapper (model.module) instead.",
    "torch.nn.utils.weight_norm.": "Call torch.nn.utils.remove_weight_norm before saving.",
    "torch.nn.utils.spectral_norm.": "Call torch.nn.utils.remove_spectral_norm before saving.",
    "torch.ao.": "Quantized layers are not supported; take the model before quantization.",
    "torch.optim.": "Save model.state_dict() alone, without the optimizer object.",
    "numpy.": "Convert NumPy values to tensors or plain numbers before saving.",
    "torch._dynamo.": "Save the model that was given to torch.compile instead.",
    "torch._C._VariableFunctionsClass": "Take torch.nn.functional.relu, not torch.relu, and so on.",
}


def _layer_classes() -> frozenset[type[nn.Module]]:
    """The layers that a safe checkpoint may hold: the public ones of `torch.nn.modules`.

    Nothing of `torch.nn.parallel` (those start processes), `torch.ao` (other weights) or
    `torch.nn.utils` (hooks that run functions).
    """
    # The second is the out projection of MultiheadAttention, which torch does not list as public.
    classes: set[type[nn.Module]] = {nn.Module, NonDynamicallyQuantizableLinear}
    for name in nn.modules.__all__:
        cls = getattr(nn.modules, name)
        if (
            inspect.isclass(cls)
            and issubclass(cls, nn.Module)
            and cls.__module__.startswith("torch.nn.modules.")
            and not name.startswith(_EXCLUDED_LAYERS)
        ):
            classes.add(cls)
    return frozenset(classes)


SAFE_LAYERS: frozenset[type[nn.Module]] = _layer_classes()


@contextmanager
def _torch_nn_allowed() -> Iterator[None]:
    """Let torch's restricted unpickler build `torch.nn` layers; then its list is as before."""
    wanted: list[Any] = list(SAFE_LAYERS)
    for name in _ACTIVATIONS:
        function = getattr(nn.functional, name)
        # Some are built-ins by now; files of older versions call them by their public place.
        wanted += [function, (function, f"torch.nn.functional.{name}")]
    # What other libraries have allowed in this process is set aside, so that it cannot matter here.
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(wanted):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def describe_foreign_file(path: Path) -> str:
    """One sentence on what a file that is not of the expected format looks like."""
    with path.open("rb") as file:
        head = file.read(200)
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: run `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "it looks like a web page; was the download redirected?"
    if head.startswith(b"PK\x03\x04"):
        return "it is a zip archive; files of torch.save are called .pt or .pth"
    if head.startswith(b"\x80"):
        return "it is a pickle, but not one of torch.save"
    if len(head) > 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 10**8:
        return "it looks like a safetensors file; call it .safetensors"
    return f"it starts with {head[:16]!r}"


def read_pickle(path: Path, *, trust: bool) -> Any:
    """Read a file of `torch.save`.

    Weights are mapped from the file, not copied, wherever the file's format allows it.

    Args:
        path: an existing file.
        trust: run whatever code the pickle asks for. False admits tensors, plain containers and
            numbers, and modules made of `torch.nn` layers.

    Returns:
        The saved object, on the CPU. Unless it is trusted, a module in it still has to pass
        `check_layers` before any method of it is called.

    Raises:
        UnsafeCheckpointError: the pickle names a class or function outside that list.
        LoadError: the file is truncated, corrupt, or of another format.
    """
    mmap = _check_archive(path)
    try:
        with warnings.catch_warnings():
            # Warnings on typed storages and protocols are about torch's internals, not this file.
            warnings.simplefilter("ignore")
            if trust:
                with project_on_path():
                    return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap)
            with _torch_nn_allowed():
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if trust:
            raise LoadError(f"{path}: the pickle is corrupt: {_first_line(error)}") from error
        raise _refusal(path, error) from error
    except EOFError as error:
        raise LoadError(
            f"{path} ({path.stat().st_size} bytes) is truncated: it ends in the middle of a "
            "pickle. Copy or download it again."
        ) from error
    except Exception as error:
        # A damaged pickle can raise nearly anything while it is interpreted, and so can the code
        # that a trusted one calls.
        advice = (
            "Is its code here, in the version that wrote it?" if trust else "Is the file complete?"
        )
        raise LoadError(
            f"{path} ({path.stat().st_size} bytes) cannot be unpickled: "
            f"{type(error).__name__}: {_first_line(error)}. {advice}"
        ) from error


def _check_archive(path: Path) -> bool:
    """Refuse what is not a checkpoint of `torch.save`; say whether its weights may be mapped."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(32)
    if _OLD_MAGIC in head:
        return False  # a stream of pickles and numbers, which torch reads whole
    if not head.startswith(b"PK\x03\x04"):
        raise LoadError(
            f"{path} ({size} bytes) is not a file of torch.save: {describe_foreign_file(path)}."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise LoadError(
            f"{path} ({size} bytes) is truncated or corrupt: the archive has no readable index at "
            f"its end ({error}). Copy or download it again."
        ) from error
    # The archive holds one folder, whose name torch takes from the file's.
    names = {entry.filename.partition("/")[2] or entry.filename for entry in entries}
    if "constants.pkl" in names:
        raise LoadError(
            f"{path} is a TorchScript archive, which this version does not read. Save the original "
            "module's state_dict() with torch.save and give its code as --model MODULE:FACTORY."
        )
    if "archive_format" in names or any(name.startswith("models/") for name in names):
        raise LoadError(
            f"{path} is an exported program (.pt2), which this version does not read. Save the "
            "original module's state_dict() with torch.save and give --model MODULE:FACTORY."
        )
    if "data.pkl" not in names:
        raise LoadError(
            f"{path} is a zip archive without data.pkl, so torch.save did not write it. It holds "
            f"{', '.join(sorted(names)[:3]) or 'nothing'}."
        )
    # A mapped storage is the bytes as they lie in the file: wrong if an archiver compressed them.
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0].rstrip(".")


def _refusal(path: Path, error: pickle.UnpicklingError) -> LoadError:
    """What to tell the user when torch's restricted unpickler stops."""
    text = str(error)
    names = _foreign_names(path, text)
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        hint = next((f" {h}" for p, h in _HINTS.items() if any(n.startswith(p) for n in names)), "")
        return UnsafeCheckpointError(
            f"{path}: loading it would call code that is not part of torch.nn: {shown}. Nothing "
            f"was run.{hint} Either save model.state_dict() and give the code as "
            f"--model MODULE:FACTORY, or, {_TRUST}."
        )
    protocol = _pickle_protocol(path)
    if "Unsupported operand" in text and protocol > 2:
        return UnsafeCheckpointError(
            f"{path}: it was written with pickle protocol {protocol}, which the safe reader does "
            f"not take. Save it again with torch.save's default, or, {_TRUST}."
        )
    words = text.rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
    words = " ".join(words.split())
    if "persistent_load of storage" in words:
        return UnsafeCheckpointError(
            f"{path}: it is a whole module in the format of torch before 1.6, which the safe "
            f"reader takes for state dicts only. Save it again with a newer torch, or, {_TRUST}."
        )
    if words.startswith(_CALL_REFUSALS):
        return UnsafeCheckpointError(
            f"{path}: its pickle makes calls that no file of torch.save needs, so somebody wrote "
            f"it by hand. Nothing was run. ({words})"
        )
    return LoadError(
        f"{path} ({path.stat().st_size} bytes): its pickle is corrupt: {words}. Copy or download "
        "it again."
    )


def _foreign_names(path: Path, text: str) -> list[str]:
    """Dotted names in the pickle that are not on the list: all if they can be listed, else one."""
    try:
        with _torch_nn_allowed():
            listed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        # The format before torch 1.6, opcodes that the lister does not know, or a damaged pickle:
        # torch's message still holds the name at which it stopped.
        listed = []
    if not listed:
        listed = re.findall(r"GLOBAL (\S+) (?:was not|whose module)", text)
    return sorted(set(listed))


def _pickle_protocol(path: Path) -> int:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.partition("/")[2] == "data.pkl")
            head = archive.read(name)[:2]
    else:
        with path.open("rb") as file:
            head = file.read(2)
    return head[1] if head[:1] == b"\x80" else 0


def check_layers(root: nn.Module, path: Path) -> None:
    """Verify that an unpickled module behaves as its classes say.

    Args:
        root: module built by the restricted unpickler.
        path: where it came from, for messages.

    Raises:
        UnsafeCheckpointError: a layer of a class that is not allow-listed, hooks, an attribute that
            hides a method, or a malformed, cyclic or absurdly shared tree of layers.
    """
    num_names: dict[int, int | None] = {}

    def visit(module: nn.Module, name: str) -> int:
        """Check a subtree; return how many names its layers have."""
        shown = f"layer {name!r}" if name else "the model itself"
        if id(module) in num_names:
            known = num_names[id(module)]
            if known is None:
                raise UnsafeCheckpointError(f"{path}: {shown} contains itself.")
            return known
        num_names[id(module)] = None
        _check_layer(module, f"{path}: {shown}")
        count = 1 + sum(
            visit(child, f"{name}.{key}" if name else key)
            for key, child in vars(module)["_modules"].items()
            if child is not None
        )
        if count > _MAX_NAMES:
            raise UnsafeCheckpointError(
                f"{path}: {shown} is shared so often that its layers have {count} names."
            )
        num_names[id(module)] = count
        return count

    try:
        visit(root, "")
    except RecursionError as error:
        raise UnsafeCheckpointError(f"{path}: the layers are nested too deeply.") from error


def _check_layer(module: nn.Module, place: str) -> None:
    kind = type(module)
    if kind not in SAFE_LAYERS:
        raise UnsafeCheckpointError(
            f"{place} is a {kind.__module__}.{kind.__qualname__}, which is not a layer of "
            f"torch.nn. Give its code as --model MODULE:FACTORY, or, {_TRUST}."
        )
    state = vars(module)
    for table, wanted in _TABLES.items():
        entries = state.get(table)
        if not isinstance(entries, dict) or not all(
            isinstance(key, str)
            and key
            and "." not in key
            and (value is None or isinstance(value, wanted))
            for key, value in entries.items()
        ):
            raise UnsafeCheckpointError(f"{place} has a malformed table {table}.")
    for key, value in state.items():
        if key.endswith("_hooks") and value:
            raise UnsafeCheckpointError(
                f"{place} carries hooks ({key}), which would run with every call. Remove them "
                "before saving, or give the code as --model MODULE:FACTORY."
            )
        # Python looks methods up on the object first, and some special ones only there.
        if key.startswith("__") or inspect.isroutine(inspect.getattr_static(kind, key, None)):
            raise UnsafeCheckpointError(
                f"{place} brings its own {key!r} in place of the method of {kind.__name__}. Give "
                "the code as --model MODULE:FACTORY."
            )
    for table in ("_parameters", "_buffers"):
        for key, tensor in state[table].items():
            if tensor is not None and any(callable(value) for value in vars(tensor).values()):
                raise UnsafeCheckpointError(f"{place}: its tensor {key!r} carries functions.")


# More than any real model has, and few enough to walk through.
_MAX_NAMES = 1_000_000

_TABLES: dict[str, type] = {
    "_parameters": nn.Parameter,
    "_buffers": torch.Tensor,
    "_modules": nn.Module,
}
