"""Confidence scores by the model in training: short windows without gradient, inside each step.

The loss at long context is that of the training pass itself. For the loss at short context, the windows of
a micro-batch (`exposure/confidence.py`) are concatenated into one stream, each as a segment. Before a
step, all its streams run forward through the model by Megatron's own schedule, so on the same tensor,
pipeline and data parallel ranks. The cost is that of the windows' tokens; a micro-batch without a long
document has none. The last pipeline stage keeps the short losses until the loss function of their
micro-batch turns both losses into weights.

The forward step of a micro-batch cannot include this pass: the first pipeline stage runs ahead of the last
one, which would wait for windows that no stage sends.

b = micro-batch size, S = row tokens, L = tokens of a stream, different for each micro-batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_exact.exposure import Weighting
from megatron_exact.exposure.confidence import ShortWindows
from megatron_exact.exposure.confidence_torch import confidence_weights_of_rows
from megatron_exact.exposure.rules import ConfidenceWeights
from megatron_exact.training.batch import Targets, next_packed_batch

Sample = dict[str, Tensor]
Schedule = Callable[..., Any]
ShortLosses = tuple[Tensor, Tensor]
"""Losses float32 [L] of a stream, and for each the index int64 [L] of the target that it scores among the b
* S of the micro-batch; b * S where it scores none."""

STREAM_MULTIPLE = 16
"""A stream's length is a multiple of this times the tensor-parallel size: sequence parallelism splits it,
and half-precision kernels are fastest on such lengths."""


class ShortScores:
    """The short windows of the steps of one job on one rank.

    Args:
        weights: the rule; its `in_step` is true.
        row_tokens: inputs of a row.
        loss_head: replaces Megatron's logits and cross-entropy; None for Megatron's own.
        rounds_boundaries: see `next_packed_batch`.
        mark: called at each piece of progress.
        waiting: wraps the iterator of micro-batches, to measure the time spent waiting for it.
    """

    def __init__(
        self,
        weights: ConfidenceWeights,
        row_tokens: int,
        loss_head: Any,
        *,
        rounds_boundaries: bool = False,
        mark: Callable[[], None],
        waiting: Callable[[Iterator[Sample] | None], Iterator[Sample] | None],
    ) -> None:
        self.weights = weights
        self.row_tokens = row_tokens
        self._loss_head = loss_head
        self._rounds_boundaries = rounds_boundaries
        self._mark = mark
        self._waiting_for_data = waiting
        self._lengths: deque[int] = deque()
        self._waiting: deque[ShortLosses | None] = deque()

    def around(self, schedule: Schedule) -> Schedule:
        """Return a schedule that scores before each training step; evaluations stay as they are.

        Args:
            schedule: returned by Megatron's `get_forward_backward_func`.
        """

        def scored(
            *, data_iterator: Any, num_microbatches: int, forward_only: bool = False, **rest: Any
        ) -> Any:
            if not forward_only:
                data_iterator = self._score(schedule, data_iterator, num_microbatches, rest)
            return schedule(
                data_iterator=data_iterator,
                num_microbatches=num_microbatches,
                forward_only=forward_only,
                **rest,
            )

        return scored

    def weigh(self, token_losses: Tensor, targets: Targets) -> Targets:
        """Return the targets of the next micro-batch with the rule's weights; on the last pipeline stage.

        Args:
            token_losses: losses of the training pass, [1, b * S], nats.
            targets: targets of the same micro-batch.
        """
        long = token_losses.detach().reshape(-1).float()
        short = long
        waiting = self._waiting.popleft()
        if waiting is not None:
            losses, places = waiting
            spare = torch.cat([long, long.new_zeros(1)])  # the last element takes what scores nothing
            short = spare.scatter(0, places, losses)[:-1]
        rows = (-1, self.row_tokens)
        weights = confidence_weights_of_rows(
            self.weights.rule,
            (long - short).reshape(rows),
            (targets.loss_mask > 0).reshape(rows),
            self.weights.parameters,
        )
        return replace(targets, weights=weights.float().reshape(targets.weights.shape))

    def _score(self, schedule: Schedule, iterator: Any, count: int, step: dict[str, Any]) -> Any:
        """Score the windows of the next `count` micro-batches; return an iterator over them."""
        self._mark()
        samples: list[Sample] = []
        streams: list[Sample | None] = [None] * count
        is_first_of_tp = parallel_state.get_tensor_model_parallel_rank() == 0
        if is_first_of_tp:
            samples = list(islice(self._waiting_for_data(iterator) or (), count))
            assert len(samples) == count
            multiple = STREAM_MULTIPLE * parallel_state.get_tensor_model_parallel_world_size()
            streams = [window_stream(sample, self.weights.windows, multiple) for sample in samples]
        lengths = _shared_lengths(streams)
        self._lengths.extend(length for length in lengths if length)
        found = iter(())
        if self._lengths:
            for chunk in step["model"]:
                chunk.eval()
            with torch.no_grad():  # forward_only alone builds a graph; eval mode recomputes nothing
                found = iter(
                    schedule(
                        forward_step_func=self._forward,
                        data_iterator=iter([stream for stream in streams if stream is not None]),
                        model=step["model"],
                        num_microbatches=len(self._lengths),
                        seq_length=max(self._lengths),  # pipeline stages announce their shapes
                        micro_batch_size=1,
                        forward_only=True,
                        collect_non_loss_data=True,
                        pg_collection=step.get("pg_collection"),
                        p2p_communicator=step.get("p2p_communicator"),
                    )
                )
            for chunk in step["model"]:
                chunk.train()
        if parallel_state.is_pipeline_last_stage():
            self._waiting = deque(next(found) if length else None for length in lengths)
        return iter(samples) if is_first_of_tp else None

    def _forward(self, iterator: Iterator[Sample], model: Any) -> tuple[Tensor, Any]:
        """Run Megatron's forward step for one stream of windows."""
        self._mark()
        batch = next_packed_batch(
            iterator,
            micro_batch_size=1,
            row_tokens=self._lengths.popleft(),
            rounds_boundaries=self._rounds_boundaries,
        )
        output = model(
            batch.tokens,
            batch.position_ids,
            None,
            labels=batch.labels,
            packed_seq_params=batch.packing,
            output_processor=self._loss_head,
        )
        if batch.targets is None:
            return output, None
        return output, partial(_collect, places=batch.targets.buckets.reshape(-1))


def short_scores_of(
    weighting: Weighting,
    loss_head: Any,
    *,
    rounds_boundaries: bool,
    mark: Callable[[], None],
    waiting: Callable[[Iterator[Sample] | None], Iterator[Sample] | None],
) -> ShortScores | None:
    """Return the scorer of short windows; None for rules whose weights are known before the step.

    Args:
        weighting: the weighting of the job.
        loss_head, rounds_boundaries, mark, waiting: see `ShortScores`.
    """
    weights = weighting.row_weights
    if not weights.in_step:
        return None
    assert isinstance(weights, ConfidenceWeights), "no other rule weighs inside the step"
    return ShortScores(
        weights,
        weighting.row_tokens,
        loss_head,
        rounds_boundaries=rounds_boundaries,
        mark=mark,
        waiting=waiting,
    )


def _collect(losses: Tensor, *, places: Tensor, non_loss_data: bool) -> ShortLosses:
    """Return the losses of a stream and their targets, as Megatron's schedule collects them."""
    return losses.detach().reshape(-1).float(), places


def window_stream(sample: Sample, windows: ShortWindows, multiple: int) -> Sample | None:
    """Concatenate the short windows of a micro-batch into one row.

    Args:
        sample: collated samples of `PackedDataset`, each [b, S].
        windows: lengths of the windows.
        multiple: a last segment of padding makes the stream's length a multiple of it.

    Returns:
        The entries that `next_packed_batch` reads, each [1, L]. `target_buckets` contains the index of the
        target that a loss scores among those of the micro-batch, b * S where it scores none. None if the
        micro-batch has nothing to score.
    """
    tokens, labels, mask, positions, buckets, cu_seqlens = (
        sample[name].numpy()
        for name in ("tokens", "labels", "loss_mask", "position_ids", "target_buckets", "cu_seqlens")
    )
    size = tokens.shape[1]
    spans = []  # (row, first input, first scored, after the last)
    for row in range(tokens.shape[0]):
        # One more than the position in the segment, but 0 where the target opens the next one, as bucket 0
        context = np.where(buckets[row] > 0, positions[row] + 1, 0)
        scored = windows.scored(context, mask[row] > 0)
        for window in windows.place(np.unique(cu_seqlens[row]), scored):
            spans.append((row, window, scored))
    if not spans:
        return None
    pieces = [(tokens[r, w.start : w.stop], labels[r, w.start : w.stop]) for r, w, _ in spans]
    places = []
    for row, window, scored in spans:
        of_row = np.arange(window.start, window.stop)
        is_scored = (of_row >= window.first_scored) & scored[window.start : window.stop]
        places.append(np.where(is_scored, row * size + of_row, tokens.size))
    lengths = [piece.size for piece, _ in pieces]
    padding = -sum(lengths) % multiple
    if padding:
        lengths.append(padding)
        pieces.append((np.zeros(padding, np.int64), np.zeros(padding, np.int64)))
        places.append(np.full(padding, tokens.size))
    total = sum(lengths)
    boundaries = np.full(total + 1, total, dtype=np.int32)
    boundaries[: len(lengths) + 1] = np.cumsum([0, *lengths])
    arrays = {
        "tokens": np.concatenate([piece for piece, _ in pieces]),
        "labels": np.concatenate([piece for _, piece in pieces]),
        "loss_mask": np.ones(total, dtype=np.float32),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
        "target_buckets": np.concatenate(places),
        "cu_seqlens": boundaries,
    }
    stream = {name: torch.from_numpy(array)[None] for name, array in arrays.items()}
    return {**stream, "max_seqlen": torch.tensor([max(lengths)], dtype=torch.int32)}


def _shared_lengths(streams: Sequence[Sample | None]) -> list[int]:
    """Return the length of each stream, 0 for none, broadcast from tensor-parallel rank 0."""
    lengths = [0 if stream is None else stream["tokens"].shape[1] for stream in streams]
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return lengths
    shared = torch.tensor(lengths, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.broadcast(
        shared,
        parallel_state.get_tensor_model_parallel_src_rank(),
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    found: list[int] = shared.tolist()
    return found
