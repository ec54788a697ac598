# shellcheck shell=bash
# Sourced by examples/quickstart.sh and tests/run.sh. After
#     ensure_venv NAME REQUIREMENT...
# .venv at the repository's root holds mpocompress (editable) and the REQUIREMENTs, in the versions of
# constraints.txt, and $venv_python is its interpreter. Nothing is installed again while
# pyproject.toml, constraints.txt, this file, the place and the REQUIREMENTs are what they were.
#
# torch: constraints.txt pins its version. Where pip finds both the CPU and the CUDA build of that
# version (Linux, PyPI), the CPU build is some GB smaller:
#     export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

repo_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv_python="$repo_root/.venv/bin/python"

# Print "3.11" for the interpreter $1; print nothing where it does not run (pyenv's shims may not).
_python_version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null || true
}

# True for version $1 if it is 3.11 or newer.
_is_new_enough() {
    [[ "$1" =~ ^([0-9]+)\.([0-9]+)$ ]] || return 1
    ((BASH_REMATCH[1] > 3 || (BASH_REMATCH[1] == 3 && BASH_REMATCH[2] >= 11)))
}

# Print the first usable interpreter, or say what was found and fail.
_find_python() {
    local candidate version found=""
    for candidate in python3.11 python3; do
        command -v "$candidate" >/dev/null || continue
        version="$(_python_version "$candidate")"
        if _is_new_enough "$version"; then
            echo "$candidate"
            return
        fi
        found+=" $candidate is ${version:-not working};"
    done
    echo "error: Python 3.11 or newer is needed, but${found:- no python3.11 or python3 is on PATH;}" \
        "install Python 3.11 (python.org, pyenv, or your package manager) and run this again." >&2
    return 2
}

# Print a checksum of everything that decides what gets installed.
_requirements_checksum() {
    "$venv_python" - "$repo_root" "$@" <<'PYTHON'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
checksum = hashlib.sha256(repr([sys.version, *sys.argv[1:]]).encode())
for name in ("pyproject.toml", "constraints.txt", "examples/venv.sh"):
    checksum.update((root / name).read_bytes())
print(checksum.hexdigest())
PYTHON
}

_pip_install() {
    "$venv_python" -m pip install --quiet --no-input --disable-pip-version-check \
        --constraint "$repo_root/constraints.txt" "$@" </dev/null
}

ensure_venv() {
    local name="$1" stamp="$repo_root/.venv/installed-for-$1.sha256" python checksum
    shift
    if ! _is_new_enough "$(_python_version "$venv_python")"; then
        python="$(_find_python)" || return
        echo "making .venv with $python" >&2
        # --clear: what is there, if anything, has no working interpreter (an older or moved .venv).
        "$python" -m venv --clear "$repo_root/.venv" || return
    fi
    checksum="$(_requirements_checksum "$@")" || return
    if [[ "$(cat "$stamp" 2>/dev/null)" == "$checksum" ]]; then
        return
    fi
    echo "installing into .venv what $name needs (the first time takes minutes)" >&2
    # torch first and by its pinned version: as a dependency, pip could begin with another build.
    _pip_install "$(grep -E '^torch==' "$repo_root/constraints.txt")" || return
    _pip_install "$@" || return
    echo "$checksum" >"$stamp"
}
