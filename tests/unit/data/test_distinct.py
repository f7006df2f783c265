"""A corpus under two names is refused when it is packed, and found in packs that have it twice."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_corpora import ended_documents, heavy_tailed_lengths, random_documents, write_corpus

from megatron_exact.data import sources
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.verify_pack import verify_pack

pytestmark = pytest.mark.filterwarnings(
    "ignore:no source has a corpus record",
    "ignore:the validation split",
    "ignore:.* no corpus record",
)
OPTIONS = PackOptions(row_tokens=32, policy="concat", seed=1, validation_fraction=0.2)


def write(prefix: Path, seed: int, *, recorded: bool = False, lengths_seed: int | None = None) -> str:
    lengths = heavy_tailed_lengths(80, seed if lengths_seed is None else lengths_seed)
    documents = ended_documents(random_documents(lengths, seed))
    return write_corpus(prefix, documents, tokenizer_sha256="a" * 64 if recorded else None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of two shards without records, as Megatron and datatrove leave them."""
    for seed, name in enumerate("ab"):
        write(tmp_path / "web" / name, seed)
    return tmp_path


def name_again(root: Path, how: str) -> str:
    """Shard a under another name."""
    again = root / "other"
    again.mkdir()
    for suffix in ("bin", "idx"):
        shard = root / "web" / f"a.{suffix}"
        if how == "hard link":
            os.link(shard, again / f"y.{suffix}")
        elif how == "link":
            (again / f"y.{suffix}").symlink_to(shard)
        elif how == "copy" or suffix == "idx":
            shutil.copy(shard, again / f"y.{suffix}")
        else:  # the tokens alone are shared
            os.link(shard, again / f"y.{suffix}")
    return str(again / "y")


def test_a_folder_and_its_own_shard(root: Path) -> None:
    folder, shard = str(root / "web"), str(root / "web" / "a")
    for recorded in (False, True):
        if recorded:  # the record must not turn this into "a copy of itself"
            write(root / "web" / "a", 0, recorded=True)
            write(root / "web" / "b", 1, recorded=True)
        with pytest.raises(ValueError, match=r"^source .*web/a is .* as shard a of the folder .*web \("):
            pack_corpora([folder, shard], root / "pack", OPTIONS)
        with pytest.raises(ValueError, match=r"^shard a of the folder .*web is .* as source .*web/a \("):
            pack_corpora([shard, folder], root / "pack", OPTIONS)
        assert not (root / "pack").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("link", "is the same file as|are the same corpus"),
        ("hard link", "is the same file as"),
        ("the tokens", "is the same file as"),
        ("copy", "is a copy of"),
    ],
)
def test_a_shard_under_another_name(root: Path, how: str, message: str) -> None:
    other = name_again(root, how)
    for named in ([str(root / "web"), other], [str(root / "web" / "a"), other]):
        with pytest.raises(ValueError, match=message):
            pack_corpora(named, root / "pack", OPTIONS)
    assert not (root / "pack").exists()


def test_a_copy_of_which_one_has_a_record(root: Path) -> None:
    recorded = write(root / "y", 0, recorded=True)
    with pytest.raises(ValueError, match=r"source .*y is a copy of shard a of the folder"):
        pack_corpora([str(root / "web"), recorded], root / "pack", OPTIONS)


@pytest.mark.parametrize("alike_from_the_beginning", [False, True])
def test_equal_lengths_are_no_copy(root: Path, alike_from_the_beginning: bool) -> None:
    """Synthetic documents of one length have equal indices: only the tokens tell them apart."""
    other = write(root / "other" / "y", 5, lengths_seed=0)
    if alike_from_the_beginning:
        tokens = np.fromfile(root / "web" / "a.bin", np.uint16)
        assert tokens.nbytes < sources.HEAD_BYTES
        tokens[-2] += 1
        tokens.tofile(f"{other}.bin")
    assert Path(f"{other}.idx").read_bytes() == (root / "web" / "a.idx").read_bytes()
    manifest = pack_corpora([str(root / "web"), other], root / "pack", OPTIONS)
    assert manifest.sources[0].shards[0].idx_sha256 == manifest.sources[1].idx_sha256
    assert [check.name for check in verify_pack(root / "pack") if not check.passed] == []


def test_whole_files_are_read_only_where_they_begin_alike(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "HEAD_BYTES", 4)
    hashed: list[Path] = []
    monkeypatch.setattr(sources, "sha256_file", lambda path: hashed.append(path) or str(path))
    others = [write(root / "other" / name, seed, lengths_seed=0) for name, seed in (("y", 5), ("z", 6))]
    tokens = np.fromfile(f"{others[1]}.bin", np.uint16)
    tokens[:2] = np.fromfile(f"{others[0]}.bin", np.uint16)[:2]
    tokens.tofile(f"{others[1]}.bin")
    pack_corpora([str(root / "web"), *others], root / "pack", OPTIONS)
    assert [path.name for path in hashed] == ["y.bin", "z.bin"]


@pytest.mark.parametrize("how", ["same files", "copy"])
def test_verify_finds_it_in_a_pack(root: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Every other check passes: the two sources are told apart by their names alone."""
    again = str(root / "web" / "a") if how == "same files" else name_again(root, "copy")
    for name in ("require_distinct_files", "require_distinct_content"):
        monkeypatch.setattr(sources, name, lambda *_: None)
    pack = root / "pack"
    pack_corpora([str(root / "web"), again], pack, OPTIONS)
    held = documents_of(pack, "validation", source=1)
    assert held & documents_of(pack, "train", source=0), "a shard of a folder is split in another way"
    failed = {check.name: check.detail for check in verify_pack(pack) if not check.passed}
    assert list(failed) == ["sources"]
    assert ("is the same file as" if how == "same files" else "is a copy of") in failed["sources"]


def documents_of(pack: Path, split: str, source: int) -> set[int]:
    """Documents of one source in a split; those of shard a have the same number in the folder."""
    arrays = [np.load(pack / split / f"segment_{name}.npy") for name in ("source", "document")]
    return set(arrays[1][arrays[0] == source].tolist())


def test_empty_shards_are_no_copies(root: Path) -> None:
    """A share of a job may have no document that is kept."""
    for name in "cd":
        write_corpus(root / "web" / name, [])
    pack_corpora([str(root / "web")], root / "pack", OPTIONS)
    assert all(check.passed for check in verify_pack(root / "pack"))
