"""The ONNX file of a run: how large it is, writing it, and holding it against its model."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from mpocompress import api, saving
from mpocompress._version import __version__
from mpocompress.api.data import forward_arguments
from mpocompress.errors import ExportError
from mpocompress.export import (
    ExportedModel,
    QuantizedModel,
    export_onnx,
    quantize_cores,
    verify,
)
from mpocompress.export.quantize import Quantize
from mpocompress.layers import MPOLayer
from mpocompress.loading import Batch, Batches, ExampleInputs, Source
from mpocompress.pipeline.request import Request
from mpocompress.planning import Progress
from mpocompress.report import CompressionReport, Parity
from mpocompress.report import Source as ReportSource
from mpocompress.report.collect import parity_of
from mpocompress.tuning.padding import keep_mask


def size_on_disk(source: Source, examples: ExampleInputs, request: Request) -> "api.OnnxBytes":
    """Writes a model as `write_and_check` does and gives the bytes of its files.

    As chains: the dense form of the same cores takes a ten-thousandth more at most.
    """

    def onnx_bytes(model: nn.Module) -> int:
        with tempfile.TemporaryDirectory() as folder:
            found = ReportSource(name=source.name, sha256=source.sha256)
            return export_onnx(
                model,
                Path(folder) / saving.ONNX_FILE,
                forward_arguments(model, Batch(examples.args, examples.kwargs)),
                form="chain" if request.form == "auto" else request.form,
                quantize=request.quantize,
                metadata=file_metadata(model, found),
            ).num_bytes

    return onnx_bytes


def write_and_check(
    result: api.CompressionResult,
    examples: ExampleInputs,
    batches: Batches | None,
    scratch: Path,
    request: Request,
    clock: "api.Clock",
    progress: Progress | None,
) -> tuple[ExportedModel, Parity]:
    """Write the ONNX file and hold it against the compressed model in ONNX Runtime.

    Raises:
        ExportError: the model has no ONNX file.
        ParityError: the file and the model disagree.
    """
    path = scratch / saving.ONNX_FILE
    if progress is not None:
        progress("writing ONNX", 0, 2)
    with clock("export"):
        written = result.model
        quantized: QuantizedModel | None = None
        if request.quantize != "none":
            quantized = quantize_batches(result.model, request.quantize, batches)
            written = quantized.model
        try:
            exported = export_onnx(
                result.model,
                path,
                forward_arguments(result.model, Batch(examples.args, examples.kwargs)),
                form=request.form,
                form_batch=request.batch,
                quantize=quantized or "none",
                metadata=file_metadata(result.model, result.report.source),
            )
        except ExportError as error:
            raise ExportError(
                f"{error} With --no-onnx, cores and report are written without an ONNX file; after "
                "a run with --resume nothing is fitted again for that."
            ) from error
    if progress is not None:
        progress("verifying in ONNX Runtime", 1, 2)
    with clock("verification"):
        found = checked(path, written, batches, request.seed)
    return exported, found


def checked(path: Path, model: nn.Module, batches: Batches | None, seed: int) -> Parity:
    """The parity of a file with what it was written from, on some of the data.

    Raises:
        ParityError: they disagree.
    """
    data = None
    if batches is not None:
        data = (forward_arguments(model, batch) for batch in _few(batches))
    found = verify(path, model, data, seed=seed)
    found.raise_if_failed()
    return parity_of(found)


def quantize_batches(
    model: nn.Module, quantize: Quantize, batches: Batches | None
) -> QuantizedModel:
    """`quantize_cores` on loaded batches."""
    data = None if batches is None else (forward_arguments(model, batch) for batch in batches)
    return quantize_cores(model, quantize, data)


def with_forms(report: CompressionReport, exported: ExportedModel) -> CompressionReport:
    """The report with how each layer is spelled in the ONNX file."""
    layers = []
    for layer in report.layers:
        found = exported.forms.get(layer.name)
        if found is not None:
            timed = {"chain": found.chain_seconds, "dense": found.dense_seconds}
            seconds = {form: taken for form, taken in timed.items() if taken is not None}
            layer = layer.model_copy(
                update={"form": found.form, "form_rows": found.rows, "form_seconds": seconds}
            )
        layers.append(layer)
    settings = {**report.settings, "quantize": exported.quantization}
    return report.model_copy(update={"layers": layers, "settings": settings})


def _few(batches: Batches, rows: int = 256) -> Iterator[Batch]:
    """Enough batches to compare on: a comparison of every sample would prove nothing more.

    Without rows that are padding throughout: what attention makes of nothing is arbitrary.
    """
    seen = 0
    for batch in batches:
        keep = keep_mask(batch.kwargs)
        if keep is not None and batch.rows_come_first and not bool(keep.any(1).all()):
            real = keep.any(1).nonzero()[:, 0]
            if not len(real):
                continue
            batch = batch.take(real)
        yield batch
        seen += batch.num_rows
        if seen >= rows:
            return


def file_metadata(model: nn.Module, source: ReportSource) -> dict[str, str]:
    """What the ONNX file says of itself, for netron and for people who find it later."""
    layers: dict[str, dict[str, Any]] = {
        name or "(model)": {
            "layout": [list(pair) for pair in layer.layout.pairs],
            "bond_dims": list(layer.bond_dims),
        }
        for name, layer in model.named_modules()
        if isinstance(layer, MPOLayer)
    }
    return {
        "mpocompress.version": __version__,
        "mpocompress.source_name": source.name,
        "mpocompress.source_sha256": source.sha256 or "",
        "mpocompress.layers": json.dumps(layers, separators=(",", ":")),
    }
