#!/usr/bin/env bash
# One launcher a node, started by train.sbatch through srun; see there for the variables.
trap '' USR1 TERM # from the first line on; the launcher takes them, and looks for LOG_DIR/stop
set -euo pipefail

[[ -e "$LOG_DIR/stop" ]] && exit 0

# shellcheck source=examples/slurm/caches.sh
source examples/slurm/caches.sh

# Node rank and address are given, not negotiated: c10d rendezvous may make another node the first, and
# the ranks would no longer follow the node list. When a rank fails, the others of its node have a minute to
# say what they know.
exec "$PYTHON" -m megatron_exact.commands.node \
    --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$GPUS_PER_NODE" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 \
    --signals-to-handle SIGINT --shutdown-timeout 60 \
    --no-python examples/slurm/rank.sh "$@"
