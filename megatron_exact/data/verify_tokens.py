"""An account of every token of every source of a pack, from its arrays alone.

A pack covers a document if its segments lead from the first token to the last without gap or overlap.
Seen as steps from `start` to `end`, that is so for whole passes over the document exactly if as many steps
begin at every inner place as end there. Places are compared as sums of random hashes of (document, place)
drawn anew for each proof, so the account takes one byte a document and no sorting; unequal multisets have
equal sums with a chance of 2^-64.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.manifest import Manifest, Split, TokenPlace
from megatron_exact.data.plan import DocumentPool
from megatron_exact.data.shuffle import random_bits

BLOCK_SEGMENTS = 1 << 18
Arrays = Mapping[str, NDArray[np.integer]]


@dataclass(kw_only=True)
class SplitAccount:
    """What the segments of one split cover."""

    seen: NDArray[np.bool_]
    """[documents of the pool], whether a token of it is there."""
    covers_documents: bool = True
    """Whether the segments lead through each seen document, from its first token to its last."""
    inputs: int = 0
    """Tokens of all segments."""
    opened_tokens: int = 0
    """Lengths of the documents, once for each time that the first token is in it."""
    cut_openings: int = 0
    """How often the document that the stream's end cuts was begun."""
    tail: int = 0
    """Tokens of that document beyond the end of the stream."""

    @property
    def covered_tail(self) -> int:
        """Of `tail`, what another pass over that document does not cover."""
        return self.tail if self.cut_openings == 1 else 0


def account_for_split(arrays: Arrays, split: Split, pool: DocumentPool) -> SplitAccount:
    """Look at every segment of one split.

    Args:
        arrays: of the split, mapped.
        split: its entry of the manifest.
        pool: lengths of all documents.

    Raises:
        ValueError: a segment that names what does not exist.
    """
    account = SplitAccount(seen=np.zeros(len(pool), dtype=np.bool_))
    keys = (secrets.randbits(64), secrets.randbits(64))
    balance = np.uint64(0)
    cut = _cut_place(split.next_token, pool)
    with np.errstate(over="ignore"):  # sums are meant modulo 2^64
        if cut is not None:
            balance += _place_hashes(keys, np.array(cut[:1]), np.array(cut[1:]))[0]
            account.tail = int(pool.tokens[cut[0]]) - cut[1]
        for first in range(0, split.segments, BLOCK_SEGMENTS):
            number, start, length = _segments(arrays, first, pool)
            tokens = pool.tokens[number].astype(np.int64)
            end = start + length
            if (end > tokens).any():
                raise ValueError(
                    f"segment {first + int(np.argmax(end > tokens))} reaches beyond its document"
                )
            opens, goes_on = start == 0, end < tokens
            balance += _place_hashes(keys, number[~opens], start[~opens]).sum(dtype=np.uint64)
            balance -= _place_hashes(keys, number[goes_on], end[goes_on]).sum(dtype=np.uint64)
            account.seen[number] = True
            account.inputs += int(length.sum())
            account.opened_tokens += int(tokens[opens].sum())
            if cut is not None:
                account.cut_openings += int(np.count_nonzero(number[opens] == cut[0]))
    account.covers_documents = balance == 0 and account.opened_tokens - account.tail == account.inputs
    return account


def _cut_place(next_token: TokenPlace | None, pool: DocumentPool) -> tuple[int, int] | None:
    """(document of the pool, place) where the stream's end cuts a document, None where it cuts none."""
    if next_token is None or next_token.start == 0:
        return None
    if not 0 <= next_token.source < pool.first.size - 1:
        raise ValueError(f"the next token is of source {next_token.source}, which does not exist")
    number = int(pool.first[next_token.source]) + next_token.document
    if not (
        next_token.document >= 0
        and number < int(pool.first[next_token.source + 1])
        and 0 < next_token.start < int(pool.tokens[number])
    ):
        raise ValueError("the next token is of a document or place that does not exist")
    return number, next_token.start


def _segments(
    arrays: Arrays, first: int, pool: DocumentPool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Document of the pool, start and length of the segments from number `first` on, in bounds."""
    source, document, start, length = (
        arrays[name][first : first + BLOCK_SEGMENTS].astype(np.int64)
        for name in ("segment_source", "segment_document", "segment_start", "segment_tokens")
    )
    if source.max() >= pool.first.size - 1:
        raise ValueError(f"a segment names source {source.max()}, which does not exist")
    number = pool.first[source] + document
    if document.min() < 0 or (number >= pool.first[source + 1]).any():
        raise ValueError("a segment names a document that does not exist")
    if start.min() < 0 or length.min() < 1:
        raise ValueError("a segment names tokens that do not exist")
    return number, start, length


def _place_hashes(
    keys: tuple[int, int], number: NDArray[np.int64], place: NDArray[np.int64]
) -> NDArray[np.uint64]:
    document = random_bits(keys[0], number) >> np.uint64(1)
    return random_bits(keys[1], document ^ place.astype(np.uint64))


def account_for_tokens(manifest: Manifest, accounts: Mapping[str, SplitAccount], pool: DocumentPool) -> str:
    """Every token of the sources is in the pack once, or left out, unused or repeated as stated.

    Raises:
        ValueError: the numbers that do not agree.
    """
    covered = inputs = 0
    for name, account in accounts.items():
        if not account.covers_documents:
            raise ValueError(
                f"the segments of {name} do not lead through their documents from first token to last: "
                "some tokens are missing or in more than one row"
            )
        covered += int(pool.tokens.sum(dtype=np.int64, where=account.seen)) - account.covered_tail
        inputs += account.inputs
    missing = int(pool.tokens.sum(dtype=np.int64)) - covered
    repeated = inputs - covered
    if repeated and not manifest.allow_repeats:
        raise ValueError(f"{repeated} tokens are in more than one row")
    splits = manifest.splits.values()
    unused = sum(use.unused_tokens for split in splits for use in split.sources)
    left_out = sum(split.left_out_tokens for split in splits)
    stated_repeats = sum(use.repeated_tokens for split in splits for use in split.sources)
    # Tokens left out at the end of a repeating stream may stand elsewhere in it.
    slack = left_out if stated_repeats else 0
    if not unused + left_out - slack <= missing <= unused + left_out:
        raise ValueError(
            f"{missing} tokens are in no row but {unused} unused and {left_out} left out are stated"
        )
    expected = stated_repeats - left_out + missing - unused
    if repeated != expected:
        raise ValueError(f"{repeated} tokens are repeated but {expected} should be")
    return f"{covered:,} in the pack, {unused:,} unused, {left_out:,} left out, {repeated:,} repeated"


def disjoint_splits(accounts: Mapping[str, SplitAccount]) -> str:
    """No document is in two splits; says how many each has.

    Raises:
        ValueError: how many are.
    """
    seen = [account.seen for account in accounts.values()]
    shared = int(np.count_nonzero(np.logical_and.reduce(seen)))
    if shared:
        raise ValueError(f"{shared} documents are in both splits")
    return " and ".join(f"{np.count_nonzero(one):,}" for one in seen) + " documents, none in both"
