#!/usr/bin/env bash
# Format, lint, types and all tests, in the same .venv as examples/quickstart.sh makes.
# Arguments go on to pytest: bash tests/run.sh -k layout
# Stops at the first step that fails, with its exit code.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/venv.sh"
cd "$repo_root"

ensure_venv tests --editable '.[test]'

"$venv_python" -m ruff format --check .
"$venv_python" -m ruff check .
"$venv_python" -m mypy

# One process a core, each with one thread: most tests multiply small matrices, where a pool of
# threads in every process only waits for its turn (measured on two cores: twice as long).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$venv_python" -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal "$@" </dev/null
