"""Inputs to run a model on once: to trace it for ONNX, and to compare outputs."""

import inspect
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError
from mpocompress.layers import MPOLayer, MPOLinear
from mpocompress.layers.modes import evaluation_mode
from mpocompress.loading.batches import Batches
from mpocompress.loading.config_inputs import ROWS, inputs_of_config
from mpocompress.loading.huggingface import import_transformers, quiet_transformers
from mpocompress.loading.source import Source

_DTYPES = {
    **{str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16)},
    **{str(t).removeprefix("torch."): t for t in (torch.bfloat16, torch.int64, torch.int32)},
    **{str(t).removeprefix("torch."): t for t in (torch.int16, torch.int8, torch.uint8)},
    "bool": torch.bool,
}
_SPEC = re.compile(r"(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?", re.IGNORECASE)
_LARGEST_INPUT = 2**31
_RIGHT_SPEC = "Right is, for example, 1x784 or 1x128:int64"

# Layers that may stand before the first Linear without changing what shape the input has.
_NORMS = (nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm)

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
_TOKENIZER_NAMES = ("input_ids", "attention_mask", "token_type_ids")
_SENTENCES = [
    "The old lighthouse keeper wrote down the weather every evening.",
    "Rain again.",
    "Nobody had told the engineers that the bridge would have to carry trains as well.",
]

_WAY_OUT = "Give the inputs as --data, or their shapes as --input (one for each argument)."


@dataclass(frozen=True)
class InputSpec:
    """Shape of one forward argument.

    Attributes:
        shape: all dimensions, the batch dimension included.
        dtype: None stands for the floating dtype of the model.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return shape if self.dtype is None else f"{shape}:{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, eq=False)
class ExampleInputs:
    """Arguments with which the model was called once, successfully.

    Attributes:
        args: positional arguments.
        kwargs: arguments by name.
        origin: where they come from, for the report.
    """

    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = field(default_factory=dict)
    origin: str = ""


def parse_input_spec(text: str) -> InputSpec:
    """Read `1x784` or `1x784:float32`.

    Raises:
        DataError: another form, a dimension of zero, too many numbers, or an unknown dtype.
    """
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise DataError(
            f"--input {text!r} is not a shape: dimensions are positive integers with an x between "
            f"them. {_RIGHT_SPEC}."
        )
    shape = tuple(int(size) for size in match["shape"].lower().split("x"))
    if 0 in shape:
        raise DataError(f"--input {text!r} has a dimension of zero. {_RIGHT_SPEC}.")
    if math.prod(shape) > _LARGEST_INPUT:
        raise DataError(f"--input {text!r} has more than {_LARGEST_INPUT} numbers. {_RIGHT_SPEC}.")
    name = match["dtype"]
    if name is not None and name.lower() not in _DTYPES:
        raise DataError(
            f"--input {text!r}: unknown dtype {name!r}; known are {', '.join(_DTYPES)}. "
            f"{_RIGHT_SPEC}."
        )
    return InputSpec(shape, None if name is None else _DTYPES[name.lower()])


def example_inputs(
    source: Source | nn.Module,
    *,
    specs: Sequence[str | InputSpec] = (),
    batches: Batches | None = None,
) -> ExampleInputs | None:
    """Find inputs that the model accepts.

    The first of: a batch of the data; random numbers of the given shapes; sentences through the
    tokenizer of a Hugging Face folder, what its config tells of the inputs, or both; a matrix for a
    model that starts with a Linear layer. They are tried on the model (in evaluation mode, without
    gradients) before they are returned.

    Args:
        source: what `load_source` gave, or a module.
        specs: shapes of the positional arguments, in order.
        batches: data for the model.

    Returns:
        The inputs, or None if nothing was given and nothing can be inferred for certain.

    Raises:
        DataError: inputs that were given, or that the tokenizer made, do not fit the model.
    """
    module = source.module if isinstance(source, Source) else source
    if module is None:
        return None
    if batches is not None:
        return _from_data(module, batches)
    if specs:
        return _from_specs(
            module, [parse_input_spec(s) if isinstance(s, str) else s for s in specs]
        )
    folder = source.tokenizer_folder if isinstance(source, Source) else None
    has_tokenizer = folder and any((folder / name).is_file() for name in _TOKENIZER_FILES)
    if folder is not None and has_tokenizer and "input_ids" in _forward_names(module):
        return _from_tokenizer(module, folder)
    return _from_config(module) or _infer(module)


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and warnings; afterwards every part is as it was."""
    with evaluation_mode(module), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _tried(
    module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    *,
    origin: str,
    hint: str,
) -> tuple[ExampleInputs, Any]:
    """The inputs, and what the model gives for them."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    args = tuple(tensor.to(device) for tensor in args)
    kwargs = {name: tensor.to(device) for name, tensor in kwargs.items()}
    try:
        with _evaluation(module):
            output = module(*args, **kwargs)
    except Exception as error:
        given = [_describe(tensor) for tensor in args]
        given += [f"{name}={_describe(tensor)}" for name, tensor in kwargs.items()]
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise DataError(
            f"{origin}: the model does not accept {', '.join(given)}: {type(error).__name__}: "
            f"{reason}. Its forward takes ({', '.join(_forward_names(module))}). {hint}"
        ) from error
    return ExampleInputs(args, kwargs, origin), output


def _describe(tensor: Tensor) -> str:
    return str(InputSpec(tuple(tensor.shape), tensor.dtype))


def _forward_names(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _main_dtype(module: nn.Module) -> torch.dtype:
    """The floating dtype that most of the parameters have."""
    counts: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def _from_data(module: nn.Module, batches: Batches) -> ExampleInputs:
    batch = next(iter(batches)).cast(_main_dtype(module))
    found, _ = _tried(
        module,
        batch.args,
        batch.kwargs,
        origin=f"the first batch of {batches.place}",
        hint="Arrays go to forward by name; arr_0, arr_1, ... go by position.",
    )
    return found


def _from_specs(module: nn.Module, specs: list[InputSpec]) -> ExampleInputs:
    """Random floats and indices, and masks that hide nothing, as far as the outputs tell.

    In a boolean mask True may mean use or ignore, as in PyTorch's `src_key_padding_mask`: ones are
    tried first, zeros where the argument is named after padding, and the others where the outputs
    are not finite then.
    """
    origin = f"--input {' '.join(map(str, specs))}"
    found: ExampleInputs | None = None
    failure: DataError | None = None
    masks = [number for number, spec in enumerate(specs) if spec.dtype is torch.bool]
    names = dict(enumerate(_forward_names(module)))
    ignores = any("pad" in names.get(number, "").lower() for number in masks)
    for mask_value in (not ignores, ignores) if masks else (True,):
        args = _made_up(module, specs, mask_value, origin)
        try:
            tried, output = _tried(module, args, {}, origin=origin, hint=f"{_RIGHT_SPEC}.")
        except DataError as error:
            failure = failure or error
            continue
        found = found or tried
        if all(map(_is_finite, _leaves(output))):
            return tried
    if found is None:
        raise failure or DataError(f"{origin}: the model does not accept it. {_RIGHT_SPEC}.")
    return found


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def _made_up(
    module: nn.Module, specs: Sequence[InputSpec], mask_value: bool, origin: str
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    kinds = nn.Embedding | nn.EmbeddingBag
    tables = [m.num_embeddings for m in module.modules() if isinstance(m, kinds)]
    args: list[Tensor] = []
    for spec in specs:
        dtype = spec.dtype or _main_dtype(module)
        first_integer = all(t.is_floating_point() or t.dtype is torch.bool for t in args)
        try:
            if dtype.is_floating_point:
                tensor = torch.randn(spec.shape, generator=generator, device="cpu").to(dtype)
            elif dtype is torch.bool:
                tensor = torch.full(spec.shape, mask_value, device="cpu")
            elif first_integer and tables:
                # Indices into the smallest table are valid for each of them.
                high = min(*tables, torch.iinfo(dtype).max)
                tensor = torch.randint(high, spec.shape, generator=generator, device="cpu").to(
                    dtype
                )
            else:
                tensor = torch.ones(
                    spec.shape, dtype=dtype, device="cpu"
                )  # a mask that hides nothing
        except RuntimeError as error:
            raise DataError(f"{origin}: no tensor of {spec} can be made: {error}") from error
        args.append(tensor)
    return tuple(args)


def _from_tokenizer(module: nn.Module, folder: Path) -> ExampleInputs:
    transformers = import_transformers()
    origin = f"the tokenizer of {folder.name}"
    try:
        with quiet_transformers():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            if tokenizer.pad_token is None:  # decoders often have none; the mask hides the padding
                tokenizer.pad_token = tokenizer.eos_token
            encoded = tokenizer(_SENTENCES, padding=True, return_tensors="pt")
    except Exception as error:
        raise DataError(
            f"{origin} cannot be used: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}. {_WAY_OUT}"
        ) from error
    accepted = _forward_names(module)
    kwargs = {name: encoded[name] for name in _TOKENIZER_NAMES if name in encoded.keys() & accepted}
    # Pictures beside the words, or the words of a decoder, which no tokenizer gives.
    made_up = _of_config(module, len(_SENTENCES)).items()
    if others := {name: tensor for name, tensor in made_up if name not in _TOKENIZER_NAMES}:
        with suppress(DataError):
            return _tried(module, (), {**kwargs, **others}, origin=origin, hint="")[0]
    return _tried(module, (), kwargs, origin=origin, hint=_WAY_OUT)[0]


def _from_config(module: nn.Module) -> ExampleInputs | None:
    """Inputs made up after the config of a transformers model, if it accepts them."""
    for rows in (ROWS, 1):  # some classifiers take several rows only with an index for padding
        kwargs = _of_config(module, rows)
        if not kwargs:
            return None
        shapes = ", ".join(f"{name} {_describe(tensor)}" for name, tensor in kwargs.items())
        with suppress(DataError):
            return _tried(module, (), kwargs, origin=f"the model's config: {shapes}", hint="")[0]
    return None


def _of_config(module: nn.Module, rows: int) -> dict[str, Tensor]:
    dtype = _main_dtype(module)
    found = inputs_of_config(module, rows)
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in found.items()}


def _infer(module: nn.Module) -> ExampleInputs | None:
    """A matrix of random rows, if the model certainly maps rows to rows.

    That is so if its first layer with weights is the first Linear (norms may precede it), that
    layer gets a matrix of the same shape, and each row's output is the same without the other rows;
    an attention or recurrent layer that takes the rows for a sequence fails the last test.
    """
    named = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear | MPOLinear)]
    if not named or not _takes_one_argument(module):
        return None
    name, linear = named[0]
    dtype = next(linear.parameters()).dtype
    if not dtype.is_floating_point:
        return None
    rows = torch.randn(
        3, linear.in_features, generator=torch.Generator().manual_seed(0), device="cpu"
    )
    rows = rows.to(dtype).to(next(linear.parameters()).device)
    try:
        with _evaluation(module), _record_calls(module) as calls:
            together = module(rows)
        with _evaluation(module):
            apart = [module(rows[i : i + 1]) for i in range(len(rows))]
    except Exception:
        return None  # the model takes something else: the answer to the question asked here
    before = [part for part, _ in calls]
    weighted = [
        (part, shape) for part, shape in calls if not isinstance(part, (nn.Flatten, *_NORMS))
    ]
    if not weighted or weighted[0] != (linear, rows.shape) or not _rowwise(together, apart):
        return None
    origin = f"inferred from the first layer{f' {name}' if name else ''} ({rows.shape[1]} inputs)"
    if any(isinstance(part, nn.Flatten) for part in before[: before.index(linear)]):
        origin += "; the model flattens its input, so another shape can be given as --input"
    return ExampleInputs((rows[:2].clone(),), {}, origin)


def _takes_one_argument(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters) == 1 and not any(
        p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters
    )


@contextmanager
def _record_calls(module: nn.Module) -> Iterator[list[tuple[nn.Module, Any]]]:
    """Parts with weights of their own (and Flatten) in the order of calls, with input shapes."""
    calls: list[tuple[nn.Module, Any]] = []

    def record(part: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append((part, args[0].shape if args and isinstance(args[0], Tensor) else None))

    kinds = (nn.Linear, MPOLayer, nn.Flatten)
    handles = [
        part.register_forward_pre_hook(record)
        for part in module.modules()
        if isinstance(part, kinds) or next(part.parameters(recurse=False), None) is not None
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _leaves(output: Any) -> list[Any]:
    """The values in nested tuples, lists and mappings, in order."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [leaf for part in output for leaf in _leaves(part)]
    return [output]


def _rowwise(together: Any, apart: list[Any]) -> bool:
    """Whether the outputs for a batch are those of its rows, one under the other."""
    outputs = _leaves(together)
    singles = [_leaves(output) for output in apart]
    if not outputs or any(len(single) != len(outputs) for single in singles):
        return False
    for position, output in enumerate(outputs):
        parts = [single[position] for single in singles]
        if not all(isinstance(t, Tensor) and t.ndim for t in (output, *parts)):
            return False
        stacked = torch.cat(parts)
        if stacked.shape != output.shape:
            return False
        # Half of the digits: sums are taken in another order.
        close = math.sqrt(torch.finfo(output.dtype).eps) if output.is_floating_point() else 0.0
        scale = float(output.abs().max()) if output.numel() else 0.0
        scale = scale if math.isfinite(scale) else 1.0  # NaN weights are refused later, by name
        if not torch.allclose(output, stacked, rtol=close, atol=close * scale, equal_nan=True):
            return False
    return True
