"""The layouts on which a job has to agree with itself on one process, and how that is measured.

`test_layouts.py` runs them as tests, `benchmarks/layouts.py` writes what they differ by to
`docs/exactness.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_exact.model import context_parallel
from tests.distributed import jobs, ranks

ITERATIONS = 6
RULES = ("none", "exact", "exact-normalized")
CONTROLS = ("random-same-mass", "packed-position")
"""Rules whose weights are more than a bucket's, for CONTROL_LAYOUTS alone and for `make test-slow`."""
BOUNDS = {"loss": 2e-6, "weighted_loss": 2e-6, "grad_norm": 1e-5}
"""float32, relative, of each iteration: DESIGN's agreement between layouts."""
BF16_BOUNDS = {"loss": 2e-3, "weighted_loss": 2e-3, "grad_norm": 1.6e-2}
"""bfloat16 against bfloat16 on one process: one rounding (2^-9) of the loss, eight of the gradient norm.

Where a layout changes the shape or the order of a product, its result is rounded to 8 bits elsewhere."""
CONTROL_FACTOR = 1000
"""A fault of the layouts, and another rule, differ by more than this many bounds (float32)."""

TP2 = ("--tensor-model-parallel-size", 2)
TP4 = ("--tensor-model-parallel-size", 4)
PP2 = ("--pipeline-model-parallel-size", 2)
PP4 = ("--pipeline-model-parallel-size", 4)
VPP = (*PP2, "--num-layers-per-virtual-pipeline-stage", 1)
CP2 = ("--context-parallel-size", 2)
CP4 = ("--context-parallel-size", 4)
SP = ("--sequence-parallel",)
ROWS2 = ("--micro-batch-size", 2)
ROWS4 = ("--micro-batch-size", 4)
SELECTIVE = ("--recompute-granularity", "selective")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1)
BF16 = ("--bf16",)
STOCK = ("--loss-head", "stock")
# small buckets, so that there are several whose reduction overlaps
OVERLAP = ("--overlap-grad-reduce", "--ddp-bucket-size", 20_000)
SHARDED = ("--use-distributed-optimizer",)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a job is spread over processes."""

    world: int
    """Processes."""
    flags: tuple[Any, ...]
    """Megatron flags, or ours."""
    quick: tuple[str, ...] = ()
    """Rules that `make test` runs; the others are for `make test-slow`."""


def _layout(world: int, *flags: tuple[Any, ...], quick: tuple[str, ...] = ()) -> Layout:
    return Layout(world=world, flags=tuple(word for part in flags for word in part), quick=quick)


BOTH = ("exact", "exact-normalized")
LAST = ("exact-normalized",)

LAYOUTS: dict[str, Layout] = {
    "micro-batch 2": _layout(1, ROWS2, quick=LAST),
    "micro-batch 4": _layout(1, ROWS4),
    "recompute selective": _layout(1, SELECTIVE),
    "recompute full": _layout(1, FULL),
    "stock loss head": _layout(1, STOCK, quick=("exact",)),
    "TP2": _layout(2, TP2, quick=LAST),
    "TP2, stock loss head": _layout(2, TP2, STOCK),
    "TP2 + SP": _layout(2, TP2, SP, quick=RULES),
    "TP2 + SP, recompute full": _layout(2, TP2, SP, FULL),
    "TP2 + SP, micro-batch 2": _layout(2, TP2, SP, ROWS2),
    "TP4": _layout(4, TP4),
    "PP2": _layout(2, PP2, quick=LAST),
    "PP2, micro-batch 2": _layout(2, PP2, ROWS2, quick=BOTH),
    "PP2, micro-batch 4": _layout(2, PP2, ROWS4),
    "PP4": _layout(4, PP4),
    "VPP, 2 x 2 stages": _layout(2, VPP),
    "TP2 x PP2": _layout(4, TP2, PP2),
    "TP2 x PP2 + SP": _layout(4, TP2, PP2, SP),
    "TP2 x PP2 + SP, micro-batch 2": _layout(4, TP2, PP2, SP, ROWS2, quick=LAST),
    "DP2": _layout(2),
    "DP2, micro-batch 2": _layout(2, ROWS2, quick=LAST),
    "DP2, overlapped gradient reduction": _layout(2, OVERLAP),
    "DP2, distributed optimizer": _layout(2, SHARDED, quick=LAST),
    "DP2, distributed optimizer, overlapped": _layout(2, SHARDED, OVERLAP, ("--overlap-param-gather",)),
    "DP2 x TP2": _layout(4, TP2),
    "DP2 x TP2 + SP, distributed optimizer, overlapped": _layout(
        4, TP2, SP, SHARDED, OVERLAP, ("--overlap-param-gather",)
    ),
    "CP2": _layout(2, CP2, quick=RULES),
    "CP2, micro-batch 2": _layout(2, CP2, ROWS2, quick=LAST),
    "CP2, recompute selective": _layout(2, CP2, SELECTIVE),
    "CP2, distributed optimizer": _layout(2, CP2, SHARDED),
    "CP4": _layout(4, CP4),
    "CP2 x TP2 + SP": _layout(4, CP2, TP2, SP, quick=LAST),
    "CP2 x PP2": _layout(4, CP2, PP2),
    "CP2 x PP2, micro-batch 2": _layout(4, CP2, PP2, ROWS2),
    "CP2 x DP2": _layout(4, CP2),
}
"""TP tensor, PP pipeline, DP data, CP context, SP sequence parallel; else as the reference."""

DAMPED = ("--adam-eps", 1e-6)
"""For the controls: Adam's first step is the sign of a gradient, and of one that is 0 but for rounding the
sign is chance. The weights of `random-same-mass` happen to make such gradients; the weights are the same on
every layout to the bit, which `test_layouts.py` looks at."""

CONTROL_LAYOUTS = ("micro-batch 4", "TP2 + SP", "PP2, micro-batch 2", "DP2", "CP2")
"""Each way of dealing out rows and targets once."""

BF16_LAYOUTS = (
    *("micro-batch 2", "recompute full", "stock loss head", "TP2", "TP2 + SP", "TP4", "PP2", "DP2"),
    *("DP2, distributed optimizer", "CP2", "CP4", "CP2 x TP2 + SP"),
)
"""Those that run in bfloat16 as well."""

REFERENCE = Layout(world=1, flags=("--micro-batch-size", 1))
"""One process, one row at a time, tiled loss head, every gradient and state in one place."""


def make_start(pack: Path, folder: Path, size: tuple[Any, ...] = jobs.LARGE) -> Path:
    """A checkpoint from which every layout starts: random initialisation would depend on the layout.

    With the usual 0.02, attention would be all but uniform, and a fault in it would hardly be seen.
    """
    save = ("--init-method-std", 0.2, "--save", folder, "--save-interval", 2)
    argv = jobs.command(pack, "none", 2, *size, *save)
    ranks.train(1, argv, folder.with_name(f"{folder.name}-output")).check()
    return folder


def run(
    layout: Layout,
    rule: str,
    pack: Path,
    checkpoint: Path,
    folder: Path,
    *more: Any,
    size: tuple[Any, ...] = jobs.LARGE,
    fault: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Records of a job's iterations.

    Args:
        layout: where it runs.
        rule: of `--token-weighting`.
        pack: packed dataset.
        checkpoint: weights that it starts from.
        folder: for records and output, made here.
        more: further flags.
        size: flags of layers and batch, those of the checkpoint.
        fault: called in each rank first, to break what is measured.
    """
    start = ("--pretrained-checkpoint", checkpoint, "--run-dir", folder / "run")
    argv = jobs.command(pack, rule, ITERATIONS, *size, *start, *layout.flags, *more)
    ranks.train(layout.world, argv, folder, fault).check()
    return ranks.read_jsonl(folder / "run" / "losses.jsonl")


def no_positions() -> None:
    """A fault: every token rotated as the first of its segment."""
    sound = context_parallel.local_tokens

    def without_positions(*args: Any) -> context_parallel.LocalTokens:
        own = sound(*args)
        return replace(own, positions=torch.zeros_like(own.positions))

    context_parallel.local_tokens = without_positions  # type: ignore[assignment]


def order_of_ranks() -> None:
    """A fault: gathered keys and values stay in the order of the ranks."""
    context_parallel.in_stream_order = lambda gathered, _: gathered


def no_boundaries() -> None:
    """A fault: the whole row is one document, at the right positions."""
    sound = context_parallel.local_tokens

    def one_segment(cu_seqlens: Any, *args: Any) -> context_parallel.LocalTokens:
        return replace(sound(cu_seqlens[[0, -1]], *args), positions=sound(cu_seqlens, *args).positions)

    context_parallel.local_tokens = one_segment  # type: ignore[assignment]


FAULTS: dict[str, Callable[[], None]] = {
    "no positions": no_positions,
    "keys in the order of the ranks": order_of_ranks,
    "no document boundaries": no_boundaries,
}
"""Negative controls, run on CP2."""


def largest_differences(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """By key of BOUNDS, the largest of all iterations, relative to `theirs`."""
    return {
        key: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(ours, theirs, strict=True))
        for key in BOUNDS
    }


def same_targets(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> bool:
    """Whether every iteration counted the same targets in every bucket, and none else."""
    counts = [
        [(line["iteration"], line["bucket_targets"], line["targets"]) for line in lines]
        for lines in (ours, theirs)
    ]
    return counts[0] == counts[1] and all(sum(buckets) == total for _, buckets, total in counts[0])
