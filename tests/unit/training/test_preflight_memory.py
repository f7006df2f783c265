"""The formulas of the preflight: parameters, memory, layouts, cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_exact.files import free_bytes
from megatron_exact.model.families import PRESETS
from megatron_exact.training.layout import Layout
from megatron_exact.training.memory_forecast import (
    Cluster,
    MemoryForecast,
    Numerics,
    layer_parameters,
    layout_faults,
    model_parameters,
    norm_parameters,
    propose_layout,
    relative_cost,
    stage_parameters,
)
from megatron_exact.training.preflight import (
    checkpoint_bytes,
    flops_per_token,
    mean_square_segment,
)
from megatron_exact.training.recipes import RECIPES, find_recipe

LLAMA = PRESETS["llama-3.1-8b"]

# As the Hugging Face models count them
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
}


def forecast(layout: Layout, *, gpus: int = 8, rows: int = 32, row_tokens: int = 16_384) -> MemoryForecast:
    replicas = max(1, gpus // layout.model_parallel)
    return MemoryForecast(
        shape=LLAMA,
        layout=layout,
        row_tokens=row_tokens,
        data_parallel=replicas,
        micro_batches=max(1, rows // (replicas * layout.micro_batch_rows)),
    )


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameters_are_those_of_the_published_models(name: str, count: int) -> None:
    assert model_parameters(PRESETS[name]) == count


@pytest.mark.parametrize("name", PRESETS)
def test_pipeline_stages_hold_the_whole_model(name: str) -> None:
    shape = PRESETS[name]
    stages = 4 if shape.num_layers % 4 == 0 else 3
    layout = Layout(pipeline_parallel=stages)
    held = sum(stage_parameters(shape, layout, rank).total for rank in range(stages))
    copy = shape.vocab_size * shape.hidden_size if shape.tied_embeddings else 0
    assert held == model_parameters(shape) + copy
    # Over two tensor-parallel ranks all but the norms is halved
    norms = norm_parameters(shape)
    assert 2 * (layer_parameters(shape, 2) - norms) == layer_parameters(shape, 1) - norms


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_an_80_gib_card(name: str) -> None:
    recipe = find_recipe(name)
    cluster = Cluster(world_size=recipe.world_size)
    replicas = recipe.world_size // recipe.layout.model_parallel
    rows = recipe.schedule.global_batch_tokens // recipe.row_tokens
    found = MemoryForecast(
        shape=PRESETS[recipe.preset],
        layout=recipe.layout,
        row_tokens=recipe.row_tokens,
        data_parallel=replicas,
        micro_batches=rows // replicas,
    )
    assert found.largest().total <= cluster.usable_bytes


def test_state_follows_from_the_parameters() -> None:
    stage = forecast(
        Layout(tensor_parallel=4, sequence_parallel=True, distributed_optimizer=False)
    ).largest()
    assert (stage.weights, stage.gradients, stage.optimizer) == tuple(
        stage.parameters * size for size in (2, 4, 12)
    )
    shared = forecast(Layout(tensor_parallel=4, sequence_parallel=True)).largest()
    assert shared.optimizer == stage.optimizer / 2  # two data-parallel ranks
    assert shared.activations == stage.activations


def test_what_is_traded_for_memory() -> None:
    base = Layout(tensor_parallel=4, sequence_parallel=True)
    full = forecast(base).largest()
    assert forecast(replace(base, recompute="full")).largest().activations < full.activations / 10
    modules = replace(forecast(replace(base, recompute="selective")), recompute_modules=("mlp",))
    assert 0.3 < modules.largest().activations / full.activations < 0.7
    assert forecast(replace(base, sequence_parallel=False)).largest().activations > full.activations
    assert forecast(replace(base, micro_batch_rows=2)).largest().activations == 2 * full.activations
    stock = replace(forecast(base), numerics=Numerics(loss_head="stock")).largest()
    assert stock.working > 2 * full.working
    half = forecast(replace(base, context_parallel=2, tensor_parallel=4)).largest()
    assert 0.5 < half.activations / full.activations < 0.6  # keys and values of the other half
    copies = Numerics(copies_values=True)
    for size, saves in ((1, True), (2, False)):  # split rows have attention of our own
        split = forecast(replace(base, context_parallel=size))
        theirs = replace(split, numerics=copies).largest().activations
        assert (theirs < split.largest().activations) == saves


def test_the_first_pipeline_stage_holds_the_most_micro_batches() -> None:
    stages = forecast(Layout(pipeline_parallel=4)).stages()
    one = stages[-1].activations
    assert [stage.activations / one for stage in stages] == pytest.approx([4, 3, 2, 1])
    few = forecast(Layout(pipeline_parallel=4), rows=4).stages()  # two micro-batches a replica
    assert [stage.activations / one for stage in few] == pytest.approx([2, 2, 2, 1])
    interleaved = forecast(Layout(pipeline_parallel=4, virtual_pipeline=2)).stages()
    # 2 (p - r - 1) + (v - 1) p + 1 groups of half as many layers (Narayanan et al. 2021)
    assert [2 * stage.activations / one for stage in interleaved] == pytest.approx([11, 9, 7, 5])


@pytest.mark.parametrize(
    ("layout", "batch", "words"),
    [
        (Layout(tensor_parallel=3), 32, "8 ranks (GPUs) do not divide by 3, TP 3 x PP 1 x CP 1"),
        (Layout(tensor_parallel=16, sequence_parallel=True), 32, "8 ranks (GPUs) do not divide by 16"),
        (Layout(), 12, "does not divide by 8, 8 data-parallel ranks"),
        (Layout(pipeline_parallel=4, virtual_pipeline=3), 32, "32 layers do not divide into 12"),
        (Layout(tensor_parallel=8, sequence_parallel=True), 32, ""),
    ],
)
def test_layouts_that_do_not_divide(layout: Layout, batch: int, words: str) -> None:
    faults = layout_faults(layout, LLAMA, Cluster(world_size=8), batch_rows=batch, row_tokens=16_384)
    assert any(words in fault for fault in faults) if words else faults == []
    qwen = PRESETS["qwen2.5-0.5b"]  # 14 heads, 2 groups
    wide = layout_faults(
        Layout(tensor_parallel=4), qwen, Cluster(world_size=8), batch_rows=32, row_tokens=4096
    )
    assert wide == ["num_attention_heads 14 does not divide by --tensor-model-parallel-size 4: choose 1, 2"]
    uneven = Layout(pipeline_parallel=8, tensor_parallel=1)
    sizes = {"batch_rows": 32, "row_tokens": 4096}
    three = PRESETS["qwen2.5-3b"]  # 36 layers
    assert "36 layers" in layout_faults(uneven, three, Cluster(world_size=8), **sizes)[0]
    assert layout_faults(uneven, three, Cluster(world_size=8), **sizes, has_uneven_parts=True) == []


def test_a_proposal_fits_and_divides() -> None:
    for memory, gpus in ((80.0, 8), (40.0, 8), (24.0, 32)):
        cluster = Cluster(world_size=gpus, gpu_memory_gib=memory, reserve_gib=4)
        found = propose_layout(
            lambda layout, gpus=gpus: forecast(layout, gpus=gpus), cluster, batch_rows=32, row_tokens=16_384
        )
        assert found is not None
        assert found.largest().total <= cluster.usable_bytes
        assert layout_faults(found.layout, LLAMA, cluster, batch_rows=32, row_tokens=16_384) == []
    small = Cluster(world_size=1, gpu_memory_gib=24.0)
    assert (
        propose_layout(lambda layout: forecast(layout, gpus=1), small, batch_rows=32, row_tokens=16_384)
        is None
    )


def test_no_proposal_splits_norms_over_all_keys_too_far() -> None:
    """OLMo 2: with more ranks than key/value groups several would have the same keys."""
    olmo = replace(PRESETS["olmo2-7b"], num_query_groups=2)
    cluster = Cluster(world_size=8, gpu_memory_gib=40.0)
    sizes = {"batch_rows": 32, "row_tokens": 16_384}
    proposals = {}
    for shape in (olmo, replace(olmo, post_norm=False, architecture="qwen3")):
        found = propose_layout(
            lambda layout, shape=shape: replace(forecast(layout), shape=shape), cluster, **sizes
        )
        assert found is not None
        proposals[shape.post_norm] = found.layout.tensor_parallel
    assert proposals[True] <= 2 < proposals[False]
    wide = layout_faults(Layout(tensor_parallel=4), olmo, cluster, **sizes)
    assert wide == [fault for fault in wide if "with 2 key/value groups is not supported" in fault] != []


def test_layouts_are_ordered_by_what_they_cost() -> None:
    base = Layout()
    assert relative_cost(base, 4) == 1
    assert relative_cost(replace(base, recompute="full"), 4) == pytest.approx(4 / 3)
    assert relative_cost(replace(base, pipeline_parallel=2), 4) == pytest.approx(1.25)
    assert relative_cost(replace(base, pipeline_parallel=2, virtual_pipeline=2), 4) == pytest.approx(1.125)
    assert relative_cost(replace(base, tensor_parallel=4), 4) > relative_cost(base, 4)


def test_flops_of_a_token() -> None:
    # Without attention a token costs six operations for each parameter of a matrix
    untied = LLAMA.vocab_size * LLAMA.hidden_size
    norms = (2 * LLAMA.num_layers + 1) * LLAMA.hidden_size
    assert flops_per_token(LLAMA, 0.0) == 6 * (model_parameters(LLAMA) - untied - norms)
    # s tokens of one segment: s^2 / 2 pairs, two products of a head's width each, forward, twice backward
    tokens = 1000
    width = LLAMA.num_attention_heads * LLAMA.head_dim
    attention = 3 * LLAMA.num_layers * width * 4 * tokens**2 / 2
    difference = flops_per_token(LLAMA, tokens) - flops_per_token(LLAMA, 0)
    assert difference * tokens == pytest.approx(attention)


def test_mean_square_segment_weighs_by_tokens(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "segment_tokens.npy", np.array([10, 30], dtype=np.int32))
    assert mean_square_segment(tmp_path) == 25.0


def test_room_for_checkpoints(tmp_path: Path) -> None:
    assert checkpoint_bytes(LLAMA, weight_bytes=2, optimizer_bytes=12) == 14 * PUBLISHED["llama-3.1-8b"]
    assert free_bytes(tmp_path / "not" / "yet") > 0
