"""Rows read from a URL are those on disk; what is fetched, how often, and what happens when that fails."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from small_corpora import heavy_tailed_lengths, random_documents, write_corpus

from megatron_exact.data import corpus_guard, remote
from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.rows import Row, RowReader
from megatron_exact.data.source_guards import check_sources
from tests.range_server import serve_folder

pytestmark = pytest.mark.filterwarnings(
    "ignore:no source has a corpus record", "ignore:the validation split"
)
ROW_TOKENS = 256


class FolderStore(fsspec.AbstractFileSystem):
    """A folder as an object store that counts its requests and fails when told to."""

    protocol = "folder"
    root = Path()
    asked: ClassVar[Counter[str]] = Counter()
    failures = 0
    at_once = most_at_once = 0
    seconds = 0.0
    on_read: Callable[[], object] = staticmethod(lambda: None)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        FolderStore.asked["info"] += 1
        time.sleep(self.seconds)
        try:
            status = os.stat(self.root / path)
        except FileNotFoundError:
            raise FileNotFoundError(path) from None
        return {"name": path, "size": status.st_size, "type": "file", "ETag": f'"{status.st_mtime_ns}"'}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        FolderStore.asked["read"] += 1
        FolderStore.at_once += 1
        FolderStore.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.seconds)
        FolderStore.at_once -= 1
        if FolderStore.failures > 0:
            FolderStore.failures -= 1
            raise ConnectionResetError("reset by the store")
        content = (self.root / path).read_bytes()[start:end]
        FolderStore.on_read()
        return content


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FolderStore]]:
    """An empty store in `tmp_path/store`, an empty cache, and chunks of 512 bytes."""
    fsspec.register_implementation("folder", FolderStore, clobber=True)
    monkeypatch.setattr(FolderStore, "root", tmp_path)
    monkeypatch.setattr(FolderStore, "seconds", 0.0)
    monkeypatch.setattr(FolderStore, "failures", 0)
    monkeypatch.setattr(FolderStore, "most_at_once", 0)
    monkeypatch.setattr(FolderStore, "on_read", staticmethod(lambda: None))
    monkeypatch.setenv(remote.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "CHUNK_BYTES", 512)
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)
    as_another_process()
    FolderStore.asked.clear()
    yield FolderStore
    as_another_process()


def as_another_process() -> None:
    """Forget what this process has read, as another process of the node would not know it."""
    remote._readers.clear()
    remote._stand_ins.clear()


def make_pack(tmp_path: Path, policy: str = "concat", **options: Any) -> Path:
    """A pack of a pair with a record and of a folder of two shards; the corpora lie in the store."""
    root = tmp_path / "store"
    write_corpus(
        root / "a" / "web", random_documents(heavy_tailed_lengths(60), 1), tokenizer_sha256="ab" * 32
    )
    for shard in ("s0", "s1"):
        documents = random_documents(heavy_tailed_lengths(40, len(shard)), ord(shard[1]))
        write_corpus(root / "b" / "shards" / shard, documents, tokenizer_sha256="ab" * 32)
    sources = [str(root / "a" / "web"), str(root / "b" / "shards")]
    plan = PackOptions(row_tokens=ROW_TOKENS, policy=policy, seed=3, validation_fraction=0.2, **options)
    pack_corpora(sources, tmp_path / "pack", plan)
    return tmp_path / "pack"


def read_all(reader: RowReader) -> None:
    """Read every row."""
    for row in range(len(reader)):
        reader.read(row)


def arrays_of(row: Row) -> list[list[float]]:
    """Everything of a row, comparable."""
    return [
        *(row.tokens.tolist(), row.labels.tolist(), row.loss_mask.tolist(), row.position_ids.tolist()),
        *(row.cu_seqlens.tolist(), [row.num_filled, row.last_continues, row.max_seqlen]),
    ]


def differing_rows(pack: Path, split: str) -> int:
    """Rows that are not the same from the store as from disk, read in random order."""
    near, far = RowReader(pack, split), RowReader(pack, split, source_root="folder://store")
    order = np.random.default_rng(0).permutation(len(near)).tolist()
    return sum(arrays_of(near.read(row)) != arrays_of(far.read(row)) for row in order)


@pytest.mark.parametrize(
    ("policy", "masked"), [("concat", False), ("concat", True), ("best-fit", False), ("best-fit", True)]
)
def test_rows_from_a_url_are_those_on_disk(
    tmp_path: Path,
    store: type[FolderStore],
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    masked: bool,
) -> None:
    pack = make_pack(tmp_path, policy, mask_cross_document_targets=masked)
    assert read_manifest(pack).splits["validation"].rows > 1
    assert [differing_rows(pack, split) for split in ("train", "validation")] == [0, 0]
    assert store.asked["read"] > 10
    # The comparison finds one token that differs: the store gets another file than the disk
    shutil.copytree(tmp_path / "store", tmp_path / "other" / "store")
    monkeypatch.setattr(FolderStore, "root", tmp_path / "other")
    tokens = np.fromfile(tmp_path / "other" / "store" / "a" / "web.bin", np.uint16)
    tokens[: tokens.size // 2] ^= 1
    tokens.tofile(tmp_path / "other" / "store" / "a" / "web.bin")
    age_stand_ins(tmp_path)
    assert sum(differing_rows(pack, split) for split in ("train", "validation")) > 2


def age_stand_ins(tmp_path: Path) -> None:
    """As another process does, more than FRESH_SECONDS later."""
    as_another_process()
    for described in (tmp_path / "cache" / "corpora").rglob(".corpus.json"):
        os.utime(described, (0, 0))


def test_a_start_is_checked_against_what_was_packed(tmp_path: Path, store: type[FolderStore]) -> None:
    pack = make_pack(tmp_path)
    assert check_sources(pack, read_manifest(pack), "folder://store", verify_data=True) == []
    path = tmp_path / "store" / "a" / "web.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    age_stand_ins(tmp_path)
    with pytest.raises(ValueError, match=r"folder://.*web\.bin is not the file that was packed"):
        check_sources(pack, read_manifest(pack), "folder://store")


def test_the_node_fetches_what_its_processes_share(tmp_path: Path, store: type[FolderStore]) -> None:
    pack = make_pack(tmp_path)
    reader = RowReader(pack, "train", source_root="folder://store")
    for row in range(len(reader)):
        reader.read(row)
    assert store.asked["read"] > 10
    as_another_process()
    store.asked.clear()
    again = RowReader(pack, "train", source_root="folder://store")
    for row in range(len(again)):
        again.read(row)
    assert store.asked == Counter()
    # A chunk that is damaged on the disk, or is another one's, is fetched again
    chunks = sorted(path for path in (tmp_path / "cache" / "chunks").rglob("*") if path.name.isdigit())
    chunks = [path for path in chunks if path.is_file()]
    chunks[0].write_bytes(chunks[0].read_bytes()[:-1] + b"x")
    chunks[1].write_bytes(chunks[2].read_bytes())
    as_another_process()
    for row in range(len(again)):
        assert arrays_of(again.read(row)) == arrays_of(reader.read(row))
    assert store.asked["read"] == 2
    # After FRESH_SECONDS a start compares the objects, and fetches nothing that has not changed
    age_stand_ins(tmp_path)
    store.asked.clear()
    RowReader(pack, "train", source_root="folder://store")
    assert store.asked["read"] == 0
    assert store.asked["info"] > 0


def test_adjacent_chunks_are_one_request_and_others_run_at_once(
    tmp_path: Path, store: type[FolderStore]
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "f").write_bytes(content := np.random.default_rng(0).bytes(50_000))
    what = remote.RemoteObject.at("folder://store/f")
    reader = remote.chunk_reader()
    store.asked.clear()
    assert reader.take(what, 700, 5_000) == content[700:5_700]  # chunks 1 to 11
    assert store.asked == {"read": 1, "info": 1}
    store.seconds = 0.05
    places = [(begin, 600) for begin in range(6_000, 30_000, 3_000)]
    reader.want(what, places)
    assert [reader.take(what, *place) for place in places] == [content[a : a + b] for a, b in places]
    assert store.asked["read"] == 1 + len(places)
    assert store.asked["info"] <= 4  # one comparison answers for all that arrived before it
    assert store.most_at_once > 4
    assert reader.take(what, 49_990, 10) == content[-10:]
    assert list(remote.consecutive([1, 2, 3, 5, 6, 9], 2)) == [
        range(1, 3),
        range(3, 4),
        range(5, 7),
        range(9, 10),
    ]


def test_an_object_that_is_replaced_during_a_job_is_an_error(
    tmp_path: Path, store: type[FolderStore]
) -> None:
    pack = make_pack(tmp_path)
    path = tmp_path / "store" / "a" / "web.bin"
    reader = RowReader(pack, "train", source_root="folder://store")
    reader.read(0)
    reads: list[int] = []

    def replace_during_the_third() -> None:
        reads.append(1)
        if len(reads) == 3:
            shutil.copy(path, tmp_path / "copy")  # the same bytes, which nobody can know
            os.replace(tmp_path / "copy", path)

    store.on_read = staticmethod(replace_during_the_third)
    with pytest.raises(
        ValueError, match=r"folder://\S*web\.bin was replaced while a job read it.*start again"
    ):
        read_all(reader)


def test_a_request_that_fails_is_repeated_and_then_named(
    tmp_path: Path, store: type[FolderStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = make_pack(tmp_path)
    reader = RowReader(pack, "train", source_root="folder://store")
    expected = [arrays_of(RowReader(pack, "train").read(row)) for row in range(len(reader))]
    store.failures = 5
    assert [arrays_of(reader.read(row)) for row in range(len(reader))] == expected
    assert store.failures == 0
    as_another_process()
    monkeypatch.setenv(remote.FOLDER_VARIABLE, str(tmp_path / "another node"))
    fresh = PackedDataset(pack, "validation", source_root="folder://store", read_ahead=4)
    store.failures = 10**6
    with pytest.raises(
        ValueError, match=r"folder://\S+\.bin, bytes [\d,]+ to [\d,]+, could not be read in 8.*reset"
    ):
        fresh.__getitems__([0, 1])
    store.failures = 0  # the store is back: what failed in advance is asked for again
    assert len(fresh.__getitems__([0, 1])) == 2


def test_what_cannot_be_read_says_why(tmp_path: Path, store: type[FolderStore], monkeypatch: Any) -> None:
    pack = make_pack(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder://nowhere"):
        RowReader(pack, "train", source_root="folder://nowhere").read(0)

    def missing(protocol: str) -> None:
        raise ImportError(f"Install {protocol}fs")

    with pytest.raises(
        ValueError, match=r"s3://b/pack is a URL, but a pack is read from a folder.*copy it"
    ):
        read_manifest("s3://b/pack")
    for secret in (
        "https://me:word@host/data",
        "https://host/data?X-Amz-Signature=ab",
        "simplecache::s3://b",
    ):
        with pytest.raises(ValueError, match="credentials") as error:
            RowReader(pack, "train", source_root=secret).read(0)
        assert "word" not in str(error.value)
        assert "Signature" not in str(error.value)
    with monkeypatch.context() as patch:
        patch.setattr(fsspec, "get_filesystem_class", missing)
        with pytest.raises(ValueError, match=r"pip install 'megatron-exact\[s3\]'"):
            RowReader(pack, "train", source_root="s3://bucket/corpora").read(0)
    index = tmp_path / "store" / "a" / "web.idx"
    index.write_bytes(index.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"web\.idx has sha256"):
        RowReader(pack, "train", source_root="folder://store").source(0)


def test_the_cache_stays_below_its_limit(tmp_path: Path) -> None:
    cache = remote.NodeCache(tmp_path, 100_000)
    for number in range(400):
        cache.write("key", number, bytes([number % 256]) * 1_000)
        os.utime(cache._path("key", number), (number, number))
    kept = [number for number in range(400) if cache.read("key", number) is not None]
    assert 60 <= len(kept) <= 72  # 1,032 bytes each, 70% of the limit and what was written since
    assert kept == list(range(400 - len(kept), 400))  # the newest
    (tmp_path / "file").write_text("")
    broken = remote.NodeCache(tmp_path / "file", 100_000)  # a disk that takes nothing
    broken.write("key", 0, b"x")
    assert broken.read("key", 0) is None


def test_read_ahead_asks_for_the_rows_that_a_worker_reads_next(
    tmp_path: Path, store: type[FolderStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = make_pack(tmp_path)
    plain = PackedDataset(pack, "train", num_samples=60, seed=1)
    ahead = PackedDataset(pack, "train", num_samples=60, seed=1, source_root="folder://store", read_ahead=4)
    asked: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(ahead.reader, "will_need", asked.append)
        for first in (3, 9, 15, 21):  # micro-batches of 2 by rank 1 of 3, which begin 6 apart
            items, expected = ahead.__getitems__([first, first + 1]), [plain[first], plain[first + 1]]
            for item, same in zip(items, expected, strict=True):
                assert all((item[name] == same[name]).all() for name in same)
    items_asked = [3, 4, *(item for first in range(9, 34, 6) for item in (first, first + 1))]
    assert asked == [ahead.row_of(item) for item in items_asked]


def test_rows_that_were_read_ahead_need_no_store(tmp_path: Path, store: type[FolderStore]) -> None:
    pack = make_pack(tmp_path)
    dataset = PackedDataset(
        pack, "train", num_samples=60, seed=1, source_root="folder://store", read_ahead=2
    )
    dataset.__getitems__([0, 1])
    dataset.__getitems__([4, 5])
    for future in list(remote.chunk_reader()._chunks.values()):
        future.result(timeout=60)
    store.failures = 10**6
    assert len(dataset.__getitems__([8, 9])) == 2
    with pytest.raises(ValueError, match="could not be read"):  # rows that nobody asked for
        dataset.__getitems__(list(range(30, 60)))


def test_rows_over_http(tmp_path: Path, store: type[FolderStore], monkeypatch: pytest.MonkeyPatch) -> None:
    pack = make_pack(tmp_path)
    with serve_folder(tmp_path / "store") as server:
        near, far = RowReader(pack, "train"), RowReader(pack, "train", source_root=server.url)
        expected = [arrays_of(near.read(row)) for row in range(len(near))]
        assert [arrays_of(far.read(row)) for row in range(3)] == expected[:3]
        server.cuts = 3  # answers that end early are asked for again
        assert [arrays_of(far.read(row)) for row in range(3, 6)] == expected[3:6]
        assert server.cuts == 0
        monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.3)
        server.hangs = 2  # and so are those that do not come
        assert [arrays_of(far.read(row)) for row in range(6, 9)] == expected[6:9]
        assert server.hangs == 0
        server.ignores_ranges = True
        as_another_process()
        shutil.rmtree(tmp_path / "cache" / "chunks")
        with pytest.raises(ValueError, match="served whole where a range is asked for"):
            read_all(far)
        # At a start the small index finds that out, before a whole .bin is sent
        monkeypatch.setenv(remote.FOLDER_VARIABLE, str(tmp_path / "another node"))
        as_another_process()
        with pytest.raises(ValueError, match=r"\.idx is served whole where a range is asked for"):
            RowReader(pack, "train", source_root=server.url).source(0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_data_workers_are_forked_from_a_process_that_reads(
    tmp_path: Path, store: type[FolderStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loop, threads and connections do not exist in the workers, and stay usable in the parent."""
    pack = make_pack(tmp_path)
    monkeypatch.setattr(remote, "ATTEMPTS", 1)  # a connection that a fork broke is an error
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 20.0)
    expected = [item["tokens"].tolist() for item in PackedDataset(pack, "train", seed=1)]
    with serve_folder(tmp_path / "store") as server:
        far = PackedDataset(pack, "train", seed=1, source_root=server.url, read_ahead=2)
        assert far[0]["tokens"].tolist() == expected[0]  # the parent has a loop, threads and connections
        # The workers share nothing with the parent's cache, so that they ask the server
        monkeypatch.setenv(remote.FOLDER_VARIABLE, str(tmp_path / "of the workers"))
        loader = torch.utils.data.DataLoader(
            far, num_workers=2, multiprocessing_context="fork", batch_size=2, timeout=60
        )
        server.asked.clear()
        assert [row for batch in loader for row in batch["tokens"].tolist()] == expected
        assert server.asked["GET"] > 2
        server.asked.clear()
        assert [far[item]["tokens"].tolist() for item in range(len(far))] == expected
        assert server.asked["GET"] > 2


def test_a_place_that_may_not_be_read_is_passed_over(tmp_path: Path, store: type[FolderStore]) -> None:
    """S3 answers 403 for a missing object of a bucket that may not be listed."""
    pack = make_pack(tmp_path)
    with serve_folder(tmp_path / "store") as server:
        server.forbidden = {"store/a/web.idx", "store/b/shards/s0.idx", "store/b/shards/s1.idx"}
        read_all(RowReader(pack, "train", source_root=server.url))
        server.forbidden = {*server.forbidden, "a/web.idx", "web.idx"}
        as_another_process()
        age_stand_ins(tmp_path)
        with pytest.raises(ValueError, match=r"may not be read.*give the job credentials"):
            RowReader(pack, "train", source_root=server.url).source(0)


def test_verification_reads_the_store_and_leaves_nothing_in_the_cache(
    tmp_path: Path, store: type[FolderStore]
) -> None:
    pack = make_pack(tmp_path)
    read_all(RowReader(pack, "train", source_root="folder://store"))
    chunks = tmp_path / "cache" / "chunks"
    before = sorted(chunks.rglob("*"))
    store.asked.clear()
    check_sources(pack, read_manifest(pack), "folder://store", verify_data=True)
    sizes = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*.bin"))
    assert store.asked["read"] >= 3  # although the cache has nearly all of it
    assert sizes > 0
    added = [path for path in sorted(chunks.rglob("*")) if path not in before and path.is_file()]
    assert sum(path.stat().st_size for path in added) < sizes / 2


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, store: type[FolderStore], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    pack = make_pack(tmp_path)
    expected = [arrays_of(RowReader(pack, "train").read(row)) for row in range(4)]

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", full)
        with pytest.raises(ValueError, match=r"cannot be filled \(No space left.*MEGATRON_EXACT_CACHE"):
            RowReader(pack, "train", source_root="folder://store").source(0)
        patch.undo()
        patch.setattr(os, "replace", full)
        with pytest.raises(ValueError, match="cannot be filled"):
            RowReader(pack, "train", source_root="folder://store").source(0)
    # Without chunks on the disk, rows are read all the same, and one line says so
    reader = RowReader(pack, "train", source_root="folder://store")
    assert len(reader.source(0)) > 0
    assert len(reader.source(1)) > 0
    monkeypatch.setattr(os, "replace", full)
    assert [arrays_of(reader.read(row)) for row in range(4)] == expected
    assert capsys.readouterr().err.count("cannot be written ([Errno 28]") == 1


opened: list[str] = []
sys.addaudithook(lambda event, about: opened.append(str(about[0])) if event == "open" else None)


@pytest.mark.parametrize("is_on_network", [True, False])
def test_a_step_asks_a_network_file_system_for_no_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_on_network: bool
) -> None:
    pack = make_pack(tmp_path)
    monkeypatch.setattr(corpus_guard, "is_on_network", lambda device: is_on_network)
    asked: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            asked[name] += 1
            return real(*arguments, **named)

        return call

    names = ("open", "stat", "fstat", "lstat", "listdir", "scandir", "access")
    dataset = PackedDataset(pack, "train", seed=1)
    for item in range(len(dataset)):
        dataset[item]
    for name in names:
        monkeypatch.setattr(os, name, counted(name))
    opened.clear()
    for item in range(len(dataset)):
        dataset[item]
    if is_on_network:
        assert (asked, opened) == (Counter(), [])
        # The counters count: a corpus that is closed is opened again, and looked at
        for source in range(2):
            dataset.reader.source(source).release()
        dataset[0]
        assert asked["open"] > 0
        assert len(opened) > 0
        assert asked["fstat"] > 0
        # A file that is overwritten is found at the next look
        dataset[1]
        monkeypatch.setattr(corpus_guard, "LOOK_SECONDS", 0.0)
        path = tmp_path / "pack" / "train" / "segment_start.npy"
        path.write_bytes(bytes(path.stat().st_size))
        for array in dataset.reader._arrays.values():
            array._look_at = 0.0
        with pytest.raises(ValueError, match=r"segment_start\.npy was overwritten"):
            dataset[1]
    else:
        assert asked["fstat"] > 5 * len(dataset)
        assert asked["open"] == 0
