"""The check of a timed pack sees what is wrong: a benchmark of wrong packs would compare nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pack_check import check_pack
from packers import check_rows
from synthetic import document_lengths, pieces_of, write_corpus

from megatron_exact.data.indexed import IndexedTokens
from megatron_exact.data.pack import PackOptions, pack_corpora

DOCUMENTS = 400
ROW_TOKENS = 1024


def lengths() -> np.ndarray:
    return document_lengths(DOCUMENTS, 3)


@pytest.fixture(params=[("best-fit", 0.0), ("concat", 0.0), ("best-fit", 0.1), ("concat", 0.1)])
def pack(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", DOCUMENTS, 3)
    policy, fraction = request.param
    options = PackOptions(row_tokens=ROW_TOKENS, policy=policy, seed=1, validation_fraction=fraction)
    pack_corpora([str(tmp_path / "corpus")], tmp_path / "pack", options)
    return tmp_path / "pack"


def test_synthetic_corpus_opens_as_a_corpus(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", DOCUMENTS, 3)
    corpus = IndexedTokens(tmp_path / "corpus")
    corpus.check()
    np.testing.assert_array_equal(corpus.document_tokens, lengths())
    assert (lengths() >= 1).all()
    assert not np.array_equal(lengths(), document_lengths(DOCUMENTS, 4)), "the seed decides"


def test_lengths_do_not_depend_on_how_many_are_made() -> None:
    np.testing.assert_array_equal(document_lengths(100, 3), lengths()[:100])


def test_good_pack_passes(pack: Path) -> None:
    splits = json.loads((pack / "manifest.json").read_text())["splits"].values()
    padding = sum(one["padding_tokens"] for one in splits) / (
        sum(one["rows"] for one in splits) * ROW_TOKENS
    )
    assert check_pack(pack, lengths(), ROW_TOKENS) == pytest.approx(padding)


@pytest.mark.parametrize("name", ["segment_document", "segment_start", "segment_tokens", "row_offsets"])
def test_any_changed_array_is_seen(pack: Path, name: str) -> None:
    path = pack / "train" / f"{name}.npy"
    array = np.load(path, allow_pickle=False)
    place = array.size // 2
    array[place] = array[place] + 1 if array[place] + 1 < DOCUMENTS or name != "segment_document" else 0
    np.save(path, array)
    with pytest.raises(ValueError, match="pack"):
        check_pack(pack, lengths(), ROW_TOKENS)


def test_two_swapped_documents_are_seen(pack: Path) -> None:
    path = pack / "train" / "segment_document.npy"
    array = np.load(path, allow_pickle=False)
    other = int(np.flatnonzero(array != array[0])[0])
    array[[0, other]] = array[[other, 0]]
    np.save(path, array)
    with pytest.raises(ValueError, match="pack"):
        check_pack(pack, lengths(), ROW_TOKENS)


def test_a_document_in_two_splits_is_seen(pack: Path) -> None:
    paths = [pack / split / "segment_document.npy" for split in ("train", "validation")]
    train, held = (np.load(path, allow_pickle=False) for path in paths)
    if not held.size:
        return  # packs without a validation split cannot have it
    held[0] = train[0]
    np.save(paths[1], held)
    with pytest.raises(ValueError, match="pack: a document is in two splits"):
        check_pack(pack, lengths(), ROW_TOKENS)


def test_other_lengths_are_seen(pack: Path) -> None:
    longer = lengths()
    longer[7] += 1
    with pytest.raises(ValueError, match="pack"):
        check_pack(pack, longer, ROW_TOKENS)


def test_pieces_are_remainders_and_full_rows() -> None:
    pieces = pieces_of(np.array([5, 10, 23, 30], np.int32), 10)
    assert sorted(pieces.tolist()) == [3, 5, 10, 10, 10, 10, 10, 10]


def test_rows_of_a_packer() -> None:
    pieces = np.array([3, 5, 10, 7])
    placed, sizes = np.array([10, 7, 3, 5]), np.array([1, 2, 1])
    assert check_rows(placed, sizes, pieces, 10, name="it") == pytest.approx(1 - 25 / 30)
    with pytest.raises(ValueError, match="every piece"):
        check_rows(np.array([10, 7, 3, 4]), sizes, pieces, 10, name="it")
    with pytest.raises(ValueError, match="filled a row of 10 with 15"):
        check_rows(np.array([10, 5, 7, 3]), np.array([2, 2]), pieces, 10, name="it")
    with pytest.raises(ValueError, match="rows of 3 pieces"):
        check_rows(placed, np.array([1, 2]), pieces, 10, name="it")
