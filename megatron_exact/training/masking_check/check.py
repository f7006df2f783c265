"""The check as a command: every rank takes part, rank 0 tells the verdict."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_exact.training.job import prepare_job
from megatron_exact.training.masking_check import verdict
from megatron_exact.training.masking_check.variants import make_variants
from megatron_exact.training.runtime import rank
from megatron_exact.training.watch.failures import end_job
from megatron_exact.training.watch.rank_watch import RankWatch

NAME_WIDTH = 46
TEXT_WIDTH = 108
ONE_PROCESS = {
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},  # any free port
}
"""What torchrun would say to a single process; the tool also runs without it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the check found, over all ranks."""

    checks: list[verdict.Check]
    """The table."""
    layout: str
    """Parallel sizes, layer implementation and dtype, in words."""
    rows: int
    """Rows compared."""
    repeated_difference: float
    """Of two equal runs, nats."""
    leak_share: float
    """Part of the leak without boundaries that is there with them; 0 when all is well."""

    @property
    def passed(self) -> bool:
        """Whether every line is as it should be."""
        return all(check.passed for check in self.checks)

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.rows} rows, {self.layout}; largest difference of a loss, in nats:", ""]
        lines.append(f"{'':<{NAME_WIDTH}} {'difference':>10}  {'bound':>10}  verdict")
        for check in self.checks:
            bound = f"{'>' if check.is_control else '<='} {check.bound:.2g}"
            outcome = "ok" if check.passed else "FAILED"
            lines.append(f"{check.name:<{NAME_WIDTH}} {check.difference:>10.3g}  {bound:>10}  {outcome}")
        if self.repeated_difference:
            lines.append(f"Two equal runs differ by {self.repeated_difference:.2g}: (a) cannot ask for 0.")
        words = [*verdict.explain(self.checks, self.leak_share), verdict.NOT_CHECKED]
        return "\n".join([*lines, "", *(textwrap.fill(text, TEXT_WIDTH) for text in words)])

    def as_json(self) -> str:
        """One object."""
        content = {
            "passed": self.passed,
            "layout": self.layout,
            "rows": self.rows,
            "repeated_difference": self.repeated_difference,
            "leak_share": self.leak_share,
            "checks": [{**asdict(check), "passed": check.passed} for check in self.checks],
            "explanation": verdict.explain(self.checks, self.leak_share),
            "not_checked": verdict.NOT_CHECKED,
        }
        return json.dumps(content, indent=2)


def check_document_masking(argv: Sequence[str], num_documents: int, watch: RankWatch) -> Report:
    """Build the model of a job and test it; every rank calls it and gets the same report.

    Args:
        argv: the command line of the job.
        num_documents: documents of a micro-batch to change and to isolate.
        watch: of the ranks.

    Raises:
        ValueError: what the job itself would refuse, or a pack without neighbours.
    """
    job = prepare_job(argv, trains=False)
    from megatron_exact.training.masking_check.forward import JobModel

    model = JobModel(job, watch)
    args = model.args
    variants = make_variants(model.micro_batch(), num_documents, args.vocab_size)
    losses = model.token_losses([variant.batch for variant in variants])
    own = None if losses is None else verdict.measure(losses, variants)
    every: list[Any] = [None] * args.world_size
    torch.distributed.all_gather_object(every, own)
    told = [found for found in every if found is not None]
    found = {name: verdict.extreme(name, [one[name] for one in told]) for name in told[0]}
    return Report(
        checks=verdict.judge(found, _dtype(args)),
        layout=_layout(args),
        rows=args.micro_batch_size * args.data_parallel_size,
        repeated_difference=found[verdict.REPEATED].difference,
        leak_share=found[verdict.LEAK_SHARE].difference,
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
    """Check, tell, and return the exit code: 0 passed, 1 failed or could not run."""
    watch = RankWatch(0)
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(ONE_PROCESS)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what upstream says while it builds
            report = check_document_masking(argv, num_documents, watch)
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except Exception as error:
        return end_job(error, watch)
    if rank() == 0:
        print(report.as_json() if as_json else report.text(), flush=True)
    return 0 if report.passed else 1
