"""The machine a job runs on: GPU or CPU runtime, and this process among the ranks."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

from megatron_exact.command_line import one_line
from megatron_exact.folder_lock import release_all


def activate_runtime(options: argparse.Namespace) -> tuple[str, ...]:
    """Return Megatron's flags for this machine: the CPU runtime's without a GPU, else for missing kernels.

    Raises:
        ValueError: no GPU answers where one should; a cluster job must not become a CPU job.
    """
    import torch  # not before the arguments are checked: a job with wrong ones ends in a second

    # Megatron's validation asks for it with tensor parallelism; it is read when the first kernel runs
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available() and not options.cpu and not cpu_runtime_is_active():
        return missing_kernels()
    world, local_world = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if not options.cpu and (Path("/dev/nvidia0").exists() or world > local_world):
        where = "on this machine although it has one" if world == local_world else "on one of the nodes"
        raise ValueError(
            f"no GPU answers {where}: repair its driver (nvidia-smi), or run on the CPU with --cpu"
        )
    from megatron_exact.training import cpu_runtime

    cpu_runtime.install()
    reason = "--cpu was given" if options.cpu else "no GPU was found"
    say(f"CPU runtime: {reason}; CUDA calls are answered on the CPU, communication is gloo")
    return cpu_runtime.CPU_ARGUMENTS


APEX_KERNEL = "fused_weight_gradient_mlp_cuda"
"""Apex's module that adds a weight gradient to `main_grad` within the matrix product."""


def missing_kernels() -> tuple[str, ...]:
    """Return flags for a GPU machine without Transformer Engine or Apex; rehearsed in `tests/cuda`."""
    flags: list[str] = []
    if importlib.util.find_spec("transformer_engine") is None:
        from megatron_exact.model.packed_attention import use_packed_rope

        use_packed_rope()
        flags += ["--transformer-impl", "local", "--no-persist-layer-norm"]
    if importlib.util.find_spec(APEX_KERNEL) is None:
        flags += ["--no-gradient-accumulation-fusion"]
    return tuple(flags)


def cpu_runtime_is_active() -> bool:
    """Return whether the CPU runtime is loaded; it makes torch claim a GPU."""
    return "megatron_exact.training.cpu_runtime" in sys.modules


def rank() -> int:
    """Return the number of this process in the job, from torchrun's variable."""
    return int(os.environ.get("RANK", "0"))


def node_name() -> str:
    """Return the name of this machine: SLURM's, by which a batch script can exclude it, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def say(message: str) -> None:
    """Log a line from rank 0."""
    if rank() == 0:
        print(f"megatron_exact: {one_line(message)}", flush=True)


def tell_launcher(message: str, kind: str = "fault") -> None:
    """Write what torchrun shows as the cause in its summary, in place of a traceback.

    Args:
        message: one line.
        kind: one of `KINDS`; the launcher decides by it whether to start the job again.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time())), "kind": kind}
    with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as stream:  # the first one stays
        json.dump({"message": {"message": message, "extraInfo": extra}}, stream)


NOT_FINITE = 65
"""Exit code of a job that stopped at a loss or gradient that is not finite (EX_DATAERR)."""
RANK_LOST = 75
"""Exit code of a rank that ends because another hangs or is gone (EX_TEMPFAIL: start the job again)."""
KINDS = ("user", "nan", "lost", "signal", "fault")
"""Kinds of failure: a user's error or full disk, a NaN, a lost rank, a signal, anything else."""


def kind_of_ending(code: int, message: object) -> str:
    """Return what kind of failure a rank ended with.

    Args:
        code: its exit code, not 0.
        message: what it wrote for its launcher, from torchrun's error file.
    """
    by_code = {NOT_FINITE: "nan", RANK_LOST: "lost"}
    if code in by_code:
        return by_code[code]
    extra = message.get("extraInfo") if isinstance(message, dict) else None
    kind = extra.get("kind") if isinstance(extra, dict) else None
    return kind if kind in KINDS else "fault"


def end_process(message: str, *, is_teller: bool, code: int = RANK_LOST) -> None:
    """End this process at once, and what it started; the main thread may be blocked for good.

    Args:
        message: the reason; empty if it has been printed.
        is_teller: whether this rank prints it.
        code: exit code.
    """
    if is_teller:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if message:
        tell_launcher(message, "user")  # a lease that is lost; RANK_LOST speaks for itself
    for child in multiprocessing.active_children():  # data workers, the writer of asynchronous saves
        child.kill()
    release_all()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()
    os._exit(code)
