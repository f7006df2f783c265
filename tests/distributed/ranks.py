"""Run a training job, or any function, on N forked gloo ranks.

Megatron takes about ten seconds to import; here it is imported once in the parent and the ranks are
forked from it, so a job of two ranks takes seconds. Every rank is waited for or killed by id: none outlives
the call.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import importlib.util
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests import forked

TIMEOUT_SECONDS = 240
PEERS_SECONDS = 10  # what the others have to say why they end, once one has failed
PORTS = range(20_000, 32_000)


@functools.cache
def import_megatron_once() -> None:
    """What every forked rank inherits; torch starts no threads before the fork."""
    from megatron_exact.training import cpu_runtime  # tests/cuda forks ranks without it

    torch.set_num_threads(1)
    if importlib.util.find_spec("transformer_engine") is not None:
        import transformer_engine.pytorch  # noqa: F401  # its layers can be built on a CPU

    cpu_runtime.install()
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text.models
    import megatron.training.training  # noqa: F401
    from torch.utils import tensorboard  # noqa: F401

    import megatron_exact.model.layer_specs
    import megatron_exact.training.pretrain
    import megatron_exact.training.run
    import megatron_exact.training.substitutions  # noqa: F401

    prepare_ranks()


def prepare_ranks() -> None:
    """Let the ranks inherit what each of them would make again.

    Megatron parses the sources of its dataclasses for their help texts whenever it builds its parser, a job
    builds it twice, and Megatron writes every argument to TensorBoard as text. That was over half of the
    CPU time of a job of two iterations.
    """
    from megatron.training import arguments
    from megatron.training.argument_utils import ArgumentGroupFactory
    from torch.utils import tensorboard

    from megatron_exact.training import flag_classes, run_record

    stock = ArgumentGroupFactory._get_field_docstrings
    texts = functools.cache(lambda kind: stock(ArgumentGroupFactory.__new__(ArgumentGroupFactory), kind))
    ArgumentGroupFactory._get_field_docstrings = lambda self, kind: texts(kind)
    run_record._flags()
    flag_classes.read_flags([])
    run_record.git_commit = functools.cache(run_record.git_commit)
    run_record.git_commit()
    tensorboard.SummaryWriter.add_text = lambda *_, **__: None  # type: ignore[method-assign]

    build, parent = arguments.add_megatron_arguments, os.getpid()
    parsers = [build(argparse.ArgumentParser(allow_abbrev=False)) for _ in range(2)]

    def inherited(parser: argparse.ArgumentParser) -> Any:
        return parsers.pop() if parsers and os.getpid() != parent else build(parser)

    arguments.add_megatron_arguments = inherited


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
    outputs = [folder / f"rank{rank}.txt" for rank in range(num_ranks)]
    with _free_port() as port:
        children = [_start(rank, num_ranks, port, function, outputs[rank]) for rank in range(num_ranks)]
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


def _start(rank: int, world: int, port: int, function: Callable[[], int | None], output: Path) -> int:
    def work() -> int | None:
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
        return function()

    return forked.start(work, output)


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
            code = forked.exit_code(child)
            if code is not None:
                codes[child] = code
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + PEERS_SECONDS)
        time.sleep(0.02)
    in_time = len(codes) == len(children) or deadline < last
    if not in_time:
        for child in set(children) - set(codes):
            os.killpg(child, signal.SIGUSR1)
        time.sleep(1)
    for child in children:
        forked.kill(child)
        if child not in codes:
            _, status = os.waitpid(child, 0)
            codes[child] = os.waitstatus_to_exitcode(status)
    return [codes[child] for child in children], in_time


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    """Reserve a port for a job among all test runs on this machine.

    It lies below the ephemeral range, where no outgoing connection takes it before rank 0 listens. Until
    the job has ended, a Unix socket in the abstract namespace keeps other test runs from choosing it.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket(socket.AF_UNIX) as reservation, socket.socket() as listener:
            try:
                reservation.bind(f"\0megatron_exact_tests_{port}")
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            listener.close()
            yield port
            return
    raise AssertionError(f"no free port in {PORTS}")
