"""results.json, when several calls write it at once."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.evaluation import result_folders
from megatron_exact.evaluation.result_folders import Cell, forget_cell, record_cell, write_merged

ABOUT: dict[str, Any] = {
    "model": {"name": "a"},
    "backend": {"name": "hf", "dtype": "float32", "calls": [{"device": "cpu"}]},
}
RECORD: dict[str, Any] = {"options": {}, "template": None, "sources": {}}


def test_no_writer_loses_what_another_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = result_folders.write_json

    def slowly(path: Path, value: Any) -> None:
        time.sleep(0.05)  # everybody has read by now, unless they wait for each other
        write(path, value)

    monkeypatch.setattr(result_folders, "write_json", slowly)
    names = [f"suite{number}" for number in range(5)]
    threads = [
        threading.Thread(target=write_merged, args=(tmp_path / "r", ABOUT, name, RECORD)) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = json.loads((tmp_path / "r" / "results.json").read_text())
    assert sorted(content["suites"]) == names
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["results.json"]


def test_a_folder_that_another_model_has_filled_meanwhile_is_refused(tmp_path: Path) -> None:
    write_merged(tmp_path, ABOUT, "ruler", RECORD)
    with pytest.raises(ValueError, match="another model: name 'a' there, 'b' now"):
        write_merged(tmp_path, {**ABOUT, "model": {"name": "b"}}, "nolima", RECORD)


def test_the_hash_of_a_cell_stays_until_its_file_is_removed(tmp_path: Path) -> None:
    write_merged(tmp_path, ABOUT, "ruler", RECORD)
    cell = Cell(suite="ruler", task="vt", length=1024)

    def cells() -> dict[str, str]:
        return dict(json.loads((tmp_path / "results.json").read_text())["cells"])

    record_cell(tmp_path, cell, "a" * 64)
    record_cell(tmp_path, cell, "a" * 64)
    write_merged(tmp_path, ABOUT, "nolima", RECORD)
    assert cells() == {"ruler/vt/1024": "a" * 64}
    with pytest.raises(ValueError, match=r"ruler/vt/1024\.jsonl has changed since it was written"):
        record_cell(tmp_path, cell, "b" * 64)
    forget_cell(tmp_path, cell)
    assert cells() == {}
    record_cell(tmp_path, cell, "b" * 64)
    assert cells() == {"ruler/vt/1024": "b" * 64}


def test_a_folder_of_an_older_version_stays_without_hashes(tmp_path: Path) -> None:
    content = write_merged(tmp_path, ABOUT, "ruler", RECORD)
    del content["cells"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    record_cell(tmp_path, Cell(suite="ruler", task="vt", length=1024), "a" * 64)
    assert "cells" not in write_merged(tmp_path, ABOUT, "nolima", RECORD)
