"""Share work among N processes, on a node's GPUs or in a job array.

`--shard I/N` says which part a process does. The verbs that take it (`evaluate`, `score`,
`tokenize-shards`) write what a part has made beside the other parts, so that a process that was lost is
repeated alone, and the last one to finish completes the whole.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_exact.command_line import ArgumentError, positive_int

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of one process: every N-th item, beginning with item I."""

    index: int = 0
    """I, from 0."""
    of: int = 1
    """N, the number of processes."""

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    @property
    def is_whole(self) -> bool:
        """Return whether one process does everything."""
        return self.of == 1

    def has(self, position: int) -> bool:
        """Return whether the item at this position is in the share."""
        return position % self.of == self.index

    def size(self, items: int) -> int:
        """Return how many of so many items are in the share."""
        return len(range(self.index, items, self.of))


def waiting_line(output: str, own: Share, missing: Iterable[int]) -> str:
    """Return the last line of a process that is done while others are not.

    Args:
        output: what all of them write.
        own: the share of this process.
        missing: items that are not there.
    """
    others = ", ".join(
        str(Share(index=index, of=own.of)) for index in sorted({n % own.of for n in missing})
    )
    return f"{output}: --shard {own} is finished; still missing: --shard {others}"


def share(text: str) -> Share:
    """argparse type: `0/4` to `3/4`."""
    index, _, of = text.partition("/")
    if not (index.isdecimal() and of.isdecimal() and int(index) < int(of)):
        last = f"{int(of) - 1}/{of}" if of.isdecimal() and int(of) else "3/4"
        raise ArgumentError(
            f"{text!r} is not a share: give I/N, such as 0/4, with I from 0 to N - 1 ({last})"
        )
    return Share(index=int(index), of=int(of))


def add_share_arguments(parser: argparse.ArgumentParser, what: str, *others: str) -> None:
    """Add `--shard` and `--processes`, of which one may be given.

    Args:
        parser: of a verb.
        what: a process does, for the help.
        others: more spellings of `--shard`.
    """
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--shard",
        *others,
        type=share,
        default=Share(),
        metavar="I/N",
        help=f"do {what}, beginning with I, 0 to N - 1, while other processes do the others",
    )
    group.add_argument(
        "--processes",
        type=positive_int,
        metavar="N",
        help="start N processes here, each with a shard and a GPU of its own, and wait for them",
    )


def without_processes(words: Sequence[str]) -> list[str]:
    """Return the arguments of a verb without `--processes`, for the processes that it starts."""
    kept: list[str] = []
    skips = False  # the word after it
    for word in words:
        name, equals, _ = word.partition("=")
        is_it = len(name) > len("--p") and "--processes".startswith(name)  # argparse takes abbreviations
        if not (skips or is_it):
            kept.append(word)
        skips = is_it and not equals
    return kept


def run_processes(
    verb: str, words: Sequence[str], count: int, *, devices_each: int = 1, program: Sequence[str] = ()
) -> None:
    """Run a verb in several processes of this machine, a share and GPUs of its own for each; wait for all.

    Args:
        verb: takes `--shard`.
        words: its arguments, without `--processes`.
        count: processes.
        devices_each: GPUs of each process.
        program: starts the command line (default: this interpreter).

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES names fewer GPUs than needed, or processes failed, by their shares.
    """
    start = program or (sys.executable, "-m", "megatron_exact")
    devices = split_devices(os.environ.get(DEVICES_VARIABLE), count, devices_each)
    children: list[subprocess.Popen[bytes]] = []
    try:
        for index in range(count):
            environment: Mapping[str, str] = {**os.environ, DEVICES_VARIABLE: devices[index]}
            command = [*start, verb, *words, "--shard", str(Share(index=index, of=count))]
            children.append(subprocess.Popen(command, env=environment))
        codes = [child.wait() for child in children]
    except BaseException:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()
        raise
    failed = [str(Share(index=index, of=count)) for index, code in enumerate(codes) if code]
    if failed:
        raise ValueError(
            f"--shard {', '.join(failed)} failed, see above: the same command does what is missing"
        )


def split_devices(visible: str | None, count: int, each: int) -> list[str]:
    """Return the value of CUDA_VISIBLE_DEVICES for each process.

    Args:
        visible: its value now; None where it is not set, so that all GPUs are visible.
        count: processes.
        each: GPUs of a process.

    Raises:
        ValueError: the variable names fewer GPUs than needed. Where it is not set, they are not counted.
    """
    needed = count * each
    names = [str(number) for number in range(needed)] if visible is None else _named(visible)
    if not names:  # set, and no GPU is to be used
        return [""] * count
    if len(names) < needed:
        gpus = f"{each} GPU{'s' * (each != 1)}"
        raise ValueError(
            f"--processes {count} with {gpus} each needs {needed}, but {DEVICES_VARIABLE} names "
            f"{len(names)}: start fewer processes"
        )
    return [",".join(names[index * each : (index + 1) * each]) for index in range(count)]


def _named(visible: str) -> list[str]:
    """Return the GPUs that a value of CUDA_VISIBLE_DEVICES names."""
    names = [name.strip() for name in visible.split(",") if name.strip()]
    # CUDA ignores what follows a number that is not a GPU's: -1 alone means no GPU
    return list(itertools.takewhile(lambda name: not name.startswith("-"), names))


def default_device() -> str:
    """Return `cuda` where torch finds a GPU, otherwise `cpu`.

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES gives this process a GPU that torch does not find.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    visible = os.environ.get(DEVICES_VARIABLE, "")
    if _named(visible):
        raise ValueError(
            f"{DEVICES_VARIABLE} is {visible}, but torch finds no such GPU: start no more processes than "
            "there are GPUs, or give --device cpu"
        )
    return "cpu"
