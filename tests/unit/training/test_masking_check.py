"""Edits of micro-batches and the verdict, on a model of five lines whose faults are known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_exact.training import masking_check
from megatron_exact.training.masking_check import (
    Batch,
    alone,
    choose_segments,
    make_variants,
    segments_of,
    with_token_changed,
    without_boundaries,
)

ROWS = ([0, 3, 4, 9, 12], [0, 7, 12])
SIZE = 12
VOCABULARY = 50


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (len(ROWS), SIZE), generator=generator)
    cu_seqlens = torch.full((len(ROWS), SIZE + 1), SIZE, dtype=torch.int32)
    for row, boundaries in enumerate(ROWS):
        cu_seqlens[row, : len(boundaries)] = torch.tensor(boundaries)
    positions = torch.stack([torch.cat([torch.arange(b - a) for a, b in pairwise(row)]) for row in ROWS])
    longest = torch.tensor([5, 7], dtype=torch.int32)
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "cu_seqlens": cu_seqlens,
        "position_ids": positions,
        "max_seqlen": longest,
    }


def losses_of(batch: Batch, fault: str) -> Tensor:
    """A loss that depends on all earlier tokens of the document, their distance and the position; [T]."""
    starts = torch.zeros(len(ROWS), SIZE, dtype=torch.long)
    for row, boundaries in enumerate(batch["cu_seqlens"].tolist()):
        for start, end in pairwise(boundaries):
            starts[row, start:end] = max(start - (fault == "shifted"), 0)
    if fault == "ignored":
        starts.zero_()
    places = torch.arange(SIZE)
    seen = places[None, None, :] >= starts[:, :, None]
    if fault != "bidirectional":
        seen = seen & (places[None, :, None] >= places[None, None, :])
    weight = seen / (1.0 + (places[None, :, None] - places[None, None, :]).abs())
    values = (weight * batch["tokens"][:, None, :].double()).sum(-1) + batch["labels"]
    learned = places if fault == "positions" else batch["position_ids"]
    return (values + 0.1 * learned).reshape(-1)


def checks_of(fault: str) -> tuple[dict[str, masking_check.MaskingCheck], str]:
    variants = make_variants(make_batch(), 3, VOCABULARY)
    found = masking_check.measure(torch.stack([losses_of(v.batch, fault) for v in variants]), variants)
    checks = masking_check.judge(found, "fp32")
    words = " ".join(masking_check.explain(checks, found[masking_check.LEAK_SHARE].difference))
    return {check.name: check for check in checks}, words


def test_segments_are_those_of_the_flattened_rows() -> None:
    found = [(segment.start, segment.end) for segment in segments_of(make_batch())]
    assert found == [(0, 3), (3, 4), (4, 9), (9, 12), (12, 19), (19, 24)]
    assert choose_segments(segments_of(make_batch()), 4) == [0, 4, 5, 1]
    assert sorted(choose_segments(segments_of(make_batch()), 99)) == list(range(6))


def test_a_changed_token_is_all_that_changes() -> None:
    batch = make_batch()
    changed = with_token_changed(batch, 14, VOCABULARY)
    assert (changed["tokens"] != batch["tokens"]).nonzero().tolist() == [[1, 2]]
    assert all(changed[key] is batch[key] for key in batch if key != "tokens")


def test_a_document_alone_keeps_tokens_labels_and_boundary() -> None:
    batch = make_batch()
    segment = segments_of(batch)[2]
    single = alone(batch, segment)
    assert single["tokens"][0, :5].tolist() == batch["tokens"][0, 4:9].tolist()
    assert single["labels"][0, :5].tolist() == batch["labels"][0, 4:9].tolist()
    assert not single["tokens"][0, 5:].any()
    assert not single["tokens"][1].any()
    segments = segments_of(single)
    assert (segments[0].start, segments[0].end) == (0, 5)
    assert max(one.end - one.start for one in segments) == int(single["max_seqlen"].max()) == 7
    assert {key: value.shape for key, value in single.items()} == {k: v.shape for k, v in batch.items()}
    assert single["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]


def test_without_boundaries_each_row_is_one_document() -> None:
    merged = without_boundaries(make_batch())
    assert [(one.start, one.end) for one in segments_of(merged)] == [(0, 12), (12, 24)]
    assert merged["position_ids"].tolist() == [list(range(SIZE))] * 2
    assert merged["max_seqlen"].tolist() == [SIZE, SIZE]


def test_a_model_without_fault_passes() -> None:
    checks, words = checks_of("")
    assert all(check.passed for check in checks.values())
    assert "as if it were alone" in words


@pytest.mark.parametrize(
    ("fault", "failing", "words"),
    [
        ("ignored", masking_check.NEIGHBOR, "does not look at them"),
        ("shifted", masking_check.NEIGHBOR, "although boundaries reach the model"),
        ("bidirectional", masking_check.EARLIER, "later tokens of its own document"),
        ("positions", masking_check.ALONE, "position ids that do not restart"),
    ],
)
def test_each_fault_is_found_and_named(fault: str, failing: str, words: str) -> None:
    checks, told = checks_of(fault)
    assert not checks[failing].passed
    assert checks[masking_check.OWN].passed
    assert words in told
    assert "Found with: " in told


def test_a_check_that_proves_nothing_fails() -> None:
    variants = make_variants(make_batch(), 3, VOCABULARY)
    own_token = torch.stack([v.batch["tokens"].double().reshape(-1) for v in variants])
    found = masking_check.measure(own_token, variants)  # a model that sees no context at all
    failed = [check.name for check in masking_check.judge(found, "fp32") if not check.passed]
    assert failed == [masking_check.NEIGHBOR_CONTROL, masking_check.ALONE_CONTROL]
    assert "proves nothing" in masking_check.explain(masking_check.judge(found, "fp32"), 0.0)[0]
    blind = masking_check.judge(masking_check.measure(torch.ones_like(own_token), variants), "fp32")
    assert "does not read its tokens" in masking_check.explain(blind, 0.0)[0]
    broken = masking_check.judge(masking_check.measure(own_token * float("nan"), variants), "fp32")
    assert not any(check.passed for check in broken)
    assert "not finite" in masking_check.explain(broken, 0.0)[0]


def test_of_several_micro_batches_the_worst_decides() -> None:
    weak, strong = (masking_check.Measured(difference=value, where="") for value in (0.1, 0.2))
    assert masking_check.extreme(masking_check.NEIGHBOR, [weak, strong]) is strong
    assert masking_check.extreme(masking_check.OWN, [strong, weak]) is weak
    broken = masking_check.Measured(difference=float("nan"), where="")
    assert masking_check.extreme(masking_check.OWN, [weak, broken]) is broken
