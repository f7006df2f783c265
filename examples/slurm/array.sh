# shellcheck shell=bash
# The number of shards of a job array, SHARDS; sourced by evaluate.sbatch and tokenize.sbatch, which say how
# many processes a task has. Shards are counted from 0, so an array that is not 0-N cannot tell how many it has.
shards_of_array() { # processes of a task
    local tasks="$((${SLURM_ARRAY_TASK_MAX:-0} + 1))"
    if [[ -z "${SHARDS:-}" ]]; then
        if ((${SLURM_ARRAY_TASK_MIN:-0} != 0 || ${SLURM_ARRAY_TASK_COUNT:-$tasks} != tasks)); then
            echo "the array is not 0-N (tasks ${SLURM_ARRAY_TASK_MIN:-0} to $SLURM_ARRAY_TASK_MAX): give --array" \
                "0-N, or set SHARDS to the number of processes in all, to submit a part of an array again" >&2
            exit 1
        fi
        SHARDS="$((tasks * $1))"
    fi
    export SHARDS
}
