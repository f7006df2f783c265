"""What Megatron's driver asks of a model: its datasets, its forward step, and what is logged."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.utils import Split
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.manifest import Manifest
from megatron_exact.data.remote import FRESH_SECONDS, READ_AHEAD_FROM_URL, is_url
from megatron_exact.data.source_guards import objects_sha256
from megatron_exact.exposure import Weighting
from megatron_exact.model.loss_head import TiledLossHead
from megatron_exact.model.shapes import Tiles
from megatron_exact.training.batch import Targets, next_packed_batch
from megatron_exact.training.checkpoint_integrity import gather
from megatron_exact.training.hang_detection import RankWatch
from megatron_exact.training.job import JobModel, write_hf_folder
from megatron_exact.training.job_endings import AgreedError
from megatron_exact.training.loss import (
    StepTotals,
    TargetStatistics,
    finalize_divided_by_mass,
    totals_of,
    weighted_token_loss,
)
from megatron_exact.training.numerical_watch import (
    NumericalWatch,
    RowOrder,
    SpikeDetector,
    balanced_steps,
    report_refused,
)
from megatron_exact.training.records import (
    RunRecords,
    draw_totals,
    drop_points_after,
    read_lines,
    wandb_run_id,
)
from megatron_exact.training.run_record import (
    LOSSES,
    RESTART_VARIABLE,
    RUN_RECORD,
    SPIKES,
    describe_restarts,
    end_restart,
    read_run_record,
    restart_row,
    restarts_of,
    write_run_record,
)
from megatron_exact.training.short_scores import short_scores_of
from megatron_exact.training.stop_signals import StopSignals
from megatron_exact.training.throughput import Throughput
from megatron_exact.training.weighting_options import score_reader


def train_dataset(args: Any, manifest: Manifest, weighting: Weighting, num_samples: int) -> PackedDataset:
    """Return the weighted rows of the training split, in the order of the seed, epoch after epoch.

    With --balance-rows the order within each step is another one, see `PackedDataset`.

    Args:
        args: Megatron's validated namespace, with our options.
        manifest: of the pack.
        weighting: the rule applied to it.
        num_samples: number of samples that the job reads, including consumed ones.
    """
    dataset = PackedDataset(
        args.pack,
        "train",
        # The sampler asks for more than was consumed, even by a job that only evaluates
        num_samples=max(num_samples, args.consumed_train_samples + args.global_batch_size),
        seed=args.seed,
        weighting=weighting,
        scores=score_reader(args, manifest),
        balance=balanced_steps(args),
        source_root=args.source_root,
        read_ahead=read_ahead_rows(args),
    )
    dataset.split = Split.train  # type: ignore[attr-defined]  # data_samplers.py reads it
    return dataset


def read_ahead_rows(args: Any) -> int:
    """Return the rows that each data worker asks for in advance."""
    if args.read_ahead_rows is not None:
        return int(args.read_ahead_rows)
    return READ_AHEAD_FROM_URL if args.source_root is not None and is_url(args.source_root) else 0


def require_same_objects(args: Any, manifest: Manifest) -> None:
    """Check that all nodes read the objects that rank 0 verified; called by every rank.

    Raises:
        ValueError: an object was replaced while the nodes started.
    """
    if args.source_root is None or not is_url(args.source_root):
        return
    found = gather(objects_sha256(manifest, args.pack, args.source_root))
    if others := [rank for rank, one in enumerate(found) if one != found[0]]:
        raise AgreedError(
            f"ranks {others[:8]} read other versions of objects below {args.source_root} than rank 0, "
            f"which verified them: they were replaced while the job started; start again in "
            f"{FRESH_SECONDS // 60} minutes, when every node compares its cache with the store"
        )


def validation_dataset(args: Any, num_samples: int) -> PackedDataset:
    """Return the first rows of the validation split, the same at every evaluation, unweighted.

    Args:
        args: as for training.
        num_samples: number of samples that the remaining evaluations read.
    """
    dataset = PackedDataset(
        args.pack,
        "validation",
        num_samples=num_samples + args.consumed_valid_samples,
        shuffle=False,
        cycle=args.eval_iters * args.global_batch_size,
        source_root=args.source_root,
        read_ahead=read_ahead_rows(args),
    )
    dataset.split = Split.valid  # type: ignore[attr-defined]
    return dataset


class TrainingRun:
    """State and callbacks of one job on one rank.

    `pretrain()` takes a dataset provider and a forward step, and its configuration takes a layer spec and a
    function that finalizes gradients. They are the methods of one object, so nothing of ours is global.

    Args:
        args: Megatron's validated namespace, with our options.
        manifest: of the pack.
        weighting: the rule applied to it.
        model: what the model is.
        run_dir: where records go, or None for no records.
        record: content of run.json.
        is_resume: whether the job resumes from the run's own checkpoint.
        rank_watch: is notified of every step of progress.
    """

    def __init__(
        self,
        args: Any,
        manifest: Manifest,
        weighting: Weighting,
        model: JobModel,
        run_dir: Path | None,
        record: dict[str, Any],
        *,
        is_resume: bool,
        rank_watch: RankWatch | None = None,
    ) -> None:
        self.args = args
        self.manifest = manifest
        self.weighting = weighting
        self.model = model
        self.run_dir = run_dir
        self.record = record
        self.is_resume = is_resume
        self.records: RunRecords | None = None
        self.numbers = NumericalWatch()
        self.throughput = Throughput(args)
        self.reported: dict[str, float] = {}
        """Losses of the last iteration over all ranks, as in losses.jsonl, by Megatron's names."""
        self.rank_watch = rank_watch or RankWatch(0)
        self.on_good_step: Callable[[int], None] = lambda iteration: None
        self._spikes = SpikeDetector(0, 1)
        self._is_first_step = True
        self.optimizer: Any = None
        self.step_groups: list[dict[str, Any]] = []
        """Parameter groups of the optimizer in the current step, without their parameters. Megatron reads
        the learning rate only after the schedule has moved to the next step."""
        self.stop_signals = StopSignals(args.command_line)
        self._restart: dict[str, Any] | None = None
        self._last_iteration = 0
        self._model: list[Any] = []
        self._loss_head = _loss_head(args)
        # Megatron's unfused rotation of packed rows takes frequencies as long as the row for those of one
        # document, and a longest segment that is rounded up can be that long. With context parallelism
        # attention is ours, whose kernel plans nothing.
        is_planned = args.transformer_impl == "transformer_engine" and args.context_parallel_size == 1
        self._rounds_boundaries = is_planned and args.apply_rope_fusion
        self.short_scores = short_scores_of(
            weighting,
            self._loss_head,
            rounds_boundaries=self._rounds_boundaries,
            mark=lambda: self.rank_watch.mark("scoring short windows", is_slow=self._is_first_step),
            waiting=self.throughput.waiting,
        )
        self._running = TargetStatistics(len(weighting.lower_bounds))
        self._step_sums: Tensor | None = None
        self._is_evaluating = False
        self._evaluated: set[int] = set()
        self._rows = RowOrder(args)

    @property
    def last_iteration(self) -> int:
        """The last iteration that was trained or skipped; before the first, that of the checkpoint."""
        return self._last_iteration

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingRun:
        """Return self. With more tensor-parallel ranks than key/value groups, Megatron copies the
        configuration for each layer (core/transformer/attention.py), and our hooks are attached to it."""
        return self

    def provide_datasets(
        self, num_samples: tuple[int, int | None, int | None], vp_stage: int | None = None
    ) -> tuple[PackedDataset | None, PackedDataset | None, None]:
        """Provide Megatron with training and validation rows; there is no test split.

        Called after the checkpoint is loaded, on every rank; only tensor-parallel rank 0 reads rows,
        on every pipeline stage, because each stage needs the document boundaries.
        """
        self.rank_watch.mark("opening the data", iteration=self.args.iteration + 1, is_slow=True)
        self._last_iteration = self.args.iteration
        if vp_stage in (None, 0):
            self._open_records(self.args.iteration)
            require_same_objects(self.args, self.manifest)
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            return None, None, None
        train = train_dataset(self.args, self.manifest, self.weighting, num_samples[0])
        validation = validation_dataset(self.args, num_samples[1]) if num_samples[1] else None
        return train, validation, None

    provide_datasets.is_distributed = True  # type: ignore[attr-defined]

    def forward_step(self, iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
        """Run the forward step; return the model's output and the loss function of this micro-batch."""
        may_compile = self._is_first_step or self._is_evaluating
        self.rank_watch.mark("reading a micro-batch", is_slow=may_compile)
        batch = next_packed_batch(
            iterator if self._is_evaluating else self.throughput.waiting(iterator),
            micro_batch_size=self.args.micro_batch_size,
            row_tokens=self.manifest.row_tokens,
            rounds_boundaries=self._rounds_boundaries,
        )
        if not self._is_evaluating:
            self.throughput.count(batch.packing.cu_seqlens_q, model)
        self.rank_watch.mark("computing", is_slow=may_compile)
        output = model(
            batch.tokens,
            batch.position_ids,
            None,  # a dense mask would be ignored by Transformer Engine: boundaries are in packing
            labels=batch.labels,
            packed_seq_params=batch.packing,
            output_processor=self._head_for(batch.targets),
        )
        if batch.targets is None:
            return output, None  # Megatron calls the loss function on the last stage alone
        return output, partial(self._loss, targets=batch.targets)

    def _head_for(self, targets: Targets | None) -> Callable[..., Tensor] | None:
        """Return the loss head; on a CPU it is told the weights of the targets if they are known by now."""
        head = self._loss_head
        is_weighed_later = self.short_scores is not None
        if head is None or targets is None or self._is_evaluating or is_weighed_later:
            return head
        if targets.weights.is_cuda:  # where it makes no use of them
            return head
        return partial(head, expected_factors=targets.loss_mask * targets.weights)

    def _loss(self, token_losses: Tensor, *, targets: Targets) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if self.short_scores is not None and not self._is_evaluating:
            targets = self.short_scores.weigh(token_losses, targets)
        return weighted_token_loss(
            token_losses,
            targets,
            self._running,
            divides_by_mass=self.weighting.divides_by_mass and not self._is_evaluating,
        )

    def finalize_grads(self, model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Finalize the gradients, as Megatron asks at the end of every forward-backward pass of training.

        Sums are taken here, not in the log, so that a pass that Megatron repeats counts once.
        """
        self.rank_watch.mark("reducing gradients", is_slow=self._is_first_step)
        self._model = model
        self.numbers.losses = self._running.losses
        self._step_sums = self._running.take()
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        self.step_groups = [_without_parameters(group) for group in groups]
        if self.weighting.divides_by_mass:
            finalize_divided_by_mass(model, self._step_sums[-1], **kwargs)
        else:
            finalize_model_grads(model, num_tokens, **kwargs)
        self.rank_watch.mark("taking the step", is_slow=self._is_first_step)

    def _open_records(self, iteration: int) -> None:
        is_last_rank = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        if self.run_dir is None or not is_last_rank or self.records is not None:
            return
        is_begun = (self.run_dir / RUN_RECORD).exists()
        wandb_run = wandb_run_id()
        if wandb_run is not None:
            self.record["wandb_run"] = wandb_run
        recorded = read_lines(self.run_dir / LOSSES)
        reached = recorded[-1]["iteration"] if recorded else 0
        self._restart = restart_row(os.environ.get(RESTART_VARIABLE), iteration, reached)
        resumed = iteration if self.is_resume else None
        write_run_record(self.run_dir, self.record, resumed, self._restart)
        if self._restart is not None:
            rows = restarts_of(read_run_record(self.run_dir) or {})
            print(f"megatron_exact: {describe_restarts(rows)}", flush=True)
        if is_begun:
            drop_points_after(iteration)
        doubt = write_hf_folder(self.model, self.args, self.manifest)
        if doubt is not None:
            print(f"megatron_exact: {doubt}", flush=True)
        self.records = RunRecords(self.run_dir, iteration)
        self._spikes = SpikeDetector(
            self.args.spike_deviations, self.args.spike_window, self.records.losses()
        )

    def record_iteration(
        self,
        iteration: int,
        *,
        grad_norm: float | None,
        learning_rate: float | None,
        skipped: bool = False,
    ) -> None:
        """Reduce the sums of the iteration and write its line; called on every rank.

        Raises:
            NonFiniteError: on every rank, if the step was refused and the job is to stop.
        """
        self._last_iteration = iteration
        sums, self._step_sums = self._step_sums, None
        totals = self._reduce(sums)
        self.reported = {}
        if totals is not None and totals.targets:
            objective = totals.objective(divides_by_mass=self.weighting.divides_by_mass)
            self.reported = {"lm loss": totals.loss, "weighted loss": objective}
        if totals is not None and self.records is not None:
            self._record(
                iteration, totals, grad_norm=grad_norm, learning_rate=learning_rate, skipped=skipped
            )
        if self.numbers.refused:
            report_refused(
                self.numbers,
                self._model,
                self._rows.last_step(),
                iteration,
                args=self.args,
                facts={"fingerprint": self.manifest.fingerprint, "layout": self.record["layout"]},
                run_dir=None if self.records is None else self.records.run_dir,
            )
        elif not skipped:
            self.on_good_step(iteration)
        if self._restart is not None and self.records is not None:
            end_restart(self.records.run_dir, time.time())
            self._restart = None
        self.numbers.begin_step()
        self._is_first_step = False
        self.rank_watch.mark("ending the iteration", iteration=iteration + 1)

    def record_left_out(self) -> None:
        """Write the line of an iteration of `--iterations-to-skip`: its rows are read, not trained on."""
        self._last_iteration += 1
        self.rank_watch.mark("ending the iteration", iteration=self._last_iteration + 1)
        if self.records is None:
            return
        self.records.iteration(
            self._last_iteration,
            totals_of(self._running.take()),  # zeros
            divides_by_mass=self.weighting.divides_by_mass,
            grad_norm=None,
            learning_rate=None,
            skipped=True,
        )

    def _record(
        self,
        iteration: int,
        totals: StepTotals,
        *,
        grad_norm: float | None,
        learning_rate: float | None,
        skipped: bool,
    ) -> None:
        assert self.records is not None
        self.records.iteration(
            iteration,
            totals,
            divides_by_mass=self.weighting.divides_by_mass,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            skipped=skipped,
        )
        if self.args.log_row_ids:
            step = self._rows.last_step()
            self.records.rows(iteration, step.epoch, step.all())
        spike = self._spikes.add(totals.loss)
        if spike is not None:
            step = self._rows.last_step()
            self.records.spike(iteration, spike, step.epoch, step.all())
            print(f"megatron_exact: loss spike in iteration {iteration}: {spike}, rows in {SPIKES}")
        if iteration % self.args.tensorboard_log_interval == 0:
            draw_totals("training", iteration, totals, self.weighting)

    def was_evaluated(self, iteration: int) -> bool:
        """Return whether this job has evaluated the iteration: Megatron evaluates the last one twice."""
        return iteration in self._evaluated

    def begin_evaluation(self) -> None:
        """Discard the sums of an unfinished training pass, and stop weighting."""
        self._running.take()
        self._is_evaluating = True

    def record_evaluation(self, iteration: int) -> None:
        """Reduce the sums of an evaluation and write its line; called on every rank."""
        self._is_evaluating = False
        self._evaluated.add(iteration)
        totals = self._reduce(self._running.take())
        rows = self.args.eval_iters * self.args.global_batch_size
        self.rank_watch.mark("ending the evaluation")
        if totals is None or self.records is None:
            return
        if not math.isfinite(totals.loss):
            print(f"megatron_exact: the evaluation in iteration {iteration} has a loss of {totals.loss}")
        if totals.positions == rows * self.manifest.row_tokens:  # else a time limit cut it short
            self.records.evaluation(iteration, totals)
            draw_totals("validation", iteration, totals, self.weighting)

    def _reduce(self, sums: Tensor | None) -> StepTotals | None:
        """Sum over the data-parallel ranks of the last pipeline stage; None on other stages."""
        if not parallel_state.is_pipeline_last_stage() or sums is None:
            return None
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(sums, group=group)
        return totals_of(sums)


def _loss_head(args: Any) -> TiledLossHead | None:
    """Return the replacement of Megatron's logits and cross-entropy, or None for Megatron's own."""
    if args.loss_head == "stock":
        return None
    tiles = Tiles(tokens=args.loss_head_tokens, columns=args.loss_head_columns)
    return TiledLossHead(vocabulary=args.vocab_size, tiles=tiles)


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    """Copy a parameter group; a learning rate that is a tensor is overwritten in place later."""
    kept = {name: value for name, value in group.items() if name != "params"}
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in kept.items()}
