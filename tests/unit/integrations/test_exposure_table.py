"""The exposure table: what it contains, what is refused, and counting one from batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_exact.data.manifest import read_manifest
from megatron_exact.exposure import build_weighting
from megatron_exact.integrations.exposure_table import (
    ExposureCounter,
    make_table,
    read_table,
    table_of_pack,
    write_table,
)
from megatron_exact.integrations.packed_rows import PackedRows
from tests.distributed import jobs
from tests.forked import run_tool


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    corpus = jobs.make_corpus(tmp_path_factory.mktemp("corpus") / "docs")
    return {
        "concat": jobs.make_pack(corpus, "concat", seed=5),
        "best-fit": jobs.make_pack(corpus, "best-fit"),
        "masked": jobs.make_pack(corpus, "concat", "masked", mask_cross_document_targets=True),
    }


@pytest.mark.parametrize("name", ["concat", "best-fit", "masked"])
def test_a_counter_finds_what_the_pack_says(name: str, packs: dict[str, Path], tmp_path: Path) -> None:
    """Rows of the dataset, counted one by one, against the closed form of the plan."""
    table = table_of_pack(packs[name])
    assert table.counts == read_manifest(packs[name]).splits["train"].exposure.counts
    counter, always = ExposureCounter(jobs.ROW_TOKENS), ExposureCounter(jobs.ROW_TOKENS)
    reader = PackedRows(packs[name])._rows.reader
    for row in map(reader.read, range(len(reader))):
        mask = row.loss_mask > 0
        counter.add(row.position_ids, mask, last_continues=row.last_continues)
        always.add(row.position_ids, mask)
    counted = counter.table()
    assert (counted.counts, counted.position_counts) == (table.counts, table.position_counts)
    # Without knowing which documents end with their row; concat alone supervises such ends
    assert (always.table().counts == table.counts) == (name != "concat")

    path = tmp_path / "table.json"
    write_table(table, path)
    assert read_table(path) == table
    expected = build_weighting("exact", table.counts, table.lower_bounds, table.row_tokens, alpha=0.3)
    assert (table.weighting(alpha=0.3).bucket_weights == expected.bucket_weights).all()
    assert (table.weighting(alpha=0.4).bucket_weights != expected.bucket_weights).any()


def test_inspect_writes_it(packs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "new" / "exposure_table.json"
    done = run_tool("inspect_pack.py", packs["best-fit"], "--exposure-table", path, "--json")
    assert done.returncode == 0, done.stderr
    table = read_table(path)
    assert table == table_of_pack(packs["best-fit"])
    assert table.fingerprint == json.loads(done.stdout)["fingerprint"]
    refused = run_tool("inspect_pack.py", packs["best-fit"], "--ledger", "--exposure-table", path)
    assert refused.returncode != 0
    assert "--exposure-table with --ledger" in refused.stderr


def test_lengths_are_documents() -> None:
    by_length, by_row = ExposureCounter(64), ExposureCounter(64)
    by_length.add_lengths([20, 44])
    positions = np.r_[np.arange(20), np.arange(44)]
    inside = np.r_[np.arange(64) != 19][:, None].ravel() & (np.arange(64) != 63)
    by_row.add(positions, inside)
    assert by_length.table().counts == by_row.table().counts
    # torchtitan's loader: every input has a target, also the last of a document
    shifted, lengths = ExposureCounter(64, labels="document"), ExposureCounter(64, labels="document")
    shifted.add(positions)
    lengths.add_lengths([20, 44])
    assert shifted.table().counts == lengths.table().counts
    assert sum(shifted.table().counts) == 64
    assert sum(by_row.table().counts) == 62


def changed(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**content, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": [5, 6, 7, 9]}, "says sha256"),
        ({"counts": [5, 6, 7]}, "3 counts for 4 buckets"),
        ({"counts": [-1, 6, 7, 8]}, "must not be negative"),
        ({"counts": [0, 0, 0, 0]}, "has no targets"),
        ({"counts": [5.5, 6, 7, 8]}, "counts.*wrong type|integer|is needed"),
        ({"row_tokens": 128}, "lower_bounds"),
        ({"format_version": 2}, "format_version 2"),
        ({"position_counts": [1, 1, 1, 1]}, "4 targets in position_counts and 26 in counts"),
        ({"extra": 1}, "unknown extra"),
    ],
)
def test_damage_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write_table(make_table(64, [5, 6, 7, 8]), path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
    with pytest.raises(ValueError, match=message) as error:
        read_table(path)
    assert "table.json" in str(error.value)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (np.arange(1, 9), "begin each row with 0"),
        (np.array([0, 1, 3]), "up by 1 or back to 0"),
        (np.arange(65), "another window"),
        (np.zeros(3), "integers"),
    ],
)
def test_positions_that_no_document_has(positions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExposureCounter(64).add(positions)


def test_nothing_counted() -> None:
    with pytest.raises(ValueError, match="no targets"):
        ExposureCounter(64).table()
    with pytest.raises(ValueError, match="65 tokens does not fit"):
        ExposureCounter(64).add_lengths([65])
    with pytest.raises(ValueError, match="labels is 'rows'"):
        ExposureCounter(64, labels="rows")  # type: ignore[arg-type]
