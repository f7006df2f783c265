"""Supervised targets of a pack: who supervises the last target of a row, and where all targets lie.

`supervises_row_end` decides on the last target of a row, for the reader of rows, the counts of a plan, the
ledger of stages and the layout below. Every other token of a document is the target of the token before it,
except the first one of a document where cross-document targets are masked, and the prompts of
question-answer records (`mask_prompts`).

`TargetLayout` counts the supervised targets before each row and at each packed position from the arrays of
the plan, without reading a token. `TargetOrder` numbers them in a random order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.manifest import Manifest
from megatron_exact.data.pack_arrays import open_arrays
from megatron_exact.data.shards import Corpus
from megatron_exact.data.shuffle import KeyedPermutation, derive_key
from megatron_exact.exposure import bucket_index, bucket_lower_bounds

BLOCK_ROWS = 1 << 14


def supervises_row_end[Bits: (bool, NDArray[np.bool_])](policy: str, masked: bool, continues: Bits) -> Bits:
    """Decide whether the target of a row's last token is supervised: the only place that decides it.

    A document that continues after the row has a next token, which is the target, with the tokens of its
    segment as context. Where the document ends with the row, `concat` takes the first token of the next
    row (context 0, the overlap of rows in stock Megatron) unless cross-document targets are masked;
    under `best-fit` consecutive rows are unrelated, so the last token has no target.

    Args:
        policy: packing policy of the pack, `concat` or `best-fit`.
        masked: whether the first token of a document is never a supervised target.
        continues: whether the document continues after the row; of one row, or [rows].
    """
    return continues | (policy == "concat" and not masked)


def mask_prompts(
    boundaries: Sequence[int],
    first_target: NDArray[np.integer],
    labels: NDArray[np.int64],
    loss_mask: NDArray[np.float32],
) -> None:
    """Mask the prompts of a row: in each segment the tokens before `first_target` of its document.

    Args:
        boundaries: [segments + 1], from 0; every segment is a whole document.
        first_target: [segments], >= 1, first supervised token; token a is the target of input a - 1.
        labels: [S], changed in place.
        loss_mask: [S], changed in place.
    """
    for begin, prompt in zip(boundaries[:-1], first_target.tolist(), strict=True):
        labels[begin : begin + prompt - 1] = 0
        loss_mask[begin : begin + prompt - 1] = 0


@dataclass(frozen=True, kw_only=True)
class RowBlock:
    """Consecutive rows of a plan."""

    filled: NDArray[np.int64]
    """[rows], number of inputs that are tokens of documents, at least 1."""
    has_last: NDArray[np.bool_]
    """[rows], whether the target of the last one of these inputs is supervised."""
    masked: NDArray[np.int64]
    """[rows], number of inner segments whose last target is masked."""
    masked_positions: NDArray[np.int64]
    """[masked targets of all rows], their positions in their rows."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """[rows], number of supervised targets."""
        return self.filled - 1 + self.has_last - self.masked


class TargetLayout:
    """Where the supervised targets of one split lie: how many before each row, how many at each position.

    Both follow from the plan's arrays, read once in blocks of rows; no token is read. Of the corpora, only
    the lengths of the documents are needed that fill a whole row under `best-fit`, to find out whether
    they continue. Under `concat` without masked targets every input has a target, so nothing is read.

    Args:
        pack_dir: a packed dataset.
        manifest: its manifest.
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
        # If so, every row ends with a supervised target, and so does every segment
        self._has_all_targets = self._supervises_row_end(False)

    def _supervises_row_end[Bits: (bool, NDArray[np.bool_])](self, continues: Bits) -> Bits:
        return supervises_row_end(
            self._manifest.policy, self._manifest.mask_cross_document_targets, continues
        )

    def targets_before(self) -> NDArray[np.int64] | None:
        """Count the supervised targets before each row of the plan, and all of them.

        Returns:
            int64 [rows + 1]; None where every input has one, so that the count is row times row_tokens.

        Raises:
            ValueError: the manifest has another number of targets.
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
        """Count supervised targets by packed position + 1, in the buckets of effective context.

        The target of the input at row position j has j + 1 inputs of its row before it, just as one of
        effective context j + 1 has of its document. That of a full row's last input falls into the top
        bucket.

        Returns:
            int64 [buckets].

        Raises:
            ValueError: the manifest has another number of targets.
        """
        size = self._manifest.row_tokens
        at_position = np.zeros(size, dtype=np.int64)
        if self._has_all_targets:
            at_position += self._split.rows
        else:
            for block in self.blocks():
                # Targets of a row of f tokens: positions 0 .. f - 2, and f - 1 if the last is supervised
                reach = np.bincount(block.filled - 1 + block.has_last, minlength=size + 1)
                at_position += reach.sum() - np.cumsum(reach)[:-1]
                at_position -= np.bincount(block.masked_positions, minlength=size)
        self._require_all(int(at_position.sum()))
        counts = np.zeros(bucket_lower_bounds(size).size, dtype=np.int64)
        np.add.at(counts, bucket_index(np.arange(1, size + 1), size), at_position)
        return counts

    def blocks(self) -> Iterator[RowBlock]:
        """Yield all rows in the order of the plan."""
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
        continues = self._last_continues(arrays, offsets, tokens[inner[1:] - 1])
        has_last = self._supervises_row_end(continues)
        return RowBlock(filled=filled, has_last=has_last, masked=masked, masked_positions=positions)

    def _last_continues(
        self,
        arrays: dict[str, NDArray[np.integer]],
        offsets: NDArray[np.int64],
        last_tokens: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Return for each row whether the document of its last segment continues after it."""
        if self._manifest.policy == "concat":  # such a document continues at the start of the next row
            following = offsets[1:]
            known = np.minimum(following, self._split.segments - 1)
            continues = np.asarray(arrays["segment_start"][known]) > 0
            if following[-1] == self._split.segments:
                assert self._split.next_token is not None, "a concat split with rows has a next token"
                continues[-1] = self._split.next_token.start > 0
            return continues
        continues = np.zeros(last_tokens.size, dtype=np.bool_)
        full = np.flatnonzero(
            last_tokens == self._manifest.row_tokens
        )  # a shorter piece is the end of its document
        segment = offsets[1:][full] - 1
        stop = np.asarray(arrays["segment_start"][segment]) + last_tokens[full]
        sources, documents = (arrays[f"segment_{name}"][segment] for name in ("source", "document"))
        for index in np.unique(sources).tolist():
            mine = np.flatnonzero(sources == index)
            if index not in self._corpora:
                self._corpora[index] = self._manifest.open_source(index, *self._place)
            continues[full[mine]] = stop[mine] < self._corpora[index].document_tokens[documents[mine]]
        return continues

    def _require_all(self, found: int) -> None:
        if found != self._split.supervised_targets:
            raise ValueError(
                f"the plan of {self._place[0]} gives {found} supervised targets in {self._name}, its "
                f"manifest counts {self._split.supervised_targets}: this weighting rule does not support "
                "such packs, use --token-weighting none, or pack again if the pack is damaged"
            )


class TargetOrder:
    """The supervised targets of a split in the order of the plan, and the random place of each.

    It depends on pack and seed alone. It keeps at most one int64 per row in memory. A pickle does not
    contain them: the receiving process counts again.

    Args:
        pack_dir: a packed dataset.
        manifest: its manifest.
        split: `train` or `validation`.
        seed: seed of the permutation.
        source_root: where the corpora lie now, if not where the manifest says.

    Raises:
        ValueError: a pack whose targets cannot be counted, see `TargetLayout`.
    """

    def __init__(
        self,
        pack_dir: str | Path,
        manifest: Manifest,
        split: str,
        *,
        seed: int,
        source_root: str | Path | None = None,
    ) -> None:
        self._arguments = (pack_dir, manifest, split, seed, source_root)
        self._row_tokens = manifest.row_tokens
        self._before = TargetLayout(pack_dir, manifest, split, source_root).targets_before()
        key = derive_key("random places of targets", seed)
        self.permutation = KeyedPermutation(manifest.splits[split].supervised_targets, key)

    def targets_before(self, row: int) -> int:
        """Return the number of supervised targets before row `row`, in [0, rows]."""
        return row * self._row_tokens if self._before is None else int(self._before[row])

    def places(self, row: int) -> NDArray[np.int64]:
        """Return the random place of each supervised target of a row, [targets], in [0, n) for n
        targets."""
        return self.permutation.part(self.targets_before(row), self.targets_before(row + 1))

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self._arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pack_dir, manifest, split, seed, source_root = state["arguments"]
        self.__init__(pack_dir, manifest, split, seed=seed, source_root=source_root)  # type: ignore[misc]
