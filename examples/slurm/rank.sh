#!/usr/bin/env bash
# One rank, started by torchrun: its output goes to a file of its own, the last rank's, which prints the
# iterations, to the job's output too. `exec` keeps the process that torchrun knows, so signals arrive; they
# are blocked here, in `tee` and in all that a rank starts, and wait until the rank looks for them.
set -euo pipefail

log="$LOG_DIR/$(printf 'rank-%05d.log' "$RANK")"
if ((RANK == WORLD_SIZE - 1)); then
    exec > >(exec tee "$log") 2>&1
else
    exec >"$log" 2>&1
fi
exec "$PYTHON" -m megatron_exact.training.pretrain "$@"
