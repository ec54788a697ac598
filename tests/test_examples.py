"""The examples as a user runs them: as processes, on files, judged by what they write and print."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "examples" / "digits"


def run(command, **options):
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **options.pop("env", {})},
        stdin=subprocess.DEVNULL,
        **options,
    )


def train(out, *arguments):
    finished = run([sys.executable, DIGITS / "train.py", "--out", out, *arguments])
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def evaluate(out, *arguments):
    return run([sys.executable, DIGITS / "evaluate.py", "--out", out, *arguments])


@pytest.fixture(scope="module")
def barely_trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    train(out, "--steps", "20")
    return out


@pytest.fixture(scope="module")
def compressed(barely_trained):
    # A copy, so that other tests see only what train.py wrote.
    out = barely_trained.with_name(f"{barely_trained.name}-compressed")
    shutil.copytree(barely_trained, out)
    finished = run(
        [
            *(sys.executable, "-m", "mpocompress", out / "model.pt"),
            *("--bond-dim", "16", "-o", out / "model-mpo"),
        ]
    )
    assert finished.returncode == 0, finished.stderr
    return out


class TestTraining:
    def test_the_module_opens_safely(self, barely_trained):
        with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.ReLU]):
            model = torch.load(barely_trained / "model.pt", weights_only=True)
        shapes = [tuple(part.weight.shape) for part in model if isinstance(part, nn.Linear)]
        assert shapes == [(1024, 784), (1024, 1024), (10, 1024)]
        assert not model.training

    def test_the_data_files_hold_named_arrays(self, barely_trained):
        with np.load(barely_trained / "heldout.npz") as held_out:
            assert sorted(held_out) == ["input", "labels"]
            assert held_out["input"].shape == (1000, 784)
            assert held_out["input"].dtype == np.float32
            assert held_out["input"].min() == 0.0
            assert held_out["input"].max() == 1.0
            assert np.bincount(held_out["labels"]).tolist() == [100] * 10
        with np.load(barely_trained / "calibration.npz") as calibration:
            assert sorted(calibration) == ["input"]
            assert calibration["input"].shape == (500, 784)

    def test_calibration_images_are_not_held_out(self, barely_trained):
        with np.load(barely_trained / "heldout.npz") as file:
            held_out = {image.tobytes() for image in file["input"]}
        with np.load(barely_trained / "calibration.npz") as file:
            assert not held_out & {image.tobytes() for image in file["input"]}

    def test_the_same_seed_gives_the_same_files(self, barely_trained, tmp_path):
        train(tmp_path, "--steps", "20")
        for name in ("heldout.npz", "calibration.npz"):
            with np.load(barely_trained / name) as first, np.load(tmp_path / name) as second:
                assert all(np.array_equal(first[key], second[key]) for key in first)
        with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.ReLU]):
            first = torch.load(barely_trained / "model.pt", weights_only=True).state_dict()
            second = torch.load(tmp_path / "model.pt", weights_only=True).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_another_seed_holds_out_other_images(self, barely_trained, tmp_path):
        train(tmp_path, "--steps", "1", "--seed", "1")
        with (
            np.load(barely_trained / "heldout.npz") as first,
            np.load(tmp_path / "heldout.npz") as second,
        ):
            assert not np.array_equal(first["input"], second["input"])

    def test_nothing_else_is_left_behind(self, barely_trained):
        names = sorted(path.name for path in barely_trained.iterdir())
        assert names == ["calibration.npz", "heldout.npz", "model.pt"]

    def test_no_steps_are_refused(self, tmp_path):
        finished = run([sys.executable, DIGITS / "train.py", "--out", tmp_path, "--steps", "0"])
        assert finished.returncode == 2
        assert "--steps is 0" in finished.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_hand_written_loop_heals(barely_trained):
    arguments = ["--bond-dim", "2", "--sweeps", "1", "--images", "400", "--epochs", "2"]
    finished = run([sys.executable, DIGITS / "heal.py", "--out", barely_trained, *arguments])
    assert finished.returncode == 0, finished.stderr
    before, after = (
        float(part) for part in re.findall(r"(?:compressed|epochs:) ([\d.]+)%", finished.stdout)
    )
    assert after > before


@pytest.mark.onnx
class TestEvaluation:
    def test_the_table_is_for_readers(self, compressed):
        finished = evaluate(compressed)
        assert finished.returncode == 0, finished.stderr
        assert "1,000 held-out images" in finished.stdout
        assert "ONNX Runtime and PyTorch agree" in finished.stdout

    def test_a_disagreement_is_an_exit_code(self, compressed, tmp_path):
        other = tmp_path / "other"
        train(other, "--steps", "1", "--seed", "1")
        finished = run(
            [
                *(sys.executable, "-m", "mpocompress", other / "model.pt"),
                *("--bond-dim", "16", "-o", other / "model-mpo"),
            ]
        )
        assert finished.returncode == 0, finished.stderr
        mixed = tmp_path / "mixed"
        shutil.copytree(compressed / "model-mpo", mixed)
        shutil.copy(other / "model-mpo" / "model.onnx", mixed / "model.onnx")
        finished = evaluate(compressed, "--compressed", mixed)
        assert finished.returncode == 3
        assert "DISAGREE" in finished.stdout

    def test_a_missing_result_says_what_to_run(self, barely_trained):
        finished = evaluate(barely_trained)
        assert finished.returncode == 2
        assert "quickstart.sh" in finished.stderr

    @pytest.mark.slow
    def test_a_trained_classifier_survives_bond_dim_16(self, tmp_path):
        """The promise of the quickstart: 28x fewer weights, 20x smaller file, at most 2 points."""
        assert "of 1,000 held-out images right" in train(tmp_path)
        result = tmp_path / "model-mpo"
        finished = run(
            [
                *(sys.executable, "-m", "mpocompress", tmp_path / "model.pt"),
                *("--bond-dim", "16", "--data", tmp_path / "calibration.npz", "-o", result),
            ]
        )
        assert finished.returncode == 0, finished.stderr
        report = json.loads((result / "report.json").read_text())
        assert report["totals"]["parameters"]["layers"]["ratio"] >= 28
        assert (result / "report.html").stat().st_size > 0

        finished = evaluate(tmp_path, "--json")
        assert finished.returncode == 0, finished.stderr
        facts = json.loads(finished.stdout)
        assert facts["dense_accuracy"] >= 0.93
        assert facts["onnx_accuracy"] >= facts["dense_accuracy"] - 0.02
        assert facts["onnx_ratio"] >= 20
        assert facts["agreement_with_pytorch"] == 1.0
        assert facts["max_logit_difference"] <= 1e-4


# A stand-in for an interpreter: records what pip is asked for, installs nothing.
RECORDING_PYTHON = f"""#!/usr/bin/env bash
if [[ "$1 $2" == "-m pip" ]]; then
    echo "${{*:4}}" >>"$PIP_LOG"
    exit "${{PIP_EXIT_CODE:-0}}"
fi
exec {sys.executable} "$@"
"""

ENSURE = "set -euo pipefail; source examples/venv.sh; ensure_venv quickstart --editable . mlxtend"


def write_executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class TestEnvironment:
    """examples/venv.sh, which quickstart.sh and tests/run.sh source, in a repository of its own."""

    @pytest.fixture
    def repository(self, tmp_path):
        root = tmp_path / "a clone"  # with a space, as home directories may have
        (root / "examples").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "examples/venv.sh"):
            shutil.copy(ROOT / name, root / name)
        return root

    def ensure(self, repository, env=None):
        log = repository / "pip.log"
        finished = run(
            ["bash", "-c", ENSURE], cwd=repository, env={"PIP_LOG": str(log), **(env or {})}
        )
        calls = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return finished, calls

    @pytest.fixture
    def installed(self, repository):
        write_executable(repository / ".venv" / "bin" / "python", RECORDING_PYTHON)
        finished, calls = self.ensure(repository)
        assert finished.returncode == 0, finished.stderr
        assert calls
        return repository

    def test_torch_comes_first_and_pinned(self, repository):
        write_executable(repository / ".venv" / "bin" / "python", RECORDING_PYTHON)
        finished, calls = self.ensure(repository)
        assert finished.returncode == 0, finished.stderr
        assert len(calls) == 2
        assert calls[0].endswith(" torch==2.13.0")
        assert calls[1].endswith(" --editable . mlxtend")
        assert all(f"--constraint {repository}/constraints.txt" in call for call in calls)
        assert all("--quiet" in call for call in calls)

    def test_a_second_run_installs_nothing(self, installed):
        finished, calls = self.ensure(installed)
        assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
        assert calls == []

    @pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
    def test_a_change_of_requirements_installs_again(self, installed, name):
        with (installed / name).open("a") as file:
            file.write("\n# a change\n")
        assert len(self.ensure(installed)[1]) == 2
        assert self.ensure(installed)[1] == []

    def test_a_moved_repository_installs_again(self, installed):
        moved = installed.rename(installed.with_name("elsewhere"))
        assert len(self.ensure(moved)[1]) == 2

    def test_a_failed_installation_stops_with_its_exit_code_and_is_tried_again(self, repository):
        write_executable(repository / ".venv" / "bin" / "python", RECORDING_PYTHON)
        finished, calls = self.ensure(repository, {"PIP_EXIT_CODE": "7"})
        assert finished.returncode == 7
        assert len(calls) == 1
        assert len(self.ensure(repository)[1]) == 2

    def test_an_old_python_is_refused_by_version(self, repository, tmp_path):
        # pyenv's shims exist for versions that are not installed, and fail when they are run.
        write_executable(tmp_path / "bin" / "python3.11", "#!/usr/bin/env bash\nexit 127\n")
        write_executable(tmp_path / "bin" / "python3", "#!/usr/bin/env bash\necho 3.9\n")
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        finished, calls = self.ensure(repository, {"PATH": path})
        assert finished.returncode == 2
        assert "Python 3.11 or newer is needed" in finished.stderr
        assert "python3.11 is not working; python3 is 3.9;" in finished.stderr
        assert calls == []
        assert not (repository / ".venv").exists()

    @pytest.mark.parametrize("version", ["3.11", "3.14", "4.0"])
    def test_newer_versions_are_taken(self, repository, tmp_path, version):
        # Makes a .venv whose interpreter records what pip is asked for.
        write_executable(tmp_path / "recording-python", RECORDING_PYTHON)
        write_executable(
            tmp_path / "bin" / "python3.11",
            f"""#!/usr/bin/env bash
if [[ "$1" == "-c" ]]; then echo {version}; exit; fi
[[ "$1 $2 $3" == "-m venv --clear" ]] || exit 1
mkdir -p "$4/bin" && cp "{tmp_path}/recording-python" "$4/bin/python"
""",
        )
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        finished, calls = self.ensure(repository, {"PATH": path})
        assert finished.returncode == 0, finished.stderr
        assert len(calls) == 2


@pytest.mark.parametrize("script", ["examples/quickstart.sh", "examples/venv.sh", "tests/run.sh"])
def test_scripts_are_valid_bash(script):
    finished = run(["bash", "-n", ROOT / script])
    assert (finished.returncode, finished.stderr) == (0, "")


def test_the_tour_of_entanglement_draws_its_pictures(tmp_path):
    finished = run(
        [
            *(sys.executable, ROOT / "examples" / "entanglement.py"),
            *("--out", tmp_path, "--epochs", "2", "--steps", "3"),
        ]
    )
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "profile.png",
        "spectra.png",
        "state.png",
        "training.png",
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.iterdir())
    accuracy = float(re.search(r"not trained on: ([\d.]+)", finished.stdout)[1])
    assert accuracy > 0.5
    assert finished.stdout.count("mpo    2x2,2x4,4x2,2x4,4x2,2x2") == 2
