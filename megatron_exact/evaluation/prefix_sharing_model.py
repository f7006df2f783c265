"""lm-eval's Hugging Face model, which reads the common beginnings of a cell's prompts once.

lm-eval reads every prompt from its first token, and the context of a question again for each choice. Here
`plan_cell` is given the requests of a whole cell first. Where a `PrefixPlan` saves enough, prompts are
answered in its order: each starts from the KV cache of its beginning. Everything else is lm-eval's own:
tokens, generation, stop texts, the dtype of log-probabilities.

Memory: the KV cache of one prompt more than lm-eval's batch, and for likelihoods the choices of one batch.
Answers: with a batch size of 1 nothing depends on which other requests a process answers. Against lm-eval's
own reading sums come in another order, as they do between two batch sizes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched, groupby
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from megatron_exact.command_line import progress_bar
from megatron_exact.evaluation.shared_prefixes import (
    Ids,
    PrefixCache,
    PrefixPlan,
    best_split,
    can_share,
    fixed_frequency_positions,
    read,
    select_rows,
    stack,
)

LEAST_SAVED = 0.25
"""Share of a cell's tokens that must be saved: below it, masks and small pieces may cost more."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """A context of one document and the continuations whose likelihoods are asked for."""

    ids: Ids
    """Tokens of the context, at least one."""
    inputs: tuple[Ids, ...]
    """Distinct inputs, sorted: the context with all but the last token of a continuation."""
    requests: tuple[tuple[int, Ids, Ids], ...]
    """Position of the request, its input, and its continuation."""

    @classmethod
    def of(cls, ids: Ids, continuations: Sequence[tuple[int, Ids]]) -> Context:
        """Return the context with (position of the request, tokens) of its continuations."""
        requests = tuple((place, (*ids, *tokens[:-1]), tokens) for place, tokens in continuations)
        return cls(ids=ids, inputs=tuple(sorted({row for _, row, _ in requests})), requests=requests)


class PrefixSharingModel(HFLM):  # type: ignore[misc]
    """`HFLM`, whose arguments it takes; without `plan_cell` it is the same model."""

    def __init__(self, *arguments: Any, shares_prefixes: bool = True, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._can_share = shares_prefixes and can_share(self.model)
        self._prefixes = PrefixCache(self.model)
        self._plan: PrefixPlan | None = None
        self._documents: list[int] = []
        self.tokens_saved = 0
        """Tokens of the cell that need not be read a second time, if one process answers all of it."""

    def plan_cell(self, requests: Sequence[Any]) -> None:
        """Plan the requests of a cell, also those that other processes answer.

        Args:
            requests: instances of lm-eval, all of one kind.
        """
        self._prefixes.forget()
        self._plan, self.tokens_saved = None, 0
        if not (requests and self._can_share):
            return
        if requests[0].request_type == "generate_until":
            prompts: Sequence[Sequence[int]] = [self._stored_prompt_of(request) for request in requests]
            room = max(int(request.args[1]["max_gen_toks"]) for request in requests)
            total, more = sum(map(len, prompts)), 0
        else:
            contexts = _contexts(
                [self._pair_of(request) for request in requests], [request.doc_id for request in requests]
            )
            prompts = [context.ids for context in contexts]
            total = sum(len(row) for context in contexts for row in context.inputs)
            more = total - sum(len(context.ids) * len(context.inputs) for context in contexts)
            room = max(len(row) - len(context.ids) for context in contexts for row in context.inputs)
        limit = fixed_frequency_positions(self.model.config)
        if limit is not None and max(map(len, prompts)) + room > limit:
            return
        plan = PrefixPlan(prompts)
        saved = total - more - plan.tokens_read(prompts)
        if saved >= LEAST_SAVED * total:
            self._plan, self.tokens_saved = plan, saved

    def _prompt_of(self, request: Any) -> Ids:
        return tuple(self.tok_batch_encode([request.args[0]])[0][0].tolist())

    def _stored_prompt_of(self, request: Any) -> Sequence[int]:
        """Encode a prompt into four bytes a token, where those of a whole cell are in memory."""
        return array("I", self._prompt_of(request))

    def _pair_of(self, request: Any) -> tuple[Ids, Ids]:
        """Encode a context and its continuation as `HFLM.loglikelihood` does.

        Raises:
            ValueError: a continuation that adds no token to its context, which lm-eval cannot score either.
        """
        context, continuation = request.args
        if context:
            ids, more = self._encode_pair(context, continuation)
        else:
            ids, more = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            more = more[1:] if more[:1] == ids else more
        if not more:
            raise ValueError(
                f"document {request.doc_id}: the choice {continuation!r} adds no token to its context "
                f"{context[-40:]!r}, so it has no likelihood: check the choices of this record"
            )
        return tuple(ids), tuple(more)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer requests; with a plan, in its order."""
        plan = self._plan
        if plan is None:
            plain: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
            return plain
        order = plan.order([self._stored_prompt_of(request) for request in requests])
        answers = [""] * len(requests)
        with progress_bar("generating", len(requests), "prompt") as bar:
            for batch in batched(order, self.batch_size):
                found = super().generate_until([requests[place] for place in batch], disable_tqdm=True)
                for place, answer in zip(batch, found, strict=True):
                    answers[place] = answer
                bar.update(len(batch))
        return answers

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """Generate after prompts [batch, L], padded at the left; the cache has all but their last token."""
        if self._plan is not None:
            masks = generation_kwargs["attention_mask"].bool()
            with torch.no_grad():
                caches = [
                    self._cache_before_last(tuple(row[mask].tolist()))
                    for row, mask in zip(context, masks, strict=True)
                ]
                generation_kwargs["past_key_values"] = (
                    caches[0] if len(caches) == 1 else stack(self.model, caches)
                )
        generated: Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
        return generated

    def _cache_before_last(self, prompt: Ids) -> Any:
        assert self._plan is not None
        cuts = self._plan.cuts(prompt)
        cache = self._prefixes.of(prompt, cuts)
        rest = prompt[max(cuts, default=0) : -1]
        return self._prefixes.extend(cache, rest) if rest else cache

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score requests; with a plan, in its order."""
        self._documents = [request.doc_id for request in requests]
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return log-likelihood of each continuation, and whether greedy generation would give it."""
        if self._plan is None:
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
            return found
        contexts = _contexts(
            [(tuple(context), tuple(more)) for _, context, more in requests], self._documents
        )
        plan = self._plan
        ordered = [contexts[place] for place in plan.order([context.ids for context in contexts])]
        answers: dict[int, tuple[float, bool]] = {}
        with progress_bar("scoring", len(requests), "choice") as bar, torch.no_grad():
            for _, group in groupby(ordered, key=lambda c: c.ids[: max(plan.cuts(c.ids), default=0)]):
                for batch in batched(group, self.batch_size):
                    answers |= self._score(batch, plan.cuts(batch[0].ids))
                    bar.update(len(answers) - bar.n)
        return [answers[place] for place in range(len(requests))]

    def _score(self, contexts: Sequence[Context], cuts: Ids) -> dict[int, tuple[float, bool]]:
        """Score contexts that have the same last cut, by position of the request.

        Their inputs are read in three steps: up to the cut, up to where most of them still share something,
        and the rest, padded at the right, which nothing before it sees.
        """
        start = max(cuts, default=0)
        inputs = sorted({row for context in contexts for row in context.inputs})
        rows = [row[start:] for row in inputs]
        most = min(len(context.ids) for context in contexts) - 1 - start
        split = best_split(rows, most)
        if split:
            beginnings = sorted({row[:split] for row in rows})
            cache = self._prefixes.of(contexts[0].ids, cuts, rows=len(beginnings))
            _, cache = read(self.model, beginnings, cache, split)
            select_rows(cache, [beginnings.index(row[:split]) for row in rows], self.model)
        else:
            cache = self._prefixes.of(contexts[0].ids, cuts, rows=len(rows))
        width = max(map(len, rows)) - split
        padded = [(*row[split:], *[0] * (width + split - len(row))) for row in rows]
        first = most - split  # the first position whose logits are asked for
        logits = self.model(
            input_ids=torch.tensor(padded, dtype=torch.long, device=self.model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=width - first,
        ).logits  # [rows, width - first, V]
        places = {row: place for place, row in enumerate(inputs)}
        answers = {}
        for context in contexts:
            for position, row, tokens in context.requests:
                end = len(row) - start - split - first
                own = F.log_softmax(
                    logits[places[row], end - len(tokens) : end], dim=-1, dtype=self.softmax_dtype
                )
                chosen = torch.tensor(tokens, dtype=torch.long, device=own.device)
                is_greedy = bool((own.argmax(dim=-1) == chosen).all())
                answers[position] = (float(own.gather(1, chosen[:, None]).sum()), is_greedy)
        return answers


def _contexts(pairs: Sequence[tuple[Ids, Ids]], documents: Sequence[int]) -> list[Context]:
    """Group (context, continuation) pairs by their documents and contexts.

    Documents with the same context (WinoGrande's twins) stay apart: the rows that are read together would
    otherwise depend on which documents are in a share.
    """
    found: dict[tuple[int, Ids], list[tuple[int, Ids]]] = {}
    for position, ((context, continuation), document) in enumerate(zip(pairs, documents, strict=True)):
        found.setdefault((document, context), []).append((position, continuation))
    return [Context.of(context, continuations) for (_, context), continuations in found.items()]
