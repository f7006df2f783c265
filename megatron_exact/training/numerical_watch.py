"""The numerical watch: steps that are not finite, reported with their rows, and loss spikes.

**NaN and Inf** are found before the optimizer takes the step, and nothing waits while all is well. A loss
that is not finite makes its own gradient NaN (`loss.weighted_token_loss`), backward carries that to every
pipeline stage and the reduction to every data-parallel rank. So the gradient's norm, which Megatron
computes for clipping and copies to the host anyway, is not finite on any rank, and all ranks skip the step
alike without communication.

What shows where it began is kept until then: the losses of the step's micro-batches, and the norm of each
gradient bucket before ranks are summed. Megatron's own check (`--check-for-nan-in-loss-and-grad`) takes the
same norms, but waits for the device at each bucket and raises on that rank only.

For the report each rank examines what its `NumericalWatch` kept, all ranks gather their findings, and one
rank writes `nonfinite_0000007.json` into the run's folder: where the damage began, the rows of every
micro-batch, and what reproduces the batch (command, seed and checkpoint). Resuming is bit-identical on the
same layout, so the same command replays the step. Row numbers do not travel with the batch, since Megatron
moves a fixed list of keys. The row of a sample is a function of the seed and the sample's index, and
Megatron's sampler assigns the samples of a step in order, a micro-batch to each data-parallel rank in turn
(megatron/training/datasets/data_samplers.py, `MegatronPretrainingSampler`).

**A loss spike** is an iteration whose unweighted mean loss exceeds the median of the last `window`
iterations by more than `deviations` times their median absolute deviation. That deviation is scaled by
1.4826, which makes it a standard deviation for Gaussian noise, and is never taken below a thousandth of the
median. At least half a window is required. Spikes are logged with their rows; training continues. A
resumed run fills its window from `losses.jsonl`, so it finds the spikes that an uninterrupted run finds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_exact.data.attention_work import StepLayout
from megatron_exact.data.dataset import PackedDataset
from megatron_exact.files import write_json
from megatron_exact.training.checkpoint_start import tracked_iteration
from megatron_exact.training.job_endings import NonFiniteError
from megatron_exact.training.runtime import node_name, say


class NumericalWatch:
    """State of one rank: what the current step has shown so far.

    Attributes:
        losses: [b * S of this context-parallel rank] float32 for each micro-batch of the step, on the last
            pipeline stage.
        refused: whether the step was not taken; the same on every rank.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.refused = False
        self._bucket_norms: list[tuple[Any, Tensor]] = []
        self._grad_norm: float | None = None

    def begin_step(self) -> None:
        """Forget the previous step."""
        self.losses = []
        self.refused = False
        self._bucket_norms = []
        self._grad_norm = None

    def guard(self, optimizer: Any) -> None:
        """Keep `optimizer` from a step whose gradient is not finite.

        `step_with_ready_grads` returning False is Megatron's own way to skip a step: schedule and optimizer
        stay, samples count as consumed. With fp16 the loss scale finds the overflow first, and Megatron
        skips by itself.

        Args:
            optimizer: Megatron's optimizer, chained or single; three of its methods are wrapped.
        """
        for name in ("get_grad_norm", "clip_grad_norm"):
            setattr(optimizer, name, self._remembering(getattr(optimizer, name)))
        stock_step = optimizer.step_with_ready_grads

        def step_with_ready_grads() -> bool:
            if self._grad_norm is None:  # --clip-grad 0
                self._grad_norm = float(optimizer.get_grad_norm())
            self.refused = not math.isfinite(self._grad_norm)
            return False if self.refused else bool(stock_step())

        optimizer.step_with_ready_grads = step_with_ready_grads

    def _remembering(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*args: Any, **kwargs: Any) -> Any:
            norm = stock(*args, **kwargs)
            self._grad_norm = float(norm)
            return norm

        return compute

    def check_grads(self, group: Any, **_: Any) -> None:
        """Keep the norms of a group's buckets; called where Megatron would check them.

        Args:
            group: a `_ParamAndGradBucketGroup` whose gradients are about to be summed over ranks.
        """
        self._bucket_norms += [(bucket, bucket.grad_data.norm(p=2)) for bucket in group.buckets]

    def damaged_parameters(self, model: list[Any]) -> list[str]:
        """Return the names of the parameters in whose buckets this rank's own gradient is not finite.

        Args:
            model: this rank's model chunks, as Megatron wraps them.
        """
        names = {
            id(parameter): name.removeprefix("module.").removeprefix("module.")
            for chunk in model
            for name, parameter in chunk.named_parameters()
        }
        return [
            names.get(id(parameter), "?")
            for bucket, norm in self._bucket_norms
            if not math.isfinite(norm.item())
            for parameter in bucket.params_list
        ]


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """The rows of one step."""

    order: PackedDataset
    """The dataset, which maps samples to rows."""
    first_sample: int
    """Index of the first sample of the step."""
    micro_batch_size: int
    """Rows of a micro-batch."""
    micro_batches: int
    """Micro-batches of each rank in the step."""
    ranks: int
    """Number of data-parallel ranks."""

    @property
    def epoch(self) -> int:
        """The epoch of the step's first row."""
        return self.first_sample // len(self.order.reader)

    def all(self) -> list[int]:
        """Return all rows in the order of the samples."""
        samples = range(self.micro_batches * self.ranks * self.micro_batch_size)
        return [self.order.row_of(self.first_sample + sample) for sample in samples]

    def of(self, rank: int, micro_batch: int) -> list[int]:
        """Return the rows of one micro-batch of one data-parallel rank."""
        first = self.first_sample + (micro_batch * self.ranks + rank) * self.micro_batch_size
        return [self.order.row_of(first + index) for index in range(self.micro_batch_size)]

    def of_rank(self, rank: int) -> list[int]:
        """Return the rows of all micro-batches of one data-parallel rank."""
        return [row for index in range(self.micro_batches) for row in self.of(rank, index)]


def balanced_steps(args: Any) -> StepLayout | None:
    """Return the layout of a job's steps where --balance-rows orders their rows, else None.

    Args:
        args: Megatron's validated namespace, with our options.

    Raises:
        ValueError: samples were consumed that are not whole steps.
    """
    if not args.balance_rows:
        return None
    if args.consumed_train_samples % args.global_batch_size:
        raise ValueError(
            f"--balance-rows with {args.consumed_train_samples} consumed samples, which are not whole "
            f"steps of {args.global_batch_size} rows: the steps would read other rows than without the "
            "flag; keep the --global-batch-size of the run"
        )
    return StepLayout(
        rows=args.global_batch_size,
        ranks=args.data_parallel_size,
        micro_batch_rows=args.micro_batch_size,
    )


class RowOrder:
    """Rows of the training steps of a job; opens the pack at the first call, but no corpus.

    Args:
        args: Megatron's validated namespace, with our options.
    """

    def __init__(self, args: Any) -> None:
        self._args = args
        self._order: PackedDataset | None = None

    def last_step(self) -> StepRows:
        """Return the rows of the step whose samples were counted last."""
        args, ranks = self._args, parallel_state.get_data_parallel_world_size()
        if self._order is None:
            self._order = PackedDataset(
                args.pack,
                "train",
                num_samples=max(args.train_iters * args.global_batch_size, args.consumed_train_samples),
                seed=args.seed,
                balance=balanced_steps(args),
                source_root=args.source_root,
            )
        return StepRows(
            order=self._order,
            first_sample=args.consumed_train_samples - args.global_batch_size,
            micro_batch_size=args.micro_batch_size,
            micro_batches=args.global_batch_size // (args.micro_batch_size * ranks),
            ranks=ranks,
        )


SHOWN_NAMES = 8
"""How many parameters or rows a message names; the file names all."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """The first thing that is not finite in one micro-batch, or in the gradient of one rank."""

    kind: str
    """`loss`, or `gradient` (examined only where every loss is finite)."""
    rank: int
    """Global rank."""
    host: str
    """Host name of the rank."""
    pipeline_stage: int
    """Pipeline stage of the rank."""
    data_parallel_rank: int
    """Data-parallel rank."""
    micro_batch: int | None = None
    """Number of the micro-batch in the step, from 0; None for a gradient, which is a sum over all."""
    value: str | None = None
    """`nan` or `inf`."""
    row: int | None = None
    """Row of the pack."""
    position: int | None = None
    """Input position in the row, from 0."""
    segment: dict[str, Any] | None = None
    """`RowReader.segment_at` of that position; None in padding."""
    parameters: tuple[str, ...] = ()
    """Parameters in the damaged buckets of a gradient."""
    rows: tuple[int, ...] = ()
    """All rows of the rank's step, for a gradient."""

    def __str__(self) -> str:
        where = f"on rank {self.rank} ({self.host})"
        if self.kind == "gradient":
            return (
                f"gradient {where}, pipeline stage {self.pipeline_stage}, of "
                f"{_shorten(self.parameters)}; its rows: {_shorten(self.rows)}"
            )
        place = f"micro-batch {self.micro_batch}, row {self.row}, position {self.position}"
        if self.segment is None:
            return f"loss {self.value} {where}: {place}, padding"
        return (
            f"loss {self.value} {where}: {place}, segment {self.segment['number']} (document "
            f"{self.segment['document']} of {self.segment['source']})"
        )


def report_refused(
    watch: NumericalWatch,
    model: list[Any],
    rows: StepRows,
    iteration: int,
    *,
    args: Any,
    facts: dict[str, Any],
    run_dir: Path | None,
) -> None:
    """Report what was not finite, and stop unless the step is to be skipped; called on every rank.

    Args:
        watch: the numerical watch of this rank.
        model: this rank's model chunks.
        rows: rows of the step.
        iteration: the iteration whose step was not taken.
        args: Megatron's namespace, with our options.
        facts: further entries of the file.
        run_dir: where to write the file; None on all ranks but one.

    Raises:
        NonFiniteError: with `--on-nonfinite stop`.
    """
    gathered: list[list[Damage]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, local_damage(watch, model, rows))
    everything = [damage for part in gathered for damage in part]
    found = [damage for damage in everything if damage.kind == "loss"] or everything
    if run_dir is not None:
        content = {
            "iteration": iteration,
            "found": [asdict(damage) for damage in found],
            "action": args.on_nonfinite,
            "seed": args.seed,
            "command": args.command_line,
            **facts,
            "checkpoint": _newest_checkpoint(args.save),
            "batch": [
                {"data_parallel_rank": rank, "micro_batch": index, "rows": rows.of(rank, index)}
                for rank in range(rows.ranks)
                for index in range(rows.micro_batches)
            ],
        }
        write_json(run_dir / f"nonfinite_{iteration:07d}.json", content)
    if args.on_nonfinite == "skip":
        say(summary(iteration, found, "the step is skipped"))
        return
    action = "stopped before the step was taken (--on-nonfinite skip would continue without it)"
    raise NonFiniteError(summary(iteration, found, action))


def local_damage(watch: NumericalWatch, model: list[Any], rows: StepRows) -> list[Damage]:
    """Return what is not finite on this rank: damaged losses, else its own damaged gradient."""
    identity: dict[str, Any] = {
        "rank": torch.distributed.get_rank(),
        "host": node_name(),
        "pipeline_stage": parallel_state.get_pipeline_model_parallel_rank(),
        "data_parallel_rank": parallel_state.get_data_parallel_rank(),
    }
    found = []
    if parallel_state.get_tensor_model_parallel_rank() == 0:  # the other ranks have the same losses
        for index, losses in enumerate(watch.losses):
            damage = first_damage(losses)
            if damage is not None:
                found.append(Damage(kind="loss", **identity, **_location(*damage, index, rows)))
    parameters = watch.damaged_parameters(model)
    if parameters and not found:
        own = rows.of_rank(identity["data_parallel_rank"])
        found.append(Damage(kind="gradient", **identity, parameters=tuple(parameters), rows=tuple(own)))
    return found


def _location(index: int, value: float, micro_batch: int, rows: StepRows) -> dict[str, Any]:
    """Return the fields of `Damage` that locate a token of a micro-batch in the pack."""
    size = parallel_state.get_context_parallel_world_size()
    row_tokens = rows.order.reader.row_tokens
    if size > 1:
        index = stream_position(
            index,
            tokens=rows.micro_batch_size * row_tokens,
            size=size,
            rank=parallel_state.get_context_parallel_rank(),
        )
    number, position = divmod(index, row_tokens)
    row = rows.of(parallel_state.get_data_parallel_rank(), micro_batch)[number]
    return {
        "micro_batch": micro_batch,
        "value": "nan" if math.isnan(value) else "inf",
        "row": row,
        "position": position,
        "segment": rows.order.reader.segment_at(row, position),
    }


def summary(iteration: int, found: Sequence[Damage], action: str) -> str:
    """Return one line: the damage, its location, and the action taken."""
    line = "; ".join(str(damage) for damage in found[:2])
    if len(found) > 2:
        line += f"; and {len(found) - 2} more"
    if not found:
        line = "gradient, after it was summed over ranks"
    return f"not finite in iteration {iteration}: {line}; {action}"


def _newest_checkpoint(save: str | None) -> dict[str, Any] | None:
    """Return the checkpoint that a resume would start from, or None before the first save."""
    try:
        iteration = None if save is None else tracked_iteration(Path(save))
    except (ValueError, OSError):  # the report is about NaN; a damaged tracker is found at the resume
        iteration = None
    return None if iteration is None else {"folder": save, "iteration": iteration}


def _shorten(names: Sequence[Any]) -> str:
    shown = ", ".join(str(name) for name in names[:SHOWN_NAMES])
    return shown + (f", ... ({len(names)} in all)" if len(names) > SHOWN_NAMES else "")


def first_damage(losses: Tensor) -> tuple[int, float] | None:
    """Return index and value of the first loss that is not finite, or None; waits for the device.

    Args:
        losses: any shape.
    """
    damaged = (~torch.isfinite(losses.reshape(-1))).nonzero()
    if not len(damaged):
        return None
    index = int(damaged[0])
    return index, float(losses.reshape(-1)[index])


def stream_position(index: int, *, tokens: int, size: int, rank: int) -> int:
    """Return the position of a context-parallel rank's token in the stream of its micro-batch.

    A rank has the spans `rank` and `2 * size - 1 - rank` of 2 * size (`model/context_parallel.py`).

    Args:
        index: position in the rank's own order.
        tokens: length of the stream.
        size: number of context-parallel ranks.
        rank: rank in their group.
    """
    span = tokens // (2 * size)
    number = rank if index < span else 2 * size - 1 - rank
    return number * span + index % span


GAUSSIAN = 1.4826
"""Standard deviation of a Gaussian divided by its median absolute deviation."""
SMALLEST_SHARE = 1e-3
"""Smallest deviation as a share of the median, so that noise on a constant loss makes no spikes."""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """An iteration whose loss stands out."""

    loss: float
    """Unweighted mean loss, nats."""
    median: float
    """Median loss of the window before it, nats."""
    deviation: float
    """Robust standard deviation of that window, nats."""

    def __str__(self) -> str:
        return f"{self.loss:.4f} after a median of {self.median:.4f} (deviation {self.deviation:.4f})"


class SpikeDetector:
    """Find loss spikes, iteration by iteration.

    Args:
        deviations: how far above the median a spike begins, in deviations; 0 finds none.
        window: number of past iterations to compare with.
        losses: losses of earlier iterations, oldest first; None where one was not finite.
    """

    def __init__(self, deviations: float, window: int, losses: Iterable[float | None] = ()) -> None:
        self.deviations = deviations
        self.window = window
        self._recent = deque((loss for loss in losses if loss is not None), maxlen=window)

    def add(self, loss: float) -> Spike | None:
        """Compare a loss with those before it, then remember it; a loss that is not finite is left out."""
        if not self.deviations or not math.isfinite(loss):
            return None
        spike = self._judge(loss) if 2 * len(self._recent) >= self.window else None
        self._recent.append(loss)
        return spike

    def _judge(self, loss: float) -> Spike | None:
        middle = median(self._recent)
        spread = GAUSSIAN * median(abs(value - middle) for value in self._recent)
        deviation = max(spread, SMALLEST_SHARE * abs(middle))
        if loss <= middle + self.deviations * deviation:
            return None
        return Spike(loss=loss, median=middle, deviation=deviation)
