"""Where the supervised targets of a split lie: how many stand before each row, how many at each position.

Both follow from the plan's arrays, read once in blocks of rows; no token is read. Of the corpora only the
lengths of those documents are needed that fill a row to its end under `best-fit`, for whether they go on.
`concat` without masked targets has a target at every input, so nothing is read at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.manifest import Manifest
from megatron_exact.data.rows import open_arrays
from megatron_exact.data.shards import Corpus
from megatron_exact.exposure import bucket_index, bucket_lower_bounds

BLOCK_ROWS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class RowBlock:
    """Consecutive rows of a plan."""

    filled: NDArray[np.int64]
    """[rows], inputs that are tokens of documents, at least 1."""
    has_last: NDArray[np.bool_]
    """[rows], whether the target of the last of these inputs is supervised."""
    masked: NDArray[np.int64]
    """[rows], inner segments whose last target is masked."""
    masked_positions: NDArray[np.int64]
    """[masked targets of all rows], where in their row they stand."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """[rows], supervised targets of each."""
        return self.filled - 1 + self.has_last - self.masked


class TargetLayout:
    """The supervised targets of one split, counted from its plan.

    Args:
        pack_dir: a packed dataset.
        manifest: of it.
        split: `train` or `validation`.
        source_root: where the corpora lie now, if not where the manifest says.
    """

    def __init__(
        self,
        pack_dir: str | Path,
        manifest: Manifest,
        split: str,
        source_root: str | Path | None = None,
    ) -> None:
        self._manifest = manifest
        self._name = split
        self._split = manifest.splits[split]
        self._place = (pack_dir, source_root)
        self._corpora: dict[int, Corpus] = {}
        self._has_all_targets = manifest.policy == "concat" and not manifest.mask_cross_document_targets

    def targets_before(self) -> NDArray[np.int64] | None:
        """How many supervised targets stand before each row of the plan, and in all.

        Returns:
            int64 [rows + 1]; None where every input has one, so that it is row times row_tokens.

        Raises:
            ValueError: the manifest counts other targets.
        """
        if self._has_all_targets:
            self._require_all(self._split.rows * self._manifest.row_tokens)
            return None
        before = np.zeros(self._split.rows + 1, dtype=np.int64)
        first = 0
        for block in self.blocks():
            before[first + 1 : first + 1 + block.targets.size] = block.targets
            first += block.targets.size
        np.cumsum(before, out=before)
        self._require_all(int(before[-1]))
        return before

    def position_counts(self) -> NDArray[np.int64]:
        """Supervised targets by packed position + 1, in the buckets of effective context.

        The target of the input at row position j has j + 1 inputs of its row before it, as one of effective
        context j + 1 has of its document; that of a full row's last input falls into the top bucket alike.

        Returns:
            int64 [buckets].

        Raises:
            ValueError: the manifest counts other targets.
        """
        size = self._manifest.row_tokens
        at_position = np.zeros(size, dtype=np.int64)
        if self._has_all_targets:
            at_position += self._split.rows
        else:
            for block in self.blocks():
                # Row of f tokens: positions 0 .. f - 2, and f - 1 where its last target is supervised
                reach = np.bincount(block.filled - 1 + block.has_last, minlength=size + 1)
                at_position += reach.sum() - np.cumsum(reach)[:-1]
                at_position -= np.bincount(block.masked_positions, minlength=size)
        self._require_all(int(at_position.sum()))
        counts = np.zeros(bucket_lower_bounds(size).size, dtype=np.int64)
        np.add.at(counts, bucket_index(np.arange(1, size + 1), size), at_position)
        return counts

    def blocks(self) -> Iterator[RowBlock]:
        """All rows in the order of the plan."""
        pack_dir, _ = self._place
        arrays = open_arrays(Path(pack_dir) / self._name, self._split)
        for first in range(0, self._split.rows, BLOCK_ROWS):
            yield self._block(arrays, first, min(first + BLOCK_ROWS, self._split.rows))

    def _block(self, arrays: dict[str, NDArray[np.integer]], first: int, stop: int) -> RowBlock:
        offsets = np.asarray(arrays["row_offsets"][first : stop + 1], dtype=np.int64)
        tokens = np.asarray(arrays["segment_tokens"][offsets[0] : offsets[-1]], dtype=np.int64)
        inner = offsets - offsets[0]
        ends = np.concatenate(([0], np.cumsum(tokens)))
        filled = ends[inner[1:]] - ends[inner[:-1]]
        masked, positions = np.zeros(filled.size, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if self._manifest.mask_cross_document_targets:
            masked = np.diff(inner) - 1
            is_inner = np.ones(tokens.size, dtype=np.bool_)
            is_inner[inner[1:] - 1] = False
            row_start = np.repeat(ends[inner[:-1]], np.diff(inner))
            positions = (ends[1:] - row_start - 1)[is_inner]
        has_last = self._goes_on(arrays, offsets, tokens[inner[1:] - 1])
        if self._has_all_targets:
            has_last = np.ones_like(has_last)
        return RowBlock(filled=filled, has_last=has_last, masked=masked, masked_positions=positions)

    def _goes_on(
        self,
        arrays: dict[str, NDArray[np.integer]],
        offsets: NDArray[np.int64],
        last_tokens: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """[rows], whether the document of a row's last segment has tokens after it."""
        if self._manifest.policy == "concat":  # then the next row begins inside that document
            following = offsets[1:]
            known = np.minimum(following, self._split.segments - 1)
            goes_on = np.asarray(arrays["segment_start"][known]) > 0
            if following[-1] == self._split.segments:
                assert self._split.next_token is not None, "a concat split with rows has a next token"
                goes_on[-1] = self._split.next_token.start > 0
            return goes_on
        goes_on = np.zeros(last_tokens.size, dtype=np.bool_)
        full = np.flatnonzero(last_tokens == self._manifest.row_tokens)  # shorter pieces end their document
        segment = offsets[1:][full] - 1
        stop = np.asarray(arrays["segment_start"][segment]) + last_tokens[full]
        sources, documents = (arrays[f"segment_{name}"][segment] for name in ("source", "document"))
        for index in np.unique(sources).tolist():
            mine = np.flatnonzero(sources == index)
            if index not in self._corpora:
                self._corpora[index] = self._manifest.open_source(index, *self._place)
            goes_on[full[mine]] = stop[mine] < self._corpora[index].document_tokens[documents[mine]]
        return goes_on

    def _require_all(self, found: int) -> None:
        if found != self._split.supervised_targets:
            raise ValueError(
                f"the plan of {self._place[0]} gives {found} supervised targets in {self._name}, its "
                f"manifest counts {self._split.supervised_targets}: this weighting rule does not know such "
                "packs, use --token-weighting none, or pack again if the pack is damaged"
            )
