#!/usr/bin/env bash
# One launcher a node, started by train.sbatch through srun; see there for the variables.
trap '' USR1 TERM # from the first line on; the launcher takes them, and looks for LOG_DIR/stop
set -euo pipefail

[[ -e "$LOG_DIR/stop" ]] && exit 0

# What compilers and libraries keep goes to a folder of the node: thousands of ranks that share one on a
# network file system wait for its locks. What is set already is kept.
local="${NODE_CACHE:-${TMPDIR:-/tmp}/megatron_exact-cache-$(id -u)}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$local/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$local/inductor}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$local/torch_extensions}"
export PYTHONPYCACHEPREFIX="${PYTHONPYCACHEPREFIX:-$local/pycache}"
export HF_HOME="${HF_HOME:-$local/huggingface}"

# Node rank and address are given, not negotiated: c10d rendezvous may make another node the first, and
# the ranks would no longer follow the node list. When a rank fails, the others of its node have a minute to
# say what they know.
exec "$PYTHON" -m megatron_exact.commands.node \
    --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$GPUS_PER_NODE" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 \
    --signals-to-handle SIGINT --shutdown-timeout 60 \
    --no-python examples/slurm/rank.sh "$@"
