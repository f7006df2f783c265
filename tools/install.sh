#!/usr/bin/env bash
# Make or update the virtual environment: tools/install.sh FOLDER
#
# Variables: PYTHON (interpreter), CONSTRAINTS (versions file), TORCH_INDEX (package index for torch only).
# uv installs in seconds what pip takes minutes for; where uv cannot be had, pip does the same job.
set -euo pipefail

folder=${1:?usage: tools/install.sh FOLDER}
: "${CONSTRAINTS:=constraints.txt}"
here=$(dirname "${BASH_SOURCE[0]}")

# An environment that was linked to belongs to another checkout, whose packages would be cleared.
if [[ -L $folder ]]; then
    echo "error: $folder is a link to $(readlink "$folder"): remove the link to get an environment here" >&2
    exit 1
fi
# A folder that was moved keeps scripts that name its old place.
if ! "$folder/bin/python" -c 'import pip' 2>/dev/null || ! grep -qsF "$PWD/$folder/bin" "$folder/bin/pip"; then
    python=$("$here/find_python.sh")
    echo "set-up: $folder with $("$python" --version) ($python)"
    "$python" -m venv --clear "$folder"
fi

"$folder/bin/python" -m pip install --quiet --constraint "$CONSTRAINTS" uv ||
    echo "set-up: uv could not be installed, going on with pip (slower)" >&2

install() {
    if [[ -x "$folder/bin/uv" ]]; then
        "$folder/bin/uv" pip install --python "$folder/bin/python" --constraint "$CONSTRAINTS" "$@"
    else
        "$folder/bin/python" -m pip install --constraint "$CONSTRAINTS" "$@"
    fi
}

if [[ -n "${TORCH_INDEX:-}" ]]; then
    echo "set-up: torch from $TORCH_INDEX"
    if [[ -x "$folder/bin/uv" ]]; then
        # best-match: of "2.13.0" elsewhere and "2.13.0+cpu" there the latter is the higher version
        install --index "$TORCH_INDEX" --index-strategy unsafe-best-match torch
    else
        install --extra-index-url "$TORCH_INDEX" torch
    fi
fi
install --editable '.[dev]'
echo "set-up: done"
