"""Who supervises the last target of a row, and where targets lie, against a reading token by token."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import (
    PlainRow,
    heavy_tailed_lengths,
    plain_bucket,
    random_documents,
    read_rows_plainly,
    write_corpus,
)

from megatron_exact.data import targets
from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.targets import TargetLayout, TargetOrder, supervises_row_end

pytestmark = pytest.mark.filterwarnings("ignore:no source has a corpus record")
ROW_TOKENS = 24
WAYS = tuple(itertools.product(("concat", "best-fit"), (False, True)))
# Documents that end with a row, fill several, or are a token of their own; some go on after a full row
LENGTHS = [24, 48, 49, 1, 23, 100, 72, *heavy_tailed_lengths(40), 25, 24]


@pytest.fixture(scope="module", params=WAYS, ids=str)
def packed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[PlainRow]]:
    """A pack of two corpora, one of them repeated, and its rows."""
    policy, masked = request.param
    root = tmp_path_factory.mktemp("layout")
    corpora = [random_documents(LENGTHS), random_documents(heavy_tailed_lengths(15, 1), 1)]
    sources = [f"1:{write_corpus(root / name, corpus)}" for name, corpus in zip("ab", corpora, strict=True)]
    options = PackOptions(
        row_tokens=ROW_TOKENS,
        policy=policy,
        seed=3,
        validation_fraction=0.0,
        train_tokens=3000,
        allow_repeats=True,
        mask_cross_document_targets=masked,
    )
    pack_corpora(sources, root / "pack", options)
    return root / "pack", read_rows_plainly(root / "pack", "train", corpora)


@pytest.fixture(params=[3, 1 << 14])
def layout(
    packed: tuple[Path, list[PlainRow]], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> TargetLayout:
    monkeypatch.setattr(targets, "BLOCK_ROWS", request.param)
    return TargetLayout(packed[0], read_manifest(packed[0]), "train")


def test_targets_of_each_row(packed: tuple[Path, list[PlainRow]], layout: TargetLayout) -> None:
    found = np.concatenate([block.targets for block in layout.blocks()])
    assert found.tolist() == [sum(row.mask) for row in packed[1]]


def test_targets_before_each_row(packed: tuple[Path, list[PlainRow]]) -> None:
    pack, rows = packed
    order = TargetOrder(pack, read_manifest(pack), "train", seed=1)
    before = [0, *itertools.accumulate(sum(row.mask) for row in rows)]
    assert [order.targets_before(row) for row in range(len(rows) + 1)] == before


def test_targets_by_packed_position(packed: tuple[Path, list[PlainRow]], layout: TargetLayout) -> None:
    expected = [0] * (plain_bucket(ROW_TOKENS, ROW_TOKENS) + 1)
    for row in packed[1]:
        for position, mask in enumerate(row.mask):
            expected[plain_bucket(position + 1, ROW_TOKENS)] += mask
    assert layout.position_counts().tolist() == expected


def test_places_are_a_bijection_that_seed_and_row_decide(packed: tuple[Path, list[PlainRow]]) -> None:
    pack, rows = packed
    manifest = read_manifest(pack)
    order, other = (TargetOrder(pack, manifest, "train", seed=seed) for seed in (1, 2))
    places = [order.places(row) for row in range(len(rows))]
    assert [len(part) for part in places] == [sum(row.mask) for row in rows]
    together = np.concatenate(places)
    assert sorted(together.tolist()) == list(range(manifest.splits["train"].supervised_targets))
    assert together.tolist() != sorted(together.tolist())
    assert (other.places(0) != places[0]).any()
    state = pickle.dumps(order)
    copy = pickle.loads(state)  # noqa: S301
    assert (copy.places(len(rows) - 1) == places[-1]).all()
    assert len(state) < 10_000, "the manifest and names alone"


@settings(deadline=None, max_examples=15)
@given(lengths=st.lists(st.integers(1, 60), min_size=9, max_size=30), way=st.sampled_from(WAYS))
def test_any_corpus(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], way: tuple[str, bool]
) -> None:
    root = tmp_path_factory.mktemp("any")
    corpus = random_documents(lengths)
    policy, masked = way
    options = PackOptions(
        row_tokens=8, policy=policy, seed=0, validation_fraction=0.0, mask_cross_document_targets=masked
    )
    pack_corpora([write_corpus(root / "c", corpus)], root / "pack", options)
    rows = read_rows_plainly(root / "pack", "train", [corpus])
    blocks = TargetLayout(root / "pack", read_manifest(root / "pack"), "train").blocks()
    assert [n for block in blocks for n in block.targets.tolist()] == [sum(row.mask) for row in rows]


@pytest.mark.parametrize(("policy", "masked"), WAYS)
def test_a_pack_that_counts_otherwise_is_refused(tmp_path: Path, policy: str, masked: bool) -> None:
    """Negative control of the check, and what happens to a kind of pack that this code does not know."""
    prefix = write_corpus(tmp_path / "c", random_documents(LENGTHS))
    options = PackOptions(
        row_tokens=ROW_TOKENS,
        policy=policy,
        seed=3,
        validation_fraction=0.0,
        mask_cross_document_targets=masked,
    )
    pack_corpora([prefix], tmp_path / "pack", options)
    manifest = read_manifest(tmp_path / "pack")
    train = manifest.splits["train"]
    one_less = replace(train, supervised_targets=train.supervised_targets - 1)
    layout = TargetLayout(tmp_path / "pack", replace(manifest, splits={"train": one_less}), "train")
    for count in (layout.targets_before, layout.position_counts):
        with pytest.raises(ValueError, match="use --token-weighting none, or pack again"):
            count()


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("policy", ["concat", "best-fit"])
def test_who_supervises_the_last_target_of_a_row(policy: str, masked: bool, continues: bool) -> None:
    """Its own document if that goes on, else under unmasked `concat` the next row; for one row and many."""
    expected = continues or (policy, masked) == ("concat", False)
    assert supervises_row_end(policy, masked, continues) is expected
    rows = supervises_row_end(policy, masked, np.array([continues, True]))
    assert rows.tolist() == [expected, True]
