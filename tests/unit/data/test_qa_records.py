"""Question-answer records of the Hub and of files, and what a row must be."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_exact.data.qa_pack import DOLLY, as_record, qa_files, qa_hub

ROW = {"instruction": " Who? ", "context": "It was Ann.\n", "response": "Ann\n", "category": "closed_qa"}


def test_edges_are_stripped_and_the_context_stands_where_it_is_told() -> None:
    record = as_record("here", ROW)
    assert (record.instruction, record.context, record.response) == ("Who?", "It was Ann.", "Ann")
    assert record.question("before") == "It was Ann.\n\nWho?"
    assert record.question("after") == "Who?\n\nIt was Ann."
    assert as_record("here", {**ROW, "context": None}).question("after") == "Who?"
    with pytest.raises(ValueError, match="here: a list is not a record"):
        as_record("here", [])


def test_compressed_files_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "Records.jsonl.gz"
    path.write_bytes(gzip.compress(f"\n{json.dumps(ROW)}\n".encode()))
    found = qa_files([path])
    assert found.name == "records"
    assert list(found.rows) == [(f"{path}:2", ROW)]
    with pytest.raises(ValueError, match=r"records are read from \.jsonl"):
        qa_files([tmp_path / "records.txt"])


@pytest.mark.parametrize("names", [["manifest.jsonl"], ["a.jsonl", "b.jsonl"]])
def test_names_that_would_be_in_the_way(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps(ROW))
    assert qa_files([tmp_path / name for name in names]).name == "records"


def fake_hub(monkeypatch: pytest.MonkeyPatch, *, reachable: bool = True) -> list[Any]:
    asked: list[Any] = []

    def load_dataset(repo: str, **named: Any) -> list[dict[str, str]]:
        asked.append((repo, named))
        return [ROW, ROW]

    def dataset_info(repo: str, revision: str | None) -> Any:
        if not reachable:
            raise RuntimeError("no network")
        return SimpleNamespace(sha=f"commit of {revision}")

    api = SimpleNamespace(dataset_info=dataset_info)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: api))
    return asked


def test_the_hub_is_pinned_to_the_commit_that_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_hub(monkeypatch)
    found = qa_hub(revision="main")
    assert asked == [(DOLLY, {"split": "train", "revision": "commit of main"})]
    assert found.name == "databricks-dolly-15k"
    assert found.hub is not None
    assert found.hub["revision"] == "commit of main"
    assert list(found.rows)[1] == (f"{DOLLY}:row 2", ROW)


def test_no_network_and_no_package_have_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, reachable=False)
    with pytest.raises(ValueError, match=r"cannot be read \(RuntimeError\): check the network"):
        qa_hub()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        qa_hub()
