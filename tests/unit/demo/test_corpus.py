"""What the demo takes as text, and what it refuses."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

from megatron_exact.demo import corpus
from megatron_exact.demo.corpus import collect_corpus, find_sources

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
    monkeypatch.setattr(corpus, "LARGEST_FILE_BYTES", 30_000)
    folder = folder_of_texts(tmp_path / "texts", documents=25, characters=20_000)
    (folder / "bomb.txt.gz").write_bytes(gzip.compress(b"x" * 10_000_000))
    summary = collect_corpus(find_sources(folder), tmp_path / "corpus.jsonl")
    assert (summary.documents, summary.skipped_files) == (25, {".txt.gz": 1})


def test_one_plain_file_is_cut_at_blank_lines_without_losing_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(PARAGRAPH * 120)
    summary = collect_corpus(find_sources(path), tmp_path / "corpus.jsonl")
    texts = texts_of(tmp_path / "corpus.jsonl")
    assert summary.documents == len(texts) >= corpus.MIN_DOCUMENTS
    assert "\n\n".join(texts) == path.read_text().rstrip("\n") or "\n\n".join(texts) == path.read_text()
    assert min(len(text) for text in texts[:-1]) >= corpus.CUT_CHARACTERS - 2


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
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(corpus, "FILL_UP_BYTES", 100_000)
    sources = find_sources(None)
    assert "stripped here" in sources.description
    assert len(sources.files) > 1


def test_identity_changes_with_a_file(tmp_path: Path) -> None:
    folder = folder_of_texts(tmp_path / "texts", documents=2, characters=10)
    before = find_sources(folder).identity()
    os.utime(folder / "001.txt", (1, 1))
    assert find_sources(folder).identity() != before
