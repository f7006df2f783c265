"""A folder of shards reads as the one corpus that its shards, put end to end, would be."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import random_documents, write_corpus

from megatron_exact.data.indexed import IndexedTokens
from megatron_exact.data.shards import ShardedTokens, open_corpus


def write_shards(folder: Path, shards: list[list[int]]) -> list[list[int]]:
    """One shard a list of document lengths; all documents in order."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = []
    for number, lengths in enumerate(shards):
        documents = random_documents(lengths, seed=number)
        write_corpus(folder / f"{number:05}", documents)
        everything += documents
    return everything


def known_of(corpus: ShardedTokens) -> list[tuple[str, int, int]]:
    return list(corpus.shards)


@settings(deadline=None, max_examples=40)
@given(shards=st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=6))
def test_reads_as_one_corpus(tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]]) -> None:
    """Also shards of no documents, wherever they stand."""
    root = tmp_path_factory.mktemp("c")
    documents = write_shards(root / "many", shards)
    write_corpus(root / "one", documents)
    one, many = IndexedTokens(root / "one"), ShardedTokens(root / "many")
    lazy = ShardedTokens(root / "many", known_of(many))
    for corpus in (many, lazy, pickle.loads(pickle.dumps(many))):  # noqa: S301
        assert len(corpus) == corpus.num_documents == one.num_documents
        assert (corpus.num_tokens, corpus.bin_bytes) == (one.num_tokens, one.bin_bytes)
        assert corpus.dtype == one.dtype
        for number in range(len(documents)):
            count = one.tokens_of(number)
            assert corpus.tokens_of(number) == count
            for start in range(count):
                found = corpus.read(number, start, count - start).tolist()
                assert found == documents[number][start:]
        assert corpus.document_tokens.tolist() == one.document_tokens.tolist()
        assert corpus.document_tokens.dtype == one.document_tokens.dtype
        assert [part.num_documents for part in corpus.parts] == [len(lengths) for lengths in shards]


def test_names_decide_the_order(tmp_path: Path) -> None:
    for name, length in (("b", 2), ("a", 1), ("a-c", 3), ("10", 4), ("9", 5)):
        write_corpus(tmp_path / name, random_documents([length]))
    write_corpus(tmp_path / ".a.partial-1", random_documents([7]))
    (tmp_path / "a.json").write_text("{}")
    corpus = ShardedTokens(tmp_path)
    assert [name for name, _, _ in corpus.shards] == ["10", "9", "a", "a-c", "b"]
    assert corpus.document_tokens.tolist() == [4, 5, 1, 3, 2]


def test_a_known_shard_is_opened_when_it_is_read_and_not_before(tmp_path: Path) -> None:
    documents = write_shards(tmp_path, [[3, 4], [5], [6, 2]])
    known = known_of(ShardedTokens(tmp_path))
    for name in ("00000.idx", "00002.bin"):
        (tmp_path / name).unlink()
    corpus = ShardedTokens(tmp_path, known)
    assert (corpus.num_documents, corpus.num_tokens) == (5, 20)
    assert corpus.read(2, 0, 5).tolist() == documents[2]
    for document, missing in ((1, "00000.idx"), (3, "00002.bin")):
        with pytest.raises(FileNotFoundError, match=f"{missing} is missing"):
            corpus.read(document, 0, 1)


def test_a_shard_that_is_another_now(tmp_path: Path) -> None:
    write_shards(tmp_path, [[3, 4], [5]])
    known = known_of(ShardedTokens(tmp_path))
    write_corpus(tmp_path / "00001", random_documents([6]))
    corpus = ShardedTokens(tmp_path, known)
    assert corpus.tokens_of(0) == 3
    with pytest.raises(
        ValueError, match=r"00001 contains 1 documents and 6 tokens but 1 and 5 were packed"
    ):
        corpus.tokens_of(2)


@pytest.mark.parametrize("lazily", [False, True])
def test_shards_of_two_dtypes_are_refused(tmp_path: Path, lazily: bool) -> None:
    from megatron_exact.data.indexed import IndexedWriter

    write_shards(tmp_path, [[3]])
    writer = IndexedWriter(tmp_path / "00001.bin", tmp_path / "00001.idx", 100_000)
    writer.add(np.array([70_000]))
    writer.close()
    with pytest.raises(ValueError, match=r"00001 contains int32 tokens but .*00000 uint16"):
        ShardedTokens(tmp_path, [("00000", 1, 3), ("00001", 1, 1)] if lazily else None).parts  # noqa: B018


def test_a_folder_without_shards(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"has no \.idx file"):
        ShardedTokens(tmp_path)


def test_open_corpus_tells_a_pair_from_a_folder(tmp_path: Path) -> None:
    write_shards(tmp_path / "c", [[1], [2]])
    assert isinstance(open_corpus(tmp_path / "c"), ShardedTokens)
    write_corpus(tmp_path / "c", random_documents([5]))
    assert isinstance(open_corpus(tmp_path / "c"), IndexedTokens)
    assert isinstance(open_corpus(tmp_path / "c", []), IndexedTokens)
    assert isinstance(open_corpus(tmp_path / "c", [("00000", 1, 1)]), ShardedTokens)
    with pytest.raises(FileNotFoundError, match=r"nothing\.idx is missing"):
        open_corpus(tmp_path / "nothing")


FEW_FILES = """
import os, resource, sys
from megatron_exact.data.shards import ShardedTokens
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
before = len(os.listdir("/proc/self/fd"))
corpus = ShardedTokens(sys.argv[1])
lazy = ShardedTokens(sys.argv[1], corpus.shards)
assert len(os.listdir("/proc/self/fd")) == before, "opening holds files"
lazy.read(7, 0, 1)
assert len(os.listdir("/proc/self/fd")) == before + 2, "one shard is two files"
for turn in range(2):
    for document in range(len(lazy)):
        assert lazy.read(document, 0, 3).tolist() == [document % 9 + 1] * 3
assert corpus.document_tokens.tolist() == [3] * len(corpus)
assert sum(map(len, corpus.parts)) == len(corpus)
"""


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    for number in range(150):
        write_corpus(tmp_path / f"{number:05}", [[number % 9 + 1] * 3])
    subprocess.run([sys.executable, "-c", FEW_FILES, str(tmp_path)], check=True)
