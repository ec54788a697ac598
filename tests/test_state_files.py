"""States of runs on disk: each kind is read one way, and what does not fit is named."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mpocompress.errors import LoadError
from mpocompress.loading import Batch
from mpocompress.mpo import MPO, Layout
from mpocompress.surgery import find_weights
from mpocompress.tuning import (
    DistillRecord,
    FitOptions,
    FitStore,
    FittedWeight,
    SitePlan,
)
from mpocompress.tuning.healing import state as healing_state
from mpocompress.tuning.healing.state import DistillState
from mpocompress.tuning.sweeps import state as sweeps_state
from mpocompress.tuning.sweeps.options import LossSweepRecord
from mpocompress.tuning.sweeps.state import SweepState
from mpocompress.tuning.training import state as training_state
from mpocompress.tuning.training.options import TrainRecord
from mpocompress.tuning.training.state import TrainState

ARGUMENTS = {"steps": 3, "betas": (0.9, 0.99)}


@dataclass(frozen=True)
class Kind:
    """How a state is written and read again.

    Attributes:
        write: a state, into a folder; gives its file.
        read: the state in a file.
        fact: that the file has, and that a state cannot do without.
        tensor: likewise; None if any tensors will do.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    fact: str
    tensor: str | None


TRAINING = TrainState(
    done=2,
    step=9,
    best_loss=inf,  # nothing is held out
    best_record=1,
    history=[
        TrainRecord(
            epoch=0.5,
            train_loss=None,
            validation_loss=None,
            score=None,
            bond_dims={"0": (2, 3)},
            entropies_nats={"0": (0.1, 0.2)},
        )
    ],
    current={"0.weight": torch.ones(2)},
    best={"0.weight": torch.zeros(2)},
    method={"dense.0.step": torch.tensor(3.0)},
)
SWEEPS = SweepState(
    settings={"seed": 1},
    caps={"0": None},
    step_scales={"0": 0.5},
    history=(
        LossSweepRecord(
            sweep=0,
            layer="0",
            direction=-1,
            loss_before=1.5,
            loss_after=1.25,
            bond_dims=(2, 3),
            entropies_nats=(0.1, 0.2),
            gradient_evaluations=7,
            loss_evaluations=8,
            rejected=1,
        ),
    ),
    tensors={"0/0": torch.ones(1, 2, 2, 1)},
)
HEALING = DistillState(
    step=5,
    learning_rates={"blocks": 1e-3},
    best_loss=0.5,
    history=[
        DistillRecord(phase="model", step=5, train_loss=0.75, held_out_loss=0.5, learning_rate=1e-3)
    ],
    current=[torch.ones(2)],
    best=[torch.zeros(2)],
    moments=[{"step": torch.tensor(3.0)}],
)


def store(folder: Path) -> tuple[FitStore, SitePlan]:
    """A store that has come to the one layer of a model."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    (site,) = find_weights(model).sites
    plan = SitePlan(site=site, layout=Layout.svd(4, 6), bond_dims=(2,))
    found = FitStore(folder)
    found.begin(model, [Batch((torch.ones(3, 6),))], {}, {}, FitOptions())
    return found, plan


def write_fit(folder: Path) -> Path:
    found, plan = store(folder / "fits")
    assert found.reach(plan) is None
    mpo = MPO.from_matrix(plan.site.matrix(), plan.layout, bond_dim=2)
    found.put(plan, FittedWeight(mpo=mpo, bias=None, relative_output_error=0.25, rows=3))
    (file,) = (folder / "fits").iterdir()
    return file


def read_fit(path: Path) -> Any:
    found, plan = store(path.parent)
    return found.reach(plan)


def written(write: Callable[..., None], *given: Any) -> Callable[[Path], Path]:
    def to(folder: Path) -> Path:
        path = folder / "state.safetensors"
        write(path, *given)
        return path

    return to


KINDS = {
    "training": Kind(
        write=written(training_state.write_state, TRAINING, ARGUMENTS),
        read=lambda path: training_state.read_state(path, ARGUMENTS),
        fact="history",
        tensor=None,
    ),
    "sweeps": Kind(
        write=written(sweeps_state.write_state, SWEEPS),
        read=sweeps_state.read_state,
        fact="caps",
        tensor=None,  # see test_loss_sweeps
    ),
    "distillation": Kind(
        write=written(healing_state.write_state, HEALING, ARGUMENTS),
        read=lambda path: healing_state.read_state(path, ARGUMENTS),
        fact="best_loss",
        tensor="current.0",
    ),
    "fit": Kind(write=write_fit, read=read_fit, fact="rows", tensor="core.1"),
}


def plain(value: Any) -> Any:
    """With lists in place of tensors, which == does not compare."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, MPO):
        return [core.tolist() for core in value.cores]
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def fields(state: Any) -> dict[str, Any]:
    return {name: plain(getattr(state, name)) for name in type(state).__dataclass_fields__}


def edit(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change the facts and the tensors in a file."""
    with safe_open(path, framework="pt") as file:
        ((key, text),) = file.metadata().items()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(text)
    change(facts, tensors)
    save_file(tensors, path, metadata={key: json.dumps(facts)})


@pytest.mark.parametrize(
    ("kind", "state"),
    [("training", TRAINING), ("sweeps", SWEEPS), ("distillation", HEALING)],
)
def test_a_state_is_read_as_it_was_written(tmp_path, kind, state):
    found = KINDS[kind].read(KINDS[kind].write(tmp_path))
    assert fields(found) == fields(state)


def test_a_fit_is_read_as_it_was_written(tmp_path):
    found = read_fit(write_fit(tmp_path))
    assert (found.relative_output_error, found.rows, found.bias) == (0.25, 3, None)
    _, plan = store(tmp_path)
    matrix = plan.site.matrix()
    assert plain(found.mpo) == plain(MPO.from_matrix(matrix, plan.layout, bond_dim=2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_lacks_a_fact_is_named(tmp_path, kind):
    path = KINDS[kind].write(tmp_path)
    fact = KINDS[kind].fact
    edit(path, lambda facts, _: facts.pop(fact))
    with pytest.raises(
        LoadError, match=rf"{path.name}' is truncated or foreign: {fact}: .*required.*Remove it to"
    ):
        KINDS[kind].read(path)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.tensor])
def test_a_state_that_lacks_a_tensor_is_named(tmp_path, kind):
    path = KINDS[kind].write(tmp_path)
    tensor = KINDS[kind].tensor
    edit(path, lambda _, tensors: tensors.pop(tensor))
    with pytest.raises(LoadError, match=rf"{path.name}' is trunc.*there is no '{tensor}'\. Remove"):
        KINDS[kind].read(path)


def test_a_training_with_tensors_of_something_else_is_named(tmp_path):
    path = KINDS["training"].write(tmp_path)
    edit(path, lambda _, tensors: tensors.update({"layer.weight": torch.ones(1)}))
    with pytest.raises(LoadError, match="there is no 'layer'"):
        KINDS["training"].read(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["format_version", "version"])
def test_states_of_other_versions_are_refused_as_such(tmp_path, kind, name):
    path = KINDS[kind].write(tmp_path)

    def age(facts: dict[str, Any], _: dict[str, Tensor]) -> None:
        del facts["format_version"], facts[KINDS[kind].fact]
        facts[name] = 99

    edit(path, age)
    with pytest.raises(LoadError, match=r"another version.*format 99, this one writes \d\)"):
        KINDS[kind].read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_other_files_are_refused(tmp_path, kind):
    path = KINDS[kind].write(tmp_path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(LoadError, match=r"is a safetensors file, but no .*Give another path"):
        KINDS[kind].read(path)
    path.write_bytes(b"PK")
    with pytest.raises(LoadError, match=r"is truncated or foreign: .*Remove it to"):
        KINDS[kind].read(path)
