"""The package and its help answer before anything heavy is imported: looked up, not timed."""

import json
import subprocess
import sys

import pytest

HEAVY = frozenset(
    {
        "torch",
        "numpy",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "onnx_ir",
        "tensorly",
        "matplotlib",
        "transformers",
        "safetensors",
        "jinja2",
    }
)

REPORT_MODULES = """
import json, sys
loaded = sorted({name.partition(".")[0] for name in sys.modules})
print("loaded:" + json.dumps(loaded))
"""


def modules_loaded_by(statements: str) -> set[str]:
    """Run `statements` in a fresh interpreter and return the top-level modules loaded after it."""
    finished = subprocess.run(
        [sys.executable, "-c", statements + REPORT_MODULES],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    last_line = finished.stdout.splitlines()[-1]
    return set(json.loads(last_line.removeprefix("loaded:")))


def test_import_loads_nothing_heavy():
    loaded = modules_loaded_by("import mpocompress")
    assert "mpocompress" in loaded
    assert sorted(loaded & (HEAVY | {"typer", "rich"})) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["compress", "--help"],
        ["inspect", "--help"],
        ["verify", "--help"],
        ["bench", "--help"],
        ["export", "--help"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_the_command_lines_help_loads_nothing_heavy(arguments):
    loaded = modules_loaded_by(
        f"""
import sys
sys.argv = ["mpocompress", *{arguments}]
from mpocompress.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    )
    assert "typer" in loaded
    assert sorted(loaded & HEAVY) == []


def test_a_public_name_loads_what_it_needs_on_first_use():
    loaded = modules_loaded_by("import mpocompress\nmpocompress.Layout")
    unneeded = {"onnx", "onnxruntime", "typer", "tensorly", "matplotlib", "transformers"}
    assert "torch" in loaded
    assert sorted(loaded & unneeded) == []
