"""A corpus of many shards: a folder of `.bin` / `.idx` pairs that is read as one source.

Documents are numbered consecutively through the shards, which are sorted by name. A pack records how many
documents and tokens each shard has, so a training worker opens a shard only when it first reads from it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.corpus_guard import PartGuard
from megatron_exact.data.indexed import IndexedTokens, Place


class ShardedTokens:
    """Read access to `FOLDER/*.idx` and their `.bin`, as one `IndexedTokens`.

    Attributes:
        prefix: the folder.
        shards: (name without suffix, documents, tokens) of each shard.
        num_documents, num_tokens: totals over all shards.

    Args:
        folder: where the shards lie.
        known: (name, documents, tokens) of each shard in order, from a manifest; then a shard is opened
            when it is needed. None lists the folder and opens every shard.

    Raises:
        ValueError, FileNotFoundError: a folder without shards, or a shard that is damaged or has other
            documents, tokens or another dtype than expected. With `known`, raised at first use.
    """

    def __init__(self, folder: str | Path, known: Sequence[tuple[str, int, int]] | None = None) -> None:
        self.prefix = Path(folder)
        self._parts: dict[int, IndexedTokens] = {}
        self._guards: Sequence[PartGuard] = ()
        self._document_tokens: NDArray[np.integer] | None = None
        self.shards = self._look_at_shards() if known is None else tuple(known)
        if not self.shards:
            raise FileNotFoundError(f"{self.prefix} has no .idx file: name a folder of .bin and .idx pairs")
        self._starts = [0, *accumulate(documents for _, documents, _ in self.shards)]
        self.num_documents = self._starts[-1]
        self.num_tokens = sum(tokens for _, _, tokens in self.shards)

    def _look_at_shards(self) -> tuple[tuple[str, int, int], ...]:
        names = sorted(path.name.removesuffix(".idx") for path in self.prefix.glob("*.idx"))
        names = [name for name in names if not name.startswith(".")]  # left by a killed writer
        shards = []
        for index, name in enumerate(names):
            part = IndexedTokens(self.prefix / name)
            self._parts[index] = part
            shards.append((name, part.num_documents, part.num_tokens))
            self._require_same_dtype(part)
        return tuple(shards)

    def _require_same_dtype(self, part: IndexedTokens) -> None:
        first = next(iter(self._parts.values()))
        if part.dtype != first.dtype:
            raise ValueError(
                f"{part.prefix} contains {part.dtype} tokens but {first.prefix} {first.dtype}: "
                "tokenize all shards of a source with one tokenizer"
            )

    def __len__(self) -> int:
        return self.num_documents

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """dtype of the stored token ids, the same in every shard."""
        return self._part(0).dtype

    @property
    def bin_bytes(self) -> int:
        """Size of all `.bin` files together."""
        return self.num_tokens * self.dtype.itemsize

    @property
    def parts(self) -> tuple[IndexedTokens, ...]:
        """All shards, opened."""
        return tuple(self._part(index) for index in range(len(self.shards)))

    def _part(self, index: int) -> IndexedTokens:
        """Return shard `index`, opened at first use and compared with what is known about it."""
        part = self._parts.get(index)
        if part is None:
            name, documents, tokens = self.shards[index]
            part = IndexedTokens(self.prefix / name)
            if (part.num_documents, part.num_tokens) != (documents, tokens):
                raise ValueError(
                    f"{part.prefix} contains {part.num_documents} documents and {part.num_tokens} tokens "
                    f"but {documents} and {tokens} were packed: it was tokenized again, pack it again"
                )
            if self._guards:
                part.protect(self._guards[index])
            self._parts[index] = part
            self._require_same_dtype(part)
        return part

    def _place(self, document: int) -> tuple[IndexedTokens, int]:
        """Return the shard of a document and the document's number there."""
        index = bisect_right(self._starts, document) - 1
        return self._parts.get(index) or self._part(index), document - self._starts[index]

    def protect(self, *guards: PartGuard) -> None:
        """Protect every shard with a guard of its own, see `IndexedTokens.protect`."""
        self._guards = guards
        for index, part in self._parts.items():
            part.protect(guards[index])

    def read(self, document: int, start: int, count: int) -> NDArray[np.integer]:
        """Read the tokens [start, start + count) of a document: see `IndexedTokens.read`."""
        part, inside = self._place(document)
        return part.read(inside, start, count)

    def place(self, document: int, start: int, count: int) -> Place:
        """Return where tokens lie in one of the shards: see `IndexedTokens.place`."""
        part, inside = self._place(document)
        return part.place(inside, start, count)

    def tokens_of(self, document: int) -> int:
        """Return the tokens of one document in [0, num_documents), in constant time."""
        part, inside = self._place(document)
        return part.tokens_of(inside)

    @property
    def document_tokens(self) -> NDArray[np.integer]:
        """int32 or int64 [documents], tokens of each, kept in memory; the first use reads every index."""
        if self._document_tokens is None:
            pieces = []
            for part in self.parts:
                pieces.append(part.document_tokens.copy())
                part.release()
            self._document_tokens = np.concatenate(pieces)
        return self._document_tokens

    def release(self) -> None:
        """Close all files and drop `document_tokens`; the next read opens what it needs again."""
        self._document_tokens = None
        for part in self._parts.values():
            part.release()

    def __getstate__(self) -> dict[str, object]:
        """Send folder and shards to another process, which opens what it reads."""
        return {"folder": self.prefix, "known": self.shards}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]


Corpus = IndexedTokens | ShardedTokens


def parts_of(corpus: Corpus) -> tuple[IndexedTokens, ...]:
    """Return the pairs of a corpus: its shards, or itself."""
    return corpus.parts if isinstance(corpus, ShardedTokens) else (corpus,)


def open_corpus(prefix: str | Path, known: Sequence[tuple[str, int, int]] | None = None) -> Corpus:
    """Open a `.bin` / `.idx` pair or a folder of them.

    Args:
        prefix: path without suffix, or folder. Where both `PREFIX.idx` and a folder `PREFIX` exist, the
            pair is meant, unless shards are known.
        known: (name, documents, tokens) of each shard, from a manifest; None or empty for a pair.

    Raises:
        ValueError, FileNotFoundError: see `IndexedTokens` and `ShardedTokens`.
    """
    prefix = Path(prefix)
    if known:
        return ShardedTokens(prefix, known)
    if prefix.is_dir() and not prefix.with_name(prefix.name + ".idx").exists():
        return ShardedTokens(prefix)
    return IndexedTokens(prefix)
