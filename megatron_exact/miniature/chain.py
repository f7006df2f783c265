"""The steps of the miniature: each calls the project's tools as subprocesses, in a folder of its own.

A finished step is used again as long as its inputs, its commands and the code behind them are the same
(`demo/workspace.py`), so an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_exact
from megatron_exact.demo.processes import ChildFailure, run_child
from megatron_exact.demo.steps import shown
from megatron_exact.demo.training import first_error
from megatron_exact.demo.workspace import Step, Workspace, hash_of_code

PACKAGE = Path(megatron_exact.__file__).resolve().parent
TOOLS = PACKAGE.parent / "tools"
MINIATURE_CODE = ("miniature/corpus.py", "miniature/language.py")
DATA_CODE = ("data", "exposure", "files.py")
TRAINING_CODE = (*DATA_CODE, "model", "training", "conversion")
PROBE_CODE = ("evaluation/probe", "evaluation/model_identity.py")


COMMANDS = "commands.txt"
"""In the folder of a step: the commands that made it, as a user of this checkout would type them."""


class StoppedError(RuntimeError):
    """Another step failed, or the user stopped all; this one ends its children and gives up."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Runs commands inside steps; may be shared by threads."""

    workspace: Workspace
    """Folder of the steps."""
    stop: threading.Event
    """Set when everything is to end."""
    say: Callable[[str], None]
    """Prints one line."""
    shows_commands: bool = False
    """Whether every command is printed."""

    def step(
        self, name: str, depends_on: dict[str, Any], code: tuple[str, ...], build: Callable[[Path], None]
    ) -> Step:
        """A step whose key includes the code in `code` (parts of the package)."""
        return self.workspace.step(name, {**depends_on, "code": code_hash(code)}, build)

    def call(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        """Run a command to its end with its output in `log`.

        Raises:
            ValueError: it failed; names its own first error and the log.
            StoppedError: `stop` was set.
        """

        def check() -> None:
            if self.stop.is_set():
                raise StoppedError(command[1])

        check()
        line = shown(command)
        if self.shows_commands:
            self.say(f"$ {line}")
        with open(log.parent / COMMANDS, "a", encoding="utf-8") as commands:
            commands.write(line + "\n")
        try:
            run_child(command, log=log, environment=environment, on_poll=check)
        except ChildFailure as failure:
            cause = first_error(log.read_text(encoding="utf-8", errors="replace").splitlines())
            name = command[2] if command[1] == "-m" else Path(command[1]).name
            raise ValueError(f"{name} failed ({cause}); its output is in {log}") from failure


@functools.cache
def code_hash(parts: tuple[str, ...]) -> str:
    """Hash of parts of the package as they were when this process first asked."""
    return hash_of_code(PACKAGE, parts)


def tool(name: str, *options: object) -> list[str]:
    """The command of one of our tools."""
    return [sys.executable, str(TOOLS / f"{name}.py"), *(str(option) for option in options)]


def pretrain(*options: object) -> list[str]:
    """The command of a training run in this one process, on the CPU."""
    return [sys.executable, "-m", "megatron_exact.training.pretrain", "--cpu", *map(str, options)]


def one_process_environment() -> dict[str, str]:
    """Variables of a training run of one process: one thread, and a port that no other run has."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        settings["GLOO_SOCKET_IFNAME"] = "lo"
    return settings


def pack_corpus(
    chain: Chain, folder: Path, *, tokenizer: Path, row_tokens: int, validation_fraction: float, seed: int
) -> None:
    """Tokenise `folder/corpus.jsonl` and pack it into `folder/pack`.

    Best-fit packing: no document is longer than a row, so none is cut and no question loses its answer.
    """
    log = folder / "log.txt"
    corpus, prefix = folder / "corpus.jsonl", folder / "tokens"
    chain.call(
        tool(
            "tokenize_corpus",
            *("--input", corpus, "--tokenizer", tokenizer, "--output-prefix", prefix, "--workers", 1),
        ),
        log,
    )
    chain.call(
        tool(
            "pack_corpus",
            *("--source", prefix, "--row-tokens", row_tokens, "--policy", "best-fit"),
            *("--validation-fraction", validation_fraction, "--seed", seed, "--output", folder / "pack"),
        ),
        log,
    )


def import_model(chain: Chain, folder: Path, hf: Path) -> None:
    """Make `folder/checkpoint` of a Hugging Face folder."""
    chain.call(tool("import_hf", "--hf", hf, "--output", folder / "checkpoint"), folder / "log.txt")


def train_and_export(
    chain: Chain, folder: Path, *, pack: Path, start: Path, options: list[str], seed: int
) -> None:
    """Train from the weights of `start` into `folder/run` and export to `folder/model`."""
    run, log = folder / "run", folder / "log.txt"
    command = pretrain(
        *("--pack", pack, "--pretrained-checkpoint", start, "--save", run, "--load", run),
        *("--no-save-optim", "--no-save-rng", "--seed", seed),
        *options,
    )
    chain.call(command, log, one_process_environment())
    chain.call(tool("export_hf", "--checkpoint", run, "--output", folder / "model"), log)
    for leftover in (*run.glob("iter_*"), run / "tensorboard"):
        shutil.rmtree(leftover, ignore_errors=True)  # the exported weights are the same and half the files


def available_jobs(wanted: int) -> int:
    """`wanted`, or fewer where there are fewer cores."""
    return max(1, min(wanted, len(os.sched_getaffinity(0))))
