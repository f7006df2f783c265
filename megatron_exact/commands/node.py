"""One node of a SLURM job: torchrun with stop requests passed on to its ranks, and a note of how it ended.

`examples/slurm/node.sh` starts it as `python -m megatron_exact.commands.node`, with words of torchrun.
torchrun answers a signal by ending its ranks within a set time, and by a traceback. Here it never sees the
signals that ask a job to stop. They are blocked from the first line on; a thread sees that one is pending,
or the file that the batch script leaves, and sends it to each rank. A job that stops so ends with code 0.
"""

from __future__ import annotations

from megatron_exact.training import stop_signals

if __name__ == "__main__":  # before anything that takes time is imported
    stop_signals.hold_back(stop_signals.ASKING)

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_exact.command_line import describe, one_line
from megatron_exact.commands.train import Ended, launch
from megatron_exact.files import write_text
from megatron_exact.training.runtime import node_name

LOOK_SECONDS = 0.5
MOST_TEXT = 600
LOST = 75
"""Exit code of a node whose torchrun did not find the others, as of a rank that lost one."""


def children(pid: int) -> list[int]:
    """Return the processes that a process started."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in path.read_text().split()]
    return found


def pass_on(stop_file: Path) -> None:
    """Wait for a request to stop, then send it to the ranks for as long as this process lives.

    Ranks that start later get it, too; to the others it is pending already, so they see it once.

    Args:
        stop_file: made by the batch script, for a signal that came before Python was there.
    """
    while True:
        time.sleep(LOOK_SECONDS)
        number = stop_signals.pending(stop_signals.ASKING)
        if not number and stop_file.exists():
            number = signal.SIGUSR1
        for child in children(os.getpid()) if number else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)


def note(path: Path, ended: Ended) -> None:
    """Leave how this node ended: exit code, kind, node and message, between tabs, in one line."""
    fields = (str(ended.code), ended.kind, node_name(), one_line(ended.message)[:MOST_TEXT])
    with contextlib.suppress(OSError):
        write_text(path, "\t".join(fields) + "\n")


def main(words: Sequence[str]) -> int:
    """Run the ranks of this node; returns the exit code of the one that failed first."""
    folder = Path(os.environ["LOG_DIR"])
    threading.Thread(target=pass_on, args=(folder / "stop",), daemon=True).start()
    try:
        ended = launch(words)
    except Exception as error:  # the other nodes did not come, or one of them has gone
        ended = Ended(code=LOST, kind="lost", message=f"torchrun: {describe(error)}")
    note(folder / f"node-{int(os.environ['SLURM_NODEID']):05d}.ending", ended)
    if ended.message:
        print(f"{'error: ' if ended.kind else ''}{ended.message}", file=sys.stderr, flush=True)
    return ended.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
