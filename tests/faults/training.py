"""Faults of training jobs: two data-parallel ranks, four iterations, a save after each.

Ranks are forked from the test process, which has imported Megatron once (tests/distributed/ranks.py).
"""

from __future__ import annotations

import ctypes
import os
import pickle
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import forked
from tests.faults import matrix
from tests.faults.data import DEEP, Damage, _fifo, _flip, _link, _replace, _truncate, wait_for
from tests.faults.kit import Kit
from tests.faults.matrix import Row

ITERATIONS = 4
TRACKER, RECORD, LOSSES = "latest_checkpointed_iteration.txt", "run.json", "losses.jsonl"
LAST, BEFORE = "iter_0000004", "iter_0000003"
KILLS = 10
MOMENTS = ("in an iteration or a save", "in a save")


@dataclass(frozen=True)
class Jobs:
    """What jobs are made of; nothing changes it."""

    pack: Path
    """Packed rows, beside their corpus `docs`."""
    start: Path
    """Weights that every run starts from."""
    whole: Path
    """A run that nothing happened to."""
    other: Path
    """The same with another rule: the other arm."""


_made: dict[Path, Jobs] = {}


def jobs_of(kit: Kit) -> Jobs:
    """Make the material once."""
    if kit.folder not in _made:
        from tests.distributed import jobs, ranks

        folder = kit.folder / "training"
        folder.mkdir()
        pack = jobs.make_pack(jobs.make_corpus(folder / "docs"), "concat")
        start = folder / "start"
        argv = jobs.command(pack, "none", 2, "--save", start, "--save-interval", 2)
        ranks.train(1, argv, folder / "output").check()
        made = Jobs(pack, start, folder / "whole", folder / "other")
        _made[kit.folder] = made
        for run, rule in ((made.whole, "exact"), (made.other, "none")):
            train(made, run, folder / f"output-{rule}", rule=rule, check=True)
    return _made[kit.folder]


def words(made: Jobs, run: Path, *extra: Any, rule: str = "exact", pack: Path | None = None) -> list[Any]:
    """The command that starts a run and resumes it."""
    from tests.distributed import jobs

    flags = ("--load", run, "--save", run, "--pretrained-checkpoint", made.start, "--save-interval", 1)
    timeout = ("--rank-timeout-seconds", 10)  # start-up has 6 times as long, also on a busy machine
    return jobs.command(pack or made.pack, rule, ITERATIONS, *flags, *timeout, *extra)


def train(
    made: Jobs,
    run: Path,
    output: Path,
    *extra: Any,
    patch: Callable[[], None] | None = None,
    check: bool = False,
    num_ranks: int = 2,
    **options: Any,
) -> Any:
    """Run the command on two ranks, or on one where rank 0 alone looks at what was damaged."""
    from tests.distributed import ranks

    ended = ranks.train(num_ranks, words(made, run, *extra, **options), output, patch)
    return ended.check() if check else ended


def require_whole(made: Jobs, run: Path) -> None:
    """The records of a run are those of the run that nothing happened to."""
    assert (run / LOSSES).read_text() == (made.whole / LOSSES).read_text()
    assert (run / TRACKER).read_text() == str(ITERATIONS)


def require_one_line(ended: Any, wanted: str) -> None:
    """Every rank that says something says the same line, and the words are in it."""
    output = "\n".join(ended.outputs)
    assert all(ended.codes), (ended.codes, output[-3000:])
    assert "Traceback" not in output, output[-3000:]
    found = [
        re.sub(r"^error: rank \d+: ", "error: ", line)
        for line in output.splitlines()
        if line.startswith("error: ")
    ]
    assert found, output[-3000:]
    assert len(set(found)) == 1, found
    assert wanted in found[0], found
    assert found[0].isprintable()


# -- signals ---------------------------------------------------------------------------------------


def _killing(folder: Path, seed: int, number: int, *, in_save: bool) -> Callable[[], None]:
    """A patch: one rank gets a signal after a random time, counted from its first batch or save."""

    def patch() -> None:
        from megatron_exact.training import run as run_module
        from megatron_exact.training import substitutions

        def set_clock() -> None:
            if not (folder / "clock").exists() and int(os.environ["RANK"]) == seed % 2:
                (folder / "clock").touch()
                delay = random.Random(seed).uniform(0, 0.5 if in_save else 2.5)
                threading.Timer(delay, os.kill, (os.getpid(), number)).start()

        module, name = (substitutions, "_stock_save") if in_save else (run_module, "next_packed_batch")
        stock = getattr(module, name)

        def first(*arguments: Any, **options: Any) -> Any:
            set_clock()
            return stock(*arguments, **options)

        setattr(module, name, first)

    return patch


def killed(seed: int, *, in_save: bool) -> Row:
    """SIGKILL of one rank."""

    def run(kit: Kit, folder: Path) -> None:
        made, run = jobs_of(kit), folder / "run"
        patch = _killing(folder, seed, signal.SIGKILL, in_save=in_save)
        ended = train(made, run, folder / "o1", patch=patch)
        assert (folder / "clock").exists()
        if any(ended.codes):
            assert -signal.SIGKILL in ended.codes
            train(made, run, folder / "o2", check=True)
        require_whole(made, run)

    moment = "in a save" if in_save else "at a random moment"
    return Row(
        name=f"kill-{'save-' if in_save else ''}{seed}",
        fault=f"SIGKILL of rank {seed % 2} {moment} (seed {seed}), then the same command",
        holds="nothing lost: resumed bit-identically",
        seen="`losses.jsonl` as text equal to that of a run without the fault",
        run=run,
    )


def launcher_killed(seed: int) -> Row:
    """SIGKILL of the launcher, as of torchrun."""

    def run(kit: Kit, folder: Path) -> None:
        made, run = jobs_of(kit), folder / "run"

        def orphan() -> None:
            ctypes.CDLL(None).prctl(forked.PR_SET_PDEATHSIG, 0)  # ranks of torchrun outlive it
            (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
            _killing(folder, seed, signal.SIGCONT, in_save=False)()

        def launch() -> int:
            os.environ["TORCHELASTIC_RUN_ID"] = "fault"
            return max(map(abs, train(made, run, folder / "o1", patch=orphan).codes))

        def kill(child: int) -> None:
            wait_for(folder / "clock")
            time.sleep(random.Random(seed).uniform(0, 2))
            os.kill(child, signal.SIGKILL)
            deadline = time.monotonic() + matrix.MOST_SECONDS
            while any(_lives(folder / f"pid-{rank}") for rank in range(2)):
                assert time.monotonic() < deadline, "ranks outlive their launcher"
                time.sleep(0.1)

        matrix.run_forked(launch, folder, while_running=kill)
        train(made, run, folder / "o2", check=True)
        require_whole(made, run)

    return Row(
        name=f"kill-launcher-{seed}",
        fault=f"SIGKILL of the launcher, as torchrun (seed {seed}), then the same command",
        holds="its ranks end by themselves; resumed bit-identically",
        seen="ranks gone within a minute; `losses.jsonl` as text equal to that of a run without the fault",
        run=run,
    )


def _lives(path: Path) -> bool:
    from megatron_exact.folder_lock import process_start, process_state

    pid = int(path.read_text())
    return process_state(pid, process_start(pid)) is not None


def _at_iteration(rank: int, action: Callable[[], None]) -> Callable[[], None]:
    """A patch: an action in the middle of iteration 3 on one rank."""

    def patch() -> None:
        from megatron_exact.training import run as run_module
        from tests.distributed import jobs

        stock, calls = run_module.next_packed_batch, [0]

        def next_packed_batch(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == jobs.GLOBAL_BATCH + 2 and int(os.environ["RANK"]) == rank:
                action()
            return stock(*arguments, **options)

        run_module.next_packed_batch = next_packed_batch  # type: ignore[assignment]

    return patch


def signalled(name: str, *, is_handled: bool) -> Row:
    """A signal to one rank in the middle of iteration 3."""
    number = signal.Signals[name]

    def run(kit: Kit, folder: Path) -> None:
        made, run = jobs_of(kit), folder / "run"
        handler = ("--exit-signal-handler", "--exit-signal", name) if is_handled else ()
        patch = _at_iteration(1, lambda: os.kill(os.getpid(), number))
        ended = train(made, run, folder / "o1", *handler, patch=patch)
        if is_handled:
            ended.check()
            assert (run / TRACKER).read_text() == "3"
        else:
            assert all(ended.codes)
        train(made, run, folder / "o2", *handler, check=True)
        require_whole(made, run)

    how = "with `--exit-signal-handler`" if is_handled else "without a handler"
    return Row(
        name=f"{name}{'-handled' if is_handled else ''}",
        fault=f"{name} to one rank in iteration 3, {how}, then the same command",
        holds="saves and exits with 0" if is_handled else "nothing lost: resumed bit-identically",
        seen="`losses.jsonl` as text equal to that of a run without the fault",
        run=run,
    )


def frozen(rank: int, *, in_save: bool = False) -> Row:
    """SIGSTOP of one rank; without a launcher, so that the store lives in rank 0."""

    def run(kit: Kit, folder: Path) -> None:
        made, run = jobs_of(kit), folder / "run"

        def stop() -> None:
            (folder / "stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)

        def in_the_save() -> None:
            from megatron_exact.training import substitutions

            stock = substitutions._stock_save

            def save(*arguments: Any, **options: Any) -> Any:
                if int(os.environ["RANK"]) == rank:
                    stop()
                return stock(*arguments, **options)

            substitutions._stock_save = save

        patch = in_the_save if in_save else _at_iteration(rank, stop)
        ended = train(made, run, folder / "o1", "--rank-timeout-seconds", 5, patch=patch)
        assert time.time() - (folder / "stopped").stat().st_mtime < matrix.MOST_SECONDS
        assert (ended.codes[rank], ended.codes[1 - rank]) == (-signal.SIGKILL, 75)
        (line,) = [one for one in ended.outputs[1 - rank].splitlines() if one.startswith("error: ")]
        phase = "saving a checkpoint" if in_save else "iteration 3, reading a micro-batch"
        assert f"no sign of life from rank {rank}" in line, line
        assert phase in line, line
        assert "is stopped" in line, line
        train(made, run, folder / "o2", check=True)
        require_whole(made, run)

    holds = " which holds the ranks' store" if rank == 0 else ""
    phase = "in a save" if in_save else "in iteration 3"
    return Row(
        name=f"frozen-{rank}{'-save' if in_save else ''}",
        fault=f"SIGSTOP of rank {rank}{holds} {phase}, then the same command",
        holds="the job ends in time with rank and phase; resumed bit-identically",
        seen=f"exit 75: `no sign of life from rank {rank}`, its phase; the same `losses.jsonl`",
        run=run,
    )


SIGNALS = [
    *(killed(seed, in_save=False) for seed in range(6)),
    *(killed(seed, in_save=True) for seed in range(6, 12)),
    *(launcher_killed(seed) for seed in range(8)),
    signalled("SIGTERM", is_handled=True),
    signalled("SIGUSR2", is_handled=True),
    *(signalled(name, is_handled=False) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGSEGV")),
    frozen(0),
    frozen(1),
    frozen(0, in_save=True),
    frozen(1, in_save=True),
]


# -- checkpoints -----------------------------------------------------------------------------------


def _in(iteration: str, pattern: str, damage: Callable[[str], Damage]) -> Damage:
    """Damage the first file of an iteration with such a name."""

    def harm(run: Path) -> None:
        path = sorted((run / iteration).glob(pattern))[0]
        damage(str(path.relative_to(run)))(run)

    return harm


def _swap(made: Jobs, run: Path) -> None:
    shutil.rmtree(run / LAST)
    shutil.copytree(made.other / LAST, run / LAST)


def _rename(run: Path) -> None:
    shutil.rmtree(run / LAST)
    (run / BEFORE).rename(run / LAST)


def _odd_names(run: Path) -> None:
    (run / "iter_x").mkdir()
    (run / "iter_\u00b2").mkdir()
    (run / "iter_9999999").symlink_to("nowhere")


class _Planted:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


def _evil(made: Jobs, run: Path) -> None:
    """A `.metadata` that runs a program; integrity.json says that it is right."""
    from megatron_exact.files import sha256_file

    _unfinished(made, run)
    folder = run / BEFORE
    before = (sha256_file(folder / ".metadata"), (folder / ".metadata").stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(_Planted(run / "EXECUTED")))
    text = (folder / "integrity.json").read_text()
    assert before[0] in text
    text = text.replace(before[0], sha256_file(folder / ".metadata"))
    size = (folder / ".metadata").stat().st_size
    (folder / "integrity.json").write_text(re.sub(rf"\b{before[1]}\b", str(size), text))


def _unfinished(_: Jobs, run: Path) -> None:
    """A run that has one iteration to go."""
    shutil.rmtree(run / LAST)
    (run / TRACKER).write_text("3")


def falls_back(name: str, fault: str, wanted: str, damage: Callable[[Jobs, Path], object]) -> Row:
    """A damaged last iteration: the one before is taken, with a line."""

    def run(kit: Kit, folder: Path) -> None:
        made, run = jobs_of(kit), folder / "run"
        shutil.copytree(made.whole, run, symlinks=True)
        damage(made, run)
        ended = train(made, run, folder / "o1", check=True)
        assert wanted in ended.outputs[0], ended.outputs[0][-3000:]
        assert not (run / "EXECUTED").exists()
        require_whole(made, run)

    return Row(
        name=name,
        fault=f"{fault}, then the same command",
        holds="the iteration before is taken, with a line; the end is bit-identical",
        seen=f"`{wanted}`; the same `losses.jsonl`",
        run=run,
    )


def refused(
    name: str,
    fault: str,
    wanted: str,
    damage: Callable[[Jobs, Path], object],
    *extra: Any,
    may_add: Sequence[str] = (),
    **options: Any,
) -> Row:
    """A run that cannot go on: one line, and the folder as it was."""

    def run(kit: Kit, folder: Path) -> None:
        made, run = jobs_of(kit), folder / "run"
        shutil.copytree(made.whole, run, symlinks=True)
        damage(made, run)
        before = matrix.contents(run)
        ended = train(made, run, folder / "o1", *extra, **options)
        require_one_line(ended, wanted)
        assert not (run / "EXECUTED").exists()
        after = matrix.contents(run)
        changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        assert not {name for name in changed if not name.startswith(tuple(may_add))}, changed

    return Row(name=name, fault=fault, holds=matrix.REFUSED, seen=f"exit code not 0: `{wanted}`", run=run)


def _only(damage: Damage) -> Callable[[Jobs, Path], object]:
    return lambda _, run: damage(run)


def _both(damage: Callable[[str], Damage]) -> Callable[[Jobs, Path], object]:
    def harm(_: Jobs, run: Path) -> None:
        for iteration in sorted(run.glob("iter_*")):
            damage(iteration.name)(run)

    return harm


CHECKPOINTS = [
    refused(
        "checkpoint-renamed",
        "the last checkpoint replaced by the one before under its name",
        "iter_0000004",
        lambda _, run: _rename(run),
    ),
    falls_back(
        "tracker-fifo",
        "a FIFO in place of the tracker",
        "resuming from iter_0000003",
        lambda made, run: (_unfinished(made, run), _fifo(TRACKER)(run)),
    ),
    falls_back(
        "iteration-folder",
        "folders named `iter_x`, `iter_²` and a link `iter_9999999` in the run",
        "run is finished",
        lambda _, run: _odd_names(run),
    ),
    falls_back(
        "checkpoint-flipped",
        "a flipped bit in the last checkpoint",
        "not taken: iter_0000004",
        _only(_in(LAST, "*.distcp", lambda path: _flip(path, -300))),
    ),
    falls_back(
        "checkpoint-cut",
        "a file of the last checkpoint cut",
        "not taken: iter_0000004",
        _only(_in(LAST, "*.distcp", lambda path: _truncate(path, -100))),
    ),
    falls_back(
        "checkpoint-empty",
        "a file of the last checkpoint emptied",
        "not taken: iter_0000004",
        _only(_in(LAST, "*.distcp", lambda path: _truncate(path, 0))),
    ),
    falls_back(
        "checkpoint-file-gone",
        "a file of the last checkpoint deleted",
        "not taken: iter_0000004",
        lambda _, run: sorted((run / LAST).glob("*.distcp"))[0].unlink(),
    ),
    falls_back(
        "checkpoint-list-gone",
        "integrity.json of the last checkpoint deleted",
        "not taken: iter_0000004",
        lambda _, run: (run / LAST / "integrity.json").unlink(),
    ),
    falls_back(
        "checkpoint-list-junk",
        "integrity.json of the last checkpoint of binary junk",
        "not taken: iter_0000004",
        lambda _, run: (run / LAST / "integrity.json").write_bytes(bytes(range(256))),
    ),
    falls_back(
        "checkpoint-list-deep",
        "integrity.json of the last checkpoint nested 100,000 deep",
        "not taken: iter_0000004",
        lambda _, run: (run / LAST / "integrity.json").write_bytes(DEEP),
    ),
    falls_back(
        "checkpoint-unlisted",
        "a file that integrity.json does not list",
        "not taken: iter_0000004",
        lambda _, run: (run / LAST / "__9_9.distcp").write_bytes(b"x"),
    ),
    falls_back(
        "checkpoint-link",
        "a file of the last checkpoint replaced by a link",
        "not taken: iter_0000004",
        _only(_in(LAST, "*.distcp", lambda path: _link(path, "/dev/zero"))),
    ),
    falls_back(
        "checkpoint-fifo",
        "a file of the last checkpoint replaced by a FIFO",
        "not taken: iter_0000004",
        _only(_in(LAST, "*.distcp", _fifo)),
    ),
    refused(
        "checkpoint-swapped",
        "the last checkpoint exchanged with that of the other arm, whose hashes fit",
        "belongs to another run",
        _swap,
    ),
    falls_back(
        "checkpoint-metadata-gone",
        "`.metadata` of the last checkpoint deleted",
        "not taken: iter_0000004",
        lambda _, run: (run / LAST / ".metadata").unlink(),
    ),
    falls_back(
        "tracker-behind",
        "a tracker that names the iteration before",
        "resuming from iter_0000003",
        _only(_replace(TRACKER, b"3")),
    ),
    falls_back(
        "tracker-gone",
        "the tracker and the last checkpoint deleted",
        "resuming from iter_0000003",
        lambda _, run: (shutil.rmtree(run / LAST), (run / TRACKER).unlink()),
    ),
    refused(
        "checkpoint-code",
        "`.metadata` that runs a program when it is unpickled, hashes fitting",
        ".metadata",
        _evil,
        may_add=("tensorboard",),
    ),
    refused(
        "checkpoint-all-flipped",
        "a flipped bit in every checkpoint",
        "contains no intact checkpoint",
        _both(lambda name: _in(name, "*.distcp", lambda path: _flip(path, -300))),
        may_add=("tensorboard",),
    ),
    refused(
        "tracker-junk", "a tracker of binary junk", TRACKER, _only(_replace(TRACKER, bytes(range(256))))
    ),
    refused("tracker-digits", "a tracker of 5,000 digits", TRACKER, _only(_replace(TRACKER, b"1" * 5000))),
    refused("tracker-negative", "a tracker that says -3", TRACKER, _only(_replace(TRACKER, b"-3"))),
    refused("run-list", "run.json that is a list", RECORD, _only(_replace(RECORD, b"[]"))),
    refused("run-junk", "run.json of binary junk", RECORD, _only(_replace(RECORD, bytes(range(256))))),
    refused("run-deep", "run.json nested 100,000 deep", RECORD, _only(_replace(RECORD, DEEP))),
    refused("run-gone", "run.json deleted", RECORD, lambda _, run: (run / RECORD).unlink()),
    refused("run-fifo", "a FIFO in place of run.json", RECORD, _only(_fifo(RECORD))),
    refused("other-rule", "the other arm's rule on this run", "another run", _unfinished, rule="none"),
    refused("other-seed", "another seed", "another run", _unfinished, "--seed", 9),
    refused("other-lr", "another learning rate", "--lr", _unfinished, "--lr", "2e-3"),
    refused(
        "other-decoupled-lr",
        "`--decoupled-lr` at a resume",
        "decoupled",
        _unfinished,
        "--decoupled-lr",
        "1e-4",
    ),
]


# -- flags that cannot be --------------------------------------------------------------------------


def flags(name: str, fault: str, wanted: str, *extra: Any) -> Row:
    """A new run that must not begin."""

    def run(kit: Kit, folder: Path) -> None:
        made, run = jobs_of(kit), folder / "run"
        require_one_line(train(made, run, folder / "o1", *extra), wanted)
        assert not run.exists()

    return Row(name=name, fault=fault, holds=matrix.REFUSED, seen=f"exit code not 0: `{wanted}`", run=run)


FLAGS = [
    flags("lr-inf", "`--lr inf`", "lr", "--lr", "inf"),
    flags("lr-nan", "`--lr nan`", "lr", "--lr", "nan"),
    flags("lr-negative", "`--lr -1`", "lr", "--lr", "-1"),
    flags("train-iters-0", "`--train-iters 0`", "--train-iters", "--train-iters", 0),
    flags("train-iters-negative", "`--train-iters -1`", "--train-iters", "--train-iters", -1),
    flags("ckpt-step-text", "`--ckpt-step x`", "ckpt-step", "--ckpt-step", "x"),
    flags("optimizer-muon", "`--optimizer muon`", "optimizer", "--optimizer", "muon"),
    flags("rope-yarn", "`--rope-type yarn`", "rope-type", "--rope-type", "yarn"),
    flags("freeze-all", "`--freeze-all-layers`", "freeze-all-layers", "--freeze-all-layers"),
    flags("rampup", "`--rampup-batch-size 2 2 8`", "rampup-batch-size", "--rampup-batch-size", 2, 2, 8),
    flags(
        "attention-local",
        "`--attention-backend local`",
        "attention-backend",
        "--attention-backend",
        "local",
    ),
]


# -- folders, disks and data -----------------------------------------------------------------------


def _two_jobs(kit: Kit, folder: Path) -> None:
    made, run = jobs_of(kit), folder / "run"

    def wait() -> None:
        (folder / "there").touch()
        wait_for(folder / "go")

    def launch() -> int:
        slow = ("--rank-timeout-seconds", 0)
        return max(map(abs, train(made, run, folder / "o1", *slow, patch=_at_iteration(0, wait)).codes))

    def second(_: int) -> None:
        wait_for(folder / "there")
        ended = train(made, run, folder / "o2")
        (folder / "go").touch()
        require_one_line(ended, "is in use by process")

    ended = matrix.run_forked(launch, folder, while_running=second)
    assert ended.code == 0, ended.output
    require_whole(made, run)


def _full_disk_in_a_save(kit: Kit, folder: Path) -> None:
    made, run = jobs_of(kit), folder / "run"
    shutil.copytree(made.whole, run)
    shutil.rmtree(run / LAST)
    (run / TRACKER).write_text("3")
    size = max(path.stat().st_size for path in (run / BEFORE).iterdir()) // 2
    ended = train(made, run, folder / "o1", patch=lambda: matrix.limit_files(size))
    require_one_line(ended, "iter_0000004 could not be written")
    assert (run / TRACKER).read_text() == "3"
    train(made, run, folder / "o2", check=True)
    require_whole(made, run)


def _read_only(kit: Kit, folder: Path) -> None:
    made = jobs_of(kit)
    with matrix.mounted(folder / "disk", "size=64m") as disk:
        run = disk / "run"
        shutil.copytree(made.whole, run)
        shutil.rmtree(run / LAST)
        (run / TRACKER).write_text("3")
        matrix.remount_read_only(disk)
        before = matrix.contents(run)
        require_one_line(train(made, run, folder / "o1", num_ranks=1), "Read-only file system")
        assert matrix.contents(run) == before


def _small_disk(kit: Kit, folder: Path) -> None:
    made = jobs_of(kit)
    with matrix.mounted(folder / "disk", "size=1m") as disk:
        require_one_line(train(made, disk / "run", folder / "o1"), "iter_0000001 could not be written")
        assert not (disk / "run" / TRACKER).exists()


def _copied(made: Jobs, folder: Path) -> Path:
    """Corpus and pack, to be damaged; returns the pack."""
    for path in made.pack.parent.glob("docs.*"):
        shutil.copy(path, folder / path.name)
    shutil.copytree(made.pack, folder / made.pack.name)
    return folder / made.pack.name


def data_fault(name: str, fault: str, wanted: str, damage: Damage) -> Row:
    """A corpus or pack that changes between two starts of one run."""

    def run(kit: Kit, folder: Path) -> None:
        made, run = jobs_of(kit), folder / "run"
        pack = _copied(made, folder)
        shutil.copytree(made.whole, run)
        shutil.rmtree(run / LAST)
        (run / TRACKER).write_text("3")
        damage(folder)
        before = matrix.contents(run)
        require_one_line(train(made, run, folder / "o1", pack=pack, num_ranks=1), wanted)
        assert matrix.contents(run) == before

    return Row(name=name, fault=fault, holds=matrix.REFUSED, seen=f"exit code not 0: `{wanted}`", run=run)


def _exchange_pack(folder: Path) -> None:
    from tests.distributed import jobs

    shutil.rmtree(folder / "concat")
    jobs.make_pack(folder / "docs", "concat", seed=4)


def _shuffle(folder: Path) -> None:
    path = folder / "docs.bin"
    data = bytearray(path.read_bytes())
    data[100:110], data[200:210] = data[200:210], data[100:110]
    path.write_bytes(data)


def _nan_in_checkpoint(kit: Kit, folder: Path) -> None:
    """A weight that becomes NaN by a step is not saved, and the run goes on from before."""
    made, run = jobs_of(kit), folder / "run"

    def damage() -> None:
        import gc

        import torch

        for found in gc.get_objects():
            if isinstance(found, torch.nn.Embedding | torch.nn.Module) and hasattr(
                found, "word_embeddings"
            ):
                with torch.no_grad():
                    found.word_embeddings.weight[5] = float("nan")
                return
        raise AssertionError("no embedding")

    ended = train(made, run, folder / "o1", patch=_at_iteration(1, damage))
    assert all(ended.codes)
    output = "\n".join(ended.outputs)
    assert "Traceback" not in output, output[-3000:]
    assert "not finite" in output or "NaN" in output, output[-3000:]
    assert (run / TRACKER).read_text() == "2"
    train(made, run, folder / "o2", check=True)
    require_whole(made, run)


def _damaged_losses(kit: Kit, folder: Path) -> None:
    made, run = jobs_of(kit), folder / "run"
    shutil.copytree(made.whole, run)
    shutil.rmtree(run / LAST)
    (run / TRACKER).write_text("3")
    lines = (run / LOSSES).read_text().splitlines(keepends=True)
    (run / LOSSES).write_text(lines[0] + "{damaged\n" + "".join(lines[1:3]))
    ended = train(made, run, folder / "o1", check=True)
    assert "losses.jsonl" in ended.outputs[1] + ended.outputs[0]
    assert (run / LOSSES).read_text() == (made.whole / LOSSES).read_text()
    assert (run / "losses.jsonl.damaged").read_text() == "{damaged\n"


def _corpus_cut_during(kit: Kit, folder: Path) -> None:
    """The corpus is cut in the middle of iteration 3, then put back."""
    made, run = jobs_of(kit), folder / "run"
    pack = _copied(made, folder)
    path = folder / "docs.bin"
    whole = path.read_bytes()
    patch = _at_iteration(0, lambda: os.truncate(path, 10))
    ended = train(made, run, folder / "o1", pack=pack, patch=patch)
    output = "\n".join(ended.outputs)
    assert all(ended.codes), output[-3000:]
    assert "docs.bin" in "\n".join(one for one in output.splitlines() if "error: " in one), output[-3000:]
    path.write_bytes(whole)
    train(made, run, folder / "o2", pack=pack, check=True)
    require_whole(made, run)


def _nan_before_a_save(kit: Kit, folder: Path) -> None:
    """A weight becomes NaN after its step, before the save of iteration 3."""
    made, run = jobs_of(kit), folder / "run"

    def patch() -> None:
        from megatron_exact.training import substitutions

        stock = substitutions._stock_save

        def save(iteration: int, model: Any, *arguments: Any, **options: Any) -> Any:
            import torch

            if iteration == 3:
                with torch.no_grad():
                    next(model[0].parameters()).view(-1)[5] = float("nan")
            return stock(iteration, model, *arguments, **options)

        substitutions._stock_save = save

    ended = train(made, run, folder / "o1", patch=patch)
    require_one_line(ended, "is not saved")
    assert (run / TRACKER).read_text() == "2"
    train(made, run, folder / "o2", check=True)
    require_whole(made, run)


OTHERS = [
    Row(
        name="corpus-cut-during",
        fault="the corpus cut to 10 bytes in iteration 3, put back, then the same command",
        holds="the job ends with the name of the file, not with SIGBUS or zeros; resumed bit-identically",
        seen="exit code not 0: `docs.bin`; the same `losses.jsonl`",
        run=_corpus_cut_during,
    ),
    Row(
        name="weights-nan-save",
        fault="NaN in a weight between the step and the save of iteration 3, then the same command",
        holds="it is not saved; resumed bit-identically from before",
        seen="exit code not 0: `is not saved`; tracker stays at 2; the same `losses.jsonl`",
        run=_nan_before_a_save,
    ),
    Row(
        name="two-jobs",
        fault="the same command a second time while the first trains",
        holds="the second is refused in one line, the first is undisturbed",
        seen="second: `is in use by process`; first: exit 0, the `losses.jsonl` of a run alone",
        run=_two_jobs,
    ),
    Row(
        name="full-disk-save",
        fault="a disk that is full in the middle of a save, then the same command with room",
        holds="the last checkpoint stays; resumed bit-identically",
        seen="`iter_0000004 could not be written`; the same `losses.jsonl`",
        run=_full_disk_in_a_save,
    ),
    Row(
        name="small-disk",
        fault="a file system of 1 MiB",
        holds=matrix.REFUSED,
        seen="exit code not 0: `iter_0000001 could not be written`",
        run=_small_disk,
    ),
    Row(
        name="read-only",
        fault="a run on a file system that became read-only",
        holds=matrix.REFUSED,
        seen="exit code not 0: `Read-only file system`",
        run=_read_only,
    ),
    data_fault(
        "pack-exchanged",
        "the pack exchanged for one of another seed under a run",
        "another run",
        _exchange_pack,
    ),
    data_fault(
        "pack-array-flipped",
        "a flipped bit in the pack",
        "segment_start.npy",
        _flip("concat/train/segment_start.npy", -3),
    ),
    data_fault(
        "corpus-changed",
        "two pieces of the corpus exchanged, size and time as they were",
        "docs.bin",
        _shuffle,
    ),
    data_fault("corpus-cut", "the corpus cut", "docs.bin", _truncate("docs.bin", -20)),
    data_fault(
        "corpus-gone", "the corpus deleted", "docs.bin", lambda folder: (folder / "docs.bin").unlink()
    ),
    data_fault(
        "corpus-index-flipped", "a flipped bit in the index", "its index describes", _flip("docs.idx", 50)
    ),
    Row(
        name="weights-nan",
        fault="NaN in an embedding in the middle of iteration 3, then the same command",
        holds="nothing that is not finite is saved; resumed bit-identically from before",
        seen="exit code not 0, one line; tracker stays at 2; the same `losses.jsonl`",
        run=_nan_in_checkpoint,
    ),
    Row(
        name="losses-damaged",
        fault="a damaged line in losses.jsonl, then the same command",
        holds="the line is kept aside and said; the good ones stay",
        seen="`losses.jsonl.damaged` has the line; the rest as text equal to a run without the fault",
        run=_damaged_losses,
    ),
]

ROWS = [*SIGNALS, *CHECKPOINTS, *FLAGS, *OTHERS]
