"""Results on disk: saved models, dense checkpoints, reports."""

from pathlib import Path

from torch import Tensor, nn

from mpocompress import saving
from mpocompress.api.calling import uncompiled
from mpocompress.api.result import CompressionResult
from mpocompress.files import replacing
from mpocompress.report import CompressionReport


def save(
    result: CompressionResult | nn.Module, directory: str | Path, *, force: bool = False
) -> Path:
    """Write `model.mpo.safetensors` and, for a result, the plan's report; never a pickle.

    Args:
        result: from `compress`, or a module with MPO layers.
        directory: made if missing. All files appear together, or none does.
        force: replace our files in a directory that exists.

    Returns:
        The directory.

    Raises:
        OutputExistsError: the directory exists and is not empty, without `force`.
        SaveError: it cannot be written.
    """
    with saving.staged_output(directory, force=force) as scratch:
        path = scratch / saving.CORES_FILE
        if isinstance(result, CompressionResult):
            saving.save_model(result.model, path)
            write_report(with_files(result.report, scratch), scratch)
        else:
            saving.save_model(uncompiled(result), path)
    return Path(directory)


def load(directory: str | Path, *, model: nn.Module) -> nn.Module:
    """Load a saved result into a copy of its dense architecture; it stays compressed.

    Args:
        directory: that `save` or the command line wrote.
        model: a skeleton: the dense architecture with any weights, or one with MPO layers, as what
            was trained from scratch has; untouched.

    Returns:
        The compressed model, with bit-identical outputs, in the mode of the skeleton.

    Raises:
        LoadError: missing or foreign file, or another architecture.
    """
    return saving.load_model(directory, uncompiled(model))


def densify(directory: str | Path) -> dict[str, Tensor]:
    """The state dict of the ordinary dense model that a saved result stands for.

    Raises:
        LoadError: missing or foreign file.
    """
    return saving.densify_state(directory)


def save_dense(directory: str | Path, path: str | Path) -> None:
    """Write `densify(directory)` to a file: `.safetensors`, or a state dict as `.pt` or `.pth`.

    Raises:
        LoadError: missing or foreign result.
        SaveError: another suffix, or the file cannot be written.
    """
    saving.save_state(saving.densify_state(directory), Path(path))


def write_report(report: CompressionReport, directory: Path) -> None:
    """Write report.html, report.md and report.json, each atomically.

    Raises:
        SaveError: the directory cannot be written.
    """
    for suffix, text in (
        ("html", report.to_html()),
        ("md", report.to_markdown()),
        ("json", report.to_json()),
    ):
        with replacing(directory / f"report.{suffix}") as scratch:
            scratch.write_text(text, encoding="utf-8")


def with_files(report: CompressionReport, directory: Path) -> CompressionReport:
    """The report with the bytes of the model files that lie in `directory`."""
    names = (saving.CORES_FILE, saving.ONNX_FILE, saving.ONNX_DATA_FILE)
    sizes = {
        name: (directory / name).stat().st_size for name in names if (directory / name).exists()
    }
    return report.model_copy(update={"files": sizes})
