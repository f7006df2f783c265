"""How the evaluation demo calls tools: one step, one folder, one log."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from megatron_exact.demo.evaluate_settings import EvaluateSettings
from megatron_exact.demo.processes import ChildFailure, run_child
from megatron_exact.demo.steps import PACKAGE, TOOLS, say, shown
from megatron_exact.demo.training import first_error
from megatron_exact.demo.workspace import Step, Workspace, hash_of_code

Command = list[str]
LOG = "log.txt"
TRAINING_TOOLS = ("run_stages", "fine_tune_qa")
SHOWN_LINES = 3
SHOWN_CHARACTERS = 160


@dataclass(kw_only=True)
class EvaluateDemo:
    """One run of the demo: its options, and what the steps so far have left."""

    settings: EvaluateSettings
    """Sizes."""
    workspace: Workspace
    """Folder of the steps."""
    commands: list[str] = field(default_factory=list)
    """Every command that makes the results."""
    timings: list[tuple[str, float, bool]] = field(default_factory=list)
    """Step, its seconds, and whether an earlier run had made it."""

    def add(self, step: Step) -> Step:
        """Note a finished step."""
        self.timings.append((step.name, step.seconds, step.reused))
        return step

    def tool_step(
        self,
        name: str,
        inputs: Sequence[Step],
        code: tuple[str, ...],
        commands_for: Callable[[Path], list[Command]],
        *,
        resumable: bool = False,
    ) -> Step:
        """A step of a few calls of tools.

        Args:
            name: of the step.
            inputs: steps whose files it reads.
            code: files and folders of the package that it depends on.
            commands_for: the calls, from the folder of the step.
            resumable: each of them goes on where it was stopped, and is done at once when it was finished.
        """
        say(f"\n== {name}")
        commands = commands_for(self.workspace.folder / name)
        self.commands += [shown(command) for command in commands]

        def build(folder: Path) -> None:
            for command in commands:
                say(f"$ {shown(command)}")
                run_logged(command, folder / LOG, self.environment())

        depends_on = {
            "inputs": [step.key for step in inputs],
            "commands": commands,
            "code": hash_of_code(PACKAGE, code),
            "versions": {name: version(name) for name in ("torch", "transformers", "lm_eval")},
        }
        return self.add(self.workspace.step(name, depends_on, build, resumable=resumable))

    def environment(self) -> dict[str, str]:
        """Nothing is fetched, what libraries store stays here, and a model so small gets one thread."""
        wanted = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        return {
            "HF_HOME": str(self.workspace.folder / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **{name: value for name, value in wanted.items() if name not in os.environ},
        }


def run_logged(command: Command, log: Path, environment: dict[str, str]) -> None:
    """Run a tool with its output in a file, and its results on the terminal.

    Raises:
        ValueError: it failed; the message is the tool's own.
    """
    start = log.stat().st_size if log.exists() else 0
    try:
        run_child(command, log=log, environment=environment)
    except ChildFailure as failure:
        cause = first_error(new_lines(log, start))
        raise ValueError(f"{Path(command[1]).name}: {cause}; its log is {log}") from failure
    if Path(command[1]).stem not in TRAINING_TOOLS:  # their last words are Megatron's timers
        for line in new_lines(log, start)[-SHOWN_LINES:]:
            say(f"  | {line[:SHOWN_CHARACTERS]}")


def new_lines(log: Path, start: int) -> list[str]:
    """Lines of a file from a byte on."""
    with open(log, "rb") as stream:
        stream.seek(start)
        return stream.read().decode("utf-8", errors="replace").splitlines()


def tool(name: str, *words: object) -> Command:
    """A call of one of our tools."""
    return [sys.executable, str(TOOLS / f"{name}.py"), *map(str, words)]
