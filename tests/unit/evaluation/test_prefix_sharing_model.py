"""Prompts whose beginnings are read once against lm-eval's own model, which reads each from its start."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from probe_models import random_model, small_tokenizer
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, RwkvConfig, RwkvForCausalLM

from megatron_exact.evaluation import shared_prefixes
from megatron_exact.evaluation.engine import make_greedy
from megatron_exact.evaluation.prefix_sharing_model import PrefixSharingModel
from megatron_exact.evaluation.shared_prefixes import PrefixCache, PrefixPlan, can_share

WORDS = (
    "the",
    "red owl",
    "of Ghent",
    "sees",
    "a brass",
    "lantern",
    "near its gate",
    "and Anna",
    "owns maps",
)
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6}
"""Largest relative differences of the log-likelihood of a continuation, which is 5 to 104 nats here."""
Cell = list[Instance]


@cache
def tokenizer() -> Any:
    return small_tokenizer()


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def prompts(draw: random.Random) -> list[str]:
    """A tree: three beginnings, each with three longer ones, each with two ends; and one of its own."""
    found = [text(draw, 120)]
    for _ in range(3):
        beginning = text(draw, 90)
        for _ in range(3):
            middle = f"{beginning} {text(draw, 80)}"
            found += [f"{middle} {text(draw, draw.randrange(3, 30))}" for _ in range(2)]
    draw.shuffle(found)
    return found


def instance(kind: Any, arguments: tuple[Any, ...], document: int) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("cell", document, 1))


def generations() -> Cell:
    options = {"until": ["gate"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 12}
    return [
        instance("generate_until", (prompt, dict(options)), n)
        for n, prompt in enumerate(prompts(random.Random(1)))
    ]


def choices(*, shots: bool = True) -> Cell:
    """Questions behind the same worked examples, each with four choices of one to four words."""
    draw = random.Random(2)
    before = text(draw, 90) if shots else ""
    asked = [f"{before} {text(draw, draw.randrange(10, 40))}" for _ in range(7)]
    return [
        instance("loglikelihood", (question, f" {text(draw, draw.randrange(1, 5))}"), n)
        for n, question in enumerate(asked)
        for _ in range(4)
    ]


def twins() -> Cell:
    """Pairs of documents with the same question, each with two choices of its own."""
    draw = random.Random(5)
    questions = [text(draw, draw.randrange(20, 40)) for _ in range(6)]
    return [
        instance("loglikelihood", (question, f" {text(draw, draw.randrange(1, 5))}"), 2 * n + twin)
        for n, question in enumerate(questions)
        for twin in (0, 1)
        for _ in range(2)
    ]


def loaded(
    kind: Callable[..., HFLM] = PrefixSharingModel,
    *,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 1,
    family: str = "llama",
    positions: int = 2048,
    **named: Any,
) -> Any:
    model = random_model(family, vocabulary=2400, positions=positions, **named).to(dtype)
    found = kind(pretrained=model, tokenizer=tokenizer(), batch_size=batch_size, max_length=2048)
    make_greedy(found.model)
    return found


def answers(model: Any, cell: Cell) -> list[Any]:
    ask = model.generate_until if cell[0].request_type == "generate_until" else model.loglikelihood
    found: list[Any] = ask(cell, disable_tqdm=True)
    return found


def worst_difference(one: list[Any], other: list[Any]) -> float:
    """The largest relative difference of log-likelihoods."""
    return max(abs(a / b - 1) for (a, _), (b, _) in zip(one, other, strict=True))


@pytest.mark.parametrize(("family", "batch_size"), [("llama", 1), ("qwen2", 3)])
def test_greedy_answers_are_those_of_lm_eval(family: str, batch_size: int) -> None:
    cell = generations()
    model = loaded(family=family, batch_size=batch_size)
    model.plan_cell(cell)
    assert model.tokens_saved > 1000
    found = answers(model, cell)
    assert found == answers(loaded(HFLM, family=family, batch_size=batch_size), cell)
    assert len(set(found)) > 10  # random models repeat themselves, prompts do not


@pytest.mark.parametrize(
    ("shots", "dtype", "batch_size"),
    [
        (True, torch.float64, 1),
        (False, torch.float64, 3),
        (True, torch.float32, 3),
        (False, torch.float32, 1),
    ],
)
def test_likelihoods_are_those_of_lm_eval(shots: bool, dtype: torch.dtype, batch_size: int) -> None:
    cell = choices(shots=shots)
    model = loaded(dtype=dtype, batch_size=batch_size)
    model.plan_cell(cell)
    assert model.tokens_saved > 0
    found, plain = answers(model, cell), answers(loaded(HFLM, dtype=dtype, batch_size=batch_size), cell)
    assert worst_difference(found, plain) < BOUNDS[dtype]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in plain]


def test_a_cache_that_is_off_by_one_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of both tests above."""
    right = PrefixCache._copy

    def wrong(self: PrefixCache, tokens: int, rows: int) -> Any:
        cache = right(self, tokens, rows)
        for layer in cache.layers:
            layer.keys = layer.keys.roll(1, dims=-2)
        return cache

    plain = loaded(HFLM)
    monkeypatch.setattr(PrefixCache, "_copy", wrong)
    model = loaded()
    model.plan_cell(choices())
    assert worst_difference(answers(model, choices()), answers(plain, choices())) > 0.01
    model.plan_cell(generations())
    assert answers(model, generations()) != answers(plain, generations())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_is_bit_identical_to_the_whole(dtype: torch.dtype) -> None:
    """Whatever else a process answers, it reads the same pieces one after the other."""
    whole, part = loaded(dtype=dtype), loaded(dtype=dtype)
    for cell, shares in ((choices(), 3), (twins(), 2)):
        whole.plan_cell(cell)
        assert whole.tokens_saved > 0
        expected = answers(whole, cell)
        for index in range(shares):
            own = [n for n, request in enumerate(cell) if request.doc_id % shares == index]
            part.plan_cell(cell)
            assert answers(part, [cell[n] for n in own]) == [expected[n] for n in own]

    cell = generations()
    for model in (whole, part):
        model.plan_cell(cell)
    read = [model._prompt_of(request) for model, request in zip([whole] * len(cell), cell, strict=True)]
    with torch.no_grad():
        caches = {place: whole._cache_before_last(read[place]) for place in whole._plan.order(read)}
        for place in reversed(range(0, len(cell), 3)):
            own = part._cache_before_last(read[place])
            for ours, theirs in zip(own.layers, caches[place].layers, strict=True):
                assert torch.equal(ours.keys, theirs.keys)
                assert torch.equal(ours.values, theirs.values)


def test_a_plan_of_a_share_alone_would_cut_elsewhere() -> None:
    """Why the plan is made from all requests: the negative control of the test above."""
    model = loaded()
    read = [model._prompt_of(request) for request in generations()]
    whole, own = PrefixPlan(read), PrefixPlan(read[::3])
    assert any(whole.cuts(prompt) != own.cuts(prompt) for prompt in read[::3])


def test_tokens_are_read_as_planned_and_one_prompt_is_kept() -> None:
    model, cell = loaded(), generations()
    model.plan_cell(cell)
    read = [model._prompt_of(request) for request in cell]
    answers(model, cell)
    # each answer's last token is read by lm-eval's generation
    assert model._prefixes.tokens == model._plan.tokens_read(read) - len(cell)
    assert model._prefixes.tokens == sum(map(len, read)) - model.tokens_saved - len(cell)
    kept = {keys.shape[-2] for keys, _ in model._prefixes._layers}
    assert max(kept) < max(map(len, read))
    model.plan_cell(cell)
    assert model._prefixes._layers == []


def test_little_in_common_is_left_to_lm_eval() -> None:
    draw = random.Random(3)
    model = loaded()
    cell = generations()[:1]
    model.plan_cell(cell)
    assert model._plan is None
    for number in range(4):
        cell.append(instance("generate_until", (text(draw, 100), cell[0].args[1]), 1 + number))
    model.plan_cell(cell)
    assert (model._plan, model.tokens_saved) == (None, 0)
    assert answers(model, cell) == answers(loaded(HFLM), cell)


def test_models_whose_cache_forgets_or_changes_are_left_to_lm_eval() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    for model in (
        loaded(family="qwen2", **sliding),
        loaded(rope_parameters=rope, positions=128),
        loaded(partial(PrefixSharingModel, shares_prefixes=False)),
    ):
        model.plan_cell(generations())
        assert model._plan is None
    assert not can_share(loaded(family="qwen2", **sliding).model)
    assert can_share(loaded().model)


def test_models_whose_forward_takes_no_cache_are_left_to_lm_eval() -> None:
    """By their configs alone their layers keep all tokens."""
    rwkv = RwkvConfig(vocab_size=97, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
    gpt = OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4)
    assert not can_share(RwkvForCausalLM(rwkv))
    assert not can_share(OpenAIGPTLMHeadModel(gpt))


@pytest.mark.parametrize("context", ["the red owl", ""])
def test_a_choice_without_a_token_is_an_error(context: str) -> None:
    """Its likelihood would be 1, and the example right or wrong by that alone."""
    cell = choices()
    cell[5] = instance("loglikelihood", (context, ""), 1)
    with pytest.raises(ValueError, match="document 1: the choice '' adds no token to its context"):
        loaded().plan_cell(cell)


def test_prompts_of_a_cell_take_a_few_bytes_a_token() -> None:
    """As tuples of Python numbers they take 36 bytes a token, gigabytes a cell."""
    draw, model = random.Random(4), loaded()
    options = {"until": [], "max_gen_toks": 12}
    cell = [instance("generate_until", (text(draw, 2000), options), n) for n in range(10)]
    tokens = sum(len(model._prompt_of(request)) for request in cell)
    tracemalloc.start()
    try:
        model.plan_cell(cell)
        assert tracemalloc.get_traced_memory()[1] < 16 * tokens
    finally:
        tracemalloc.stop()


def test_pieces_of_a_long_beginning_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = choices()
    plain = answers(loaded(HFLM), cell)
    monkeypatch.setattr(shared_prefixes, "PIECE_TOKENS", 5)
    model = loaded()
    model.plan_cell(cell)
    assert worst_difference(answers(model, cell), plain) < BOUNDS[torch.float64]
