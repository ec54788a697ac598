"""The transverse-field Ising chain: exact energies, and tensor neural networks that reach them."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import mpocompress as mpo
from mpocompress.analysis import (
    EvenState,
    IsingChain,
    find_ground_state,
    vector_entanglement,
)
from mpocompress.analysis.variational import _NaturalGradient, log_amplitudes
from mpocompress.errors import DataError
from tests.planted import gaussian
from tests.tolerances import TOL

EXACT = TOL[torch.float64]["spectrum"]


def pauli(matrix, site, sites):
    parts = [torch.eye(2, dtype=torch.float64)] * sites
    parts[site] = torch.tensor(matrix, dtype=torch.float64)
    product = parts[0]
    for part in parts[1:]:
        product = torch.kron(product, part)
    return product


def tensor_network(sites=10, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    half = sites // 2
    return EvenState(
        nn.Sequential(
            mpo.MPOLinear(sites, 32, layout=[(4, half), (8, 2)], bond_dim=4),
            nn.Tanh(),
            mpo.MPOLinear(32, 32, layout=[(4, 4), (8, 8)], bond_dim=4),
            nn.Tanh(),
            nn.Linear(32, 1),
        )
    ).to(dtype)


class TestChain:
    @pytest.mark.parametrize("field", [0.5, 1.0, 2.0])
    @pytest.mark.parametrize("sites", [4, 9, 10])
    def test_periodic_energies_are_those_of_free_fermions(self, sites, field):
        # Pfeuty, Ann. Phys. 57 (1970) 79: the ground state lies in the even sector, where the
        # momenta are half-integer.
        momenta = [(2 * m + 1) * math.pi / sites for m in range(sites)]
        expected = -sum(math.sqrt(1 + field**2 - 2 * field * math.cos(k)) for k in momenta)
        energy, psi = IsingChain(sites, field).ground_state()
        assert energy == pytest.approx(expected, abs=1e-10)
        assert float(psi.min()) > 0
        assert float(psi.norm()) == pytest.approx(1)

    @pytest.mark.parametrize("periodic", [True, False])
    def test_it_applies_the_sum_of_pauli_matrices(self, periodic):
        x, z = [[0, 1], [1, 0]], [[1, 0], [0, -1]]
        matrix = -0.7 * sum(pauli(x, site, 4) for site in range(4))
        for site in range(4 if periodic else 3):
            matrix = matrix - pauli(z, site, 4) @ pauli(z, (site + 1) % 4, 4)
        chain, psi = IsingChain(4, 0.7, periodic=periodic), gaussian(16)
        assert_close(chain.apply(psi), matrix @ psi, **EXACT)
        assert_close(chain.energy(psi), psi @ matrix @ psi / (psi @ psi), **EXACT)
        assert chain.ground_state()[0] == pytest.approx(float(torch.linalg.eigvalsh(matrix)[0]))
        # Superpositions with phases have the energy of a Hermitian form, which is real.
        state = torch.complex(psi, gaussian(16, seed=1))
        expected = (state.conj() @ (matrix + 0j) @ state / state.norm() ** 2).real
        assert_close(chain.energy(state), expected, **EXACT)
        with pytest.raises(DataError, match=r"\(8,\): 4 spins have 16 amplitudes"):
            chain.apply(gaussian(8))

    def test_entanglement_of_the_phases(self):
        # Deep in the ordered phase the ground state is the GHZ state, in the disordered phase a
        # product; between, at h = 1, the chain of 10 has more than either.
        entropies = {
            field: vector_entanglement(IsingChain(10, field).ground_state()[1]).entropies_nats[4]
            for field in (1e-2, 1.0, 50.0)
        }
        assert entropies[1e-2] == pytest.approx(math.log(2), abs=1e-3)
        assert entropies[50.0] < 1e-3
        assert entropies[1.0] > 0.5

    @pytest.mark.parametrize(
        ("sites", "field", "periodic", "message"),
        [
            (2, 1.0, True, "num_sites 2: a periodic chain has 3 to 12"),
            (1, 1.0, False, "an open one 2 to 12"),
            (13, 1.0, False, "num_sites 13"),
            (4, math.inf, True, "field inf"),
            (4, -1.0, True, "field -1.0"),
            (4, "1", True, "field '1'"),
            (4.0, 1.0, True, "num_sites 4.0"),
        ],
    )
    def test_impossible_chains_are_refused(self, sites, field, periodic, message):
        with pytest.raises(DataError, match=message):
            IsingChain(sites, field, periodic)


class TestGroundStates:
    @pytest.mark.slow
    @pytest.mark.parametrize("field", [0.5, 1.0, 2.0])
    def test_ten_sites_in_all_phases(self, field):
        found = find_ground_state(tensor_network(), IsingChain(10, field))
        assert 0 <= found.absolute_error < 1e-3
        assert found.relative_error < 1e-4
        assert found.overlap > 0.999

    def test_an_open_chain(self):
        chain = IsingChain(8, 1.0, periodic=False)
        found = find_ground_state(tensor_network(8), chain, adam_steps=100, natural_steps=60)
        assert 0 <= found.absolute_error < 1e-3

    def test_six_sites_and_the_same_run_twice(self):
        chain = IsingChain(6, 1.0)
        runs = [
            find_ground_state(tensor_network(6), chain, adam_steps=60, natural_steps=40)
            for _ in range(2)
        ]
        assert runs[0].energies == runs[1].energies
        assert torch.equal(runs[0].psi_B, runs[1].psi_B)
        assert 0 <= runs[0].relative_error < 1e-6
        # A variational energy is never below the exact one, at no step.
        assert min(runs[0].energies) >= runs[0].exact_energy - 1e-10
        assert runs[0].energy == pytest.approx(float(chain.energy(runs[0].psi_B)))

    def test_the_natural_gradient_never_raises_the_energy(self):
        chain = IsingChain(5, 1.0, periodic=False)
        network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
        torch.manual_seed(0)
        for parameter in network.parameters():
            nn.init.normal_(parameter)
        found = find_ground_state(network, chain, adam_steps=0, natural_steps=15)
        assert list(found.energies) == sorted(found.energies, reverse=True)
        assert found.energies[-1] < found.energies[0]

    @pytest.mark.parametrize("width", [3, 40])
    def test_both_forms_of_the_step_are_that_of_the_quantum_geometric_tensor(self, width):
        # More configurations than parameters (width 3), and fewer (width 40).
        chain = IsingChain(5, 0.8)
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 1)).double()
        parameters = list(network.parameters())
        jacobian = _jacobian(network, chain, parameters)
        psi = log_amplitudes(network, chain).exp().detach()
        p = psi**2 / (psi @ psi)
        centered = jacobian - p @ jacobian
        local = chain.apply(psi) / psi
        force = centered.T @ (p * (local - p @ local))
        # The gradient of the energy is twice the force.
        energy = chain.energy(log_amplitudes(network, chain).exp())
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(energy, parameters)])
        assert_close(2 * force, gradient, **TOL[torch.float64]["gradient"])
        tensor = centered.T @ (p[:, None] * centered)
        descent = _NaturalGradient(network, chain, parameters)
        before = torch.cat([q.detach().flatten().clone() for q in parameters])
        descent.step()
        moved = before - torch.cat([q.detach().flatten() for q in parameters])
        small = tensor.shape[0] < len(p)
        gram = centered * p.sqrt()[:, None]
        size = float((tensor if small else gram @ gram.T).diagonal().max())
        shifted = tensor + 1e-3 * size * torch.eye(len(tensor)).double()
        direction = torch.linalg.solve(shifted, force)
        cosine = float(moved @ direction / (moved.norm() * direction.norm()))
        assert cosine == pytest.approx(1, abs=1e-8)

    def test_an_even_state_is_even(self):
        chain = IsingChain(6, 1.0)
        psi = log_amplitudes(tensor_network(6), chain)
        assert_close(psi, psi.flip(0))

    def test_what_cannot_be_trained_is_refused(self):
        chain = IsingChain(4, 1.0)
        with pytest.raises(DataError, match=r"the network gave \(16, 3\) for 16"):
            find_ground_state(nn.Linear(4, 3), chain)
        with pytest.raises(DataError, match="no parameter that requires a gradient"):
            find_ground_state(nn.Linear(4, 1).requires_grad_(False), chain)
        with pytest.raises(DataError, match="float16 parameters; .* needs float32 or wider"):
            find_ground_state(nn.Linear(4, 1).half(), chain)
        with pytest.raises(DataError, match="adam_steps -1"):
            find_ground_state(nn.Linear(4, 1), chain, adam_steps=-1)
        phases = nn.Linear(4, 1, dtype=torch.float64)
        phases.forward = lambda spins: 1j * spins.sum(1)
        with pytest.raises(DataError, match="complex128.* one real number"):
            find_ground_state(phases, chain)

    def test_dropout_and_batch_norm_are_in_evaluation_mode_and_get_their_own_back(self):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Tanh(), nn.Linear(8, 1)
        ).double()
        found = find_ground_state(network, IsingChain(4, 1.0), adam_steps=20, natural_steps=20)
        assert found.relative_error < 1e-2
        assert network.training
        assert network[2].training
        assert int(network[1].num_batches_tracked) == 0


def _jacobian(network, chain, parameters):
    rows = []
    for value in log_amplitudes(network, chain):
        grads = torch.autograd.grad(value, parameters, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)
