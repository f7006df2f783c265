"""Read rows of a packed dataset: tokens from the mapped corpora, everything else from the plan.

numpy only. A row is assembled from one slice a segment; nothing of the corpus is copied but the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.indexed import IndexedTokens
from megatron_exact.data.manifest import ARRAY_DTYPES, Manifest, Split, read_manifest
from megatron_exact.exposure import bucket_index, effective_context

PADDING_TOKEN = 0  # any id that the embedding knows; it is never supervised and never context


@dataclass(frozen=True, kw_only=True)
class Row:
    """One packed row of S = row_tokens inputs."""

    tokens: NDArray[np.int64]
    """[S], padding is PADDING_TOKEN."""
    labels: NDArray[np.int64]
    """[S], the token after each input, 0 where unsupervised."""
    loss_mask: NDArray[np.float32]
    """[S], 1 where supervised, else 0."""
    cu_seqlens: NDArray[np.int64]
    """[segments + 1], from 0 to S; padding is a segment of its own at the end."""
    effective_context: NDArray[np.int64]
    """[S], `exposure.effective_context`; 0 where unsupervised."""
    target_buckets: NDArray[np.int64]
    """[S], bucket of each effective context."""
    last_continues: bool
    """Whether the document of the last segment goes on after the row."""
    max_seqlen: int
    """Longest segment, padding included."""


class RowReader:
    """Random access to the rows of one split.

    Attributes:
        manifest: of the pack.
        split: the split's entry of the manifest.
        row_tokens: inputs of a row.

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
        self._arrays = open_arrays(Path(pack_dir) / split, self.split)
        self._sources: list[IndexedTokens | None] = [None] * len(self.manifest.sources)
        self._bucket_of_context = bucket_index(np.arange(self.row_tokens + 1), self.row_tokens)

    def __len__(self) -> int:
        return self.split.rows

    def __getstate__(self) -> dict[str, Any]:
        """Only the place travels to another process, which maps the files itself."""
        return {"arguments": self._arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pack_dir, split, source_root = state["arguments"]
        self.__init__(pack_dir, split, source_root=source_root)  # type: ignore[misc]

    def source(self, index: int) -> IndexedTokens:
        """Corpus `index`, opened at first use and compared with the manifest."""
        opened = self._sources[index]
        if opened is None:
            pack_dir, _, source_root = self._arguments
            opened = IndexedTokens(self.manifest.source_prefix(index, pack_dir, source_root))
            expected = self.manifest.sources[index]
            found = (opened.num_documents, opened.num_tokens, opened.bin_bytes)
            if found != (expected.documents, expected.tokens, expected.bin_bytes):
                raise ValueError(
                    f"{opened.prefix} holds {found[0]} documents, {found[1]} tokens and {found[2]} bytes "
                    f"but {expected.documents}, {expected.tokens} and {expected.bin_bytes} were packed: "
                    "it was tokenized anew, pack it again"
                )
            self._sources[index] = opened
        return opened

    def read(self, row: int) -> Row:
        """Row `row` of the plan.

        Args:
            row: in [0, len(self)).
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in [0, {len(self)})")
        size = self.row_tokens
        stream = np.zeros(size + 1, dtype=np.int64)  # inputs, and the label of the last
        cu_seqlens, last_continues = self._fill(stream, row)
        filled = int(cu_seqlens[-1])
        loss_mask = np.zeros(size, dtype=np.float32)
        loss_mask[:filled] = 1
        if self.manifest.mask_cross_document_targets:
            loss_mask[cu_seqlens[1:] - 1] = 0
        if last_continues:
            loss_mask[filled - 1] = 1
        elif self.manifest.policy == "best-fit":
            loss_mask[filled - 1] = 0
        context = np.zeros(size, dtype=np.int64)
        context[:filled] = effective_context(cu_seqlens, last_continues=last_continues)
        labels = stream[1:].copy()
        labels[loss_mask == 0] = 0
        if filled < size:
            cu_seqlens = np.append(cu_seqlens, size)
        return Row(
            tokens=stream[:-1],
            labels=labels,
            loss_mask=loss_mask,
            cu_seqlens=cu_seqlens,
            effective_context=context,
            target_buckets=self._bucket_of_context[context],
            last_continues=last_continues,
            max_seqlen=int(np.diff(cu_seqlens).max()),
        )

    def _fill(self, stream: NDArray[np.int64], row: int) -> tuple[NDArray[np.int64], bool]:
        """Write tokens and the last label; return (cu_seqlens without padding, last_continues)."""
        first, stop = (int(offset) for offset in self._arrays["row_offsets"][row : row + 2])
        columns = ("segment_source", "segment_document", "segment_start", "segment_tokens")
        sources, documents, starts, lengths = (self._arrays[name][first:stop].tolist() for name in columns)
        cu_seqlens = np.zeros(stop - first + 1, dtype=np.int64)
        np.cumsum(lengths, out=cu_seqlens[1:])
        place = 0
        for source, document, start, length in zip(sources, documents, starts, lengths, strict=True):
            stream[place : place + length] = self.source(source).read(document, start, length)
            place += length
        after = starts[-1] + lengths[-1]
        corpus = self.source(sources[-1])
        last_continues = after < int(corpus.document_tokens[documents[-1]])
        if last_continues:
            stream[place] = corpus.read(documents[-1], after, 1)[0]
        elif self.manifest.policy == "concat":
            stream[place] = self._first_token_after(row, stop)
        return cu_seqlens, last_continues

    def _first_token_after(self, row: int, stop: int) -> int:
        """The token that the stream of `concat` has after row `row`, whose segments end before `stop`."""
        if row + 1 < len(self):
            arrays = self._arrays
            source, document, start = (
                int(arrays[name][stop]) for name in ("segment_source", "segment_document", "segment_start")
            )
        else:
            place = self.split.next_token
            assert place is not None, "a concat split with rows has a next token"
            source, document, start = place.source, place.document, place.start
        return int(self.source(source).read(document, start, 1)[0])


def open_arrays(split_dir: Path, split: Split) -> dict[str, NDArray[np.integer]]:
    """Map the arrays of one split, checked for dtype and shape.

    Raises:
        ValueError: an array is missing, damaged or of another shape than the manifest says.
    """
    arrays = {}
    for name, dtype in ARRAY_DTYPES.items():
        path = split_dir / f"{name}.npy"
        expected = (split.rows + 1 if name == "row_offsets" else split.segments,)
        try:
            # A file of no elements cannot be mapped.
            array = np.load(path, mmap_mode="r" if expected[0] else None, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): copy the pack again or pack again"
            ) from error
        if array.dtype != np.dtype(dtype) or array.shape != expected:
            raise ValueError(
                f"{path} holds {array.dtype} {array.shape} where {np.dtype(dtype)} {expected} is expected: "
                "copy the pack again or pack again"
            )
        arrays[name] = array
    return arrays
