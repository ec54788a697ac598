"""Trainable layers whose weights are matrix product operators, and their relatives."""

from mpocompress.layers.base import MPOLayer
from mpocompress.layers.contraction import TensorContractionLayer, TensorRegressionLayer
from mpocompress.layers.conv import MPOConv
from mpocompress.layers.embedding import MPOEmbedding
from mpocompress.layers.embedding_bag import MPOEmbeddingBag
from mpocompress.layers.linear import MPOLinear

__all__ = [
    "MPOConv",
    "MPOEmbedding",
    "MPOEmbeddingBag",
    "MPOLayer",
    "MPOLinear",
    "TensorContractionLayer",
    "TensorRegressionLayer",
]
