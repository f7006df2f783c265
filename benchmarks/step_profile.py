"""Where the CPU time of a training step goes, by the part of the model that asks for it.

    python benchmarks/step_profile.py
    python benchmarks/step_profile.py --row-tokens 2048 --layers 4

The model is that of `training_throughput.py`, in float32 on one thread. After steps that warm up, every
tensor operation of the profiled steps is timed by itself (CPU time of its thread) and counted for the
function that called it; the table has means over these steps. "Bare products" are the matrix products of
the same part without anything else, measured between the profiled steps. What a part takes beyond its bare
products is what could be saved at most.

Most of what is left has no better operator in torch: its attention kernel computes the scores again in
backward, seven products for six, and two exponentials a score; norms, SwiGLU and rotation pass over their
tensors in the cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import measure
import small_job
import torch
from small_job import VOCABULARY
from torch.utils._python_dispatch import TorchDispatchMode
from training_throughput import HEAD_DIM, bare_products, parse_options, products

from megatron_exact.command_line import run_tool

WARM_UP_STEPS = 2
LINEAR, HEAD, ATTENTION = "linear layers: products", "loss head: products", "attention kernel"
SOFTMAX, REST = "loss head: softmax, targets", "embedding, residual sums, copies, gradient buffers"
PARTS = {
    "_SwiGLU": "SwiGLU",
    "_RMSNorm": "RMSNorm",
    "_Rotation": "rotary embedding",
    "_rotate": "rotary embedding",
    "_cosines": "rotary embedding",
    "l2_norm": "norms and clipping of gradients",
    "scale_tensors": "norms and clipping of gradients",
    "NumericalWatch": "norms and clipping of gradients",
    "step": "AdamW",
    "_use_grad": "AdamW",
}
"""First part of a function's qualified name -> part of the step."""
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul")


def part_of(operation: str, frame: FrameType | None) -> str:
    """Part of the step to which an operation belongs.

    Args:
        operation: its name in aten, without overload.
        frame: innermost Python frame at the call.
    """
    is_product, in_head, found = operation in PRODUCTS, False, REST
    if "attention" in operation:
        return ATTENTION
    if operation.startswith("_fused_adam"):
        return "AdamW"
    while frame is not None:
        name = Path(frame.f_code.co_filename).name
        in_head = in_head or name == "loss_head.py"
        if name in ("cpu_kernels.py", "numerical_watch.py") or "optim" in frame.f_code.co_filename:
            known = frame.f_code.co_qualname.split(".")
            found = next((PARTS[word] for word in known if word in PARTS), found)
        if in_head or found != REST:
            break
        frame = frame.f_back
    if in_head:
        return HEAD if is_product else SOFTMAX
    return LINEAR if is_product and found == REST else found


class OperationClock(TorchDispatchMode):
    """Adds up the CPU time of operations by part of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        part = part_of(func.overloadpacket.__name__, sys._getframe(1))
        began = time.thread_time()
        result = func(*args, **(kwargs or {}))
        self.seconds[part] += time.thread_time() - began
        self.calls[part] += 1
        return result


class ProfiledSteps:
    """Called in place of Megatron's training step: every other step after the warm-up is profiled."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.clock = OperationClock()
        self.plain: list[float] = []
        self.profiled = 0
        self.bare: dict[str, list[float]] = {LINEAR: [], HEAD: [], ATTENTION: []}
        self.segments: list[list[int]] = []

    def watch_rows(self) -> None:
        """Learn the segments of the rows from the attention that gets them."""
        from megatron_exact.model import packed_attention

        stock = packed_attention.attend_by_segment

        def attend(query: Any, key: Any, value: Any, packing: Any, scale: float) -> Any:
            lengths = [length for length in packing.cu_seqlens_q.diff().tolist() if length]
            if not self.segments or self.segments[-1] != lengths:
                self.segments.append(lengths)
            return stock(query, key, value, packing, scale)

        packed_attention.attend_by_segment = attend

    def step(self, stock: Callable[[], Any], number: int) -> Any:
        """Warm up, then profiled and plain steps in turn, each followed by its bare products."""
        if number < WARM_UP_STEPS:
            return stock()
        if number % 2 == 0:
            with self.clock:
                result = stock()
            self.profiled += 1
            self._bare(self.segments[-1])
            return result
        result, clock = small_job.timed(stock)
        self.plain.append(clock[1])
        return result

    def _bare(self, segments: list[int]) -> None:
        whole = list(products(self.options, segments))
        head, linear = [], []
        for product in whole[:15]:  # five weights, three products each
            (head if VOCABULARY in (*product[0].shape, *product[1].shape) else linear).append(product)
        for part, prepared in ((LINEAR, linear), (HEAD, head), (ATTENTION, whole[15:])):
            _, clock = small_job.timed(lambda prepared=prepared: bare_products(prepared))
            self.bare[part].append(clock[1])

    def table(self) -> list[measure.Row]:
        """A row a part, largest first."""
        total = sum(self.clock.seconds.values()) / self.profiled
        bare = {part: statistics.mean(times) for part, times in self.bare.items()}
        everything = sum(bare.values())
        rows = []
        for part, seconds in self.clock.seconds.most_common():
            mean = seconds / self.profiled
            beyond = mean - bare.get(part, 0.0)
            rows.append(
                {
                    "part of a step": part,
                    "operations": round(self.clock.calls[part] / self.profiled),
                    "CPU ms": 1000 * mean,
                    "of all": f"{mean / total:.1%}",
                    "bare products, CPU ms": 1000 * bare[part] if part in bare else None,
                    "beyond them, of all bare products": f"{beyond / everything:.1%}",
                }
            )
        rows.append(
            {
                "part of a step": "all operations",
                "operations": round(sum(self.clock.calls.values()) / self.profiled),
                "CPU ms": 1000 * total,
                "of all": "100%",
                "bare products, CPU ms": 1000 * everything,
                "beyond them, of all bare products": f"{total / everything - 1:.1%}",
            }
        )
        return rows


def job_arguments(pack: Path, options: argparse.Namespace) -> list[Any]:
    """Of the job."""
    return [
        *("--pack", pack, "--token-weighting", "none", "--seed", options.seed),
        *("--num-layers", options.layers, "--hidden-size", options.hidden),
        *("--ffn-hidden-size", options.hidden * 8 // 3),
        *("--num-attention-heads", options.hidden // HEAD_DIM),
        *("--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear"),
        *("--position-embedding-type", "rope", "--untie-embeddings-and-output-weights"),
        *("--vocab-size", VOCABULARY, "--global-batch-size", 1, "--lr", "1e-4", "--clip-grad", 1.0),
        *("--lr-decay-style", "constant", "--log-interval", 1000, "--eval-iters", 0),
        *("--train-iters", WARM_UP_STEPS + 2 * options.steps),
    ]


def main() -> None:
    """Run the benchmark."""
    options = parse_options(__doc__, steps=4)
    torch.set_num_threads(1)
    from megatron_exact.training import cpu_runtime

    cpu_runtime.install()
    steps = ProfiledSteps(options)
    steps.watch_rows()
    with tempfile.TemporaryDirectory() as name:
        rows = WARM_UP_STEPS + 2 * options.steps
        pack = small_job.make_pack(Path(name), row_tokens=options.row_tokens, rows=rows, seed=options.seed)
        small_job.run_job(job_arguments(pack, options), steps.step)
    size = f"{options.layers} layers of {options.hidden}, rows of {options.row_tokens:,}"
    measure.publish(
        "step_profile",
        steps.table(),
        title=f"Parts of a training step: {size}",
        notes=(
            f"Means over {steps.profiled} profiled steps; those between them, not profiled, "
            f"take {statistics.median(steps.plain):.2f} CPU seconds (median). Operations that cost no "
            "time, such as views, are counted, too.",
        ),
        file=options.json,
    )


if __name__ == "__main__":
    run_tool(main)
