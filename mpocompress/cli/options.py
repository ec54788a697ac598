"""Arguments and options that several commands share, worded once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Form(StrEnum):
    """How a layer is spelled in ONNX."""

    AUTO = "auto"
    CHAIN = "chain"
    DENSE = "dense"


class ExportQuantize(StrEnum):
    """How cores are stored in an ONNX file that is written again."""

    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"


class Quantize(StrEnum):
    """How cores are stored in ONNX."""

    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"
    AUTO = "auto"


FormOption = Annotated[
    Form,
    typer.Option(
        "--form",
        help="Of layers in ONNX: chain (of cores), dense (cores in the file, the dense weight made "
        "of them when a session starts), or auto: the faster, measured layer by layer.",
    ),
]
LARGEST_SEED = 2**63 - 1  # of torch's generators
LARGEST_BATCH = 2**20
LARGEST_COUNT = 10**9  # of steps, sweeps and repeats: years
BatchOption = Annotated[
    int,
    typer.Option(
        "--batch",
        metavar="N",
        min=1,
        max=LARGEST_BATCH,
        help="Rows that latency is measured with.",
    ),
]
QuantizeOption = Annotated[
    Quantize,
    typer.Option(
        "--quantize",
        help="Store cores in ONNX as integers; a session unpacks them. auto, with --max-size: a "
        "precision for each layer, dense or factorized.",
    ),
]
ExportQuantizeOption = Annotated[
    ExportQuantize,
    typer.Option("--quantize", help="Store cores in ONNX as integers; a session unpacks them."),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE[:DTYPE]",
        help="Shape of one input, such as 1x784 or 1x128:int64. Repeat for further inputs.",
    ),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .pt, .pth, .ckpt or .bin file (state dict or module), .pt2, .safetensors, .onnx, "
        "or a Hugging Face folder.",
    ),
]
ResultArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A directory that `compress` has written.")
]
FactoryOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FACTORY",
        help="Your code that builds the module; it is filled with the checkpoint's tensors.",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Unpickle MODEL even if that runs code from the file."),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        help="Only layers that match: a glob, or re:REGEX. Repeatable.",
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="Leave layers that match dense. Repeatable."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one machine-readable object instead of a table.")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace our files in an output that exists.")
]
