"""The whole step from raw files to `.bin`, `.idx` and `.json`, as a function and as the tool."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tiny_tokenizers import END, SENTENCES, write_huggingface, write_sentencepiece
from tokenizers import Tokenizer

from megatron_exact.data.corpus_record import check_corpus, read_corpus_record
from megatron_exact.data.indexed import GrowingCorpus, IndexedTokens
from megatron_exact.data.tokenize import tokenize_corpus

TEXTS = [f"{number} " + "".join(SENTENCES[: number % 7 + 1]) for number in range(60)]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_huggingface(tmp_path_factory.mktemp("tokenizers") / "llama3")


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "tiny.model")


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def documents_of(prefix: Path) -> list[list[int]]:
    corpus = IndexedTokens(prefix)
    return [corpus.read(n, 0, int(corpus.document_tokens[n])).tolist() for n in range(len(corpus))]


def expected_ids(hf: Path, texts: list[str]) -> list[list[int]]:
    """BOS, text, EOD by the tokenizers library alone."""
    plain = Tokenizer.from_file(str(hf / "tokenizer.json"))
    return [[0, *plain.encode(text, add_special_tokens=False).ids, 1] for text in texts]


def test_every_kind_of_input_in_one_corpus(tmp_path: Path, hf: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = write_lines(raw / "a.jsonl", TEXTS[:20])
    packed = raw / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(write_lines(tmp_path / "x", TEXTS[20:30]).read_bytes()))
    zipped = raw / "c.jsonl.zst"
    zipped.write_bytes(
        zstandard.ZstdCompressor().compress(write_lines(tmp_path / "x", TEXTS[30:40]).read_bytes())
    )
    pq.write_table(pa.table({"text": TEXTS[40:59]}), raw / "d.parquet")
    (raw / "e.txt").write_text(TEXTS[59])
    inputs = [lines, packed, zipped, raw / "d.parquet", raw / "e.txt"]
    summary = tokenize_corpus(inputs, hf, tmp_path / "out" / "corpus", licence="CC0-1.0")
    assert documents_of(tmp_path / "out" / "corpus") == expected_ids(hf, TEXTS)
    assert names(tmp_path / "out") == ["corpus.bin", "corpus.idx", "corpus.json"]
    record = read_corpus_record(tmp_path / "out" / "corpus")
    assert record == summary.record
    assert [file["path"] for file in record.raw_files] == [path.name for path in inputs]
    for file, path in zip(record.raw_files, inputs, strict=True):
        content = path.read_bytes()
        assert file["bytes"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert (record.documents, record.skipped, record.licence) == (60, 0, "CC0-1.0")
    assert record.tokens == sum(map(len, expected_ids(hf, TEXTS)))
    for suffix, sha256 in ((".bin", record.bin_sha256), (".idx", record.idx_sha256)):
        content = (tmp_path / "out" / f"corpus{suffix}").read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
    assert record.special_tokens == {"prefix_ids": [0], "eod_id": 1, "eod_token": END}
    check_corpus(tmp_path / "out" / "corpus")


def test_bytes_do_not_depend_on_workers_or_batches(tmp_path: Path, hf: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", TEXTS)
    second = write_lines(tmp_path / "b.jsonl", [*TEXTS[::-1], ""])
    contents = set()
    for workers, batch_bytes in ((1, 1 << 20), (2, 500), (3, 1), (1, 1)):
        prefix = tmp_path / f"out{workers}-{batch_bytes}" / "corpus"
        options = {"workers": workers, "batch_bytes": batch_bytes, "skip_invalid": True}
        tokenize_corpus([first, second], hf, prefix, **options)
        files = names(prefix.parent)
        assert files == ["corpus.bin", "corpus.idx", "corpus.json"]
        contents.add(tuple((prefix.parent / name).read_bytes() for name in files))
    assert len(contents) == 1
    assert documents_of(prefix) == expected_ids(hf, TEXTS + TEXTS[::-1])


def test_the_record_names_no_date_and_files_from_their_common_folder(tmp_path: Path, spm: Path) -> None:
    for name in ("2023", "2024"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "a.jsonl", TEXTS[:5])
    inputs = [tmp_path / "2023" / "a.jsonl", tmp_path / "2024" / "a.jsonl"]
    summary = tokenize_corpus(inputs, spm, tmp_path / "first")
    assert [file["path"] for file in summary.record.raw_files] == ["2023/a.jsonl", "2024/a.jsonl"]
    time.sleep(0.01)
    tokenize_corpus(inputs, spm, tmp_path / "second")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


def test_options_of_the_tokenizer(tmp_path: Path, hf: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", TEXTS[:3])
    tokenize_corpus([lines], hf, tmp_path / "out", add_bos=False, eod_token="<|begin|>")
    expected = [[*ids[1:-1], 0] for ids in expected_ids(hf, TEXTS[:3])]
    assert documents_of(tmp_path / "out") == expected


def test_text_with_the_literal_eod_stays_one_document(tmp_path: Path, hf: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [f"see {END} there"])
    tokenize_corpus([lines], hf, tmp_path / "out")
    check_corpus(tmp_path / "out")
    (document,) = documents_of(tmp_path / "out")
    assert document.count(1) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_of_no_token_are_counted_and_left_out(tmp_path: Path, spm: Path, workers: int) -> None:
    """An empty text, and white space, of which this tokenizer makes nothing."""
    texts = ["good text", " \n ", "", "more text"]
    lines = write_lines(tmp_path / "a.jsonl", texts)
    summary = tokenize_corpus([lines], spm, tmp_path / "out", workers=workers)
    record = read_corpus_record(tmp_path / "out")
    assert record == summary.record
    assert (record.documents, record.skipped, record.empty) == (2, 0, 2)
    tokenize_corpus([write_lines(tmp_path / "b.jsonl", [texts[0], texts[3]])], spm, tmp_path / "plain")
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "plain.bin").read_bytes()
    assert "empty" not in (tmp_path / "plain.json").read_text()


def test_a_corpus_of_empty_documents_is_one_line(tmp_path: Path, spm: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", ["", " "])
    with pytest.raises(ValueError, match=r"no document in .*a\.jsonl: all 2 have no text"):
        tokenize_corpus([lines], spm, tmp_path / "out")
    assert names(tmp_path) == ["a.jsonl"]


def test_an_ordinary_token_as_eod_must_not_occur_in_the_text(tmp_path: Path, hf: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", ["good", "y x"])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the text contains the EOD token 'o' itself"):
        tokenize_corpus([lines], hf, tmp_path / "out", eod_token="o", force_eod=True)
    assert names(tmp_path) == ["a.jsonl"]


def test_only_the_first_skipped_are_remembered(tmp_path: Path, hf: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text("bad\n" * 30 + '{"text": "good"}\n')
    summary = tokenize_corpus([lines], hf, tmp_path / "out", skip_invalid=True)
    assert summary.record.skipped == 30
    assert len(summary.skipped_examples) == 10


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_an_existing_output_is_never_touched(tmp_path: Path, hf: Path, suffix: str) -> None:
    lines = write_lines(tmp_path / "a.jsonl", TEXTS[:2])
    (tmp_path / f"out{suffix}").write_text("precious")
    with pytest.raises(ValueError, match="exists already: remove it or choose another --output-prefix"):
        tokenize_corpus([lines], hf, tmp_path / "out")
    assert names(tmp_path) == sorted(["a.jsonl", f"out{suffix}"])
    assert (tmp_path / f"out{suffix}").read_text() == "precious"


def test_an_input_that_changes_meanwhile_is_refused(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", TEXTS[:2])
    real = GrowingCorpus.add

    def add_and_append(*arguments: object) -> None:
        real(*arguments)
        with open(lines, "a") as stream:
            stream.write('{"text": "late"}\n')

    monkeypatch.setattr(GrowingCorpus, "add", add_and_append)
    with pytest.raises(ValueError, match="changed while it was read"):
        tokenize_corpus([lines], hf, tmp_path / "out")
    assert names(tmp_path) == ["a.jsonl"]
