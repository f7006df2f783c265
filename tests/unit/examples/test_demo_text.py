"""`make demo-text`: what it takes as text and refuses, its tokenizer and its training commands."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import zstandard

from examples import local_text
from examples.demo_text import (
    FULL,
    QUERY_GROUPS,
    QUICK,
    DemoSettings,
    remove_half_saved_run,
    sample_lines,
    train_tokenizer,
    training_command,
)
from examples.local_text import collect_corpus, find_sources
from examples.miniature.pipeline import StageSettings

PARAGRAPH = "some words in a line\n" * 200 + "\n"


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def folder_of_texts(folder: Path, *, documents: int, characters: int) -> Path:
    folder.mkdir()
    for number in range(documents):
        (folder / f"{number:03}.txt").write_text(f"{number} " + "x" * characters)
    return folder


def test_a_folder_gives_one_document_a_file_in_sorted_order(tmp_path: Path) -> None:
    folder = folder_of_texts(tmp_path / "texts", documents=25, characters=20_000)
    (folder / ".hidden").write_text("x")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text("  \n")
    summary = collect_corpus(find_sources(folder), tmp_path / "corpus.jsonl")
    assert (summary.documents, summary.skipped_files) == (25, {".png": 1, ".txt": 2})
    assert summary.skipped() == "3 files left out (2 .txt, 1 .png): empty, damaged or not UTF-8 text"
    texts = texts_of(tmp_path / "corpus.jsonl")
    assert [text.split()[0] for text in texts] == [str(number) for number in range(25)]
    assert summary.text_bytes == sum(len(text.encode()) for text in texts)


def test_compressed_files_of_any_suffix_are_read_in_a_folder_with_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "my own texts"
    folder.mkdir()
    compressors = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    suffixes = [".md", ".txt", ".rst", ".py", ""]
    expected = []
    for number in range(30):
        text = f"{number:02} " + "é" * 20_000
        kind = [*compressors][number % 2]
        name = folder / f"{number:02} a{suffixes[number % 5]}{kind}"
        name.write_bytes(compressors[kind](text.encode()))
        expected.append(text)
    (folder / "cut.md.gz").write_bytes(gzip.compress(b"some text " * 1_000)[:-20])
    (folder / "archive.tar.gz").write_bytes(gzip.compress(b"name" + bytes(600)))
    (folder / "not.txt.zst").write_text("not compressed")
    summary = collect_corpus(find_sources(folder), tmp_path / "corpus.jsonl")
    assert texts_of(tmp_path / "corpus.jsonl") == expected
    assert summary.skipped_files == {".md.gz": 1, ".tar.gz": 1, ".txt.zst": 1}


def test_what_was_left_out_is_said_where_too_little_is_left(tmp_path: Path) -> None:
    folder = folder_of_texts(tmp_path / "texts", documents=3, characters=100)
    for number in range(12):
        (folder / f"{number}.pdf").write_bytes(b"%PDF\0")
    with pytest.raises(
        ValueError, match=r"3 documents .* too little \(12 files left out \(12 \.pdf\).*\.gz"
    ):
        collect_corpus(find_sources(folder), tmp_path / "corpus.jsonl")


def test_a_text_beyond_the_limit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_text, "LARGEST_FILE_BYTES", 30_000)
    folder = folder_of_texts(tmp_path / "texts", documents=25, characters=20_000)
    (folder / "bomb.txt.gz").write_bytes(gzip.compress(b"x" * 10_000_000))
    summary = collect_corpus(find_sources(folder), tmp_path / "corpus.jsonl")
    assert (summary.documents, summary.skipped_files) == (25, {".txt.gz": 1})


def test_one_plain_file_is_cut_at_blank_lines_without_losing_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(PARAGRAPH * 120)
    summary = collect_corpus(find_sources(path), tmp_path / "corpus.jsonl")
    texts = texts_of(tmp_path / "corpus.jsonl")
    assert summary.documents == len(texts) >= local_text.MIN_DOCUMENTS
    assert "\n\n".join(texts) == path.read_text().rstrip("\n") or "\n\n".join(texts) == path.read_text()
    assert min(len(text) for text in texts[:-1]) >= local_text.CUT_CHARACTERS - 2


def test_json_lines_give_their_documents(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " + "y" * 20_000}) + "\n" for i in range(30)))
    assert collect_corpus(find_sources(path), tmp_path / "corpus.jsonl").documents == 30


@pytest.mark.parametrize(("documents", "characters"), [(30, 100), (5, 200_000)])
def test_too_little_text_is_refused_and_leaves_nothing(
    tmp_path: Path, documents: int, characters: int
) -> None:
    folder = folder_of_texts(tmp_path / "texts", documents=documents, characters=characters)
    output = tmp_path / "out" / "corpus.jsonl"
    with pytest.raises(ValueError, match="too little; the demo needs 20 documents"):
        collect_corpus(find_sources(folder), output)
    assert list(tmp_path.rglob("*corpus.jsonl*")) == []


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="DEMO_TEXT"):
        find_sources(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file"):
        find_sources(tmp_path / "empty")


def test_the_standard_library_is_there_and_identifiable() -> None:
    sources = find_sources(None)
    assert sources.is_python_library
    assert len(sources.files) > 300
    assert not any(
        "site-packages" in path.parts for path in sources.files if "stripped" not in sources.description
    )
    assert sources.identity() == find_sources(None).identity()


def test_a_stripped_library_is_filled_up_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.py").write_text("pass\n")
    monkeypatch.setattr(local_text.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(local_text, "FILL_UP_BYTES", 100_000)
    sources = find_sources(None)
    assert "stripped here" in sources.description
    assert len(sources.files) > 1


def test_identity_changes_with_a_file(tmp_path: Path) -> None:
    folder = folder_of_texts(tmp_path / "texts", documents=2, characters=10)
    before = find_sources(folder).identity()
    os.utime(folder / "001.txt", (1, 1))
    assert find_sources(folder).identity() != before


LINES = [f"def function_{i % 37}(argument_{i % 11}):\n    return {i} * value_{i % 23}" for i in range(600)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return path


def test_equal_text_gives_equal_models_that_lose_nothing(tmp_path: Path, corpus: Path) -> None:
    for name in ("one.model", "two.model"):
        train_tokenizer(corpus, tmp_path / name, vocabulary=320, sample_bytes=1 << 20)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "one.model"))
    assert model.vocab_size() == 320
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    text = "def  f(x):\n\treturn  x  # caf\u00e9 \u2192\n"
    assert model.decode(model.encode(text)) == text


def test_the_sample_is_spread_over_the_corpus(corpus: Path) -> None:
    lines = list(sample_lines(corpus, corpus.stat().st_size // 4))
    everything = [line for text in LINES for line in text.split("\n")]
    assert lines == everything[3::4]


def test_too_uniform_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"text": "aaaa bbbb\n" * 100}) + "\n")
    with pytest.raises(ValueError, match=r"cannot make 2,000 pieces .*name more text"):
        train_tokenizer(path, tmp_path / "t.model", vocabulary=2000, sample_bytes=1 << 20)
    assert not (tmp_path / "t.model").exists()


def command(stage: StageSettings = FULL.long, **changes: Any) -> tuple[str, ...]:
    options: dict[str, Any] = {
        "pack": Path("pack"),
        "validation_rows": 1000,
        "rule": "exact",
        "save": Path("runs/exact"),
        "base": Path("runs/base"),
        **changes,
    }
    return training_command(FULL, stage, **options)


def value(words: tuple[str, ...], flag: str) -> str:
    assert words.count(flag) == 1, flag
    return words[words.index(flag) + 1]


def test_an_arm_starts_from_the_base_and_resumes_by_the_same_command() -> None:
    words = command()
    assert value(words, "--pretrained-checkpoint") == "runs/base"
    assert value(words, "--load") == value(words, "--save") == "runs/exact"
    assert value(words, "--token-weighting") == "exact"
    assert value(words, "--tensor-model-parallel-size") == value(words, "--nproc-per-node") == "2"


def test_arms_differ_in_rule_and_folder_only() -> None:
    one, other = command(), command(rule="none", save=Path("runs/none"))
    differing = {one[i - 1] for i in range(len(one)) if one[i] != other[i]}
    assert differing == {"--token-weighting", "--save", "--load"}


def test_the_base_starts_from_scratch() -> None:
    words = command(base=None)
    assert value(words, "--load") == value(words, "--save") == "runs/exact"
    assert "--pretrained-checkpoint" not in words


def test_evaluations_fit_the_validation_split() -> None:
    rows = FULL.long.rows_per_iteration
    assert value(command(), "--eval-iters") == str(FULL.long.evaluation_batches)
    assert value(command(validation_rows=3 * rows + 1), "--eval-iters") == "3"


@pytest.mark.parametrize("settings", [FULL, QUICK])
def test_settings_fit_together(settings: DemoSettings) -> None:
    assert settings.vocabulary % 2 == 0
    assert QUERY_GROUPS % 2 == 0
    assert settings.hidden % settings.heads == 0
    for stage in (settings.short, settings.long):
        assert stage.rows_per_iteration % stage.rows_per_micro_batch == 0
        assert stage.warmup_iterations < stage.iterations
        assert stage.iterations % stage.evaluations == 0


def test_only_a_run_without_a_whole_checkpoint_is_removed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert not remove_half_saved_run(run_dir)
    (run_dir / "iter_0000002").mkdir(parents=True)  # torn while it was being saved
    assert remove_half_saved_run(run_dir)
    assert not run_dir.exists()
    (run_dir / "iter_0000002").mkdir(parents=True)
    (run_dir / "latest_checkpointed_iteration.txt").write_text("2")
    (run_dir / "iter_0000004").mkdir()  # the training itself passes over the torn one
    assert not remove_half_saved_run(run_dir)
    assert (run_dir / "iter_0000004").exists()
