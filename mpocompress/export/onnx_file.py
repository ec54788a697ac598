"""Writing a model as an ONNX file: a free batch dimension, checked, all or nothing."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mpocompress._version import __version__
from mpocompress.errors import DataError, ExportError, SaveError
from mpocompress.export import inputs
from mpocompress.export.calls import Batch, ForwardCall, first_line, inference_copy, run
from mpocompress.export.form_choice import LayerForm, choose_forms
from mpocompress.export.forms import Form, FormChoice, check_form, layers_of, set_forms_
from mpocompress.export.inputs import INPUTS_KEY, InputSpec
from mpocompress.export.kernels import without_foreign_kernels
from mpocompress.export.quantize import (
    Quantize,
    QuantizedModel,
    as_stored,
    check_quantize,
    quantize_cores,
)
from mpocompress.export.tracing import Trace, trace, traceable, translate
from mpocompress.mpo.integers import has_four_bits

if TYPE_CHECKING:
    import onnx_ir as ir

DEFAULT_OPSET = 18
INT4_OPSET = 21  # the first with 4-bit tensors

# Protobuf ends at 2 GiB; the rest is room for the graph and for what other tools add.
SINGLE_FILE_BYTES = 1_800_000_000

# What the file's metadata says of its layers.
FORMS_KEY = "mpocompress.forms"
QUANTIZATION_KEY = "mpocompress.quantization"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedModel:
    """What `export_onnx` has written.

    Attributes:
        path: the ONNX file.
        files: bytes of each file, by name: the ONNX file and, for large models, its data file.
        opset: version of the default operator set.
        inputs: the graph's inputs.
        outputs: names of the graph's outputs.
        converted_from: floating dtypes of the model that were written as float32, sorted.
        forms: how each compressed layer is spelled, by its first name in the model.
        quantization: how cores are stored: "none", "int8", "int4", or "auto", each in its own
            way.
    """

    path: Path
    files: Mapping[str, int]
    opset: int
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    converted_from: tuple[str, ...]
    forms: Mapping[str, LayerForm]
    quantization: Quantize

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, all files together."""
        return sum(self.files.values())


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Batch,
    *,
    form: FormChoice | Mapping[str, Form] = "chain",
    form_batch: int = 1,
    quantize: Quantize | QuantizedModel = "auto",
    data: Iterable[Batch] | None = None,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    single_file_bytes: int = SINGLE_FILE_BYTES,
) -> ExportedModel:
    """Write a model as an ONNX file whose batch dimension is free.

    The graph is that of the model in eval mode, in float32, traced by torch's own exporter.
    Dimension 0 of every input is dynamic, and so are the sequence dimension of token inputs and
    whatever else the model leaves open. Initializers carry the names of the model's parameters;
    rearrangements of them (a `Linear`'s transposition, the permutation of a core) are carried out
    in what is stored. The same model and example give the same bytes.

    Args:
        model: stays as it is: its mode, device and dtypes are not touched.
        path: the file to write; an existing one is replaced at the very end.
        example_inputs: a tensor, a tuple of forward arguments, or a dict of them. The number of
            rows does not matter.
        form: how compressed layers are spelled. "chain": the input meets the cores one by one.
            "dense": the cores are multiplied to the dense weight when a session starts, so the
            file is small, and the speed is the dense layer's; memory is more. "auto": whichever is
            faster in ONNX Runtime, measured layer by layer; near a tie, runs may differ. Or a dict
            from layer to "chain" or "dense", as in `ExportedModel.forms`; other layers are chains.
        form_batch: rows of the example to measure at.
        quantize: "auto" writes each layer as it was rounded when it was compressed, in float32 if
            it was not; "none" all in float32; "int8" or "int4" store cores as integers, see
            `quantize_cores`; or what that gave for this model.
        data: batches for the rounding.
        opset: version of the default operator set, 18 or later, for int4 cores 21; default: that.
        metadata: entries for the file's `metadata_props`.
        input_names: instead of the names of `forward`'s arguments, in the order of the example.
        output_names: instead of "output", or the keys of what `forward` returns.
        single_file_bytes: with more bytes of weights than this (at most 1.8 GB), they are written
            to `<path>.data`, which must stay next to the file.

    Raises:
        DataError: the example inputs do not fit the model, or the names its inputs or outputs.
        ExportError: the model cannot be traced or translated, ties the batch dimension to a fixed
            size, or the result is no valid ONNX.
        SaveError: the file cannot be written.
    """
    path = Path(path)
    check_form(form)
    if not isinstance(quantize, QuantizedModel):
        check_quantize(quantize)
    _check_request(path, opset, metadata or {})
    copied, converted_from = inference_copy(model)
    if isinstance(quantize, QuantizedModel):
        quantized = quantize
    elif quantize == "auto":
        quantized = as_stored(copied)
    elif quantize == "none":
        quantized = QuantizedModel(model=copied, kind="none", integers={})
    else:
        quantized = quantize_cores(copied, quantize, data)
    if quantized.model is not copied:
        copied, _ = inference_copy(quantized.model)
    quantization, integers = quantized.kind, quantized.integers
    copied = without_foreign_kernels(copied)
    opset = _checked_opset(opset, any(map(has_four_bits, integers.values())))
    call = traceable(ForwardCall.from_batch(copied, example_inputs))
    outputs = tuple(_run_example(copied, call))
    input_names = _chosen("input", input_names, call.names)
    output_names = _chosen("output", output_names, _apart(outputs, input_names))
    both = sorted({*input_names} & {*output_names})
    if both:
        raise DataError(
            f"output_names {list(output_names)}: {both[0]!r} is an input's name, too, and a graph "
            "has one value of a name. Choose another."
        )
    forms = _forms(copied, call, form, form_batch)
    first_names = _first_names(copied)
    copied = set_forms_(copied, {name: layer.form for name, layer in forms.items()})
    traced = trace(copied, call)
    graph_model = translate(
        traced, opset, type(model).__name__, integers=integers, first_names=first_names
    )
    specs = _finish_graph(graph_model, traced, input_names, output_names, first_names)
    entries = {INPUTS_KEY: inputs.to_json(specs, call.constants), **(metadata or {})}
    if forms:
        by_name = {name: layer.form for name, layer in sorted(forms.items())}
        entries[FORMS_KEY] = json.dumps(by_name, separators=(",", ":"))
        entries[QUANTIZATION_KEY] = quantization
    graph_model.metadata_props.update(sorted(entries.items()))
    return ExportedModel(
        path=path,
        files=_write(graph_model, path, min(single_file_bytes, SINGLE_FILE_BYTES)),
        opset=opset,
        inputs=specs,
        outputs=output_names,
        converted_from=converted_from,
        forms=forms,
        quantization=quantization,
    )


def _forms(
    model: nn.Module, call: ForwardCall, form: FormChoice | Mapping[str, Form], batch: int
) -> dict[str, LayerForm]:
    layers = layers_of(model)
    if form == "auto":
        return choose_forms(model, call, batch=batch)
    if not isinstance(form, Mapping):
        return {name: LayerForm(form=form) for name in layers}
    unknown = sorted(set(form) - set(layers))
    if unknown:
        raise ExportError(
            f"form names {unknown[0]!r}, which is no compressed layer. There are: "
            f"{', '.join(layers) or 'none'}."
        )
    return {name: LayerForm(form=form.get(name, "chain")) for name in layers}


def _checked_opset(opset: int | None, four_bits: bool) -> int:
    least = INT4_OPSET if four_bits else DEFAULT_OPSET
    if opset is not None and opset < least:
        raise ExportError(
            f"opset {opset} has no 4-bit tensors. Take opset={least} or later, or quantize='int8'."
        )
    return least if opset is None else opset


def _check_request(path: Path, opset: int | None, metadata: Mapping[str, str]) -> None:
    if opset is not None and opset < DEFAULT_OPSET:
        raise ExportError(
            f"opset {opset}: torch's exporter writes opset {DEFAULT_OPSET} and later. "
            f"Take opset={DEFAULT_OPSET}, which ONNX Runtime has read since version 1.14."
        )
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ExportError(
                f"metadata {key!r}: {value!r} is of type {type(value).__name__}, but ONNX files "
                "store text only. Pass str(value), or JSON."
            )
    if not path.parent.is_dir():
        raise SaveError(f"{path}: there is no directory {path.parent}. Create it first.")
    if path.is_dir():
        raise SaveError(f"{path} is a directory. Pass the name of a file in it, like model.onnx.")


def _run_example(model: nn.Module, call: ForwardCall) -> dict[str, Tensor]:
    try:
        return run(model, call)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{type(model).__name__} does not run on the example inputs ({call.describe()}): "
            f"{type(error).__name__}: {first_line(error)}. "
            "Pass inputs that it accepts; dimension 0 is the batch."
        ) from error


def _chosen(kind: str, wanted: Sequence[str] | None, own: tuple[str, ...]) -> tuple[str, ...]:
    if wanted is None:
        return own
    if len(wanted) != len(own) or len(set(wanted)) != len(wanted):
        raise DataError(
            f"{kind}_names {list(wanted)} must be {len(own)} different names, "
            f"one for each of: {', '.join(own)}."
        )
    return tuple(wanted)


def _apart(names: tuple[str, ...], taken: tuple[str, ...]) -> tuple[str, ...]:
    """Output names that differ from the inputs', as values of a graph must."""
    return tuple(f"{name}_out" if name in taken else name for name in names)


def _first_names(model: nn.Module) -> dict[str, str]:
    """The first of its names for every name that a parameter or buffer has in the model."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            found[name] = first.setdefault(id(tensor), name)
    return found


def _finish_graph(
    model: "ir.Model",
    traced: Trace,
    input_names: Sequence[str],
    output_names: Sequence[str],
    first_names: Mapping[str, str],
) -> tuple[InputSpec, ...]:
    """Name everything in the graph, remove what is nobody's business, and describe the inputs."""
    from mpocompress.export import graph

    model.producer_name, model.producer_version = "mpocompress", __version__
    graph.strip(model)
    graph.rename(model, inputs=input_names, outputs=output_names, first_names=first_names)
    size_names = traced.size_names()
    graph.name_sizes(
        model,
        {
            symbol: size_names[index, axis]
            for index, symbols in enumerate(traced.symbols)
            for axis, symbol in enumerate(symbols)
            if symbol is not None
        },
    )
    tables = graph.table_sizes(model)
    specs = []
    for index, (name, tensor) in enumerate(zip(input_names, traced.call.tensors, strict=True)):
        kind = inputs.kind_of(traced.call.names[index], tensor)
        low, high = inputs.value_range(kind, tensor, tables.get(name))
        specs.append(
            InputSpec(
                name=name,
                slot=traced.call.slots[index],
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(
                    size_names.get((index, axis), size) for axis, size in enumerate(tensor.shape)
                ),
                example_shape=tuple(tensor.shape),
                kind=kind,
                low=low,
                high=high,
            )
        )
    return tuple(specs)


def _write(model: "ir.Model", path: Path, single_file_bytes: int) -> dict[str, int]:
    """Write into a directory beside the target, check, and move into place; sizes by file name."""
    import onnx
    import onnx_ir as ir

    weights = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    data_name = f"{path.name}.data" if weights > single_file_bytes else None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error.strerror}. Choose another.") from error
    try:
        ir.save(model, folder / path.name, external_data=data_name)
        onnx.checker.check_model(str(folder / path.name), full_check=True)
        written = sorted(folder.iterdir(), key=lambda file: file.name != data_name)
        sizes = {file.name: file.stat().st_size for file in written}
        for file in written:  # the data first: the graph refers to it
            os.replace(file, path.parent / file.name)
        if data_name is None:
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    except OSError as error:
        raise SaveError(
            f"{path} cannot be written: {error.strerror or error}. Check the free space and the "
            "permissions of its directory."
        ) from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the graph of {path.name} is no valid ONNX: {first_line(error)}. "
            "Nothing was written. Export the part of the model without the operation that it names."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return dict(sorted(sizes.items()))
