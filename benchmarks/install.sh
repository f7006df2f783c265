#!/usr/bin/env bash
# Make the environment of the benchmarks: benchmarks/install.sh FOLDER PYTHON
#
# PYTHON is the interpreter of the project's own environment; uv beside it is used where it is there.
# Variables: BENCH_CONSTRAINTS (versions file), TORCH_INDEX (package index for torch only).
set -euo pipefail

folder=${1:?usage: benchmarks/install.sh FOLDER PYTHON}
python=${2:?usage: benchmarks/install.sh FOLDER PYTHON}
: "${BENCH_CONSTRAINTS:=benchmarks/constraints.txt}"
uv=$(dirname "$python")/uv

echo "set-up of the benchmarks: $folder"
"$python" -m venv --clear "$folder"

install() {
    if [[ -x "$uv" ]]; then
        "$uv" pip install --quiet --python "$folder/bin/python" --constraint "$BENCH_CONSTRAINTS" "$@"
    else
        "$folder/bin/python" -m pip install --quiet --constraint "$BENCH_CONSTRAINTS" "$@"
    fi
}

if [[ -n "${TORCH_INDEX:-}" ]]; then
    if [[ -x "$uv" ]]; then
        # best-match: of "2.13.0" elsewhere and "2.13.0+cpu" there the latter is the higher version
        install --index "$TORCH_INDEX" --index-strategy unsafe-best-match torch
    else
        install --extra-index-url "$TORCH_INDEX" torch
    fi
fi
install --requirement benchmarks/requirements.txt
install --no-deps --editable .
