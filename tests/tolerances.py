"""Tolerances of the tests, by dtype and operation, with the reason of each.

What compares like with like takes them from here; a tolerance that follows from the numbers of one
test stands there.

`dense`: rebuild a matrix; `lookup`: a few of its rows, and their sums; `apply`: contract with a
batch; `gradient`: backward through a contraction; `spectrum`: singular values and entropies;
`weight`: squared norms relative to that of the whole matrix; `norm`: one norm or weight, relative
to itself; `gauge`: the Gram matrix of a canonical core against the identity; `onnx`: ONNX Runtime
against PyTorch.
"""

import torch

TOL: dict[torch.dtype, dict[str, dict[str, float]]] = {
    # Laws of exact arithmetic: only rounding is left.
    torch.float64: {
        "dense": {"rtol": 1e-10, "atol": 1e-10},
        "lookup": {"rtol": 1e-10, "atol": 1e-10},
        "apply": {"rtol": 1e-10, "atol": 1e-10},
        "gradient": {"rtol": 1e-10, "atol": 1e-10},
        "spectrum": {"rtol": 1e-9, "atol": 1e-10},
        "weight": {"rtol": 0.0, "atol": 1e-13},
        "norm": {"rtol": 1e-12, "atol": 0.0},
        "gauge": {"rtol": 0.0, "atol": 1e-12},
        "onnx": {"rtol": 1e-9, "atol": 1e-9},
    },
    # A chain of K contractions over a few hundred terms each loses 2-3 of float32's 7 digits.
    torch.float32: {
        "dense": {"rtol": 1e-4, "atol": 1e-5},
        # Two or three contractions over a few terms each.
        "lookup": {"rtol": 1e-5, "atol": 1e-5},
        "apply": {"rtol": 1e-4, "atol": 1e-4},
        "gradient": {"rtol": 1e-3, "atol": 1e-4},
        "spectrum": {"rtol": 1e-4, "atol": 1e-5},
        # What is cut is orthogonal to what is kept, so rounding enters at second order only: half
        # a unit in the last place of the squared norm, measured at 256x256.
        "weight": {"rtol": 0.0, "atol": 6e-8},
        "norm": {"rtol": 1e-5, "atol": 0.0},
        # LAPACK's float32 bases of a few hundred columns are orthonormal to some 10 eps.
        "gauge": {"rtol": 0.0, "atol": 1e-5},
        "onnx": {"rtol": 1e-4, "atol": 1e-4},
    },
    # The cores are rounded to the dtype once: 8 (bfloat16) and 11 (float16) bits of mantissa.
    torch.bfloat16: {
        "dense": {"rtol": 5e-2, "atol": 5e-2},
        "apply": {"rtol": 5e-2, "atol": 1e-1},
        "gradient": {"rtol": 1e-1, "atol": 2e-1},
    },
    torch.float16: {
        "dense": {"rtol": 1e-2, "atol": 1e-2},
        "apply": {"rtol": 1e-2, "atol": 2e-2},
        "gradient": {"rtol": 2e-2, "atol": 5e-2},
    },
}

# The randomized range finder may lose 1 % of the Frobenius error to the best possible cut.
NEAR_OPTIMUM = 1.01

# What a randomized cut says that it lost, relative to what is measured: the tail's own rounding.
HONESTY: dict[str, float] = {"rtol": 1e-2, "atol": 0.0}

# Leading Ritz values against singular values: second order in the angle between the subspaces.
RITZ: dict[str, float] = {"rtol": 2e-2, "atol": 0.0}

# Sample variances over a few hundred seeded draws: three of their standard deviations.
SAMPLING: dict[str, float] = {"rtol": 0.1, "atol": 0.0}

# A loss measured twice, with gauge moves between: rounding of float64, amplified by some layers.
LOSS: dict[str, float] = {"rel": 1e-9, "abs": 1e-12}

# Two trajectories of gradient steps whose gradients agree to 1e-10: each step amplifies rounding.
TRAJECTORY: dict[str, float] = {"rtol": 1e-6, "atol": 1e-7}
