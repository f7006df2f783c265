"""Items in, margins out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_exact.evaluation.probe.items import EncodedItem, ProbeItem, answers_to_json, encode_item
from megatron_exact.evaluation.probe.shared_prefix import Request, score_requests

BATCH_TOKENS = 65_536
"""Of the KV cache at a time: 8 GiB for Llama-3.1-8B in bf16."""


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """What a model made of an item."""

    item: ProbeItem
    """The question."""
    encoded: EncodedItem
    """Its token ids."""
    scores: tuple[float, ...]
    """log p of each candidate after the prompt, nats, summed over its tokens."""
    scores_ablated: tuple[float, ...]
    """The same after the prompt without evidence."""

    @property
    def margin(self) -> float:
        """log p(gold) - log p(competitor) with the evidence."""
        return self.scores[self.encoded.gold] - self.scores[self.encoded.competitor]

    @property
    def margin_ablated(self) -> float:
        """The same without the evidence."""
        return self.scores_ablated[self.encoded.gold] - self.scores_ablated[self.encoded.competitor]

    def to_json(self) -> dict[str, Any]:
        """The object of the results file."""
        return {
            "id": self.item.id,
            "kind": self.item.kind,
            "distance": self.item.distance,
            "context": self.item.context,
            "prompt_tokens": len(self.encoded.prompt),
            "prompt_sha256": self.encoded.prompt_sha256,
            "item_sha256": self.encoded.sha256,
            **answers_to_json(self.item),
            "scores": list(self.scores),
            "scores_ablated": list(self.scores_ablated),
            "margin": self.margin,
            "margin_ablated": self.margin_ablated,
            "effect": self.margin - self.margin_ablated,
            "correct": _is_best(self.scores, self.encoded.gold),
            "correct_ablated": _is_best(self.scores_ablated, self.encoded.gold),
        }


def _is_best(scores: Sequence[float], gold: int) -> int:
    """1 if gold is strictly ahead; a tie is no answer."""
    return int(all(scores[gold] > score for place, score in enumerate(scores) if place != gold))


def score_items(
    model: Any,
    tokenizer: Any,
    items: Sequence[ProbeItem],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_prompt: Callable[[int], object] = lambda _: None,
) -> list[ItemResult]:
    """Margins of items.

    Args:
        model: causal language model of transformers, on its device, in its dtype.
        tokenizer: of transformers; None will do where all items are token ids.
        items: any kinds and lengths.
        batch_tokens: of the KV cache at a time.
        on_prompt: called with 1 after each prompt, of which an item has two.

    Returns:
        One result an item, in their order.

    Raises:
        ValueError: a token outside the vocabulary, prompts so long that the model changes its rotary
            frequencies, or a score that is no finite number.
    """
    encoded = [encode_item(item, tokenizer) for item in items]
    require_fixed_frequencies(model.config, max((ids.window for ids in encoded), default=0))
    for item, ids in zip(items, encoded, strict=True):
        require_known_tokens(item, ids, model.config.vocab_size)
    requests = [
        Request(prompt=prompt, candidates=ids.candidates)
        for ids in encoded
        for prompt in (ids.prompt, ids.ablated)
    ]
    scores: list[tuple[float, ...]] = [()] * len(requests)
    for position, values in score_requests(model, requests, batch_tokens=batch_tokens):
        if not np.isfinite(values).all():
            raise ValueError(
                f"the model gives a log-probability of {values} for item {items[position // 2].id!r}: "
                "its weights or its dtype are no good"
            )
        scores[position] = tuple(values)
        on_prompt(1)
    return [
        ItemResult(item=item, encoded=ids, scores=scores[2 * i], scores_ablated=scores[2 * i + 1])
        for i, (item, ids) in enumerate(zip(items, encoded, strict=True))
    ]


def require_fixed_frequencies(config: Any, longest: int) -> None:
    """Raise ValueError if rotary frequencies depend on the length read: cached keys would have others."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = str(rope.get("rope_type"))
    fixed_up_to = {
        "dynamic": getattr(config, "max_position_embeddings", None),
        "longrope": rope.get("original_max_position_embeddings"),
    }.get(kind)
    if fixed_up_to is not None and longest > fixed_up_to:
        raise ValueError(
            f"prompts of {longest:,} tokens for a model of rope_type {kind}, whose rotary frequencies "
            f"change beyond {fixed_up_to:,} tokens, so that nothing can be shared: choose shorter ones"
        )


def require_known_tokens(item: ProbeItem, ids: EncodedItem, vocabulary: int) -> None:
    """Raise ValueError for a token id that the model has no embedding of."""
    largest = max(max(row) for row in (ids.prompt, ids.ablated, *ids.candidates))
    if largest >= vocabulary:
        raise ValueError(
            f"item {item.id!r} has token {largest}, the model's vocabulary ends at {vocabulary - 1}: "
            "make the items with the tokenizer of this model"
        )
