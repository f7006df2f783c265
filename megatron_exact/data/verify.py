"""Prove a pack from its sources: `pack_corpus.py --verify DIR`.

Three independent looks at the same arrays: their hashes, the plan made again from the options (which
proves seed and order), and an account of every token of every source that uses neither. Memory: what
packing takes, and two bytes a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_exact.command_line import describe, progress_bar
from megatron_exact.data.answers import supervise_answers
from megatron_exact.data.manifest import Manifest, read_manifest, verify_split_arrays
from megatron_exact.data.pack import PackOptions, PlannedSplit, plan_splits
from megatron_exact.data.pack_writer import block_arrays
from megatron_exact.data.plan_measure import PlanMeasure
from megatron_exact.data.rows import open_arrays
from megatron_exact.data.shards import Corpus
from megatron_exact.data.sources import count_empty, load_pool
from megatron_exact.data.verify_sources import compare, look_at_source, look_for_repeats
from megatron_exact.data.verify_tokenizer import look_at_tokenizer
from megatron_exact.data.verify_tokens import (
    SplitAccount,
    account_for_split,
    account_for_tokens,
    disjoint_splits,
)

Arrays = dict[str, NDArray[np.integer]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    """What."""
    passed: bool
    """Whether it holds."""
    detail: str
    """What was found, or the mismatch."""


def verify_pack(pack_dir: str | Path, *, source_root: str | Path | None = None) -> Iterator[Check]:
    """Check everything about a pack, one `Check` at a time.

    A check that others build on (the manifest, the arrays, opening the sources) ends the list when it
    fails. Reads every byte of the pack and of its sources.

    Args:
        pack_dir: a packed dataset.
        source_root: where the corpora lie now, if not where the manifest says.
    """
    pack_dir = Path(pack_dir)
    found: list[Manifest] = []

    def look_at_manifest() -> str:
        found.append(read_manifest(pack_dir))
        return f"fingerprint {found[0].fingerprint}"

    yield _check("manifest", look_at_manifest)
    if not found:
        return
    manifest = found[0]
    checks = [
        _check(f"arrays of {name}", _array_hashes(pack_dir, manifest, name)) for name in manifest.splits
    ]
    yield from checks
    corpora: list[Corpus] = []
    for index, source in enumerate(manifest.sources):

        def look(index: int = index) -> str:
            return look_at_source(pack_dir, manifest, index, source_root, corpora)

        check = _check(f"source {source.prefix}", look)
        checks.append(check)
        yield check
    if len(corpora) == len(manifest.sources):
        yield _check("sources", lambda: look_for_repeats(manifest, corpora))
    yield _check("tokenizer", lambda: look_at_tokenizer(pack_dir, manifest, corpora))
    if all(check.passed for check in checks):
        yield from _look_at_plan(pack_dir, manifest, corpora)


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name=name, passed=True, detail=look())
    except (ValueError, OSError) as error:
        return Check(name=name, passed=False, detail=describe(error))


def _array_hashes(pack_dir: Path, manifest: Manifest, name: str) -> Callable[[], str]:
    def look() -> str:
        size = verify_split_arrays(pack_dir, name, manifest.splits[name])
        open_arrays(pack_dir / name, manifest.splits[name])
        count = len(manifest.splits[name].arrays)
        return f"{count} files, {size:,} bytes, every sha256 as in the manifest"

    return look


def _look_at_plan(pack_dir: Path, manifest: Manifest, corpora: list[Corpus]) -> Iterator[Check]:
    arrays = {name: open_arrays(pack_dir / name, split) for name, split in manifest.splits.items()}
    names = [source.prefix for source in manifest.sources]
    try:
        pool, supervision = supervise_answers(load_pool(corpora), corpora)
        compare("what is supervised", supervision, manifest.supervision)
        for index, source in enumerate(manifest.sources):
            empty = count_empty(pool, index)
            compare(f"the number of empty documents of {source.prefix}", empty, source.empty_documents)
        for planned in plan_splits(pool, manifest.sources, PackOptions.of(manifest), names=names):
            yield _check(f"plan of {planned.name}", _same_plan(manifest, arrays[planned.name], planned))
    except ValueError as error:
        yield Check(name="plan", passed=False, detail=describe(error))
        return
    accounts: dict[str, SplitAccount] = {}

    def look_at_tokens() -> str:
        for name, split in manifest.splits.items():
            accounts[name] = account_for_split(arrays[name], split, pool)
        return account_for_tokens(manifest, accounts, pool)

    yield _check("tokens", look_at_tokens)
    if len(accounts) == len(manifest.splits):
        yield _check("splits", lambda: disjoint_splits(accounts))


def _same_plan(manifest: Manifest, arrays: Arrays, planned: PlannedSplit) -> Callable[[], str]:
    """Compare the arrays, block by block, with the plan made again."""

    def look() -> str:
        split = manifest.splits[planned.name]
        first_target = planned.plan.pool.first_target
        measure = PlanMeasure(row_tokens=manifest.row_tokens, first_target=first_target)
        with progress_bar(f"planning {planned.name}", planned.plan.rows, " rows") as bar:
            for block in planned.plan.blocks():
                for name, expected in block_arrays(block, planned.plan.pool, measure.segments).items():
                    first = measure.rows + 1 if name == "row_offsets" else measure.segments
                    if not np.array_equal(arrays[name][first : first + expected.size], expected):
                        raise ValueError(f"{name} differs from what these sources and options give")
                measure.add(block)
                bar.update(measure.rows - bar.n)
        again = asdict(planned.describe(PackOptions.of(manifest), measure, split.arrays))
        for field, value in asdict(split).items():
            compare(field, again[field], value)
        return (
            f"{split.rows:,} rows and their {split.supervised_targets:,} supervised targets "
            "are what these sources and options give"
        )

    return look
