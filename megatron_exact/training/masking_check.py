"""Check document masking on a job's own model, layout and pack, by perturbing its first micro-batch.

The check makes three claims:

(a) A token affects only later tokens of its own document. After one token changes, every other loss is
    bit-identical, because each position of a row is computed by the same operations on the same numbers.
(b) A document gives the same losses in its row as alone, within the rounding of the dtype.
(c) A leak would show. Without boundaries, the same measurements exceed the same bounds.

Labels never change with tokens, so a loss that changes means that a hidden state changed. The model is
built and loaded by the function that Megatron's driver calls, without an optimizer. Micro-batches take the
job's own path: `next_packed_batch`, `PackedSeqParams`, Megatron's pipeline schedule and the job's loss
head. What loses document boundaries in training therefore loses them here.

b = micro-batch rows, S = row tokens, T = b * S. The rows of a micro-batch are flattened into one stream of
T tokens, as in training; positions count in that stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_exact.data.rows import PADDING_TOKEN
from megatron_exact.training.hang_detection import RankWatch
from megatron_exact.training.job import Job, prepare_job
from megatron_exact.training.job_endings import end_failed_job
from megatron_exact.training.runtime import rank

Batch = dict[str, Tensor]
"""Collated samples of `PackedDataset`: [b, S], `cu_seqlens` int32 [b, S + 1], `max_seqlen` int32 [b]."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The part of a document in a row."""

    start: int
    """Position of its first token."""
    end: int
    """Position after its last token."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An edited micro-batch."""

    kind: str
    """unchanged, repeated, changed, alone, merged or merged-changed."""
    batch: Batch
    """The micro-batch that the model reads."""
    segment: int = -1
    """Number of the segment that was changed or isolated."""
    position: int = -1
    """Position of the changed token."""


def segments_of(batch: Batch) -> list[Segment]:
    """Return the segments of a micro-batch in order; padding at the end of a row counts as one."""
    size = batch["tokens"].shape[1]
    segments = []
    for row, boundaries in enumerate(batch["cu_seqlens"]):
        for start, end in pairwise(boundaries.unique_consecutive().tolist()):
            segments.append(Segment(start=row * size + start, end=row * size + end))
    return segments


def choose_segments(segments: list[Segment], limit: int) -> list[int]:
    """Choose the segments to test by number: first, longest, last, shortest, then the others in order."""
    by_length = sorted(range(len(segments)), key=lambda i: segments[i].end - segments[i].start)
    preferred = [0, by_length[-1], len(segments) - 1, by_length[0], *range(len(segments))]
    return list(dict.fromkeys(preferred))[:limit]


def make_variants(batch: Batch, limit: int, vocabulary: int) -> list[Variant]:
    """Return all micro-batches of a check; the first is the unchanged one.

    Args:
        batch: a micro-batch of the job.
        limit: how many documents to change and to isolate.
        vocabulary: number of token ids.
    """
    segments = segments_of(batch)
    merged = without_boundaries(batch)
    variants = [
        Variant(kind="unchanged", batch=batch),
        Variant(kind="repeated", batch=batch),
        Variant(kind="merged", batch=merged),
        Variant(
            kind="merged-changed", batch=with_token_changed(merged, 0, vocabulary), segment=0, position=0
        ),
    ]
    for number in choose_segments(segments, limit):
        segment = segments[number]
        for position in dict.fromkeys((segment.start, segment.end - 1)):
            changed = with_token_changed(batch, position, vocabulary)
            variants.append(Variant(kind="changed", batch=changed, segment=number, position=position))
        variants.append(Variant(kind="alone", batch=alone(batch, segment), segment=number))
    return variants


def with_token_changed(batch: Batch, position: int, vocabulary: int) -> Batch:
    """Return the same micro-batch with another token at one position."""
    tokens = batch["tokens"].clone()
    flat = tokens.view(-1)
    flat[position] = (flat[position] + 1) % vocabulary
    return {**batch, "tokens": tokens}


def without_boundaries(batch: Batch) -> Batch:
    """Return the same tokens with each row as one document, as without document masking."""
    rows, size = batch["tokens"].shape
    return {**batch, **_boundaries([[0, size]] * rows, size)}


def alone(batch: Batch, segment: Segment) -> Batch:
    """Return a micro-batch with one segment at the start of the stream, then padding in small pieces.

    The micro-batch keeps its shape, on which pipeline and context parallel ranks rely.
    """
    rows, size = batch["tokens"].shape
    length = segment.end - segment.start
    tokens = torch.full_like(batch["tokens"], PADDING_TOKEN)
    labels = torch.zeros_like(batch["labels"])
    for filled, key in ((tokens, "tokens"), (labels, "labels")):
        filled.view(-1)[:length] = batch[key].reshape(-1)[segment.start : segment.end]
    piece = int(batch["max_seqlen"].max())
    first = [0, *range(length, size, piece), size]
    others = [*range(0, size, piece), size]
    return {
        **batch,
        **_boundaries([first, *[others] * (rows - 1)], size),
        "tokens": tokens,
        "labels": labels,
    }


def _boundaries(rows: list[list[int]], size: int) -> Batch:
    """Return the entries that carry boundaries, from 0 to S in each row, as `PackedDataset` makes them."""
    cu_seqlens = torch.full((len(rows), size + 1), size, dtype=torch.int32)
    positions = torch.arange(size).repeat(len(rows), 1)
    longest = []
    for row, boundaries in enumerate(rows):
        cu_seqlens[row, : len(boundaries)] = torch.tensor(boundaries, dtype=torch.int32)
        for start, end in pairwise(boundaries):
            positions[row, start:end] -= start
        longest.append(max(end - start for start, end in pairwise(boundaries)))
    return {
        "cu_seqlens": cu_seqlens,
        "position_ids": positions,
        "max_seqlen": torch.tensor(longest, dtype=torch.int32),
    }


ROWS_LOOKED_AT = 64


class CheckedModel:
    """The model of a job on this rank; every rank makes one, which starts the process groups.

    Args:
        job: from `prepare_job`; nothing is written to its folders.
        watch: the watch over the ranks.

    Raises:
        ValueError: flags that the job itself would not accept.
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
        """Return the first micro-batch of this data-parallel rank whose rows have several documents.

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
                "neighbors to keep apart; check with a pack of shorter documents"
            )
        first = replica * args.micro_batch_size
        own = [found[index % len(found)] for index in range(first, first + args.micro_batch_size)]
        batch: Batch = default_collate(own)
        return batch

    def token_losses(self, batches: list[Batch]) -> Tensor | None:
        """Return the cross-entropy at every position of every micro-batch; called on every rank.

        Args:
            batches: equal on all ranks; tensor-parallel rank 0 of each pipeline stage reads them.

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
        """Gather [n, T / N] of each of the N context-parallel ranks into [n, T] on all of them."""
        from megatron.core import parallel_state

        from megatron_exact.training.batch import tokens_of_this_rank

        group = parallel_state.get_context_parallel_group()
        if group.size() == 1:
            return local
        total = local.shape[1] * group.size()
        positions = torch.arange(total, device=local.device)[None]
        whole = local.new_zeros(local.shape[0], total)
        whole[:, tokens_of_this_rank({"tokens": positions})["tokens"].reshape(-1)] = local
        torch.distributed.all_reduce(whole, group=group)
        return whole


ALONE_BOUNDS = {"fp32": 1e-4, "bf16": 0.03, "fp16": 0.03, "fp8": 0.3}
"""Bounds of (b) by dtype of the matrix products, nats. On CPUs, fp32 and bf16 stay below a tenth of them
(tests/distributed/test_masking_check.py). They were not tried on the kernels of a GPU, nor in fp8."""
REPEAT_FACTOR = 4
"""The bound of (a), as a multiple of the difference between two equal runs; 0 where they are identical."""

NEIGHBOR = "(a) one token changed: other documents"
EARLIER = "(a) one token changed: earlier tokens"
ALONE = "(b) a document in its row and alone"
OWN = "control: one token changed: its own loss"
NEIGHBOR_CONTROL = "control of (a): the same without boundaries"
ALONE_CONTROL = "control of (b): the row without boundaries"
CONTROLS = (OWN, NEIGHBOR_CONTROL, ALONE_CONTROL)
REPEATED = "repeated"
LEAK_SHARE = "leak share"
"""How much other documents change after the first token does, relative to the row without boundaries."""

NOT_CHECKED = (
    "Not checked: gradients, other rows than these, other layouts, and whether the pack's boundaries are "
    "those of the texts (megatron-exact pack --verify)."
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The largest of many differences; of a control, the smallest."""

    difference: float
    """|loss - loss|, nats; NaN if a loss is not finite."""
    where: str
    """The tokens, in words."""


@dataclass(frozen=True, kw_only=True)
class MaskingCheck:
    """One line of the report's table."""

    name: str
    """The comparison."""
    difference: float
    """Largest difference of all rows, nats; of a control, the smallest."""
    bound: float
    """The difference must not exceed it; that of a control must."""
    is_control: bool
    """Whether the difference must exceed the bound."""
    where: str
    """The tokens at which the difference was found."""

    @property
    def passed(self) -> bool:
        """Whether the difference is on the right side of the bound; false for NaN."""
        return self.difference > self.bound if self.is_control else self.difference <= self.bound


def measure(losses: Tensor, variants: Sequence[Variant]) -> dict[str, Measured]:
    """Measure the differences between the variants of one micro-batch.

    Args:
        losses: [variants, T], nats.
        variants: from `make_variants`.
    """
    of_kind = {variant.kind: row for variant, row in zip(variants, losses, strict=True)}
    base, merged = of_kind["unchanged"], of_kind["merged"]
    segments = segments_of(variants[0].batch)
    size = variants[0].batch["tokens"].shape[1]
    found: dict[str, list[Measured]] = {REPEATED: [_largest(of_kind["repeated"] - base, 0, "")]}
    found[ALONE_CONTROL] = [_largest(merged - base, 0, "merged rows")]
    behind = slice(segments[0].end, size)
    pushed = (of_kind["merged-changed"] - merged)[behind]
    first = next(
        i for i, variant in enumerate(variants) if variant.kind == "changed" and not variant.position
    )
    kept = (losses[first] - base)[behind]
    share = float(kept.abs().sum() / pushed.abs().sum().clamp(min=1e-30))
    found[LEAK_SHARE] = [Measured(difference=share, where="")]
    found[NEIGHBOR_CONTROL] = [_largest(pushed, behind.start, "merged rows, token 0 changed")]
    for variant, row in zip(variants, losses, strict=True):
        if variant.kind == "changed":
            for name, measured in _after_change(row - base, variant, segments).items():
                found.setdefault(name, []).append(measured)
        elif variant.kind == "alone":
            segment = segments[variant.segment]
            difference = row[: segment.end - segment.start] - base[segment.start : segment.end]
            words = f"document at tokens {segment.start} to {segment.end - 1}"
            found.setdefault(ALONE, []).append(_largest(difference, segment.start, words))
    return {name: extreme(name, measured) for name, measured in found.items()}


def _after_change(difference: Tensor, variant: Variant, segments: list[Segment]) -> dict[str, Measured]:
    segment, position = segments[variant.segment], variant.position
    words = f"token {position} changed, document at tokens {segment.start} to {segment.end - 1}"
    outside = difference.clone()
    outside[segment.start : segment.end] = 0
    return {
        NEIGHBOR: _largest(outside, 0, words),
        EARLIER: _largest(difference[segment.start : position], segment.start, words),
        OWN: _largest(difference[position : position + 1], position, words),
    }


def _largest(difference: Tensor, start: int, words: str) -> Measured:
    if not difference.numel():
        return Measured(difference=0.0, where="")
    position = int(difference.abs().argmax())  # of NaN, if there is one
    if difference[position] == 0:
        return Measured(difference=0.0, where="")
    return Measured(
        difference=float(difference[position].abs()), where=f"{words}; seen at token {start + position}"
    )


def extreme(name: str, measured: Sequence[Measured]) -> Measured:
    """Return the deciding difference: the smallest of a control, else the largest; NaN before any other."""
    not_finite = [one for one in measured if one.difference != one.difference]
    if not_finite:
        return not_finite[0]
    choose = min if name in CONTROLS else max
    return choose(measured, key=lambda one: one.difference)


def judge(found: dict[str, Measured], dtype: str) -> list[MaskingCheck]:
    """Compare the differences with their bounds.

    Args:
        found: deciding differences of all micro-batches.
        dtype: fp32, bf16, fp16 or fp8.
    """
    alone = ALONE_BOUNDS[dtype]
    # In fp8 all tokens of a tensor share a scale, so that a change anywhere may change everything a little
    exact = alone if dtype == "fp8" else REPEAT_FACTOR * found[REPEATED].difference
    return [
        MaskingCheck(
            name=name,
            difference=found[name].difference,
            bound=alone if name == ALONE else exact,
            is_control=name in CONTROLS,
            where=found[name].where,
        )
        for name in (NEIGHBOR, EARLIER, ALONE, *CONTROLS)
    ]


def explain(checks: Sequence[MaskingCheck], leak_share: float) -> list[str]:
    """Explain what the verdicts mean and what usually causes them.

    Args:
        checks: from `judge`.
        leak_share: the difference measured as LEAK_SHARE.
    """
    failed = {check.name: check for check in checks if not check.passed}
    if not failed:
        return [
            "Every document is computed as if it were alone, and the controls show that a leak would show."
        ]
    if any(check.difference != check.difference for check in checks):
        return ["Losses are not finite, so nothing can be compared: look at the checkpoint and the dtype."]
    if OWN in failed:
        return [
            "A changed token does not even change its own loss: the model does not read its tokens, so the "
            "check proves nothing. Look at the checkpoint: weights of zero do this."
        ]
    causes = []
    if NEIGHBOR in failed and leak_share > 0.5:
        causes.append(f"{IGNORED} Found with: {failed[NEIGHBOR].where}.")
    elif NEIGHBOR in failed:
        causes.append(f"{WRONG_BOUNDARIES} Found with: {failed[NEIGHBOR].where}.")
    if EARLIER in failed:
        causes.append(f"{NOT_CAUSAL} Found with: {failed[EARLIER].where}.")
    if ALONE in failed and NEIGHBOR not in failed:
        causes.append(f"{POSITIONS} Found with: {failed[ALONE].where}.")
    weak = [name for name in (NEIGHBOR_CONTROL, ALONE_CONTROL) if name in failed]
    if weak and NEIGHBOR not in failed:
        causes.append(NO_PROOF)
    return causes


IGNORED = (
    "Documents see each other as much as with all boundaries taken away: the attention does not look at "
    "them. Usual causes: boundaries given as a dense attention mask, which Transformer Engine ignores "
    "in silence (it takes them from cu_seqlens alone); a layer spec, wrapper or patch that does not hand "
    "packed_seq_params on; --reset-attention-mask without a kernel that takes the mask."
)
WRONG_BOUNDARIES = (
    "Documents see each other although boundaries reach the model. Usual causes: cu_seqlens of another row "
    "or micro-batch, or shifted by one; rows of a micro-batch flattened without adding their offsets; "
    "boundaries scanned for EOD tokens, where a document has none or several; one kind of layer, pipeline "
    "stage or context-parallel rank that takes other boundaries than the rest."
)
NOT_CAUSAL = (
    "A token sees later tokens of its own document. Usual causes: a mask type without `causal` (padding "
    "instead of padding_causal), or boundaries for queries that differ from those for keys."
)
POSITIONS = (
    "Documents do not see each other, yet one computes something else in its row than alone. Usual causes: "
    "position ids that do not restart in each document (only learned positions notice it), or rotary "
    "angles that restart at other positions than the attention; else state that outlives a document."
)
NO_PROOF = (
    "A control did not fail as it must: even without boundaries the losses hardly differ, so a pass of the "
    "other lines proves nothing. Weights near their random beginning can do this: give a trained "
    "checkpoint (--load or --pretrained-checkpoint), or drop --bf16 for tighter bounds. With trained "
    "weights it means that nothing looks at the boundaries."
)


NAME_WIDTH = 46
TEXT_WIDTH = 108
ONE_PROCESS = {
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},  # any free port
}
"""Environment that torchrun would set for a single process; the tool also runs without torchrun."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of the check over all ranks."""

    checks: list[MaskingCheck]
    """The lines of the table."""
    layout: str
    """Parallel sizes, layer implementation and dtype, in words."""
    rows: int
    """Number of rows compared."""
    repeated_difference: float
    """Largest difference between two equal runs, nats."""
    leak_share: float
    """Leak with boundaries as a share of the leak without them; 0 where masking works."""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def text(self) -> str:
        """Return the report for a terminal."""
        lines = [f"{self.rows} rows, {self.layout}; largest difference of a loss, in nats:", ""]
        lines.append(f"{'':<{NAME_WIDTH}} {'difference':>10}  {'bound':>10}  verdict")
        for check in self.checks:
            bound = f"{'>' if check.is_control else '<='} {check.bound:.2g}"
            outcome = "ok" if check.passed else "FAILED"
            lines.append(f"{check.name:<{NAME_WIDTH}} {check.difference:>10.3g}  {bound:>10}  {outcome}")
        if self.repeated_difference:
            lines.append(f"Two equal runs differ by {self.repeated_difference:.2g}: (a) cannot ask for 0.")
        words = [*explain(self.checks, self.leak_share), NOT_CHECKED]
        return "\n".join([*lines, "", *(textwrap.fill(text, TEXT_WIDTH) for text in words)])

    def as_json(self) -> str:
        """Return the report as one JSON object."""
        content = {
            "passed": self.passed,
            "layout": self.layout,
            "rows": self.rows,
            "repeated_difference": self.repeated_difference,
            "leak_share": self.leak_share,
            "checks": [{**asdict(check), "passed": check.passed} for check in self.checks],
            "explanation": explain(self.checks, self.leak_share),
            "not_checked": NOT_CHECKED,
        }
        return json.dumps(content, indent=2)


def check_document_masking(argv: Sequence[str], num_documents: int, watch: RankWatch) -> Report:
    """Build the model of a job and check it; called on every rank, with the same report on all.

    Args:
        argv: the command line of the job.
        num_documents: documents of a micro-batch to change and to isolate.
        watch: the watch over the ranks.

    Raises:
        ValueError: flags that the job itself would not accept, or a pack whose rows are single documents.
    """
    model = CheckedModel(prepare_job(argv, trains=False), watch)
    args = model.args
    variants = make_variants(model.micro_batch(), num_documents, args.vocab_size)
    losses = model.token_losses([variant.batch for variant in variants])
    own = None if losses is None else measure(losses, variants)
    every: list[Any] = [None] * args.world_size
    torch.distributed.all_gather_object(every, own)
    measured = [found for found in every if found is not None]
    found = {name: extreme(name, [one[name] for one in measured]) for name in measured[0]}
    return Report(
        checks=judge(found, _dtype(args)),
        layout=_layout(args),
        rows=args.micro_batch_size * args.data_parallel_size,
        repeated_difference=found[REPEATED].difference,
        leak_share=found[LEAK_SHARE].difference,
    )


def _dtype(args: Any) -> str:
    if args.fp8:
        return "fp8"
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def _layout(args: Any) -> str:
    sizes = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "CP": args.context_parallel_size,
        "DP": args.data_parallel_size,
    }
    parts = [f"{name} {size}" for name, size in sizes.items()]
    parts += ["SP"] if args.sequence_parallel else []
    source = f"weights of {args.load}" if args.load else "random weights"
    parts += [f"micro-batch {args.micro_batch_size}", args.transformer_impl, _dtype(args), source]
    return ", ".join(parts)


def run(argv: Sequence[str], *, num_documents: int, as_json: bool) -> int:
    """Run the check, print its report on rank 0 and return the exit code: 0 passed, 1 failed or stopped.

    Args:
        argv: the command line of the job.
        num_documents: documents of a micro-batch to change and to isolate.
        as_json: print JSON instead of text.
    """
    watch = RankWatch(0)
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(ONE_PROCESS)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Megatron prints while it builds
            report = check_document_masking(argv, num_documents, watch)
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except Exception as error:
        return end_failed_job(error, watch)
    if rank() == 0:
        print(report.as_json() if as_json else report.text(), flush=True)
    return 0 if report.passed else 1
