"""Matrix products in 8 bits: what is refused before a job starts, recipes, and their memory."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_exact.model.families import PRESETS
from megatron_exact.training.layout import Layout
from megatron_exact.training.memory_forecast import MemoryForecast, Numerics
from megatron_exact.training.recipes import RECIPES, change_fields, find_recipe
from megatron_exact.training.refusals import check_eight_bit


def namespace(**changes: Any) -> SimpleNamespace:
    """Llama-3.1-8B on rows of 16K, TP4 with sequence parallelism."""
    values = {
        "fp8": "hybrid",
        "fp8_recipe": "tensorwise",
        "bf16": True,
        "transformer_impl": "transformer_engine",
        "tensor_model_parallel_size": 4,
        "context_parallel_size": 1,
        "sequence_parallel": True,
        "micro_batch_size": 1,
        "seq_length": 16_384,
        "hidden_size": 4096,
        "ffn_hidden_size": 14_336,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "group_query_attention": True,
        "num_query_groups": 8,
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize("name", RECIPES)
def test_the_sizes_of_every_recipe_divide(name: str) -> None:
    recipe = find_recipe(name)
    shape, layout = PRESETS[recipe.preset], recipe.layout
    check_eight_bit(
        namespace(
            tensor_model_parallel_size=layout.tensor_parallel,
            context_parallel_size=layout.context_parallel,
            sequence_parallel=layout.sequence_parallel,
            seq_length=recipe.row_tokens,
            hidden_size=shape.hidden_size,
            ffn_hidden_size=shape.ffn_hidden_size,
            num_attention_heads=shape.num_attention_heads,
            num_query_groups=shape.num_query_groups,
            kv_channels=shape.head_dim,
        )
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transformer_impl": "local"}, "local ones would stay in bf16: install it"),
        ({"bf16": False}, "needs --bf16"),
        ({"seq_length": 4 * 8}, "multiples of 16 on each GPU, .*tokens of a micro-batch 8;"),
        ({"context_parallel_size": 512}, "tokens of a micro-batch 8"),
        ({"hidden_size": 4104}, "hidden size 4104"),
        ({"ffn_hidden_size": 14_336 + 4 * 8}, "feed-forward width 3592"),
        ({"num_attention_heads": 4, "kv_channels": 8}, "width of its queries 8"),
    ],
)
def test_what_cannot_be_multiplied_is_an_error(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_eight_bit(namespace(**changes))
    check_eight_bit(namespace(**{**changes, "fp8": None}))  # the same in bf16


def test_a_recipe_has_it_as_a_field() -> None:
    recipe = find_recipe("llama3.1_8b_16k")
    assert "--fp8-format" not in dict(recipe.flags())
    flags = dict(change_fields(recipe, ["eight_bit=tensorwise"]).flags())
    assert (flags["--fp8-format"], flags["--fp8-recipe"]) == ("hybrid", "tensorwise")
    assert "--bf16" in flags
    with pytest.raises(ValueError, match="eight_bit is 'delayed': choose none or tensorwise"):
        change_fields(recipe, ["eight_bit=delayed"])


def test_bytes_in_8_bits() -> None:
    """The copies of the weights, and one byte for each input of a matrix product."""
    shape = PRESETS["llama-3.1-8b"]
    in_bf16 = MemoryForecast(
        shape=shape,
        layout=Layout(tensor_parallel=4, sequence_parallel=True),
        row_tokens=16_384,
        data_parallel=2,
        micro_batches=16,
        numerics=Numerics(copies_values=True),
    )
    half, eight = (
        replace(in_bf16, numerics=replace(in_bf16.numerics, eight_bit=is_eight)).largest()
        for is_eight in (False, True)
    )
    matrices = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14_336
    assert eight.weights - half.weights == 2 * 32 * matrices // 4
    kept_less = 2 * 4096 + 14_336 - 4096  # inputs of qkv and fc1, of fc2; attention's result is kept twice
    assert half.activations - eight.activations == 16_384 * 32 * kept_less // 4
    assert (eight.gradients, eight.optimizer) == (half.gradients, half.optimizer)
