"""Entanglement of a network, in four steps: python examples/entanglement.py --out DIR

Trains a small hybrid network on scikit-learn's 8x8 digits and draws

    training.png   how the entanglement of its tensor layer settles while it learns
    profile.png    which layers are strongly entangled: as matrices, and as the data sees them
    spectra.png    the Schmidt values behind that
    state.png      a network as a quantum state: what depth does, and an Ising ground state

It takes half a minute, and needs scikit-learn (pip install '.[sklearn]').
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import mpocompress as mpo
from mpocompress.analysis import (
    EntanglementRecorder,
    EvenState,
    IsingChain,
    entanglement,
    find_ground_state,
    profile_figure,
    spectra_figure,
    state_entanglement,
    state_figure,
    training_figure,
    vector_entanglement,
)

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--out", type=Path, default=Path("entanglement"), metavar="DIR")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--steps", type=int, default=150, help="of each method, for the Ising chain")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)

# 1. Train a hybrid: two dense layers around a tensor layer, an MPO of six sites. Its bond dimension
#    limits the entropy at every bond to ln 8 = 2.08 nats; a recorder sees how much it uses.
images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(images))
images = torch.tensor(images, dtype=torch.float32)[order] / 16
labels = torch.tensor(labels)[order]
train, test = slice(0, 1400), slice(1400, None)
model = nn.Sequential(
    nn.Linear(64, 256),
    nn.ReLU(),
    mpo.MPOLinear(256, 256, layout="2x2,2x4,4x2,2x4,4x2,2x2", bond_dim=8),
    nn.ReLU(),
    nn.Linear(256, 10),
)
recorder = EntanglementRecorder(
    model, every=22, measure=lambda model: entanglement(model, include=["2"])
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(options.epochs):
    for rows in torch.randperm(1400).split(64):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[train][rows]), labels[train][rows])
        loss.backward()
        optimizer.step()
        recorder()
accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
print(f"accuracy on images not trained on: {accuracy:.3f}")
training_figure(recorder).savefig(options.out / "training.png", dpi=150)

# 2. Which layers are entangled? Dense ones are seen through their exact MPO. As matrices they are
#    nearly as entangled as can be; what they do to the data is less so, and can be compressed. The
#    tensor layer has an area law as a matrix; the data correlates its sites, which adds to it.
by_weight = entanglement(model)
by_data = entanglement(model, metric="data", data=images[train])
print("\nby weight:", by_weight, "\nby data:", by_data, sep="\n")
profile_figure(by_weight, compare=by_data).savefig(options.out / "profile.png", dpi=150)
spectra_figure(by_data).savefig(options.out / "spectra.png", dpi=150)

# 3. A network of n spins with one output is a quantum state of 2^n amplitudes. With large random
#    weights, depth takes its entanglement towards that of a random state.
states = {}
for depth in (1, 2, 4):
    layers = [mpo.MPOLinear(10, 64, layout="8x5,8x2", bond_dim=4), nn.Tanh()]
    for _ in range(depth - 1):
        layers += [mpo.MPOLinear(64, 64, layout="4x4,4x4,4x4", bond_dim=4), nn.Tanh()]
    network = nn.Sequential(*layers, nn.Linear(64, 1)).double()
    with torch.no_grad():
        for layer in layers[::2]:
            layer.cores[0].mul_(8)
    states[f"tensor network, depth {depth}"] = state_entanglement(network, 10)

# 4. Trained, it becomes the ground state of an Ising chain at its critical point, in between.
chain = IsingChain(10, field=1.0)
network = EvenState(
    nn.Sequential(
        mpo.MPOLinear(10, 16, layout="4x5,4x2", bond_dim=4),
        nn.Tanh(),
        mpo.MPOLinear(16, 16, layout="4x4,4x4", bond_dim=4),
        nn.Tanh(),
        nn.Linear(16, 1),
    )
).double()
ground = find_ground_state(network, chain, adam_steps=options.steps, natural_steps=options.steps)
print(
    f"\nIsing chain of 10 spins at h = 1: energy {ground.energy:.6f}, exact "
    f"{ground.exact_energy:.6f}, relative error {ground.relative_error:.1e}"
)
states["Ising ground state, exact"] = vector_entanglement(chain.ground_state()[1])
states["Ising ground state, found"] = vector_entanglement(ground.psi_B)
state_figure(states).savefig(options.out / "state.png", dpi=150)
print(f"pictures are in {options.out}/")
