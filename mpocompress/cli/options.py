"""Arguments and options that several commands share, worded once."""

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .pt or .pth file (state dict or module), .pt2, .safetensors, .onnx, or a Hugging "
        "Face folder.",
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
        help="Compress only layers that match: a glob, or re:REGEX. Repeatable.",
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
