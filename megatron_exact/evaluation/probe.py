"""The evidence probe (`tools/probe_evidence.py`): does evidence at a distance make the right answer
likelier?

It scores the items of `probe_items.py` with one model, cell by cell, into a result folder. What prompts
have in common is computed once. Prompts of one length form a batch, so padding and masks are not needed. In
sorted order prompts with a common beginning are neighbors: the two of an item up to its evidence, and all
items of one text. A batch runs in three steps, each on the KV cache of the one before:

    distinct beginnings  [distinct, split]
    rest of each prompt  [N, L - split]   the last logits score the first token of every candidate
    longer candidates    [candidates of more than one token, most tokens - 1]   padded on the right, which
                                          nothing before it sees

The split is the one that saves most tokens. Legend: N prompts, L tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_exact.command_line import progress_bar
from megatron_exact.evaluation.engine import (
    Backend,
    load_tokenizer,
    max_positions,
    model_identity,
    read_provenance,
    require_model_folder,
    resolve,
)
from megatron_exact.evaluation.probe_items import (
    EncodedItem,
    Ids,
    ProbeItem,
    ProbeOptions,
    encode_item,
    ids_sha256,
)
from megatron_exact.evaluation.result_folders import (
    FORMAT_VERSION,
    PROBE,
    PROBE_FOLDER,
    ProbeCell,
    cell_of,
    read_probe_results,
    require_same_probe,
    write_probe_results,
)
from megatron_exact.evaluation.shared_prefixes import (
    best_split,
    fixed_frequency_positions,
    read,
    select_rows,
)
from megatron_exact.files import write_json
from megatron_exact.folder_lock import held_output

BATCH_TOKENS = 65_536
"""Tokens of the KV cache at a time: 8 GiB for Llama-3.1-8B in bf16."""
MOST_ROWS = 256
"""Most prompts in a batch, to limit the logits, [256, V] in fp32, where prompts are short."""


@dataclass(frozen=True, kw_only=True)
class CellSummary:
    """Means of a finished cell."""

    cell: ProbeCell
    """The cell."""
    items: int
    """Number of items."""
    margin: float
    """Mean margin with the evidence, nats."""
    margin_ablated: float
    """The same without the evidence."""
    correct: float
    """Share of right answers with the evidence, 0..1."""
    correct_ablated: float
    """The same without the evidence."""
    is_new: bool
    """Whether this call computed it; False if an earlier call had."""


class Probe:
    """One probe of one model; `run` does the work."""

    def __init__(
        self,
        model: str | Path,
        results: str | Path,
        options: ProbeOptions,
        *,
        backend: Backend | None = None,
        batch_tokens: int = BATCH_TOKENS,
        allow_beyond_positions: bool = False,
    ) -> None:
        """Make the items and check everything that can be checked before the model is loaded.

        Args:
            model: Hugging Face folder.
            results: folder to write, or to resume.
            options: which items to make.
            backend: device and dtype of the model.
            batch_tokens: tokens of the KV cache at a time.
            allow_beyond_positions: whether items may exceed the model's max_position_embeddings.

        Raises:
            ValueError: a missing model or device, items that cannot be made or do not fit the model, or a
                folder with the probe of another model or other items.
        """
        self.model, self.results = Path(model), Path(results)
        self.batch_tokens = batch_tokens
        require_model_folder(self.model)
        self.how = resolve(backend or Backend(), self.model)
        identity = model_identity(self.model)
        self.tokenizer = load_tokenizer(self.model)
        positions = None if allow_beyond_positions else max_positions(self.model)
        self.source = options.item_source(self.tokenizer, positions)
        self.counts, digest = self._count(positions)
        kinds: dict[str, int] = {}
        for cell, count in self.counts.items():
            kinds[cell.kind] = kinds.get(cell.kind, 0) + count
        self.info: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": identity,
            "provenance": read_provenance(self.model),
            "options": options.record(),
            "items": {"sha256": digest, "kinds": kinds},
            "dtype": self.how.dtype,
        }
        require_same_probe(self.results, self.info)

    def _count(self, positions: int | None) -> tuple[dict[ProbeCell, int], str]:
        """Count the items of every cell, check that each fits the model, and hash them all."""
        counts: dict[ProbeCell, int] = {}
        digest = hashlib.sha256()
        with progress_bar("items", len(self.source), "cell") as bar:
            for cell, make in self.source.items():
                items = make()
                for item in items:
                    encoded = encode_item(item, self.tokenizer)
                    if positions is not None and encoded.window > positions:
                        raise ValueError(
                            f"item {item.id!r} of {cell} takes {encoded.window:,} positions, the model's "
                            f"max_position_embeddings is {positions:,}: choose shorter ones, or "
                            "--allow-beyond-positions to extrapolate"
                        )
                    digest.update(f"{cell}/{item.id} {encoded.sha256}\n".encode())
                counts[cell] = len(items)
                bar.update()
        return counts, digest.hexdigest()

    def run(self, on_cell: Callable[[CellSummary], object] = lambda _: None) -> list[CellSummary]:
        """Score every missing cell and call `on_cell` after each.

        Raises:
            ValueError: a damaged result, a score that is not finite, or another call works on this probe.
        """
        self.results.mkdir(parents=True, exist_ok=True)
        with held_output(self.results / PROBE_FOLDER, "evaluating it", "choose another --output"):
            require_same_probe(self.results, self.info)
            return self._run(on_cell)

    def _run(self, on_cell: Callable[[CellSummary], object]) -> list[CellSummary]:
        self._write_record(finished=False)
        done = {kind: read_probe_results(self.results, kind) for kind in self.info["items"]["kinds"]}
        found = []
        tokens = 2 * sum(count * cell.context for cell, count in self.counts.items())
        with progress_bar("probe", tokens, " tokens") as bar:
            for cell, count in self.counts.items():
                there = [result for result in done[cell.kind] if cell_of(result) == cell]
                is_new = len(there) != count
                if is_new:
                    there = self._score(cell, partial(_add_prompts, bar, cell.context))
                    done[cell.kind] += there
                    write_probe_results(self.results, cell.kind, done[cell.kind])
                else:
                    bar.update(2 * count * cell.context)
                found.append(_summary(cell, there, is_new))
                on_cell(found[-1])
        self._write_record(finished=True)
        return found

    def _score(self, cell: ProbeCell, on_prompt: Callable[[int], object]) -> list[dict[str, Any]]:
        scored = score_items(
            self.loaded,
            self.tokenizer,
            self.source[cell](),
            batch_tokens=self.batch_tokens,
            on_prompt=on_prompt,
        )
        return [result.to_json() for result in scored]

    def _write_record(self, *, finished: bool) -> None:
        about = {
            "backend": {"device": self.how.device, "batch_tokens": self.batch_tokens},
            "versions": self.how.versions,
        }
        write_json(self.results / PROBE, {**self.info, **about, "finished": finished})

    @cached_property
    def loaded(self) -> Any:
        """The model, loaded when the first cell needs it."""
        from transformers import AutoModelForCausalLM

        from megatron_exact.low_precision import widen_products

        model = AutoModelForCausalLM.from_pretrained(
            self.model, dtype=self.how.dtype, trust_remote_code=False, local_files_only=True
        )
        model = model.to(self.how.device).eval()
        widen_products(model)
        return model


def _add_prompts(bar: Any, context: int, prompts: int) -> None:
    bar.update(prompts * context)


def _summary(cell: ProbeCell, results: list[dict[str, Any]], is_new: bool) -> CellSummary:
    measures = ("margin", "margin_ablated", "correct", "correct_ablated")
    means = {name: sum(result[name] for result in results) / len(results) for name in measures}
    return CellSummary(cell=cell, items=len(results), is_new=is_new, **means)


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """The scores of an item under a model."""

    item: ProbeItem
    """The item."""
    encoded: EncodedItem
    """Token ids of the item."""
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
        """log p(gold) - log p(competitor) without the evidence."""
        return self.scores_ablated[self.encoded.gold] - self.scores_ablated[self.encoded.competitor]

    def to_json(self) -> dict[str, Any]:
        """Return the object of the results file."""
        return {
            "id": self.item.id,
            "kind": self.item.kind,
            "distance": self.item.distance,
            "context": self.item.context,
            "prompt_tokens": len(self.encoded.prompt),
            "prompt_sha256": ids_sha256(self.encoded.prompt),
            "item_sha256": self.encoded.sha256,
            **{name: value for name in ("form", "filler") if (value := getattr(self.item, name))},
            **{name: getattr(self.item, name) for name in ("gold", "candidates", "competitor")},
            "scores": list(self.scores),
            "scores_ablated": list(self.scores_ablated),
            "margin": self.margin,
            "margin_ablated": self.margin_ablated,
            "effect": self.margin - self.margin_ablated,
            "correct": _is_best(self.scores, self.encoded.gold),
            "correct_ablated": _is_best(self.scores_ablated, self.encoded.gold),
        }


def _is_best(scores: Sequence[float], gold: int) -> int:
    """Return 1 if gold is strictly ahead, else 0; a tie does not count as an answer."""
    return int(all(scores[gold] > score for place, score in enumerate(scores) if place != gold))


def score_items(
    model: Any,
    tokenizer: Any,
    items: Sequence[ProbeItem],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_prompt: Callable[[int], object] = lambda _: None,
) -> list[ItemResult]:
    """Compute the margins of items.

    Args:
        model: causal language model of transformers, on its device, in its dtype.
        tokenizer: tokenizer of transformers; may be None where all items are token ids.
        items: items of any kinds and lengths.
        batch_tokens: tokens of the KV cache at a time.
        on_prompt: called with 1 after each prompt, of which an item has two.

    Returns:
        One result for each item, in their order.

    Raises:
        ValueError: a token outside the vocabulary, prompts so long that the model changes its rotary
            frequencies, or a score that is not finite.
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
                "check its weights and its dtype"
            )
        scores[position] = tuple(values)
        on_prompt(1)
    return [
        ItemResult(item=item, encoded=ids, scores=scores[2 * i], scores_ablated=scores[2 * i + 1])
        for i, (item, ids) in enumerate(zip(items, encoded, strict=True))
    ]


def require_fixed_frequencies(config: Any, longest: int) -> None:
    """Raise ValueError if rotary frequencies depend on the prompt's length, so that caches do not fit."""
    fixed_up_to = fixed_frequency_positions(config)
    if fixed_up_to is not None and longest > fixed_up_to:
        raise ValueError(
            f"prompts of {longest:,} tokens for a model of rope_type "
            f"{config.rope_parameters['rope_type']}, whose rotary frequencies change beyond "
            f"{fixed_up_to:,} tokens, so that nothing can be shared: choose shorter ones"
        )


def require_known_tokens(item: ProbeItem, ids: EncodedItem, vocabulary: int) -> None:
    """Raise ValueError for a token id without an embedding in the model."""
    largest = max(max(row) for row in (ids.prompt, ids.ablated, *ids.candidates))
    if largest >= vocabulary:
        raise ValueError(
            f"item {item.id!r} has token {largest}, the model's vocabulary ends at {vocabulary - 1}: "
            "make the items with the tokenizer of this model"
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and its candidate continuations."""

    prompt: Ids
    """Ids of the prompt, at least one."""
    candidates: tuple[Ids, ...]
    """Ids of each candidate, at least one."""

    @property
    def rows(self) -> int:
        """Most rows of the KV cache that the request needs."""
        return sum(len(candidate) > 1 for candidate in self.candidates) or 1


def score_requests(
    model: Any, requests: Sequence[Request], *, batch_tokens: int
) -> Iterator[tuple[int, Any]]:
    """Score requests, not in the given order.

    Args:
        model: causal language model of transformers.
        requests: requests in any order, of any lengths.
        batch_tokens: tokens of the KV cache at a time; longer prompts are read in pieces of this size.

    Yields:
        (position in `requests`, log p of each candidate summed over its tokens: list of float).
    """
    for batch in batches(requests, batch_tokens):
        chosen = [requests[position] for position in batch]
        with torch.inference_mode():
            scores = _score_batch(model, chosen, batch_tokens)
        yield from zip(batch, scores, strict=True)


def batches(requests: Sequence[Request], batch_tokens: int) -> Iterator[list[int]]:
    """Yield positions of requests of one length, neighbors in sorted order, as many as fit the cache."""
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


def _score_batch(model: Any, requests: Sequence[Request], batch_tokens: int) -> list[list[float]]:
    prompts = [request.prompt for request in requests]
    split = best_split(prompts, len(prompts[0]) - 1)
    cache = None
    if split:
        beginnings = sorted({prompt[:split] for prompt in prompts})
        place = {beginning: row for row, beginning in enumerate(beginnings)}
        _, cache = read(model, beginnings, None, batch_tokens // len(beginnings))
        select_rows(cache, [place[prompt[:split]] for prompt in prompts], model)
    logits, cache = read(model, [prompt[split:] for prompt in prompts], cache, batch_tokens // len(prompts))
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
        select_rows(cache, [row for row, _ in longer], model)
        answers = [requests[row].candidates[column] for row, column in longer]
        for (row, column), value in zip(longer, _later_tokens(model, answers, cache), strict=True):
            scores[row][column] += value
    return scores


def _later_tokens(model: Any, answers: Sequence[Ids], cache: Any) -> list[float]:
    """Sum log p of the second and later tokens of answers, one answer for each row of the cache."""
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
