#!/usr/bin/env bash
# Make the environment of `make test-te`: tools/install_transformer_engine.sh FOLDER PYTHON
#
# Transformer Engine for the null CUDA device, on a machine that has neither a GPU nor nvcc. Its kernels come
# compiled in a wheel; its binding to torch is a source package of 33 C++ files, which g++ compiles against the
# headers of NVIDIA's Python packages. PYTHON is the interpreter of the project's own environment, with the
# CUDA build of torch; FOLDER sees its packages. What has been compiled is kept in FOLDER-build, so a run that
# was interrupted continues.
#
# Variables: TE_JOBS (compilers side by side; each takes 2 GB of memory; default: the number of cores).
set -euo pipefail

folder=${1:?usage: tools/install_transformer_engine.sh FOLDER PYTHON}
python=${2:?usage: tools/install_transformer_engine.sh FOLDER PYTHON}
: "${TE_JOBS:=$(nproc)}"
# torch's headers take most of the time of a file, so a few translation units include all files.
PARTS=2
here=$(dirname "${BASH_SOURCE[0]}")
requirements=$here/transformer_engine.txt
version=$(sed -n 's/^transformer-engine==//p' "$requirements")
build=$folder-build

fail() {
    echo "error: $*" >&2
    exit 1
}

[[ ! -L $folder ]] || fail "$folder is a link to $(readlink "$folder"): remove the link"
command -v g++ >/dev/null || fail "no g++: install a C++ compiler (for example apt-get install g++)"
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
grep -qs "^cuda.*'13\.0'" "$packages/torch/version.py" ||
    fail "$packages has no torch for CUDA 13.0: make setup without TORCH_INDEX installs it"

echo "set-up: $folder with Transformer Engine $version"
if ! "$folder/bin/python" -c 'import pip' 2>/dev/null || ! grep -qsF "$PWD/$folder/bin" "$folder/bin/pip"; then
    "$python" -m venv --clear "$folder"
fi
own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# addsitedir: the project itself is a .pth file in there
echo "import site; site.addsitedir('$packages')" >"$own/project.pth"
# The packages name each other and torch; all that is needed is in the list or in the project's environment.
"$folder/bin/python" -m pip install --quiet --no-deps --requirement "$requirements"

sources=$build/transformer_engine_torch-$version
if [[ ! -d $sources ]]; then
    mkdir -p "$build/download"
    # The variables keep its set-up script, which pip runs for the name and version, from asking nvcc.
    NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 NVTE_CUDA_ARCHS=90 \
        "$folder/bin/python" -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: \
        --dest "$build/download" "transformer-engine-torch==$version"
    tar -xzf "$build/download/transformer_engine_torch-$version.tar.gz" -C "$build/download"
    mv "$build/download/transformer_engine_torch-$version" "$sources"
fi

# -O0: it launches kernels and is not waited for; optimizing takes twice as long.
compile=(g++ -std=c++20 -O0 -g0 -fPIC -fvisibility=hidden -w)
compile+=(-DTORCH_API_INCLUDE_EXTENSION_H -DTORCH_EXTENSION_NAME=transformer_engine_torch)
for include in \
    "$own/nvidia/cu13/include" "$own/nvidia/cu13/include/cccl" "$packages"/nvidia/{cu13,cudnn,nccl}/include \
    "$sources"/common_headers{,/common,/common/include} "$sources/csrc" \
    "$packages"/torch/include{,/torch/csrc/api/include} \
    "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')"; do
    [[ -d $include ]] || fail "$include is missing: install the project's environment again (make setup)"
    compile+=("-I$include")
done

# Another compiler, torch, or place makes other objects.
g++ --version | head -n 1 >"$build/key.new"
printf '%s\n' "$PARTS" "${compile[@]}" "$(cat "$packages/torch/version.py")" >>"$build/key.new"
if ! cmp --quiet "$build/key.new" "$build/key"; then
    rm -rf "$build/objects"
    mv "$build/key.new" "$build/key"
fi

mapfile -t files < <(find "$sources/csrc" -name '*.cpp' | sort)
todo=()
objects=()
for ((part = 0; part < PARTS; part++)); do
    object=$build/objects/part$part.o
    objects+=("$object")
    [[ -f $object ]] && continue
    mkdir -p "$build/objects"
    todo+=("$build/objects/part$part.cpp" "$object")
    for ((i = part; i < ${#files[@]}; i += PARTS)); do
        echo "#include \"$(realpath "${files[i]}")\""
    done >"$build/objects/part$part.cpp"
done
if ((${#todo[@]})); then
    echo "set-up: compiling ${#files[@]} C++ files in $PARTS parts, $((${#todo[@]} / 2)) to do; some minutes"
    # shellcheck disable=SC2016 # the inner shell expands
    printf '%s\0' "${todo[@]}" | xargs -0 -n 2 -P "$TE_JOBS" bash -c '
        object=${*: -1} source=${*: -2:1}
        "${@:1:$#-2}" -c "$source" -o "$object.part" && mv "$object.part" "$object" &&
            echo "  $(basename "$object")"' compile "${compile[@]}"
fi

name=transformer_engine_torch$("$folder/bin/python" -c \
    'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
g++ -shared "${objects[@]}" -L"$packages/torch/lib" -Wl,--no-as-needed \
    -lc10 -lc10_cuda -ltorch -ltorch_cpu -ltorch_cuda -ltorch_python -o "$build/$name"
mv "$build/$name" "$own/$name"
# Transformer Engine looks for CUDA's libraries in its own environment alone.
mkdir -p "$own/nvidia/cu13/lib"
ln -sfn "$packages"/nvidia/cu13/lib/*.so* "$own/nvidia/cu13/lib/"
for library in cudnn nccl; do
    ln -sfn "$packages/nvidia/$library" "$own/nvidia/$library"
done
# Transformer Engine asks for the metadata of a package that pip installed.
information=$own/transformer_engine_torch-$version.dist-info
mkdir -p "$information"
cp "$sources/PKG-INFO" "$information/METADATA"

"$folder/bin/python" - <<'PYTHON'
from megatron_exact.rehearsal import device

device.activate()
import torch  # loads NCCL
import transformer_engine.pytorch as te

print(f"set-up: done; {te.__name__} with torch {torch.__version__} can be imported on the null device")
PYTHON
