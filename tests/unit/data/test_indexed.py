"""Our `.bin` / `.idx` against upstream's, byte for byte; constant-time reading; every kind of damage."""

from __future__ import annotations

import itertools
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.data import indexed
from megatron_exact.data.indexed import (
    HEADER,
    MAGIC,
    IndexedTokens,
    IndexedWriter,
    read_layout,
    token_dtype,
)
from megatron_exact.files import sha256_file

DOCUMENTS = [[5, 6, 7, 1], [1], [9] * 100 + [1], [0, 65_000 % 400, 1]]


def write_corpus(prefix: Path, documents: list[list[int]], vocab_size: int = 1000) -> Path:
    writer = IndexedWriter(f"{prefix}.bin", f"{prefix}.idx", vocab_size)
    for document in documents:
        writer.add(np.array(document))
    assert writer.num_documents == len(documents)
    writer.close()
    return prefix


@pytest.mark.filterwarnings("ignore")  # upstream's own, when imported
@pytest.mark.parametrize("vocab_size", [65_499, 65_500])
def test_bytes_equal_upstreams(tmp_path: Path, vocab_size: int) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size)
    assert token_dtype(vocab_size) == np.dtype(dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "upstream.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "upstream.idx"))
    ours = write_corpus(tmp_path / "ours", DOCUMENTS, vocab_size)
    for suffix in (".bin", ".idx"):
        theirs = (tmp_path / f"upstream{suffix}").read_bytes()
        assert (tmp_path / f"ours{suffix}").read_bytes() == theirs
    dataset = IndexedDataset(str(ours), mmap=True)
    assert [dataset[n].tolist() for n in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore")  # upstream's own, when imported
def test_upstream_corpora_with_modes_or_split_documents_are_read(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int64, multimodal=True)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3], [0, 1])
    builder.add_document(torch.tensor([6]), [1], [0])
    builder.finalize(str(tmp_path / "a.idx"))
    corpus = IndexedTokens(tmp_path / "a")
    assert corpus.document_tokens.tolist() == [5, 1]
    assert [corpus.tokens_of(0), corpus.tokens_of(1)] == [5, 1]
    assert corpus.check() == sha256_file(corpus.idx_path)
    assert corpus.read(0, 1, 3).tolist() == [2, 3, 4]
    assert corpus.read(1, 0, 1).tolist() == [6]
    assert corpus.dtype == np.int64


def test_round_trip(tmp_path: Path) -> None:
    corpus = IndexedTokens(write_corpus(tmp_path / "a.b", DOCUMENTS))
    assert len(corpus) == corpus.num_documents == 4
    assert corpus.num_tokens == sum(map(len, DOCUMENTS))
    assert corpus.document_tokens.tolist() == [len(document) for document in DOCUMENTS]
    for number, document in enumerate(DOCUMENTS):
        assert corpus.tokens_of(number) == len(document)
        assert corpus.read(number, 0, len(document)).tolist() == document
    assert corpus.read(2, 99, 2).tolist() == [9, 1]
    copy = pickle.loads(pickle.dumps(corpus))  # noqa: S301
    assert copy.read(0, 1, 2).tolist() == [6, 7]
    assert (tmp_path / "a.b.idx").stat().st_size == HEADER.size + 4 * 12 + 5 * 8


def test_the_worked_total_of_the_module(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [[1], [2], [3]])
    assert (tmp_path / "a.idx").stat().st_size == 102


def test_no_document_at_all(tmp_path: Path) -> None:
    corpus = IndexedTokens(write_corpus(tmp_path / "a", []))
    assert (corpus.num_documents, corpus.num_tokens) == (0, 0)
    assert corpus.document_tokens.size == 0
    assert corpus.check() == sha256_file(corpus.idx_path)


def write_index(prefix: Path, sequences: list[int], boundaries: list[int]) -> None:
    """An `.idx` in which documents are any runs of sequences, and its `.bin` of tokens 0, 1, 2, ..."""
    lengths = np.array(sequences, dtype="<i4")
    offsets = 2 * (np.cumsum(lengths, dtype="<i8") - lengths)
    header = HEADER.pack(MAGIC, 1, 8, lengths.size, len(boundaries))
    parts = (lengths.tobytes(), offsets.tobytes(), np.array(boundaries, dtype="<i8").tobytes())
    Path(f"{prefix}.idx").write_bytes(header + b"".join(parts))
    np.arange(lengths.sum(), dtype="<u2").tofile(f"{prefix}.bin")


@settings(deadline=None, max_examples=60)
@given(
    sequences=st.lists(st.integers(0, 5), max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=8),
    block=st.integers(1, 4),
)
def test_documents_of_any_number_of_sequences(
    tmp_path_factory: pytest.TempPathFactory, sequences: list[int], cuts: list[int], block: int
) -> None:
    """Also of none, and sequences of no tokens; in blocks that end anywhere."""
    boundaries = sorted([0, len(sequences), *(min(cut, len(sequences)) for cut in cuts)])
    totals = np.concatenate(([0], np.cumsum(sequences, dtype=np.int64)))
    expected = [int(totals[b] - totals[a]) for a, b in itertools.pairwise(boundaries)]
    prefix = tmp_path_factory.mktemp("c") / "c"
    write_index(prefix, sequences, boundaries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "BLOCK_ELEMENTS", block)
        patch.setattr(indexed, "BLOCK_ELEMENTS", block)
        corpus = IndexedTokens(prefix)
        assert corpus.document_tokens.tolist() == expected
        assert corpus.check() == sha256_file(corpus.idx_path)
    assert [corpus.tokens_of(document) for document in range(len(corpus))] == expected
    for document, count in enumerate(expected):
        first = int(totals[boundaries[document]])
        assert corpus.read(document, 0, count).tolist() == list(range(first, first + count))


def test_opening_and_reading_touch_a_few_pages_of_the_index(tmp_path: Path) -> None:
    """An index that is a hole of 200 GB, of which nothing can be read through, opens and reads at once."""
    documents, tokens = 10_000_000_000, 3
    offsets_at = HEADER.size + 4 * documents
    boundaries_at = offsets_at + 8 * documents
    middle = 7_777_777_777
    places = {0: HEADER.pack(MAGIC, 1, 8, documents, documents + 1)}
    places[offsets_at - 4] = struct.pack("<i", tokens)
    for document in (middle, middle + 1, documents - 1):
        places[offsets_at + 8 * document] = struct.pack("<q", 2 * tokens * document)
        places[boundaries_at + 8 * document] = struct.pack("<q", document)
    places[boundaries_at + 8 * documents] = struct.pack("<q", documents)
    with open(tmp_path / "a.idx", "wb") as stream:
        for place, content in places.items():
            stream.seek(place)
            stream.write(content)
    with open(tmp_path / "a.bin", "wb") as stream:
        stream.truncate(2 * tokens * documents)
        stream.seek(2 * tokens * middle)
        stream.write(struct.pack("<3H", 7, 8, 9))
    corpus = IndexedTokens(tmp_path / "a")
    assert (corpus.num_documents, corpus.num_tokens) == (documents, tokens * documents)
    assert corpus.tokens_of(middle) == corpus.tokens_of(documents - 1) == tokens
    assert corpus.read(middle, 0, 3).tolist() == [7, 8, 9]
    assert pickle.loads(pickle.dumps(corpus)).num_documents == documents  # noqa: S301
    assert len(pickle.dumps(corpus)) < 500


def test_an_array_outlives_the_corpus_it_came_from(tmp_path: Path) -> None:
    corpus = IndexedTokens(write_corpus(tmp_path / "a", DOCUMENTS))
    tokens, lengths = corpus.read(0, 0, 4), corpus.document_tokens
    corpus.release()
    assert corpus.read(1, 0, 1).tolist() == [1]
    del corpus
    assert (tokens.tolist(), lengths.tolist()) == (DOCUMENTS[0], [len(each) for each in DOCUMENTS])
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from megatron_exact.data.indexed import IndexedTokens
corpora = [IndexedTokens(f"{sys.argv[1]}/{number}") for number in range(200)]
for turn in range(2):
    assert [corpus.read(0, 0, 2).tolist() for corpus in corpora] == [[n, 1] for n in range(200)]
"""


def test_more_corpora_than_files_may_be_open(tmp_path: Path) -> None:
    for number in range(200):
        write_corpus(tmp_path / str(number), [[number, 1]])
    subprocess.run([sys.executable, "-c", MANY, str(tmp_path)], check=True)


def change(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def resize(path: Path, by: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:by] if by < 0 else content + bytes(by))


LENGTHS, OFFSETS, BOUNDARIES = HEADER.size, HEADER.size + 16, HEADER.size + 48
DAMAGE = {
    "bin truncated": ("a.bin", lambda path: resize(path, -1), "truncated or belongs to another"),
    "bin of one token less": ("a.bin", lambda path: resize(path, -2), "truncated or belongs to another"),
    "bin longer": ("a.bin", lambda path: resize(path, 2), "truncated or belongs to another"),
    "bin empty": ("a.bin", lambda path: path.write_bytes(b""), "truncated or belongs to another"),
    "idx truncated": ("a.idx", lambda path: resize(path, -1), "header asks for"),
    "idx longer": ("a.idx", lambda path: resize(path, 1), "header asks for"),
    "idx of a few bytes": ("a.idx", lambda path: path.write_bytes(b"MMIDIDX"), "not a Megatron index"),
    "idx empty": ("a.idx", lambda path: path.write_bytes(b""), "not a Megatron index"),
    "magic": ("a.idx", lambda path: change(path, 0, b"X"), "not a Megatron index"),
    "version": ("a.idx", lambda path: change(path, 9, struct.pack("<Q", 2)), "version 2"),
    "float tokens": ("a.idx", lambda path: change(path, 17, b"\x06"), "dtype code 6"),
    "other dtype": ("a.idx", lambda path: change(path, 17, b"\x04"), "truncated or belongs to another"),
    "sequences": ("a.idx", lambda path: change(path, 18, struct.pack("<Q", 2**60)), "header asks for"),
    "a length": ("a.idx", lambda path: change(path, LENGTHS, b"\x05"), "truncated or belongs"),
    "two lengths": ("a.idx", lambda path: change(path, LENGTHS, b"\3\0\0\0\2"), "back to back"),
    "an offset": ("a.idx", lambda path: change(path, OFFSETS + 8, b"\x09"), "back to back"),
    "first boundary": ("a.idx", lambda path: change(path, BOUNDARIES, b"\x01"), "do not cover"),
    "order of boundaries": ("a.idx", lambda path: change(path, BOUNDARIES + 8, b"\x03"), "do not cover"),
    "last boundary": ("a.idx", lambda path: change(path, BOUNDARIES + 32, b"\x03"), "do not cover"),
}


ONLY_CHECK_NOTICES = {"a length", "two lengths", "an offset", "order of boundaries"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    """Most of it when opened; the inside of the arrays by the full check."""
    name, act, reason = DAMAGE[damage]
    prefix = write_corpus(tmp_path / "a", DOCUMENTS)
    act(tmp_path / name)
    if damage in ONLY_CHECK_NOTICES:
        corpus = IndexedTokens(prefix)
        with pytest.raises(ValueError, match=reason):
            corpus.check()
    else:
        with pytest.raises(ValueError, match=reason):
            IndexedTokens(prefix)


def test_a_place_outside_the_bin_is_refused(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a", DOCUMENTS)
    change(tmp_path / "a.idx", OFFSETS + 8, struct.pack("<q", 1 << 40))
    with pytest.raises(ValueError, match="back to back"):
        IndexedTokens(prefix).read(1, 0, 1)


def test_the_idx_of_another_corpus_is_noticed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", DOCUMENTS)
    write_corpus(tmp_path / "b", DOCUMENTS[1:])
    (tmp_path / "b.idx").replace(tmp_path / "a.idx")
    with pytest.raises(ValueError, match="belongs to another corpus"):
        IndexedTokens(tmp_path / "a")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_half_is_named(tmp_path: Path, suffix: str) -> None:
    write_corpus(tmp_path / "a", DOCUMENTS)
    (tmp_path / f"a{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"a\{suffix} is missing"):
        IndexedTokens(tmp_path / "a")


def test_an_aborted_writer_leaves_no_index(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a.bin", tmp_path / "a.idx", 1000)
    writer.add(np.array([1, 2]))
    writer.abort()
    assert not (tmp_path / "a.idx").exists()


def test_a_corpus_whose_tokenising_was_killed_says_so(tmp_path: Path) -> None:
    (tmp_path / ".web.tokenizing").mkdir()
    words = r"interrupted \(\.web\.tokenizing\); call megatron-exact tokenize again"
    with pytest.raises(FileNotFoundError, match=words):
        read_layout(tmp_path / "web")
    with pytest.raises(FileNotFoundError, match="common prefix"):
        read_layout(tmp_path / "other")
