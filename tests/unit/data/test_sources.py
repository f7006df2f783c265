"""Sources of a pack: where they come from is recorded, bad ones are refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpora import (
    Documents,
    ended_documents,
    heavy_tailed_lengths,
    random_documents,
    write_corpus,
)

from megatron_exact.data.corpus_record import record_path
from megatron_exact.data.indexed import HEADER
from megatron_exact.data.manifest import Manifest, TokenizerIdentity, read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.rows import RowReader
from megatron_exact.data.sources import stored_path

pytestmark = pytest.mark.filterwarnings(
    "ignore:no source has a corpus record", "ignore:the validation split"
)
BASE = {"row_tokens": 32, "policy": "concat", "seed": 1, "validation_fraction": 0.1}


def documents(count: int = 50, seed: int = 0) -> Documents:
    return ended_documents(random_documents(heavy_tailed_lengths(count, seed), seed))


def pack(root: Path, sources: list[str], name: str = "pack", **changes: Any) -> Manifest:
    return pack_corpora(sources, root / name, PackOptions(**{**BASE, **changes}))


@pytest.mark.parametrize("policy", ["concat", "best-fit"])
def test_a_negative_length_is_a_damaged_index(tmp_path: Path, policy: str) -> None:
    prefix = write_corpus(tmp_path / "c", documents())
    lengths = np.memmap(f"{prefix}.idx", "<i4", "r+", HEADER.size, (50,))
    lengths[7] = -1
    lengths.flush()
    with pytest.raises(ValueError, match="c has a document of -1 tokens: the index is damaged"):
        pack(tmp_path, [prefix], policy=policy)


def test_provenance_comes_from_the_corpus_record(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", documents(), tokenizer_sha256="c" * 64, licence="CC0-1.0")
    manifest = pack(tmp_path, [prefix])
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.sha256 == "c" * 64
    assert manifest.tokenizer_path(tmp_path / "pack") == (tmp_path / "tokenizer.model").resolve()
    source = manifest.sources[0]
    assert source.licence == "CC0-1.0"
    assert source.raw_files[0]["sha256"] == "0" * 64
    assert source.bin_sha256 is not None


def test_tokenizers_that_differ(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "one", documents(seed=1), tokenizer_sha256="a" * 64)
    two = write_corpus(tmp_path / "two", documents(seed=2), tokenizer_sha256="b" * 64)
    three = write_corpus(tmp_path / "three", documents(seed=3))
    with pytest.raises(ValueError, match="tokenize all with one"):
        pack(tmp_path, [one, two])
    given = TokenizerIdentity(path="/t", kind="sentencepiece", vocab_size=1000, sha256="b" * 64)
    with pytest.raises(ValueError, match="--tokenizer means"):
        pack_corpora([one], tmp_path / "pack", PackOptions(**BASE), tokenizer=given)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="three has no corpus record: taken to be made with"):
        pack(tmp_path, [one, three])
    with pytest.warns(UserWarning, match="no --tokenizer is given") as caught:
        assert pack(tmp_path, [three], "other").tokenizer is None
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no source"),
        (["x:{c}"], "weight 'x' of source"),
        (["-1:{c}"], "weight '-1'"),
        (["0:{c}"], "weight '0'"),
        (["nan:{c}"], "weight 'nan'"),
        (["inf:{c}"], "weight 'inf'"),
        (["1:"], "a weight but no prefix"),
        ([""], "a source is empty"),
        (["1:{c}", "{d}"], "1 of 2 sources have no weight"),
        (["{c}", "{c}"], "are the same corpus"),
        (["{c}", "{link}"], "are the same corpus"),
        (["{c}", "{copy}"], "is a copy of"),
        (["{missing}"], "missing.idx is missing"),
        (["{empty}"], "has no documents"),
        (["{holes}"], "its 2 documents have no tokens"),
        (["{cut}"], "truncated"),
        (["{swapped}"], "truncated or belongs to another corpus"),
    ],
)
def test_bad_sources(tmp_path: Path, sources: list[str], message: str) -> None:
    recorded = {"tokenizer_sha256": "a" * 64}
    paths = {
        name: tmp_path / name for name in ("c", "d", "copy", "empty", "holes", "cut", "swapped", "missing")
    }
    write_corpus(paths["c"], documents(), **recorded)
    write_corpus(paths["copy"], documents(), **recorded)
    write_corpus(paths["d"], documents(seed=4), **recorded)
    write_corpus(paths["empty"], [])
    write_corpus(paths["holes"], [[], []])
    for name in ("cut", "swapped"):
        write_corpus(paths[name], documents(seed=5))
    data = (tmp_path / "cut.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(data[:-3])
    (tmp_path / "swapped.idx").write_bytes((tmp_path / "d.idx").read_bytes())
    (tmp_path / "folder").symlink_to(tmp_path)
    paths["link"] = tmp_path / "folder" / "c"
    named = [source.format(**paths) for source in sources]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pack(tmp_path, named)
    assert not (tmp_path / "pack").exists()


def test_a_corpus_changed_after_its_record(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", documents(), tokenizer_sha256="a" * 64)
    record = (tmp_path / "c.json").read_bytes()
    write_corpus(tmp_path / "c", documents(seed=9), tokenizer_sha256="a" * 64)
    (tmp_path / "c.json").write_bytes(record)
    with pytest.raises(ValueError, match="its record says"):
        pack(tmp_path, [prefix])


def test_a_folder_of_shards_is_one_source(tmp_path: Path) -> None:
    everything = [documents(40, seed) for seed in range(3)]
    for number, shard in enumerate(everything):
        write_corpus(tmp_path / "web" / f"{number:05}", shard, tokenizer_sha256="a" * 64, licence="MIT")
    together = [document for shard in everything for document in shard]
    single = write_corpus(tmp_path / "single", together, tokenizer_sha256="a" * 64)
    sharded = pack(tmp_path, [f"2:{tmp_path / 'web'}/"], "sharded", validation_fraction=0.0)
    merged = pack(tmp_path, [f"2:{single}"], "merged", validation_fraction=0.0)
    source = sharded.sources[0]
    assert [shard.name for shard in source.shards] == ["00000", "00001", "00002"]
    assert [shard.documents for shard in source.shards] == [40, 40, 40]
    assert (source.documents, source.tokens) == (120, sum(map(len, together)))
    assert (source.prefix, source.licence, len(source.raw_files)) == ("../web", "MIT", 3)
    # Documents are numbered through: the rows are those of one corpus of all documents.
    assert sharded.splits["train"].arrays == merged.splits["train"].arrays
    assert sharded.splits["train"].exposure == merged.splits["train"].exposure
    assert sharded.fingerprint != merged.fingerprint
    rows = [RowReader(tmp_path / name, "train") for name in ("sharded", "merged")]
    for row in range(len(rows[0])):
        assert (rows[0].read(row).tokens == rows[1].read(row).tokens).all()


@pytest.mark.parametrize("case", ["empty folder", "named twice", "copy", "another tokenizer", "unfinished"])
def test_bad_folders(tmp_path: Path, case: str) -> None:
    write_corpus(tmp_path / "web" / "0", documents(seed=1), tokenizer_sha256="a" * 64)
    write_corpus(tmp_path / "web" / "1", documents(seed=2), tokenizer_sha256="a" * 64)
    (tmp_path / "nothing").mkdir()
    web = str(tmp_path / "web")
    if case == "copy":
        write_corpus(tmp_path / "web" / "2", documents(seed=1), tokenizer_sha256="a" * 64)
    if case == "another tokenizer":
        write_corpus(tmp_path / "web" / "2", documents(seed=3), tokenizer_sha256="b" * 64)
    if case == "unfinished":
        (tmp_path / "web" / "shards.json").write_text('{"tasks": 3}')
    sources = {"empty folder": [str(tmp_path / "nothing")], "named twice": [web, web + "/"]}.get(
        case, [web]
    )
    message = {
        "empty folder": "has no .idx file",
        "named twice": "are the same corpus",
        "copy": "shard 2 of the folder .*web is a copy of shard 0 of the folder",
        "another tokenizer": "tokenize all with one",
        "unfinished": "3 shards of .*web are missing, the first is number 0",
    }[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pack(tmp_path, sources)
    assert not (tmp_path / "pack").exists()


def test_a_unit_of_weights_needs_weights(tmp_path: Path) -> None:
    """It would change nothing but the fingerprint, and two packs of equal rows could not be compared."""
    prefix = write_corpus(tmp_path / "c", documents())
    with pytest.raises(ValueError, match="--weight-unit documents needs weights"):
        pack(tmp_path, [prefix], weight_unit="documents")
    assert not (tmp_path / "pack").exists()
    assert pack(tmp_path, [f"1:{prefix}"], weight_unit="documents").weight_unit == "documents"


def test_a_prefix_with_a_colon(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a:b", documents())
    assert pack(tmp_path, [prefix]).sources[0].weight is None
    assert pack(tmp_path, [f"0.5:{prefix}"], "weighted").sources[0].weight == 0.5


def test_a_tokenizer_that_is_a_link_to_a_blob_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123abcd").write_text("{}")
    (tmp_path / "tokenizer.json").symlink_to("blobs/0123abcd")
    assert stored_path(tmp_path / "tokenizer.json", tmp_path / "pack") == "../tokenizer.json"
    (tmp_path / "link").symlink_to(tmp_path)
    assert stored_path(tmp_path / "link" / "tokenizer.json", tmp_path / "pack") == "../tokenizer.json"


def edit_record(prefix: str, **changes: Any) -> None:
    path = record_path(prefix)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_largest_id_is_the_corpus_own_word_or_counted(tmp_path: Path) -> None:
    corpus = documents()
    largest = max(map(max, corpus))
    recorded = write_corpus(tmp_path / "recorded", corpus, tokenizer_sha256="a" * 64)
    assert pack(tmp_path, [recorded], "p1").largest_id == largest  # an old record: from the tokens
    edit_record(recorded, largest_id=largest - 1)
    assert pack(tmp_path, [recorded], "p2").largest_id == largest - 1  # a record of today: as it says
    written = record_path(recorded).stat().st_mtime_ns
    os.utime(f"{recorded}.bin", ns=(written + 1, written + 1))
    assert pack(tmp_path, [recorded], "p3").largest_id == largest  # written since: from the tokens
    packs = [read_manifest(tmp_path / name) for name in ("p1", "p2", "p3")]
    assert len({manifest.fingerprint for manifest in packs}) == 1
    with pytest.warns(UserWarning, match="no source has a corpus record"):
        bare = pack(tmp_path, [write_corpus(tmp_path / "bare", corpus)], "p4")
    assert bare.largest_id == largest


def test_ids_beyond_the_tokenizer_are_refused_before_packing(tmp_path: Path) -> None:
    corpus = documents()
    prefix = write_corpus(tmp_path / "c", corpus, tokenizer_sha256="a" * 64)
    edit_record(prefix, largest_id=999, bin_blocks=None)  # else the hashes are compared before
    ids = np.fromfile(f"{prefix}.bin", np.uint16)
    ids[sum(map(len, corpus[:7]))] = 50_000
    ids.tofile(f"{prefix}.bin")
    with pytest.raises(ValueError, match=r"c\.bin: token id 50000 in document 7 is outside .* 1000 ids"):
        pack(tmp_path, [prefix])
    record_path(prefix).unlink()
    given = TokenizerIdentity(path="/t", kind="sentencepiece", vocab_size=1000, sha256="b" * 64)
    with pytest.raises(ValueError, match="token id 50000 in document 7"):
        pack_corpora([prefix], tmp_path / "pack", PackOptions(**BASE), tokenizer=given)  # type: ignore[arg-type]
    assert not (tmp_path / "pack").exists()


def test_ids_that_were_not_packed_are_refused_where_they_are_read(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", documents(), tokenizer_sha256="a" * 64)
    pack(tmp_path, [prefix])
    reader = RowReader(tmp_path / "pack", "train")
    rows = [reader.read(row) for row in range(len(reader))]
    largest = int(rows[0].tokens.max())
    reader._num_ids = largest  # what a changed .bin means, where no hash by block or sample says so before
    with pytest.raises(ValueError, match=rf"document \d+ of \.\./c has the token id {largest}, but the"):
        reader.read(0)


@pytest.mark.parametrize(("field", "word"), [("eod_id", "end"), ("prefix_ids", "start")])
def test_documents_that_start_or_end_otherwise_are_not_mixed(tmp_path: Path, field: str, word: str) -> None:
    one = write_corpus(tmp_path / "one", documents(seed=1), tokenizer_sha256="a" * 64)
    two = write_corpus(tmp_path / "two", documents(seed=2), tokenizer_sha256="a" * 64)
    manifest = pack(tmp_path, [one, two], "both")
    assert manifest.document_tokens is not None
    assert (manifest.document_tokens.eod_id, manifest.document_tokens.prefix_ids) == (999, ())
    assert read_manifest(tmp_path / "both") == manifest
    special = {"prefix_ids": [], "eod_id": 999, "eod_token": "</s>"}
    edit_record(two, special_tokens={**special, field: 5 if field == "eod_id" else [5]})
    with pytest.raises(ValueError, match=rf"documents of .*two {word} with .* --eod-token and --no-bos"):
        pack(tmp_path, [one, two])
