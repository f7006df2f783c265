"""What it costs to know that weights and optimizer states are finite, before each save.

    python benchmarks/finite_check.py
    python benchmarks/finite_check.py --parameters 20_000_000 --rounds 3

The tensors are those that one rank saves: of each layer of a Llama the weights in bfloat16 and, in float32,
their main copy and the two moments of Adam, 14 bytes a parameter. `sums` is the check of megatron_exact
(`training/checkpoint_saving.py`): NaN and Inf pass through a sum, and a tensor whose sum is not finite is
checked value by value. `isfinite` asks torch for each tensor; `largest magnitude` takes torch's norm over
all of them; `sha256` hashes the same bytes in one thread, which each save does anyway. Across ranks the
check adds one all-reduce of one number.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Callable
from typing import Any

import measure
import torch
from torch import Tensor

from megatron_exact.command_line import ToolParser, positive_int, run_tool

HIDDEN = 1024
SHAPES = ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (6 * HIDDEN, HIDDEN), (HIDDEN, 3 * HIDDEN), (HIDDEN,))


def main() -> None:
    """Run the benchmark."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=positive_int, default=100_000_000, help="default: %(default)s")
    parser.add_argument("--rounds", type=measure.whole_number, default=5, help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="append the result to FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from megatron_exact.training.checkpoint_saving import damaged

    tensors = shards(options.parameters)
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    work: dict[str, Callable[[], Any]] = {
        "sums": lambda: damaged(tensors),
        "isfinite": lambda: [place for place, x in enumerate(tensors) if not bool(torch.isfinite(x).all())],
        "largest magnitude": lambda: [float(x) for x in torch._foreach_norm(tensors, ord=math.inf)],
        "sha256": lambda: hash_all(tensors),
    }
    for spoilt in (float("nan"), float("inf")):  # the two ways to look agree on what they find
        kept = tensors[3].view(-1)[7].clone()
        tensors[3].view(-1)[7] = spoilt
        assert work["sums"]() == work["isfinite"]() == [3]
        tensors[3].view(-1)[7] = kept
    times = measure.time_interleaved(work, options.rounds)
    hashing = times["sha256"].cpu_seconds
    rows = [
        {
            "": name,
            "CPU s": timing.cpu_seconds,
            "GB/s": num_bytes / timing.cpu_seconds / 1e9,
            "of the hashing of a save": f"{timing.cpu_seconds / hashing:.1%}",
        }
        for name, timing in times.items()
    ]
    measure.publish(
        "finite_check",
        rows,
        title=f"Finite weights and states: {options.parameters:,} parameters, {num_bytes / 1e9:.2f} GB",
        notes=(f"{len(tensors)} tensors, one thread.",),
        file=options.json,
    )


def shards(parameters: int) -> list[Tensor]:
    """Weights, main copies and moments of as many layers as make up so many parameters."""
    generator = torch.Generator().manual_seed(0)
    tensors: list[Tensor] = []
    while sum(tensor.numel() for tensor in tensors) < 4 * parameters:
        for shape in SHAPES:
            weight = torch.randn(shape, generator=generator)
            tensors += [weight.bfloat16(), weight, 1e-3 * weight, 1e-6 * weight.square()]
    return tensors


def hash_all(tensors: list[Tensor]) -> list[str]:
    """sha256 of each tensor's bytes."""
    return [hashlib.sha256(memoryview(x.view(torch.uint8).numpy())).hexdigest() for x in tensors]


if __name__ == "__main__":
    run_tool(main)
