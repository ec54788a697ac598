"""Functions as quantum states: known entanglement, exactly and by cross interpolation."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import mpocompress as mpo
from mpocompress.analysis import (
    amplitudes,
    cross_interpolation,
    page_entropy_nats,
    state_entanglement,
    vector_entanglement,
)
from mpocompress.analysis.cross import full_pivots
from mpocompress.analysis.functions import all_configurations, encode
from mpocompress.errors import BondDimError, DataError
from tests.planted import gaussian, seeded
from tests.tolerances import TOL

EXACT = TOL[torch.float64]["spectrum"]
ALL_OR_NONE = torch.tensor([[0] * 40, [1] * 40])


def ghz(spins):
    """1 where all spins agree, else 0."""
    return ((spins == spins[:, :1]).all(1)).to(spins.dtype)


def product(spins):
    angles = torch.linspace(0.1, 1.3, spins.shape[1], dtype=spins.dtype)
    return torch.cos(angles + 0.4 * spins).prod(1)


def planted_state(sites, bond, dim, seed):
    """Amplitudes of a random matrix product state, as a function of digits, and its cores."""
    chain = mpo.MPO.random([(dim, 1)] * sites, bond, dtype=torch.float64, generator=seeded(seed))

    def psi(digits):
        row = torch.ones(len(digits), 1, dtype=torch.float64)
        for site, core in enumerate(chain.cores):
            # (L, D, 1, R) -> one matrix a row of the batch
            row = torch.einsum("bl,lbr->br", row, core[:, digits[:, site], 0])
        return row[:, 0]

    return psi, chain


class TestKnownStates:
    @pytest.mark.parametrize("sites", [2, 3, 12])
    def test_a_product_state_is_not_entangled(self, sites):
        found = state_entanglement(product, sites)
        assert max(found.entropies_nats) < EXACT["atol"]
        assert set(found.bond_dims) == {1}
        assert found.method == "exact"

    @pytest.mark.parametrize("sites", [2, 5, 12])
    def test_the_ghz_state_has_log_2_at_every_cut(self, sites):
        found = state_entanglement(ghz, sites, renyi_orders=(0, 2, math.inf))
        assert found.entropies_nats == pytest.approx([math.log(2)] * (sites - 1))
        assert found.bond_dims == (2,) * (sites - 1)
        for values in found.renyi_nats.values():
            assert values == pytest.approx([math.log(2)] * (sites - 1))

    def test_ghz_of_more_levels(self):
        found = state_entanglement(
            lambda digits: (digits == digits[:, :1]).all(1).double(),
            5,
            local_dim=3,
            encoding="digits",
        )
        assert found.entropies_nats == pytest.approx([math.log(3)] * 4)

    def test_the_w_state(self):
        found = state_entanglement(lambda bits: (bits.sum(1) == 1).double(), 8, encoding="bits")
        for cut, entropy in enumerate(found.entropies_nats, start=1):
            p = cut / 8
            assert entropy == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))

    def test_bell_pairs_across_the_middle_have_the_largest_entropy(self):
        # Site k is paired with site n - 1 - k: the cut after k sites severs min(k, n - k) pairs.
        found = state_entanglement(lambda s: (s == s.flip(1)).all(1).double(), 8)
        assert found.entropies_nats == pytest.approx(found.capacities_nats)
        assert found.growth.verdict == "volume-law-like"
        assert found.filling == pytest.approx(1)

    def test_random_states_have_pages_entropy(self):
        generator = seeded(0)
        total = torch.zeros(9, dtype=torch.float64)
        for _ in range(40):
            psi = torch.randn(2**10, dtype=torch.complex128, generator=generator)
            found = vector_entanglement(psi)
            total += torch.tensor(found.entropies_nats, dtype=torch.float64)
        expected = torch.tensor(found.page_nats, dtype=torch.float64)
        # The entropy of one random state of 10 qubits deviates by 0.01 at most; of 40, by less.
        assert_close(total / 40, expected, rtol=0.0, atol=5e-3)

    @pytest.mark.parametrize(
        ("small", "large", "value"),
        [(1, 7, 0.0), (2, 2, 1 / 3), (2, 3, 1 / 4 + 1 / 5 + 1 / 6 - 1 / 6)],
    )
    def test_pages_formula(self, small, large, value):
        assert page_entropy_nats(small, large) == pytest.approx(value, abs=1e-12)
        assert page_entropy_nats(large, small) == pytest.approx(value, abs=1e-12)

    def test_pages_formula_for_large_systems(self):
        assert page_entropy_nats(2**100, 2**100) == pytest.approx(100 * math.log(2) - 0.5)
        assert page_entropy_nats(2**20, 2**20) == pytest.approx(20 * math.log(2) - 0.5, abs=1e-6)

    def test_a_planted_chain_has_the_entropies_of_its_gauge(self):
        psi, chain = planted_state(8, 3, 2, seed=5)
        found = state_entanglement(psi, 8, encoding="digits")
        assert_close(
            torch.tensor(found.entropies_nats, dtype=torch.float64),
            torch.tensor(chain.entropies_nats(), dtype=torch.float64),
            **EXACT,
        )
        assert max(found.bond_dims) == 3

    @pytest.mark.parametrize("scale", [1e-200, 1e200])
    def test_the_norm_does_not_matter_even_where_squares_overflow(self, scale):
        state = torch.zeros(8, dtype=torch.float64)
        state[[0, -1]] = scale
        found = vector_entanglement(state, renyi_orders=(0.5, 2, math.inf))
        for values in (found.entropies_nats, *found.renyi_nats.values()):
            assert values == pytest.approx([math.log(2)] * 2)

    def test_reduced_density_matrices_of_complex_states_as_arrays(self):
        generator = np.random.default_rng(0)
        state = generator.normal(size=27) + 1j * generator.normal(size=27)
        found = vector_entanglement(state, local_dim=3)
        for cut, entropy in enumerate(found.entropies_nats, start=1):
            left = state.reshape(3**cut, -1) / np.linalg.norm(state)
            p = np.linalg.eigvalsh(left @ left.conj().T)
            assert entropy == pytest.approx(-sum(x * math.log(x) for x in p if x > 1e-15))


class TestAmplitudes:
    def test_the_first_digit_is_the_most_significant(self):
        digits = all_configurations(3, 3, torch.device("cpu"))
        assert digits[5].tolist() == [0, 1, 2]
        psi = amplitudes(
            lambda d: (d[:, 0] * 9 + d[:, 1] * 3 + d[:, 2]).double(),
            3,
            local_dim=3,
            encoding="digits",
        )
        assert torch.equal(psi, torch.arange(27).double())

    def test_encodings(self):
        digits = torch.tensor([[0, 1, 2]])
        assert encode(digits, "spins", 3, torch.float32).tolist() == [[1, 0, -1]]
        assert encode(digits, "bits", 3, torch.float32).tolist() == [[0, 0.5, 1]]
        assert encode(digits, "one-hot", 3, torch.float32).tolist() == [[1, 0, 0, 0, 1, 0, 0, 0, 1]]
        assert encode(digits, lambda d: 2 * d, 3, torch.float32).tolist() == [[0, 2, 4]]
        with pytest.raises(DataError, match="encoding 'qubits': there are"):
            encode(digits, "qubits", 3, torch.float32)

    def test_a_network_is_evaluated_in_its_dtype_and_keeps_its_mode(self):
        torch.manual_seed(0)
        network = nn.Sequential(
            mpo.MPOLinear(6, 8, layout=[(4, 2), (2, 3)], bond_dim=2),
            nn.Dropout(0.5),
            nn.Linear(8, 1),
        )
        psi = amplitudes(network, 6)
        assert network.training
        network.eval()
        spins = 1 - 2 * all_configurations(6, 2, torch.device("cpu"))
        assert_close(psi, network(spins.float())[:, 0].detach().double())
        again = state_entanglement(network, 6)
        assert again.entropies_nats == vector_entanglement(psi).entropies_nats

    def test_logarithms_far_out_of_range(self):
        found = state_entanglement(
            lambda s: 3000 + (s[:, 1:] * s[:, :-1]).sum(1), 6, log_amplitudes=True
        )
        plain = state_entanglement(lambda s: (s[:, 1:] * s[:, :-1]).sum(1).exp(), 6)
        assert found.entropies_nats == pytest.approx(plain.entropies_nats)

    def test_complex_phases(self):
        # A controlled phase of pi between neighbours: a cluster state, log 2 at every cut.
        def cluster(bits):
            return torch.exp(1j * math.pi * (bits[:, 1:] * bits[:, :-1]).sum(1))

        found = state_entanglement(cluster, 7, encoding="bits")
        assert found.entropies_nats == pytest.approx([math.log(2)] * 6)


class TestCrossInterpolation:
    @pytest.mark.parametrize(("bond", "dim"), [(1, 2), (5, 2), (4, 3)])
    def test_forty_sites_of_known_bond_dimension(self, bond, dim):
        psi, chain = planted_state(40, bond, dim, seed=1)
        found = cross_interpolation(psi, 40, local_dim=dim, encoding="digits")
        most = [min(dim**k, dim ** (40 - k), bond) for k in range(1, 40)]
        assert list(found.bond_dims) == most
        assert found.converged
        assert found.max_error < 1e-10
        assert found.evaluations < 40 * (dim * bond) ** 2 * 8 + 10_000
        # The whole state is right, not only where it was looked at.
        difference = (found.mpo - chain).norm() / chain.norm()
        assert difference < 1e-8

    def test_entropies_of_forty_sites(self):
        psi, chain = planted_state(40, 4, 2, seed=2)
        found = state_entanglement(psi, 40, encoding="digits")
        assert (found.method, found.converged) == ("cross", True)
        assert found.entropies_nats == pytest.approx(chain.entropies_nats(), abs=1e-7)

    def test_a_cosine_of_a_sum_has_bond_dimension_two(self):
        weights = gaussian(40)
        found = cross_interpolation(lambda s: torch.cos(s @ weights + 0.3), 40)
        assert set(found.bond_dims) == {2}
        assert found.relative_error < 1e-12
        digits = torch.randint(2, (50, 40), generator=seeded(9))
        spins = (1 - 2 * digits).double()
        assert_close(found.evaluate(digits), torch.cos(spins @ weights + 0.3), **EXACT)

    def test_it_agrees_with_all_amplitudes_where_both_are_possible(self):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        exact = state_entanglement(network, 12, method="exact")
        cross = state_entanglement(network, 12, method="cross", tolerance=1e-9)
        assert cross.converged
        assert cross.relative_error < 1e-7
        assert cross.entropies_nats == pytest.approx(exact.entropies_nats, abs=1e-6)

    def test_a_bond_dimension_that_does_not_suffice_is_admitted(self):
        psi, _ = planted_state(14, 8, 2, seed=3)
        found = cross_interpolation(psi, 14, encoding="digits", bond_dim=3, max_sweeps=6)
        assert not found.converged
        assert max(found.bond_dims) == 3
        dense = amplitudes(psi, 14, encoding="digits")
        error = float((found.mpo.to_dense()[:, 0] - dense).norm() / dense.norm())
        assert found.relative_error == pytest.approx(error, rel=0.1)

    def test_entropies_of_what_was_not_interpolated_are_refused(self):
        # All signs random: no matrix product state of a small bond dimension is near.
        def noise(spins):
            weights = gaussian(24, seed=4)
            return torch.sin(1e4 * (spins @ weights).square())

        with pytest.raises(DataError, match="the interpolation is off by .* Raise bond_dim"):
            state_entanglement(noise, 24, bond_dim=4)

    def test_ghz_from_a_start_where_it_does_not_vanish(self):
        found = state_entanglement(ghz, 40, start=ALL_OR_NONE)
        assert found.entropies_nats == pytest.approx([math.log(2)] * 39)
        assert found.bond_dims == (2,) * 39

    def test_errors_found_by_the_check_become_pivots(self):
        # Zero where the first and the last digit differ: from all zeros, half of the weight is
        # found only where two distant digits change at once.
        def split(digits):
            both = digits[:, 0] == digits[:, -1]
            values = (1.0 + 0.5 * digits[:, 1:-1].double()).prod(1)
            return torch.where(both, values, 0.0)

        start = torch.zeros(1, 30, dtype=torch.int64)
        found = cross_interpolation(split, 30, encoding="digits", start=start)
        assert found.converged
        assert set(found.bond_dims) == {2}
        assert found.sweeps > 2

    def test_a_float32_function_is_not_interpolated_below_its_rounding(self):
        weights = gaussian(30).float()
        found = cross_interpolation(lambda s: torch.cos(s.float() @ weights), 30)
        assert found.converged
        assert max(found.bond_dims) == 2
        assert found.max_error < TOL[torch.float32]["dense"]["rtol"]

    def test_pivots_interpolate_and_stop_at_the_rank(self):
        matrix = gaussian(9, 4) @ gaussian(4, 7, seed=1)
        rows, columns, factor = full_pivots(matrix, absolute=1e-10, rank=20)
        assert len(rows) == len(columns) == 4
        assert_close(factor[rows].triu(), torch.eye(4).double())
        assert float(factor.abs().max()) <= 1.0
        core = matrix[:, columns] @ torch.linalg.inv(matrix[rows][:, columns])
        assert_close(core @ matrix[rows], matrix, **EXACT)
        assert len(full_pivots(matrix, absolute=0.0, rank=2)[0]) == 2
        assert len(full_pivots(torch.zeros(3, 3).double(), absolute=1.0, rank=2)[0]) == 1


class TestRefusals:
    def test_what_is_no_state(self):
        with pytest.raises(DataError, match=r"the function gave \(64, 2\) for 64 configurations"):
            amplitudes(nn.Linear(6, 2), 6)
        with pytest.raises(DataError, match="NaN or Inf amplitudes"):
            amplitudes(lambda s: s[:, 0] / 0.0, 3)
        with pytest.raises(DataError, match="all amplitudes are 0"):
            state_entanglement(lambda s: 0 * s[:, 0], 3)
        with pytest.raises(DataError, match="have 2097152 amplitudes"):
            amplitudes(lambda s: s[:, 0], 21)
        with pytest.raises(DataError, match="num_sites 0, local_dim 2"):
            amplitudes(lambda s: s[:, 0], 0)
        with pytest.raises(DataError, match=r"num_sites 3.0.* both integers"):
            amplitudes(lambda s: s[:, 0], 3.0)
        with pytest.raises(DataError, match="num_sites 1: entanglement is between 2 sites"):
            state_entanglement(lambda s: s[:, 0], 1)
        with pytest.raises(DataError, match=r"a state of shape \(12,\)"):
            vector_entanglement(torch.ones(12))
        for local_dim in (0, 1):  # which no power makes larger
            with pytest.raises(DataError, match=f"with {local_dim} values each"):
                vector_entanglement(torch.ones(4), local_dim=local_dim)
        for bad in (math.nan, math.inf):
            with pytest.raises(DataError, match="amplitudes with NaN or Inf"):
                vector_entanglement(torch.tensor([1.0, bad, 0.0, 0.0]))
        with pytest.raises(DataError, match="method 'mps'"):
            state_entanglement(ghz, 3, method="mps")
        with pytest.raises(BondDimError, match="bond_dim 0"):
            state_entanglement(ghz, 30, bond_dim=0)

    def test_what_cannot_be_interpolated(self):
        with pytest.raises(DataError, match="the function vanishes there"):
            cross_interpolation(ghz, 40)
        with pytest.raises(DataError, match="the function is complex"):
            cross_interpolation(lambda s: torch.exp(1j * s.sum(1)), 30)
        with pytest.raises(DataError, match=r"start of shape \(2, 40\)"):
            cross_interpolation(product, 30, start=ALL_OR_NONE)
        with pytest.raises(DataError, match="start with digits from -1 to 1: .* they are 0 to 1"):
            cross_interpolation(product, 4, start=[[1, -1, 1, -1]])  # spins are no digits
        with pytest.raises(DataError, match="tolerance 0"):
            cross_interpolation(product, 30, tolerance=0)
