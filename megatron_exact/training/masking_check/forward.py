"""The job's model on the job's layout, and the losses of every target of given micro-batches.

The model is built and loaded by the function that upstream's driver calls, without an optimizer; the
micro-batches take the job's own way: `next_packed_batch`, `PackedSeqParams`, upstream's pipeline schedule
and the job's loss head. So whatever loses document boundaries in training loses them here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_exact.training.job import Job
from megatron_exact.training.masking_check.variants import Batch, segments_of
from megatron_exact.training.watch.rank_watch import RankWatch

ROWS_LOOKED_AT = 64


class JobModel:
    """The model of a job on this rank; every rank makes one. Starts the process groups.

    Args:
        job: from `prepare_job`; nothing is written to its folders.
        watch: of the ranks.

    Raises:
        ValueError: what the job itself would refuse.
    """

    def __init__(self, job: Job, watch: RankWatch) -> None:
        import megatron.training.training as driver
        from megatron.core.enums import ModelType
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.initialize import initialize_megatron

        from megatron_exact.training.megatron_parse import parse_for_megatron
        from megatron_exact.training.pretrain import assemble

        job = dataclasses.replace(job, run_dir=None, argv=[*job.argv, "--skip-train", "--no-load-rng"])
        self.args, config = parse_for_megatron(job)
        self.args.tensorboard_dir = None
        self.args.wandb_project = ""
        self.args.train_iters = None  # a finished run can be checked too
        self.run = assemble(job, self.args, config, {}, watch)
        initialize_megatron()
        self.chunks, _, _ = driver.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(self.args, config),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )

    def micro_batch(self) -> Batch:
        """The first micro-batch of this data-parallel rank whose rows hold several documents.

        Raises:
            ValueError: the pack has no such row among its first ones.
        """
        from megatron.core import parallel_state
        from torch.utils.data import default_collate

        from megatron_exact.data.dataset import PackedDataset

        args = self.args
        rows = PackedDataset(args.pack, "train", seed=args.seed, source_root=args.source_root)
        replica = parallel_state.get_data_parallel_rank()
        wanted = args.micro_batch_size * parallel_state.get_data_parallel_world_size()
        found = []
        looked_at = min(max(ROWS_LOOKED_AT, 2 * wanted), len(rows))
        for index in range(looked_at):
            sample = rows[index]
            if len(segments_of({key: value[None] for key, value in sample.items()})) > 1:
                found.append(sample)
            if len(found) == wanted:
                break
        if not found:
            raise ValueError(
                f"each of the first {looked_at} rows of {args.pack} is one document: there are no "
                "neighbours to keep apart; check with a pack of shorter documents"
            )
        first = replica * args.micro_batch_size
        own = [found[place % len(found)] for place in range(first, first + args.micro_batch_size)]
        batch: Batch = default_collate(own)
        return batch

    def token_losses(self, batches: list[Batch]) -> Tensor | None:
        """Cross-entropy at every place of every micro-batch; every rank calls it.

        Args:
            batches: read by tensor-parallel rank 0 of each pipeline stage, equal on all of them.

        Returns:
            [batches, T], float32 on the CPU; None except on the last pipeline stage.
        """
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        args = self.args
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        padded = [*batches, *batches[:1] * (-len(batches) % stages)]  # virtual stages ask for a multiple
        reads = parallel_state.get_tensor_model_parallel_rank() == 0
        iterators = [iter(padded) if reads else None for _ in self.chunks]
        with torch.no_grad():
            outputs = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
                model=self.chunks,
                num_microbatches=len(padded),
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                forward_only=True,
                collect_non_loss_data=True,
            )
        if not parallel_state.is_pipeline_last_stage():
            return None
        local = torch.stack([output.float().reshape(-1) for output in outputs[: len(batches)]])
        return self._whole_stream(local).cpu()

    def _forward_step(self, iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
        output, _ = self.run.forward_step(iterator, chunk)
        return output, lambda losses, non_loss_data: losses.detach()

    def _whole_stream(self, local: Tensor) -> Tensor:
        """[n, T / N] of the N context-parallel ranks to [n, T] on each of them."""
        from megatron.core import parallel_state

        from megatron_exact.training.batch import tokens_of_this_rank

        group = parallel_state.get_context_parallel_group()
        if group.size() == 1:
            return local
        total = local.shape[1] * group.size()
        places = torch.arange(total, device=local.device)[None]
        whole = local.new_zeros(local.shape[0], total)
        whole[:, tokens_of_this_rank({"tokens": places})["tokens"].reshape(-1)] = local
        torch.distributed.all_reduce(whole, group=group)
        return whole
