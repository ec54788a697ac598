"""What to give as `--input` where nothing can be inferred: guesses after the first layer, tried."""

import inspect
from collections.abc import Iterator

import torch
from torch import nn

from mpocompress.errors import DataError
from mpocompress.layers import MPOLayer, MPOLinear
from mpocompress.loading.example_inputs import InputSpec, example_inputs

_STEPS = 16
# Sides of pictures and lengths of signals that models are made for, usual ones first.
_SIDES = (224, 32, 28, 64, 96, 128, 256, 299, 384, 512)
_LENGTHS = (1024, 128, 100, 256, 512, 2048, 16000)
_VIDEOS = ((16, 112), (8, 224), (16, 32))
_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


def input_hint(module: nn.Module) -> str:
    """The end of a sentence on a model whose inputs are not known: what to give, and how.

    Shapes that the model's first layer takes are tried on it; what is told as accepted can be given
    as it stands. That it makes sense nobody but the user can say.
    """
    names = _required(module)
    for spec in _guesses(module):
        specs = [spec] * max(len(names), 1)
        try:
            if example_inputs(module, specs=specs) is not None:
                options = " ".join(f"--input {spec}" for spec in specs)
                return f"give it with --input, as in {options}, which it accepts, or give --data"
        except DataError:
            continue
    each = f", one for each of its arguments ({', '.join(names)})" if len(names) > 1 else ""
    return f"give it with --input{each}, as in --input 1x784, or give --data"


def _required(module: nn.Module) -> list[str]:
    """Arguments that forward cannot do without."""
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]


def _guesses(module: nn.Module) -> Iterator[InputSpec]:
    """Shapes that the first layer with weights takes, in the order in which layers are listed."""
    first = next(
        (
            part
            for part in module.modules()
            if next(part.parameters(recurse=False), None) is not None or isinstance(part, MPOLayer)
        ),
        None,
    )
    shapes: list[tuple[int, ...]] = []
    dtype = None
    if isinstance(first, nn.Embedding | nn.EmbeddingBag):
        shapes, dtype = [(1, _STEPS), (_STEPS,)], torch.int64
    elif isinstance(first, nn.Linear | MPOLinear):
        shapes = [(1, first.in_features), (1, _STEPS, first.in_features)]
    elif isinstance(first, _RECURRENT):
        shapes = [(1, _STEPS, first.input_size)]
    elif isinstance(first, nn.MultiheadAttention):
        shapes = [(1, _STEPS, first.embed_dim)]
    elif isinstance(first, nn.Conv1d | nn.BatchNorm1d):
        shapes = [(1, _channels(first), length) for length in _LENGTHS]
    elif isinstance(first, nn.Conv2d | nn.BatchNorm2d):
        shapes = [(1, _channels(first), side, side) for side in _SIDES]
    elif isinstance(first, nn.Conv3d | nn.BatchNorm3d):
        shapes = [(1, _channels(first), frames, side, side) for frames, side in _VIDEOS]
    yield from (InputSpec(shape, dtype) for shape in shapes)


def _channels(layer: nn.Module) -> int:
    return int(getattr(layer, "in_channels", 0) or getattr(layer, "num_features", 1))
