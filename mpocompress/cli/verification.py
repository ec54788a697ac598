"""The commands on ONNX files: `export` again, `verify` against a reference, `bench`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpocompress.cli.app import app
from mpocompress.cli.options import (
    LARGEST_BATCH,
    LARGEST_COUNT,
    LARGEST_SEED,
    BatchOption,
    ExportQuantize,
    ExportQuantizeOption,
    FactoryOption,
    ForceOption,
    Form,
    FormOption,
    InputOption,
    JsonOption,
    ResultArgument,
    TrustOption,
)
from mpocompress.cli.terminal import print_json, print_table, progress_bar, show_notes

if TYPE_CHECKING:
    from mpocompress.export.bench import BenchResult, Spread
    from mpocompress.export.comparison import Comparison

_MEASURED = (1, 16, 128)

OnnxArgument = Annotated[Path, typer.Argument(metavar="ONNX", help="An ONNX file.")]


@app.command()
def export(
    directory: ResultArgument,
    source: Annotated[
        str,
        typer.Option(
            "--source",
            metavar="MODEL",
            help="The dense checkpoint that DIR was made from: cores do not tell how the model "
            "computes.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The ONNX file. Default: DIR's name, form and --quantize.",
        ),
    ] = None,
    form: FormOption = Form.AUTO,
    batch: BatchOption = 1,
    quantize: ExportQuantizeOption = ExportQuantize.NONE,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Batches, to round the cores where it matters least for their outputs, and for "
            "the check.",
        ),
    ] = None,
    inputs: InputOption = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Also show bytes, session start, memory and latency at batch 1, 16 and 128 of "
            "each form.",
        ),
    ] = False,
    factory: FactoryOption = None,
    trust_pickle: TrustOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of made-up inputs.")
    ] = 0,
) -> None:
    """Write the ONNX file of a result again: in another form, or with cores as integers."""
    from mpocompress.deployment import export_again

    suffix = "" if quantize is ExportQuantize.NONE else f"-{quantize.value}"
    target = output or Path(f"{directory.resolve().name}-{form.value}{suffix}.onnx")
    with progress_bar() as progress:
        done = export_again(
            directory,
            source,
            target,
            form=form.value,
            batch=batch,
            quantize=quantize.value,
            data=data,
            inputs=tuple(inputs or ()),
            measure=_MEASURED if measure else (),
            factory=factory,
            trust_pickle=trust_pickle,
            force=force,
            seed=seed,
            progress=progress,
        )
    show_notes(done.notes)
    if as_json:
        found = {
            "files": dict(done.exported.files),
            "quantization": done.exported.quantization,
            "layers": {name: asdict(layer) for name, layer in done.exported.forms.items()},
            "parity": done.parity.model_dump(),
            "forms": None if done.forms is None else done.forms.to_dict(),
        }
        print_json(found)
        return
    if done.forms is not None:
        _show_bench(done.forms)
    dense = sum(layer.form == "dense" for layer in done.exported.forms.values())
    typer.echo(
        f"{target}  {done.exported.num_bytes} bytes, {len(done.exported.forms)} layers, {dense} "
        f"of them dense at load; agrees with PyTorch to {done.parity.max_abs_difference:.1e}"
    )


@app.command()
def verify(
    onnx: OnnxArgument,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="MODEL|ONNX",
            help="What it should compute: another ONNX file, or a PyTorch checkpoint.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Batches: .npz, .safetensors or MODULE:FUNCTION, with labels if there are any. "
            "Default: random inputs, which say little about quality.",
        ),
    ] = None,
    cores: Annotated[
        Path | None,
        typer.Option(
            "--cores",
            metavar="DIR",
            help="Where model.mpo.safetensors lies, to tell the export's error from the "
            "approximation's. Default: beside ONNX.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="E",
            help="Exit with 3 if an output differs by more than E times its largest value. "
            "Without it only the export's own error is checked (1e-4).",
        ),
    ] = None,
    factory: FactoryOption = None,
    trust_pickle: TrustOption = False,
    as_json: JsonOption = False,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of random inputs.")
    ] = 0,
) -> None:
    """Compare ONNX with a reference; say what the export and what the compression changed."""
    from mpocompress.deployment import compare_files

    found, notes = compare_files(
        onnx,
        against,
        data=data,
        cores=cores,
        tolerance=tolerance,
        factory=factory,
        trust_pickle=trust_pickle,
        seed=seed,
    )
    show_notes(notes)
    if as_json:
        print_json(found.to_dict())
        if found.failures:  # all is said in the object
            raise typer.Exit(3)
        return
    _show_comparison(found, onnx.name)
    found.raise_if_failed()


@app.command()
def bench(
    onnx: OnnxArgument,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against", metavar="ONNX", help="Another file, measured in turns. Repeatable."
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", metavar="N,N,...", help="Batch sizes.")
    ] = "1,16,128",
    threads: Annotated[
        int, typer.Option("--threads", min=1, max=1024, help="Threads within one operator.")
    ] = 1,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            metavar="N",
            min=1,
            max=LARGEST_BATCH,
            help="Sequence length. Default: that of the example at the export.",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, max=LARGEST_COUNT, help="Timings of each file.")
    ] = 15,
    as_json: JsonOption = False,
) -> None:
    """Latency, session start, memory and size of ONNX files, side by side in ONNX Runtime."""
    from mpocompress.errors import DataError
    from mpocompress.export.bench import bench as measure

    try:
        sizes = [int(size) for size in batch.split(",")]
    except ValueError:
        raise DataError(
            f"--batch {batch!r} is no list of batch sizes. Try --batch 1,16,128."
        ) from None
    if max(sizes) > LARGEST_BATCH:
        raise DataError(
            f"--batch {batch!r}: {LARGEST_BATCH} rows are the most. Try --batch 1,16,128."
        )
    with progress_bar() as progress:
        found = measure(
            [onnx, *(against or [])],
            batch_sizes=sizes,
            threads=threads,
            repeats=repeats,
            sizes=None if length is None else {"sequence": length},
            progress=progress,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        _show_bench(found)


def _show_comparison(found: "Comparison", name: str) -> None:
    rows = []
    parts: list[tuple[str, Any]] = [("total", found.total)]
    if found.export is not None and found.approximation is not None:
        stored = "" if found.quantization == "none" else f" with {found.quantization} cores"
        parts = [(f"export{stored}", found.export), ("approximation", found.approximation), *parts]
    for output in found.total:
        for part, figures in parts:
            figure = figures[output]
            rows.append(
                [
                    output,
                    part,
                    f"{figure.max_abs_difference:.2e}",
                    f"{figure.max_relative_difference:.2e}",
                    f"{figure.relative_error:.2e}",
                    "" if figure.cosine is None else f"{figure.cosine:.5f}",
                    ""
                    if figure.argmax_agreement is None
                    else f"{100 * figure.argmax_agreement:.2f} %",
                ]
            )
    columns = ["output", "difference", "largest", "largest, relative", "relative error"]
    columns += ["cosine", "same argmax"]
    made_up = ", made up" if found.made_up else ""
    print_table(f"{name}: {found.samples} samples{made_up}", columns, rows)
    if found.labels is not None:
        typer.echo(_on_labels(found.labels))


def _on_labels(labels: Mapping[str, Any]) -> str:
    measure, errors = labels["measure"], labels["mean_squared_error"]
    if labels["file"] is None:
        text = f"{measure} on the labels is not defined, since all are equal"
    else:
        text = f"{measure} on the labels: {labels['file']:.4f}, reference {labels['reference']:.4f}"
    if errors is None:
        return text
    return f"{text}; mean squared error {errors['file']:.4g}, reference {errors['reference']:.4g}"


def _show_bench(found: "BenchResult") -> None:
    batches = list(found.files[0].latency_seconds)
    first = found.files[0]
    rows = []
    for file in found.files:
        latencies = []
        for size in batches:
            spread = file.latency_seconds[size]
            times = spread.median / first.latency_seconds[size].median
            latencies.append(f"{_milliseconds(spread)} ({times:.2f})")
        rows.append(
            [
                file.path,
                f"{file.num_bytes}",
                *latencies,
                _milliseconds(file.session_start_seconds),
                f"{file.resident_bytes.median / 1e6:.1f}",
            ]
        )
    columns = ["file", "bytes", *(f"batch {size}, ms" for size in batches)]
    columns += ["session start, ms", "memory, MB"]
    sizes = "".join(f", {name} {size}" for name, size in found.sizes.items())
    print_table(
        f"ONNX Runtime {found.versions['onnxruntime']}, {found.threads} threads{sizes}; median, "
        "quartiles, times the first file",
        columns,
        rows,
    )


def _milliseconds(spread: "Spread") -> str:
    low, median, high = (1e3 * value for value in (spread.low, spread.median, spread.high))
    return f"{median:.3g} [{low:.3g}-{high:.3g}]"
