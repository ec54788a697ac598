"""Who may import whom, read from the source: every import statement, function-local ones too.

ruff's banned-api catches the common slip; a per-file exception to it lifts every ban in that file
at once, so the exact rule is here.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

import mpocompress

PACKAGE = Path(mpocompress.__file__).parent

# From the foundation to the roof. A module imports from its own room and from rooms before it;
# rooms on one line may import each other.
ROOMS = (
    ("errors", "_version"),
    ("scalars",),
    ("files",),
    ("mpo",),
    ("layers",),
    ("surgery",),
    ("planning",),
    ("tuning",),
    ("analysis",),
    ("export",),
    ("report",),
    ("loading", "saving"),
    ("api",),
    ("estimators",),
    ("pipeline",),
    ("deployment",),
    ("cli",),
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}

# The same within `tuning`: its own modules below all of its rooms.
TUNING = ("statistics", "fitting", "healing", "sweeps", "training")

# The package itself resolves its public names lazily, so it may name any room but the command line;
# `python -m mpocompress` only starts the command line. No room may import either.
DOORS = {"__init__": RANK["deployment"], "__main__": RANK["cli"]}


@dataclass(frozen=True)
class Restriction:
    """Modules, with all below them, that only some of our files may import."""

    modules: tuple[str, ...]
    allowed_in: tuple[str, ...]  # globs on the path within the package
    rule: str


RESTRICTIONS = (
    Restriction(
        ("onnx", "onnxruntime", "onnxscript", "onnx_ir", "torch.onnx"),
        ("export/*", "loading/*onnx*.py"),
        "ONNX is known to export/ and to an ONNX input module in loading/ only",
    ),
    Restriction(
        ("sklearn",), ("estimators.py",), "scikit-learn is an extra, known to estimators only"
    ),
    Restriction(("typer", "click", "rich"), ("cli/*",), "the terminal is known to cli"),
    Restriction(
        ("tensorly", "tltorch"),
        ("mpo/interop_tensorly.py",),
        "TensorLy is known to mpo/interop_tensorly.py only",
    ),
)
NO_NETWORKS = "no torch.nn in mpo/, which works on tensors"


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything that a file imports or reads off `torch`.

    `from a import b` yields "a.b": b may be a module, and a prefix test treats both alike. The same
    for constant names given to `import_module` and `__import__`. Relative imports yield "." first.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                prefix = "." * level + (module or "")
                yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name
            case ast.Attribute(value=ast.Name(id="torch"), attr=attribute):
                yield node.lineno, f"torch.{attribute}"


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def violated_rule(path: str, name: str) -> str | None:
    """Say which rule the file at `path` (within the package) breaks by importing `name`, if any."""
    room = path.split("/")[0].removesuffix(".py")
    if room not in RANK and room not in DOORS:
        return f"{room} is not a room; give it a place in ROOMS"
    if name.startswith("."):
        return "imports are absolute"
    if is_within(name, "mpocompress"):
        target = name.split(".")[1] if "." in name else "__init__"
        if target not in RANK:
            return "a room imports from other rooms, not from the package that re-exports them"
        own_rank = DOORS.get(room, RANK.get(room, 0))
        if RANK[target] > own_rank:
            return f"{room} is below {target}, so it may not import it"
        if room == target == "tuning":
            own, wanted = path.split("/")[1], [*name.split("."), ""][2]
            if wanted in TUNING and own != "__init__.py":
                rank = TUNING.index(own) if own in TUNING else -1
                if TUNING.index(wanted) > rank:
                    return f"{own} is below {wanted}, so it may not import it"
        return None
    for restriction in RESTRICTIONS:
        if any(is_within(name, module) for module in restriction.modules) and not any(
            fnmatch(path, pattern) for pattern in restriction.allowed_in
        ):
            return restriction.rule
    if room == "mpo" and is_within(name, "torch.nn"):
        return NO_NETWORKS
    return None


def violations(package: Path) -> list[str]:
    """Return "file:line: imports name: rule" for each forbidden import below `package`."""
    found = []
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=path)
        for line, name in sorted(set(imported_names(tree))):
            rule = violated_rule(path, name)
            if rule is not None:
                found.append(f"{package.name}/{path}:{line}: imports {name}: {rule}")
    return found


def test_imports_run_downward():
    assert (PACKAGE / "mpo" / "__init__.py").exists(), "the checker looks at an empty package"
    assert not violations(PACKAGE), "\n".join(["", *violations(PACKAGE)])


def test_each_room_exists_or_is_still_to_come():
    files = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    rooms = files - {"__pycache__", "py", *DOORS}
    assert rooms <= set(RANK), f"not a room: {sorted(rooms - set(RANK))}"


PLANTED = {
    "a room above": ("mpo/cores.py", "from mpocompress.layers import MPOLinear", "mpo is below"),
    "a room above, plain import": ("mpo/cores.py", "import mpocompress.api", "mpo is below api"),
    "a room above, from the package": (
        "layers/linear.py",
        "from mpocompress import surgery",
        "layers is below surgery",
    ),
    "in a function": (
        "planning/plan.py",
        "def plan():\n    from mpocompress.api import compress",
        "planning is below api",
    ),
    "under TYPE_CHECKING": (
        "export/forms.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mpocompress.report.schema",
        "export is below report",
    ),
    "by name": (
        "report/collect.py",
        "import importlib\nimportlib.import_module('mpocompress.cli')",
        "report is below cli",
    ),
    "through the package": ("api.py", "from mpocompress import MPOLinear", "re-exports"),
    "the whole package": ("api.py", "import mpocompress", "re-exports"),
    "the command line from the package": ("__init__.py", "import mpocompress.cli", "below cli"),
    "relative": ("mpo/cores.py", "from .layout import Layout", "imports are absolute"),
    "relative, two up": ("mpo/cores.py", "from ..api import compress", "imports are absolute"),
    "a room of its own": ("utils.py", "import os", "utils is not a room"),
    "onnx": ("report/collect.py", "def size():\n    import onnx.numpy_helper", "ONNX is known"),
    "onnx in loading, elsewhere": (
        "loading/batches.py",
        "import onnx_ir",
        "ONNX is known",
    ),
    "torch.onnx": ("api.py", "import torch\ntorch.onnx.export", "ONNX is known"),
    "typer": ("api.py", "import typer", "terminal"),
    "a room above, within tuning": (
        "tuning/statistics/moments.py",
        "from mpocompress.tuning.fitting.plan import SitePlan",
        "statistics is below fitting",
    ),
    "a room of tuning from beside it": (
        "tuning/minibatches.py",
        "from mpocompress.tuning.training.train import train_",
        "is below training",
    ),
    "rich": ("tuning/sweeps/on_loss.py", "from rich.progress import track", "terminal"),
    "sklearn": (
        "tuning/training/train.py",
        "from sklearn.base import BaseEstimator",
        "scikit-learn",
    ),
    "tensorly": ("mpo/factorize.py", "from tensorly import tt_matrix", "TensorLy"),
    "torch.nn": ("mpo/cores.py", "import torch.nn as nn", "no torch.nn"),
    "torch.nn as a name": ("mpo/cores.py", "from torch import nn", "no torch.nn"),
    "torch.nn's inside": ("mpo/cores.py", "from torch.nn.functional import pad", "no torch.nn"),
    "torch.nn as an attribute": ("mpo/cores.py", "import torch\ntorch.nn.Module", "no torch.nn"),
}

ALLOWED = {
    "the same room": ("mpo/cores.py", "from mpocompress.mpo import layout"),
    "a room below": ("api.py", "from mpocompress import saving\nimport mpocompress.errors"),
    "rooms on one line": ("loading/batches.py", "from mpocompress.saving import save_state"),
    "the package's lazy names": ("__init__.py", "from mpocompress.api import compress"),
    "the start of the command line": ("__main__.py", "from mpocompress.cli import main"),
    "a room below, within tuning": (
        "tuning/healing/trial.py",
        "from mpocompress.tuning.fitting.plan import SitePlan\nimport mpocompress.tuning.padding",
    ),
    "onnx in export": ("export/graph.py", "import onnx\nimport onnxruntime"),
    "onnx as input": ("loading/onnx_input.py", "import onnx"),
    "typer in cli": ("cli/app.py", "import typer\nfrom rich.table import Table"),
    "tensorly in its module": ("mpo/interop_tensorly.py", "import tensorly"),
    "a name that only begins alike": ("mpo/cores.py", "import onnxy\nimport richer"),
    "torch.nn elsewhere": ("layers/linear.py", "from torch import nn"),
}


def plant(root: Path, path: str, source: str) -> Path:
    file = root / "mpocompress" / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    return root / "mpocompress"


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_found(tmp_path, case):
    path, source, rule = PLANTED[case]
    line = len(source.splitlines())  # each case breaks the rule on its last line
    found = violations(plant(tmp_path, path, source))
    assert len(found) == 1, found
    assert found[0].startswith(f"mpocompress/{path}:{line}: imports ")
    assert rule in found[0]


@pytest.mark.parametrize("case", ALLOWED)
def test_what_is_allowed_is_not_reported(tmp_path, case):
    assert violations(plant(tmp_path, *ALLOWED[case])) == []
