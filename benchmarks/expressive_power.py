"""Depth entangles a tensor neural network beyond its bond dimension; and it finds ground states.

*Entropies*: the network maps 12 spins to one number, psi(x) = f(x), through `depth` MPOLinear
layers of width 64 (three sites of 4x4 after the first one, bond dimension D) with tanh between, and
a dense last layer. It is not trained. The table has the entanglement entropy of all 2^12 amplitudes
across the middle, in nats, mean and standard error over seeds, with weights as MPOLinear starts
them and with weights 8 times as large (where tanh saturates). Beside it:

    MPS          a random matrix product state of bond dimension D, which cannot exceed ln D
    product      0, and Haar-random: Page's mean for complex states; for real ones, sampled

*Ground states*: one network of the same kind is trained to the ground state of the periodic
transverse-field Ising chain H = -sum Z Z - h sum X of 10 spins, on all 2^10 amplitudes, by Adam and
then the natural gradient, and compared with exact diagonalization.

Claims checked, exit code 1 if one does not hold: with the large weights the mean entropy at depth 4
is above that at depth 1 at every bond dimension, and above that of the MPS, by more than two
standard errors of the difference; energies are within 1e-3 of the exact ones, absolute.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import environment, print_table, write_json
from torch import nn

import mpocompress as mpo
from mpocompress.analysis import (
    EvenState,
    IsingChain,
    StateEntanglement,
    find_ground_state,
    page_entropy_nats,
    state_entanglement,
    vector_entanglement,
)

SPINS = 12
WIDTH = 64
BONDS = (1, 2, 4, 8, 16)
DEPTHS = (1, 2, 4, 8)
GAINS = (1.0, 8.0)
SHALLOW, DEEP, LARGE = 1, 4, 8.0
ISING_SPINS = 10
FIELDS = (0.5, 1.0, 2.0)
CLAIMED_ERROR = 1e-3
PACKAGES = ("mpocompress", "torch", "numpy")


def random_network(bond_dim: int, depth: int, gain: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    first = mpo.MPOLinear(SPINS, WIDTH, layout=[(8, SPINS // 2), (8, 2)], bond_dim=bond_dim)
    modules: list[nn.Module] = [first, nn.Tanh()]
    for _ in range(depth - 1):
        layer = mpo.MPOLinear(WIDTH, WIDTH, layout=[(4, 4)] * 3, bond_dim=bond_dim)
        modules += [layer, nn.Tanh()]
    network = nn.Sequential(*modules, nn.Linear(WIDTH, 1)).double()
    with torch.no_grad():
        for module in network:
            if isinstance(module, mpo.MPOLinear):
                for core in module.cores:
                    core.mul_(gain ** (1 / len(module.cores)))
    return network


def summary(states: Sequence[StateEntanglement]) -> dict[str, Any]:
    middle = [state.entropies_nats[SPINS // 2 - 1] for state in states]
    error = statistics.stdev(middle) / math.sqrt(len(middle)) if len(middle) > 1 else math.nan
    return {
        "entropy_nats": statistics.mean(middle),
        "standard_error": error,
        "profile_nats": [
            statistics.mean(values)
            for values in zip(*(state.entropies_nats for state in states), strict=True)
        ],
        "volume_law_like": sum(s.growth.verdict == "volume-law-like" for s in states) / len(states),
    }


def measure_entropies(seeds: int, seed: int) -> list[dict[str, Any]]:
    rows = []
    for gain in GAINS:
        for depth in DEPTHS:
            for bond in BONDS:
                states = [
                    state_entanglement(random_network(bond, depth, gain, seed + k), SPINS)
                    for k in range(seeds)
                ]
                rows.append({"gain": gain, "depth": depth, "bond_dim": bond, **summary(states)})
    return rows


def measure_references(seeds: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for bond in BONDS:
        chains = [
            mpo.MPO.random([(2, 1)] * SPINS, bond, dtype=torch.float64, generator=generator)
            for _ in range(seeds)
        ]
        states = [vector_entanglement(chain.to_dense()[:, 0]) for chain in chains]
        rows.append({"state": "MPS", "bond_dim": bond, **summary(states)})
    haar = [
        vector_entanglement(torch.randn(2**SPINS, dtype=torch.float64, generator=generator))
        for _ in range(seeds)
    ]
    rows.append({"state": "Haar, real", "bond_dim": None, **summary(haar)})
    return rows


def ising_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return EvenState(
        nn.Sequential(
            mpo.MPOLinear(ISING_SPINS, 32, layout=[(4, 5), (8, 2)], bond_dim=4),
            nn.Tanh(),
            mpo.MPOLinear(32, 32, layout=[(4, 4), (8, 8)], bond_dim=4),
            nn.Tanh(),
            nn.Linear(32, 1),
        )
    ).double()


def measure_ising(field: float, seed: int) -> dict[str, Any]:
    network, chain = ising_network(seed), IsingChain(ISING_SPINS, field)
    start, cpu = time.perf_counter(), time.process_time()
    found = find_ground_state(network, chain)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    middle = ISING_SPINS // 2 - 1
    exact = vector_entanglement(chain.ground_state()[1])
    return {
        "field": field,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "energy": found.energy,
        "exact_energy": found.exact_energy,
        "absolute_error": found.absolute_error,
        "relative_error": found.relative_error,
        "overlap": found.overlap,
        "entropy_nats": vector_entanglement(found.psi_B).entropies_nats[middle],
        "exact_entropy_nats": exact.entropies_nats[middle],
        "steps": len(found.energies),
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


def above(high: dict[str, Any], low: dict[str, Any]) -> bool:
    error = math.hypot(high["standard_error"], low["standard_error"])
    return bool(high["entropy_nats"] - low["entropy_nats"] > 2 * error)


def claims(
    entropies: Sequence[dict[str, Any]],
    references: Sequence[dict[str, Any]],
    ising: Sequence[dict[str, Any]],
) -> dict[str, bool]:
    found = {(row["gain"], row["depth"], row["bond_dim"]): row for row in entropies}
    chains = {row["bond_dim"]: row for row in references if row["state"] == "MPS"}
    return {
        "depth entangles": all(
            above(found[LARGE, DEEP, bond], found[LARGE, SHALLOW, bond]) for bond in BONDS
        ),
        "above an MPS of the same bond dimension": all(
            above(found[LARGE, DEEP, bond], chains[bond]) for bond in BONDS
        ),
        "energies within 1e-3": all(0 <= row["absolute_error"] < CLAIMED_ERROR for row in ising),
    }


def print_entropies(
    entropies: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]
) -> None:
    def cell(row: dict[str, Any]) -> str:
        return f"{row['entropy_nats']:.2f} ± {row['standard_error']:.2f}"

    header = ("entropy across the middle (nats)", *(f"D = {bond}" for bond in BONDS))
    lines = []
    for gain in GAINS:
        for depth in DEPTHS:
            rows = [row for row in entropies if (row["gain"], row["depth"]) == (gain, depth)]
            lines.append((f"weights x {gain:g}, depth {depth}", *map(cell, rows)))
    chains = [row for row in references if row["state"] == "MPS"]
    lines.append(("MPS", *map(cell, chains)))
    lines.append(("ln D", *(f"{math.log(bond):.2f}" for bond in BONDS)))
    print_table(header, lines)
    half = 2 ** (SPINS // 2)
    print(
        f"product state 0; Haar-random {page_entropy_nats(half, half):.3f} (complex, Page), "
        f"{cell(references[-1])} (real, sampled); largest possible {math.log(half):.3f}"
    )


def print_ising(rows: Sequence[dict[str, Any]]) -> None:
    print_table(
        (
            *("h", "energy", "exact", "above, absolute", "relative", "overlap"),
            *("entropy", "exact", "parameters", "steps", "CPU s"),
        ),
        [
            (
                f"{row['field']:g}",
                f"{row['energy']:.6f}",
                f"{row['exact_energy']:.6f}",
                f"{row['absolute_error']:.1e}",
                f"{row['relative_error']:.1e}",
                f"{row['overlap']:.6f}",
                f"{row['entropy_nats']:.4f}",
                f"{row['exact_entropy_nats']:.4f}",
                str(row["parameters"]),
                str(row["steps"]),
                f"{row['cpu_seconds']:.0f}",
            )
            for row in rows
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, help="random networks a cell")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="JSON", help="write all numbers here")
    parser.add_argument("--skip-ising", action="store_true", help="entropies only")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: a spread needs at least 2")

    torch.set_num_threads(options.threads)
    facts = environment(PACKAGES, seed=options.seed)
    print("measuring entropies ...", file=sys.stderr, flush=True)
    entropies = measure_entropies(options.seeds, options.seed)
    references = measure_references(options.seeds, options.seed)
    ising: list[dict[str, Any]] = []
    for field in () if options.skip_ising else FIELDS:
        print(f"measuring the Ising chain at h = {field:g} ...", file=sys.stderr, flush=True)
        ising.append(measure_ising(field, options.seed))
    held = claims(entropies, references, ising)
    print_entropies(entropies, references)
    if ising:
        print_ising(ising)
    else:
        del held["energies within 1e-3"]
    for claim, holds in held.items():
        print(f"{claim}: {'held' if holds else 'DID NOT HOLD'}")
    if options.out:
        content = {
            "claim": __doc__.splitlines()[0],
            "environment": facts,
            "claims": held,
            "entropies": entropies,
            "references": references,
            "ising": ising,
        }
        write_json(options.out, content)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
