"""Stopped at any moment, going on gives the bytes of a run never stopped, or a refusal in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from killed_runs import FORK_WARNING, OPTIONS, contents, names, run_and_die, write_inputs
from tiny_tokenizers import SENTENCES, write_huggingface, write_sentencepiece

from megatron_exact.data.corpus_record import check_corpus
from megatron_exact.data.indexed import GrowingCorpus
from megatron_exact.data.tokenize import TokenizeSummary, tokenize_corpus
from megatron_exact.data.tokenize_journal import unfinished_corpus, unfinished_folder

pytestmark = pytest.mark.filterwarnings(FORK_WARNING)
TOOL = Path(__file__).parents[3] / "tools" / "tokenize_corpus.py"


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "tiny.model")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_inputs(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, inputs: list[Path], spm: Path) -> list[bytes]:
    prefix = tmp_path_factory.mktemp("expected") / "c"
    tokenize_corpus(inputs, spm, prefix, skip_invalid=True)
    check_corpus(prefix)
    return contents(prefix)


@pytest.fixture
def stopped(tmp_path: Path, inputs: list[Path], spm: Path) -> Path:
    """The prefix of a run that was killed with most of its work in the journal."""
    prefix = tmp_path / "c"
    assert run_and_die(inputs, spm, prefix, 140, after=False) == -signal.SIGKILL
    assert names(tmp_path) == [".c.lease", ".c.tokenizing"]
    return prefix


def resume(inputs: list[Path], spm: Path, prefix: Path, **changed: object) -> TokenizeSummary:
    return tokenize_corpus(inputs, spm, prefix, **{**OPTIONS, **changed})  # type: ignore[arg-type]


def test_what_the_disk_lost_or_kept_beyond_the_journal(
    stopped: Path, inputs: list[Path], spm: Path, expected: list[bytes]
) -> None:
    folder = unfinished_folder(stopped)
    entry = json.loads((folder / "journal.json").read_text())
    with open(folder / "bin", "ab") as stream:
        stream.write(b"\xff" * 1001)  # half a token of an entry that never was
    with open(folder / "lengths", "r+b") as stream:
        stream.truncate(entry["documents"] * 4)
    (folder / ".journal.json.partial-1-aa").write_text("{")  # of a kill inside an entry
    assert resume(inputs, spm, stopped).resumed_documents == entry["documents"] > 0
    assert contents(stopped) == expected


@pytest.mark.parametrize("damage", ["short bin", "short lengths", "changed bin", "changed lengths"])
def test_a_damaged_folder_is_refused(stopped: Path, inputs: list[Path], spm: Path, damage: str) -> None:
    kind, name = damage.split()
    path = unfinished_folder(stopped) / name
    if kind == "short":
        os.truncate(path, 100)
    else:
        content = bytearray(path.read_bytes())
        content[40] ^= 1
        path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"does not contain the .* documents .* remove that folder to start"
    ):
        resume(inputs, spm, stopped)
    assert unfinished_folder(stopped).exists()


def test_a_damaged_journal_is_refused(stopped: Path, inputs: list[Path], spm: Path) -> None:
    path = unfinished_folder(stopped) / "journal.json"
    for content in ("{", "[]", '{"format_version": 2}', '{"format_version": 1, "cursor": {}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"journal\.json .*remove .*\.c\.tokenizing to start over"):
            resume(inputs, spm, stopped)


def test_another_job_is_refused_in_words(
    stopped: Path, inputs: list[Path], spm: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    other = write_sentencepiece(elsewhere / "other.model", bos_id=-1)
    for changed, tokenizer, options, difference in (
        (inputs, other, {}, "tokenizer was '"),
        (inputs, spm, {"add_bos": False}, r"prefix_ids was \[1\], now it is \[\]"),
        (inputs, spm, {"eod_token": "<s>", "add_bos": False}, "prefix_ids was|eod_id was 2"),
        (inputs, spm, {"text_key": "body"}, "text_key was 'text', now it is 'body'"),
        (inputs, spm, {"skip_invalid": False}, "skip_invalid was True, now it is False"),
        (inputs[:-1], spm, {}, "it had 4 inputs, now there are 3"),
        ([*inputs[:2], inputs[3], inputs[2]], spm, {}, r"input 3 was .*c\.parquet of .*, now .*d\.txt"),
    ):
        with pytest.raises(ValueError, match=difference) as error:
            resume(changed, tokenizer, stopped, **options)
        assert "repeat the earlier command to resume it, or remove that folder" in str(error.value)
    assert names(stopped.parent) == [".c.tokenizing"]


def test_a_changed_input_is_refused(stopped: Path, inputs: list[Path], spm: Path) -> None:
    before = inputs[0].stat()
    os.utime(inputs[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    try:
        with pytest.raises(ValueError, match=r"input 1 was .*a\.jsonl of [\d,]+ bytes \(modified at"):
            resume(inputs, spm, stopped)
    finally:
        os.utime(inputs[0], ns=(before.st_atime_ns, before.st_mtime_ns))


def test_workers_batches_and_licence_may_change(
    stopped: Path, inputs: list[Path], spm: Path, expected: list[bytes]
) -> None:
    resume(inputs, spm, stopped, workers=2, batch_bytes=1 << 20, journal_bytes=1 << 20, licence="CC0-1.0")
    assert contents(stopped)[:2] == expected[:2]
    assert json.loads(contents(stopped)[2]) == {**json.loads(expected[2]), "licence": "CC0-1.0"}


def test_skip_invalid_may_come_late(tmp_path: Path, spm: Path) -> None:
    """The run stopped at a bad line; the same command with --skip-invalid goes on from there."""
    lines = tmp_path / "a.jsonl"
    good = [json.dumps({"text": "".join(SENTENCES[n : n + 3])}) for n in range(40)]
    lines.write_text("\n".join([*good[:30], "bad", *good[30:]]))
    options = {"batch_bytes": 400, "journal_bytes": 600}
    with pytest.raises(ValueError, match=r"a\.jsonl:31: invalid JSON.*; \d+ documents are kept in .*same"):
        tokenize_corpus([lines], spm, tmp_path / "c", **options)
    assert names(tmp_path) == [".c.tokenizing", "a.jsonl"]
    summary = tokenize_corpus([lines], spm, tmp_path / "c", skip_invalid=True, **options)
    assert summary.resumed_documents > 20
    assert (summary.record.documents, summary.record.skipped) == (40, 1)
    tokenize_corpus([lines], spm, tmp_path / "whole", skip_invalid=True)
    assert contents(tmp_path / "c")[:2] == contents(tmp_path / "whole")[:2]


def test_one_writer_at_a_time(tmp_path: Path, inputs: list[Path], spm: Path) -> None:
    with (
        unfinished_corpus(tmp_path / "c", {}),
        pytest.raises(
            ValueError, match=r"c is in use by process \d+ on .* \(writing this corpus.* --output-prefix"
        ),
    ):
        tokenize_corpus(inputs, spm, tmp_path / "c", **OPTIONS)
    assert names(tmp_path) == []
    tokenize_corpus(inputs, spm, tmp_path / "c", **OPTIONS)


def test_a_file_that_came_meanwhile_is_never_overwritten(
    tmp_path: Path, inputs: list[Path], spm: Path, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_index = GrowingCorpus.write_index

    def write_and_interfere(corpus: GrowingCorpus, path: Path) -> str:
        (tmp_path / "c.json").write_text("precious")
        return write_index(corpus, path)

    monkeypatch.setattr(GrowingCorpus, "write_index", write_and_interfere)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"c\.json was made by someone else .*: move it away"):
            tokenize_corpus(inputs, spm, tmp_path / "c", **OPTIONS)
        assert (tmp_path / "c.json").read_text() == "precious"
    (tmp_path / "c.json").unlink()
    tokenize_corpus(inputs, spm, tmp_path / "c", **OPTIONS)
    assert contents(tmp_path / "c") == expected


def test_an_input_that_changes_before_the_end_leaves_nothing(tmp_path: Path, spm: Path) -> None:
    """The journal speaks of bytes that no longer are: going on would be wrong."""
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES))
    write_index = tokenize_corpus.__globals__["FileInputs"].raw_files

    def touch_first(inputs: object) -> object:
        os.utime(lines, ns=(1, 1))
        return write_index(inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_exact.data.tokenize.FileInputs.raw_files", touch_first)
        with pytest.raises(ValueError, match="changed while it was read"):
            tokenize_corpus([lines], spm, tmp_path / "c", **OPTIONS)
    assert names(tmp_path) == ["a.jsonl"]


DISK_FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
import runpy
import megatron_exact.data.tokenize as module
module.tokenize_corpus.__kwdefaults__.update(batch_bytes=1000, journal_bytes=20_000)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_write_that_fails_is_one_line_and_keeps_the_journal(tmp_path: Path, spm: Path) -> None:
    """The kernel refuses writes beyond a file size, at the flush of a buffer as a full disk does."""
    lines = tmp_path / "a.jsonl"
    text = "".join(SENTENCES)
    lines.write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(60)))
    arguments = ["--input", lines, "--tokenizer", spm, "--output-prefix", tmp_path / "c", "--workers", "1"]
    (tmp_path / "full.py").write_text(DISK_FULL)
    results = []
    for limit in (150_000, 1 << 40):
        command = [sys.executable, tmp_path / "full.py", str(limit), TOOL, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        results.append((done.returncode, done.stdout, done.stderr))
        if limit == 150_000:
            assert names(tmp_path) == [".c.tokenizing", "a.jsonl", "full.py"]
    (code, output, errors), (last_code, last_output, last_errors) = results
    assert (code, output, errors.count("\n")) == (1, "", 1), errors
    assert "File too large" in errors
    assert "documents are kept in" in errors
    assert last_code == 0, last_errors
    assert "resumed after" in last_output
    tokenize_corpus([lines], spm, tmp_path / "whole")
    assert contents(tmp_path / "c")[:2] == contents(tmp_path / "whole")[:2]


def test_a_full_disk_before_the_first_entry_leaves_nothing(
    tmp_path: Path, inputs: list[Path], spm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Iterator[None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GrowingCorpus, "add", full)
    with pytest.raises(ValueError, match="No space left on device; nothing was kept"):
        tokenize_corpus(inputs, spm, tmp_path / "new" / "c", **OPTIONS)
    assert names(tmp_path) == []


def test_a_hugging_face_tokenizer_goes_on_too(tmp_path: Path, inputs: list[Path]) -> None:
    hf = write_huggingface(tmp_path / "hf")
    assert run_and_die(inputs, hf, tmp_path / "c", 60, after=True) == -signal.SIGKILL
    assert resume(inputs, hf, tmp_path / "c").resumed_documents > 0
    tokenize_corpus(inputs, hf, tmp_path / "whole", skip_invalid=True)
    assert contents(tmp_path / "c")[:2] == contents(tmp_path / "whole")[:2]
