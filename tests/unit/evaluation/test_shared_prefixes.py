"""Where prompts are cut, against a count of all their beginnings."""

from __future__ import annotations

import random

import pytest

from megatron_exact.evaluation import shared_prefixes
from megatron_exact.evaluation.shared_prefixes import PrefixPlan


@pytest.mark.parametrize("seed", range(20))
def test_each_beginning_is_read_once_if_every_token_is_worth_a_cut(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefixes, "LEAST_TOKENS", 1)
    draw = random.Random(seed)
    # few different tokens, and an end of its own, so that no prompt is inside another
    prompts = [
        (*draw.choices((1, 2, 70_000), k=draw.randrange(9)), 100 + number) for number in range(1 + 3 * seed)
    ]
    plan = PrefixPlan(prompts)
    beginnings = {prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)}
    assert plan.tokens_read(prompts) == len(beginnings)
    again = PrefixPlan(draw.sample(prompts, len(prompts)))
    assert [again.cuts(prompt) for prompt in prompts] == [plan.cuts(prompt) for prompt in prompts]


def test_cuts_are_worth_their_pieces() -> None:
    long, least = tuple(range(300)), shared_prefixes.LEAST_TOKENS
    prompts = [
        (*long[:200], 7, 7),
        (*long[:200], 8),
        (*long[: 200 + least], 9),
        (*long[: 200 + least], 10, 5),
        (*long[: least - 1], 3),
    ]
    plan = PrefixPlan(prompts)
    assert [plan.cuts(prompt) for prompt in prompts] == [
        (200,),
        (200,),
        (200, 200 + least),
        (200, 200 + least),
        (),
    ]
    assert plan.tokens_read(prompts) == 200 + 2 + 1 + least + 1 + 2 + least
    assert plan.tokens_read(prompts[:2]) == 203
    same = PrefixPlan([long, long])
    assert same.cuts(long) == ()  # one prompt, twice
    order = plan.order(prompts)
    assert order.index(2) - order.index(3) in (1, -1)
    assert order.index(0) - order.index(1) in (1, -1)


def test_a_prompt_inside_another_keeps_its_last_token() -> None:
    long = tuple(range(300))
    plan = PrefixPlan([long, long[:100]])
    assert plan.cuts(long) == plan.cuts(long[:100]) == (99,)
