"""Which documents the stages of a chain read: how much of every source, how often, and with what context.

The ledger uses the packs' arrays and the corpora's `.idx` alone, without reading tokens. A stage counts as
one pass over its pack. A stage *reads* a document as often as the document's first token is an input there;
only the last document of a `concat` stream may be read in part. Documents are grouped by the stages that
read them, and the targets of a group are those of its documents: the first token of a document, which is
predicted from the document before it with context 0, is a target of the document that it begins. So the
targets of all groups of all sources sum to those that the manifest counts.

Memory: one to four bytes for each document and stage, and the lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.lengths import read_index_lengths
from megatron_exact.data.manifest import FIRST_TARGET, Manifest, Source, read_manifest
from megatron_exact.data.pack_arrays import open_arrays
from megatron_exact.data.targets import supervises_row_end
from megatron_exact.exposure import bucket_lower_bounds, counts_from_histogram
from megatron_exact.files import sha256_file

MAX_STAGES = 16  # groups are sets of stages
BLOCK_ROWS = 1 << 14
Arrays = dict[str, NDArray[np.integer]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pack of the chain."""

    pack: Path
    """Folder of the pack."""
    manifest: Manifest
    """Manifest of the pack."""
    source_root: str | Path | None
    """Where the corpora lie now, if not where the manifest says."""

    def source_index(self, idx_sha256: str) -> int | None:
        """Return which of its sources has this index; None if none has."""
        found = [index for index, s in enumerate(self.manifest.sources) if s.idx_sha256 == idx_sha256]
        return found[0] if found else None

    def arrays(self, split: str) -> Arrays:
        """Map the arrays of one split."""
        return open_arrays(self.pack / split, self.manifest.splits[split])


@dataclass(kw_only=True)
class LedgerSource:
    """One source, and how often each stage reads each of its documents."""

    source: Source
    """The source as the first pack that has it describes it."""
    lengths: NDArray[np.integer]
    """[documents], tokens of each."""
    reads: list[NDArray[np.uint32]] = field(default_factory=list)
    """[documents] for each stage, how often it reads each document."""
    held_out: list[NDArray[np.bool_]] = field(default_factory=list)
    """[documents] for each stage, whether it evaluates on the document."""
    cut: list[tuple[int, int] | None] = field(default_factory=list)
    """For each stage, the document that the end of its stream cuts, and its tokens before that end."""

    @property
    def patterns(self) -> NDArray[np.uint32]:
        """[documents], bit n: whether stage n reads it."""
        found = np.zeros(self.lengths.size, dtype=np.uint32)
        for number, reads in enumerate(self.reads):
            found |= (reads > 0).astype(np.uint32) << np.uint32(number)
        return found

    def distinct_tokens(self, stage: int) -> int:
        """Return the tokens that a stage reads at least once."""
        tokens = int(self.lengths.sum(dtype=np.int64, where=self.reads[stage] > 0))
        cut = self.cut[stage]
        if cut is not None and self.reads[stage][cut[0]] == 1:
            tokens -= int(self.lengths[cut[0]]) - cut[1]
        return tokens


def make_ledger(packs: Sequence[str | Path], *, source_root: str | Path | None = None) -> dict[str, Any]:
    """Return the ledger of a chain of packs in plain values.

    Args:
        packs: in the order of the stages.
        source_root: where the corpora lie now, if not where the manifests say.

    Returns:
        `stages`: of each `pack`, `row_tokens`, `policy`, `corpus_slice`, `fingerprint`, and `lower` and
        `counts` of its exposure. `sources`: of each `prefix`, `idx_sha256`, `documents`, `tokens`,
        `empty_documents`, and

        * `stages`, of each: `documents`, `documents_share`, `tokens` and `tokens_share` read at least once,
          `inputs` (repeats counted), `held_out_documents`, and `times`;
        * `times`: `reads`, `documents` and `tokens` of those read 0, 1, 2, ... times along the chain;
        * `overlap`: `documents` and `tokens` that stage i and stage j read;
        * `evaluated_and_trained`: documents that stage i evaluates on and stage j trains on;
        * `groups`: `stages` that read them, `documents`, `tokens`, and `targets` of each stage, per bucket
          of its `lower`.

    Raises:
        ValueError, FileNotFoundError: a pack or an index that is missing, damaged or another one.
    """
    if not 1 <= len(packs) <= MAX_STAGES:
        raise ValueError(f"{len(packs)} packs: a ledger has 1 to {MAX_STAGES} stages")
    stages = [
        Stage(pack=Path(pack), manifest=read_manifest(pack), source_root=source_root) for pack in packs
    ]
    # Each index once, in the order of the packs
    indices = dict.fromkeys(s.idx_sha256 for stage in stages for s in stage.manifest.sources)
    sources = [_read_source(stages, idx_sha256) for idx_sha256 in indices]
    inputs = [_count_reads(stage, sources) for stage in stages]
    targets = [_count_targets(stage, sources) for stage in stages]
    return {
        "stages": [_describe_stage(stage) for stage in stages],
        "sources": [
            _describe_source(one, [of_stage[number] for of_stage in inputs], targets, number)
            for number, one in enumerate(sources)
        ],
    }


def _read_source(stages: Sequence[Stage], idx_sha256: str) -> LedgerSource:
    """Make the entry of a source with the lengths of its documents and no reads."""
    stage = next(stage for stage in stages if stage.source_index(idx_sha256) is not None)
    index = stage.source_index(idx_sha256)
    assert index is not None
    source = stage.manifest.sources[index]
    prefix = stage.manifest.source_prefix(index, stage.pack, stage.source_root)
    pieces = []
    for part in source.parts:
        pair = prefix / part.name if source.shards else prefix
        path = pair.with_name(pair.name + ".idx")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: the lengths of its documents are needed; name the folder of the "
                "corpora with --source-root"
            )
        if sha256_file(path) != part.idx_sha256:
            raise ValueError(f"{path} is not the index that was packed in {stage.pack}: restore it")
        pieces.append(read_index_lengths(path))
    lengths = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return LedgerSource(source=source, lengths=lengths)


def _count_reads(stage: Stage, sources: Sequence[LedgerSource]) -> list[int]:
    """Add a stage to every source; return the inputs that it takes from each, repeats counted."""
    found, held = (_openings(stage, split, sources) for split in ("train", "validation"))
    place = stage.manifest.splits["train"].next_token
    inputs = []
    for number, one in enumerate(sources):
        one.reads.append(found[number][0])
        one.held_out.append(held[number][0] > 0)
        is_mine = place is not None and stage.source_index(one.source.idx_sha256) == place.source
        one.cut.append((place.document, place.start) if place and is_mine and place.start else None)
        inputs.append(found[number][1])
    return inputs


def _openings(
    stage: Stage, split: str, sources: Sequence[LedgerSource]
) -> list[tuple[NDArray[np.uint32], int]]:
    """Count, by source, how often each document begins in a split, uint32 [documents], and its inputs."""
    reads = [np.zeros(one.lengths.size, dtype=np.uint32) for one in sources]
    inputs = [0] * len(sources)
    numbers = _numbers(stage, sources)
    arrays = stage.arrays(split)
    size = stage.manifest.splits[split].segments
    for first in range(0, size, BLOCK_ROWS * 16):
        part = slice(first, min(first + BLOCK_ROWS * 16, size))
        source = numbers[arrays["segment_source"][part]]
        document, start = arrays["segment_document"][part], arrays["segment_start"][part]
        tokens = arrays["segment_tokens"][part].astype(np.int64)
        for number in np.unique(source).tolist():
            mine = source == number
            inputs[number] += int(tokens[mine].sum())
            np.add.at(reads[number], _known(stage, document[mine & (start == 0)], reads[number].size), 1)
    return list(zip(reads, inputs, strict=True))


def _numbers(stage: Stage, sources: Sequence[LedgerSource]) -> NDArray[np.int64]:
    """Return for each source of the pack its number in the ledger."""
    order = {one.source.idx_sha256: number for number, one in enumerate(sources)}
    return np.array([order[source.idx_sha256] for source in stage.manifest.sources])


def _known(stage: Stage, documents: NDArray[np.integer], limit: int) -> NDArray[np.integer]:
    if documents.size and not (documents.min() >= 0 and documents.max() < limit):
        raise ValueError(f"{stage.pack} names a document that does not exist: copy the pack again")
    return documents


def _count_targets(
    stage: Stage, sources: Sequence[LedgerSource]
) -> dict[tuple[int, int], NDArray[np.int64]]:
    """Count targets of one stage per bucket, int64 [buckets], by (source, set of stages)."""
    size = stage.manifest.row_tokens + 1
    groups: dict[tuple[int, int], _Histograms] = {}
    patterns = [one.patterns for one in sources]
    for block in _segment_blocks(stage, sources):
        pattern = np.empty(block.source.size, dtype=np.int64)
        for number in np.unique(block.source).tolist():
            mine = block.source == number
            pattern[mine] = patterns[number][block.document[mine]]
        keys = block.source << MAX_STAGES | pattern
        for key in np.unique(keys).tolist():
            histograms = groups.setdefault(
                (key >> MAX_STAGES, key & ((1 << MAX_STAGES) - 1)), _Histograms(size)
            )
            histograms.add(block, keys == key)
    return {key: histograms.counts() for key, histograms in groups.items()}


@dataclass(frozen=True, kw_only=True)
class _SegmentBlock:
    """Segments of consecutive rows, and the document that begins behind the last row if it is a target."""

    source: NDArray[np.int64]
    """[segments], number of the source in the ledger."""
    document: NDArray[np.int64]
    """[segments], document inside its source."""
    tokens: NDArray[np.int64]
    """[segments], tokens; 0 for the document that begins behind the last row."""
    continuing: NDArray[np.bool_]
    """[segments], whether it ends its row and its document continues."""
    is_predicted: NDArray[np.bool_]
    """[segments], whether its first token is a target of context 0."""
    first_target: NDArray[np.int64] | None
    """[segments], first supervised token; None where every token is supervised."""


class _Histograms:
    """Segment lengths of one group."""

    def __init__(self, size: int) -> None:
        self._lengths, self._continuing, self._prompts = np.zeros((3, size), dtype=np.int64)
        self._predicted = 0

    def add(self, block: _SegmentBlock, mine: NDArray[np.bool_]) -> None:
        size = self._lengths.size
        self._lengths += np.bincount(block.tokens[mine], minlength=size)
        self._continuing += np.bincount(block.tokens[mine & block.continuing], minlength=size)
        self._predicted += int(np.count_nonzero(mine & block.is_predicted))
        if block.first_target is not None:
            self._prompts += np.bincount(block.first_target[mine], minlength=size)

    def counts(self) -> NDArray[np.int64]:
        """int64 [buckets]."""
        self._lengths[0] = 0
        counts = counts_from_histogram(
            self._lengths, continuing=self._continuing, boundary_targets=self._predicted
        )
        return counts - counts_from_histogram(self._prompts)


def _segment_blocks(stage: Stage, sources: Sequence[LedgerSource]) -> Iterator[_SegmentBlock]:
    """Yield all segments of the train split.

    A row's first segment is predicted by the previous row where that row ends a document and its last
    target is supervised. What the last row predicts lies behind the arrays.
    """
    manifest, split = stage.manifest, stage.manifest.splits["train"]
    arrays, numbers = stage.arrays("train"), _numbers(stage, sources)
    predicts_next_row = supervises_row_end(
        manifest.policy, manifest.mask_cross_document_targets, continues=False
    )
    for first in range(0, split.rows, BLOCK_ROWS):
        stop = min(first + BLOCK_ROWS, split.rows)
        offsets = arrays["row_offsets"][first : stop + 1].astype(np.int64)
        part = slice(int(offsets[0]), int(offsets[-1]))
        source = numbers[arrays["segment_source"][part]]
        document, start, tokens = (
            arrays[f"segment_{name}"][part].astype(np.int64) for name in ("document", "start", "tokens")
        )
        lengths = np.empty(source.size, dtype=np.int64)
        for number in np.unique(source).tolist():
            mine = source == number
            of_source = sources[number].lengths
            lengths[mine] = of_source[_known(stage, document[mine], of_source.size)]
        ends_row = np.zeros(source.size, dtype=np.bool_)
        ends_row[offsets[1:] - offsets[0] - 1] = True
        begins_row = np.zeros(source.size, dtype=np.bool_)
        begins_row[offsets[:-1] - offsets[0]] = True
        is_predicted = ~begins_row & (not manifest.mask_cross_document_targets)
        if predicts_next_row:
            is_predicted |= begins_row & (start == 0)
            is_predicted[0] &= first > 0
        yield _SegmentBlock(
            source=source,
            document=document,
            tokens=tokens,
            continuing=ends_row & (start + tokens < lengths),
            is_predicted=is_predicted,
            first_target=arrays[FIRST_TARGET][part].astype(np.int64) if FIRST_TARGET in arrays else None,
        )
    place = split.next_token
    if predicts_next_row and place is not None and place.start == 0:
        yield _SegmentBlock(
            source=numbers[[place.source]],
            document=np.array([place.document]),
            tokens=np.zeros(1, dtype=np.int64),
            continuing=np.zeros(1, dtype=np.bool_),
            is_predicted=np.ones(1, dtype=np.bool_),
            first_target=None,
        )


def _describe_stage(stage: Stage) -> dict[str, Any]:
    manifest = stage.manifest
    return {
        "pack": str(stage.pack),
        "row_tokens": manifest.row_tokens,
        "policy": manifest.policy,
        "corpus_slice": manifest.corpus_slice,
        "fingerprint": manifest.fingerprint,
        "lower": bucket_lower_bounds(manifest.row_tokens).tolist(),
        "counts": list(manifest.splits["train"].exposure.counts),
    }


def _describe_source(
    one: LedgerSource,
    inputs: Sequence[int],
    targets: Sequence[dict[tuple[int, int], NDArray[np.int64]]],
    number: int,
) -> dict[str, Any]:
    has_tokens = one.lengths > 0
    documents, tokens = int(np.count_nonzero(has_tokens)), int(one.lengths.sum(dtype=np.int64))
    stages = []
    for stage, reads in enumerate(one.reads):
        read, distinct = int(np.count_nonzero(reads)), one.distinct_tokens(stage)
        stages.append(
            {
                "documents": read,
                "documents_share": read / documents,
                "tokens": distinct,
                "tokens_share": distinct / tokens,
                "inputs": inputs[stage],
                "held_out_documents": int(np.count_nonzero(one.held_out[stage])),
                "times": _times(reads, one.lengths),
            }
        )
    in_all = np.sum(one.reads, axis=0, dtype=np.uint32)
    return {
        "prefix": one.source.prefix,
        "idx_sha256": one.source.idx_sha256,
        "documents": documents,
        "tokens": tokens,
        "empty_documents": one.lengths.size - documents,
        "stages": stages,
        "times": _times(in_all, one.lengths),
        "overlap": {
            "documents": _pairs(one.reads, one.reads, has_tokens),
            "tokens": _pairs(one.reads, one.reads, one.lengths),
        },
        "evaluated_and_trained": _pairs(one.held_out, one.reads, has_tokens),
        "groups": _groups(one, targets, number),
    }


def _times(reads: NDArray[np.uint32], lengths: NDArray[np.integer]) -> list[dict[str, int]]:
    """Count nonempty documents, and their tokens, by how often they are read, from 0 upwards."""
    has_tokens = lengths > 0
    found = []
    for times in np.unique(np.append(reads[has_tokens], 0)).tolist():
        mine = has_tokens & (reads == times)
        count, tokens = int(np.count_nonzero(mine)), int(lengths.sum(dtype=np.int64, where=mine))
        found.append({"reads": times, "documents": count, "tokens": tokens})
    return found


def _pairs(
    rows: Sequence[NDArray[Any]], columns: Sequence[NDArray[Any]], amounts: NDArray[Any]
) -> list[list[int]]:
    """Sum `amounts` [documents] over documents that are in stage i of `rows` and j of `columns`."""
    return [
        [int(amounts.sum(dtype=np.int64, where=(row > 0) & (column > 0))) for column in columns]
        for row in rows
    ]


def _groups(
    one: LedgerSource, targets: Sequence[dict[tuple[int, int], NDArray[np.int64]]], number: int
) -> list[dict[str, Any]]:
    patterns, has_tokens = one.patterns, one.lengths > 0
    known = {pattern for of_stage in targets for source, pattern in of_stage if source == number}
    found = []
    for pattern in sorted(known | set(np.unique(patterns[has_tokens]).tolist())):
        mine = has_tokens & (patterns == pattern)
        found.append(
            {
                "stages": [stage for stage in range(len(targets)) if pattern >> stage & 1],
                "documents": int(np.count_nonzero(mine)),
                "tokens": int(one.lengths.sum(dtype=np.int64, where=mine)),
                "targets": [
                    of_stage[number, pattern].tolist() if (number, pattern) in of_stage else None
                    for of_stage in targets
                ],
            }
        )
    return found
