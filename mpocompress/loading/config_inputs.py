"""Example inputs of a transformers model, made up after its config: tokens, pictures, sound.

Nothing here imports transformers: the module has its config, and the names of its forward arguments
say what they are, since the library gives each kind of input one name.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 2
_TOKENS = 16
_FRAMES = 24
_PICTURE = 224  # where a config has no size, since its model takes any
_SAMPLES_AT_LEAST = 400

# Parts of a config that describe a part of the model.
_TEXT = ("text_config", "text_encoder", "encoder", "decoder")
_VISION = ("vision_config", "encoder", "backbone_config")
_SOUND = ("audio_config", "audio_encoder", "encoder")


def inputs_of_config(module: nn.Module, rows: int = ROWS) -> dict[str, Tensor]:
    """What the model should accept, by argument; nothing for a module without such a config.

    Tokens have a mask that hides the end of the last row, as a tokenizer gives it.

    Args:
        module: of transformers; others have no `config` with a `model_type`.
        rows: of each input.
    """
    config = getattr(module, "config", None)
    if not isinstance(getattr(config, "model_type", None), str):
        return {}
    names = list(inspect.signature(module.forward).parameters)
    main = getattr(module, "main_input_name", None)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    if "input_ids" in names and (main == "input_ids" or _part(config, _TEXT[:2]) is not None):
        found |= _tokens(config, rows, generator, masked="attention_mask" in names)
    if "pixel_values" in names and (main == "pixel_values" or _part(config, _VISION) is not None):
        found["pixel_values"] = _picture(config, rows, generator)
    if main in ("input_features", "input_values", "inputs") and main in names:
        sound = _sound(config, main, rows, generator)
        found |= {} if sound is None else {main: sound}
    if found and "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
        vocabulary = _number(config, ("decoder", "text_config"), "vocab_size")
        if vocabulary is not None:
            found["decoder_input_ids"] = _indices(vocabulary, rows, _TOKENS // 2, generator)
    return found


def _tokens(
    config: Any, rows: int, generator: torch.Generator, *, masked: bool
) -> dict[str, Tensor]:
    vocabulary = _number(config, _TEXT, "vocab_size")
    if vocabulary is None:
        return {}
    places = _number(config, _TEXT, "max_position_embeddings", "n_positions", "max_seq_len")
    # Some tables of positions begin behind the index of the padding.
    length = _TOKENS if places is None else max(1, min(_TOKENS, places - 2))
    ids = _indices(vocabulary, rows, length, generator)
    mask = torch.ones_like(ids)
    padding, end = (_number(config, _TEXT, name) for name in ("pad_token_id", "eos_token_id"))
    if end is not None and 0 <= end < vocabulary:
        ids[ids == end] = (end + 1) % vocabulary
        ids[:, -1] = end  # classifiers read their answer at the only end of each row
    if not masked:
        return {"input_ids": ids}
    if padding is not None and 0 <= padding < vocabulary and rows > 1 and length > 4:
        hidden = length // 4
        ids[-1, : length - hidden] = ids[-1, hidden:].clone()
        ids[-1, length - hidden :], mask[-1, length - hidden :] = padding, 0
    return {"input_ids": ids, "attention_mask": mask}


def _indices(vocabulary: int, rows: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=generator, device="cpu")


def _picture(config: Any, rows: int, generator: torch.Generator) -> Tensor:
    channels = _number(config, _VISION, "num_channels", "in_channels", "in_chans") or 3
    size = _value(config, _VISION, "image_size", "img_size", "input_size")
    if isinstance(size, Mapping):
        size = [size.get("height", _PICTURE), size.get("width", _PICTURE)]
    sides = list(size) if isinstance(size, Sequence) else [size or _PICTURE] * 2
    frames = _number(config, _VISION, "num_frames")
    shape = [rows, channels, *sides[-2:]]
    return _floats(shape if frames is None else [rows, frames, *shape[1:]], generator)


def _sound(config: Any, name: str, rows: int, generator: torch.Generator) -> Tensor | None:
    """Samples, or frames of a spectrogram."""
    strides = _value(config, _SOUND, "conv_stride")
    kernels = _value(config, _SOUND, "conv_kernel")
    if name != "input_features" and strides and kernels:
        samples = _FRAMES  # as many as so many frames behind the convolutions need
        for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return _floats([rows, max(samples, _SAMPLES_AT_LEAST)], generator)
    bins = _number(
        config,
        _SOUND,
        *("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"),
    )
    if bins is None:
        return None
    fixed = _number(config, _SOUND, "max_length") if name == "input_values" else None
    if fixed is not None:
        return _floats([rows, fixed, bins], generator)
    places = _number(config, _SOUND, "max_source_positions")
    if places is not None and name == "input_features" and hasattr(config, "num_mel_bins"):
        return _floats([rows, bins, 2 * places], generator)  # Whisper's: channels, then frames
    return _floats([rows, 4 * _FRAMES, bins], generator)


def _floats(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, device="cpu")


def _part(config: Any, parts: Sequence[str]) -> Any:
    return next((part for part in _parts(config, parts) if part is not config), None)


def _parts(config: Any, parts: Sequence[str]) -> Iterator[Any]:
    """The config, and those of its parts that there are."""
    yield config
    for name in parts:
        part = getattr(config, name, None)
        if hasattr(part, "model_type"):
            yield part


def _value(config: Any, parts: Sequence[str], *names: str) -> Any:
    """The first entry of these names, in the config itself or in its parts."""
    for part in _parts(config, parts):
        for name in names:
            if (value := getattr(part, name, None)) is not None:
                return value
    return None


def _number(config: Any, parts: Sequence[str], *names: str) -> int | None:
    value = _value(config, parts, *names)
    if isinstance(value, list) and value:  # of several ends of a text, the first
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else None
