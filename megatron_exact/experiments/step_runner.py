"""Run the steps of a plan, each through a public tool, and keep `ledger.json`.

The ledger records for every step its commands, state, start and seconds. A step that is finished is skipped
if its commands, and those of all steps before it, are what they are now; with others it is an error, as
results of two definitions must not lie in one folder. Comparisons, which are cheap, are made again instead,
so that seeds and arms can be added. A step whose inputs were made again is done again. What an interrupted
step left is continued where its tool can continue it, and otherwise removed.

On SLURM training, tuning and suites are submitted. The call then ends, and the same command later does what
has become possible. A chain of stages is a chain of dependent jobs (`megatron-exact stages --sbatch`).
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_exact.data.score_files import read_record
from megatron_exact.experiments.experiment_plan import (
    EVALUATION_SCRIPT,
    KINDS,
    PROGRAM,
    ExperimentStep,
    Planner,
    shown,
)
from megatron_exact.experiments.table_one import write_table
from megatron_exact.files import write_json
from megatron_exact.folder_lock import LEASE, Lease
from megatron_exact.json_input import read_json_object, require_shape
from megatron_exact.training.run_record import EVALUATIONS
from megatron_exact.training.run_status import FINISHED, read_status

LEDGER = "ledger.json"
FORMAT_VERSION = 1
DONE, FAILED, STARTED, WAITING, NOT_RUN = "finished", "failed", "started", "waiting", "not run"
REMADE = ("compare",)
"""Kinds of steps that are made again, at no cost, where the definition has changed."""
ALWAYS = ("table", "report")
"""Kinds of steps that are cheap and show the state of all others, so they are made again at every call."""
Call = Callable[[Sequence[str], Path], int]
"""Runs a command with its output appended to a file; returns the exit code."""


class Ledger:
    """`ledger.json` of an experiment."""

    def __init__(self, output: Path, experiment_file: Path) -> None:
        self.path = output / LEDGER
        self.content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "experiment": str(experiment_file),
            "seconds": 0.0,
            "steps": {},
        }
        if self.path.exists():
            found = read_json_object(self.path, "choose another --output")
            try:
                require_shape(found, {"steps": {"*": {"state": str, "key": str}}})
            except ValueError as error:
                raise ValueError(f"{self.path} is damaged ({error}): choose another --output") from None
            self.content["steps"] = found["steps"]

    def of(self, step: ExperimentStep) -> dict[str, Any]:
        """Return the entry of a step; empty before its first run."""
        entry: dict[str, Any] = self.content["steps"].get(step.name, {})
        return entry

    def write(self, step: ExperimentStep, key: str, **changes: Any) -> None:
        """Change the entry of a step and write the file."""
        entry = {
            **self.of(step),
            "key": key,
            "commands": [shown(command) for command in step.commands],
            **changes,
        }
        self.content["steps"][step.name] = entry
        seconds = (one.get("seconds", 0.0) for one in self.content["steps"].values())
        self.content["seconds"] = sum(seconds)
        write_json(self.path, self.content)


def key_of(step: ExperimentStep, before: Sequence[str] = ()) -> str:
    """Return a hash of the commands of a step and the keys of the steps that it needs.

    Options of sbatch are left out: a longer time limit or another partition changes no result.
    """
    commands = []
    for command in step.commands:
        words = [word for word in command if not word.startswith("--sbatch=")]
        if words[0] == "sbatch":
            words = [PROGRAM, *words[words.index(EVALUATION_SCRIPT) + 1 :]]
        commands.append(shown(words))
    text = json.dumps([commands, sorted(before)])
    return hashlib.sha256(text.encode()).hexdigest()


class StepRunner:
    """Runs the plan of one experiment."""

    def __init__(
        self,
        planner: Planner,
        experiment_file: Path,
        *,
        call: Call | None = None,
        is_queued: Callable[[str], bool] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.planner = planner
        self.file = experiment_file
        self.steps = planner.steps()
        self._makers = {path: step for step in self.steps for path in step.makes}
        self._keys: dict[str, str] = {}
        for step in self.steps:  # each after those that it needs
            self._keys[step.name] = key_of(step, [self._keys[one.name] for one in self._sources(step)])
        self._call = call or call_logged
        self._is_queued = is_queued or is_queued_job
        self._say = say

    def chosen(self, only: str | None) -> list[ExperimentStep]:
        """Return the steps that `--only` names: kinds or names, between commas.

        Raises:
            ValueError: a name that no step has.
        """
        if only is None:
            return self.steps
        words = [word.strip() for word in only.split(",")]
        for word in words:
            if not any(word in (step.kind, step.name) for step in self.steps):
                there = [kind for kind in KINDS if any(step.kind == kind for step in self.steps)]
                raise ValueError(
                    f"--only {word}: no such step; kinds are {', '.join(there)} (see --dry-run)"
                )
        return [step for step in self.steps if step.kind in words or step.name in words]

    def missing_inputs(self, steps: Sequence[ExperimentStep]) -> list[str]:
        """Return the files and folders of the user that do not exist, each with the step that reads it."""
        found: dict[Path, str] = {}
        for step in steps:
            for path in step.needs:
                if path not in self._makers and not self._is_ours(path) and not path.exists():
                    found.setdefault(path, step.name)
        return [f"{path} (for {name})" for path, name in found.items()]

    def _before(self, step: ExperimentStep) -> list[ExperimentStep]:
        """Return the steps that make what a step needs."""
        makers = (self._makers[path] for path in step.needs if path in self._makers)
        return list({maker.name: maker for maker in makers}.values())

    def _sources(self, step: ExperimentStep) -> list[ExperimentStep]:
        """Return the steps whose output decides a step's; one suite only waits for the other."""
        return [one for one in self._before(step) if one.kind != step.kind]

    def _write(self, ledger: Ledger, step: ExperimentStep, **changes: Any) -> None:
        ledger.write(step, self._keys[step.name], **changes)

    def _is_ours(self, path: Path) -> bool:
        return path.is_relative_to(self.planner.output)

    def run(self, only: str | None = None) -> bool:
        """Run what is not finished; return whether everything chosen is finished.

        Raises:
            ValueError: an input is missing, a step was finished with other commands, or a step failed.
        """
        output, steps = self.planner.output, self.chosen(only)
        if missing := self.missing_inputs(steps):
            raise ValueError(f"{'; '.join(missing)}: does not exist; make it, or correct {self.file}")
        output.mkdir(parents=True, exist_ok=True)
        with Lease(
            output / LEASE,
            folder=output,
            purpose="running its experiment",
            remedy="choose another --output",
        ):
            ledger = Ledger(output, self.file)
            self._check_keys(steps, ledger)
            waiting = [
                step.name
                for number, step in enumerate(steps, 1)
                if not self._do(step, ledger, f"{number}/{len(steps)}")
            ]
        if waiting:
            self._say(
                f"{len(waiting)} steps wait for jobs, first {waiting[0]}; call again when they have ended"
            )
        return not waiting

    def _check_keys(self, steps: Sequence[ExperimentStep], ledger: Ledger) -> None:
        """Raise ValueError where finished steps, or steps before them, had other commands."""
        others = [
            step
            for step in steps
            if step.kind not in (*ALWAYS, *REMADE)
            and ledger.of(step).get("state") == DONE
            and ledger.of(step)["key"] != self._keys[step.name]
        ]
        if others:
            first = others[0]
            before = "; ".join(ledger.of(first).get("commands", []))
            more = f", as were {len(others) - 1} steps that follow" if len(others) > 1 else ""
            places = first.runs or first.makes[:1]
            raise ValueError(
                f"{first.name} was run by another definition ({before}){more}: choose another --output, or "
                f"remove {', '.join(map(str, places))} and its entry in {ledger.path}, and so for each step"
            )

    def _inputs(self, step: ExperimentStep, ledger: Ledger) -> dict[str, Any]:
        """Return when the steps whose output a step reads were last started."""
        return {one.name: ledger.of(one).get("started") for one in self._sources(step)}

    def is_done(self, step: ExperimentStep, ledger: Ledger) -> bool:
        """Return whether a step is finished by this definition and from these inputs."""
        entry = ledger.of(step)
        return (
            entry.get("state") == DONE
            and entry["key"] == self._keys[step.name]
            and entry.get("inputs") == self._inputs(step, ledger)
            and all(path.exists() for path in step.makes)
        )

    def _do(self, step: ExperimentStep, ledger: Ledger, number: str) -> bool:
        """Run one step if necessary; return whether it is finished."""
        head = f"[{number}] {step.name}"
        if step.kind in ALWAYS:
            step = self._of_what_is_there(step)
        elif self.is_done(step, ledger):
            return True
        elif blocked := self._blocking(step, ledger):
            if all(ledger.of(one).get("state") in (WAITING, NOT_RUN) for one in blocked):
                self._write(ledger, step, state=NOT_RUN)
                return False
            raise ValueError(
                f"{step.name} needs {blocked[0].name}, which is not finished: run that step, too"
            )
        job = ledger.of(step).get("job", "")
        if step.is_submitted and not step.runs and job and self._is_queued(job):
            return False  # `stages` and `fine-tune` look for the jobs of runs themselves
        is_of_these = ledger.of(step).get("inputs") == self._inputs(step, ledger)
        if step.is_submitted and is_of_these and self._has_ended(step, ledger):
            self._write(ledger, step, state=DONE)
            return True
        if not step.resumes and step.kind not in ALWAYS:
            self._remove_leftovers(step)
        self._say(head)
        spent, begun = ledger.of(step).get("seconds", 0.0), time.monotonic()
        now = datetime.now().astimezone().isoformat()  # with microseconds: it tells one start from another
        self._write(ledger, step, state=STARTED, started=now, inputs=self._inputs(step, ledger))
        state = FAILED
        log = self.planner.output / "logs" / f"{step.name.replace('/', '_').replace(':', '_')}.txt"
        log.parent.mkdir(exist_ok=True)
        try:
            if step.kind == "table":
                write_table(self.planner)
            for command in step.commands:
                start = log.stat().st_size if log.exists() else 0
                code = self._call(command, log)
                if code:
                    raise ValueError(
                        f"{step.name} failed with exit code {code}: {_first_error(log, start)} ({log}); "
                        "the same command continues"
                    )
            state = WAITING if step.is_submitted else DONE
        finally:
            extra = {"job": _last_line(log)} if state == WAITING and not step.runs else {}
            seconds = spent + time.monotonic() - begun
            self._write(ledger, step, state=state, seconds=seconds, **extra)
        if state == DONE and (missing := [path for path in step.makes if not path.exists()]):
            self._write(ledger, step, state=FAILED)
            raise ValueError(f"{step.name} ended without {missing[0]}: its output is in {log}")
        if state == WAITING and step.runs and self._has_ended(step, ledger):
            self._write(ledger, step, state=DONE)
            return True
        return state == DONE

    def _of_what_is_there(self, step: ExperimentStep) -> ExperimentStep:
        """Return a report's step without the comparisons, packs and losses that do not exist yet."""
        if step.kind != "report":
            return step
        (command,) = step.commands
        options: list[list[str]] = []
        for word in command:
            if word.startswith("--") or not options:
                options.append([])
            options[-1].append(word)
        kept: list[str] = []
        for name, *values in options:
            if name in ("--comparison", "--pack"):
                values = [value for value in values if Path(value.rpartition("=")[2]).exists()]
            elif name == "--losses" and not all(map(_has_evaluated, values[1:])):
                values = []
            if values:
                kept += [name, *values]
        return replace(step, commands=(tuple(kept),))

    def _blocking(self, step: ExperimentStep, ledger: Ledger) -> list[ExperimentStep]:
        """Return the steps whose files this one needs and that are not finished."""
        return [one for one in self._before(step) if not self.is_done(one, ledger)]

    def _has_ended(self, step: ExperimentStep, ledger: Ledger) -> bool:
        """Return whether the jobs of a submitted step have made everything."""
        if not all(path.exists() for path in step.makes):
            return False
        if step.runs:
            return all(read_status(run).state == FINISHED for run in step.runs)
        if step.kind == "score" and not all(read_record(path.parent).is_complete for path in step.makes):
            return False  # scores.json is there from the beginning
        return ledger.of(step).get("state") in (WAITING, DONE)

    def _remove_leftovers(self, step: ExperimentStep) -> None:
        """Remove what an interrupted call of a step left, all of it below our own folder."""
        for path in step.makes:
            whole = path.parent if path.name in ("manifest.json", "comparison.json") else path
            assert whole.is_relative_to(self.planner.output)
            if whole.is_dir():
                shutil.rmtree(whole)
            elif whole.exists():
                whole.unlink()


def call_logged(command: Sequence[str], log: Path) -> int:
    """Run a command of a plan to its end, its output appended to a file; return the exit code."""
    first, *others = command
    program = {PROGRAM: [sys.executable, "-m", "megatron_exact"], "python": [sys.executable]}.get(
        first, [first]
    )
    with open(log, "ab") as stream:
        stream.write(f"$ {shlex.join(command)}\n".encode())
        stream.flush()
        try:
            child = subprocess.Popen(
                [*program, *others], stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
            )
        except FileNotFoundError:
            raise ValueError(f"{first} is not there: run the experiment where it is installed") from None
        with child:
            try:
                return child.wait()
            except BaseException:
                child.terminate()
                child.wait()
                raise


def _has_evaluated(run: str) -> bool:
    """Return whether a training run is finished and has evaluations."""
    folder = Path(run)
    return (folder / EVALUATIONS).exists() and read_status(folder).state == FINISHED


def is_queued_job(job: str) -> bool:
    """Return whether a job or array of SLURM waits or runs; `job` is what `sbatch --parsable` printed.

    Raises:
        ValueError: squeue is not there.
    """
    command = ["squeue", "--noheader", "--me", f"--jobs={job.partition(';')[0]}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError("squeue is not there: continue on a machine of the SLURM cluster") from None
    return done.returncode == 0 and bool(done.stdout.strip())  # an error: SLURM has forgotten the job


def _first_error(log: Path, start: int) -> str:
    """Return the last `error:` line of what a command wrote, or its last line."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines() if log.exists() else []
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return errors[-1] if errors else (lines[-1] if lines else "no output")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return lines[-1] if lines else ""


def describe_plan(runner: StepRunner, only: str | None = None) -> list[str]:
    """Return the plan as lines for a shell: every command with its step, then costs and missing files.

    Raises:
        ValueError: a step that no plan has, or a ledger that is damaged.
    """
    planner = runner.planner
    ledger = Ledger(planner.output, runner.file)
    lines = []
    for step in runner.chosen(only):
        entry = ledger.of(step)
        state = "finished, skipped" if step.kind not in ALWAYS and runner.is_done(step, ledger) else ""
        if not state and entry.get("state") in (STARTED, FAILED):
            state = "interrupted or failed before"
        lines.append(f"# {step.name}" + (f": {state}" if state else ""))
        lines += [shown(command) for command in step.commands]
        if step.kind == "table":
            lines.append(f"#   writes {step.makes[0]}")
    cost, machine = planner.cost(), planner.experiment.machine
    at = f"at {machine.assumed_mfu:.0%} of {machine.peak_tflops:g} TFLOPS, assumed"
    lines.append("")
    if cost.gpu_hours_training is None:
        lines.append("# GPU-hours of training: not known, since the shape or the number of tokens is not")
    else:
        lines.append(f"# GPU-hours of training: {cost.gpu_hours_training:,.3g} ({at}; without tuning)")
    if cost.gpu_hours_reading is not None and planner.experiment.suites:
        lines.append(
            f"# GPU-hours of reading the prompts of the suites: {cost.gpu_hours_reading:,.3g} ({at}; "
            "generation and suites without lengths come on top)"
        )
    disk = "not known" if cost.disk_bytes is None else f"{cost.disk_bytes / 1e9:,.3g} GB"
    lines.append(f"# disk: {disk} (checkpoints with two kept a stage, exports, tokens)")
    missing = runner.missing_inputs(runner.chosen(only))
    lines += [f"# missing: {one}" for one in missing]
    return lines
