"""Run the steps of an experiment in order: each in a folder of its own, resumable, ended with us.

A step is a list of actions: functions, and commands as a user types them, which run as subprocesses. Its
stamp contains a hash of everything that the step depends on (earlier steps, commands, options, code,
versions) and, once it is finished, the sizes of its files. A finished step is reused as long as the hash is
the same; a folder whose stamp does not fit is removed whole before the step runs again. So files of two
runs never mix, and an interrupted experiment resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import IO, Any

from megatron_exact.command_line import progress_bar
from megatron_exact.files import write_json, write_text
from megatron_exact.folder_lock import LEASE, Lease
from megatron_exact.json_input import parse_json_object, read_json_object

ROOT = Path(__file__).resolve().parents[2]
"""The checkout: examples run its tools, wherever the package is installed."""
STAMP = "step.json"
LOG = "log.txt"
COMMANDS = "commands.txt"
"""In the folder of a step: the commands that make it, as a user of this checkout would type them."""

# What a step depends on besides its inputs, as patterns below the checkout.
SHARED_CODE = ("megatron_exact/files.py", "megatron_exact/json_input.py")
RECORDS_CODE = (*SHARED_CODE, "megatron_exact/lineage.py")
DATA_CODE = (*SHARED_CODE, "megatron_exact/data", "megatron_exact/exposure")
TRAINING_CODE = (*DATA_CODE, "megatron_exact/model", "megatron_exact/training")
CONVERSION_CODE = (*RECORDS_CODE, "megatron_exact/conversion", "megatron_exact/model")
EVALUATION_CODE = (*RECORDS_CODE, "megatron_exact/evaluation")
PROBE_CODE = (
    *SHARED_CODE,
    *(f"megatron_exact/evaluation/{name}.py" for name in ("engine", "prompts", "result_folders")),
    "megatron_exact/evaluation/probe*",
)
COMPUTED_WITH = ("torch", "megatron-core", "numpy", "transformers", "sentencepiece", "lm_eval")

POLL_SECONDS = 0.5
QUIET_LINE_SECONDS = 10.0
"""How often a line of progress appears where the output is no terminal."""
PATIENCE_SECONDS = 10.0
"""How long a child may take to end after each of SIGINT and SIGTERM before SIGKILL."""
TAIL_LINES = 15
"""Lines of its log that are shown where a command fails without an error message of ours."""
NAME = re.compile(r"\{(\w+)\}")
# Our own one-line errors say most; then whatever exception came first.
ERRORS = (re.compile(r"(?:^|\s)(error: .*)"), re.compile(r"(?:^|\s)([\w.]*(?:Error|Exception): .*)"))


def say(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """The size and schedule of one training stage."""

    row_tokens: int
    """Inputs of a packed row."""
    rows_per_iteration: int
    """Global batch."""
    rows_per_micro_batch: int
    """Rows of one forward pass."""
    iterations: int
    """Optimizer steps."""
    warmup_iterations: int
    """Steps over which the learning rate rises."""
    learning_rate: float
    """Peak, reached after the warm-up; it falls along a cosine to a tenth."""
    evaluation_batches: int
    """Global batches of every evaluation; fewer where the validation split is smaller."""
    evaluations: int = 1
    """Evaluations over the stage, the last one at its end."""

    @property
    def tokens(self) -> int:
        """Inputs that the stage reads."""
        return self.iterations * self.rows_per_iteration * self.row_tokens

    def of_length(self, iterations: int) -> StageSettings:
        """Return the same stage with another number of steps, the warm-up stretched along."""
        warmup = max(1, round(self.warmup_iterations * iterations / self.iterations))
        return replace(self, iterations=iterations, warmup_iterations=warmup)

    def schedule_flags(self) -> list[str]:
        """Return batch, steps and learning rate as flags; `--eval-iters` depends on the split."""
        return (
            f"--global-batch-size {self.rows_per_iteration} --micro-batch-size {self.rows_per_micro_batch} "
            f"--train-iters {self.iterations} --lr {self.learning_rate} "
            f"--min-lr {self.learning_rate / 10:g} --lr-decay-style cosine "
            f"--lr-warmup-iters {self.warmup_iterations} --clip-grad 1.0 --adam-beta2 0.95 "
            f"--eval-interval {max(1, self.iterations // self.evaluations)}"
        ).split()


@dataclass(frozen=True, kw_only=True)
class Step:
    """A finished step; in a command it stands for its folder."""

    folder: Path
    """Where its files are."""
    key: str
    """Hash of everything that it depends on; later steps depend on this."""
    seconds: float
    """Wall time of making it, over all attempts that it was continued from."""
    reused: bool
    """Whether an earlier run had made it."""
    commands: tuple[str, ...]
    """The commands that make it, as in `COMMANDS`."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.folder.name

    def __str__(self) -> str:
        return str(self.folder)


Action = str | tuple[str, ...] | Callable[[Path], object]
"""Of a step: a command with names in braces, the words of one, or a function of the step's folder."""


def words_of(command: str, values: Mapping[str, object]) -> tuple[str, ...]:
    """Return the words of a command as a user of this checkout types it.

    Values are filled in word by word, so none is split or read by a shell; a list becomes several words.
    """
    words: list[str] = []
    for word in command.split():
        value = values.get(word[1:-1]) if word[0] + word[-1] == "{}" else None
        if isinstance(value, (list, tuple)):
            words += map(str, value)
        else:
            words.append(str(ROOT / word) if word.startswith("tools/") else word.format_map(values))
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return (*programs[words[0]], *words[1:])


def shown(words: Sequence[str]) -> str:
    """Return a command as a user of this checkout types it, relative to the present folder."""
    line = shlex.join(
        "python" if word == sys.executable else word.removeprefix(f"{Path.cwd()}/") for word in words
    )
    return line.replace("python -m torch.distributed.run", "torchrun")


class StoppedError(RuntimeError):
    """Another step failed, or the user stopped all; this one ends its children and gives up."""


@dataclass(kw_only=True)
class Pipeline:
    """Makes steps; may be shared by threads."""

    folder: Path
    """Of all steps, held by one process at a time."""
    shows_commands: bool = True
    """Whether every command is printed."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of all commands, besides ours."""
    finished: list[Step] = field(default_factory=list)
    """Steps in the order in which they ended."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when everything is to end."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder; ValueError if another process does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remedy = "choose another folder (DEMO_DIR)"
        with Lease(self.folder / LEASE, folder=self.folder, purpose="a demo", remedy=remedy):
            yield

    def step(
        self,
        name: str,
        *actions: Action,
        depends_on: object = None,
        code: tuple[str, ...] = (),
        resumable: bool = False,
        heading: str = "",
        log: str | None = LOG,
        shown_lines: int = 0,
        iterations: int = 0,
        values: Mapping[str, object] | None = None,
    ) -> Step:
        """Return the step, made now or earlier.

        Args:
            name: of its folder.
            actions: fill the folder, which is empty unless the step is continued.
            depends_on: JSON value with what decides what functions among the actions do.
            code: patterns below the checkout of the code that it runs.
            resumable: all actions can resume in a folder that they left unfinished.
            heading: printed first.
            log: file in the folder for the output of commands; None lets it through.
            shown_lines: so many last lines of each command's output are printed when it has ended.
            iterations: of a training run, whose `losses.jsonl` beside the log tells its progress.
            values: for the names in commands, besides `here`, the step's folder. Steps among them that a
                command names are what this one depends on.
        """
        if heading:
            say(f"\n== {heading}")
        folder = self.folder / name
        values = {**(values or {}), "here": folder}
        calls = [words_of(action, values) if isinstance(action, str) else action for action in actions]
        commands = [words for words in calls if not callable(words)]
        named = {field for action in actions if isinstance(action, str) for field in NAME.findall(action)}
        inputs = [values[field] for field in sorted(named)]
        key = hash_of(
            {
                "inputs": [step.key for step in inputs if isinstance(step, Step)],
                "commands": [self._portable(words) for words in commands],
                "options": depends_on,
                "code": code_hash(code),
                "versions": versions(),
            }
        )
        stamp = read_stamp(folder)
        fits = stamp is not None and stamp["key"] == key
        reused = bool(stamp and fits and stamp["finished"] and has_files(folder, stamp["files"]))
        if reused:
            say(f"{name}: nothing changed, using what was made before")
        else:
            spent = 0.0
            if stamp is not None and fits and resumable and not stamp["finished"]:
                say(f"{name}: continuing where an earlier run stopped")
                spent = stamp["seconds"]
            elif folder.exists():
                say(f"{name}: made from other inputs or not finished, starting it again")
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            with self._stamped(folder, key, spent):
                if commands:
                    write_text(folder / COMMANDS, "".join(f"{shown(words)}\n" for words in commands))
                for call in calls:
                    if callable(call):
                        call(folder)
                    else:
                        self.call(call, folder, log=log, shown_lines=shown_lines, iterations=iterations)
            stamp = read_stamp(folder)
        assert stamp is not None
        lines = tuple(map(shown, commands))
        step = Step(folder=folder, key=key, seconds=stamp["seconds"], reused=reused, commands=lines)
        self.finished.append(step)
        return step

    def _portable(self, words: Sequence[str]) -> str:
        """A command that is the same wherever the folder of steps, the checkout and its Python lie."""
        line = shlex.join("python" if word == sys.executable else word for word in words)
        return line.replace(str(self.folder), "WORK").replace(str(ROOT), "CHECKOUT")

    @contextlib.contextmanager
    def _stamped(self, folder: Path, key: str, spent: float) -> Iterator[None]:
        """Stamp a step that is being made, and again when it is finished or interrupted."""
        started = time.monotonic()
        write_json(folder / STAMP, {"key": key, "finished": False, "seconds": spent})
        done = False
        try:
            yield
            done = True
        finally:
            stamp = {"key": key, "finished": done, "seconds": spent + time.monotonic() - started}
            write_json(folder / STAMP, {**stamp, "files": list_files(folder) if done else {}})

    def call(
        self,
        words: Sequence[str],
        folder: Path,
        *,
        log: str | None = LOG,
        shown_lines: int = 0,
        iterations: int = 0,
    ) -> None:
        """Run a command of a step to its end; the arguments are those of `step`.

        Raises:
            ValueError: it failed; names its own first error and the log.
            StoppedError: `stop` was set.
        """
        self.require_going()
        if self.shows_commands:
            say(f"$ {shown(words)}")
        if log is None:
            run_child(words, environment=self.environment, on_poll=self.require_going)
            return
        path = folder / log
        path.parent.mkdir(parents=True, exist_ok=True)
        start = path.stat().st_size if path.exists() else 0
        progress = None
        if iterations:
            say(f"  its output goes to {path}")
            progress = TrainingProgress(folder.name, path.parent / "losses.jsonl", iterations)

        def poll() -> None:
            self.require_going()
            if progress is not None:
                progress.poll()

        try:
            run_child(words, log=path, environment=self.environment, on_poll=poll)
            if progress is not None:
                progress.finish()
        except ChildFailure as failure:
            lines = _lines_from(path, start)
            cause = first_error(lines)
            if not cause.startswith("error: "):  # an error of ours says enough
                say("\n".join(["", *(f"  | {line}" for line in lines[-TAIL_LINES:])]))
            tool = words[2] if words[1] == "-m" else Path(words[1]).name
            raise ValueError(
                f"{folder.name}: {tool} stopped with exit code {failure.code} ({cause}); its log is {path}"
            ) from failure
        finally:
            if progress is not None:
                progress.close()
        for line in _lines_from(path, start)[-shown_lines:] if shown_lines else ():
            say(f"  | {line[:160]}")

    def require_going(self) -> None:
        """Raise StoppedError once `stop` is set."""
        if self.stop.is_set():
            raise StoppedError("another step failed, or the user stopped")

    def side_by_side[T](self, jobs: int, tasks: Iterable[Callable[[], T]]) -> list[T]:
        """Return the results of the tasks in their order, `jobs` of them running at a time.

        The first failure, or an interruption, sets `stop`: no further task begins, those that run end their
        children, and the failure is raised when all have ended.
        """

        def guarded(task: Callable[[], T]) -> T:
            self.require_going()
            try:
                return task()
            except BaseException:
                self.stop.set()
                raise

        with ThreadPoolExecutor(max_workers=jobs) as pool:
            futures = [pool.submit(guarded, task) for task in tasks]
            try:
                wait(futures)
            except BaseException:
                self.stop.set()
                raise
        failures = [error for future in futures if (error := future.exception()) is not None]
        if failures:
            raise next((error for error in failures if not isinstance(error, StoppedError)), failures[0])
        return [future.result() for future in futures]


def output_of(words: Sequence[str]) -> str:
    """Run a command that makes no file of a step, and return what it prints."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise ChildFailure(words, done.returncode)
    return done.stdout


def time_since(started: float) -> str:
    """Return the wall time since a reading of `time.monotonic`, such as `2 min 9 s`."""
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    return f"{minutes} min {seconds} s"


def unless_set(**variables: str) -> dict[str, str]:
    """Return the variables that the user's environment does not set."""
    return {name: value for name, value in variables.items() if name not in os.environ}


def hash_of(value: Any) -> str:
    """Return the hex sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()


def hash_of_code(root: Path, patterns: tuple[str, ...]) -> str:
    """Return a hash of the Python files that patterns below `root` name, folders with all inside."""
    digest = hashlib.sha256()
    for pattern in patterns:
        found = sorted(root.glob(pattern))
        assert found, f"{root} contains no {pattern}"
        for path in found:
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                digest.update(f"{file.relative_to(root)}\n".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.cache
def code_hash(patterns: tuple[str, ...]) -> str:
    """Return the hash of parts of the checkout as they were when this process first asked."""
    return hash_of_code(ROOT, patterns)


@functools.cache
def versions() -> dict[str, str | None]:
    """Return the versions of the libraries that compute; None for those that are not installed."""
    found: dict[str, str | None] = dict.fromkeys(COMPUTED_WITH)
    for name in found:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def read_stamp(folder: Path) -> dict[str, Any] | None:
    """Return the stamp of a step's folder, None where there is none that can be read."""
    try:
        stamp = read_json_object(folder / STAMP, "remove the demo's folder")
        return {"files": {}, **stamp, "key": stamp["key"], "finished": stamp["finished"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_files(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below `folder` except the stamp, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / STAMP)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def has_files(folder: Path, files: dict[str, int]) -> bool:
    """Return whether every file is there with its size."""
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items()
    )


def _lines_from(log: Path, start: int) -> list[str]:
    """Lines of a file from a byte on."""
    with open(log, "rb") as stream:
        stream.seek(start)
        return stream.read().decode("utf-8", errors="replace").splitlines()


def first_error(lines: list[str]) -> str:
    """Return what went wrong, in the words of the log: without prefixes, on one line."""
    for pattern in ERRORS:
        for line in lines:
            if found := pattern.search(line):
                return found[1].strip()
    return "its log names no error"


class ChildFailure(ValueError):
    """A child process ended with an exit code other than 0."""

    def __init__(self, command: Sequence[str], code: int) -> None:
        super().__init__(f"exit code {code} of: {shlex.join(command)}")
        self.code = code


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, even where a shell had them ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_child(
    command: Sequence[str],
    *,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    on_poll: Callable[[], None] | None = None,
) -> None:
    """Run a command to its end; if anything interrupts us, end it and all its descendants first.

    Args:
        command: program and arguments.
        log: receives stdout and stderr, appended; None lets them through.
        environment: variables to add to ours.
        on_poll: called about twice a second.

    Raises:
        ChildFailure: the command failed.
    """
    with contextlib.ExitStack() as stack:
        output: IO[bytes] | None = stack.enter_context(open(log, "ab")) if log is not None else None
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_SECONDS)
                if on_poll is not None:
                    on_poll()
                if child.returncode is not None:
                    break
        finally:
            end_child(child)
        if child.returncode != 0:
            raise ChildFailure(command, child.returncode)


def end_child(child: subprocess.Popen[bytes]) -> None:
    """End a child with all its descendants, gently first; nothing happens if it has ended by itself.

    A second interruption while it takes its time ends everything at once.
    """
    if child.poll() is not None:
        return
    # Handles, not numbers: torchrun's workers have sessions of their own and may end at any moment.
    family = [handle for pid in [child.pid, *descendants(child.pid)] if (handle := _open_process(pid))]
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            child.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(PATIENCE_SECONDS)
                break
    except KeyboardInterrupt:
        pass
    for handle in family:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
    child.kill()
    child.wait()


def _open_process(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.pidfd_open(pid)
    return None


def descendants(pid: int) -> list[int]:
    """Return the living processes below `pid`, from Linux's /proc; empty elsewhere."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


class TrainingProgress:
    """Follows the `losses.jsonl` of a run: a bar on a terminal; elsewhere a line now and then."""

    def __init__(self, name: str, path: Path, iterations: int) -> None:
        self._name = name
        self._path = path
        self._iterations = iterations
        self._bar = progress_bar(name, iterations, "iteration")
        self._old = self._modified()
        self._started = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._text = self._said = ""
        self._said_at = float("-inf")

    def poll(self) -> None:
        """Read what is new and show it."""
        now = time.monotonic()
        last = self._last_record() if self._modified() != self._old else None
        if last is not None and last["iteration"] != self._bar.n:
            self._first = first_done, first_time = self._first or (last["iteration"], now)
            done, loss = last["iteration"], last["loss"]
            state = "loss not finite" if loss is None else f"loss {loss:.3f}"
            rate = (
                f"  {(done - first_done) / (now - first_time):.1f} iterations/s"
                if done > first_done
                else ""
            )
            self._text = f"{self._name}: iteration {done}/{self._iterations}  {state}{rate}"
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._first is None:
            self._text = f"{self._name}: starting, {now - self._started:.0f} s"
        self._bar.refresh()
        if self._bar.disable and self._text != self._said and now - self._said_at >= QUIET_LINE_SECONDS:
            say(self._text)
            self._said, self._said_at = self._text, now

    def close(self) -> None:
        """Leave the bar, so that what is printed next has a line of its own."""
        self._bar.close()

    def finish(self) -> None:
        """Show the state at the end."""
        self.poll()
        self.close()
        say(f"{self._text}  in {time.monotonic() - self._started:.0f} s")

    def _modified(self) -> int:
        return self._path.stat().st_mtime_ns if self._path.exists() else 0

    def _last_record(self) -> dict[str, Any] | None:
        """The last whole line, None if there is none yet."""
        if not self._path.exists():
            return None
        with open(self._path, "rb") as stream:
            stream.seek(max(0, self._path.stat().st_size - 8192))
            whole, _, _ = stream.read().rpartition(b"\n")
        last = whole.rpartition(b"\n")[2]
        return parse_json_object(last, str(self._path), "train again") if whole else None
