"""Log-probabilities of several continuations of many prompts; what prompts have in common is computed once.

Prompts of one length form a batch, so that nothing is padded and no mask is needed. Sorted, prompts with a
common beginning are neighbours: the two of an item up to its evidence, and all items of one text. The batch
runs in three steps, each on the KV cache of the one before:

    distinct beginnings  [distinct, split]
    rest of each prompt  [N, L - split]   the last logits score the first token of every candidate
    longer candidates    [candidates of more than one token, most tokens - 1]   padded on the right, which
                                          nothing before it sees

The split is the one that saves most tokens. Legend: N prompts, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 256
"""Prompts a batch: bounds the logits, [256, V] in fp32, where prompts are short."""
Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and what may follow it."""

    prompt: Ids
    """At least one token."""
    candidates: tuple[Ids, ...]
    """Each at least one token."""

    @property
    def rows(self) -> int:
        """Rows of the KV cache that it needs at its widest."""
        return sum(len(candidate) > 1 for candidate in self.candidates) or 1


def score_requests(
    model: Any, requests: Sequence[Request], *, batch_tokens: int
) -> Iterator[tuple[int, Any]]:
    """Score requests in an order of its own.

    Args:
        model: causal language model of transformers.
        requests: in any order, of any lengths.
        batch_tokens: of the KV cache at a time; a longer prompt is read in pieces of so many tokens.

    Yields:
        (position in `requests`, log p of each candidate summed over its tokens: list of float).
    """
    for batch in batches(requests, batch_tokens):
        chosen = [requests[position] for position in batch]
        with torch.inference_mode():
            scores = _score_batch(model, chosen, batch_tokens)
        yield from zip(batch, scores, strict=True)


def batches(requests: Sequence[Request], batch_tokens: int) -> Iterator[list[int]]:
    """Positions of requests of one length, neighbours in sorted order, as many as the cache may hold."""
    order = sorted(
        range(len(requests)),
        key=lambda position: (len(requests[position].prompt), requests[position].prompt),
    )
    batch: list[int] = []
    for position in order:
        request = requests[position]
        length = len(request.prompt)
        rows = request.rows + sum(requests[other].rows for other in batch)
        is_full = rows > MOST_ROWS or rows * length > batch_tokens
        if batch and (is_full or len(requests[batch[0]].prompt) != length):
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def best_split(prompts: Sequence[Ids]) -> int:
    """Where to cut prompts [N] of one length, in sorted order, so that most tokens are computed once.

    Returns:
        tokens of the beginning, 0..L-1: the rest is never empty.
    """
    most = len(prompts[0]) - 1
    common = [min(most, _common_tokens(one, other)) for one, other in pairwise(prompts)]
    saved = {split: split * sum(tokens >= split for tokens in common) for split in {0, *common}}
    return max(saved, key=lambda split: (saved[split], -split))


def _common_tokens(one: Ids, other: Ids) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def _score_batch(model: Any, requests: Sequence[Request], batch_tokens: int) -> list[list[float]]:
    prompts = [request.prompt for request in requests]
    split = best_split(prompts)
    cache = None
    if split:
        beginnings = sorted({prompt[:split] for prompt in prompts})
        place = {beginning: row for row, beginning in enumerate(beginnings)}
        _, cache = _read(model, beginnings, None, batch_tokens)
        _select_rows(cache, [place[prompt[:split]] for prompt in prompts], model)
    logits, cache = _read(model, [prompt[split:] for prompt in prompts], cache, batch_tokens)
    first = torch.log_softmax(logits.float(), dim=-1)  # [N, V]
    scores = [
        [float(first[row, candidate[0]]) for candidate in request.candidates]
        for row, request in enumerate(requests)
    ]
    longer = [
        (row, column)
        for row, request in enumerate(requests)
        for column, candidate in enumerate(request.candidates)
        if len(candidate) > 1
    ]
    if longer:
        _select_rows(cache, [row for row, _ in longer], model)
        answers = [requests[row].candidates[column] for row, column in longer]
        for (row, column), value in zip(longer, _later_tokens(model, answers, cache), strict=True):
            scores[row][column] += value
    return scores


def _read(model: Any, rows: Sequence[Ids], cache: Any, batch_tokens: int) -> tuple[Tensor, Any]:
    """Put rows [N, L] behind a cache of as many rows, in pieces.

    Returns:
        logits [N, V] of the last tokens, the cache.
    """
    ids = torch.tensor(rows, dtype=torch.long, device=model.device)
    piece = max(1, batch_tokens // len(rows))
    logits = None
    for part in torch.split(ids, piece, dim=1):
        found = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = found.logits[:, -1], found.past_key_values
    assert logits is not None
    return logits, cache


def _select_rows(cache: Any, rows: Sequence[int], model: Any) -> None:
    """Row i of the cache becomes what row `rows[i]` was."""
    cache.batch_select_indices(torch.tensor(rows, dtype=torch.long, device=model.device))


def _later_tokens(model: Any, answers: Sequence[Ids], cache: Any) -> list[float]:
    """Sum of log p of the second and later tokens of answers, one a row of the cache."""
    width = max(map(len, answers)) - 1
    given = [[*answer[:-1], *[0] * (width + 1 - len(answer))] for answer in answers]
    ids = torch.tensor(given, dtype=torch.long, device=model.device)  # [answers, width]
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits  # [answers, width, V]
    return [
        sum(
            float(torch.log_softmax(logits[row, place].float(), dim=-1)[token])
            for place, token in enumerate(answer[1:])
        )
        for row, answer in enumerate(answers)
    ]
