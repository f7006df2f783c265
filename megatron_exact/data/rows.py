"""Rows of a pack as arrays: tokens, segment boundaries, and which positions are supervised targets.

`RowReader` takes tokens from the corpora and everything else from the plan. numpy only. What depends on the
position inside a segment (position id, bucket, weight) is copied, a slice a segment, from a table made
once: at 16K tokens a row takes well below half the time of upstream's `GPTDataset`
(benchmarks/reading.py).

All files are read by `pread`, so that one that is cut under a job is an error with its name. After each row
the files are looked at: what was written to meanwhile is compared with the manifest again (`corpus_guard`).

`TargetLayout` counts the supervised targets from the plan's arrays alone, and `TargetsOfRow` is what a
weighting rule asks a row for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.corpus_guard import PartGuard, WatchedFile
from megatron_exact.data.indexed import Place
from megatron_exact.data.manifest import (
    FIRST_TARGET,
    Manifest,
    Split,
    array_dtypes,
    read_manifest,
)
from megatron_exact.data.score_files import ScoreReader
from megatron_exact.data.shards import Corpus
from megatron_exact.data.shuffle import KeyedPermutation, derive_key
from megatron_exact.data.source_guards import guard_sources
from megatron_exact.exposure import RowScores, bucket_index, bucket_lower_bounds
from megatron_exact.files import sha256_file

PADDING_TOKEN = 0  # any id that the embedding knows; it is never supervised and never context
READS_OF_A_ROW = 3  # a file that is written to each time is not going to rest
BLOCK_ROWS = 1 << 14
SEGMENT_COLUMNS = ("segment_source", "segment_document", "segment_start", "segment_tokens")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One packed row of S = row_tokens inputs."""

    tokens: NDArray[np.int64]
    """[S], padding is PADDING_TOKEN."""
    labels: NDArray[np.int64]
    """[S], the token after each input, 0 where unsupervised."""
    loss_mask: NDArray[np.float32]
    """[S], 1 where supervised, else 0."""
    position_ids: NDArray[np.int64]
    """[S], from 0 in every segment."""
    cu_seqlens: NDArray[np.int64]
    """[segments + 1], from 0 to S; padding is a segment of its own at the end."""
    num_filled: int
    """Inputs that are tokens of documents; the others are padding."""
    last_continues: bool
    """Whether the document of the last segment goes on after the row."""
    max_seqlen: int
    """Longest segment, padding included."""

    def by_context[T: np.generic](self, of_context: NDArray[T]) -> NDArray[T]:
        """A function of the effective context of each target (`exposure.effective_context`).

        Context grows by one a position, so this copies a slice a segment and looks nothing up.

        Args:
            of_context: [row_tokens + 1], value at context 0, 1, ...

        Returns:
            [S], of the same dtype; where a target is unsupervised, of_context[0].
        """
        out = spread(of_context[1:], self.cu_seqlens.tolist())
        out[self.cu_seqlens[1:] - 1] = of_context[0]
        out[self.num_filled :] = of_context[0]
        if self.last_continues:
            last_segment = self.cu_seqlens[self.cu_seqlens < self.num_filled][-1]
            out[self.num_filled - 1] = of_context[self.num_filled - last_segment]
        return out


class ArrayFile(WatchedFile):
    """Random access to a `.npy` of one dimension.

    Args:
        path: of the file.
        array: the same, mapped.
    """

    def __init__(self, path: Path, array: NDArray[np.integer]) -> None:
        super().__init__(path, is_random=True)
        self._dtype = array.dtype
        # The data end the file; what is before them was checked when it was mapped
        self._first = self.stamp[0] - array.nbytes

    def read(self, first: int, stop: int) -> NDArray[np.integer]:  # type: ignore[override]
        """Elements [first, stop), read-only.

        Raises:
            ValueError: the file ends before.
        """
        size = self._dtype.itemsize
        return np.frombuffer(super().read(self._first + first * size, (stop - first) * size), self._dtype)


class RowReader:
    """Random access to the rows of one split.

    A pickle contains the place, and size and time of every file when the reader was made; the files
    themselves are opened where rows are read, and compared with what was packed.

    Attributes:
        manifest: of the pack.
        split: the split's entry of the manifest.
        row_tokens: inputs of a row.
        bucket_of_context: int64 [row_tokens + 1], for `Row.by_context`.

    Raises:
        ValueError, FileNotFoundError: the pack or, at the first row that needs it, a source is damaged,
            missing or not the one that was packed.
    """

    def __init__(self, pack_dir: str | Path, split: str, *, source_root: str | Path | None = None) -> None:
        self._arguments = (str(pack_dir), split, None if source_root is None else str(source_root))
        self.manifest: Manifest = read_manifest(pack_dir)
        if split not in self.manifest.splits:
            raise ValueError(
                f"{pack_dir} has no split {split!r}: choose one of {', '.join(self.manifest.splits)}"
            )
        self.split: Split = self.manifest.splits[split]
        self.row_tokens = self.manifest.row_tokens
        mapped = open_arrays(Path(pack_dir) / split, self.split)
        answers = mapped.pop(FIRST_TARGET, None)
        # Of question-answer packs, which are small
        self._first_target = None if answers is None else np.array(answers)
        self._arrays = {
            name: ArrayFile(Path(pack_dir) / split / f"{name}.npy", array) for name, array in mapped.items()
        }
        self._row_offsets = self._arrays["row_offsets"]
        self._segments = tuple(self._arrays[name] for name in SEGMENT_COLUMNS)
        self._sources: list[Corpus | None] = [None] * len(self.manifest.sources)
        self._guards: list[list[PartGuard]] = guard_sources(self.manifest, pack_dir, source_root)
        self._positions = np.arange(self.row_tokens)
        largest, tokenizer = self.manifest.largest_id, self.manifest.tokenizer
        self._num_ids = tokenizer.vocab_size if largest is None and tokenizer is not None else None
        if largest is not None:
            self._num_ids = largest + 1
        self.bucket_of_context = bucket_index(np.arange(self.row_tokens + 1), self.row_tokens)

    def __len__(self) -> int:
        return self.split.rows

    def __getstate__(self) -> dict[str, Any]:
        """Place and stamps travel to another process, which opens the files itself."""
        arrays = {name: array.stamp for name, array in self._arrays.items()}
        return {
            "arguments": self._arguments,
            "arrays": arrays,
            "sources": [[guard.stamps for guard in mine] for mine in self._guards],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        pack_dir, split, source_root = state["arguments"]
        self.__init__(pack_dir, split, source_root=source_root)  # type: ignore[misc]
        for name, stamp in state["arrays"].items():
            self._arrays[name].stamp = stamp
        for guards, stamps in zip(self._guards, state["sources"], strict=True):
            for guard, stamp in zip(guards, stamps, strict=True):
                guard.idx_stamp, guard.bin_stamp = stamp

    def source(self, index: int) -> Corpus:
        """Corpus `index`, opened at first use and compared with the manifest."""
        opened = self._sources[index]
        if opened is None:
            pack_dir, _, source_root = self._arguments
            opened = self.manifest.open_source(index, pack_dir, source_root)
            opened.protect(*self._guards[index])
            self._sources[index] = opened
        return opened

    def read(self, row: int) -> Row:
        """Row `row` of the plan.

        Args:
            row: in [0, len(self)).

        Raises:
            IndexError: another row.
            ValueError, FileNotFoundError: a source that the row needs is not the one that was packed, or a
                file was cut or overwritten since.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in [0, {len(self)})")
        for _ in range(READS_OF_A_ROW):
            try:
                read, places = self._read(row)
            except Exception:
                if self._is_plan_as_opened():  # else it names the array that led there
                    raise
                continue
            parts = dict.fromkeys(part for part, _, _ in places)
            # All are looked at, whatever the first says
            if all([self._is_plan_as_opened(), *(part.is_as_opened() for part in parts)]):
                return read
        raise ValueError(
            f"the files of row {row} of {self._arguments[0]} are being written to: leave the files of a "
            "pack alone while a job runs, then start again"
        )

    def _read(self, row: int) -> tuple[Row, list[Place]]:
        """A row, and the places in the corpora that it was read from."""
        size = self.row_tokens
        segments = self._segments_of(row)
        boundaries = [0, *accumulate(segment[-1] for segment in segments)]
        filled = boundaries[-1]
        # All places before the first fetch: naming a place starts the disk on it.
        places = [self.source(source).place(*place) for source, *place in segments]
        after, last_continues = self._token_after(row, segments[-1])
        if after is not None:
            places.append(after)
        pieces = [part.fetch((part, begin, count)) for part, begin, count in places]
        next_token = None if after is None else pieces.pop()
        tokens, labels = np.empty((2, size), dtype=np.int64)
        np.concatenate(pieces, out=tokens[:filled])
        if self._num_ids is not None and int(tokens[:filled].max()) >= self._num_ids:
            raise ValueError(self._foreign_id(row, tokens[:filled]))
        tokens[filled:] = PADDING_TOKEN
        labels[:-1] = tokens[1:]
        labels[filled - 1 :] = 0
        loss_mask = np.ones(size, dtype=np.float32)
        loss_mask[filled - 1 :] = 0
        if next_token is not None:
            labels[filled - 1] = next_token[0]
            loss_mask[filled - 1] = 1
        if self.manifest.mask_cross_document_targets:
            inner_ends = np.array(boundaries[1:-1], dtype=np.int64) - 1
            labels[inner_ends] = 0
            loss_mask[inner_ends] = 0
        if self._first_target is not None:
            first = int(self._row_offsets.read(row, row + 1)[0])
            first_targets = self._first_target[first : first + len(segments)]
            mask_prompts(boundaries, first_targets, labels, loss_mask)
        if filled < size:
            boundaries.append(size)
        cu_seqlens = np.array(boundaries, dtype=np.int64)
        read = Row(
            tokens=tokens,
            labels=labels,
            loss_mask=loss_mask,
            position_ids=spread(self._positions, boundaries),
            cu_seqlens=cu_seqlens,
            num_filled=filled,
            last_continues=last_continues,
            max_seqlen=int((cu_seqlens[1:] - cu_seqlens[:-1]).max()),
        )
        return read, places

    def _is_plan_as_opened(self) -> bool:
        """Whether no array was written to; one that was is compared with the manifest.

        Raises:
            ValueError: an array that has changed.
        """
        changed = [array for array in self._arrays.values() if array.has_changed()]
        for array in changed:
            array.require_size()
            if sha256_file(array.path) != self.split.arrays[array.path.name]:
                raise ValueError(
                    f"{array.path} was overwritten while a job read it: copy the pack again, then start "
                    "again"
                )
            array.accept_change()
        return not changed

    def _foreign_id(self, row: int, tokens: NDArray[np.int64]) -> str:
        position = int(tokens.argmax())
        place = self.segment_at(row, position) or {}
        return (
            f"document {place.get('document')} of {place.get('source')} has the token id "
            f"{tokens[position]}, but the corpora had {self._num_ids} ids when they were packed: the .bin "
            "was changed since, restore it or tokenize and pack again"
        )

    def segment_at(self, row: int, position: int) -> dict[str, str | int] | None:
        """Which segment of row `row` contains input `position`; None in padding.

        Returns:
            {"number" in the row, "source" (prefix), "document" (inside its source), "start" (token of the
            document that the segment begins with)}.
        """
        end = 0
        for number, (source, document, start, tokens) in enumerate(self._segments_of(row)):
            end += tokens
            if position < end:
                prefix = self.manifest.sources[source].prefix
                return {"number": number, "source": prefix, "document": document, "start": start}
        return None

    def _segments_of(self, row: int) -> list[tuple[int, int, int, int]]:
        """(source, document, start, tokens) of each segment of a row."""
        first, stop = self._row_offsets.read(row, row + 2).tolist()
        if not 0 <= first < stop <= self.split.segments:
            raise ValueError(
                f"{self._row_offsets.path} places row {row} at segments {first} to {stop} of "
                f"{self.split.segments}: the array is damaged, copy the pack again"
            )
        columns = [column.read(first, stop).tolist() for column in self._segments]
        return list(zip(*columns, strict=True))

    def _token_after(self, row: int, last_segment: tuple[int, int, int, int]) -> tuple[Place | None, bool]:
        """(Place of the supervised target of the row's last token, None without; whether its document goes
        on)."""
        source, document, start, count = last_segment
        goes_on = start + count < self.source(source).tokens_of(document)
        if not self.manifest.supervises_row_end(goes_on):
            return None, False
        if goes_on:
            return self.source(source).place(document, start + count, 1), True
        if row + 1 < len(self):
            stop = int(self._row_offsets.read(row + 1, row + 2)[0])
            source, document, start = (int(column.read(stop, stop + 1)[0]) for column in self._segments[:3])
        else:
            place = self.split.next_token
            assert place is not None, "a concat split with rows has a next token"
            source, document, start = place.source, place.document, place.start
        return self.source(source).place(document, start, 1), False


def mask_prompts(
    boundaries: Sequence[int],
    first_target: NDArray[np.integer],
    labels: NDArray[np.int64],
    loss_mask: NDArray[np.float32],
) -> None:
    """Leave supervised, of each segment, its document's token `first_target` and what follows.

    Args:
        boundaries: [segments + 1], from 0; every segment is a whole document.
        first_target: [segments], >= 1: token number a is the target of input a - 1.
        labels: [S], changed in place.
        loss_mask: [S], changed in place.
    """
    for begin, prompt in zip(boundaries[:-1], first_target.tolist(), strict=True):
        labels[begin : begin + prompt - 1] = 0
        loss_mask[begin : begin + prompt - 1] = 0


def spread[T: np.generic](of_position: NDArray[T], boundaries: Sequence[int]) -> NDArray[T]:
    """A function of the position inside a segment, for a whole row: one copy a segment.

    Args:
        of_position: [at least the longest segment], value at position 0, 1, ... of a segment.
        boundaries: [segments + 1], from 0 to S.

    Returns:
        [S], of the same dtype.
    """
    out = np.empty(boundaries[-1], dtype=of_position.dtype)
    for begin, end in pairwise(boundaries):
        out[begin:end] = of_position[: end - begin]
    return out


def open_arrays(split_dir: Path, split: Split) -> dict[str, NDArray[np.integer]]:
    """Map the arrays of one split, checked for dtype and shape.

    Raises:
        ValueError: an array is missing, damaged or of another shape than the manifest says.
    """
    arrays = {}
    for name, dtype in array_dtypes(split).items():
        path = split_dir / f"{name}.npy"
        expected = (split.rows + 1 if name == "row_offsets" else split.segments,)
        try:
            # A file of no elements cannot be mapped.
            array = np.load(path, mmap_mode="r" if expected[0] else None, allow_pickle=False)
        except (OSError, ValueError, EOFError, OverflowError) as error:  # the last: 2^60 elements
            raise ValueError(
                f"{path} cannot be read ({error}): copy the pack again or pack again"
            ) from error
        if array.dtype != np.dtype(dtype) or array.shape != expected:
            raise ValueError(
                f"{path} holds {array.dtype} {array.shape} where {np.dtype(dtype)} {expected} is expected: "
                "copy the pack again or pack again"
            )
        arrays[name] = array.view(np.ndarray)  # slicing a memmap takes ten times as long
    return arrays


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
    """Where the supervised targets of one split lie: how many before each row, how many at each position.

    Both follow from the plan's arrays, read once in blocks of rows; no token is read. Of the corpora only
    the lengths of those documents are needed that fill a row to its end under `best-fit`, for whether they
    go on. `concat` without masked targets has a target at every input, so nothing is read at all.

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
        # Every row then ends with a target, and so does every segment: no input lacks one
        self._has_all_targets = self._manifest.supervises_row_end(False)

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
        goes_on = self._goes_on(arrays, offsets, tokens[inner[1:] - 1])
        has_last = self._manifest.supervises_row_end(goes_on)
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


class TargetOrder:
    """The supervised targets of a split in the order of the plan, and the random place of each.

    A function of pack and seed alone. Keeps one int64 a row at most; a pickle contains nothing of it and
    counts again.

    Args:
        pack_dir: a packed dataset.
        manifest: of it.
        split: `train` or `validation`.
        seed: of the permutation.
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
        """Supervised targets before row `row`, in [0, rows]."""
        return row * self._row_tokens if self._before is None else int(self._before[row])

    def places(self, row: int) -> NDArray[np.int64]:
        """Random place of each supervised target of a row, [targets], in [0, n) for n in the split."""
        return self.permutation.part(self.targets_before(row), self.targets_before(row + 1))

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self._arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pack_dir, manifest, split, seed, source_root = state["arguments"]
        self.__init__(pack_dir, manifest, split, seed=seed, source_root=source_root)  # type: ignore[misc]


class TargetsOfRow:
    """Targets of row `row_id` of the plan, as a weighting rule asks for them (`exposure.RowTargets`)."""

    def __init__(
        self, row: Row, row_id: int, *, order: TargetOrder | None = None, scores: ScoreReader | None = None
    ) -> None:
        self.row_id = row_id
        self._row = row
        self._order = order
        self._scores = scores

    @cached_property
    def supervised(self) -> NDArray[np.bool_]:
        """[S]."""
        return self._row.loss_mask > 0

    @cached_property
    def effective_context(self) -> NDArray[np.int64]:
        """[S]."""
        return self._row.by_context(np.arange(self._row.tokens.size + 1))

    @property
    def random_places(self) -> NDArray[np.int64]:
        """[supervised targets]."""
        assert self._order is not None, "the dataset prepares what the rule says it uses"
        return self._order.places(self.row_id)

    @cached_property
    def scores(self) -> RowScores:
        """Stored scores."""
        if self._scores is None:
            raise ValueError("this weighting rule needs stored scores: name them with --confidence-scores")
        return self._scores.read(self.row_id)

    def by_context[T: np.generic](self, of_context: NDArray[T]) -> NDArray[T]:
        """[S]."""
        return self._row.by_context(of_context)
