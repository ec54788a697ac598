"""Sums, products, transposes and inner products of chains, never going dense.

Bond dimensions add under addition and multiply under composition; `round_cores` recompresses.
"""

# Shape suffixes: L left bond, O out, I in, R right bond; a second letter pair A, B for two chains.

from collections.abc import Sequence
from math import exp, log

import torch
from torch import Tensor

from mpocompress.errors import ContractionError
from mpocompress.mpo.cores import Cores


def add_cores(first: Sequence[Tensor], second: Sequence[Tensor]) -> Cores:
    """Cores of the sum: block-diagonal in the bonds. Physical sizes must be equal."""
    if len(first) == 1:
        return (first[0] + second[0],)
    last = len(first) - 1
    cores = []
    for site, (a, b) in enumerate(zip(first, second, strict=True)):
        if site == 0:
            cores.append(torch.cat((a, b), dim=3))
        elif site == last:
            cores.append(torch.cat((a, b), dim=0))
        else:
            top = torch.cat((a, a.new_zeros(*a.shape[:3], b.shape[3])), dim=3)
            bottom = torch.cat((b.new_zeros(*b.shape[:3], a.shape[3]), b), dim=3)
            cores.append(torch.cat((top, bottom), dim=0))
    return tuple(cores)


def compose_cores(first: Sequence[Tensor], second: Sequence[Tensor]) -> Cores:
    """Cores of the matrix product first @ second; in dims of `first` are out dims of `second`."""
    cores = []
    for a_LOIR, b_LOIR in _in_one_dtype(first, second):
        left_a, out, _, right_a = a_LOIR.shape
        left_b, _, in_, right_b = b_LOIR.shape
        # (La, O, Ra, Lb, I, Rb) -> (La, Lb, O, I, Ra, Rb)
        product = torch.tensordot(a_LOIR, b_LOIR, dims=([2], [1])).permute(0, 3, 1, 4, 2, 5)
        cores.append(product.reshape(left_a * left_b, out, in_, right_a * right_b))
    return tuple(cores)


def transpose_cores(cores: Sequence[Tensor]) -> Cores:
    """Cores of the transposed matrix: out and in swap at every site. No copy."""
    return tuple(core.transpose(1, 2) for core in cores)


def scale_cores(cores: Sequence[Tensor], factor: float, site: int) -> Cores:
    """Cores of `factor` times the matrix, put into the core at `site`."""
    return tuple(core * factor if k == site else core for k, core in enumerate(cores))


def spread_norm(cores: Sequence[Tensor]) -> Cores:
    """The same matrix with cores whose largest entries are equal in size."""
    if cores[0].is_meta:
        return tuple(cores)
    largest = [float(core.detach().abs().max()) for core in cores]
    if min(largest) == 0.0:
        return tuple(cores)
    mean = exp(sum(log(size) for size in largest) / len(largest))
    return tuple(core * (mean / size) for core, size in zip(cores, largest, strict=True))


def inner_cores(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Frobenius inner product <first, second> = sum_ij first_ij second_ij, a 0-d tensor.

    A transfer matrix between the two bonds moves from left to right: O(L * D^3 * o * i).
    """
    pairs = _in_one_dtype(first, second)
    transfer_AB = pairs[0][0].new_ones(1, 1)
    for a_LOIR, b_LOIR in pairs:
        half_AOIR = torch.tensordot(transfer_AB, b_LOIR, dims=1)
        transfer_AB = torch.tensordot(a_LOIR, half_AOIR, dims=([0, 1, 2], [0, 1, 2]))
    return transfer_AB[0, 0]


def _in_one_dtype(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of cores, both in the wider dtype."""
    wide = torch.promote_types(first[0].dtype, second[0].dtype)
    return [(a.to(wide), b.to(wide)) for a, b in zip(first, second, strict=True)]


def check_same_sites(first: Sequence[Tensor], second: Sequence[Tensor], operation: str) -> None:
    """Raise ContractionError unless both chains have the same out and in dims at every site."""
    sizes = [[tuple(core.shape[1:3]) for core in cores] for cores in (first, second)]
    if sizes[0] != sizes[1]:
        raise ContractionError(
            f"{operation}: the sites (out, in) are {sizes[0]} and {sizes[1]}; they must be equal. "
            "Factorize both with the same layout."
        )
