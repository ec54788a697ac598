"""Trainable layers whose weights are matrix product operators."""

from mpocompress.layers.linear import MPOLinear

__all__ = ["MPOLinear"]
