#!/usr/bin/env bash
# Print the path of a Python 3.12 interpreter that can make virtual environments.
#
# A name on PATH is not enough: a pyenv shim named python3.12 exists and fails where no 3.12 is active,
# and Debian ships python3.12 without venv. So every candidate is tried before it is named.
# Order: $PYTHON, python3.12, pyenv's versions, python3, uv.
set -euo pipefail

is_usable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

if [[ -n "${PYTHON:-}" ]]; then
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
        echo "error: PYTHON=$PYTHON does not run or is older than 3.12: name a Python 3.12 interpreter" >&2
        exit 1
    fi
    command -v "$PYTHON"
    exit 0
fi

candidates=(python3.12)
shopt -s nullglob
candidates+=("${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python)
candidates+=(python3)
if command -v uv >/dev/null 2>&1 && found=$(uv python find --no-project 3.12 2>/dev/null); then
    candidates+=("$found")
fi

for candidate in "${candidates[@]}"; do
    if is_usable "$candidate"; then
        command -v "$candidate"
        exit 0
    fi
done

cat >&2 <<'MESSAGE'
error: no Python 3.12 with its venv module was found. Install one of
  Debian, Ubuntu:  apt-get install python3.12 python3.12-venv
  pyenv:           pyenv install 3.12
  uv:              uv python install 3.12
or name an interpreter: make PYTHON=/path/to/python3.12 ...
MESSAGE
exit 1
