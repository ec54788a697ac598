"""Fits of layers to what they compute, one after the other, in closed form or by sweeps."""
