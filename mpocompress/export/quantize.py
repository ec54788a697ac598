"""Cores as 8-bit or 4-bit integers in the file; a session makes float32 cores of them as it starts.

The copy that is returned has the rounded cores in float32, so it computes what the file computes,
and serves for checking it. Integers become floats by Cast and Mul, which ONNX Runtime folds when a
session starts: the speed is that of float32 cores. (A DequantizeLinear would be kept in
the graph, or made a MatMulNBits, which with 8 bits is slower than float32 at every batch size that
was tried, and at batch 1 only in its lossy mode as fast.)
"""

# Shape suffixes: O out, I in, R bond, F stored rows of the first core.

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError, ExportError
from mpocompress.export.calls import Batch, ForwardCall, inference_copy, run
from mpocompress.export.forms import linear_layers
from mpocompress.layers import MPOLayer, MPOLinear
from mpocompress.layers.gauged_cores import GaugedCores
from mpocompress.mpo import linalg
from mpocompress.mpo.integer_fit import round_matrix
from mpocompress.mpo.integers import Stored, StoredIntegers
from mpocompress.tuning.moments import CrossMoment, keep_mask, real_rows

Quantize = Literal["none", "int8", "int4", "auto"]

_BITS = {"int8": 8, "int4": 4}
# One scale to a row is enough for 8 bits; with 4 bits a block is what the common tools take, too.
_BLOCKS: dict[int, int | None] = {8: None, 4: 32}
_RIDGE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantizedModel:
    """A model with rounded cores.

    Attributes:
        model: a copy, float32 on the CPU, in eval mode, with the values that the file stands for.
        kind: how the cores are stored; "auto" for each in its own precision.
        integers: what is stored, by the parameter's first name in the model.
    """

    model: nn.Module
    kind: Quantize
    integers: Mapping[str, Stored]


def check_quantize(quantize: object) -> None:
    """Refuse what is no way to store cores.

    Raises:
        ExportError: neither "none", "int8", "int4" nor "auto".
    """
    if quantize not in get_args(Quantize):
        raise ExportError(
            f"quantize {quantize!r}: cores are stored as one of {', '.join(get_args(Quantize))}."
        )


def quantize_cores(
    model: nn.Module, quantize: Quantize, data: Iterable[Batch] | None = None
) -> QuantizedModel:
    """Round the cores of all compressed layers of a model.

    int8 has one scale to a row or column of a core, int4 one to 32 numbers. Two-factor layers
    (out, 1), (1, in) are rounded one core after the other with feedback, in the metric of the
    layer's inputs if there are data: the second core first, then the first is fitted again to what
    became of the second, and rounded in turn. In other layouts each core is rounded to the nearest,
    along whichever side loses less in that metric. With data, the bias takes up the mean of what is
    lost.

    Measured on all-MiniLM-L6-v2 (encoder at ratio 1.4, identity gauge, int4; cosine of embeddings
    to those of unrounded cores): to the nearest .707, with the new fit .889, with feedback .871,
    with both .953; both without data .791.

    Args:
        model: stays as it is.
        quantize: "int8" or "int4"; "auto" for what each layer was rounded to when it was
            compressed, see `MPOLayer.stored`; "none" gives a plain copy.
        data: batches of forward arguments.

    Raises:
        ExportError: no such way, or a model that cannot be copied.
        DataError: "auto" without rounded layers, or batches that do not fit the model.
    """
    check_quantize(quantize)
    copied, _ = inference_copy(model)
    integers: dict[str, Stored] = {}
    if quantize == "none":
        return QuantizedModel(model=copied, kind=quantize, integers=integers)
    if quantize == "auto":
        found = as_stored(copied)
        if found.kind == "none":
            raise DataError(
                'quantize "auto" writes layers as they were rounded, and none of these are: a plan '
                'with max_size and quantize="auto" rounds them; what was saved has float32 cores. '
                'Compress again, or take "int8" or "int4".'
            )
        return found
    bits = _BITS[quantize]
    layers = linear_layers(copied)
    moments = {} if data is None else _input_moments(copied, data)
    replaced: dict[int, nn.Parameter] = {}
    with torch.no_grad():
        for name, layer in layers.items():
            if id(next(layer.cores.parameters())) in replaced:
                continue  # shares its cores with a layer before
            before_OI = layer.to_dense().double()
            input_II, mean_I = _metric(layer, moments.get(layer))
            for suffix, parameter, stored in _rounded(layer, bits, input_II):
                integers[f"{name}.cores.{suffix}"] = stored
                replaced[id(parameter)] = nn.Parameter(stored.dequantized(), requires_grad=False)
            _replace(layer, replaced)
            if mean_I is not None and layer.bias is not None and id(layer.bias) not in replaced:
                lost_O = (before_OI - layer.to_dense().double()) @ mean_I
                bias = (layer.bias.double() + lost_O).float()
                replaced[id(layer.bias)] = nn.Parameter(bias, requires_grad=False)
        _replace(copied, replaced)
    return QuantizedModel(model=copied, kind=quantize, integers=integers)


def as_stored(model: nn.Module) -> QuantizedModel:
    """A model whose layers were rounded when it was compressed, with what a file holds of them.

    Args:
        model: float32, on the CPU; it is not copied.

    Raises:
        ExportError: a layer's values are no longer those that it was rounded to.
    """
    integers: dict[str, Stored] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, MPOLayer) or layer.stored is None:
            continue
        parameters = dict(layer.cores.named_parameters())
        for suffix, stored in layer.stored.items():
            found = parameters.get(suffix)
            if found is None or not torch.equal(found, stored.dequantized().to(found)):
                raise ExportError(
                    f"layer {name!r} was rounded for its file, but 'cores.{suffix}' has changed "
                    'since. Write it in float32 with quantize="none", or round it again with '
                    'quantize="int8" or "int4".'
                )
            integers[f"{name}.cores.{suffix}" if name else f"cores.{suffix}"] = stored
    return QuantizedModel(model=model, kind="auto" if integers else "none", integers=integers)


def _replace(model: nn.Module, replaced: Mapping[int, nn.Parameter]) -> None:
    """Put other parameters in the places of old ones: their storage is that of the original."""
    for module in model.modules():
        for name, parameter in tuple(module._parameters.items()):
            if parameter is not None and id(parameter) in replaced:
                module._parameters[name] = replaced[id(parameter)]


def _input_moments(model: nn.Module, data: Iterable[Batch]) -> dict[nn.Module, CrossMoment]:
    """Second moments of what each layer sees, padding left out."""
    moments: dict[nn.Module, CrossMoment] = {}
    keep: list[Tensor | None] = [None]

    def watch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = real_rows(args[0].detach(), keep[0])
        moments.setdefault(layer, CrossMoment()).add(rows, rows)

    handles = [layer.register_forward_pre_hook(watch) for layer in linear_layers(model).values()]
    try:
        for batch in data:
            call = ForwardCall.from_batch(model, batch)
            keep[0] = keep_mask(dict(zip(call.names, call.tensors, strict=True)))
            run(model, call)
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _metric(layer: MPOLinear, moment: CrossMoment | None) -> tuple[Tensor, Tensor | None]:
    """C (in, in), float64, with its ridge, and the mean input; the identity without data."""
    eye_II = torch.eye(layer.in_features, dtype=torch.float64)
    if moment is None or not moment.rows:
        return eye_II, None
    # The mean is the bias's business, where there is one.
    input_II, mean_I, _ = moment.mean(centered=layer.bias is not None)
    return input_II + _RIDGE * (float(input_II.diagonal().mean()) or 1.0) * eye_II, mean_I


_Rounded = list[tuple[str, nn.Parameter, StoredIntegers]]


def _rounded(layer: MPOLinear, bits: int, input_II: Tensor) -> _Rounded:
    """Suffix of the name, parameter and integers of each stored core of a layer."""
    shape = (layer.out_features, layer.in_features)
    if layer.layout.pairs == ((shape[0], 1), (1, shape[1])):
        return _round_factors(layer, bits, input_II)
    block = _BLOCKS[bits]
    found: _Rounded = []
    for name, parameter in layer.cores.named_parameters():
        last = parameter.shape[-1] == 1
        rows = parameter.shape[0] if last else parameter.numel() // parameter.shape[-1]
        matrix = parameter.reshape(rows, -1)
        size = tuple(parameter.shape)
        options = [
            round_matrix(matrix, bits, block, shape=size),
            round_matrix(matrix.T, bits, block, shape=size, transposed=True),
        ]
        errors = [_error_of(layer, parameter, option, input_II) for option in options]
        # At 4 bits the number of scales may differ, too; the error is what counts.
        found.append((name, parameter, options[errors[1] < errors[0]]))
    return found


def _error_of(
    layer: MPOLinear, parameter: nn.Parameter, stored: StoredIntegers, input_II: Tensor
) -> float:
    """Squared error of the layer's outputs if one of its cores is rounded."""
    exact_OI = layer.to_dense().double()
    exact = parameter.data
    parameter.data = stored.dequantized()
    lost_OI = exact_OI - layer.to_dense().double()
    parameter.data = exact
    return float(((lost_OI @ input_II) * lost_OI).sum())


def _round_factors(layer: MPOLinear, bits: int, input_II: Tensor) -> _Rounded:
    """W = U V: V with feedback in the metric C, U fitted to the rounded V, and rounded in turn.

    In the identity gauge U has the identity in the rows of the pivots, and only its other rows are
    stored and fitted.
    """
    block = _BLOCKS[bits]
    target_OI = layer.to_dense().double()
    first, second = list(layer.cores)
    right_RI = second.reshape(second.shape[0], -1).double()
    if isinstance(layer.cores, GaugedCores):
        gauged = layer.cores.gauged[0]
        names, parameters = ("0.free", "1"), (gauged.free, layer.cores.last)
        rows = torch.ones(target_OI.shape[0], dtype=torch.bool)
        rows[gauged.pivots.long()] = False
        target_FI = target_OI[rows]
    else:
        names, parameters = ("0", "1"), (first, second)
        target_FI = target_OI
        right_RI = _with_orthonormal_left(first.reshape(first.shape[1], -1).double(), right_RI)
    shapes = [tuple(parameter.shape) for parameter in parameters]
    right = round_matrix(right_RI, bits, block, shape=shapes[1], gram_YY=input_II)
    rounded_RI = right.dequantized().reshape(right_RI.shape).double()
    seen_RI = rounded_RI @ input_II
    gram_RR = seen_RI @ rounded_RI.mT
    ridge = _RIDGE * 1e-3 * float(gram_RR.diagonal().mean())
    eye_RR = torch.eye(len(gram_RR), dtype=gram_RR.dtype)
    left_FR = torch.linalg.solve(gram_RR + ridge * eye_RR, seen_RI @ target_FI.mT).mT
    left = round_matrix(left_FR, bits, block, shape=shapes[0], gram_YY=gram_RR)
    return [(names[0], parameters[0], left), (names[1], parameters[1], right)]  # type: ignore[list-item]


def _with_orthonormal_left(left_OR: Tensor, right_RI: Tensor) -> Tensor:
    """V of the same product U V with orthonormal columns of U, so that errors in V count alike."""
    _, carry_RR = linalg.qr(left_OR)
    return carry_RR @ right_RI
