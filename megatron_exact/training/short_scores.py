"""Confidence scores of the model in training: short windows without gradient, inside each step.

The loss at long context is that of the training pass itself. For the short one the windows of a micro-batch
(`exposure/confidence.py`) are laid end to end into a stream of their own, each a segment, and go through
the model before the step begins: upstream's own schedule, forward only, over all micro-batches, so through
the same tensor, pipeline and data parallel ranks. A window costs what its tokens cost; a micro-batch
without a long document costs nothing. On the last pipeline stage the short losses wait for their
micro-batch, whose loss function turns both into weights.

That pass cannot be done inside the forward step of a micro-batch: the first pipeline stage runs ahead of
the last, which would wait for windows that nobody sends.

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
"""Losses float32 [L] of a stream, and the place int64 [L] in the micro-batch's b * S targets that each of
them scores; b * S where it scores none."""

STREAM_MULTIPLE = 16
"""A stream's length is a multiple of this and of the tensor-parallel size: sequence parallelism splits it,
and half-precision kernels like the rest."""


class ShortScores:
    """The short windows of the steps of one job on one rank.

    Args:
        weights: the rule; its `in_step` is true.
        row_tokens: inputs of a row.
        loss_head: what takes the place of upstream's logits and cross-entropy; None for upstream's own.
        mark: called at each piece of progress.
        waiting: wraps the iterator of micro-batches, to count the time that it is waited for.
    """

    def __init__(
        self,
        weights: ConfidenceWeights,
        row_tokens: int,
        loss_head: Any,
        *,
        mark: Callable[[], None],
        waiting: Callable[[Iterator[Sample] | None], Iterator[Sample] | None],
    ) -> None:
        self.weights = weights
        self.row_tokens = row_tokens
        self._loss_head = loss_head
        self._mark = mark
        self._waiting_for_data = waiting
        self._lengths: deque[int] = deque()
        self._waiting: deque[ShortLosses | None] = deque()

    def around(self, schedule: Schedule) -> Schedule:
        """A schedule that scores before each training step; passes of evaluation are left as they are.

        Args:
            schedule: what upstream's `get_forward_backward_func` returns.
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
        """The targets of the next micro-batch with the weights of the rule; on the last pipeline stage.

        Args:
            token_losses: of the training pass, [1, b * S], nats.
            targets: of the same micro-batch.
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
        """Run the windows of the next `count` micro-batches; an iterator that gives the same ones again."""
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
            with torch.no_grad():  # forward only does not say so; in eval mode nothing is recomputed
                found = iter(
                    schedule(
                        forward_step_func=self._forward,
                        data_iterator=iter([stream for stream in streams if stream is not None]),
                        model=step["model"],
                        num_microbatches=len(self._lengths),
                        seq_length=max(self._lengths),  # stages announce their shapes
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
        """Upstream's forward step for one stream of windows."""
        self._mark()
        batch = next_packed_batch(iterator, micro_batch_size=1, row_tokens=self._lengths.popleft())
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
    mark: Callable[[], None],
    waiting: Callable[[Iterator[Sample] | None], Iterator[Sample] | None],
) -> ShortScores | None:
    """What scores short windows inside the step; None for rules whose weights are known before it.

    Args:
        weighting: of the job.
        loss_head, mark, waiting: see `ShortScores`.
    """
    weights = weighting.row_weights
    if not weights.in_step:
        return None
    assert isinstance(weights, ConfidenceWeights), "no other rule weighs inside the step"
    return ShortScores(weights, weighting.row_tokens, loss_head, mark=mark, waiting=waiting)


def _collect(losses: Tensor, *, places: Tensor, non_loss_data: bool) -> ShortLosses:
    """Upstream's function of the output of a pass that collects data."""
    return losses.detach().reshape(-1).float(), places


def window_stream(sample: Sample, windows: ShortWindows, multiple: int) -> Sample | None:
    """The short windows of a micro-batch, laid end to end as one row.

    Args:
        sample: collated samples of `PackedDataset`, each [b, S].
        windows: lengths.
        multiple: of which the stream's length is made one, by a last segment of padding.

    Returns:
        What `next_packed_batch` reads, each [1, L]; in the place of the bucket of a target the place in the
        micro-batch that it scores, b * S where it scores none. None if there is nothing to score.
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
    """Length of each stream, 0 for none, as tensor-parallel rank 0 knows them."""
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
