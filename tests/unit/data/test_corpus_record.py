"""The record beside a corpus, and the proof that the corpus is still the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import write_sentencepiece

from megatron_exact.data.corpus_record import (
    CorpusRecord,
    check_corpus,
    read_corpus_record,
    write_corpus_record,
)
from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.tokenizers import CorpusTokenizer, load_tokenizer

DOCUMENTS = [[0, 5, 6, 1], [0, 7, 1], [0] + [8] * 50 + [1]]
VOCAB_SIZE, EOD = 80, 1


def write_corpus(prefix: Path, documents: list[list[int]], *, sha256: str = "a" * 64) -> CorpusRecord:
    """A corpus with a record that fits it."""
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    writer = IndexedWriter(bin_path, idx_path, VOCAB_SIZE)
    for document in documents:
        writer.add(np.array(document))
    writer.close()
    record = CorpusRecord(
        raw_files=[{"path": "a.jsonl", "bytes": 10, "sha256": "b" * 64}],
        tokenizer={
            "path": str(prefix.parent / "models" / "tiny.model"),
            "kind": "sentencepiece",
            "vocab_size": VOCAB_SIZE,
            "sha256": sha256,
        },
        special_tokens={"prefix_ids": [0], "eod_id": EOD, "eod_token": "</s>"},
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        skipped=2,
        dtype=str(writer.dtype),
        bin_sha256=hashlib.sha256(bin_path.read_bytes()).hexdigest(),
        idx_sha256=hashlib.sha256(idx_path.read_bytes()).hexdigest(),
        licence="CC0-1.0",
    )
    write_corpus_record(prefix, record)
    return record


def rewrite(prefix: Path, **changes: object) -> None:
    """Edit the record by hand; `a__b` is a key inside `a`."""
    path = Path(f"{prefix}.json")
    content = json.loads(path.read_text())
    for name, value in changes.items():
        inside = content
        *outer, last = name.split("__")
        for key in outer:
            inside = inside[key]
        inside[last] = value
    path.write_text(json.dumps(content))


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "books", DOCUMENTS)
    return tmp_path / "books"


def test_round_trip(tmp_path: Path) -> None:
    record = write_corpus(tmp_path / "books", DOCUMENTS)
    assert read_corpus_record(tmp_path / "books") == record
    content = json.loads((tmp_path / "books.json").read_text())
    assert content["tokenizer"]["path"] == "models/tiny.model"  # both can move together
    assert content["counts"] == {"documents": 3, "tokens": 59, "skipped": 2}
    assert content["format_version"] == 1


def test_it_moves_with_its_tokenizer(prefix: Path, tmp_path: Path) -> None:
    before = (tmp_path / "books.json").read_bytes()
    (tmp_path / "moved").mkdir()
    for suffix in (".bin", ".idx", ".json"):
        Path(f"{prefix}{suffix}").rename(tmp_path / "moved" / f"books{suffix}")
    record = read_corpus_record(tmp_path / "moved" / "books")
    assert record is not None
    assert record.tokenizer["path"] == str(tmp_path / "moved" / "models" / "tiny.model")
    write_corpus_record(tmp_path / "moved" / "books", record)
    assert (tmp_path / "moved" / "books.json").read_bytes() == before
    far = dataclasses.replace(record, tokenizer={**record.tokenizer, "path": "/far/away"})
    write_corpus_record(tmp_path / "moved" / "books", far)
    assert json.loads((tmp_path / "moved" / "books.json").read_text())["tokenizer"]["path"] == "/far/away"


def test_a_corpus_without_a_record(prefix: Path) -> None:
    Path(f"{prefix}.json").unlink()
    assert read_corpus_record(prefix) is None
    check_corpus(prefix)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"counts": {"documents": 3}},
        {"counts__tokens": "59"},
        {"counts__tokens": -1},
        {"tokenizer": None},
        {"tokenizer__vocab_size": True},
        {"bin_sha256": "abc"},
        {"dtype": "text"},
        {"raw_files": [{"path": "a"}]},
    ],
)
def test_a_record_edited_into_nonsense_is_refused(prefix: Path, changes: dict[str, object]) -> None:
    rewrite(prefix, **changes)
    with pytest.raises(ValueError, match=r"books\.json .*(damaged or was edited|format_version 2)"):
        read_corpus_record(prefix)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff"])
def test_what_is_no_record_is_refused(prefix: Path, text: str) -> None:
    Path(f"{prefix}.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"books\.json .*tokenize the corpus again"):
        read_corpus_record(prefix)


def test_check_reads_every_byte(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_exact.data.corpus_record.CHECK_BLOCK_BYTES", 16)
    blocks: list[int] = []
    check_corpus(prefix, on_bytes=blocks.append)
    assert sum(blocks) == Path(f"{prefix}.bin").stat().st_size
    assert max(blocks) == 16


@settings(deadline=None, max_examples=60)
@given(data=st.data(), block_tokens=st.integers(1, 40), block_ends=st.integers(1, 5))
def test_any_document_that_breaks_the_rule_is_named(
    data: st.DataObject, block_tokens: int, block_ends: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the block edges: a fitting corpus passes, a changed document is found by number."""
    text = st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=1, max_size=12)
    documents = [[*ids, EOD] for ids in data.draw(st.lists(text, min_size=1, max_size=12))]
    prefix = tmp_path_factory.mktemp("corpus") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_exact.data.corpus_record.CHECK_BLOCK_BYTES", 2 * block_tokens)
        patch.setattr("megatron_exact.data.corpus_record.ENDS_A_BLOCK", block_ends)
        write_corpus(prefix, documents)
        check_corpus(prefix)
        broken = data.draw(st.integers(0, len(documents) - 1))
        place = data.draw(st.integers(0, len(documents[broken]) - 1))
        is_end = place == len(documents[broken]) - 1
        value = data.draw(st.sampled_from([2, VOCAB_SIZE] if is_end else [EOD, VOCAB_SIZE]))
        documents[broken][place] = value
        write_corpus(prefix, documents)
        kind = "token id 80" if value == VOCAB_SIZE else "EOD id 1"
        with pytest.raises(ValueError, match=rf"document {broken} ") as error:
            check_corpus(prefix)
        assert kind in str(error.value)


def test_a_flipped_byte_is_noticed(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    content = bytearray(path.read_bytes())
    content[2] ^= 1  # another token that is also legal
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"books\.bin has sha256 .* but .* was recorded"):
        check_corpus(prefix)


def test_an_index_of_the_same_shape_is_noticed(prefix: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "other", [DOCUMENTS[1], DOCUMENTS[0], DOCUMENTS[2]])
    (tmp_path / "other.idx").replace(tmp_path / "books.idx")
    with pytest.raises(ValueError, match=r"books\.idx has sha256"):
        check_corpus(prefix)


@pytest.mark.parametrize("changes", [{"counts__tokens": 58}, {"counts__documents": 2}, {"dtype": "int32"}])
def test_counts_that_do_not_fit_are_noticed(prefix: Path, changes: dict[str, object]) -> None:
    rewrite(prefix, **changes)
    with pytest.raises(ValueError, match=r"books\.idx says"):
        check_corpus(prefix)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("block_tokens", [1, 2, 3, 100])
def test_an_empty_document_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, block_tokens: int
) -> None:
    monkeypatch.setattr("megatron_exact.data.corpus_record.CHECK_BLOCK_BYTES", 2 * block_tokens)
    monkeypatch.setattr("megatron_exact.data.corpus_record.ENDS_A_BLOCK", 2)
    documents = [[2, 1], [4, 5, 1], [3, 1]]
    write_corpus(tmp_path / "a", [*documents[:place], [], *documents[place:]])
    with pytest.raises(ValueError, match=f"document {place} has no token"):
        check_corpus(tmp_path / "a")


def test_a_corpus_of_one_empty_document_is_noticed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [[]])
    with pytest.raises(ValueError, match="document 0 has no token"):
        check_corpus(tmp_path / "a")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CorpusTokenizer:
    return load_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tiny.model"))


def test_a_tokenizer_gives_the_vocabulary_where_no_record_does(
    prefix: Path, tokenizer: CorpusTokenizer
) -> None:
    Path(f"{prefix}.json").unlink()
    check_corpus(prefix, tokenizer)
    with pytest.raises(ValueError, match=r"token id 8 in document 2 is outside the tokenizer's 8 ids"):
        check_corpus(prefix, dataclasses.replace(tokenizer, vocab_size=8))


def test_another_tokenizer_than_the_records_is_refused(prefix: Path, tokenizer: CorpusTokenizer) -> None:
    with pytest.raises(ValueError, match="was made with aaaa"):
        check_corpus(prefix, tokenizer)
    write_corpus(prefix, DOCUMENTS, sha256=tokenizer.sha256)
    check_corpus(prefix, tokenizer)
