#!/usr/bin/env bash
# One process of a job array, started by evaluate.sbatch and tokenize.sbatch through srun: it does its shard.
set -euo pipefail

# shellcheck source=examples/slurm/caches.sh
source examples/slurm/caches.sh
if [[ -n "${GPUS_PER_NODE:-}" ]]; then
    export CUDA_VISIBLE_DEVICES="$SLURM_LOCALID"
fi
exec "$PYTHON" -m megatron_exact "$@" \
    --shard "$((${SLURM_ARRAY_TASK_ID:-0} * SLURM_NTASKS + SLURM_PROCID))/$SHARDS"
