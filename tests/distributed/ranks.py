"""Run a training job, or any function, on N forked gloo ranks.

Megatron takes about ten seconds to import; here it is imported once in the parent and the ranks are
forked from it, so a job of two ranks takes seconds. Every rank is waited for or killed by id: none outlives
the call.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TIMEOUT_SECONDS = 240
PEERS_SECONDS = 10  # what the others have to say why they end, once one has failed
PR_SET_PDEATHSIG = 1  # a rank ends with the test process, however that ends


def import_megatron_once() -> None:
    """What every forked rank inherits; torch starts no threads before the fork."""
    from megatron_exact.training import cpu_runtime  # tests/cuda forks ranks without it

    torch.set_num_threads(1)
    cpu_runtime.install()
    import megatron.core.tokenizers.text
    import megatron.training.training  # noqa: F401
    from torch.utils import tensorboard  # noqa: F401

    import megatron_exact.model.layer_specs
    import megatron_exact.training.run
    import megatron_exact.training.substitutions  # noqa: F401


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    codes: list[int]
    """Exit code of each rank, negative for a signal."""
    outputs: list[str]
    """What each rank printed, stdout and stderr."""

    def check(self) -> Ended:
        """Fail with the output of the ranks unless all of them ended well."""
        if any(self.codes):
            tails = "\n".join(
                f"--- rank {rank}, exit code {code}\n{output[-3000:]}"
                for rank, (code, output) in enumerate(zip(self.codes, self.outputs, strict=True))
                if code
            )
            raise AssertionError(f"exit codes {self.codes}\n{tails}")
        return self


def run_ranks(num_ranks: int, function: Callable[[], int | None], folder: Path) -> Ended:
    """Fork `num_ranks` processes that call `function`; its return value is the exit code.

    Args:
        num_ranks: size of the world.
        function: called in each rank with torchrun's environment variables set.
        folder: receives one file of output a rank.

    Raises:
        AssertionError: no rank has failed and not all have ended in TIMEOUT_SECONDS; says where they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    outputs = [folder / f"rank{rank}.txt" for rank in range(num_ranks)]
    children = [_fork(rank, num_ranks, port, function, outputs[rank]) for rank in range(num_ranks)]
    codes, in_time = _wait(children)
    ended = Ended(codes, [path.read_text(errors="replace") for path in outputs])
    if not in_time:
        tails = "\n".join(f"--- rank {rank}\n{text[-12000:]}" for rank, text in enumerate(ended.outputs))
        raise AssertionError(f"not ended after {TIMEOUT_SECONDS} s, exit codes {codes}\n{tails}")
    return ended


def train(
    num_ranks: int, argv: Sequence[Any], folder: Path, patch: Callable[[], None] | None = None
) -> Ended:
    """Run `megatron_exact.training.pretrain` on forked ranks.

    Args:
        num_ranks: size of the world.
        argv: command line, converted to text.
        folder: receives the output of the ranks.
        patch: called in each rank first.
    """

    def job() -> int:
        from megatron_exact.training import pretrain

        if patch is not None:
            patch()
        return pretrain.main([str(word) for word in argv])

    return run_ranks(num_ranks, job, folder)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _fork(rank: int, world: int, port: int, function: Callable[[], int | None], output: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setpgid(0, 0)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        faulthandler.register(signal.SIGUSR1, file=2)  # every thread's place, when it hangs
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in environment.items()})
        torch.cuda.device_count = lambda: world  # type: ignore[assignment]
        code = int(function() or 0)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(ValueError, OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(children: list[int]) -> tuple[list[int], bool]:
    """Wait for all; once one fails, or time is up, end the others and what they started, by id.

    Returns their exit codes, and whether time was not up before one of them failed.
    """
    codes: dict[int, int] = {}
    last = time.monotonic() + TIMEOUT_SECONDS
    deadline = last
    while len(codes) < len(children) and time.monotonic() < deadline:
        for child in children:
            if child in codes:
                continue
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + PEERS_SECONDS)
        time.sleep(0.02)
    in_time = len(codes) == len(children) or deadline < last
    if not in_time:
        for child in set(children) - set(codes):
            os.killpg(child, signal.SIGUSR1)
        time.sleep(1)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # the rank, or managers that outlived it
        if child not in codes:
            _, status = os.waitpid(child, 0)
            codes[child] = os.waitstatus_to_exitcode(status)
    return [codes[child] for child in children], in_time


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# Tests side by side keep out of each other's way: between a look at a port and its use lies a second.
_ports = itertools.count(20_000 + _WORKER % 10 * 1_000 + os.getpid() % 500)


def _free_port() -> int:
    """A port below the ephemeral range, where no connection of another job can take it meanwhile."""
    for port in _ports:
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable: the counter is endless")
