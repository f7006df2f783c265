"""Rows read fast equal rows read token by token; counts in closed form equal counts by hand."""

from __future__ import annotations

import itertools
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import (
    Documents,
    heavy_tailed_lengths,
    plain_bucket,
    random_documents,
    read_rows_plainly,
    write_corpus,
)

from megatron_exact.data.manifest import POLICIES, SPLITS, Manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.rows import RowReader
from megatron_exact.exposure import effective_context

pytestmark = pytest.mark.filterwarnings(
    "ignore:no source has a corpus record", "ignore:the validation split"
)


def check_against_plain_reading(pack_dir: Path, manifest: Manifest, corpora: list[Documents]) -> None:
    """Every array of every row, and the manifest's counts."""
    for split in SPLITS:
        entry = manifest.splits[split]
        reader = RowReader(pack_dir, split)
        plain = read_rows_plainly(pack_dir, split, corpora)
        assert len(reader) == len(plain) == entry.rows
        counts = [0] * len(entry.exposure.lower)
        for index, expected in enumerate(plain):
            row = reader.read(index)
            assert row.tokens.tolist() == expected.tokens
            assert row.labels.tolist() == expected.labels
            assert row.loss_mask.tolist() == expected.mask
            assert row.cu_seqlens.tolist() == expected.boundaries
            assert row.by_context(np.arange(manifest.row_tokens + 1)).tolist() == expected.context
            buckets = [plain_bucket(context, manifest.row_tokens) for context in expected.context]
            target_buckets = row.by_context(reader.bucket_of_context)
            assert target_buckets.tolist() == buckets
            positions = [p for a, b in itertools.pairwise(expected.boundaries) for p in range(b - a)]
            assert row.position_ids.tolist() == positions
            assert row.max_seqlen == max(np.diff(expected.boundaries))
            dtypes = (row.tokens.dtype, row.labels.dtype, row.cu_seqlens.dtype, target_buckets.dtype)
            assert dtypes == (np.dtype(np.int64),) * 4
            assert row.position_ids.dtype == np.int64
            assert row.loss_mask.dtype == np.float32
            for bucket, supervised in zip(buckets, expected.mask, strict=True):
                counts[bucket] += supervised
        assert counts == list(entry.exposure.counts)
        assert entry.supervised_targets == sum(counts)
        used = sum(len(row.tokens) - row.tokens.count(0) for row in plain)  # ids start at 1
        assert entry.tokens == used
        assert entry.padding_tokens == entry.rows * manifest.row_tokens - used


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(
        st.lists(st.one_of(st.integers(1, 12), st.integers(1, 90)), min_size=1, max_size=25),
        min_size=1,
        max_size=3,
    ),
    row_tokens=st.integers(1, 40),
    policy=st.sampled_from(POLICIES),
    mask=st.booleans(),
    fraction=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 5),
)
def test_any_pack_reads_as_by_hand(
    lengths: list[list[int]], row_tokens: int, policy: str, mask: bool, fraction: float, seed: int
) -> None:
    corpora = [random_documents(lengths, number) for number, lengths in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prefixes = [
            write_corpus(root / f"c{number}", documents) for number, documents in enumerate(corpora)
        ]
        options = PackOptions(
            row_tokens=row_tokens,
            policy=policy,
            seed=seed,
            validation_fraction=fraction,
            mask_cross_document_targets=mask,
        )
        try:
            manifest = pack_corpora(prefixes, root / "pack", options)
        except ValueError as error:
            if "do not fill one row" not in str(error) or (root / "pack").exists():
                raise
            return
        check_against_plain_reading(root / "pack", manifest, corpora)


@pytest.mark.parametrize("policy", POLICIES)
def test_repeats_and_weights_read_as_by_hand(tmp_path: Path, policy: str) -> None:
    corpora = [random_documents(heavy_tailed_lengths(40, seed), seed) for seed in (1, 2)]
    prefixes = [write_corpus(tmp_path / f"c{index}", documents) for index, documents in enumerate(corpora)]
    options = PackOptions(row_tokens=64, policy=policy, seed=1, train_tokens=9000, allow_repeats=True)
    manifest = pack_corpora([f"3:{prefixes[0]}", f"1:{prefixes[1]}"], tmp_path / "pack", options)
    assert any(use.repeated_tokens for use in manifest.splits["train"].sources)
    check_against_plain_reading(tmp_path / "pack", manifest, corpora)


def make_pack(root: Path, policy: str = "concat", **options: object) -> Path:
    write_corpus(root / "data" / "c", random_documents(heavy_tailed_lengths(60)))
    arguments: dict[str, object] = {"row_tokens": 48, "policy": policy, "seed": 1, **options}
    pack_corpora([str(root / "data" / "c")], root / "pack", PackOptions(**arguments))  # type: ignore[arg-type]
    return root / "pack"


def test_effective_context_is_the_exposure_packages(tmp_path: Path) -> None:
    for policy in POLICIES:
        reader = RowReader(make_pack(tmp_path / policy, policy), "train")
        padded = 0
        for index in range(len(reader)):
            row = reader.read(index)
            context = effective_context(row.cu_seqlens, last_continues=row.last_continues)
            supervised = row.loss_mask > 0
            found = row.by_context(np.arange(reader.row_tokens + 1))
            assert (found[supervised] == context[supervised]).all()
            padded += int((~supervised).any())
        assert bool(padded) == (policy == "best-fit")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_folder_of_shards_reads_as_by_hand(tmp_path: Path, policy: str) -> None:
    """Beside a source of one pair; each shard is opened when a row needs it."""
    shards = [random_documents(heavy_tailed_lengths(30, seed), seed) for seed in range(4)]
    for number, documents in enumerate(shards):
        write_corpus(tmp_path / "data" / "many" / f"{number:05}", documents)
    single = random_documents(heavy_tailed_lengths(20, 9), 9)
    sources = [str(tmp_path / "data" / "many"), write_corpus(tmp_path / "data" / "one", single)]
    options = PackOptions(row_tokens=64, policy=policy, seed=1, validation_fraction=0.2)
    manifest = pack_corpora(sources, tmp_path / "pack", options)
    assert [len(source.shards) for source in manifest.sources] == [4, 0]
    everything = [document for documents in shards for document in documents]
    check_against_plain_reading(tmp_path / "pack", manifest, [everything, single])
    (tmp_path / "data" / "many" / "00002.bin").unlink()
    reader = RowReader(tmp_path / "pack", "train")
    failures = []
    for row in range(len(reader)):
        try:
            reader.read(row)
        except FileNotFoundError as error:
            failures.append(str(error))
    assert 0 < len(failures) < len(reader)
    assert all("00002.bin is missing" in failure for failure in failures)


def test_stored_in_another_dtype(tmp_path: Path) -> None:
    """Corpora with large vocabularies are int32."""
    from megatron_exact.data.indexed import IndexedWriter

    documents = [[70_000 + number for number in range(20)], [99_999] * 9]
    writer = IndexedWriter(tmp_path / "c.bin", tmp_path / "c.idx", 100_000)
    for document in documents:
        writer.add(np.array(document))
    writer.close()
    manifest = pack_corpora(
        [str(tmp_path / "c")], tmp_path / "pack", PackOptions(row_tokens=7, policy="concat", seed=0)
    )
    check_against_plain_reading(tmp_path / "pack", manifest, [documents])


def test_a_pickled_reader_reads_on(tmp_path: Path) -> None:
    reader = RowReader(make_pack(tmp_path), "train")
    expected = reader.read(3)
    data = pickle.dumps(reader)
    assert len(data) < 1000
    assert (pickle.loads(data).read(3).tokens == expected.tokens).all()  # noqa: S301


def test_moved_sources_are_found_below_source_root(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    expected = RowReader(pack, "train").read(0).tokens.tolist()
    shutil.move(tmp_path / "data", tmp_path / "elsewhere" / "data")
    with pytest.raises(FileNotFoundError, match=r"c\.idx is missing"):
        RowReader(pack, "train").read(0)
    for root in (tmp_path / "elsewhere", tmp_path / "elsewhere" / "data"):
        assert RowReader(pack, "train", source_root=root).read(0).tokens.tolist() == expected
    with pytest.raises(FileNotFoundError, match=r"no c\.idx below"):
        RowReader(pack, "train", source_root=tmp_path).read(0)


def test_everything_moved_together_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = make_pack(tmp_path / "one")
    expected = RowReader(pack, "train").read(0).tokens.tolist()
    shutil.move(tmp_path / "one", tmp_path / "two")
    monkeypatch.chdir(tmp_path / "two" / "pack")
    for place in (tmp_path / "two" / "pack", Path(), Path("../pack")):
        assert RowReader(place, "train").read(0).tokens.tolist() == expected


def test_another_corpus_in_its_place_is_refused(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    write_corpus(tmp_path / "data" / "c", random_documents([5, 6]))
    with pytest.raises(ValueError, match="2 documents, 11 tokens"):
        RowReader(pack, "train").read(0)


def test_rows_and_splits_that_do_not_exist(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    reader = RowReader(pack, "train")
    for row in (-1, len(reader)):
        with pytest.raises(IndexError, match="not in"):
            reader.read(row)
    with pytest.raises(ValueError, match="no split 'test'"):
        RowReader(pack, "test")
    assert len(RowReader(pack, "validation")) == 0


def test_an_array_cut_short_is_refused(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    path = pack / "train" / "segment_start.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"segment_start\.npy cannot be read"):
        RowReader(pack, "train")
    np.save(path, np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"segment_start\.npy contains int64 \(3,\)"):
        RowReader(pack, "train")
