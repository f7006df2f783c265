"""The stages of the paper (EXACT, arXiv 2605.10544, section 4 and table 4), each a named function.

Models, windows, chains and corpora are the paper's. Layouts are for 80 GB cards, 8 a node: every recipe is
put through the memory forecast of `preflight` in a test. That each stage reads its own part of the corpora
(`corpus_slice`) is our choice.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from megatron_exact.training.layout import Layout
from megatron_exact.training.recipes.recipe import Recipe

SMALL_MIX = (("fineweb-edu", 1.0),)
MEDIUM_MIX = (("fineweb-edu", 6.0), ("slimpajama-6b", 24.0), ("open-web-math", 32.0))
LARGE_MIX = (("fineweb-edu", 1.0), ("slimpajama-6b", 3.0), ("open-web-math", 6.0))

RECIPES: dict[str, Callable[[], Recipe]] = {}
"""Name -> the function that makes it."""


def recipe(name: str) -> Callable[[Callable[[], Recipe]], Callable[[], Recipe]]:
    """Enter a function into RECIPES."""

    def enter(make: Callable[[], Recipe]) -> Callable[[], Recipe]:
        assert name not in RECIPES
        RECIPES[name] = make
        return make

    return enter


def find_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: an unknown name; the nearest ones are shown.
    """
    if name not in RECIPES:
        near = ", ".join(difflib.get_close_matches(name, RECIPES, n=3))
        suggestion = f"did you mean {near}? " if near else ""
        raise ValueError(
            f"recipe {name!r} is unknown: {suggestion}`python -m megatron_exact.training.recipes` lists all"
        )
    return RECIPES[name]()


def chain_of(name: str) -> list[str]:
    """The recipe and those before it, first stage first.

    Raises:
        ValueError: an unknown name.
    """
    previous = find_recipe(name).previous
    return [*(chain_of(previous) if previous is not None else []), name]


@recipe("qwen2.5_0.5b_4k")
def qwen2_5_0_5b_4k() -> Recipe:
    """Only stage of Qwen2.5-0.5B."""
    return Recipe(preset="qwen2.5-0.5b", row_tokens=4096, corpus_mix=SMALL_MIX)


@recipe("llama3.2_1b_4k")
def llama3_2_1b_4k() -> Recipe:
    """Only stage of Llama-3.2-1B."""
    return Recipe(preset="llama-3.2-1b", row_tokens=4096, corpus_mix=SMALL_MIX)


@recipe("qwen2.5_1.5b_4k")
def qwen2_5_1_5b_4k() -> Recipe:
    """First of two stages of Qwen2.5-1.5B."""
    return Recipe(preset="qwen2.5-1.5b", row_tokens=4096, corpus_mix=MEDIUM_MIX, corpus_slice="1/2")


@recipe("qwen2.5_1.5b_8k")
def qwen2_5_1_5b_8k() -> Recipe:
    """Second stage of Qwen2.5-1.5B."""
    return replace(qwen2_5_1_5b_4k(), row_tokens=8192, previous="qwen2.5_1.5b_4k", corpus_slice="2/2")


@recipe("qwen2.5_3b_4k")
def qwen2_5_3b_4k() -> Recipe:
    """First of two stages of Qwen2.5-3B."""
    return Recipe(preset="qwen2.5-3b", row_tokens=4096, corpus_mix=MEDIUM_MIX, corpus_slice="1/2")


@recipe("qwen2.5_3b_8k")
def qwen2_5_3b_8k() -> Recipe:
    """Second stage of Qwen2.5-3B."""
    return replace(qwen2_5_3b_4k(), row_tokens=8192, previous="qwen2.5_3b_4k", corpus_slice="2/2")


@recipe("llama3.2_3b_4k")
def llama3_2_3b_4k() -> Recipe:
    """First of two stages of Llama-3.2-3B."""
    return Recipe(preset="llama-3.2-3b", row_tokens=4096, corpus_mix=MEDIUM_MIX, corpus_slice="1/2")


@recipe("llama3.2_3b_8k")
def llama3_2_3b_8k() -> Recipe:
    """Second stage of Llama-3.2-3B."""
    return replace(llama3_2_3b_4k(), row_tokens=8192, previous="llama3.2_3b_4k", corpus_slice="2/2")


TP2 = Layout(tensor_parallel=2, sequence_parallel=True)
TP4 = Layout(tensor_parallel=4, sequence_parallel=True)
TP4_PP2 = Layout(tensor_parallel=4, sequence_parallel=True, pipeline_parallel=2)


@recipe("qwen2.5_7b_4k")
def qwen2_5_7b_4k() -> Recipe:
    """First of three stages of Qwen2.5-7B."""
    return Recipe(
        preset="qwen2.5-7b", row_tokens=4096, corpus_mix=LARGE_MIX, corpus_slice="1/3", layout=TP2
    )


@recipe("qwen2.5_7b_8k")
def qwen2_5_7b_8k() -> Recipe:
    """Second stage of Qwen2.5-7B."""
    return replace(qwen2_5_7b_4k(), row_tokens=8192, previous="qwen2.5_7b_4k", corpus_slice="2/3")


@recipe("qwen2.5_7b_16k")
def qwen2_5_7b_16k() -> Recipe:
    """Third stage of Qwen2.5-7B."""
    return replace(
        qwen2_5_7b_8k(), row_tokens=16_384, previous="qwen2.5_7b_8k", corpus_slice="3/3", layout=TP4
    )


@recipe("qwen2.5_7b_16k_2nodes")
def qwen2_5_7b_16k_2nodes() -> Recipe:
    """Third stage of Qwen2.5-7B, TP4 x PP2 x DP2."""
    return replace(qwen2_5_7b_16k(), nodes=2, layout=TP4_PP2)


@recipe("qwen2.5_7b_16k_4nodes")
def qwen2_5_7b_16k_4nodes() -> Recipe:
    """Third stage of Qwen2.5-7B, TP4 x PP2 x DP4."""
    return replace(qwen2_5_7b_16k(), nodes=4, layout=TP4_PP2)


@recipe("llama3.1_8b_4k")
def llama3_1_8b_4k() -> Recipe:
    """First of three stages of Llama-3.1-8B."""
    return Recipe(
        preset="llama-3.1-8b", row_tokens=4096, corpus_mix=LARGE_MIX, corpus_slice="1/3", layout=TP2
    )


@recipe("llama3.1_8b_8k")
def llama3_1_8b_8k() -> Recipe:
    """Second stage of Llama-3.1-8B."""
    return replace(llama3_1_8b_4k(), row_tokens=8192, previous="llama3.1_8b_4k", corpus_slice="2/3")


@recipe("llama3.1_8b_16k")
def llama3_1_8b_16k() -> Recipe:
    """Third stage of Llama-3.1-8B."""
    return replace(
        llama3_1_8b_8k(), row_tokens=16_384, previous="llama3.1_8b_8k", corpus_slice="3/3", layout=TP4
    )


@recipe("llama3.1_8b_16k_2nodes")
def llama3_1_8b_16k_2nodes() -> Recipe:
    """Third stage of Llama-3.1-8B, TP4 x PP2 x DP2."""
    return replace(llama3_1_8b_16k(), nodes=2, layout=TP4_PP2)


@recipe("llama3.1_8b_16k_4nodes")
def llama3_1_8b_16k_4nodes() -> Recipe:
    """Third stage of Llama-3.1-8B, TP4 x PP2 x DP4."""
    return replace(llama3_1_8b_16k(), nodes=4, layout=TP4_PP2)
