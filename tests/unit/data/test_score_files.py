"""Files of scores as a reader meets them: many shards, and some that are missing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_exact.data import score_files
from megatron_exact.data.score_files import ScoreReader, ScoreRecord, check_shards

ROWS, ROW_TOKENS = 23, 16


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Complete scores in shards of 4 rows, the last of 3; their differences."""
    folder = tmp_path / "scores"
    differences = np.random.default_rng(0).normal(size=(ROWS, ROW_TOKENS)).astype(np.float16)
    record = ScoreRecord(
        format_version=score_files.FORMAT_VERSION,
        fingerprint="of the pack",
        row_tokens=ROW_TOKENS,
        model={},
        dtype="float32",
        short_window=8,
        short_stride=6,
        shard_rows=4,
        rows={"train": ROWS},
        is_complete=False,
    )
    for split, shard in score_files.begin_scores(folder, record):
        part = differences[4 * shard : 4 * shard + 4]
        arrays: dict[str, Any] = {"long": part, "difference": part}
        score_files.write_shard(folder, record, split, shard, arrays)
    score_files.finish_scores(folder, record)
    return folder, differences


@pytest.mark.parametrize("model", [{}, {"name": "other"}])
def test_two_processes_that_begin_at_once_agree(
    written: tuple[Path, np.ndarray], model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process writes the record after this one has not found it."""
    record = score_files.read_record(written[0])
    folder, is_file = written[0] / "new", Path.is_file
    looks: list[Path] = []

    def look(path: Path) -> bool:
        found = is_file(path)
        if path == folder / score_files.RECORD_NAME:
            looks.append(path)
            if len(looks) == 1:
                other = {**asdict(record), "model": model, "is_complete": False, "arrays": {}}
                score_files.write_json(path, other)
        return found

    monkeypatch.setattr(Path, "is_file", look)
    if model:
        with pytest.raises(ValueError, match=r"contains scores with model {'name': 'other'}, not \{\}"):
            score_files.begin_scores(folder, record)
    else:
        assert len(score_files.begin_scores(folder, record)) == 6
    assert [path.name for path in folder.iterdir()] == [score_files.RECORD_NAME]


def test_a_reader_keeps_few_files_open(
    written: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_files, "MOST_MAPPED", 2)
    folder, differences = written
    manifest: Any = SimpleNamespace(fingerprint="of the pack")
    reader = ScoreReader(folder, manifest, "train")
    for row in np.random.default_rng(1).permutation(ROWS).tolist():
        np.testing.assert_array_equal(reader.read(row).difference, differences[row])
        assert len(reader._shards) <= 2


def test_a_shard_that_is_missing_or_short_is_found_without_reading_it(
    written: tuple[Path, np.ndarray],
) -> None:
    folder, _ = written
    check_shards(folder, "train")
    last = folder / "train" / "difference-00005.npy"
    whole = last.read_bytes()
    last.write_bytes(whole[: 3 * ROW_TOKENS * 2])
    with pytest.raises(ValueError, match=r"difference-00005\.npy is missing or truncated"):
        check_shards(folder, "train")
    last.unlink()
    with pytest.raises(ValueError, match=r"difference-00005\.npy is missing or truncated"):
        check_shards(folder, "train")
    last.write_bytes(whole)
    check_shards(folder, "train")
