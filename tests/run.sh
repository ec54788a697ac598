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
exec "$venv_python" -m pytest "$@" </dev/null
