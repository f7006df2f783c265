# shellcheck shell=bash
# What compilers and libraries keep goes to a folder of the node: thousands of processes that share one on a
# network file system wait for its locks. Sourced by node.sh and shard.sh; what is set already is kept. HF_HOME
# is left alone: data sets that were downloaded on a login node are found where they are.
local_cache="${NODE_CACHE:-}"
if [[ -z "$local_cache" ]]; then
    local_cache="${TMPDIR:-/tmp}/megatron_exact-cache-$(id -u)"
    mkdir -m 700 "$local_cache" 2>/dev/null || true # another process of the node may be first
    if [[ -L "$local_cache" || ! -d "$local_cache" || ! -O "$local_cache" ]]; then
        # everybody may write to /tmp: kernels and bytecode in a folder of somebody else would be run as ours
        echo "$local_cache is not a folder of this user: compiled files go to a new one" >&2
        local_cache="$(mktemp -d "$local_cache-XXXXXX")"
    fi
    chmod 700 "$local_cache"
fi
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$local_cache/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$local_cache/inductor}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$local_cache/torch_extensions}"
# Python ignores the bytecode of an image, which is compiled when it is built, where this prefix is set.
if [[ -z "${PYTHONPYCACHEPREFIX:-}" && -z "${IMAGE:-}" ]]; then
    export PYTHONPYCACHEPREFIX="$local_cache/pycache"
    # It keeps bytecode out of the environment, and so does the prefix; but with it each rank of each start
    # compiles thousands of modules.
    unset PYTHONDONTWRITEBYTECODE
fi
