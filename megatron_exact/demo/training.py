"""The training commands of the demo, and their progress read from `losses.jsonl`."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from megatron_exact.demo.processes import ChildFailure, ProgressLine, run_child
from megatron_exact.demo.settings import PROCESSES, DemoSettings, StageSettings
from megatron_exact.json_input import parse_json_object

CHECKPOINT_TRACKER = "latest_checkpointed_iteration.txt"
TAIL_LINES = 15
SAVES_A_STAGE = 4
RATE_WINDOW_LINES = 20
# Our own one-line errors say most; then whatever exception came first.
ERRORS = (re.compile(r"(?:^|\s)(error: .*)"), re.compile(r"(?:^|\s)([\w.]*(?:Error|Exception): .*)"))
SHUTDOWN_SECONDS = 5


def training_command(
    settings: DemoSettings,
    stage: StageSettings,
    *,
    pack: Path,
    validation_rows: int,
    rule: str,
    save: Path,
    base: Path | None,
) -> list[str]:
    """The command that starts, or continues, one run.

    Args:
        settings: of the demo.
        stage: of the run.
        pack: packed dataset.
        validation_rows: rows of its validation split.
        rule: token weighting.
        save: folder of the run.
        base: folder of the run whose weights it starts from, with a fresh optimizer; None for scratch.
            Once the run has a checkpoint of its own, the same command goes on from that.
    """
    evaluation_batches = min(stage.evaluation_batches, validation_rows // stage.rows_per_iteration)
    start = [] if base is None else ["--pretrained-checkpoint", base]
    options: list[object] = [
        *("--pack", pack, "--token-weighting", rule),
        *("--tensor-model-parallel-size", PROCESSES, "--pipeline-model-parallel-size", 1),
        *("--num-layers", settings.layers, "--hidden-size", settings.hidden),
        *("--ffn-hidden-size", settings.feed_forward, "--num-attention-heads", settings.heads),
        *("--group-query-attention", "--num-query-groups", settings.query_groups),
        *("--init-method-std", settings.initial_std),
        *("--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear"),
        *("--position-embedding-type", "rope", "--max-position-embeddings", settings.long.row_tokens),
        *(*stage.schedule_flags(), "--eval-iters", evaluation_batches),
        *("--weight-decay", 0.1, "--seed", settings.seed),
        *("--save", save, "--save-interval", max(1, stage.iterations // SAVES_A_STAGE)),
        *("--load", save, *start),  # starts from the base, or goes on where the run stopped
    ]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(PROCESSES), "--max-restarts", "0"),
        *("--shutdown-timeout", str(SHUTDOWN_SECONDS)),
        *("-m", "megatron_exact.training.pretrain"),
        *(str(option) for option in options),
    ]


def remove_half_saved_run(run_dir: Path) -> bool:
    """Remove a run that was interrupted before its first checkpoint was whole.

    The training refuses a folder whose only checkpoint is damaged, for good reasons; here nothing can be
    lost yet, so the run simply starts again. Megatron writes the tracker after the rest of a checkpoint.

    Returns:
        Whether something was removed.
    """
    if not run_dir.exists() or (run_dir / CHECKPOINT_TRACKER).exists():
        return False
    shutil.rmtree(run_dir)
    return True


def run_environment() -> dict[str, str]:
    """Variables of the training processes: threads that fit the machine, and no network."""
    threads = max(1, min(4, len(os.sched_getaffinity(0)) // PROCESSES))
    wanted = {"OMP_NUM_THREADS": str(threads)}
    if sys.platform == "linux":
        wanted["GLOO_SOCKET_IFNAME"] = "lo"
    return {name: value for name, value in wanted.items() if name not in os.environ}


def train(command: list[str], *, name: str, run_dir: Path, iterations: int) -> None:
    """Run a training command with one line of progress.

    Args:
        command: from `training_command`.
        name: for the line.
        run_dir: its --save folder; `log.txt` in it receives all output.
        iterations: at the end of the run.

    Raises:
        ValueError: the training failed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    log = run_dir / "log.txt"
    log_start = log.stat().st_size if log.exists() else 0
    progress = TrainingProgress(name, run_dir / "losses.jsonl", iterations)
    try:
        run_child(command, log=log, environment=run_environment(), on_poll=progress.poll)
    except ChildFailure as failure:
        with open(log, "rb") as stream:
            stream.seek(log_start)
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
        cause = first_error(lines)
        if not cause.startswith("error: "):  # an error of ours says enough
            print("\n".join(["", *(f"  | {line}" for line in lines[-TAIL_LINES:])]), flush=True)
        raise ValueError(
            f"{name} stopped with exit code {failure.code} ({cause}); its log is {log}"
        ) from failure
    progress.finish()


def first_error(lines: list[str]) -> str:
    """What went wrong, in the words of the log: without prefixes, on one line."""
    for pattern in ERRORS:
        for line in lines:
            if found := pattern.search(line):
                return found[1].strip()
    return "its log names no error"


class TrainingProgress:
    """Follows `losses.jsonl` while it grows."""

    def __init__(self, name: str, path: Path, iterations: int) -> None:
        self._name = name
        self._path = path
        self._iterations = iterations
        self._line = ProgressLine()
        self._started = time.monotonic()
        self._old = _modified(path)
        self._last: dict[str, Any] | None = None
        self._arrivals: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW_LINES)

    def poll(self) -> None:
        """Read what is new and show it."""
        if _modified(self._path) != self._old:
            last = _last_record(self._path)
            if last is not None and last != self._last:
                self._last = last
                self._arrivals.append((time.monotonic(), last["iteration"]))
        self._line.show(self._text())

    def finish(self) -> None:
        """Show the state at the end."""
        self.poll()
        self._line.finish(f"{self._text()}  in {time.monotonic() - self._started:.0f} s")

    def _text(self) -> str:
        if self._last is None:
            waited = time.monotonic() - self._started
            return f"{self._name}: starting {PROCESSES} processes, {waited:.0f} s"
        done, loss = self._last["iteration"], self._last["loss"]
        text = f"{self._name}: iteration {done}/{self._iterations}"
        text += f"  loss {loss:.3f}" if loss is not None else "  loss not finite"
        (first_time, first_done), (last_time, last_done) = self._arrivals[0], self._arrivals[-1]
        if last_time > first_time:
            text += f"  {(last_done - first_done) / (last_time - first_time):.1f} iterations/s"
        return text


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _last_record(path: Path) -> dict[str, Any] | None:
    """The last whole line of a file of records, None if there is none yet."""
    if not path.exists():
        return None
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - 8192))
        whole, _, _ = stream.read().rpartition(b"\n")
    return parse_json_object(whole.rpartition(b"\n")[2], str(path), "train again") if whole else None
