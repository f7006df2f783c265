"""Streams of short windows, and how their losses find the targets that they score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from torch.utils.data import default_collate

from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.rows import RowReader
from megatron_exact.exposure.confidence import ConfidenceParameters, ShortWindows, confidence_weights
from megatron_exact.exposure.rules import ConfidenceWeights
from megatron_exact.training.batch import Targets
from megatron_exact.training.short_scores import ShortScores, window_stream
from tests.distributed.jobs import ROW_TOKENS, make_corpus, make_pack

pytestmark = pytest.mark.filterwarnings("ignore:no source has a corpus record")
WINDOWS = ShortWindows(window=16, stride=12)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    corpus = make_corpus(tmp_path_factory.mktemp("packs") / "corpus")
    return {
        "concat": make_pack(corpus, "concat"),
        "best-fit": make_pack(corpus, "best-fit"),
        "masked": make_pack(corpus, "concat", "masked", mask_cross_document_targets=True),
    }


@pytest.mark.parametrize("policy", ["concat", "best-fit", "masked"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_stream_holds_each_scored_target_once_behind_its_own_context(
    policy: str, rows: int, packs: dict[str, Path]
) -> None:
    dataset = PackedDataset(packs[policy], "train", shuffle=False)
    reader = RowReader(packs[policy], "train")
    of_context = np.arange(ROW_TOKENS + 1)
    lengths = set()
    for first in range(0, len(dataset) - rows, rows):
        sample = default_collate([dataset[first + index] for index in range(rows)])
        wanted = {
            index * ROW_TOKENS + place
            for index in range(rows)
            for place, (context, mask) in enumerate(
                zip(
                    reader.read(first + index).by_context(of_context),
                    reader.read(first + index).loss_mask,
                    strict=True,
                )
            )
            if mask and context > WINDOWS.window
        }
        stream = window_stream(sample, WINDOWS, 16)
        if stream is None:
            assert not wanted
            continue
        assert {value.shape[0] for value in stream.values()} == {1}
        tokens, labels, positions, places, boundaries = (
            stream[name][0].numpy()
            for name in ("tokens", "labels", "position_ids", "target_buckets", "cu_seqlens")
        )
        lengths.add(tokens.size)
        assert tokens.size % 16 == 0
        assert boundaries.size == tokens.size + 1
        assert stream["max_seqlen"].tolist() == [np.diff(boundaries).max()]
        starts = set(boundaries.tolist())
        assert all((position == 0) == (j in starts) for j, position in enumerate(positions))
        nowhere = rows * ROW_TOKENS
        scored = places[places != nowhere].tolist()
        assert sorted(scored) == sorted(wanted)  # each once
        row_tokens, row_labels = sample["tokens"].numpy().ravel(), sample["labels"].numpy().ravel()
        row_positions = sample["position_ids"].numpy().ravel()
        for j, place in enumerate(places):
            if place == nowhere:
                continue
            seen = positions[j] + 1  # the inputs of its window, itself included
            at_border = (row_positions[place] + 1 - WINDOWS.window) % WINDOWS.stride == 0
            is_last = row_positions[place + 1 : place + 2].sum() == 0
            fewest = WINDOWS.window - WINDOWS.stride
            assert seen == WINDOWS.window if at_border and is_last else fewest <= seen < WINDOWS.window
            assert (seen == fewest) == (at_border and not is_last)
            np.testing.assert_array_equal(
                tokens[j + 1 - seen : j + 1], row_tokens[place + 1 - seen : place + 1]
            )
            assert labels[j] == row_labels[place]
            assert row_positions[place] >= WINDOWS.window  # of the same document all along
    assert len(lengths) > 1  # they differ from batch to batch


def scores_of(rule: str, row_tokens: int) -> ShortScores:
    weights = ConfidenceWeights(rule=rule, parameters=ConfidenceParameters(), windows=WINDOWS, in_step=True)
    return ShortScores(weights, row_tokens, None, mark=lambda: None, waiting=lambda iterator: iterator)


@pytest.mark.parametrize("rule", ["dense", "sparse", "longce", "ppmi", "npmi", "npmi-values"])
def test_short_losses_weigh_their_targets_row_by_row(rule: str) -> None:
    generator = torch.Generator().manual_seed(2)
    long = torch.rand(1, 20, generator=generator) * 5
    mask = torch.ones(1, 20)
    mask[0, [3, 17]] = 0
    places = torch.tensor([4, 20, 9, 20, 12, 19])  # 20: scores nothing
    losses = torch.rand(6, generator=generator) * 5
    step = scores_of(rule, 10)
    step._waiting.extend([(losses, places), None])
    targets = Targets(
        loss_mask=mask, weights=torch.ones(1, 20), buckets=torch.zeros(1, 20, dtype=torch.int64)
    )
    weighed = step.weigh(long.requires_grad_(), targets)
    difference = np.zeros(20, dtype=np.float32)
    for place, loss in zip(places.tolist(), losses.tolist(), strict=True):
        if place < 20:
            difference[place] = long[0, place].item() - loss
    expected = [
        confidence_weights(rule, difference[half], mask[0, half].numpy() > 0, ConfidenceParameters())
        for half in (slice(0, 10), slice(10, 20))
    ]
    np.testing.assert_allclose(weighed.weights[0].numpy(), np.concatenate(expected), rtol=1e-5, atol=1e-6)
    assert not weighed.weights.requires_grad
    assert weighed.loss_mask is targets.loss_mask
    uniform = step.weigh(long, targets)  # the next micro-batch had no long document
    np.testing.assert_allclose(uniform.weights.numpy(), 1, rtol=1e-6)


def test_short_windows_are_scored_without_gradient_and_the_step_gets_the_same_rows(
    packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule that is forward only still builds a graph, and eval mode switches recomputation off."""
    alone = {"get_tensor_model_parallel_rank": 0, "get_tensor_model_parallel_world_size": 1}
    for name, value in {**alone, "is_pipeline_last_stage": True}.items():
        monkeypatch.setattr(parallel_state, name, lambda value=value: value)
    dataset = PackedDataset(packs["concat"], "train", shuffle=False)
    samples = [default_collate([dataset[index]]) for index in range(3)]
    samples[1]["loss_mask"].zero_()  # nothing to score
    is_long = [window_stream(sample, WINDOWS, 16) is not None for sample in samples]
    assert is_long == [True, False, True]
    model = torch.nn.Linear(2, 2)
    step = scores_of("dense", ROW_TOKENS)
    passes: list[tuple[bool, bool, bool, int]] = []

    def schedule(
        *, data_iterator: Any, num_microbatches: int, forward_only: bool, **rest: Any
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        passes.append((forward_only, torch.is_grad_enabled(), model.training, num_microbatches))
        rows = [next(data_iterator) for _ in range(num_microbatches)]
        if not forward_only:
            assert all(row is sample for row, sample in zip(rows, samples, strict=True))
            return []
        return [(row["tokens"][0].float(), row["target_buckets"][0]) for row in rows]

    rows = iter([*samples, "the next step's"])
    step.around(schedule)(data_iterator=rows, num_microbatches=len(samples), model=[model])
    assert passes == [(True, False, False, sum(is_long)), (False, True, True, len(samples))]
    assert [waiting is not None for waiting in step._waiting] == is_long
    assert next(rows) == "the next step's"


def test_passes_of_evaluation_are_left_alone() -> None:
    step = scores_of("dense", 10)
    seen = []
    schedule = step.around(lambda **arguments: seen.append(arguments))
    arguments = {"data_iterator": None, "num_microbatches": 3, "forward_only": True, "model": []}
    schedule(**arguments)
    assert seen == [arguments]
