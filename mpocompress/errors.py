"""Our exceptions. Each is also a builtin, so that callers who do not know us can catch it.

Every message names the value seen, where it sits (file, layer, bond) and what to try next.
`exit_code` is what the command line returns: 1 the run failed, 2 usage or input, 3 a budget or a
check was not met.
"""


class MPOCompressError(Exception):
    """Base of everything that this package raises on purpose."""

    exit_code = 2


class LayoutError(MPOCompressError, ValueError):
    """A layout does not fit its matrix, or cannot be read."""


class DecompositionError(MPOCompressError, ArithmeticError):
    """A matrix cannot be decomposed: NaN or Inf entries, no driver converged, impossible limits."""


class BondDimError(MPOCompressError, ValueError):
    """A bond dimension below 1, or of the wrong count."""


class ContractionError(MPOCompressError, ValueError):
    """Operands whose shapes do not contract."""


class ConversionError(MPOCompressError, ValueError):
    """A layer cannot be converted, by name and with the reason."""


class NoLayerMatched(MPOCompressError, LookupError):  # noqa: N818  # the name is part of the style guide
    """Patterns that match no layer, or nothing in the model that could be compressed."""


class PlanError(MPOCompressError, ValueError):
    """A plan that is malformed, or belongs to another model."""


class LoadError(MPOCompressError, ValueError):
    """A checkpoint, result directory or data file that cannot be read."""


class UnsafeCheckpointError(LoadError):
    """A pickle that would run code which nobody has approved."""


class DataError(MPOCompressError, ValueError):
    """Batches or example inputs that do not fit the model."""


class NoRowsError(DataError):
    """Batches of which no row, padding aside, reaches a layer."""


class OutputsDifferError(DataError):
    """Outputs that differ in number, shape or infinite entries, of two models that are compared."""


class SaveError(MPOCompressError, OSError):
    """The output cannot be written."""


class OutputExistsError(SaveError, FileExistsError):
    """The output directory exists and nobody said that it may be overwritten."""


class BudgetError(MPOCompressError, ValueError):
    """A budget that cannot be met, or was not; the message says what could be reached."""

    exit_code = 3


class ReportError(MPOCompressError, ValueError):
    """A report.json that is missing, foreign or of another format version."""


class MissingExtraError(MPOCompressError, ImportError):
    """An optional dependency is needed; the message names the extra that installs it."""


class ExportError(MPOCompressError, RuntimeError):
    """The model could not be written as ONNX."""

    exit_code = 1


class ParityError(MPOCompressError, RuntimeError):
    """ONNX Runtime and PyTorch disagree by more than the tolerance; nothing is published."""

    exit_code = 3
