"""Fit one layer to its own outputs, in the metric of its inputs and apart from all others.

What is left when a model cannot be stopped at a layer and carried on with another weight: each
layer sees the activations of the dense model. See `sequential` for the better way.
"""

# Shape suffixes: O out features, I in features.

from collections.abc import Sequence

from torch import Tensor

from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.fit import fit
from mpocompress.tuning.fitting.plan import FitOptions, FittedWeight, output_error
from mpocompress.tuning.statistics.moments import CrossMoment
from mpocompress.tuning.statistics.shrinkage import shrunk_metric


def fit_alone(
    weight_OI: Tensor,
    inputs: CrossMoment,
    layout: Layout,
    bond_dims: Sequence[int],
    *,
    bias_O: Tensor | None = None,
    options: FitOptions | None = None,
) -> FittedWeight:
    """Minimize E|W x - W^ x|^2 over the chains W^ of a layout.

    Args:
        weight_OI: W, in the dtype that the cores shall have.
        inputs: moments of x.
        layout: of the cores.
        bond_dims: at most.
        bias_O: if the layer has one of its own: the mean of the error is then its business.
        options: ridge and sweeps.

    Raises:
        DataError: no rows were seen.
    """
    options = options or FitOptions()
    moment_II, _, mean_I = inputs.mean(centered=bias_O is not None)
    wide_OI = weight_OI.to(moment_II)
    # If nothing but zeros came in, fit the weights themselves.
    metric = None
    if bool(moment_II.any()):
        metric = shrunk_metric(moment_II, inputs.rows, least=options.ridge)
    result = fit(wide_OI, metric, layout, bond_dims, round_trips=(options.sweeps + 1) // 2)
    mpo = MPO(result.cores, shape=(weight_OI.shape[0], weight_OI.shape[1]))
    mpo = mpo.to(dtype=weight_OI.dtype)
    new_bias: Tensor | None = None
    if bias_O is not None:
        lost_OI = wide_OI - mpo.to(dtype=wide_OI.dtype).to_dense()
        new_bias = (bias_O.to(mean_I) + lost_OI @ mean_I).to(bias_O.dtype)
    return FittedWeight(
        mpo=mpo,
        bias=new_bias,
        relative_output_error=output_error(moment_II, wide_OI, mpo),
        rows=inputs.rows,
    )
