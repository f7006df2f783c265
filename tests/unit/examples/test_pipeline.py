"""Steps are reused, continued or redone, children end with us, and a failure stops the rest."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from examples.miniature import pipeline as pipeline_module
from examples.miniature.pipeline import (
    COMMANDS,
    ROOT,
    ChildFailure,
    Pipeline,
    Step,
    StoppedError,
    TrainingProgress,
    descendants,
    first_error,
    hash_of_code,
    read_stamp,
    run_child,
    shown,
    stoppable,
    words_of,
)


class Recorder:
    """A step's build function that counts its calls and notes what it found."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []

    def __call__(self, folder: Path) -> None:
        self.found.append(sorted(path.name for path in folder.iterdir() if path.name != "step.json"))
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{len(self.found)}.txt").write_text("made")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(pipeline_module, "say", lines.append)
    return lines


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return Pipeline(folder=tmp_path / "work")


def fail(folder: Path) -> None:
    (folder / "half").write_text("half")
    raise KeyboardInterrupt


def test_a_finished_step_is_reused(pipeline: Pipeline, said: list[str]) -> None:
    build = Recorder()
    first = pipeline.step("pack", build, depends_on={"rows": 4})
    second = pipeline.step("pack", build, depends_on={"rows": 4})
    assert build.found == [[]]
    assert (first.reused, second.reused) == (False, True)
    assert (first.key, first.seconds) == (second.key, second.seconds)
    assert said == ["pack: nothing changed, using what was made before"]


@pytest.mark.parametrize("change", ["options", "missing file", "shorter file", "stamp"])
def test_any_change_starts_again_from_an_empty_folder(
    pipeline: Pipeline, said: list[str], change: str
) -> None:
    build = Recorder()
    step = pipeline.step("pack", build, depends_on={"rows": 4}, resumable=True)
    made = step.folder / "data" / "1.txt"
    if change == "missing file":
        made.unlink()
    elif change == "shorter file":
        made.write_text("")
    elif change == "stamp":
        (step.folder / "step.json").write_text("{")
    pipeline.step("pack", build, depends_on={"rows": 5 if change == "options" else 4}, resumable=True)
    assert build.found == [[], []]
    assert "starting it again" in said[0]


def test_an_interrupted_step_is_redone_unless_it_can_go_on(pipeline: Pipeline, said: list[str]) -> None:
    for resumable, expected in ((False, []), (True, ["half"])):
        name = f"step_{resumable}"
        with pytest.raises(KeyboardInterrupt):
            pipeline.step(name, fail, depends_on={"a": 1}, resumable=resumable)
        stamp = read_stamp(pipeline.folder / name)
        assert stamp is not None
        assert not stamp["finished"]
        build = Recorder()
        step = pipeline.step(name, build, depends_on={"a": 1}, resumable=resumable)
        assert build.found == [expected]
        assert step.seconds >= stamp["seconds"] if resumable else True
    assert "continuing" in said[-1]


def test_an_interrupted_step_of_other_options_is_not_continued(pipeline: Pipeline) -> None:
    with pytest.raises(KeyboardInterrupt):
        pipeline.step("train", fail, depends_on={"seed": 1}, resumable=True)
    build = Recorder()
    pipeline.step("train", build, depends_on={"seed": 2}, resumable=True)
    assert build.found == [[]]


def test_keys_follow_earlier_steps(pipeline: Pipeline) -> None:
    def chain(rows: int) -> Step:
        first = pipeline.step("first", Recorder(), depends_on={"rows": rows})
        return pipeline.step("second", Recorder(), depends_on={"first": first.key})

    one = chain(1)
    assert chain(1).reused
    two = chain(2)
    assert not two.reused
    assert one.key != two.key


def test_one_process_at_a_time(pipeline: Pipeline) -> None:
    with pipeline.held(), pytest.raises(ValueError, match=r"in use by process .*a demo"), pipeline.held():
        pass
    with pipeline.held():
        pass


def test_the_hash_of_code_sees_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.py").write_text("1")
    (tmp_path / "single.py").write_text("2")
    parts = ("part", "single.py")
    seen = {hash_of_code(tmp_path, parts)}
    (tmp_path / "part" / "notes.md").write_text("no code")
    assert hash_of_code(tmp_path, parts) in seen
    (tmp_path / "part" / "a.py").write_text("3")
    seen.add(hash_of_code(tmp_path, parts))
    (tmp_path / "part" / "a.py").rename(tmp_path / "part" / "b.py")
    seen.add(hash_of_code(tmp_path, parts))
    assert len(seen) == 3


def test_steps_depend_on_their_commands_and_on_the_steps_that_these_name(
    tmp_path: Path, said: list[str]
) -> None:
    def make(word: str, folder: Path = tmp_path) -> Step:
        pipeline = Pipeline(folder=folder / "work")
        first = pipeline.step("first", Recorder(), depends_on=word)
        command = "python -c print('{word}',open('{first}/data/1.txt').read())"
        return pipeline.step("second", command, values={"first": first, "word": "a b"})

    second = make("one")
    assert (second.folder / "log.txt").read_text() == "a b made\n"
    assert second.commands[0].startswith("python -c 'print(")
    assert (second.folder / COMMANDS).read_text() == f"{second.commands[0]}\n"
    assert make("one").reused
    assert not make("two").reused
    (tmp_path / "new").mkdir()
    (tmp_path / "work").rename(tmp_path / "new" / "work")
    assert make("two", tmp_path / "new").reused  # keys hold no path of the folder


def test_words_of_a_command_are_never_split_or_read_by_a_shell() -> None:
    values = {"file": Path("/a b/$(c); d"), "flags": ["--x", 1, "y z"]}
    words = words_of("python tools/pack_corpus.py\n --source 1:{file} {flags} --n {file}/n", values)
    assert words == (
        *(sys.executable, str(ROOT / "tools" / "pack_corpus.py"), "--source", "1:/a b/$(c); d"),
        *("--x", "1", "y z", "--n", "/a b/$(c); d/n"),
    )
    assert shown(words_of("torchrun -m module", {})) == "torchrun -m module"
    with pytest.raises(KeyError):
        words_of("python {missing}", values)


def test_a_command_is_shown_relative_to_the_present_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = words_of("python tools/import_hf.py --hf {hf}", {"hf": "/x y"})
    assert shown(words) == "python tools/import_hf.py --hf '/x y'"


def test_results_come_in_the_order_of_the_tasks(pipeline: Pipeline) -> None:
    second = threading.Event()

    def first_waits() -> int:
        assert second.wait(60)
        return 1

    def second_sets() -> int:
        second.set()
        return 2

    assert pipeline.side_by_side(2, [first_waits, second_sets]) == [1, 2]


def test_a_failure_stops_the_others_and_is_the_one_that_is_told(pipeline: Pipeline) -> None:
    started = threading.Event()
    waits = (sys.executable, "-c", "import time; time.sleep(600)")
    fails = (sys.executable, "-c", "raise SystemExit('error: no good')")

    def run_long() -> None:
        pipeline.step("long", lambda _: started.set(), waits)

    def fail() -> None:
        assert started.wait(60)
        pipeline.step("short", fails)

    never = partial(pytest.fail, "a task began after the failure")
    with pytest.raises(ValueError, match=r"short: -c stopped with exit code 1 \(error: no good\)"):
        pipeline.side_by_side(2, [run_long, fail, never])
    assert pipeline.stop.is_set()
    with pytest.raises(StoppedError):
        pipeline.side_by_side(2, [never])
    with pytest.raises(StoppedError):
        pipeline.step("short", fails)
    assert (pipeline.folder / "long" / COMMANDS).read_text().startswith("python -c")
    stamp = read_stamp(pipeline.folder / "long")
    assert stamp is not None
    assert not stamp["finished"]


def write_records(path: Path, iterations: range) -> None:
    with open(path, "a", encoding="utf-8") as stream:
        for iteration in iterations:
            stream.write(json.dumps({"iteration": iteration, "loss": 5 - 0.1 * iteration}) + "\n")


def test_progress_follows_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "losses.jsonl"
    write_records(path, range(1, 4))  # of an earlier attempt: not shown before it changes
    progress = TrainingProgress("base", path, 10)
    progress.poll()
    time.sleep(0.02)
    write_records(path, range(4, 8))
    progress.poll()
    with open(path, "a", encoding="utf-8") as stream:
        stream.write('{"iteration": 8, "lo')  # a line that is being written
    time.sleep(0.02)
    progress.finish()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("base: starting, 0 s")
    assert lines[-1].startswith("base: iteration 7/10  loss 4.300  in 0 s")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_renews_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = TrainingProgress("base", tmp_path / "losses.jsonl", 10)
    for done in (4, 8):
        write_records(tmp_path / "losses.jsonl", range(done - 3, done))
        progress.poll()
    assert capsys.readouterr().out == ""
    progress.finish()
    assert re.search(r"\rbase:.* 7\.00/10\.0 .*loss 4\.300", terminal.getvalue())
    assert terminal.getvalue().count("\n") == 1
    assert capsys.readouterr().out.startswith("base: iteration 7/10  loss 4.300")


def test_elsewhere_lines_appear_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(pipeline_module.time, "monotonic", lambda: now[0])
    progress = TrainingProgress("base", tmp_path / "losses.jsonl", 40)
    for second in range(30):
        now[0] = 100.0 + second
        if second >= 5:
            write_records(tmp_path / "losses.jsonl", range(second, second + 1))
        progress.poll()
    progress.finish()
    assert said == [
        "base: starting, 0 s",
        "base: iteration 10/40  loss 4.000  1.0 iterations/s",
        "base: iteration 20/40  loss 3.000  1.0 iterations/s",
        "base: iteration 29/40  loss 2.100  1.0 iterations/s  in 29 s",
    ]


@pytest.mark.parametrize(
    ("code", "cause", "tail"),
    [
        ("raise SystemExit('error: tau 9 is too large')", "error: tau 9 is too large", False),
        ("print('fine'); raise RuntimeError('gone')", "RuntimeError: gone", True),
    ],
)
def test_a_failed_run_names_its_first_error_and_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, cause: str, tail: bool
) -> None:
    (tmp_path / "arm").mkdir()
    (tmp_path / "arm" / "log.txt").write_text("error: of an earlier attempt\n")
    with pytest.raises(
        ValueError, match=rf"arm: -c stopped with exit code 1 \({cause}\); its log is .*log\.txt"
    ):
        Pipeline(folder=tmp_path).call((sys.executable, "-c", code), tmp_path / "arm")
    assert ("  | fine" in capsys.readouterr().out) == tail


def test_last_lines_of_a_command_are_shown(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    words = (sys.executable, "-c", "print('one'); print('two'); print('x' * 500)")
    pipeline.step("step", words, shown_lines=2)
    assert capsys.readouterr().out.splitlines()[-2:] == ["  | two", f"  | {'x' * 160}"]
    pipeline.step("open", (sys.executable, "-c", "print('through')"), log=None)
    assert not (pipeline.folder / "open" / "log.txt").exists()


@pytest.mark.parametrize("name", [name for name in dir(pipeline_module) if name.endswith("_CODE")])
def test_the_code_that_steps_depend_on_is_there(name: str) -> None:
    assert len(hash_of_code(ROOT, getattr(pipeline_module, name))) == 64
    with pytest.raises(AssertionError, match="contains no megatron_exact/nothing"):
        hash_of_code(ROOT, ("megatron_exact/nothing",))


def test_first_error() -> None:
    lines = [
        "UserWarning: not this",
        "[rank1]: Traceback (most recent call last):",
        "[rank1]: torch.distributed.DistError: gone",
    ]
    assert first_error(lines) == "torch.distributed.DistError: gone"
    assert first_error([*lines, "[rank0] error: the cause"]) == "error: the cause"
    assert first_error(["error: --eval-iters 9 is too many"]) == "error: --eval-iters 9 is too many"
    assert first_error(["all is well"]) == "its log names no error"


# A child that starts a grandchild in a session of its own, as torchrun does, and ignores polite requests.
STUBBORN = """
import signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_goes_to_the_log_and_failure_has_its_code(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    run_child([sys.executable, "-c", "print('one')"], log=log)
    with pytest.raises(ChildFailure, match="exit code 3") as caught:
        run_child([sys.executable, "-c", "import sys; print('two', file=sys.stderr); sys.exit(3)"], log=log)
    assert caught.value.code == 3
    assert log.read_text() == "one\ntwo\n"


def test_variables_are_added_and_input_is_closed(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['EXTRA'], 'PATH' in os.environ, repr(sys.stdin.read()))"
    run_child([sys.executable, "-c", code], log=tmp_path / "log.txt", environment={"EXTRA": "7"})
    assert (tmp_path / "log.txt").read_text() == "7 True ''\n"


@pytest.mark.skipif(sys.platform != "linux", reason="descendants are found through /proc")
@pytest.mark.parametrize("interruptions", [1, 2])
def test_an_interrupted_child_leaves_no_descendant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruptions: int
) -> None:
    monkeypatch.setattr(pipeline_module, "PATIENCE_SECONDS", 0.3 if interruptions == 1 else 60)
    log = tmp_path / "log.txt"
    family: list[int] = []
    others = set(descendants(os.getpid()))  # of tests before this one, a resource tracker for instance

    def poll() -> None:
        if log.read_text().endswith("\n"):
            family.extend([int(log.read_text()), *(set(descendants(os.getpid())) - others)])
            if interruptions == 2:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            raise KeyboardInterrupt

    started = time.monotonic()
    with stoppable(), pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", STUBBORN], log=log, on_poll=poll)
    assert len(set(family)) >= 2
    deadline = time.monotonic() + 10
    while any(map(is_alive, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, family))
    assert time.monotonic() - started < 50


def test_termination_is_an_interruption() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stoppable(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
