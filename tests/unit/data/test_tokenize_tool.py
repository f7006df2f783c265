"""`tools/tokenize_corpus.py` as its user meets it: exit codes, one-line errors, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_tokenizers import SENTENCES, write_sentencepiece

from megatron_exact.data.corpus_record import check_corpus
from tests import forked

TOOL = Path(__file__).parents[3] / "tools" / "tokenize_corpus.py"
TEXTS = [f"{number} " + "".join(SENTENCES[: number % 7 + 1]) for number in range(60)]


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "tiny.model")


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def run_tool(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return forked.run_tool(TOOL.name, *arguments, cwd=cwd)


def test_the_tool(tmp_path: Path, spm: Path) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n{"text": 3}\n{"text": "last"}\n')
    done = run_tool(
        *("--input", "a.jsonl", "b.jsonl", "--tokenizer", spm, "--output-prefix", "out/c"),
        *("--workers", 2, "--skip-invalid", "--licence", "CC0-1.0"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out/c: 61 documents, ")
    assert "2 skipped" in done.stdout
    assert [line.partition(": ")[2].partition(":")[0] for line in done.stderr.splitlines()] == [
        "b.jsonl"
    ] * 2
    assert names(tmp_path / "out") == ["c.bin", "c.idx", "c.json"]
    check_corpus(tmp_path / "out" / "c")


def test_the_tool_without_torch_and_megatron(tmp_path: Path, spm: Path) -> None:
    """A SentencePiece user waits for neither."""
    write_lines(tmp_path / "a.jsonl", TEXTS)
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['t', '--input', 'a.jsonl', '--tokenizer', {str(spm)!r}, '--output-prefix', 'o']\n"
        f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "found = {'torch', 'megatron', 'transformers', 'tokenizers', 'pyarrow'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    command = [sys.executable, "-c", script.replace("'--output", "'--workers', '1', '--output")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("content", "reason", "workers"),
    [
        (b"", "is empty", 2),
        (b"\n\n", "no document in", 2),
        (b'{"text": "good"}\n{"text": "\xff"}\n', ":2: invalid UTF-8 (byte 0xff", 1),
        (b'{"text": "good"}\n{"text"\n', ":2: invalid JSON", 1),
        (b'{"text": " "}\n{"text": null}\n', "no document in", 2),
    ],
    ids=["empty", "blank", "utf8", "json", "no-token"],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, spm: Path, content: bytes, reason: str, workers: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    arguments = ("--input", tmp_path / "a.jsonl", "--tokenizer", spm, "--output-prefix", tmp_path / "o")
    done = run_tool(*arguments, "--workers", workers)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr
    assert names(tmp_path) == ["a.jsonl"]


def test_bad_arguments_are_one_line(tmp_path: Path, spm: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", TEXTS[:2])
    no_eos = write_sentencepiece(tmp_path / "noeos.model", eos_id=-1)
    before = names(tmp_path)
    for path, tokenizer, reason in (
        (tmp_path / "missing.jsonl", spm, "does not exist"),
        (lines, tmp_path / "missing", "does not exist"),
        (lines, no_eos, "no eos token to end documents with: name one by --eod-token"),
    ):
        done = run_tool("--input", path, "--tokenizer", tokenizer, "--output-prefix", tmp_path / "o")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert reason in done.stderr
        assert names(tmp_path) == before


STOPPED = """
import runpy, sys
import megatron_exact.data.tokenize as module
if __name__ == "__main__":
    journal_bytes, *sys.argv = sys.argv[1:]
    module.tokenize_corpus.__kwdefaults__.update(batch_bytes=20_000, journal_bytes=int(journal_bytes))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("has_journal", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("how", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=["interrupt", "terminate", "kill"],
)
def test_stopped_before_or_after_the_first_journal_entry(
    tmp_path: Path, spm: Path, how: signal.Signals, code: int, has_journal: bool
) -> None:
    """Before it nothing is left, after it one line says how to go on; ^C and SIGTERM go to the group."""
    with open(tmp_path / "a.jsonl", "w") as stream:
        for _ in range(80):
            stream.write(json.dumps({"text": "".join(SENTENCES) * 10}) + "\n")
    (tmp_path / "stopped.py").write_text(STOPPED)
    arguments = ["--input", "a.jsonl", "--tokenizer", spm, "--output-prefix", "out/c", "--workers", "2"]
    command = [sys.executable, "stopped.py", "100000" if has_journal else str(1 << 30), TOOL, *arguments]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as tool:
        folder = tmp_path / "out" / ".c.tokenizing"
        awaited = folder / ("journal.json" if has_journal else "bin")
        while not awaited.exists():
            assert tool.poll() is None, tool.stderr.read() if tool.stderr else ""
            time.sleep(0.01)
        os.killpg(tool.pid, how)
        output, errors = tool.communicate(timeout=60)
    spoken = [line for line in errors.splitlines(keepends=True) if not line.startswith("engine: ")]
    errors = "".join(spoken)
    assert (tool.returncode, output) == (code, "")
    message = {signal.SIGINT: "interrupted\n", signal.SIGTERM: "terminated\n", signal.SIGKILL: ""}[how]
    if has_journal and message:
        kept, _, errors = errors.partition("\n")
        assert "documents are kept in out/.c.tokenizing, and the same command resumes from there" in kept
    assert errors == message
    if not has_journal and how != signal.SIGKILL:
        assert not (tmp_path / "out").exists()
        return
    lease = [".c.lease"] if how == signal.SIGKILL else []  # the next start finds its holder dead
    assert names(tmp_path / "out") == [*lease, ".c.tokenizing"]  # and nothing that opens
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("resumed after ") == has_journal
    assert names(tmp_path / "out") == ["c.bin", "c.idx", "c.json"]
    check_corpus(tmp_path / "out" / "c")
    assert "80 documents" in done.stdout


def test_arguments_that_do_not_parse_are_one_line(tmp_path: Path) -> None:
    for arguments in (
        (),
        ("--input", "a.jsonl", "--tokenizer", "t", "--output-prefix", "p", "--workers", "0"),
    ):
        done = run_tool(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "--help" in done.stderr
