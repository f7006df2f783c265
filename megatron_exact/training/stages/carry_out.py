"""What a tool does with a plan of runs: print it, submit it to SLURM, or run it here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_exact.training.stages.batch import submit_chain
from megatron_exact.training.stages.launch import describe_plan, run_chain
from megatron_exact.training.stages.plan import StageRun, check_pairs


def carry_out(
    runs: Sequence[StageRun], *, processes: int | None, sbatch: str | None, dry_run: bool
) -> bool:
    """Carry out a plan as `--nproc-per-node`, `--sbatch` and `--dry-run` say.

    Args:
        runs: the plan, in order.
        processes: ranks of a run on each node; None: the recipe's.
        sbatch: options for every sbatch, as one line of a shell; None: no SLURM.
        dry_run: print the commands alone.

    Returns:
        Whether the runs are finished.

    Raises:
        ValueError: a run or a submission that fails, or arms that in the end are no pairs.
    """
    if dry_run:
        print("\n".join(describe_plan(runs, processes)))
        return False
    if sbatch is not None:
        for submission in submit_chain(runs, shlex.split(sbatch), processes):
            print(submission.describe())
        return False
    run_chain(runs, processes)
    check_pairs(runs)
    return True
