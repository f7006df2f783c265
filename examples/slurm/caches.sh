# shellcheck shell=bash
# What compilers and libraries keep goes to a folder of the node: thousands of processes that share one on a
# network file system wait for its locks. Sourced by node.sh and shard.sh; what is set already is kept.
local_cache="${NODE_CACHE:-${TMPDIR:-/tmp}/megatron_exact-cache-$(id -u)}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$local_cache/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$local_cache/inductor}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$local_cache/torch_extensions}"
export PYTHONPYCACHEPREFIX="${PYTHONPYCACHEPREFIX:-$local_cache/pycache}"
export HF_HOME="${HF_HOME:-$local_cache/huggingface}"
