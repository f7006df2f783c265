"""Hub definitions and streams: the Hub itself is not reached, `datasets` streams local files instead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_tokenizers import SENTENCES, write_sentencepiece

from megatron_exact.data.corpus_record import check_corpus, read_corpus_record
from megatron_exact.data.documents import Cursor
from megatron_exact.data.hub_sources import (
    HUB_MIXES,
    HUB_SOURCES,
    HubStream,
    describe_hub_sources,
    open_hub,
)
from megatron_exact.data.indexed import GrowingCorpus
from megatron_exact.data.tokenize import tokenize_corpus

TOOL = Path(__file__).parents[3] / "tools" / "tokenize_corpus.py"
SOURCE = HUB_SOURCES["open-web-math"]
TEXTS = [f"{number} " + "".join(SENTENCES[: number % 5 + 1]) for number in range(70)]


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "tiny.model")


@pytest.fixture(scope="module", params=["parquet", "json"])
def open_dataset(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Any]:
    """A stream over three files of a kind, a data set with columns beside the text."""
    folder = tmp_path_factory.mktemp("data")
    for number, first in enumerate((0, 30, 33)):
        texts = TEXTS[first : (30, 33, 70)[number]]
        path = folder / f"{number}.{request.param}"
        if request.param == "parquet":
            table = pa.table({"url": ["u"] * len(texts), "text": texts})
            pq.write_table(table, path, row_group_size=8)
        else:
            path.write_text("".join(json.dumps({"url": "u", "text": text}) + "\n" for text in texts))
    files = [str(path) for path in sorted(folder.iterdir())]
    return lambda: datasets.load_dataset(request.param, data_files=files, split="train", streaming=True)


def stream(open_dataset: Callable[[], Any], **options: Any) -> HubStream:
    return HubStream(SOURCE, revision="abc", open_dataset=open_dataset, **options)


def texts_after(source: HubStream, start: Cursor, part_bytes: int) -> list[tuple[list[str], Cursor]]:
    return [
        ([(content or b"").decode() for content in part.contents], cursor)
        for part, cursor in source.read(start, part_bytes)
    ]


def test_going_on_from_any_part_loses_and_repeats_nothing(open_dataset: Callable[[], Any]) -> None:
    parts = texts_after(stream(open_dataset), Cursor(), 300)
    assert [text for texts, _ in parts for text in texts] == TEXTS
    assert len(parts) > 20
    done = 0
    for texts, cursor in parts:
        done += len(texts)
        assert cursor.records == done
        cursor = Cursor(
            **json.loads(json.dumps({"records": done, "stream": cursor.stream}))
        )  # as journaled
        rest = texts_after(stream(open_dataset), cursor, 10_000)
        assert [text for texts, _ in rest for text in texts] == TEXTS[done:]


@pytest.mark.parametrize("limit", [1, 31, 69, 70, 71])
def test_the_number_of_documents_is_bounded(open_dataset: Callable[[], Any], limit: int) -> None:
    parts = texts_after(stream(open_dataset, max_documents=limit), Cursor(), 300)
    assert [text for texts, _ in parts for text in texts] == TEXTS[:limit]
    assert texts_after(stream(open_dataset, max_documents=limit), parts[-1][1], 300) == []


def test_a_stream_becomes_a_corpus_and_goes_on_after_a_stop(
    tmp_path: Path, spm: Path, open_dataset: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"batch_bytes": 500, "journal_bytes": 500, "licence": SOURCE.licence}
    tokenize_corpus(stream(open_dataset), spm, tmp_path / "whole", **options)
    real, calls = GrowingCorpus.add, iter(range(100))

    def add(*arguments: Any) -> None:
        if next(calls) == 12:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(GrowingCorpus, "add", add)
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus(stream(open_dataset), spm, tmp_path / "c", **options)
    other = HubStream(SOURCE, revision="other", open_dataset=open_dataset)
    with pytest.raises(ValueError, match=r"input 1 was .*'revision': 'abc'.*now it is .*'other'"):
        tokenize_corpus(other, spm, tmp_path / "c", **options)
    summary = tokenize_corpus(stream(open_dataset), spm, tmp_path / "c", **options)
    assert 0 < summary.resumed_documents < 70
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"c{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    check_corpus(tmp_path / "c")
    record = read_corpus_record(tmp_path / "c")
    assert record is not None
    assert (record.documents, record.raw_files, record.licence) == (70, [], SOURCE.licence)
    assert record.hub is not None
    assert (record.hub["repo"], record.hub["revision"]) == ("open-web-math/open-web-math", "abc")


def test_a_changed_layout_is_refused(tmp_path: Path, spm: Path) -> None:
    def numbers() -> Any:
        return datasets.IterableDataset.from_generator(
            lambda: iter([{"body": "x"}]), features=datasets.Features({"body": datasets.Value("string")})
        )

    with pytest.raises(ValueError, match="has no column 'text', only body"):
        tokenize_corpus(stream(numbers), spm, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_the_revision_is_pinned_to_a_commit(
    open_dataset: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Api:
        def dataset_info(self, repo: str, revision: str | None) -> Any:
            assert (repo, revision) == (SOURCE.repo, "main")
            return type("Info", (), {"sha": "0123abc"})()

    calls: list[Any] = []
    dataset = open_dataset()

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return dataset

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_hub(SOURCE, revision="main", max_documents=3)
    parts = texts_after(source, Cursor(), 10_000)
    assert [text for texts, _ in parts for text in texts] == TEXTS[:3]
    pinned = {"split": "train", "revision": "0123abc", "streaming": True}
    assert calls == [((SOURCE.repo, None), pinned)]
    assert source.hub()["revision"] == "0123abc"


def test_a_hub_out_of_reach_is_one_line(tmp_path: Path, spm: Path) -> None:
    command = [sys.executable, TOOL, "--hub", "fineweb-edu", "--tokenizer", spm, "--output-prefix", "c"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert "HuggingFaceFW/fineweb-edu at its newest revision cannot be reached" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_downloaded_files_take_field_and_licence_from_the_definition(tmp_path: Path, spm: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "0.parquet")
    command = [sys.executable, TOOL, "--hub", "slimpajama-6b", "--input", "0.parquet", "--workers", "1"]
    command += ["--revision", "abc", "--tokenizer", spm, "--output-prefix", "c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    record = read_corpus_record(tmp_path / "c")
    assert record is not None
    assert record.licence == HUB_SOURCES["slimpajama-6b"].licence
    assert [file["path"] for file in record.raw_files] == ["0.parquet"]
    assert record.hub == {
        "repo": "DKYoon/SlimPajama-6B",
        "config": None,
        "split": "train",
        "revision": "abc",
        "text_field": "text",
    }
    for more in (["--text-key", "text"], ["--max-documents", "3"]):
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_the_list_names_sources_mixes_and_packing_arguments() -> None:
    text = describe_hub_sources()
    for source in HUB_SOURCES.values():
        assert source.repo in text
    assert "--source 6:tokens/fineweb-edu 24:tokens/slimpajama-6b 32:tokens/open-web-math" in text
    assert "--source 1:tokens/fineweb-edu 3:tokens/slimpajama-6b 6:tokens/open-web-math" in text
    assert all(name in HUB_SOURCES for mix in HUB_MIXES for name in mix.weights)
    assert "--weight-unit documents" in text
    done = subprocess.run([sys.executable, TOOL, "--list-hub"], capture_output=True, text=True, check=True)
    assert done.stdout == text + "\n"
