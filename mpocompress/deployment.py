"""What is done with a result after it has been written: hold it against a reference."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from mpocompress import saving
from mpocompress.errors import LoadError
from mpocompress.export.calls import Slot
from mpocompress.export.comparison import Comparison, compare
from mpocompress.loading import load_batches
from mpocompress.pipeline import open_model


def compare_files(
    onnx: str | Path,
    against: str | Path,
    *,
    data: str | None = None,
    cores: Path | None = None,
    tolerance: float | None = None,
    factory: str | None = None,
    trust_pickle: bool = False,
    seed: int = 0,
) -> tuple[Comparison, tuple[str, ...]]:
    """Hold an ONNX file against a PyTorch checkpoint or another ONNX file; see `compare`.

    Args:
        onnx: the file.
        against: the reference; `.onnx`, or whatever `open_model` takes.
        data: batches, as on the command line.
        cores: directory or file with the compressed model's cores; default: beside the file, if
            they are there.
        tolerance: see `compare`.
        factory: see `open_model`.
        trust_pickle: see `open_model`.
        seed: of made-up inputs.

    Returns:
        The comparison, and what the user should know about it.

    Raises:
        LoadError: a file that cannot be read, or a checkpoint that is no module.
        DataError: see `compare`.
        ParityError: see `compare`.
    """
    notes: list[str] = []
    reference: nn.Module | Path
    compressed: nn.Module | None = None
    if Path(against).suffix.lower() == ".onnx":
        reference = Path(against)
        notes.append(
            "an ONNX reference has no modules to load the cores into, so the export's error is not "
            "told apart; give the PyTorch model with --against for that"
        )
    else:
        reference, opened_notes = _module(against, factory, trust_pickle)
        notes += opened_notes
        place = Path(onnx).parent if cores is None else cores
        if cores is not None or (place / saving.CORES_FILE).is_file():
            compressed = saving.load_model(place, reference)
        else:
            notes.append(
                f"there is no {saving.CORES_FILE} beside {Path(onnx).name}, so the export's error "
                "is not told apart; say where it is with --cores"
            )
    batches = None if data is None else _arrays(data)
    found = compare(onnx, reference, batches, compressed=compressed, tolerance=tolerance, seed=seed)
    return found, tuple(notes)


def _module(
    path: str | Path, factory: str | None, trust_pickle: bool
) -> tuple[nn.Module, list[str]]:
    opened = open_model(path, factory=factory, trust_pickle=trust_pickle)
    if opened.source.kind != "module":
        raise LoadError(
            f"{path} is a bare state dict, which cannot be run. Give the code that builds its "
            "module with --model MODULE:FACTORY."
        )
    return opened.module, opened.notes


def _arrays(data: str) -> Iterator[tuple[dict[Slot, Tensor], Tensor | None]]:
    for batch in load_batches(data):
        named: dict[Slot, Tensor] = dict(enumerate(batch.args))
        named.update(batch.kwargs)
        yield named, batch.labels
