"""Which documents a split takes from which source, and in which order.

Without weights every document is taken once. With weights each source gives documents, in its own
shuffled order, until its share of the tokens is met: the last document is taken only if that comes nearer
to the share than leaving it, so a source misses its share by at most half a document. All chosen documents
are then shuffled together, which interleaves the sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.manifest import SourceUse
from megatron_exact.data.plan import ChosenDocuments
from megatron_exact.data.shuffle import KeyedPermutation, derive_key


@dataclass(frozen=True, kw_only=True)
class SourceDocuments:
    """The documents of one source that belong to one split."""

    name: str
    """For messages."""
    weight: float | None
    """Token share before normalisation; None when no source has one."""
    document: NDArray[np.int64]
    """[documents], numbers inside the source, ascending."""
    tokens: NDArray[np.int64]
    """[documents], their lengths."""

    @property
    def total(self) -> int:
        """Tokens of all documents."""
        return int(self.tokens.sum(dtype=np.int64))


def choose_documents(
    sources: Sequence[SourceDocuments],
    *,
    split: str,
    seed: int,
    target_tokens: int | None,
    allow_repeats: bool,
) -> tuple[ChosenDocuments, tuple[SourceUse, ...]]:
    """Choose and order the documents of one split.

    Args:
        sources: in the manifest's order; all with a weight or all without.
        split: its name, part of the shuffle keys.
        seed: of the pack.
        target_tokens: tokens wanted in all; None means as many as there are, or as the scarcest weighted
            source allows.
        allow_repeats: go over a source again, in a new order, when its share is larger than it is.

    Raises:
        ValueError: a source is shorter than its share and may not be repeated, or its share is so small
            that it would give nothing.
    """
    if sources[0].weight is None:
        picks = _choose_unweighted(sources, split, seed, target_tokens, allow_repeats)
    else:
        shares = _token_shares(sources, target_tokens)
        picks = []
        for index, (source, share) in enumerate(zip(sources, shares, strict=True)):
            key = ("documents of a source", seed, split, index)
            name = f"source {source.name} of weight {source.weight:g}"
            local = _take_tokens(
                source.tokens, share, key, allow_repeats, name, "--train-tokens or the weight"
            )
            picks.append(local)
    chosen = _interleave(sources, picks, derive_key("document order", seed, split))
    return chosen, tuple(_describe_use(source, pick) for source, pick in zip(sources, picks, strict=True))


def _token_shares(sources: Sequence[SourceDocuments], target_tokens: int | None) -> list[int]:
    """Whole tokens that each source should give, from exact fractions."""
    weights = [Fraction(source.weight or 0) for source in sources]
    total_weight = sum(weights)
    fractions = [weight / total_weight for weight in weights]
    if target_tokens is None:
        wanted = min(source.total / share for source, share in zip(sources, fractions, strict=True))
    else:
        wanted = Fraction(target_tokens)
    return [int(wanted * share) for share in fractions]


def _choose_unweighted(
    sources: Sequence[SourceDocuments],
    split: str,
    seed: int,
    target_tokens: int | None,
    allow_repeats: bool,
) -> list[NDArray[np.int64]]:
    """Positions chosen in each source when nothing is weighted: all, or a shuffled beginning of all."""
    if target_tokens is None:
        return [np.arange(source.document.size) for source in sources]
    tokens = np.concatenate([source.tokens for source in sources])
    key = ("documents of all sources", seed, split)
    names = ("the sources " if len(sources) > 1 else "source ") + ", ".join(s.name for s in sources)
    pool = _take_tokens(tokens, target_tokens, key, allow_repeats, names, "--train-tokens")
    bounds = np.cumsum([0] + [source.document.size for source in sources])
    which = np.searchsorted(bounds, pool, side="right") - 1
    return [pool[which == index] - bounds[index] for index in range(len(sources))]


def _take_tokens(
    tokens: NDArray[np.int64],
    share: int,
    key: tuple[str | int, ...],
    allow_repeats: bool,
    name: str,
    knobs: str,
) -> NDArray[np.int64]:
    """Positions of the documents, in shuffled order, whose tokens come nearest to `share`, at least one.

    Each pass over all documents has an order of its own; only the last pass may be partial.
    """
    total = int(tokens.sum(dtype=np.int64))
    if share > total and (not allow_repeats or total == 0):
        raise ValueError(
            f"{name} should give {share} train tokens but {total} are there: lower {knobs}, add data, or "
            "repeat documents with --allow-repeats"
        )
    passes: list[NDArray[np.int64]] = []
    missing = share
    while missing > 0:
        order = KeyedPermutation(tokens.size, derive_key(*key, len(passes))).all()
        if missing < total:
            reached = np.cumsum(tokens[order], dtype=np.int64)
            order = order[: _nearest_count(reached, missing)]
        passes.append(order)
        missing -= total
    if sum(order.size for order in passes) == 0:
        raise ValueError(
            f"{name} should give {share} train tokens, less than half of the document that would be its "
            f"first: it would give nothing; raise {knobs}, or leave the source out"
        )
    return np.concatenate(passes)


def _nearest_count(reached: NDArray[np.int64], missing: int) -> int:
    """How many documents come nearest to `missing` tokens; the larger number if two are as near.

    Args:
        reached: [documents], tokens of the first 1, 2, ... documents; the last is above `missing`.
        missing: tokens, above 0.
    """
    below = int(np.searchsorted(reached, missing))
    before = int(reached[below - 1]) if below else 0
    return below + 1 if int(reached[below]) - missing <= missing - before else below


def _interleave(
    sources: Sequence[SourceDocuments], picks: Sequence[NDArray[np.int64]], key: int
) -> ChosenDocuments:
    sizes = [pick.size for pick in picks]
    order = KeyedPermutation(sum(sizes), key).all()
    source = np.repeat(np.arange(len(sources), dtype=np.uint16), sizes)[order]
    document = np.concatenate([s.document[pick] for s, pick in zip(sources, picks, strict=True)])[order]
    tokens = np.concatenate([s.tokens[pick] for s, pick in zip(sources, picks, strict=True)])[order]
    return ChosenDocuments(source=source, document=document, tokens=tokens)


def _describe_use(source: SourceDocuments, pick: NDArray[np.int64]) -> SourceUse:
    times = np.bincount(pick, minlength=source.document.size)
    tokens = int((times * source.tokens).sum())
    used_once = int(source.tokens[times > 0].sum(dtype=np.int64))
    return SourceUse(
        documents=int(pick.size),
        tokens=tokens,
        repeated_tokens=tokens - used_once,
        unused_tokens=source.total - used_once,
    )
