"""What a run did, as data and as pages that can be shown."""

from mpocompress.report.schema import CompressionReport, LayerReport, Parity, Source

__all__ = ["CompressionReport", "LayerReport", "Parity", "Source"]
