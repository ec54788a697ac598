"""Trainable layers whose weights are matrix product operators, and their relatives."""

from mpocompress.layers.contraction import TensorContractionLayer, TensorRegressionLayer
from mpocompress.layers.linear import MPOLinear

__all__ = ["MPOLinear", "TensorContractionLayer", "TensorRegressionLayer"]
