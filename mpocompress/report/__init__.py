"""What a run did, as data and as pages that can be shown."""

from mpocompress.report.layer import LayerReport
from mpocompress.report.schema import CompressionReport, Parity, Source

__all__ = ["CompressionReport", "LayerReport", "Parity", "Source"]
