"""Layouts that do not divide: refused with values and a way out, before Megatron validates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_exact.training.layout import has_uneven_parts, refuse_layout

FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
VIRTUAL, EACH = "num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage"


def namespace(**changes: Any) -> Any:
    """What is read of Megatron's namespace, of 8 ranks and a model of 12 layers and 12 heads.

    The real namespace is in `tests/distributed/test_refusals.py`.
    """
    given = {
        "world_size": 8,
        TP: 1,
        PP: 1,
        "context_parallel_size": 1,
        "micro_batch_size": 1,
        "global_batch_size": 48,
        "seq_length": 64,
        "sequence_parallel": False,
        "recompute_granularity": None,
        "use_distributed_optimizer": False,
        "num_layers": 12,
        "num_attention_heads": 12,
        "group_query_attention": True,
        "num_query_groups": 6,
        "ffn_hidden_size": 96,
        "vocab_size": 120,
        FIRST: None,
        LAST: None,
        VIRTUAL: None,
        EACH: None,
        "pipeline_model_parallel_layout": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "hybrid_layer_pattern": None,
        "overlap_p2p_comm": True,
        "microbatch_group_size_per_vp_stage": None,
    }
    assert set(changes) <= set(given)
    return SimpleNamespace(**{**given, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {TP: 2, PP: 4},
        {TP: 4, "num_query_groups": 2},  # fewer groups than ranks: upstream copies them
        {TP: 4, "num_query_groups": 1, "group_query_attention": False},  # the default of a flag not given
        {PP: 4, VIRTUAL: 3},
        {PP: 4, EACH: 1},
        {PP: 2, EACH: 6},  # one group is no interleaving
        {PP: 8, FIRST: 3, LAST: 3},
        {PP: 8, FIRST: 5},
        {PP: 2, FIRST: 7},
        {PP: 2, FIRST: 4, LAST: 8},
        {PP: 1, FIRST: 12},
        {PP: 4, VIRTUAL: 2, FIRST: 2, LAST: 2},
        {PP: 2, "num_layers": 11, "account_for_loss_in_pipeline_split": True},
        {
            PP: 4,
            "num_layers": 10,
            "account_for_loss_in_pipeline_split": True,
            "account_for_embedding_in_pipeline_split": True,
        },
        {"global_batch_size": None, "ffn_hidden_size": None, TP: 2},  # Megatron derives both
        {"num_layers": None, PP: 8},  # Megatron says what is missing
        {"hybrid_layer_pattern": "M*|M*", PP: 8},
    ],
    ids=str,
)
def test_what_divides_passes(changes: dict[str, Any]) -> None:
    refuse_layout(namespace(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({PP: 3, "world_size": 8}, ("8 ranks (GPUs) do not divide by 3, TP 1 x PP 3 x CP 1", "change")),
        ({PP: 16}, ("8 ranks (GPUs) do not divide by 16",)),
        ({PP: 8}, ("12 layers do not divide into 8 pipeline parts", "size 8", "--decoder-first-")),
        ({PP: 4, VIRTUAL: 2}, ("12 layers do not divide into 8", "size 4 x 2 groups", "another size")),
        ({PP: 4, EACH: 2}, ("12 layers do not divide by 8", "-size 4 x --num-layers-per-virtual", "2:")),
        ({PP: 4, EACH: 0}, ("--num-layers-per-virtual-pipeline-stage 0: choose",)),
        (
            {PP: 4, "account_for_loss_in_pipeline_split": True},
            ("12 layers and 1 for embedding or loss do not divide into 4",),
        ),
        ({PP: 8, FIRST: 4}, ("-first-pipeline-num-layers 4 leave 8 of 12 layers to 7 more", "change a")),
        ({PP: 8, FIRST: 6, LAST: 6}, ("num-layers 6 and --decoder-last", "leave 0 of 12", "to 6 more")),
        ({PP: 2, FIRST: 3, LAST: 3}, ("leave 6 of 12 layers to 0 more",)),
        ({PP: 1, FIRST: 6, LAST: 6}, ("leave 0 of 12 layers to -1 more",)),
        ({PP: 2, LAST: 0}, ("--decoder-last-pipeline-num-layers 0: a pipeline stage has 1 layer or more",)),
        ({PP: 4, VIRTUAL: 2, FIRST: 3, LAST: 1}, ("num-layers 3: ", "num-layers 1: ", "of its 2 groups")),
        ({PP: 1, VIRTUAL: 2}, ("an interleaved pipeline needs", "size 2 or more, not 1", "leave out")),
        ({PP: 2, VIRTUAL: 2, "overlap_p2p_comm": False}, ("-size 3 or more, not 2",)),
        (
            {PP: 4, VIRTUAL: 3, "global_batch_size": 12},  # 6 micro-batches: a group of 4, and 2 more
            ("takes micro-batches by 4, and a step has 6", "batch-size 12 / 2", "multiple of 8 rows"),
        ),
        ({PP: 8, VIRTUAL: 1, "num_layers": 16, "global_batch_size": 4}, ()),
        (
            {TP: 8},
            (
                "num_attention_heads 12 does not divide by",
                "-size 8: choose 1, 2, 3, 6\n",
            ),
        ),
        ({TP: 4}, ("num_query_groups 6 does not divide by --tensor-model-parallel-size 4: choose 1, 2",)),
        ({TP: 2, "ffn_hidden_size": 97}, ("ffn_hidden_size 97 does not divide by", "2: choose 1")),
        ({TP: 2, "vocab_size": 97}, ("a vocabulary of 97 does not divide by --tensor", "softmax")),
        (
            {"micro_batch_size": 4},
            ("--global-batch-size 48 does not divide by 32, 8 data", "multiple of 32"),
        ),
        (
            {TP: 4, "num_query_groups": 4, "sequence_parallel": True, "seq_length": 66},
            ("--sequence-parallel: the 66 tokens of a micro-batch do not divide by 4, TP 4 x CP 1",),
        ),
        ({TP: 0}, ("tensor_parallel is 0: give 1 or more",)),
    ],
    ids=str,
)
def test_what_does_not_is_refused(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    if not words:  # negative control: fewer micro-batches than pipeline stages, not interleaved
        refuse_layout(namespace(**changes))
        return
    with pytest.raises(ValueError, match=r".") as refused:
        refuse_layout(namespace(**changes))
    text = str(refused.value).replace("; ", "\n") + "\n"
    assert all(word in text for word in words), text


def test_all_faults_are_said_in_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"num_attention_heads 12 .*; .*12 layers do not divide"
    ) as refused:
        refuse_layout(namespace(**{"world_size": 40, TP: 5, PP: 8}))
    assert "\n" not in str(refused.value)


def test_parts_that_flags_name_are_uneven() -> None:
    assert not has_uneven_parts(namespace(**{PP: 4, VIRTUAL: 3}))
    for changes in (
        {FIRST: 3},
        {LAST: 3},
        {"pipeline_model_parallel_layout": "Et|tL"},
        {"account_for_loss_in_pipeline_split": True},
    ):
        assert has_uneven_parts(namespace(**changes))
