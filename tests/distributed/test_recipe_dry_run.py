"""Every recipe started at its real size, on ranks of its real world, as far as the first forward pass.

Layers, widths, vocabulary, layout, batch and schedule are those that the cluster gets; `dry_run.py` says
what is pretended. References are the published numbers of parameters and shapes written down here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.model.families import PRESETS
from megatron_exact.model.shapes import ModelShape
from megatron_exact.training.job import prepare_job
from megatron_exact.training.layout import Layout
from megatron_exact.training.memory_forecast import stage_parameters
from megatron_exact.training.recipes import RECIPES, Recipe, find_recipe
from tests.distributed.dry_run import dry_run

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


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A pack for each window, with the validation rows that the recipes ask for."""
    folder = tmp_path_factory.mktemp("packs")
    writer = IndexedWriter(f"{folder}/docs.bin", f"{folder}/docs.idx", 128)
    for length, number in ((12_000, 350), (140_000, 12)):
        for _ in range(number):  # 6M tokens, half of them for the 2M that the recipes evaluate
            writer.add(np.full(length, 7))
    writer.close()
    packs = {}
    for row_tokens in sorted({find_recipe(name).row_tokens for name in RECIPES}):
        packs[row_tokens] = folder / str(row_tokens)
        options = PackOptions(row_tokens=row_tokens, policy="concat", seed=1, validation_fraction=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this corpus has no tokenizer
            pack_corpora([f"{folder}/docs"], packs[row_tokens], options)
    return packs


def simulated_ranks(recipe: Recipe) -> list[int]:
    """A rank of each pipeline stage: the first of the world, and the last of its tensor-parallel group."""
    return [0] if recipe.layout.model_parallel == 1 else [0, recipe.world_size - 1]


def command(name: str, packs: dict[int, Path], *extra: str) -> list[str]:
    return ["--recipe", name, "--pack", str(packs[find_recipe(name).row_tokens]), *extra]


def expected_shapes(shape: ModelShape, layout: Layout, pipeline_rank: int) -> dict[str, list[int]]:
    """Parameters of one rank; a layer's by its number on the rank."""
    h, t = shape.hidden_size, layout.tensor_parallel
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    layer = {
        "input_layernorm.weight": [h],
        "self_attention.linear_qkv.weight": [(queries + 2 * keys) // t, h],
        "self_attention.linear_proj.weight": [h, queries // t],
        "pre_mlp_layernorm.weight": [h],
        "mlp.linear_fc1.weight": [2 * shape.ffn_hidden_size // t, h],
        "mlp.linear_fc2.weight": [h, shape.ffn_hidden_size // t],
    }
    if shape.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = [(queries + 2 * keys) // t]
    found = {
        f"decoder.layers.{number}.{name}": size
        for number in range(shape.num_layers // layout.pipeline_parallel)
        for name, size in layer.items()
    }
    table = [shape.vocab_size // t, h]
    if pipeline_rank == 0:
        found["embedding.word_embeddings.weight"] = table
    if pipeline_rank == layout.pipeline_parallel - 1:
        found["decoder.final_layernorm.weight"] = [h]
        if not shape.tied_embeddings:
            found["output_layer.weight"] = table
    return found


def check_built(found: dict[str, Any], recipe: Recipe) -> None:
    """Layers, shapes, vocabulary and optimizer of one rank."""
    shape, layout = PRESETS[recipe.preset], recipe.layout
    stage, t = found["pipeline_rank"], layout.tensor_parallel
    depth = shape.num_layers // layout.pipeline_parallel
    assert found["chunks"] == 1
    assert found["layers"] == list(range(stage * depth + 1, (stage + 1) * depth + 1))
    kind = "ContextParallelAttention" if layout.context_parallel > 1 else "PackedAttention"
    assert found["attention"] == [kind]
    assert {name: size for name, (size, _, _) in found["parameters"].items()} == expected_shapes(
        shape, layout, stage
    )
    assert {(dtype, device) for _, dtype, device in found["parameters"].values()} == {
        ("torch.bfloat16", "meta")
    }
    rows = shape.vocab_size // t
    first = found["tensor_rank"] * rows
    assert found["vocabulary"] == ([first, first + rows] if stage == 0 else None)
    local = local_parameters(found)
    assert local == stage_parameters(shape, layout, stage).total
    # this data- and context-parallel rank's part, up to the padding of buckets
    sharing = found["data_ranks"] * layout.context_parallel
    assert found["optimized"] == pytest.approx(local / sharing, rel=0.01)


def check_step(found: dict[str, Any], recipe: Recipe) -> None:
    """Batch, schedule and what the first forward pass has given."""
    layout, schedule = recipe.layout, recipe.schedule
    assert found["data_ranks"] == recipe.world_size // layout.model_parallel
    assert found["rows_a_step"] * recipe.row_tokens == schedule.global_batch_tokens
    assert found["iterations"] * schedule.global_batch_tokens == schedule.budget_tokens
    assert found["learning_rates"] == pytest.approx([0.0, schedule.learning_rate, schedule.learning_rate])
    assert found["weight_decays"] == [0.0, schedule.weight_decay]
    if found["pipeline_rank"] == layout.pipeline_parallel - 1:
        own_tokens = recipe.row_tokens // layout.context_parallel
        assert found["output"] == [[1, own_tokens], "torch.float32"]
        assert found["loss"] == [[], "torch.float32", "torch.int32"]
    else:
        share = (
            recipe.row_tokens
            // layout.context_parallel
            // (layout.tensor_parallel if layout.sequence_parallel else 1)
        )
        assert found["output"] == [[share, 1, PRESETS[recipe.preset].hidden_size], "torch.bfloat16"]
        assert found["loss"] is None


def local_parameters(found: dict[str, Any]) -> int:
    return sum(int(np.prod(size)) for size, _, _ in found["parameters"].values())


def whole_model(found: Sequence[dict[str, Any]], layout: Layout) -> int:
    """Parameters of all ranks of one replica, those that every tensor-parallel rank holds counted once."""
    stages = {rank["pipeline_rank"]: rank for rank in found}
    return sum(
        int(np.prod(size)) * (1 if "layernorm" in name else layout.tensor_parallel)
        for rank in stages.values()
        for name, (size, _, _) in rank["parameters"].items()
    )


def is_largest(name: str) -> bool:
    """Whether no recipe of the same model and layout has longer rows or more nodes."""
    own = find_recipe(name)
    alike = [find_recipe(other) for other in RECIPES]
    alike = [other for other in alike if (other.preset, other.layout) == (own.preset, own.layout)]
    return all((own.row_tokens, own.nodes) >= (other.row_tokens, other.nodes) for other in alike)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if is_largest(name) else pytest.mark.slow) for name in RECIPES]
)
def test_a_recipe_starts_at_its_real_size(name: str, packs: dict[int, Path], tmp_path: Path) -> None:
    recipe = find_recipe(name)
    ended, found = dry_run(
        command(name, packs, "--token-weighting", "exact"),
        simulated_ranks(recipe),
        world_size=recipe.world_size,
        folder=tmp_path,
    )
    ended.check()
    assert len(found) == len(simulated_ranks(recipe))
    for rank in found:
        check_built(rank, recipe)
        check_step(rank, recipe)
    assert {rank["pipeline_rank"] for rank in found} == set(range(recipe.layout.pipeline_parallel))
    assert {rank["tensor_rank"] for rank in found} == {0, recipe.layout.tensor_parallel - 1}
    assert whole_model(found, recipe.layout) == PUBLISHED[recipe.preset]


@pytest.mark.parametrize("name", RECIPES)
def test_the_arms_of_a_pair_are_one_job_but_for_the_weights(name: str, packs: dict[int, Path]) -> None:
    jobs = {
        rule: prepare_job(
            command(name, packs, "--token-weighting", rule), choose_runtime=lambda options: ()
        )
        for rule in ("none", "exact")
    }
    none, exact = jobs["none"], jobs["exact"]
    assert none.argv == exact.argv
    assert none.manifest == exact.manifest
    assert set(none.weighting.bucket_weights) == {1.0}
    assert max(exact.weighting.bucket_weights) > 1.0
    assert exact.weighting.parameters["tau"] == find_recipe(name).tau


SINGLE = ("tensor_parallel=1", "sequence_parallel=false")
WRONG = {
    "heads": ("qwen2.5_7b_16k", ("tensor_parallel=8",), "num_attention_heads 28 does not divide"),
    "layers": ("qwen2.5_7b_16k", (*SINGLE, "pipeline_parallel=8"), "28 layers do not divide into 8"),
    "batch": ("qwen2.5_7b_16k", ("nodes=3",), "--global-batch-size 32 does not divide by"),
    "vocabulary": ("qwen2.5_1.5b_4k", ("gpus_per_node=3", "tensor_parallel=3"), "a vocabulary of 151936"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_layout_that_does_not_divide_ends_in_one_line(
    case: str, packs: dict[int, Path], tmp_path: Path
) -> None:
    name, changes, words = WRONG[case]
    world = {"batch": 24, "vocabulary": 3}.get(case, 8)
    flags = [word for change in changes for word in ("--recipe-set", change)]
    ended, found = dry_run(command(name, packs, *flags), [0], world_size=world, folder=tmp_path)
    assert ended.codes == [1]
    assert found == []
    (error,) = (line for line in ended.outputs[0].splitlines() if line.startswith("error: "))
    assert words in error
    assert "Traceback" not in ended.outputs[0]


def test_a_pipeline_stage_that_lacks_a_layer_is_noticed(packs: dict[int, Path], tmp_path: Path) -> None:
    """Negative control: the checks do look at what was built."""

    def patch() -> None:
        from megatron_exact.model import layer_specs

        stock = layer_specs.get_num_layers_to_build
        layer_specs.get_num_layers_to_build = lambda *args, **kwargs: stock(*args, **kwargs) - 1

    recipe = find_recipe("llama3.1_8b_16k_2nodes")
    argv = command("llama3.1_8b_16k_2nodes", packs)
    ended, found = dry_run(argv, [0], world_size=16, folder=tmp_path, patch=patch)
    ended.check()
    check_step(found[0], recipe)
    with pytest.raises(AssertionError):
        check_built(found[0], recipe)
