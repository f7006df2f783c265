"""Lengths and cuts of a pack from its arrays, against loops over its segments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpora import heavy_tailed_lengths, random_documents, write_corpus

from megatron_exact.data import lengths as lengths_module
from megatron_exact.data.lengths import inspect_lengths
from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora

pytestmark = pytest.mark.filterwarnings("ignore:no source has a corpus record")
REGIMES: dict[str, list[int]] = {
    "heavy tailed": heavy_tailed_lengths(300),
    "all equal": [64] * 30,
    "all equal, not dividing a row": [50] * 30,
    "longer than a row": [65, 200, 64 * 5, 64 * 3 + 1] * 4,
    "one token each": [1] * 200,
    "one huge among tiny": [2] * 100 + [3000] + [1] * 100,
}


def plain(pack: Path, split: str, lengths: list[list[int]]) -> dict[str, Any]:
    """Everything by loops, from the arrays and the documents' true lengths."""
    manifest = json.loads((pack / "manifest.json").read_text())
    names = ("row_offsets", "segment_source", "segment_document", "segment_start", "segment_tokens")
    arrays = {name: np.load(pack / split / f"{name}.npy").tolist() for name in names}
    offsets = arrays.pop("row_offsets")
    documents, cut, inside, after_cut = [], 0, 0, 0
    for place, (source, document, start, tokens) in enumerate(zip(*arrays.values(), strict=True)):
        whole = lengths[source][document]
        if start == 0:
            documents.append(whole)
            cut += tokens < whole
        else:
            after_cut += tokens
            inside += place in offsets[:-1]
    rows = len(offsets) - 1
    inputs = sum(arrays["segment_tokens"])
    return {
        "documents": sorted(documents),
        "segments": sorted(arrays["segment_tokens"]),
        "cut_documents": cut,
        "rows_inside_document": inside,
        "tokens_after_cut": after_cut,
        "padding": rows * manifest["row_tokens"] - inputs,
        "rows": rows,
    }


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("policy", ["concat", "best-fit"])
@pytest.mark.parametrize("chunk", [5, 1 << 20])
def test_against_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regime: str, policy: str, chunk: int
) -> None:
    monkeypatch.setattr(lengths_module, "CHUNK_SEGMENTS", chunk)
    lengths = [REGIMES[regime], [7, 100, 3]]
    sources = [
        write_corpus(tmp_path / name, random_documents(mine))
        for name, mine in zip("ab", lengths, strict=True)
    ]
    options = PackOptions(row_tokens=64, policy=policy, seed=1)
    manifest = pack_corpora(sources, tmp_path / "pack", options)
    found, note = inspect_lengths(tmp_path / "pack", manifest, "train")
    assert note is None
    expected = plain(tmp_path / "pack", "train", lengths)
    for kind in ("documents", "segments"):
        assert found[kind]["documents"] == len(expected[kind])
        assert found[kind]["tokens"] == sum(expected[kind])
        assert found[kind]["quantiles"]["max"] == expected[kind][-1]
        middle = expected[kind][(len(expected[kind]) + 1) // 2 - 1]
        assert found[kind]["quantiles"]["p50"] == middle
    cut = found["truncation"]
    chosen = sum(use.documents for use in manifest.splits["train"].sources)
    assert chosen == sum(map(len, lengths))
    for name in ("cut_documents", "rows_inside_document", "tokens_after_cut"):
        assert cut[name] == expected[name], name
    assert cut["rows_inside_document_share"] == expected["rows_inside_document"] / expected["rows"]
    assert cut["cut_documents_share"] == expected["cut_documents"] / chosen
    assert found["padding"]["tokens"] == expected["padding"]
    assert found["left_out_tokens"] == manifest.splits["train"].left_out_tokens


def test_repeated_documents_count_each_time(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "a", random_documents([100, 10, 30]))
    options = PackOptions(row_tokens=64, policy="concat", seed=1, train_tokens=1400, allow_repeats=True)
    manifest = pack_corpora([source], tmp_path / "pack", options)
    found, _ = inspect_lengths(tmp_path / "pack", manifest, "train")
    expected = plain(tmp_path / "pack", "train", [[100, 10, 30]])
    assert found["documents"]["documents"] == len(expected["documents"]) > 25
    assert found["truncation"]["cut_documents"] == expected["cut_documents"]


def test_an_empty_split(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "a", random_documents([100, 10, 30]))
    manifest = pack_corpora(
        [source], tmp_path / "pack", PackOptions(row_tokens=64, policy="concat", seed=1)
    )
    found, note = inspect_lengths(tmp_path / "pack", manifest, "validation")
    assert note is None
    assert found["documents"]["documents"] == found["segments"]["documents"] == 0
    assert found["truncation"]["cut_documents_share"] == 0
    assert found["padding"]["share"] == 0


@pytest.mark.parametrize("damage", ["moved", "another"])
def test_without_its_corpus_a_pack_shows_segments_only(tmp_path: Path, damage: str) -> None:
    source = write_corpus(tmp_path / "a", random_documents([100, 10, 30]))
    pack_corpora([source], tmp_path / "pack", PackOptions(row_tokens=64, policy="concat", seed=1))
    if damage == "moved":
        (tmp_path / "there").mkdir()
        for suffix in (".bin", ".idx"):
            (tmp_path / f"a{suffix}").rename(tmp_path / "there" / f"a{suffix}")
    else:
        write_corpus(tmp_path / "a", random_documents([100, 10, 31]))
    manifest = read_manifest(tmp_path / "pack")
    found, note = inspect_lengths(tmp_path / "pack", manifest, "train")
    assert found["documents"] is None
    assert note is not None
    assert "whole documents" in note
    assert found["segments"]["documents"] == manifest.splits["train"].segments
    if damage == "moved":
        again, note = inspect_lengths(tmp_path / "pack", manifest, "train", source_root=tmp_path / "there")
        assert note is None
        assert again["documents"]["documents"] == 3


def test_a_source_of_shards(tmp_path: Path) -> None:
    lengths = [30, 80, 5, 200, 64]
    for index, mine in enumerate((lengths[:2], lengths[2:])):
        write_corpus(tmp_path / "shards" / f"{index:05}", random_documents(mine))
    options = PackOptions(row_tokens=64, policy="best-fit", seed=1)
    manifest = pack_corpora([str(tmp_path / "shards")], tmp_path / "pack", options)
    found, note = inspect_lengths(tmp_path / "pack", manifest, "train")
    assert note is None
    assert found["documents"]["tokens"] == sum(lengths)
    assert found["truncation"]["cut_documents"] == 2
