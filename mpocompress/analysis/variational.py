"""A network as a variational state: its energy, summed over all configurations, made least.

The network gives ln psi of a configuration of spins; psi is positive. Nothing is sampled, so the
energy is exact and above that of the ground state, up to rounding. Adam comes first, then the
natural gradient (stochastic reconfiguration): with O the derivatives of ln psi, centered, and p =
psi^2 normalized, a step solves (O^T p O + shift) x = O^T p (E_loc - E), the flow in imaginary time
projected onto what the network can say. Its step is halved until the energy falls.

Sources: Sorella, Phys. Rev. Lett. 80 (1998) 4558; Carleo, Troyer, Science 355 (2017) 602.
"""

# Shape suffixes: B all configurations (2^n), P parameters.

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mpocompress.analysis.ising import IsingChain
from mpocompress.errors import DataError
from mpocompress.layers.modes import evaluation_mode
from mpocompress.scalars import as_count

_HALVINGS = 12
_DTYPES = (torch.float32, torch.float64)
# The shift follows the success of the steps between these, relative to the largest diagonal.
_SHIFTS = (1e-10, 1e-1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VariationalState:
    """What a variational optimization reached.

    Attributes:
        energy: of the network's state.
        exact_energy: of the ground state, by diagonalization.
        overlap: |<psi|ground state>|, of normalized states.
        energies: after every step, Adam's first.
        psi_B: amplitudes (2^n,), normalized, float64; the order is that of `chain.spins_BN`.
    """

    energy: float
    exact_energy: float
    overlap: float
    energies: tuple[float, ...]
    psi_B: Tensor

    @property
    def absolute_error(self) -> float:
        """Energy above the exact one."""
        return self.energy - self.exact_energy

    @property
    def relative_error(self) -> float:
        """`absolute_error` over the size of the exact energy."""
        return self.absolute_error / abs(self.exact_energy)


class EvenState(nn.Module):
    """psi(x) = exp f(x) + exp f(-x): a network f made even under the flip of all spins.

    The Hamiltonian has this symmetry, and so has its ground state. Below h = 1 states that break it
    have nearly the same energy, and are found otherwise.

    Args:
        network: from spins (B, n) to f, (B,) or (B, 1).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, spins_BN: Tensor) -> Tensor:
        """Ln psi, (B,) or (B, 1)."""
        return torch.logaddexp(self.network(spins_BN), self.network(-spins_BN))


def log_amplitudes(network: nn.Module, chain: IsingChain) -> Tensor:
    """Ln psi (2^n,) of all configurations, differentiable.

    Raises:
        DataError: the network does not give one real number for each configuration.
    """
    parameter = next(network.parameters())
    values = network(chain.spins_BN.to(parameter))
    if values.numel() != 2**chain.num_sites or values.is_complex():
        raise DataError(
            f"the network gave {tuple(values.shape)} for {2**chain.num_sites} configurations, in "
            f"{values.dtype}; ln psi is one real number for each."
        )
    return values.reshape(-1)


def find_ground_state(
    network: nn.Module,
    chain: IsingChain,
    *,
    adam_steps: int = 200,
    learning_rate: float = 1e-2,
    natural_steps: int = 200,
    stop_below: float = 1e-9,
    progress: Callable[[str, int, int], None] | None = None,
) -> VariationalState:
    """Train a network, in place, to the ground state of a chain.

    It runs in evaluation mode, which is restored: with dropout, or statistics of a batch, psi would
    not be a function of the spins.

    Args:
        network: from spins (B, n) to ln psi (B,) or (B, 1); any layers, such as `MPOLinear`.
            float64 gets closer than float32; nothing narrower is trained. It is not seeded here:
            what it starts from decides.
        chain: the Hamiltonian.
        adam_steps: of Adam on the energy, at `learning_rate`, falling to 0 along a cosine.
        learning_rate: of Adam.
        natural_steps: of the natural gradient; each takes the derivatives of all amplitudes and a
            matrix of min(2^n, P) rows.
        stop_below: end when a step gains less than this share of the energy.
        progress: called as `progress(phase, done, total)`.

    Raises:
        DataError: not one real output a configuration, nothing to train, parameters narrower than
            float32, negative numbers of steps, or an energy that is not finite.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        raise DataError("the network has no parameter that requires a gradient.")
    adam_steps = as_count("adam_steps", adam_steps, 0, DataError)
    natural_steps = as_count("natural_steps", natural_steps, 0, DataError)
    narrow = next((p.dtype for p in parameters if p.dtype not in _DTYPES), None)
    if narrow is not None:
        raise DataError(
            f"the network has {narrow} parameters; the natural gradient needs float32 or wider. "
            "Convert it with .double() first."
        )
    with evaluation_mode(network):
        energies = _descend(
            network,
            chain,
            parameters,
            (adam_steps, natural_steps),
            learning_rate,
            stop_below,
            progress,
        )
        with torch.no_grad():
            psi_B = _amplitudes(network, chain).double().cpu()
    psi_B = psi_B / psi_B.norm()
    exact, ground_B = chain.ground_state()
    energy_now = float(chain.energy(psi_B))
    if energy_now != energy_now:
        raise DataError("the energy is not a number: train with a smaller learning_rate.")
    return VariationalState(
        energy=energy_now,
        exact_energy=exact,
        overlap=float((psi_B @ ground_B).abs()),
        energies=tuple(energies),
        psi_B=psi_B,
    )


def _descend(
    network: nn.Module,
    chain: IsingChain,
    parameters: list[nn.Parameter],
    steps: tuple[int, int],
    learning_rate: float,
    stop_below: float,
    progress: Callable[[str, int, int], None] | None,
) -> list[float]:
    """Steps of Adam, then of the natural gradient: the energies after each."""
    adam_steps, natural_steps = steps
    energies: list[float] = []
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(adam_steps, 1))
    for step in range(adam_steps):
        optimizer.zero_grad()
        energy = chain.energy(_amplitudes(network, chain))
        energy.backward()
        optimizer.step()
        schedule.step()
        energies.append(float(energy.detach()))
        if progress is not None:
            progress("Adam", step + 1, adam_steps)
    descent = _NaturalGradient(network, chain, parameters)
    for step in range(natural_steps):
        before, after = descent.step()
        energies.append(after)
        if progress is not None:
            progress("natural gradient", step + 1, natural_steps)
        if before - after <= stop_below * abs(before):
            break
    return energies


def _amplitudes(network: nn.Module, chain: IsingChain) -> Tensor:
    """psi, up to a factor that keeps the largest at 1."""
    values_B = log_amplitudes(network, chain)
    return (values_B - values_B.detach().max()).exp()


class _NaturalGradient:
    """Steps of stochastic reconfiguration on all configurations, with a shift that adapts."""

    def __init__(
        self, network: nn.Module, chain: IsingChain, parameters: list[nn.Parameter]
    ) -> None:
        self._network, self._chain, self._parameters = network, chain, parameters
        self._shift, self._rate = 1e-3, 1.0

    def step(self) -> tuple[float, float]:
        """One step; the energies before and after. Without a fall nothing is changed."""
        with torch.no_grad():
            psi_B = _amplitudes(self._network, self._chain)
            norm = psi_B @ psi_B
            image_B = self._chain.apply(psi_B)
            before = float(psi_B @ image_B / norm)
            weights_B = (psi_B / norm.sqrt()).abs()
            # sqrt(p) (E_loc - E), without a division by small amplitudes.
            residual_B = (image_B - before * psi_B) / norm.sqrt()
        weighted_BP = weights_B[:, None] * self._derivatives()
        weighted_BP -= weights_B[:, None] * (weights_B @ weighted_BP)
        gram, right = weighted_BP @ weighted_BP.mT, residual_B
        small = weighted_BP.shape[1] < weighted_BP.shape[0]
        if small:
            gram, right = weighted_BP.mT @ weighted_BP, weighted_BP.mT @ residual_B
        start = [parameter.detach().clone() for parameter in self._parameters]
        size = float(gram.diagonal().max())
        for _ in range(_HALVINGS):
            shifted = gram + self._shift * size * torch.eye(len(gram)).to(gram)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if int(failed) == 0:
                solution = torch.cholesky_solve(right[:, None], factor)[:, 0]
                move_P = solution if small else weighted_BP.mT @ solution
                after = self._try(start, move_P)
                if after < before:
                    self._shift = max(self._shift / 3, _SHIFTS[0])
                    return before, after
            self._shift = min(self._shift * 4, _SHIFTS[1])
        self._put(start)
        return before, before

    def _try(self, start: list[Tensor], move_P: Tensor) -> float:
        """The lowest energy along the move, of step sizes halved while that helps."""
        best, rate, kept = float("inf"), 2 * self._rate, 0.0
        for _ in range(_HALVINGS):
            self._put(start, move_P, rate)
            with torch.no_grad():
                energy = float(self._chain.energy(_amplitudes(self._network, self._chain)))
            if not energy < best:
                if best < float("inf"):
                    break
            else:
                best, kept = energy, rate
            rate /= 2
        self._put(start, move_P, kept)
        self._rate = kept or self._rate
        return best

    def _put(self, start: list[Tensor], move_P: Tensor | None = None, rate: float = 0.0) -> None:
        offset = 0
        with torch.no_grad():
            for parameter, value in zip(self._parameters, start, strict=True):
                parameter.copy_(value)
                if move_P is not None:
                    part = move_P[offset : offset + value.numel()].reshape(value.shape)
                    parameter.sub_(part.to(parameter), alpha=rate)
                offset += value.numel()

    def _derivatives(self) -> Tensor:
        """D ln psi / d parameters, (B, P)."""
        names = {id(p): name for name, p in self._network.named_parameters()}
        own = {names[id(p)]: p.detach() for p in self._parameters}
        spins_BN = self._chain.spins_BN.to(self._parameters[0])

        def one(parameters: dict[str, Tensor], spins_N: Tensor) -> Tensor:
            return functional_call(self._network, parameters, (spins_N[None],)).reshape(())

        with torch.enable_grad():
            found = vmap(torch.func.grad(one), in_dims=(None, 0))(own, spins_BN)
        return torch.cat([found[names[id(p)]].flatten(1) for p in self._parameters], dim=1)
