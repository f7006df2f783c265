"""Run a plan of stages on this machine, each run by torchrun."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

from megatron_exact.training.stages.plan import StageRun

SHUTDOWN_SECONDS = 120
"""What torchrun gives its ranks after a signal: a large checkpoint may be on its way."""


def torchrun_command(run: StageRun, processes: int | None = None) -> list[str]:
    """The command that begins a run, or goes on with it.

    Args:
        run: of the plan.
        processes: ranks to start, if not the recipe's number of GPUs.

    Raises:
        ValueError: several nodes, or no number of ranks.
    """
    if (run.nodes or 1) > 1 and processes is None:
        raise ValueError(
            f"{run.name} asks for {run.nodes} nodes, and this starts processes on one: submit the stages "
            "to a batch system, or name a recipe of one node"
        )
    ranks = processes or run.gpus_per_node
    if ranks is None:
        raise ValueError("--nproc-per-node is missing: say how many processes a run has")
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "--max-restarts", "0"),
        *("--shutdown-timeout", str(SHUTDOWN_SECONDS)),
        *("-m", "megatron_exact.training.pretrain", *run.arguments),
    ]


def describe_plan(runs: Sequence[StageRun], processes: int | None = None) -> list[str]:
    """Lines for a shell: the commands of what is still to be done, with a remark before each.

    Raises:
        ValueError: as `torchrun_command`.
    """
    lines = []
    for run in runs:
        iteration = run.iteration()
        if run.is_finished():
            lines.append(f"# {run.name}: finished at iteration {iteration}")
            continue
        state = (
            f"goes on from iteration {iteration}"
            if iteration
            else f"starts from {run.previous or 'random weights'}"
        )
        lines += [f"# {run.name}: {state}", shlex.join(torchrun_command(run, processes))]
    return lines


def run_chain(
    runs: Sequence[StageRun],
    processes: int | None = None,
    *,
    call: Callable[[Sequence[str]], int] | None = None,
) -> None:
    """Run what is not finished yet, in order; stop at the first failure.

    Args:
        runs: from `plan_chain`.
        processes: ranks of each run, if not the recipe's number of GPUs.
        call: runs a command and returns its exit code (default: a child process with our terminal).

    Raises:
        ValueError: a run that failed, or ended before its last iteration.
    """
    for run in runs:
        if run.is_finished():
            print(f"{run.name}: finished", flush=True)
            continue
        print(f"{run.name}: {run.folder}", flush=True)
        code = (call or _call)(torchrun_command(run, processes))
        if code:
            raise ValueError(
                f"{run.name} ended with exit code {code}, its message is above; the same command goes on "
                "with it"
            )
        if not run.is_finished():
            raise ValueError(
                f"{run.name} ended at iteration {run.iteration() or 0} of {run.iterations}: the same "
                "command goes on with it"
            )


def _call(command: Sequence[str]) -> int:
    """Exit code of a child; if this process is told to end, the child is, and is waited for."""
    with subprocess.Popen(command) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
