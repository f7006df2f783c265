#!/usr/bin/env bash
# Make the environment of `make test-integrations`: tools/install_integrations.sh FOLDER PYTHON
#
# The training stacks of megatron_exact.integrations beside the project's own packages. PYTHON is the
# interpreter of the project's environment; FOLDER sees its packages.
set -euo pipefail

folder=${1:?usage: tools/install_integrations.sh FOLDER PYTHON}
python=${2:?usage: tools/install_integrations.sh FOLDER PYTHON}
requirements=$(dirname "${BASH_SOURCE[0]}")/integrations.txt

[[ ! -L $folder ]] || {
    echo "error: $folder is a link to $(readlink "$folder"): remove the link" >&2
    exit 1
}
echo "set-up: $folder with $(sed -n 's/==/ /p' "$requirements" | head -n 4 | paste -sd, | sed 's/,/, /g')"
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m venv --clear "$folder"
own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# addsitedir: the project itself is a .pth file in there
echo "import site; site.addsitedir('$packages')" >"$own/project.pth"
"$folder/bin/python" -m pip install --quiet --no-deps --requirement "$requirements"
TORCHDYNAMO_DISABLE=1 "$folder/bin/python" -c 'import olmo_core.data, torchtitan.components.loss, trl' >/dev/null
echo "set-up: done"
