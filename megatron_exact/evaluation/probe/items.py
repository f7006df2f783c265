"""One question of the probe: a prompt with evidence, the same without, and the answers to choose from.

A file of items holds one JSON object a line. Prompts and answers are text or lists of token ids; only ids
say exactly where a token ends, so that our own items give prompts as ids. Text of a prompt is encoded with
what the tokenizer puts at a start (BOS), text of an answer alone, and it brings its own leading space.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.json_input import read_json_lines

KIND = re.compile(r"[a-z0-9][a-z0-9-]*")
TextOrIds = str | tuple[int, ...]
NEEDED = ("id", "kind", "distance", "context", "prompt", "prompt_ablated", "gold", "candidates")


@dataclass(frozen=True, kw_only=True, order=True)
class ProbeCell:
    """Items of one kind at one place of the grid."""

    kind: str
    """Such as `field-lookup`."""
    distance: int
    """Tokens from the last evidence token to the first answer token: 1 where they are neighbours."""
    context: int
    """Tokens of the prompt, which all stand before the answer."""

    def __str__(self) -> str:
        return f"{self.kind}/{self.distance}/{self.context}"


@dataclass(frozen=True, kw_only=True)
class ProbeItem:
    """One question."""

    id: str
    """Unique inside its kind, and the same for every model."""
    kind: str
    """Lower-case letters, digits and hyphens: the name of the results file."""
    distance: int
    """As in `ProbeCell`; of items made elsewhere a label that is not checked."""
    context: int
    """As in `ProbeCell`; of items made elsewhere a label that is not checked."""
    prompt: TextOrIds
    """With the evidence; it ends right before the answer."""
    prompt_ablated: TextOrIds
    """The same with filler, or another sentence of the kind, in the place of the evidence."""
    gold: TextOrIds
    """The right answer, one of `candidates`."""
    candidates: tuple[TextOrIds, ...]
    """Two or more different answers."""
    competitor: TextOrIds
    """The answer that the margin compares with: another one of `candidates`."""

    def __post_init__(self) -> None:
        if not KIND.fullmatch(self.kind):
            raise ValueError(f"kind {self.kind!r} of item {self.id!r}: use a-z, 0-9 and hyphens")
        if min(self.distance, self.context) < 0:
            raise ValueError(f"item {self.id!r} has a distance or context below 0")
        if not all([self.prompt, self.prompt_ablated, *self.candidates]):
            raise ValueError(f"item {self.id!r} has an empty prompt or candidate")
        if len(set(self.candidates)) != len(self.candidates):
            raise ValueError(f"item {self.id!r} has a candidate twice")
        if self.gold not in self.candidates or self.competitor not in self.candidates:
            raise ValueError(f"item {self.id!r}: gold and competitor must be among the candidates")
        if self.gold == self.competitor:
            raise ValueError(f"item {self.id!r}: its competitor is gold")

    @property
    def cell(self) -> ProbeCell:
        """Where it counts."""
        return ProbeCell(kind=self.kind, distance=self.distance, context=self.context)


@dataclass(frozen=True, kw_only=True)
class EncodedItem:
    """An item in token ids."""

    prompt: tuple[int, ...]
    """With the evidence."""
    ablated: tuple[int, ...]
    """Without."""
    candidates: tuple[tuple[int, ...], ...]
    """In the order of the item."""
    gold: int
    """Position among the candidates."""
    competitor: int
    """Position among the candidates."""

    @property
    def window(self) -> int:
        """Positions that a model needs: the last token of an answer is predicted, never read."""
        return max(len(self.prompt), len(self.ablated)) + max(map(len, self.candidates)) - 1

    @property
    def sha256(self) -> str:
        """Of everything that decides the result."""
        return ids_sha256(
            self.prompt, self.ablated, *self.candidates, (len(self.candidates), self.gold, self.competitor)
        )

    @property
    def prompt_sha256(self) -> str:
        """Of the prompt's ids."""
        return ids_sha256(self.prompt)


def encode_item(item: ProbeItem, tokenizer: Any) -> EncodedItem:
    """Token ids of an item.

    Args:
        item: text or ids.
        tokenizer: of transformers; None will do where everything is ids.

    Raises:
        ValueError: text without a tokenizer, or an answer that has no tokens or those of another one.
    """
    candidates = tuple(_ids(answer, tokenizer, is_prompt=False) for answer in item.candidates)
    if not all(candidates) or len(set(candidates)) != len(candidates):
        raise ValueError(f"candidates of item {item.id!r} have no tokens, or the tokens of each other")
    return EncodedItem(
        prompt=_ids(item.prompt, tokenizer, is_prompt=True),
        ablated=_ids(item.prompt_ablated, tokenizer, is_prompt=True),
        candidates=candidates,
        gold=item.candidates.index(item.gold),
        competitor=item.candidates.index(item.competitor),
    )


def _ids(value: TextOrIds, tokenizer: Any, *, is_prompt: bool) -> tuple[int, ...]:
    if not isinstance(value, str):
        return value
    if tokenizer is None:
        raise ValueError("an item is text: give a tokenizer, or token ids")
    return tuple(tokenizer.encode(value, add_special_tokens=is_prompt))


def ids_sha256(*rows: Sequence[int]) -> str:
    """Hex sha256 of rows of ids: of each its length and its ids, 8 bytes a number, little-endian."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.array([len(row), *row], dtype="<i8").tobytes())
    return digest.hexdigest()


def read_items(path: str | Path) -> list[ProbeItem]:
    """Items of a JSONL file.

    Raises:
        ValueError: a line that is no item, an id that comes twice in its kind, or no line.
    """
    items: list[ProbeItem] = []
    seen: set[tuple[str, str]] = set()
    for place, content in read_json_lines(path, "an item of the probe is one JSON object a line"):
        try:
            item = item_from_json(content)
            if (item.kind, item.id) in seen:
                raise ValueError(f"id {item.id!r} comes twice in {item.kind}")
        except (ValueError, TypeError, KeyError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{place} is no item of the probe: {reason}") from error
        seen.add((item.kind, item.id))
        items.append(item)
    if not items:
        raise ValueError(f"{path} holds no items")
    return items


def item_from_json(content: Any) -> ProbeItem:
    """An item from the object of a line; without a `competitor` the first other candidate is it."""
    if not isinstance(content, dict):
        raise TypeError("not an object")
    unknown = set(content) - {*NEEDED, "competitor"}
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r}")
    for key in ("id", "kind"):
        if not isinstance(content[key], str):
            raise TypeError(f"{key} {content[key]!r} is no text")
    for key in ("distance", "context"):
        if type(content[key]) is not int:
            raise TypeError(f"{key} {content[key]!r} is no whole number")
    if not isinstance(content["candidates"], list):
        raise TypeError("candidates is no list")
    candidates = tuple(_text_or_ids(value, "candidate") for value in content["candidates"])
    gold = _text_or_ids(content["gold"], "gold")
    others = [candidate for candidate in candidates if candidate != gold]
    if not others:
        raise ValueError("fewer than two candidates")
    return ProbeItem(
        id=content["id"],
        kind=content["kind"],
        distance=content["distance"],
        context=content["context"],
        prompt=_text_or_ids(content["prompt"], "prompt"),
        prompt_ablated=_text_or_ids(content["prompt_ablated"], "prompt_ablated"),
        gold=gold,
        candidates=candidates,
        competitor=_text_or_ids(content.get("competitor", others[0]), "competitor"),
    )


def _text_or_ids(value: Any, name: str) -> TextOrIds:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(type(token) is int and token >= 0 for token in value):
        return tuple(value)
    raise TypeError(f"{name} is neither text nor a list of token ids")


def item_to_json(item: ProbeItem) -> dict[str, Any]:
    """The object of a line."""
    return {
        **{key: getattr(item, key) for key in NEEDED[:4]},
        **{key: _plain(getattr(item, key)) for key in ("prompt", "prompt_ablated", "gold")},
        "candidates": [_plain(candidate) for candidate in item.candidates],
        "competitor": _plain(item.competitor),
    }


def answers_to_json(item: ProbeItem) -> dict[str, Any]:
    """The part of an item that goes into its result."""
    kept = ("gold", "candidates", "competitor")
    return {key: value for key, value in item_to_json(item).items() if key in kept}


def _plain(value: TextOrIds) -> str | list[int]:
    return value if isinstance(value, str) else list(value)


def lines_of(items: Sequence[ProbeItem]) -> str:
    """Text of an items file."""
    return "".join(json.dumps(item_to_json(item)) + "\n" for item in items)
