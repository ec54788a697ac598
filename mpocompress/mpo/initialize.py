"""Cores to start training from: random, at a scale that depends on neither sites nor bonds."""

from collections.abc import Sequence

import torch

from mpocompress.mpo.algebra import inner_cores
from mpocompress.mpo.cores import Cores
from mpocompress.mpo.factorize import random_cores
from mpocompress.mpo.layout import Layout
from mpocompress.mpo.linalg import working_dtype


def initial_cores(
    layout: Layout,
    bond_dim: int | Sequence[int] | None,
    *,
    variance: float,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Cores:
    """Gaussian cores whose matrix W has exactly the given mean square over its entries.

    Why this scale. Let the rows x be isotropic with mean square v per feature: E[x x^T] = v 1.
    Then E|W x|^2 = v tr(W W^T) = v |W|^2, so the outputs have the mean square

        v |W|^2 / out = in * variance * v,

    and likewise the gradient W^T g at the input, for isotropic g of mean square u, has
    u |W|^2 / in = out * variance * u. Both depend on W through its Frobenius norm alone. With
    variance = gain^2 / in activations are scaled by gain^2 at each layer (1 for a linear layer, 2
    makes up for the half that a ReLU sets to zero), whatever the sites and the bonds are.

    How it is reached. An entry of W is a sum over the bonds, prod(D_k) terms, each a product of L
    independent core entries of variance s^2; all terms are uncorrelated. So its variance is
    prod(D_k) s^(2L), which fixes s. That holds on average over draws; in one draw |W|^2 is a
    product over the sites of sums of few squares and, for small bonds, far from its mean: with L
    sites of n entries at bond 1 its relative variance is (1 + 2/n)^L - 1. So the draw is rescaled
    to the norm that it should have, each core by the same factor, and the two equations above hold
    for this very W.

    Args:
        layout: of the matrix; with padding the mean square is that of the padded matrix.
        bond_dim: for all bonds or one for each, clipped to what the layout carries; None: maximal.
        variance: mean square of the entries.
        dtype: of the cores; half types are drawn in float32 and rounded once.
        device: of the cores; on "meta" only shapes are made.
        generator: of the random numbers; torch's global one by default, as in `torch.nn`.

    Raises:
        BondDimError: a bond dimension below 1, or the wrong number of them.

    Source: Glorot, Bengio, AISTATS 2010, and He et al., ICCV 2015, for dense layers; the norm of a
    product of cores: the derivation above.
    """
    dtype = dtype or torch.get_default_dtype()
    cores = random_cores(
        layout,
        bond_dim,
        variance=variance,
        dtype=working_dtype(dtype),
        device=None if device is None else torch.device(device),
        generator=generator,
    )
    entries = layout.out_features * layout.in_features
    factor = (variance * entries / inner_cores(cores, cores)) ** (0.5 / len(cores))
    return tuple((core * factor).to(dtype) for core in cores)
