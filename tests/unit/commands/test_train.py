"""`train`: what goes to torchrun, what goes to the job, and what ends before either starts."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.command_line import ToolParser
from megatron_exact.commands import train
from megatron_exact.commands.train import Ranks, choose_ranks, launcher_words, split_words
from megatron_exact.training.arguments import build_parser
from megatron_exact.training.flag_classes import megatron_flags_by_spelling

RECIPE = ("--recipe", "llama3.1_8b_16k")
OF_THE_PROGRAM = {
    "-h",
    "--help",
    "-m",
    "--module",
    "--no-python",
    "--no_python",
    "--run-path",
    "--run_path",
}
"""Options of torchrun that say which program it starts."""


@pytest.fixture(autouse=True)
def _no_variables_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PET_", "TORCH_ELASTIC_")):
            monkeypatch.delenv(name)


def launcher_actions() -> dict[str, argparse.Action]:
    parser = ToolParser(add_help=False)
    train.add_launcher_options(parser)
    return {spelling: action for action in parser._actions for spelling in action.option_strings}


def test_the_launcher_options_are_torchruns() -> None:
    from torch.distributed.run import get_args_parser

    theirs = {
        spelling: action
        for action in get_args_parser()._actions
        for spelling in action.option_strings
        if spelling not in OF_THE_PROGRAM
    }
    ours = launcher_actions()
    assert set(ours) == set(theirs)
    for spelling, action in ours.items():
        assert action.dest == theirs[spelling].dest
        assert (action.nargs == 0) == (theirs[spelling].nargs == 0), spelling
        assert set(action.choices or ()) == set(theirs[spelling].choices or ()), spelling


def test_no_flag_of_a_job_has_the_name_of_a_launcher_option() -> None:
    """Otherwise torchrun's options could not stand among the job's."""
    job = {spelling for action in build_parser()._actions for spelling in action.option_strings}
    job |= set(megatron_flags_by_spelling())
    assert "--pack" in job
    assert "--train-iters" in job
    assert set(launcher_actions()) & job == set()


@pytest.mark.parametrize(
    "words",
    [
        "--nproc-per-node 4 -t 3 --pack p --train-iters 9 --exact-tau -1 --lr=1e-5 --cpu",
        "--pack p --train-iters 9 --nproc_per_node=4 --exact-tau -1 --lr=1e-5 --cpu --tee 3",
        "--nproc-per-node 4 --tee 3 -- --pack p --train-iters 9 --exact-tau -1 --lr=1e-5 --cpu",
    ],
)
def test_options_of_torchrun_stand_anywhere_or_before_the_dashes(words: str) -> None:
    options, job = split_words(words.split())
    assert (options.nproc_per_node, options.tee, options.nnodes) == ("4", "3", None)
    assert job == ["--pack", "p", "--train-iters", "9", "--exact-tau", "-1", "--lr=1e-5", "--cpu"]


def test_what_stands_after_the_dashes_is_the_jobs() -> None:
    options, job = split_words(["--", "--pack", "p", "--nproc-per-node", "2"])
    assert options.nproc_per_node is None
    assert job == ["--pack", "p", "--nproc-per-node", "2"]
    with pytest.raises(ValueError, match="--pack stands before -- and is not an option of torchrun"):
        split_words(["--nproc-per-node", "2", "--pack", "p", "--", "--cpu"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--nproc-per-node 0", "'0' is not above 0"),
        ("--nproc-per-node many", "'many' is not a whole number"),
        ("--nnodes 1:4", "is a range: the layout of a Megatron job is fixed"),
        ("--max-restarts x", "invalid int value"),
        ("--start-method thread", "invalid choice"),
    ],
)
def test_bad_launcher_options_are_named(words: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        split_words(words.split())


def ranks(*words: str) -> Ranks:
    return choose_ranks(*split_words(words))


def test_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks() == Ranks(nodes=1, per_node=1)
    assert ranks("--nproc-per-node", "4") == Ranks(nodes=1, per_node=4)
    assert ranks("--nnodes", "1:1") == Ranks(nodes=1, per_node=1)
    assert ranks(*RECIPE) == Ranks(nodes=1, per_node=8)
    assert ranks(*RECIPE, "--nproc-per-node", "2") == Ranks(nodes=1, per_node=2)
    assert ranks("--nnodes", "2", "--master-addr", "a") == Ranks(nodes=2, per_node=1)
    assert ranks("--nnodes", "2", "--rdzv-endpoint", "a:1") == Ranks(nodes=2, per_node=1)
    assert ranks("--nproc-per-node", "cpu").per_node >= 1
    with pytest.raises(ValueError, match="--nnodes 2 does not say where the nodes meet"):
        ranks("--nnodes", "2")
    with pytest.raises(ValueError, match=r"asks for 4 nodes and --nnodes is missing.*--nnodes 4"):
        ranks("--recipe", "llama3.1_8b_16k_4nodes")
    with pytest.raises(ValueError, match="recipe 'x' is unknown"):
        ranks("--recipe", "x")
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    assert ranks() == Ranks(nodes=1, per_node=3)
    assert ranks("--nproc-per-node", "2") == Ranks(nodes=1, per_node=2)
    assert Ranks(nodes=2, per_node=4).environment()["WORLD_SIZE"] == "8"


def words_for(*words: str) -> list[str]:
    options, job = split_words(words)
    return launcher_words(options, choose_ranks(options, job))


def test_torchrun_reads_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import parse_args

    def as_torchrun(*words: str) -> Any:
        return parse_args([*words_for(*words), "-m", train.JOB, "--pack", "-r"])

    plain = as_torchrun()
    stock = parse_args(["-m", train.JOB, "--pack", "-r"])
    differences = {name for name, value in vars(plain).items() if value != getattr(stock, name)}
    assert differences == {"nnodes", "shutdown_timeout"}
    assert (plain.nnodes, plain.nproc_per_node, plain.shutdown_timeout) == (
        "1",
        "1",
        train.SHUTDOWN_SECONDS,
    )
    assert plain.training_script_args == ["--pack", "-r"]
    given = as_torchrun(
        *("--nproc-per-node", "2", "--standalone", "-r", "0:1,1:2", "--monitor-interval", "0.5"),
        *("--duplicate-stdout-filters", "a,,b,c", "--shutdown-timeout", "9"),
    )
    assert (given.nproc_per_node, given.standalone, given.redirects) == ("2", True, "0:1,1:2")
    assert (given.monitor_interval, given.shutdown_timeout) == (0.5, 9)
    assert given.duplicate_stdout_filters == ["a,b", "c"]
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")
    assert as_torchrun().shutdown_timeout is None


REFUSED = """
import sys
from megatron_exact.cli import call
try:
    call(["train", *sys.argv[1:]])
except (ValueError, OSError) as error:
    print(error)
assert not {"torch", "megatron"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--nproc-per-node 2", "--pack is missing"),
        ("--nproc-per-node 2 --pack nowhere --lr 1", "nowhere is not a packed dataset"),
        ("--pack nowhere --lr much", "--lr"),
        ("--pack nowhere --no-such-flag", "--no-such-flag"),
        ("--pack nowhere --token-weighting exakt", "exakt"),
    ],
)
def test_a_refused_job_starts_no_rank_and_no_torch(words: str, reason: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, *words.split()], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.count("\n") == 1
    assert reason in done.stdout
    assert list(tmp_path.iterdir()) == []


RANK_PROGRAM = """
import os, signal, sys, time
from megatron_exact.training.runtime import tell_launcher
how = sys.argv[1]
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "asked":
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
tell_launcher("no such pack", how)
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("how", "code", "line", "is_account_printed"),
    [
        ("user", 1, "error: rank 0 ended with exit code 1: no such pack", False),
        ("asked", 143, "the ranks were ended after SIGTERM", False),
        ("fault", 1, "error: rank 0 ended with exit code 1: no such pack", True),
        ("killed", 137, "error: rank 0 was ended by SIGKILL", True),
    ],
)
def test_torchruns_account_of_an_end_is_printed_for_faults_alone(
    how: str, code: int, line: str, is_account_printed: bool, tmp_path: Path
) -> None:
    """What was asked for, or refused, ends with our line alone."""
    program = tmp_path / "rank.py"
    program.write_text(RANK_PROGRAM)
    text = (
        "import sys; from megatron_exact.commands.train import launch; ended = launch(sys.argv[1:]); "
        "print(('error: ' if ended.kind else '') + ended.message, file=sys.stderr); sys.exit(ended.code)"
    )
    words = ["--standalone", "--monitor-interval", "0.1", str(program), how]
    done = subprocess.run([sys.executable, "-c", text, *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    *before, last = done.stderr.splitlines()
    assert last == line
    assert "Traceback" not in done.stderr
    assert bool(before) == is_account_printed, done.stderr
    assert ("failed (exitcode: " in done.stderr) == is_account_printed


def test_the_command_of_a_recipe_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.train([*RECIPE, "--print-arguments"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "torchrun --standalone --nproc-per-node 8 -m megatron_exact.training.pretrain"
    )
    assert "RANK" not in os.environ


@pytest.mark.parametrize(("kind", "is_printed"), [("", False), ("lost", True)])
def test_a_node_that_ends_after_the_one_with_the_store_has_no_traceback(
    kind: str, is_printed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(options: object) -> train.Ended:
        try:
            raise ConnectionError("the store has gone")
        except ConnectionError:
            log = logging.getLogger("torch.distributed.elastic.agent.server.api")
            log.exception("Error waiting on exit barrier. Elapsed: %s seconds", 0.1)
        return train.Ended(code=0, kind=kind, message="")

    monkeypatch.setattr(train, "_run", run)
    train.launch(["--max-restarts", "0", "script.py"])
    assert ("Error waiting on exit barrier" in caplog.text) == is_printed
    assert ("Traceback" in caplog.text) == is_printed
