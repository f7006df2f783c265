"""What-ifs against packs that were really made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import heavy_tailed_lengths, random_documents, write_corpus

from megatron_exact.data.forecast import (
    GridCell,
    TrainDocuments,
    forecast_expected,
    forecast_grid,
    parse_mix,
    read_sources,
    why_expected,
)
from megatron_exact.data.lengths import LengthHistogram, inspect_lengths
from megatron_exact.data.manifest import Manifest
from megatron_exact.data.pack import PackOptions, pack_corpora

pytestmark = pytest.mark.filterwarnings(
    "ignore:no source has a corpus record", "ignore:the validation split has"
)

LENGTHS: dict[str, list[int]] = {
    "web": heavy_tailed_lengths(400),
    "math": heavy_tailed_lengths(150, seed=3),
    "books": [3000, 700, 64, 128, 65, 1],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "all once": {},
    "validation": {"validation_fraction": 0.1},
    "validation and masks": {"validation_fraction": 0.1, "mask_cross_document_targets": True},
    "fewer tokens": {"train_tokens": 5000},
    "repeats": {"train_tokens": 40_000, "allow_repeats": True, "validation_fraction": 0.05},
    "slice": {"corpus_slice": "2/2", "validation_fraction": 0.05},
}
MIXED: dict[str, dict[str, Any]] = {
    "scarcest": {},
    "validation": {"validation_fraction": 0.1},
    "tokens": {"train_tokens": 4000, "mask_cross_document_targets": True},
    "repeats": {"train_tokens": 60_000, "allow_repeats": True},
    "documents": {"weight_unit": "documents"},
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpora")
    for seed, (name, lengths) in enumerate(LENGTHS.items()):
        write_corpus(root / name, random_documents(lengths, seed))
    for index, part in enumerate((LENGTHS["web"][:100], LENGTHS["web"][100:])):
        write_corpus(root / "shards" / f"{index:05}", random_documents(part, 10 + index))
    return root


def make_pack(
    sources: Sequence[str], output: Path, options: PackOptions
) -> tuple[Manifest, dict[str, Any]]:
    manifest = pack_corpora(sources, output, options)
    return manifest, inspect_lengths(output, manifest, "train")[0]


def assert_equal(cell: GridCell, manifest: Manifest, lengths: dict[str, Any]) -> None:
    """Every number of the forecast is the pack's."""
    train, found = manifest.splits["train"], cell.forecast
    assert found.is_exact
    assert found.counts.tolist() == list(train.exposure.counts)
    for name in ("rows", "segments", "tokens", "padding_tokens", "left_out_tokens", "supervised_targets"):
        assert getattr(found, name) == getattr(train, name), name
    assert found.documents == sum(use.documents for use in train.sources)
    assert found.cut_documents == lengths["truncation"]["cut_documents"]
    assert found.tokens_after_cut == lengths["truncation"]["tokens_after_cut"]


@pytest.mark.parametrize("name", OPTIONS)
def test_exact_without_weights(corpora: Path, tmp_path: Path, name: str) -> None:
    texts = [str(corpora / source) for source in ("web", "books")]
    sources, mix = read_sources(texts)
    assert mix is None
    packs = [
        PackOptions(row_tokens=row_tokens, policy=policy, seed=5, **OPTIONS[name])
        for row_tokens in (48, 64, 1000)
        for policy in ("concat", "best-fit")
    ]
    cells = forecast_grid(sources, [None], packs).cells
    for index, (cell, options) in enumerate(zip(cells, packs, strict=True)):
        assert (cell.row_tokens, cell.policy, cell.mix) == (options.row_tokens, options.policy, None)
        assert_equal(cell, *make_pack(texts, tmp_path / str(index), options))


@pytest.mark.filterwarnings("ignore:.*documents are taken whole")
@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("web", ["web", "shards"])
def test_exact_mixes(corpora: Path, tmp_path: Path, name: str, web: str) -> None:
    """Two mixes of three sources, one of them a folder of shards, both policies."""
    paths = [str(corpora / source) for source in (web, "math", "books")]
    sources, _ = read_sources(paths)
    mixes = [parse_mix("6:24:32", 3), parse_mix("1:3:0.5", 3)]
    packs = [
        PackOptions(row_tokens=64, policy=policy, seed=2, **MIXED[name])
        for policy in ("concat", "best-fit")
    ]
    cells = forecast_grid(sources, mixes, packs).cells
    assert [cell.mix for cell in cells] == [mixes[0], mixes[0], mixes[1], mixes[1]]
    for index, cell in enumerate(cells):
        assert cell.mix is not None
        weighted = [f"{weight}:{path}" for weight, path in zip(cell.mix, paths, strict=True)]
        options = packs[index % 2]
        assert_equal(cell, *make_pack(weighted, tmp_path / str(index), options))
        _, weights = read_sources(weighted)
        assert weights == cell.mix


def test_another_seed_is_another_pack(corpora: Path, tmp_path: Path) -> None:
    """Negative control: the comparison above would notice."""
    sources, _ = read_sources([str(corpora / "web")])
    cells = [
        forecast_grid(sources, [None], [PackOptions(row_tokens=64, policy="concat", seed=seed)]).cells[0]
        for seed in (1, 2)
    ]
    assert cells[0].forecast.counts.tolist() != cells[1].forecast.counts.tolist()
    pack = make_pack(
        [str(corpora / "web")], tmp_path / "p", PackOptions(row_tokens=64, policy="concat", seed=1)
    )
    with pytest.raises(AssertionError):
        assert_equal(cells[1], *pack)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=40),
    row_tokens=st.integers(8, 70),
    masked=st.booleans(),
)
def test_best_fit_from_a_histogram_is_exact(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], row_tokens: int, masked: bool
) -> None:
    root = tmp_path_factory.mktemp("best-fit")
    source = write_corpus(root / "a", random_documents(lengths))
    options = PackOptions(
        row_tokens=row_tokens, policy="best-fit", seed=1, mask_cross_document_targets=masked
    )
    documents = LengthHistogram.of(np.array(lengths))
    if documents.tokens < row_tokens:
        with pytest.raises(ValueError, match="do not fill one row"):
            forecast_expected(TrainDocuments.known(documents), options)
        return
    forecast = forecast_expected(TrainDocuments.known(documents), options)
    cell = GridCell(row_tokens=row_tokens, policy="best-fit", mix=None, forecast=forecast)
    assert_equal(cell, *make_pack([source], root / "pack", options))


@pytest.mark.parametrize("policy", ["concat", "best-fit"])
def test_too_few_tokens_for_a_row(corpora: Path, policy: str) -> None:
    sources, _ = read_sources([str(corpora / "books")])
    options = PackOptions(row_tokens=10_000, policy=policy, seed=0)
    for expected in (False, True):
        with pytest.raises(ValueError, match="do not fill one row of 10,000"):
            forecast_grid(sources, [None], [options], expected=expected)


@pytest.mark.parametrize("expected", [False, True])
def test_rows_that_are_too_long_are_left_out(corpora: Path, expected: bool) -> None:
    sources, _ = read_sources([str(corpora / "books")])  # 3,958 tokens
    packs = [
        PackOptions(row_tokens=row_tokens, policy=policy, seed=0)
        for row_tokens in (10_000, 64, 1000)
        for policy in ("concat", "best-fit")
    ]
    counted: list[int] = []
    grid = forecast_grid(sources, [None], packs, expected=expected, on_cell=counted.append)
    assert [(cell.row_tokens, cell.policy) for cell in grid.cells] == [
        (64, "concat"), (64, "best-fit"), (1000, "concat"), (1000, "best-fit"),
    ]  # fmt: skip
    assert [(cell.row_tokens, cell.policy, cell.mix) for cell in grid.skipped] == [
        (10_000, "concat", None), (10_000, "best-fit", None),
    ]  # fmt: skip
    assert all("3,958 train tokens do not fill one row of 10,000" in cell.reason for cell in grid.skipped)
    assert sum(counted) == len(packs)
    alone = forecast_grid(sources, [None], packs[2:], expected=expected)
    assert [cell.as_json() for cell in grid.cells] == [cell.as_json() for cell in alone.cells]


@pytest.mark.parametrize("name", ["validation and masks", "fewer tokens"])
def test_an_index_alone_is_exact(corpora: Path, tmp_path: Path, name: str) -> None:
    """The split's key is made from the index: without the `.bin` every number is the real pack's, too."""
    for corpus in ("web", "books"):
        (tmp_path / f"{corpus}.idx").write_bytes((corpora / f"{corpus}.idx").read_bytes())
    texts = [str(corpora / "web"), str(corpora / "books")]
    packs = [
        PackOptions(row_tokens=64, policy=policy, seed=5, **OPTIONS[name])
        for policy in ("concat", "best-fit")
    ]
    real = [make_pack(texts, tmp_path / options.policy, options) for options in packs]
    for named in (["web.idx", "books.idx"], ["web.idx", texts[1]], [texts[0], "books.idx"]):
        sources, _ = read_sources([str(tmp_path / one) for one in named])
        for cell, pack in zip(forecast_grid(sources, [None], packs).cells, real, strict=True):
            assert_equal(cell, *pack)


def test_why_a_grid_is_an_expectation(corpora: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([500]))
    named = [str(corpora / "web.idx"), str(tmp_path / "a.npy")]
    assert why_expected(read_sources(named[:1])[0], False) is None
    assert "--expected" in (why_expected(read_sources(named[:1])[0], True) or "")
    why = why_expected(read_sources(named)[0], False) or ""
    assert "a.npy: lengths without" in why
    assert "its .idx alone" in why


@pytest.mark.parametrize("expected", [False, True])
def test_an_index_beside_its_corpus(corpora: Path, expected: bool) -> None:
    options = PackOptions(row_tokens=64, policy="concat", seed=0)
    for named in (["web", "web.idx"], ["shards", "shards/00000"], ["shards/00000.idx", "shards"]):
        sources, _ = read_sources([str(corpora / one) for one in named])
        with pytest.raises(ValueError, match="is the same file as"):
            forecast_grid(sources, [None], [options], expected=expected)


def test_a_unit_of_weights_needs_weights(corpora: Path) -> None:
    sources, _ = read_sources([str(corpora / "web"), str(corpora / "math")])
    options = PackOptions(row_tokens=64, policy="concat", seed=0, weight_unit="documents")
    with pytest.raises(ValueError, match="--weight-unit documents needs weights"):
        forecast_grid(sources, [None], [options])
    assert forecast_grid(sources, [(1.0, 2.0)], [options]).cells


@pytest.mark.parametrize(
    ("sample_of", "names", "message"),
    [
        ([10], ["a.csv"], "needs a sample"),
        ([10, 20], ["a.npy", "a.csv"], "2 numbers for 1 samples"),
        ([1, 2, 3], ["a.npy", "b.npy"], "3 numbers for 2 samples"),
    ],
)
def test_bad_sample_sizes(tmp_path: Path, sample_of: list[int], names: list[str], message: str) -> None:
    np.save(tmp_path / "a.npy", np.array([5]))
    np.save(tmp_path / "b.npy", np.array([5]))
    (tmp_path / "a.csv").write_text("5,1\n")
    with pytest.raises(ValueError, match=message):
        read_sources([str(tmp_path / name) for name in names], sample_of)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1:2", "has 2 weights for 3 sources"),
        ("1:x:2", "not a list of numbers"),
        ("1:0:2", "above 0"),
        ("1:-1:2", "above 0"),
        ("1:nan:2", "above 0"),
        ("1:inf:2", "above 0"),
        ("", "not a list of numbers"),
    ],
)
def test_bad_mixes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mix(text, 3)


def test_a_corpus_with_empty_documents(tmp_path: Path) -> None:
    """They are left out, as in packing; from an index alone too."""
    full = [[1, 2, 3] * 50, [5] * 90, [4]]
    write_corpus(tmp_path / "full", full)
    write_corpus(tmp_path / "holes", [[], full[0], [], *full[1:], []])
    options = PackOptions(row_tokens=64, policy="best-fit", seed=0)
    for expected in (False, True):
        cells = []
        for name in ("full", "holes", "holes.idx"):
            sources, _ = read_sources([str(tmp_path / name)])
            (cell,) = forecast_grid(sources, [None], [options], expected=expected).cells
            cells.append(cell.as_json())
        assert cells[0] == cells[1] == cells[2]
