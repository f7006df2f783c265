"""Read what prompts have in common once: where to cut them, and the KV cache of what stands before a cut.

A prompt is cut where its beginning is that of other prompts, too, so the cuts of all prompts form a tree.
A piece between two cuts is read by itself, on the cache of the pieces before it. Prompts that come in the
order of the plan walk through the tree; `PrefixCache` keeps the last path alone, so it is never
longer than one prompt.

The cuts of a prompt are decided from all prompts of a cell, also from those that other processes answer.
So the same pieces are read, one after the other, whatever part of the cell a process has, and the results
of a share are bit-identical to those of a process that has the whole cell.

Legend: N rows, L tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

Ids = tuple[int, ...]

TOKEN_BYTES = 4
LEAST_TOKENS = 64
"""Tokens from one cut to the next at least: a piece costs a pass over all weights."""
PIECE_TOKENS = 4096
"""Tokens that are read on a cache at a time; their mask takes this many bytes a token of the cache."""


class PrefixPlan:
    """Where each prompt of a cell is cut.

    A beginning that two or more prompts share ends in a cut if it is at least `LEAST_TOKENS` longer than
    the cut before it. The last token stays behind the last cut, so that every prompt has something to read
    by itself. The cuts depend on the set of prompts and not on their order. Prompts are compared as bytes,
    four a token, and only their hashes are kept: a full cell of NoLiMa has 10^8 tokens.
    """

    def __init__(self, prompts: Iterable[Sequence[int]]) -> None:
        """`prompts` are the token ids of all prompts of a cell, at least one token each."""
        ordered = sorted({_packed(prompt) for prompt in prompts})
        self._cuts: dict[bytes, Ids] = {}
        common = [_common(one, other) for one, other in pairwise(ordered)]
        # (first prompt, prompt after the last, cuts so far) of a group; not recursive: trees can be deep
        groups: list[tuple[int, int, Ids]] = [(0, len(ordered), ())]
        while groups:
            first, end, found = groups.pop()
            if end - first < 2:
                self._cuts.update((_digest(prompt), found) for prompt in ordered[first:end])
                continue
            shared = min(common[first : end - 1])
            # a prompt that is wholly inside the others is the first of them
            cut = min(shared, len(ordered[first]) // TOKEN_BYTES - 1)
            if cut - max(found, default=0) >= LEAST_TOKENS:
                found = (*found, cut)
            borders = [place + 1 for place in range(first, end - 1) if common[place] == shared]
            groups += [(*part, found) for part in pairwise([first, *borders, end])]

    def cuts(self, prompt: Sequence[int]) -> Ids:
        """Return the cuts of a prompt of the cell: ascending numbers of tokens, maybe none."""
        return self._cuts[_digest(_packed(prompt))]

    def order(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Return the positions of prompts, such that those with a common beginning are neighbors."""

        def key(position: int) -> tuple[bytes, int, bytes]:
            packed = _packed(prompts[position])
            deepest = max(self._cuts[_digest(packed)], default=0)
            return packed[: deepest * TOKEN_BYTES], -len(packed), packed

        return sorted(range(len(prompts)), key=key)

    def tokens_read(self, prompts: Sequence[Sequence[int]]) -> int:
        """Return how many tokens are read if these prompts come in order."""
        count = 0
        beginnings: set[bytes] = set()
        for prompt in prompts:
            cuts, packed = self.cuts(prompt), _packed(prompt)
            count += len(prompt) - max(cuts, default=0)
            for before, cut in pairwise((0, *cuts)):
                digest = _digest(packed[: cut * TOKEN_BYTES])
                count += (cut - before) * (digest not in beginnings)
                beginnings.add(digest)
        return count


def _packed(prompt: Sequence[int]) -> bytes:
    """Return token ids as bytes that are sorted as the ids are."""
    return np.asarray(prompt, dtype=">u4").tobytes()


def _digest(packed: bytes) -> bytes:
    return hashlib.sha256(packed).digest()


def _common(one: bytes, other: bytes) -> int:
    """Return how many tokens two packed prompts have in common at their beginning."""
    shorter = min(len(one), len(other)) // TOKEN_BYTES
    a, b = (np.frombuffer(packed, dtype=">u4", count=shorter) for packed in (one, other))
    unlike = np.flatnonzero(a != b)
    return int(unlike[0]) if unlike.size else shorter


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows have in common at their beginning."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def best_split(rows: Sequence[Ids], most: int) -> int:
    """Find where to cut sorted rows once, so that most tokens are read once.

    Args:
        rows: [N], sorted.
        most: longest beginning that may be cut off.

    Returns:
        Tokens of the beginning, 0 to `most`.
    """
    common = [min(most, common_tokens(one, other)) for one, other in pairwise(rows)]
    saved = {split: split * sum(tokens >= split for tokens in common) for split in {0, *common}}
    return max(saved, key=lambda split: (saved[split], -split))


def read(model: Any, rows: Sequence[Ids], cache: Any, piece: int) -> tuple[Tensor, Any]:
    """Append rows [N, L] to a cache of as many rows, in pieces.

    Args:
        model: causal language model of transformers.
        rows: of equal length, at least one token.
        cache: of the model; None for an empty one.
        piece: tokens of a row that are read at a time.

    Returns:
        Logits [N, V] of the last tokens, and the cache.
    """
    ids = torch.tensor(rows, dtype=torch.long, device=model.device)
    logits = None
    for part in torch.split(ids, max(1, piece), dim=1):
        found = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = found.logits[:, -1], found.past_key_values
    assert logits is not None
    return logits, cache


def select_rows(cache: Any, rows: Sequence[int], model: Any) -> None:
    """Replace row i of the cache by its row `rows[i]`."""
    cache.batch_select_indices(torch.tensor(rows, dtype=torch.long, device=model.device))


def can_share(model: Any) -> bool:
    """Return whether a beginning can be cut out of the model's cache: every layer must keep all tokens.

    A layer with a sliding window forgets them, one with a recurrent state cannot go back. Of models whose
    `forward` takes no cache (RWKV, GPT-1) the config says nothing of that.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    taken = inspect.signature(type(model).forward).parameters
    if not {"past_key_values", "logits_to_keep"} <= taken.keys():
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def fixed_frequency_positions(config: Any) -> int | None:
    """Positions up to which rotary frequencies do not depend on the prompt's length; None for no limit.

    Beyond them the KV cache of a beginning is not that of the same tokens in a longer prompt.

    Args:
        config: of a model of transformers.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    limits: dict[str, int | None] = {
        "dynamic": getattr(config, "max_position_embeddings", None),
        "longrope": rope.get("original_max_position_embeddings"),
    }
    return limits.get(str(rope.get("rope_type")))


class PrefixCache:
    """The KV cache of the last path through the tree of cuts."""

    def __init__(self, model: Any) -> None:
        """`model` is a causal language model of transformers for which `can_share` holds."""
        self.model = model
        self.tokens = 0
        """Tokens that were read so far."""
        self.forget()

    def forget(self) -> None:
        """Free the memory."""
        self._ids: Ids = ()
        self._cuts: Ids = ()
        self._layers: list[tuple[Tensor, Tensor]] = []

    def of(self, prompt: Ids, cuts: Ids, *, rows: int = 1) -> Any:
        """Return a new cache of the prompt up to its last cut; None if there are no cuts.

        Args:
            prompt: token ids.
            cuts: of this prompt, by `PrefixPlan.cuts`.
            rows: of the cache, all alike.
        """
        if not cuts:
            return None
        kept = 0
        for own, cut in zip(self._cuts, cuts, strict=False):
            if own != cut or self._ids[:cut] != prompt[:cut]:
                break
            kept += 1
        if kept < len(cuts):
            start = cuts[kept - 1] if kept else 0
            cache: Any = self._copy(start, 1) if start else None
            for cut in cuts[kept:]:
                cache = self.extend(cache, prompt[start:cut])
                start = cut
            self._layers = [(layer.keys, layer.values) for layer in cache.layers]
            self._ids, self._cuts = prompt[: cuts[-1]], cuts
        return self._copy(cuts[-1], rows)

    def extend(self, cache: Any, ids: Ids) -> Any:
        """Read more of one prompt on a cache of one row, and return the cache."""
        self.tokens += len(ids)
        # without a cache no mask is needed, so the piece is read at once, as it would be without cuts
        return read(self.model, [ids], cache, PIECE_TOKENS if cache is not None else len(ids))[1]

    def _copy(self, tokens: int, rows: int) -> Any:
        """Copy the first tokens; keys and values are [1, heads, L, head size]."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for number, (keys, values) in enumerate(self._layers):
            cache.update(
                keys[:, :, :tokens].expand(rows, -1, -1, -1),
                values[:, :, :tokens].expand(rows, -1, -1, -1),
                number,
            )
        return cache


def stack(model: Any, caches: Sequence[Any]) -> Any:
    """Join caches of one row, padded at the left; they are emptied layer by layer, to save memory."""
    from transformers import DynamicCache

    longest = max(cache.get_seq_length() for cache in caches)
    joined = DynamicCache(config=model.config)
    for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys = torch.cat([_padded(layer.keys, longest) for layer in layers])
        values = torch.cat([_padded(layer.values, longest) for layer in layers])
        joined.update(keys, values, number)
        for layer in layers:
            layer.reset()
    return joined


def _padded(tensor: Tensor, tokens: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, tokens - tensor.shape[-2], 0))
