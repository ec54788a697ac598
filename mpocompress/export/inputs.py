"""What the inputs of a graph look like, and made-up batches of the right kind for checking it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mpocompress.errors import LoadError
from mpocompress.export.calls import ForwardCall, Slot

# Names of the symbolic sizes in a graph.
BATCH = "batch"
SEQUENCE = "sequence"

# Where a file's metadata describes its inputs.
INPUTS_KEY = "mpocompress.inputs"

# Size of a symbolic dimension about which a foreign graph says nothing.
_GUESSED_SIZE = 16

Kind = Literal["values", "indices", "mask"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSpec:
    """One input of a graph.

    Attributes:
        name: of the graph's input.
        slot: the argument of `forward` that it is: a keyword or a position.
        dtype: as torch prints it, without "torch.": "float32", "int64", "bool".
        shape: an int for a fixed size, a name ("batch", "sequence") for a dynamic one.
        example_shape: sizes that the model was traced with.
        kind: "values" (floats), "indices" (integers), or "mask" (zeros and ones).
        low: smallest value to try; of a mask: what marks a position to be left out.
        high: largest value to try, inclusive; of a mask: what marks a position to be used.
    """

    name: str
    slot: Slot
    dtype: str
    shape: tuple[int | str, ...]
    example_shape: tuple[int, ...]
    kind: Kind
    low: float
    high: float

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's object."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def describe(self) -> str:
        """Name, dtype and shape, for messages: "'ids': int64 (batch, sequence)"."""
        sizes = ", ".join(map(str, self.shape)) + ("," if len(self.shape) == 1 else "")
        return f"{self.name!r}: {self.dtype} ({sizes})"


def kind_of(name: str, tensor: Tensor) -> Kind:
    """Guess what an example tensor stands for from its name, dtype and values."""
    named_mask = "mask" in name.lower() or tensor.dtype == torch.bool
    if named_mask and bool(((tensor == 0) | (tensor == 1)).all()):
        return "mask"
    return "values" if tensor.is_floating_point() else "indices"


def value_range(kind: Kind, tensor: Tensor, bound: int | None = None) -> tuple[float, float]:
    """`(low, high)` of an `InputSpec` from an example.

    Args:
        kind: what the tensor stands for.
        tensor: the example.
        bound: number of rows of the table that the indices look up, if known.
    """
    if kind == "mask":
        return _mask_values(tensor)
    if kind == "indices" and bound is not None:
        return 0.0, float(bound - 1)
    finite = tensor[torch.isfinite(tensor)] if tensor.is_floating_point() else tensor
    if not finite.numel():
        return 0.0, 0.0
    return float(finite.min()), float(finite.max())


def _mask_values(mask: Tensor) -> tuple[float, float]:
    # Both conventions exist (1 = attend, True = ignore).
    return (1.0, 0.0) if _used_value(mask) == 0 else (0.0, 1.0)


def _used_value(mask: Tensor) -> int:
    """What marks a position to be used: 0 or 1, which is also the answer where nothing tells.

    Of whole rows only one kind makes sense: the longest sentence of a batch, of which everything is
    used. Where every row has padding, its side is the last column or the first, and the other one
    is used in all rows. PyTorch's boolean masks are padded on the right; of integers, which
    tokenizers make for padding on either side, 1 marks what is used.
    """
    if not mask.numel():
        return 1
    rows = mask.reshape(-1, mask.shape[-1]) if mask.ndim else mask.reshape(1, 1)
    whole = [bool((rows == value).all(dim=-1).any()) for value in (0, 1)]
    if any(whole):
        return 0 if whole == [True, False] else 1
    columns = (rows[:, 0], rows[:, -1])
    constant = [int(column[0]) for column in columns if bool((column == column[0]).all())]
    if not constant or (len(set(constant)) == 2 and mask.dtype != torch.bool):
        return 1
    return constant[0]


def other_conventions(specs: Sequence[InputSpec]) -> Iterator[list[InputSpec]]:
    """The specs with zeros and ones exchanged in all masks, and then in each of several alone."""
    masks = [spec for spec in specs if spec.kind == "mask"]
    for chosen in [masks] * bool(masks) + [[mask] for mask in masks] * (len(masks) > 1):
        yield [
            replace(spec, low=spec.high, high=spec.low) if spec in chosen else spec
            for spec in specs
        ]


def symbols(specs: Iterable[InputSpec]) -> dict[str, int]:
    """Each symbolic size with its example, in the order of appearance."""
    found: dict[str, int] = {}
    for spec in specs:
        for size, example in zip(spec.shape, spec.example_shape, strict=True):
            if isinstance(size, str):
                found.setdefault(size, example)
    return found


def random_tensors(
    specs: Sequence[InputSpec], sizes: Mapping[str, int], generator: torch.Generator
) -> list[Tensor]:
    """Made-up inputs, one tensor for each spec.

    Floats are uniform over the range of the example (normal where the example was constant),
    indices uniform over theirs. Masks mark a random number of leading positions of each row as
    used, at least one, and all of the first row.

    Args:
        specs: the inputs.
        sizes: value of each symbolic size; the example's size where one is missing.
        generator: source of randomness.
    """
    return [_random_tensor(spec, sizes, generator) for spec in specs]


def _random_tensor(spec: InputSpec, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape = tuple(
        sizes.get(size, example) if isinstance(size, str) else size
        for size, example in zip(spec.shape, spec.example_shape, strict=True)
    )
    if spec.kind == "mask":
        length = shape[-1] if shape else 1
        used = torch.randint(1, length + 1, (*shape[:-1], 1), generator=generator, device="cpu")
        used.view(-1)[0] = length
        mask = torch.where(torch.arange(length, device="cpu") < used, spec.high, spec.low)
        return mask.reshape(shape).to(spec.torch_dtype)
    if spec.kind == "indices":
        low, high = int(spec.low), int(spec.high)
        return torch.randint(low, high + 1, shape, generator=generator, device="cpu").to(
            spec.torch_dtype
        )
    if spec.high > spec.low:
        uniform = torch.rand(shape, generator=generator, device="cpu")
        return (spec.low + (spec.high - spec.low) * uniform).to(spec.torch_dtype)
    return torch.randn(shape, generator=generator, device="cpu").to(spec.torch_dtype)


def to_json(specs: Sequence[InputSpec], constants: Sequence[tuple[Slot, Any]]) -> str:
    """The inputs as text, for the metadata of an ONNX file."""
    described = {"inputs": [asdict(spec) for spec in specs], "constants": list(constants)}
    return json.dumps(described, sort_keys=True, separators=(",", ":"))


def from_json(text: str) -> tuple[tuple[InputSpec, ...], tuple[tuple[Slot, Any], ...]]:
    """Inverse of `to_json`: the inputs, and the constant arguments of `forward`.

    Raises:
        LoadError: the text is not what `to_json` writes.
    """
    try:
        described = json.loads(text)
        specs = []
        for entry in described["inputs"]:
            entry["shape"] = tuple(entry["shape"])
            entry["example_shape"] = tuple(entry["example_shape"])
            specs.append(InputSpec(**entry))
        constants = tuple((slot, value) for slot, value in described["constants"])
    except (ValueError, TypeError, KeyError) as error:
        raise LoadError(
            f"the description of the inputs in the ONNX file's metadata is damaged ({error}). "
            "Export the model again."
        ) from error
    return tuple(specs), constants


def guessed_spec(
    name: str, slot: Slot, dtype: str, shape: Sequence[Any], bound: int | None
) -> InputSpec:
    """The spec of an input about which only the graph is known.

    Args:
        name: of the input.
        slot: the argument of `forward` that it presumably is.
        dtype: as in `InputSpec`.
        shape: as ONNX Runtime gives it: ints, names, or None for unnamed sizes.
        bound: rows of the table that the input looks up, if it does.
    """
    named = tuple(
        size if isinstance(size, (int, str)) else (f"{name}_{axis}" if axis else BATCH)
        for axis, size in enumerate(shape)
    )
    kind: Kind = "values" if dtype.startswith("float") else "indices"
    if dtype == "bool" or "mask" in name.lower():
        kind = "mask"
    indices_high = 1.0 if bound is None else float(bound - 1)
    return InputSpec(
        name=name,
        slot=slot,
        dtype=dtype,
        shape=named,
        example_shape=tuple(size if isinstance(size, int) else _GUESSED_SIZE for size in named),
        kind=kind,
        low=0.0,
        high={"values": 0.0, "indices": indices_high, "mask": 1.0}[kind],
    )


def call_of(
    specs: Sequence[InputSpec], constants: Sequence[tuple[Slot, Any]], tensors: Sequence[Tensor]
) -> ForwardCall:
    """The forward call that feeds these tensors into the inputs."""
    return ForwardCall(
        slots=tuple(spec.slot for spec in specs),
        names=tuple(spec.name for spec in specs),
        tensors=tuple(tensors),
        constants=tuple(constants),
    )
