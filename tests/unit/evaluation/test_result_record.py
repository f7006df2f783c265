"""results.json, when several calls write it at once."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.evaluation import result_record
from megatron_exact.evaluation.result_record import write_merged

ABOUT: dict[str, Any] = {
    "model": {"name": "a"},
    "backend": {"name": "hf", "dtype": "float32", "calls": [{"device": "cpu"}]},
}
RECORD: dict[str, Any] = {"options": {}, "template": None, "sources": {}}


def test_no_writer_loses_what_another_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = result_record.write_json

    def slowly(path: Path, value: Any) -> None:
        time.sleep(0.05)  # everybody has read by now, unless they wait for each other
        write(path, value)

    monkeypatch.setattr(result_record, "write_json", slowly)
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
