"""Second moments and objectives for the tests of fitting, written from the definition."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from mpocompress.mpo import Layout
from tests.planted import gaussian


def moment(size: int, *, seed: int, samples: int | None = None, dead: int = 0) -> Tensor:
    """Mean of x xᵀ over correlated samples of uneven scale; the last `dead` features are zero."""
    samples = 3 * size if samples is None else samples
    scales = torch.logspace(0.5, -0.5, size, dtype=torch.float64)
    mixing = gaussian(size, size, seed=seed + 1) * scales
    x = gaussian(samples, size, seed=seed) @ mixing
    if dead:
        x[:, size - dead :] = 0
    return x.T @ x / samples


@st.composite
def moments(draw: st.DrawFn, size: int) -> Tensor:
    """Of any rank from 1 on, with or without features that are always zero."""
    samples = draw(st.sampled_from([1, max(1, size // 2), 3 * size]))
    dead = draw(st.integers(min_value=0, max_value=size // 2))
    return moment(size, seed=draw(st.integers(0, 2**16)), samples=samples, dead=dead)


@st.composite
def fits(draw: st.DrawFn, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
    """A target, C, and G or None."""
    target = gaussian(layout.out_features, layout.in_features, seed=draw(st.integers(0, 2**16)))
    output = draw(moments(layout.out_features)) if draw(st.booleans()) else None
    return target, draw(moments(layout.in_features)), output


def objective(target: Tensor, matrix: Tensor, input_II: Tensor, output_OO: Tensor | None) -> float:
    """tr(G (T − W) C (T − W)ᵀ)."""
    difference = target - matrix
    weighed = difference @ input_II @ difference.T
    return float(torch.trace(weighed if output_OO is None else output_OO @ weighed))
