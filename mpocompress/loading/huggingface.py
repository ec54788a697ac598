"""Hugging Face model folders. Files are read by us; transformers only builds the module.

Given a folder, `from_pretrained` would also look for adapters, quantizers, distributed checkpoints
and kernels from the hub. It is therefore handed a config and tensors, never a path.
"""

import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.errors import LoadError, MissingExtraError

_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_MINIMUM_MAJOR = 5

# Attention that is part of torch; other names may stand for a kernel to fetch from the hub.
_PLAIN_ATTENTION = (None, "eager", "sdpa")

# Buffers that older versions saved and newer ones compute; transformers ignores them silently.
_COMPUTED_BUFFERS = (r"(^|\.)position_ids$", r"rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class ModelFolder:
    """The parts of a model folder that matter here.

    Attributes:
        path: the folder with config.json (for sentence-transformers maybe inside the given one).
        config: its config.json.
        weights: the weight files, in the order in which they are merged.
        is_sentence_encoder: modules.json pools the token vectors, so that the pooler is not used.
        other_weights: modules.json names layers after the encoder that have weights of their own.
    """

    path: Path
    config: Path
    weights: tuple[Path, ...]
    is_sentence_encoder: bool = False
    other_weights: tuple[str, ...] = ()


def find_folder(path: Path) -> ModelFolder:
    """Find config and weights in a folder; nothing is imported or loaded.

    Raises:
        LoadError: it is no model folder, or names files that are not there.
    """
    steps = _sentence_transformers_steps(path)
    encoder = path
    for kind, folder in steps:
        if kind == "Transformer":
            encoder = _inside(path, folder, listed_in="modules.json") if folder else path
            break
    config = encoder / "config.json"
    if not config.is_file():
        raise LoadError(f"{path} is a folder without config.json{_describe_contents(path)}")
    if (encoder / "adapter_config.json").is_file():
        raise LoadError(
            f"{path} holds an adapter (adapter_config.json). Merge it into its model first "
            "(merge_and_unload() in peft), and save that."
        )
    return ModelFolder(
        path=encoder,
        config=config,
        weights=_weight_files(encoder),
        is_sentence_encoder=any(kind == "Pooling" for kind, _ in steps),
        other_weights=tuple(
            folder
            for kind, folder in steps
            if kind != "Transformer" and folder and any((path / folder).glob("*model*.*"))
        ),
    )


def _describe_contents(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if "model.mpo.safetensors" in names:
        return ": it is a result of mpocompress. Load it with mpocompress.load(...)."
    models = [n for n in names if n.endswith((".pt", ".pth", ".safetensors"))]
    if models:
        return f". Did you mean the file {models[0]} in it?"
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    return f", so not a Hugging Face model. It holds: {shown or 'nothing'}."


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, kind):
        raise LoadError(f"{path} holds a {type(content).__name__}, not a {kind.__name__}.")
    return content


def _sentence_transformers_steps(path: Path) -> list[tuple[str, str]]:
    """`(kind, sub-folder)` of each step in modules.json; empty if there is none."""
    index = path / "modules.json"
    if not index.is_file():
        return []
    return [
        (str(step.get("type", "")).rpartition(".")[2], str(step.get("path", "")))
        for step in _read_json(index, list)
        if isinstance(step, dict)
    ]


def _inside(folder: Path, name: str, *, listed_in: str) -> Path:
    """A path in a folder; refuses names that lead out of it."""
    target = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise LoadError(f"{folder / listed_in} names {name!r}, which is outside of the folder.")
    return target


def _weight_files(folder: Path) -> tuple[Path, ...]:
    for name in _SINGLE_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return (folder / name,)
        if index.is_file():
            mapping = _read_json(index, dict).get("weight_map")
            if not isinstance(mapping, dict) or not mapping:
                raise LoadError(f"{index} has no weight_map, so the shards are not known.")
            shards = [
                _inside(folder, str(shard), listed_in=index.name)
                for shard in sorted(set(mapping.values()), key=str)
            ]
            absent = [shard.name for shard in shards if not shard.is_file()]
            if absent:
                raise LoadError(
                    f"{folder}: {len(absent)} of {len(shards)} weight files that {index.name} "
                    f"names are not there: {', '.join(absent[:3])}. Download the folder again."
                )
            return tuple(shards)
    raise LoadError(
        f"{folder} has a config.json but no weights: none of {', '.join(_SINGLE_FILES)}, nor an "
        "index of shards."
    )


def read_folder_weights(
    folder: ModelFolder, read: Callable[[Path], tuple[dict[str, Tensor], tuple[str, ...]]]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Merge the shards of a folder.

    Args:
        folder: as `find_folder` found it.
        read: reads one weight file to a state dict and notes.

    Raises:
        LoadError: two shards hold the same name, or one cannot be read.
    """
    state: dict[str, Tensor] = {}
    notes: dict[str, None] = {}
    for path in folder.weights:
        shard, shard_notes = read(path)
        twice = sorted(set(state) & set(shard))
        if twice:
            raise LoadError(f"{path}: {twice[0]!r} is also in another weight file of the folder.")
        state |= shard
        notes |= dict.fromkeys(shard_notes)
    return state, tuple(notes)


def load_folder(
    folder: ModelFolder, state: Mapping[str, Tensor]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the transformers model that a folder describes and fill it.

    Args:
        folder: as `find_folder` found it.
        state: its weights; they become the model's parameters without a copy.

    Returns:
        `(module in evaluation mode, notes)`. It takes keyword inputs, `input_ids` and so on.

    Raises:
        LoadError: unknown or quantized architecture, code of its own, or weights that do not fit or
            would be left at random values.
        MissingExtraError: transformers is not installed.
    """
    transformers = import_transformers()
    notes: list[str] = []
    with quiet_transformers():
        config = _read_config(transformers, folder)
        model_class = _model_class(transformers, config, folder)
        notes += _make_plain(config)
        options: dict[str, Any] = {}
        has_pooler = any(name.startswith("pooler.") or ".pooler." in name for name in state)
        takes_pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
        if takes_pooler and (folder.is_sentence_encoder or not has_pooler):
            options["add_pooling_layer"] = False
            notes.append(
                "loaded without the pooler, which the sentence embedding does not use"
                if folder.is_sentence_encoder
                else "loaded without the pooler, for which the folder has no weights"
            )
        dtype = _main_dtype(state)
        try:
            module, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
            )
        except Exception as error:
            raise LoadError(
                f"{folder.path}: transformers cannot build {model_class.__name__} from it: "
                f"{type(error).__name__}: {_shorten(error)}"
            ) from error
    _refuse_random_weights(info, folder, model_class)
    notes += _entry_notes(module, state, info, dtype)
    if folder.other_weights:
        notes.append(
            f"only the encoder is loaded; {', '.join(folder.other_weights)} is a step after it"
        )
    return module.eval(), tuple(notes)


def import_transformers() -> ModuleType:
    """Import transformers.

    Raises:
        MissingExtraError: it is not installed, or too old.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "Hugging Face folders need transformers, which is not installed: "
            'pip install "mpocompress[hf]"'
        ) from error
    major = int(transformers.__version__.partition(".")[0])
    if major < _MINIMUM_MAJOR:
        raise MissingExtraError(
            f"Hugging Face folders need transformers {_MINIMUM_MAJOR} or newer; installed is "
            f'{transformers.__version__}: pip install "mpocompress[hf]"'
        )
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep load reports, progress bars and warnings of transformers off the terminal."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if had_bars:
                logging.enable_progress_bar()


def _read_config(transformers: ModuleType, folder: ModelFolder) -> Any:
    raw = _read_json(folder.config, dict)
    if "quantization_config" in raw:
        method = raw["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise LoadError(
            f"{folder.config}: the weights are quantized ({method}). Compress the model as it was "
            "before quantization."
        )
    known = str(raw.get("model_type")) in transformers.CONFIG_MAPPING
    if not known and raw.get("auto_map"):
        raise LoadError(
            f"{folder.config}: the model needs Python code of its own (auto_map), which is never "
            "run from a folder. Give the code that builds it as --model MODULE:FACTORY."
        )
    if not known:
        raise LoadError(
            f"{folder.config}: transformers {transformers.__version__} does not know the model "
            f"type {raw.get('model_type')!r}. Give code that builds it as --model MODULE:FACTORY."
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise LoadError(
            f"{folder.config}: transformers refuses it: {type(error).__name__}: {_shorten(error)}"
        ) from error


def _model_class(transformers: ModuleType, config: Any, folder: ModelFolder) -> Any:
    """The class that the config names; for sentence encoders the bare encoder, as they use it."""
    if not folder.is_sentence_encoder:
        for name in config.architectures or ():
            # Names come from the file: take nothing that is not a model class.
            found = getattr(transformers, str(name), None)
            if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
                return found
    try:
        return transformers.MODEL_MAPPING[type(config)]
    except KeyError as error:
        raise LoadError(
            f"{folder.config}: transformers has no model class for {config.architectures or 'it'}. "
            "Give code that builds it as --model MODULE:FACTORY."
        ) from error


def _make_plain(config: Any) -> list[str]:
    """Turn off what would fetch code or change the outputs; in place, with notes."""
    notes = []
    parts = [config, *(getattr(config, key, None) for key in config.sub_configs)]
    for part in parts:
        wanted = getattr(part, "_attn_implementation", None)
        if wanted not in _PLAIN_ATTENTION:
            part._attn_implementation = None
            notes.append(f"attention {wanted!r} of the config is replaced by torch's own")
        if getattr(part, "use_cache", False) and getattr(part, "is_decoder", True):
            part.use_cache = False  # keys and values of each layer are no output to compare
    return notes


def _main_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The floating dtype that most of the weights have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def _refuse_random_weights(info: Mapping[str, Any], folder: ModelFolder, model_class: Any) -> None:
    """A weight that the folder lacks would be random, and nobody would see it."""
    names = sorted(info["missing_keys"])
    names += [
        f"{name} ({tuple(stored)} in the files, {tuple(wanted)} in the model)"
        for name, stored, wanted in sorted(info["mismatched_keys"], key=str)
    ]
    problems = [" ".join(str(text).split()) for text in info["error_msgs"]]
    if not names and not problems:
        return
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    raise LoadError(
        f"{folder.path}: {len(names)} weights of {model_class.__name__} are not in its weight "
        f"files (or have another shape) and would be random: {'; '.join([shown, *problems])}. Is "
        "config.json the one that belongs to the weights?"
    )


def _entry_notes(
    module: nn.Module, state: Mapping[str, Tensor], info: Mapping[str, Any], dtype: torch.dtype
) -> list[str]:
    """What of the checkpoint the model does not use, and what it does not take from it."""
    notes = []
    own = set(module.state_dict())
    ignored: Iterable[str] = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    quietly = (*_COMPUTED_BUFFERS, *ignored)
    unused = set(info["unexpected_keys"])
    unused |= {n for n in state if n not in own and any(re.search(p, n) for p in quietly)}
    if unused:
        shown = sorted(unused)
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        notes.append(f"not used by the model: {', '.join(shown[:8])}{more}")
    changed = sorted({str(t.dtype) for t in state.values() if t.is_floating_point()} - {str(dtype)})
    if changed:
        notes.append(f"weights of {', '.join(changed)} are converted to {dtype}")
    # Some models permit missing weights that they compute or rarely use.
    permitted = getattr(module, "_keys_to_ignore_on_load_missing", None) or ()
    tied = set(getattr(module, "all_tied_weights_keys", ()))
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    absent = sorted(
        name
        for name in own - tied
        if any(re.search(pattern, name) for pattern in permitted)
        and not {name, prefix + name, name.removeprefix(prefix)} & set(state)
    )
    if absent:
        notes.append(f"set by transformers, not from the files: {', '.join(absent[:8])}")
    return notes


def _shorten(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."
