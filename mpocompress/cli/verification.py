"""The commands on ONNX files: `verify` against a reference, `bench` side by side."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpocompress.cli.app import app
from mpocompress.cli.options import FactoryOption, JsonOption, TrustOption
from mpocompress.cli.terminal import print_table, progress_bar, show_notes

if TYPE_CHECKING:
    from mpocompress.export.bench import BenchResult, Spread
    from mpocompress.export.comparison import Comparison

OnnxArgument = Annotated[Path, typer.Argument(metavar="ONNX", help="An ONNX file.")]


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
    seed: Annotated[int, typer.Option("--seed", help="Seed of random inputs.")] = 0,
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
        typer.echo(json.dumps(found.to_dict(), indent=2))
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
    threads: Annotated[int, typer.Option("--threads", help="Threads within one operator.")] = 1,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            metavar="N",
            help="Sequence length. Default: that of the example at the export.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Timings of each file.")] = 15,
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
        typer.echo(json.dumps(found.to_dict(), indent=2))
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
        typer.echo(
            f"{found.labels['measure']} on the labels: {found.labels['file']:.4f}, "
            f"reference {found.labels['reference']:.4f}"
        )


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
