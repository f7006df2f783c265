"""A corpus belongs to its pack: whatever becomes of its files, no other tokens are read in silence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_corpora import ended_documents, heavy_tailed_lengths, random_documents, write_corpus

from megatron_exact.data import corpus_guard, corpus_record, source_guards
from megatron_exact.data.corpus_guard import (
    BlockHasher,
    WatchedFile,
    hash_blocks,
    hash_sample,
    sample_places,
)
from megatron_exact.data.corpus_record import read_corpus_record
from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.manifest import POLICIES, read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.rows import RowReader
from megatron_exact.data.source_guards import check_sources
from megatron_exact.data.verify_pack import verify_pack
from megatron_exact.files import sha256_file

pytestmark = pytest.mark.filterwarnings("ignore:no source has a corpus record", "ignore:This process")
SMALL_BLOCK = 1 << 10


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a kilobyte, so that a small corpus has several."""
    for module in (corpus_guard, corpus_record):
        monkeypatch.setattr(module, "BLOCK_BYTES", SMALL_BLOCK)


def make_pack(root: Path, *, recorded: bool = True, policy: str = "concat", shards: bool = False) -> Path:
    """A pack of about 5,000 tokens, ten blocks."""
    documents = ended_documents(random_documents(heavy_tailed_lengths(160, 1), 1))
    sha = "a" * 64 if recorded else None
    if shards:
        for number in range(2):
            write_corpus(root / "c" / f"{number}", documents[number::2], tokenizer_sha256=sha)
    else:
        write_corpus(root / "c", documents, tokenizer_sha256=sha)
    pack_corpora([str(root / "c")], root / "pack", PackOptions(row_tokens=64, policy=policy, seed=1))
    return root / "pack"


def swap_tokens(path: Path, seed: int = 7) -> None:
    """Other tokens of the same size, in place."""
    tokens = np.fromfile(path, np.uint16)
    with open(path, "r+b") as stream:
        stream.write(np.random.default_rng(seed).permutation(tokens).tobytes())


def read_all(reader: RowReader) -> list[list[int]]:
    return [reader.read(row).tokens.tolist() for row in range(len(reader))]


@pytest.mark.parametrize("size", [0, 1, SMALL_BLOCK - 1, SMALL_BLOCK, SMALL_BLOCK + 1, 5 * SMALL_BLOCK + 3])
def test_hashes_of_blocks(tmp_path: Path, size: int) -> None:
    """While it is written in any pieces, and of the file, against hashes of slices."""
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "f").write_bytes(content)
    expected = []
    for first in range(0, size, SMALL_BLOCK):
        (tmp_path / "slice").write_bytes(content[first : first + SMALL_BLOCK])
        expected.append(sha256_file(tmp_path / "slice"))
    assert hash_blocks(tmp_path / "f") == expected
    hasher, place = BlockHasher(), 0
    for step in (1, 700, 0, 5000, 10_000):
        hasher = hasher.copy()
        hasher.update(content[place : place + step])
        place += step
    assert hasher.hexdigests() == expected


def test_a_sample_is_part_of_the_file_and_of_nothing_else(tmp_path: Path) -> None:
    size = (64 << 16) + 12_345
    places = list(sample_places(size, "ab" * 32))
    assert len(places) == 64
    assert places[0] == (0, 1 << 16)
    assert places[-1] == (size - (1 << 16), 1 << 16)
    assert all(0 <= first <= size - count for first, count in places)
    assert list(sample_places(1000, "ab" * 32)) == [(0, 1000)]
    path = tmp_path / "f"
    path.write_bytes(np.random.default_rng(0).bytes(size))
    file = WatchedFile(path)
    found = hash_sample(file, "ab" * 32)
    assert found == hash_sample(file, "ab" * 32) != hash_sample(file, "cd" * 32)


def test_the_manifest_binds_record_and_sample(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    record = read_corpus_record(tmp_path / "c")
    assert record is not None
    assert record.bin_blocks == hash_blocks(tmp_path / "c.bin")
    assert len(record.bin_blocks) > 8
    source = read_manifest(pack).sources[0]
    assert source.bin_blocks_sha256 is not None
    assert source.bin_sample_sha256 == sha256_file(tmp_path / "c.bin")  # a small file: all of it
    assert check_sources(pack, read_manifest(pack), None, verify_data=True) == []
    assert [check.detail for check in verify_pack(pack) if not check.passed] == []


def replace_record(root: Path) -> None:
    """Tokenized anew: other tokens, same lengths, a record that fits."""
    documents = ended_documents(random_documents(heavy_tailed_lengths(160, 1), 9))
    write_corpus(root / "c", documents, tokenizer_sha256="a" * 64)


def edit_blocks(root: Path) -> None:
    content = json.loads((root / "c.json").read_text())
    content["bin_blocks"]["sha256"][3] = "0" * 64
    (root / "c.json").write_text(json.dumps(content))


STARTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other tokens": (lambda root: swap_tokens(root / "c.bin"), r"c\.bin is not the file that was packed"),
    "one byte": (lambda root: flip(root / "c.bin", 5000), r"c\.bin is not the file that was packed"),
    "tokenized anew": (replace_record, r"c\.json says bin_sha256"),
    "hashes edited": (edit_blocks, r"c\.json has other hashes of blocks"),
    "bin cut": (lambda root: os.truncate(root / "c.bin", 4000), r"c\.bin has 4000 bytes"),
    "index of others": (lambda root: flip(root / "c.idx", -20), r"c\.idx"),
}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


NEED_A_RECORD = ("tokenized anew", "hashes edited")


@pytest.mark.parametrize(
    ("kind", "recorded"),
    [
        (kind, recorded)
        for kind in STARTS
        for recorded in (True, False)
        if recorded or kind not in NEED_A_RECORD
    ],
)
def test_what_is_noticed_at_the_start(tmp_path: Path, kind: str, recorded: bool) -> None:
    change, message = STARTS[kind]
    pack = make_pack(tmp_path, recorded=recorded)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_sources(pack, read_manifest(pack), None)


def test_a_large_file_is_sampled_at_the_start_and_read_whole_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte outside the sample passes the start, and neither --verify-data nor the row that reads it."""
    monkeypatch.setattr(corpus_guard, "PIECE_BYTES", 16)
    monkeypatch.setattr(source_guards, "SAMPLED_BLOCKS", 2)
    pack = make_pack(tmp_path)
    manifest = read_manifest(pack)
    size = (tmp_path / "c.bin").stat().st_size
    sampled = {
        b
        for first, count in sample_places(size, manifest.sources[0].idx_sha256)
        for b in range(first, first + count)
    }
    assert len(sampled) < size
    passed = 0
    for block in range(size // SMALL_BLOCK):
        shutil.copy(tmp_path / "c.bin", tmp_path / "kept")
        place = next(p for p in range(block * SMALL_BLOCK, size) if p not in sampled)
        flip(tmp_path / "c.bin", place)
        with pytest.raises(ValueError, match=rf"c\.bin is not the file.*bytes {block * SMALL_BLOCK:,} to"):
            check_sources(pack, manifest, None, verify_data=True)
        try:
            check_sources(pack, manifest, None)
            passed += 1
        except ValueError:
            pass
        with pytest.raises(ValueError, match=rf"c\.bin is not the file.*bytes {block * SMALL_BLOCK:,} to"):
            read_all(RowReader(pack, "train"))
        shutil.copy(tmp_path / "kept", tmp_path / "c.bin")
    assert passed == size // SMALL_BLOCK - 2
    monkeypatch.setattr(source_guards, "TOUCHED_BYTES", size - 1)
    flip(tmp_path / "c.bin", place)
    read_all(RowReader(pack, "train"))  # too large to be compared as it is read: documented


def test_a_corpus_without_record_says_what_could_not_be_compared(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, recorded=False)
    (line,) = check_sources(pack, read_manifest(pack), None, verify_data=True)
    assert "c.bin has no corpus record: only its size and a sample" in line


def test_a_record_without_blocks_is_compared_whole(tmp_path: Path) -> None:
    """As those made before there were blocks."""
    documents = ended_documents(random_documents(heavy_tailed_lengths(160, 1), 1))
    write_corpus(tmp_path / "c", documents, tokenizer_sha256="a" * 64)
    content = json.loads((tmp_path / "c.json").read_text())
    del content["bin_blocks"]
    (tmp_path / "c.json").write_text(json.dumps(content))
    pack_corpora(
        [str(tmp_path / "c")], tmp_path / "pack", PackOptions(row_tokens=64, policy="concat", seed=1)
    )
    manifest = read_manifest(tmp_path / "pack")
    assert manifest.sources[0].bin_blocks_sha256 is None
    assert check_sources(tmp_path / "pack", manifest, None, verify_data=True) == []
    stale = read_manifest(tmp_path / "pack").sources[0].bin_sample_sha256
    assert stale is not None


def test_packing_refuses_a_corpus_that_changed_after_tokenizing(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", random_documents([40] * 50), tokenizer_sha256="a" * 64)
    swap_tokens(tmp_path / "c.bin")
    with pytest.raises(ValueError, match=r"c\.bin is not the file that was packed"):
        pack_corpora(
            [str(tmp_path / "c")], tmp_path / "p", PackOptions(row_tokens=64, policy="concat", seed=1)
        )
    assert not (tmp_path / "p").exists()


def copy_over(path: Path) -> None:
    """Another file of the same size under its name, as `mv` does; the old one lives on while it is open."""
    other = path.with_name("other")
    shutil.copy(path, other)
    swap_tokens(other)
    os.replace(other, path)


CUTS: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2 // 2 * 2),
    "cut by a little": lambda path: os.truncate(path, path.stat().st_size - 2),
    "emptied": lambda path: os.truncate(path, 0),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 2),
    "overwritten": swap_tokens,
}
FILES = (
    "c.bin",
    "c.idx",
    *(f"pack/train/segment_{name}.npy" for name in ("tokens", "start", "document", "source")),
    "pack/train/row_offsets.npy",
)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_file_that_changes_while_rows_are_read(tmp_path: Path, file: str, recorded: bool) -> None:
    """Every row is right, or the error names the file; most of these files are smaller than a page."""
    expected = read_all(RowReader(make_pack(tmp_path / "base", recorded=recorded), "train"))
    for kind, change in CUTS.items():
        root = tmp_path / kind
        shutil.copytree(tmp_path / "base", root)
        reader = RowReader(root / "pack", "train")
        assert reader.read(0).tokens.tolist() == expected[0]
        os.utime(root / file, ns=(1, 1))  # so that the change is later, whatever the clock's tick
        reader = RowReader(root / "pack", "train")
        reader.read(0)
        change(root / file)
        with pytest.raises(ValueError, match=Path(file).name.replace(".", r"\.")):  # noqa: PT012
            for row in range(len(reader)):
                assert reader.read(row).tokens.tolist() == expected[row]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_file_that_is_replaced_under_its_name_goes_on(tmp_path: Path, recorded: bool) -> None:
    """The open file is read to its end; who opens the new one, in this job or the next, is told."""
    pack = make_pack(tmp_path, recorded=recorded)
    reader, late = RowReader(pack, "train"), RowReader(pack, "train")
    expected = [reader.read(0).tokens.tolist()]
    state = pickle.dumps(late)
    copy_over(tmp_path / "c.bin")
    assert read_all(reader)[0] == expected[0]
    for other in (late, pickle.loads(state)):  # noqa: S301
        with pytest.raises(ValueError, match=r"c\.bin"):
            read_all(other)
    with pytest.raises(ValueError, match=r"c\.bin is not the file"):
        check_sources(pack, read_manifest(pack), None)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shards", [False, True])
def test_a_touched_file_is_compared_again_and_believed(tmp_path: Path, policy: str, shards: bool) -> None:
    """Jobs on scratch disks touch their files; with hashes that costs a look, not the job."""
    pack = make_pack(tmp_path, policy=policy, shards=shards)
    expected = read_all(RowReader(pack, "train"))
    reader = RowReader(pack, "train")
    for row in range(len(reader)):
        if row % 3 == 0:
            for path in (*tmp_path.rglob("*.bin"), *tmp_path.rglob("*.idx"), *pack.rglob("*.npy")):
                os.utime(path, ns=(1, 1_000_000_000 * (row + 1)))
        assert reader.read(row).tokens.tolist() == expected[row]
    bare = make_pack(tmp_path / "bare", recorded=False)
    reader = RowReader(bare, "train")
    reader.read(0)
    os.utime(tmp_path / "bare" / "c.bin", ns=(1, 1))
    with pytest.raises(
        ValueError, match=r"c\.bin was written to while it was read, and without hashes it is unknown"
    ):
        reader.read(0)


def test_workers_share_what_was_compared_and_notice_what_is_wrong(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    dataset = PackedDataset(pack, "train")
    context = torch.multiprocessing.get_context("fork")
    loader = torch.utils.data.DataLoader(dataset, num_workers=2, multiprocessing_context=context)
    assert len(list(loader)) == len(dataset)
    (guard,) = dataset.reader._guards[0]
    assert guard.compared is not None
    assert all(guard.compared)
    swap_tokens(tmp_path / "c.bin")
    with pytest.raises(ValueError, match=r"c\.bin"):
        list(loader)
