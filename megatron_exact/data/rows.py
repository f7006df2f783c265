"""Rows of a pack as arrays: tokens, segment boundaries, and which positions are supervised targets.

`RowReader` reads tokens from the corpora and everything else from the plan, with numpy alone. What depends
on the position inside a segment (position id, bucket, weight) is copied, one slice per segment, from a
table made once: at 16K tokens a row takes well below half the time of Megatron's `GPTDataset`
(benchmarks/reading.py).

All files are read by `pread`, so that a file that is truncated during a job gives an error with its name.
After each row the stamps of the files are checked, and a file that was written to meanwhile is compared
with the manifest again (`corpus_guard`).

Which positions are supervised is decided in `targets.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.attention_work import segment_pairs
from megatron_exact.data.corpus_guard import PartGuard, WatchedFile
from megatron_exact.data.indexed import Place, will_need
from megatron_exact.data.manifest import FIRST_TARGET, Manifest, Split, read_manifest
from megatron_exact.data.pack_arrays import open_arrays
from megatron_exact.data.shards import Corpus
from megatron_exact.data.source_guards import guard_sources
from megatron_exact.data.targets import mask_prompts, supervises_row_end
from megatron_exact.exposure import bucket_index
from megatron_exact.files import sha256_file

PADDING_TOKEN = 0  # any valid id: it is never supervised and never context
READS_OF_A_ROW = 3  # a file that changed during each of them is being written to all the time
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
    """Number of inputs that are tokens of documents; the others are padding."""
    last_continues: bool
    """Whether the document of the last segment continues after the row."""
    max_seqlen: int
    """Length of the longest segment, padding included."""

    def by_context[T: np.generic](self, of_context: NDArray[T]) -> NDArray[T]:
        """Apply a function of the effective context (`exposure.effective_context`) to each target.

        Context grows by one per position, so this copies one slice per segment instead of looking up
        values.

        Args:
            of_context: [row_tokens + 1], the value at context 0, 1, ...

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
    """Random access to a one-dimensional `.npy` file.

    Args:
        path: path of the file.
        array: the same file, mapped.
    """

    def __init__(self, path: Path, array: NDArray[np.integer]) -> None:
        super().__init__(path, is_random=True)
        self._dtype = array.dtype
        # The data are the end of the file; the header before them was checked when the file was mapped
        self._first = self.stamp[0] - array.nbytes

    def read(self, first: int, stop: int) -> NDArray[np.integer]:  # type: ignore[override]
        """Read the elements [first, stop); the array is read-only.

        Raises:
            ValueError: the file ends before `stop`.
        """
        size = self._dtype.itemsize
        return np.frombuffer(super().read(self._first + first * size, (stop - first) * size), self._dtype)


class RowReader:
    """Random access to the rows of one split.

    A pickle contains the path of the pack, and size and time of every file when the reader was made. The
    files are opened in the process that reads rows, and compared with what was packed.

    Attributes:
        manifest: manifest of the pack.
        split: the manifest's entry of the split.
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
        # In memory: only packs of question-answer records have it, and they are small
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
        """Send path and stamps to another process, which opens the files itself."""
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
        """Return corpus `index`, opened at first use and compared with the manifest."""
        opened = self._sources[index]
        if opened is None:
            pack_dir, _, source_root = self._arguments
            opened = self.manifest.open_source(index, pack_dir, source_root)
            opened.protect(*self._guards[index])
            self._sources[index] = opened
        return opened

    def read(self, row: int) -> Row:
        """Read row `row` of the plan.

        Args:
            row: number in [0, len(self)).

        Raises:
            IndexError: a row that does not exist.
            ValueError, FileNotFoundError: a source that the row needs is not the one that was packed, or a
                file was truncated or overwritten since.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in [0, {len(self)})")
        for _ in range(READS_OF_A_ROW):
            try:
                read, places = self._read(row)
            except Exception:
                if self._is_plan_as_opened():  # else this raises, naming the damaged array behind the error
                    raise
                continue
            parts = dict.fromkeys(part for part, _, _ in places)
            # A list, not a generator: every file is checked, whatever the first says
            if all([self._is_plan_as_opened(), *(part.is_as_opened() for part in parts)]):
                return read
        raise ValueError(self._written_to(f"row {row}"))

    def _written_to(self, rows: str) -> str:
        return (
            f"the files of {rows} of {self._arguments[0]} are being written to: leave the files of a pack "
            "alone while a job runs, then start again"
        )

    def _read(self, row: int) -> tuple[Row, list[Place]]:
        """Read a row once; also return the places in the corpora that it was read from."""
        size = self.row_tokens
        segments, places, after, last_continues = self._places_of(row)
        boundaries = [0, *accumulate(segment[-1] for segment in segments)]
        filled = boundaries[-1]
        will_need(places)
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

    def _places_of(
        self, row: int
    ) -> tuple[list[tuple[int, int, int, int]], list[Place], Place | None, bool]:
        """Return the segments of a row, the places it is read from, and what `_token_after` returns."""
        segments = self._segments_of(row)
        places = [self.source(source).place(*place) for source, *place in segments]
        after, last_continues = self._token_after(row, segments[-1])
        if after is not None:
            places.append(after)
        return segments, places, after, last_continues

    def will_need(self, row: int) -> None:
        """Ask disk or network for the tokens of a row that is read later, without waiting for them.

        A row that cannot be read gives its error when it is read.
        """
        with contextlib.suppress(ValueError, OSError):
            will_need(self._places_of(row)[1])

    def _is_plan_as_opened(self) -> bool:
        """Return whether the arrays are unchanged; one that was written to is compared with the manifest.

        Raises:
            ValueError: an array with other content than the manifest says.
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
        """Return which segment of row `row` contains input `position`; None in padding.

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

    def attention_pairs(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """Return the attention work of rows, see `attention_work`; no corpus is opened.

        Args:
            rows: numbers in [0, len(self)).

        Returns:
            int64 [rows].

        Raises:
            ValueError: an array is damaged, or was truncated or overwritten since it was opened.
        """
        tokens = self._arrays["segment_tokens"]
        for _ in range(READS_OF_A_ROW):
            try:
                work = [segment_pairs(tokens.read(*self._bounds_of(row)), self.row_tokens) for row in rows]
            except Exception:
                if self._is_plan_as_opened():  # as in `read`
                    raise
                continue
            if self._is_plan_as_opened():
                return np.array(work, dtype=np.int64)
        raise ValueError(self._written_to(f"rows {rows[0]}, ..."))

    def _bounds_of(self, row: int) -> tuple[int, int]:
        """Return the first segment of a row and the first after it."""
        first, stop = self._row_offsets.read(row, row + 2).tolist()
        if not 0 <= first < stop <= self.split.segments:
            raise ValueError(
                f"{self._row_offsets.path} places row {row} at segments {first} to {stop} of "
                f"{self.split.segments}: the array is damaged, copy the pack again"
            )
        return first, stop

    def _segments_of(self, row: int) -> list[tuple[int, int, int, int]]:
        """Return (source, document, start, tokens) of each segment of a row."""
        first, stop = self._bounds_of(row)
        columns = [column.read(first, stop).tolist() for column in self._segments]
        return list(zip(*columns, strict=True))

    def _token_after(self, row: int, last_segment: tuple[int, int, int, int]) -> tuple[Place | None, bool]:
        """Find the supervised target of the row's last token.

        Returns:
            Place of the target, None if it is not supervised; whether it is of the same document.
        """
        source, document, start, count = last_segment
        continues = start + count < self.source(source).tokens_of(document)
        is_masked = self.manifest.mask_cross_document_targets
        if not supervises_row_end(self.manifest.policy, is_masked, continues):
            return None, False
        if continues:
            return self.source(source).place(document, start + count, 1), True
        if row + 1 < len(self):
            stop = int(self._row_offsets.read(row + 1, row + 2)[0])
            source, document, start = (int(column.read(stop, stop + 1)[0]) for column in self._segments[:3])
        else:
            place = self.split.next_token
            assert place is not None, "a concat split with rows has a next token"
            source, document, start = place.source, place.document, place.start
        return self.source(source).place(document, start, 1), False


def spread[T: np.generic](of_position: NDArray[T], boundaries: Sequence[int]) -> NDArray[T]:
    """Apply a function of the position inside a segment to a whole row: one copy per segment.

    Args:
        of_position: [at least the longest segment], the value at position 0, 1, ... of a segment.
        boundaries: [segments + 1], from 0 to S.

    Returns:
        [S], of the same dtype.
    """
    out = np.empty(boundaries[-1], dtype=of_position.dtype)
    for begin, end in pairwise(boundaries):
        out[begin:end] = of_position[: end - begin]
    return out
