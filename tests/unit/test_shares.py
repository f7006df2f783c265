"""Shares of work, and the processes that do them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_exact.command_line import ArgumentError
from megatron_exact.shares import Share, run_processes, share, split_devices, without_processes


def test_shares_are_disjoint_and_complete() -> None:
    for items in range(12):
        for of in (1, 2, 5):
            shares = [Share(index=index, of=of) for index in range(of)]
            found = [[item for item in range(items) if part.has(item)] for part in shares]
            assert sorted(item for part in found for item in part) == list(range(items))
            assert [len(part) for part in found] == [part.size(items) for part in shares]


@pytest.mark.parametrize("text", ["", "4/4", "1", "-1/4", "1/0", "a/b", "0/4/2"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(ArgumentError, match="is not a share: give I/N"):
        share(text)


def test_a_share_reads_as_it_is_written() -> None:
    assert str(share("3/4")) == "3/4"
    assert share("0/1").is_whole


@pytest.mark.parametrize(
    ("visible", "count", "each", "expected"),
    [
        (None, 3, 1, ["0", "1", "2"]),
        (None, 2, 2, ["0,1", "2,3"]),
        ("4,6,7", 2, 1, ["4", "6"]),
        ("GPU-a, GPU-b", 2, 1, ["GPU-a", "GPU-b"]),
        ("", 2, 1, ["", ""]),
        ("-1", 2, 1, ["", ""]),
    ],
)
def test_each_process_has_gpus_of_its_own(
    visible: str | None, count: int, each: int, expected: list[str]
) -> None:
    assert split_devices(visible, count, each) == expected


def test_too_few_gpus() -> None:
    with pytest.raises(ValueError, match="--processes 2 with 1 GPU each needs 2, but CUDA"):
        split_devices("3,-1,5", 2, 1)
    with pytest.raises(ValueError, match="needs 4, but CUDA_VISIBLE_DEVICES names 3: start fewer"):
        split_devices("0,1,2", 2, 2)


def test_the_words_of_a_process() -> None:
    words = ["--model", "m", "--processes", "4", "--samples", "3"]
    assert without_processes(words) == ["--model", "m", "--samples", "3"]
    assert without_processes(["--processes=4", "--model", "m"]) == ["--model", "m"]
    assert without_processes(["--proc", "4", "--pack", "p"]) == ["--pack", "p"]


def test_processes_get_their_share_and_a_failure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    script = tmp_path / "program.py"
    script.write_text(
        "import json, os, sys\n"
        "name = sys.argv[-1].replace('/', '-')\n"
        f"open(os.path.join({str(tmp_path)!r}, name), 'w').write("
        "json.dumps([os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[1:]]))\n"
        "sys.exit(3 if name == '1-2' and 'fails' in sys.argv else 0)\n"
    )
    program = (sys.executable, str(script))
    run_processes("score", ["--pack", "p"], 2, program=program)
    assert json.loads((tmp_path / "0-2").read_text()) == ["5", "score", "--pack", "p", "--shard", "0/2"]
    assert json.loads((tmp_path / "1-2").read_text())[0] == "7"
    with pytest.raises(ValueError, match=r"--shard 1/2 failed.*the same command does what is missing"):
        run_processes("score", ["fails"], 2, program=program)
