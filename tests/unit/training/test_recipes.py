"""Recipes: the paper's stages, their expansion, and what a user may change."""

from __future__ import annotations

import re
import subprocess
from dataclasses import FrozenInstanceError, fields
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest

from megatron_exact.data.blend import CorpusSlice
from megatron_exact.model.families import PRESETS
from megatron_exact.training.job import expand_recipe, flag_groups
from megatron_exact.training.job_flags import flag_value
from megatron_exact.training.layout import Layout
from megatron_exact.training.megatron_parse import torchrun_command
from megatron_exact.training.memory_forecast import Cluster, layout_faults
from megatron_exact.training.recipes import (
    RECIPES,
    Recipe,
    Schedule,
    chain_of,
    change_fields,
    field_help,
    find_recipe,
    flat_fields,
    recipe_table,
    recipe_text,
)

# EXACT (arXiv 2605.10544), table 4 and section 4: model -> (windows in K, weights of the three corpora)
PAPER = {
    "qwen2.5_0.5b": ("qwen2.5-0.5b", (4,), (1,)),
    "llama3.2_1b": ("llama-3.2-1b", (4,), (1,)),
    "qwen2.5_1.5b": ("qwen2.5-1.5b", (4, 8), (6, 24, 32)),
    "qwen2.5_3b": ("qwen2.5-3b", (4, 8), (6, 24, 32)),
    "llama3.2_3b": ("llama-3.2-3b", (4, 8), (6, 24, 32)),
    "qwen2.5_7b": ("qwen2.5-7b", (4, 8, 16), (1, 3, 6)),
    "llama3.1_8b": ("llama-3.1-8b", (4, 8, 16), (1, 3, 6)),
}
LONGER = [f"{model}_{window}k" for model in ("qwen2.5_7b", "llama3.1_8b") for window in (32, 64, 128)]
"""Stages beyond the paper."""
STAGES = [(model, window) for model, (_, windows, _) in PAPER.items() for window in windows]


@pytest.mark.parametrize(("model", "window"), STAGES)
def test_every_stage_of_the_paper_is_a_recipe(model: str, window: int) -> None:
    preset, windows, weights = PAPER[model]
    recipe = find_recipe(f"{model}_{window}k")
    assert (recipe.preset, recipe.row_tokens, recipe.tau) == (preset, window * 1024, window * 256)
    assert tuple(weight for _, weight in recipe.corpus_mix) == weights
    assert (recipe.nodes, recipe.gpus_per_node) == (1, 8)
    assert chain_of(f"{model}_{window}k") == [f"{model}_{w}k" for w in windows if w <= window]


def test_there_are_these_recipes_and_the_variants_for_more_nodes() -> None:
    variants = [f"{model}_16k_{n}nodes" for model in ("qwen2.5_7b", "llama3.1_8b") for n in (2, 4)]
    stages = [f"{model}_{window}k" for model, window in STAGES]
    assert sorted(RECIPES) == sorted([*stages, *variants, *LONGER])
    for name in variants:
        recipe = find_recipe(name)
        layout = recipe.layout
        assert recipe.nodes == int(name[-6])
        assert min(layout.tensor_parallel, layout.pipeline_parallel) > 1
        assert recipe.world_size // layout.model_parallel > 1
        assert layout.sequence_parallel
        assert layout.distributed_optimizer


@pytest.mark.parametrize("name", LONGER)
def test_stages_beyond_the_paper_split_their_rows(name: str) -> None:
    recipe = find_recipe(name)
    before = find_recipe(recipe.previous or "")
    assert recipe.row_tokens == 2 * before.row_tokens
    assert recipe.tau == recipe.row_tokens // 4
    assert recipe.row_tokens <= PRESETS[recipe.preset].max_position_embeddings
    assert recipe.layout.context_parallel * recipe.layout.tensor_parallel in (8, 16)
    assert recipe.world_size == recipe.layout.model_parallel  # one replica, so a row is a micro-batch
    assert recipe.corpus_slice == "1/1"


@pytest.mark.parametrize("name", RECIPES)
def test_iterations_follow_from_the_budget(name: str) -> None:
    recipe = find_recipe(name)
    flags = dict(recipe.flags())
    step = int(flags["--global-batch-size"] or 0) * recipe.row_tokens
    assert step == recipe.schedule.global_batch_tokens
    trained = int(flags["--train-iters"] or 0) * step
    assert recipe.schedule.budget_tokens <= trained < recipe.schedule.budget_tokens + step
    assert flags["--lr-decay-style"] == "constant"
    cluster = Cluster(world_size=recipe.world_size)
    batch = step // recipe.row_tokens
    shape = PRESETS[recipe.preset]
    assert (
        layout_faults(recipe.layout, shape, cluster, batch_rows=batch, row_tokens=recipe.row_tokens) == []
    )


def test_every_field_says_what_the_paper_says() -> None:
    for name, _, text in flat_fields(find_recipe("llama3.1_8b_16k")):
        if name in {field.name for field in fields(Layout)}:
            continue  # the layout as a whole is
        assert re.search(r"\bstate[ds]\b", text), name
    assert "not stated in the paper" in field_help(Recipe)["layout"].lower()
    unstated = {
        name for name, text in field_help(Schedule).items() if "not stated in the paper" in text.lower()
    }
    assert unstated == {field.name for field in fields(Schedule)}


def test_a_user_s_flag_wins_and_stands_once() -> None:
    words = expand_recipe(["--recipe", "qwen2.5_0.5b_4k", "--lr=3e-5", "--token-weighting", "exact"])
    assert flag_value(words, "--lr") == "3e-5"
    assert words.count("--token-weighting") == 1
    assert "--recipe" not in words
    assert sum(word.split("=")[0] == "--lr" for word in words) == 1


@pytest.mark.parametrize(
    ("given", "gone"),
    [
        (("--train-samples", "100"), "--train-iters"),
        (("--lr-warmup-fraction", "0.1"), "--lr-warmup-iters"),
        (("--fp16",), "--bf16"),
        (("--recompute-activations",), "--recompute-method"),
    ],
)
def test_a_user_s_flag_replaces_its_alternatives(given: tuple[str, ...], gone: str) -> None:
    argv = ["--recipe", "llama3.1_8b_16k", "--recipe-set", "recompute=full"]
    assert gone in expand_recipe(argv)
    words = expand_recipe([*argv, *given])
    assert gone not in words
    assert given[0] in words


def test_iterations_follow_from_the_user_s_batch() -> None:
    words = expand_recipe(["--recipe", "qwen2.5_0.5b_4k", "--global-batch-size", "32"])
    assert flag_value(words, "--train-iters") == str(2**30 // (32 * 4096))
    fixed = expand_recipe(
        ["--recipe", "qwen2.5_0.5b_4k", "--global-batch-size", "32", "--train-iters", "7"]
    )
    assert flag_value(fixed, "--train-iters") == "7"


def test_fields_are_changed_by_name() -> None:
    recipe = find_recipe("llama3.1_8b_16k")
    changed = change_fields(
        recipe, ["budget_tokens=2G", "tensor_parallel=8", "learning_rate=3e-5", "sequence_parallel=false"]
    )
    assert (changed.schedule.budget_tokens, changed.schedule.learning_rate) == (2**31, 3e-5)
    assert (changed.layout.tensor_parallel, changed.layout.sequence_parallel) == (8, False)
    assert changed.schedule.seed == recipe.schedule.seed
    with pytest.raises(FrozenInstanceError):
        recipe.nodes = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["budget=1"], "no field 'budget': did you mean budget_tokens"),
        (["budget_tokens"], "write NAME=VALUE"),
        (["recompute=some"], "recompute is 'some'"),
        (["sequence_parallel=1"], "write true or false"),
        (["learning_rate=fast"], "'fast' is not a number"),
        (["corpus_mix=a"], "write a recipe in recipes.py"),
        (["tensor_parallel=3"], "8 GPUs do not divide by"),
        (["preset=gpt"], "preset 'gpt' is unknown"),
    ],
)
def test_wrong_changes_are_refused(changes: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        change_fields(find_recipe("llama3.1_8b_16k"), changes)


def test_unknown_recipes_and_changes_without_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"did you mean llama3\.1_8b_16k"):
        expand_recipe(["--recipe", "llama3.1-8b-16k"])
    with pytest.raises(ValueError, match="name one with --recipe"):
        expand_recipe(["--recipe-set", "nodes=2"])
    with pytest.raises(TypeError):
        Recipe(preset="llama-3.1-8b", row_tokens=4096, corpus_mix=(), rows=1)  # type: ignore[call-arg]


def run_printed(text: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A printed command in a real shell, torchrun being a function that shows its arguments."""
    script = f"torchrun() {{ printf '%s\\n' \"$@\"; }}\n{text}\n"
    environment = {"PATH": "/usr/bin:/bin", **variables}
    return subprocess.run(["bash", "-eu", "-c", script], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("name", RECIPES)
def test_the_printed_command_runs_and_says_the_same(name: str) -> None:
    text = torchrun_command(["--recipe", name, "--token-weighting", "exact", "--print-arguments"])
    assert all(line.endswith(" \\") for line in text.splitlines()[:-1])
    known = {"PACK": "packs/a b", "RUN": "runs/x", "START": "base", "NODE_RANK": "0", "MASTER_ADDR": "n0"}
    done = run_printed(text, **known)
    assert done.returncode == 0, done.stderr
    head, words = done.stdout.split("megatron_exact.training.pretrain\n")
    assert "--nproc-per-node\n8\n" in head
    groups = {group[0]: group[1:] for group in flag_groups(words.splitlines())}
    assert groups["--pack"] == ["packs/a b"]
    assert groups["--save"] == groups["--load"] == ["runs/x"]
    assert groups["--token-weighting"] == ["exact"]
    assert groups["--num-layers"] == [str(PRESETS[find_recipe(name).preset].num_layers)]
    for flag, value in find_recipe(name).flags():
        if flag != "--token-weighting":
            assert groups[flag] == ([] if value is None else [value])
    # What it says is complete: expanding it again changes nothing
    assert expand_recipe(words.splitlines()) == words.splitlines()


def test_the_printed_command_asks_for_what_it_cannot_know() -> None:
    text = torchrun_command(["--recipe", "qwen2.5_0.5b_4k"])
    done = run_printed(text)
    assert done.returncode != 0
    assert "PACK: packed dataset" in done.stderr
    given = ["--recipe", "qwen2.5_0.5b_4k", "--pack", "p q", "--save", "r", "--load", "r"]
    assert "$" not in torchrun_command(given)
    assert run_printed(torchrun_command(given)).returncode == 0


def test_a_command_without_a_recipe_is_printed_too() -> None:
    text = torchrun_command(["--pack", "p", "--lr", "1", "--lr", "2", "--preset", "qwen2.5-3b"])
    assert text.count("--lr ") == 1
    assert "--lr 2" in text
    assert "--num-layers 36" in text
    assert text.startswith("torchrun --standalone --nproc-per-node 1 -m megatron_exact.training.pretrain")


def test_the_list_and_one_recipe_are_shown() -> None:
    assert len(recipe_table()) == len(RECIPES) + 1
    text = "\n".join(recipe_text("qwen2.5_7b_16k"))
    assert "qwen2.5_7b_4k > qwen2.5_7b_8k > qwen2.5_7b_16k" in text
    assert "learning_rate = 1e-05" in text
    assert "--source 1:tokens/fineweb-edu --source 3:tokens/slimpajama-6b" in text
    assert "corpus_slice = 3/3" in text
    assert text.count("--corpus-slice") == 3


@pytest.mark.parametrize("name", RECIPES)
def test_the_stages_of_a_chain_read_disjoint_parts(name: str) -> None:
    stages = [stage for stage in chain_of(name) if stage not in LONGER]  # those read all documents again
    parts = [CorpusSlice.parse(find_recipe(stage).corpus_slice) for stage in stages]
    assert all(one.is_disjoint(other) for one, other in combinations(parts, 2))
    assert sum(Fraction(1, part.slices) for part in parts) <= 1
    command = change_fields(find_recipe(name), ["corpus_slice=1/1"]).pack_command()
    assert "--corpus-slice" not in command


def test_the_page_lists_the_fields_as_they_are() -> None:
    page = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert "\n".join(recipe_table()) in page
    for name in RECIPES:
        assert name in page
