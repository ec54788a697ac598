"""Sweeps on a loss along the cores of each chain, all other weights frozen."""
