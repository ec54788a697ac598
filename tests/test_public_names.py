"""What users may rely on: names, command-line flags and exit codes. A change here is a decision."""

import inspect
from dataclasses import fields

import pytest
import typer
from typer.main import get_command

import mpocompress
from mpocompress import errors
from mpocompress.cli import app
from mpocompress.pipeline import Request
from mpocompress.pipeline.request import _DECIDED_BY_PLANS
from mpocompress.planning import PlanOptions

PUBLIC = frozenset(
    {
        "MPO",
        "CompressionReport",
        "CompressionResult",
        "Layout",
        "MPOClassifier",
        "MPOCompressError",
        "MPOLinear",
        "MPORegressor",
        "Plan",
        "TensorContractionLayer",
        "TensorRegressionLayer",
        "__version__",
        "analysis",
        "compress",
        "densify",
        "distill",
        "export_onnx",
        "load",
        "plan",
        "save",
        "sweep",
        "tensorize",
        "train",
        "verify",
    }
)

OPTIONS = {
    "compress": frozenset(
        {
            "--batch",
            "--bond-dim",
            "--form",
            "--quantize",
            "--ratio",
            "--max-size",
            "--max-error",
            "--max-drop",
            "--objective",
            "--of",
            "--data",
            "--distill",
            "--dry-run",
            "--exclude",
            "--force",
            "--resume",
            "--include",
            "--input",
            "--json",
            "--layout",
            "--model",
            "--no-onnx",
            "--output",
            "--plan",
            "--seed",
            "--sites",
            "--sweeps",
            "--trust-pickle",
            "-o",
        }
    ),
    "inspect": frozenset(
        {"--error", "--exclude", "--include", "--json", "--model", "--trust-pickle"}
    ),
    "report": frozenset({"--json"}),
    "export": frozenset(
        {
            "--batch",
            "--data",
            "--force",
            "--form",
            "--input",
            "--json",
            "--measure",
            "--model",
            "--output",
            "--quantize",
            "--seed",
            "--source",
            "--trust-pickle",
            "-o",
        }
    ),
    "verify": frozenset(
        {
            "--against",
            "--cores",
            "--data",
            "--json",
            "--model",
            "--seed",
            "--tolerance",
            "--trust-pickle",
        }
    ),
    "bench": frozenset({"--against", "--batch", "--json", "--length", "--repeats", "--threads"}),
    "densify": frozenset({"--force", "--json", "--output", "-o"}),
}


def test_public_names():
    assert set(mpocompress.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(mpocompress, name) is not None
    assert set(dir(mpocompress)) >= PUBLIC


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = mpocompress.compres


def test_command_line_options():
    commands = get_command(app).commands
    found = {
        name: frozenset(
            option
            for parameter in command.params
            if not isinstance(parameter, typer.core.TyperArgument)
            for option in parameter.opts
        )
        for name, command in commands.items()
    }
    assert {name: options - {"--help"} for name, options in found.items()} == OPTIONS


def test_every_error_is_ours_and_a_builtin():
    found = [
        cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if cls is not errors.MPOCompressError
    ]
    assert found
    for cls in found:
        assert issubclass(cls, errors.MPOCompressError)
        assert len([base for base in cls.__mro__ if base.__module__ == "builtins"]) > 3, cls
        assert cls.exit_code in (1, 2, 3)


def test_exit_codes():
    assert errors.LoadError.exit_code == 2
    assert errors.ExportError.exit_code == 1
    assert errors.ParityError.exit_code == 3


def test_options_of_a_plan_are_the_same_wherever_they_are_listed():
    """Signatures, their object and the command line name each option: equally, with one default."""
    of_plan, of_compress = (
        {name: p.default for name, p in inspect.signature(call).parameters.items()}
        for call in (mpocompress.plan, mpocompress.compress)
    )
    shared = of_plan.keys() & of_compress.keys()
    assert of_plan.keys() - shared == set()
    assert of_compress.keys() - shared == {"plan", "source", "state"}
    assert all(of_plan[name] == of_compress[name] for name in shared - {"model"})
    options = {field.name: field.default for field in fields(PlanOptions)}
    del options["healed"]  # follows from distill
    assert options.items() <= of_plan.items()
    request = {field.name: field.default for field in fields(Request)}
    asked = Request(bond_dim=4).plan_options()
    assert asked == {**{name: options[name] for name in asked}, "bond_dim": 4}
    assert asked.keys() <= request.keys()
    assert {request[name] == options[name] for name in asked} == {True}
    # In Python and in plan files alone.
    assert options.keys() - asked.keys() == {"if_smaller", "gauge"}
    # What decides a plan is refused beside one; rows of a batch are of the forms in the file, too.
    assert {*_DECIDED_BY_PLANS} == asked.keys() - {"batch", "quantize"}
    command = get_command(app).commands["compress"]
    defaults = {parameter.name: parameter.default for parameter in command.params}
    for name in asked:
        assert (defaults[name] or None) == (options[name] or None), name
