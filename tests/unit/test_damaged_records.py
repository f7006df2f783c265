"""Every record that the tools read, with what a damaged or hostile file may contain: one line each."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.miniature.results import read_results_file
from megatron_exact.data.corpus_record import read_corpus_record
from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.score_files import read_record as read_scores
from megatron_exact.data.shard_job import missing_shards
from megatron_exact.evaluation.engine import max_positions, read_provenance, stored_dtype
from megatron_exact.evaluation.probe_items import read_items
from megatron_exact.evaluation.result_folders import (
    Cell,
    read_cell_file,
    read_probe_record,
    read_probe_results,
    read_result_folder,
)
from megatron_exact.evaluation.suites.nolima import read_needles
from megatron_exact.integrity import read_integrity
from megatron_exact.model.hf_folder import read_json_object
from megatron_exact.report.compared import read_compared
from megatron_exact.report.comparison_page import read_comparison
from megatron_exact.report.exposure_figure import read_exposure, read_pack
from megatron_exact.report.results import read_records, read_run
from megatron_exact.training.run_record import read_run_record

CELL = Cell(suite="ruler", task="vt", length=1024)

# File in the folder of a record -> what reads it.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "pack": ("manifest.json", lambda folder: read_manifest(folder)),
    "pack, for a report": ("manifest.json", read_pack),
    "corpus": ("c.json", lambda folder: read_corpus_record(folder / "c")),
    "scores": ("scores.json", read_scores),
    "shards": ("shards.json", missing_shards),
    "checkpoint": ("integrity.json", read_integrity),
    "run": ("run.json", read_run_record),
    "run, for a report": ("run.json", read_run),
    "losses": ("losses.jsonl", lambda folder: read_records(folder / "losses.jsonl")),
    "model": ("config.json", lambda folder: read_json_object(folder / "config.json")),
    "model, its dtype": ("config.json", stored_dtype),
    "model, its window": ("config.json", max_positions),
    "export": ("megatron_exact.json", read_provenance),
    "results": ("results.json", read_result_folder),
    "cell": ("1024.jsonl", lambda folder: read_cell_file(folder / "1024.jsonl", CELL)),
    "probe": ("probe.json", read_probe_record),
    "probe, a kind": ("probe/recall.jsonl", lambda folder: read_probe_results(folder, "recall")),
    "items": ("items.jsonl", lambda folder: read_items(folder / "items.jsonl")),
    "needles": ("needles.json", lambda folder: read_needles(folder / "needles.json")),
    "comparison": ("comparison.json", lambda folder: read_comparison(folder / "comparison.json")),
    "comparison, for a report": ("comparison.json", lambda folder: read_compared([str(folder)])),
    "exposure": ("exposure.json", lambda folder: read_exposure(folder / "exposure.json")),
    "miniature": ("results.json", lambda folder: read_results_file(folder / "results.json")),
}
CONTENTS: dict[str, bytes] = {
    "nested": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested, not closed": b"[" * 100_000,
    "a little too deep": b'{"a":' * 200 + b"1" + b"}" * 200,
    "400 digits": b'{"a": 1' + b"0" * 400 + b"}",
    "5,000 digits": b'{"a": 1' + b"0" * 5_000 + b"}",
    "NaN": b'{"a": NaN}',
    "beyond a float": b'{"a": -1e999}',
    "a key twice": b'{"a": 1, "a": 2}',
    "half a surrogate": b'{"a": "\\ud800"}',
    "a list": b"[]",
    "text": b'"a"',
    "null": b"null",
    "binary": bytes(range(256)),
    "not UTF-8": b'{"a": "\xff"}',
    "cut": b'{"a": ',
}


@pytest.mark.parametrize("record", READERS)
def test_a_damaged_record_is_one_line_that_names_the_file(tmp_path: Path, record: str) -> None:
    name, read = READERS[record]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for content, data in CONTENTS.items():
        path.write_bytes(data)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            read(tmp_path)
        message = str(caught.value)
        assert name in message, f"{content}: {message}"
        assert len(message) < 600, f"{content}: {len(message)} characters"


@pytest.mark.parametrize("record", READERS)
def test_a_record_that_is_a_pipe_does_not_wait_for_a_writer(tmp_path: Path, record: str) -> None:
    name, read = READERS[record]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    found: object = None  # a reader may also find that there is no such file
    with contextlib.suppress(ValueError, OSError):
        found = read(tmp_path)
    assert not found


def test_integers_beyond_64_bits_are_refused_but_in_files_of_hugging_face(tmp_path: Path) -> None:
    content = json.dumps({"a": 10**30})
    (tmp_path / "config.json").write_text(content)
    assert read_json_object(tmp_path / "config.json") == {"a": 10**30}
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json: a is the integer 10+\.\.\., which 64 bits"):
        read_run_record(tmp_path)
