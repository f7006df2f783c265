#!/usr/bin/env bash
# One torchrun agent a node, started by train.sbatch through srun; see there for the variables.
set -euo pipefail

# Node rank and address are given, not negotiated: c10d rendezvous may make another node the first, and
# the ranks would no longer follow the node list. torchrun passes only the signals named here on to its
# processes, and by default kills them 30 s later, too early for a large save.
exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$GPUS_PER_NODE" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout "$SHUTDOWN_SECONDS" \
    --no-python examples/slurm/rank.sh "$@"
