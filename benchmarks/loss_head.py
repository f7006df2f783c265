"""Memory and CPU time of the tiled loss head against upstream's, forward and backward.

    python benchmarks/loss_head.py
    python benchmarks/loss_head.py --tokens 4096 --hidden 256 --ranks 1 --rounds 1
    python benchmarks/loss_head.py --tokens 4096 --dtype float32

Stock is what GPTModel does without an output processor: `ColumnParallelLinear`, then
`vocab_parallel_cross_entropy`. Both heads get the same hidden states, output weight and labels, in bfloat16
or float32; their losses are multiplied by strongly unequal token weights before backward, which ours is
told in advance, as in a job.

Every measurement has processes of its own, one a tensor-parallel rank and each on one thread, and the heads
alternate. Peak is what the resident memory of a rank (the larger of them) rises above its inputs, and so
holds the gradients of hidden states and weight too; workspace is what remains without them. Upstream's head
at 16,384 tokens and 151,936 columns takes 15 GB.

On x86 CPUs without AVX-512, where torch multiplies bfloat16 number by number, the tiled head widens its
tiles to float32 (`low_precision.py`); Megatron's does not, and takes minutes for each tera-operation.

The allocator keeps what the small call before has freed, mostly a gradient of the weight, and the peak
counts from there: a workspace can be negative. In float32 the gradients are made in forward where they
are smaller than the logits, and the peak holds them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.model.shapes import Tiles

MEBIBYTE = 2**20
WARM_UP_TOKENS = 64
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One line of the table."""

    tokens: int
    """Of the row, N."""
    hidden: int
    """Hidden size."""
    ranks: int
    """Tensor-parallel size."""
    vocabulary: int
    """Columns over all ranks."""
    dtype: str
    """Of hidden states and weight, a key of DTYPES."""

    @property
    def gradient_bytes(self) -> int:
        """Of hidden states and of a rank's part of the weight."""
        size = DTYPES[self.dtype].itemsize
        return size * self.hidden * (self.tokens + self.vocabulary // self.ranks)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one forward and backward on one rank."""

    peak_bytes: int
    """Rise of the resident memory."""
    cpu_seconds: float
    """User and system time."""
    losses: list[float]
    """Of every target, nats."""


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def forget_peak() -> None:
    """Let VmHWM start again from the memory in use now.

    Raises:
        ValueError: the kernel does not do it.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if resident_bytes("VmHWM") > resident_bytes("VmRSS") + 16 * MEBIBYTE:
        raise ValueError("the kernel does not reset VmHWM: run the benchmark on the machine itself")


def build_head(name: str, shape: Shape, tiles: Tiles) -> tuple[Callable[..., Tensor], Tensor]:
    """(hidden, labels, token weights) -> losses, and the output weight of this rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_exact.model.loss_head import TiledLossHead

    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=shape.ranks,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=DTYPES[shape.dtype],
        tensor_model_parallel_size=shape.ranks,
    )
    group = parallel_state.get_tensor_model_parallel_group()
    layer = ColumnParallelLinear(
        shape.hidden,
        shape.vocabulary,
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        gather_output=False,
        tp_group=group,
    )
    generator = torch.Generator().manual_seed(group.rank())
    torch.nn.init.normal_(layer.weight, std=0.02, generator=generator)

    def stock(hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        logits = layer(hidden)[0]
        targets = labels.transpose(0, 1).contiguous()
        return vocab_parallel_cross_entropy(logits, targets, tp_group=group).transpose(0, 1).contiguous()

    tiled = TiledLossHead(vocabulary=shape.vocabulary, tiles=tiles)

    def ours(hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return tiled(
            hidden_states=hidden,
            output_layer=layer,
            output_weight=None,
            labels=labels,
            config=config,
            expected_factors=weights[None],
        )

    return {"stock": stock, "tiled": ours}[name], layer.weight


def inputs(shape: Shape, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, 1, h] with gradient, labels [1, N] and token weights [N], equal on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 1, shape.hidden, generator=generator).to(DTYPES[shape.dtype])
    labels = torch.randint(0, shape.vocabulary, (1, tokens), generator=generator)
    weights = 10 ** (4 * torch.rand(tokens, generator=generator) - 3)
    return hidden.requires_grad_(), labels, weights


def run_once(head: Callable[..., Tensor], hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Forward and backward; the losses [N]."""
    losses = head(hidden, labels, weights).reshape(-1)
    (losses * weights).sum().backward()
    return losses.detach()


def measure_rank(name: str, shape: Shape, tiles: Tiles, rank: int, folder: str, seed: int) -> Cost:
    """Start one rank and measure one call, after a small one."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=shape.ranks
    )
    parallel_state.initialize_model_parallel(shape.ranks)
    head, weight = build_head(name, shape, tiles)
    run_once(head, *inputs(shape, WARM_UP_TOKENS, seed))
    weight.grad = None
    hidden, labels, weights = inputs(shape, shape.tokens, seed)
    dist.barrier()
    forget_peak()
    before, started = resident_bytes("VmRSS"), time.process_time()
    losses = run_once(head, hidden, labels, weights)
    return Cost(
        cpu_seconds=time.process_time() - started,
        peak_bytes=resident_bytes("VmHWM") - before,
        losses=losses.tolist(),
    )


def _rank_process(sender: Connection, *arguments: Any) -> None:
    sender.send(measure_rank(*arguments))
    sender.close()
    os._exit(0)  # gloo's threads of the other ranks need not be waited for


def measure_head(name: str, shape: Shape, tiles: Tiles, seed: int) -> list[Cost]:
    """The cost on every rank, in forked processes: Megatron's import is paid once.

    Raises:
        ValueError: a rank did not end well, for example for lack of memory.
    """
    context = get_context("fork")
    with tempfile.TemporaryDirectory(prefix="loss-head-") as folder:
        receivers, processes = [], []
        for rank in range(shape.ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_process, args=(sender, name, shape, tiles, rank, folder, seed)
            )
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        try:
            return [receiver.recv() for receiver in receivers]
        except EOFError:
            raise ValueError(
                f"a rank of the {name} head ended at {shape}: its error is above, or memory was too small"
            ) from None
        finally:
            for process in processes:
                process.kill()
                process.join()


def compare(shape: Shape, tiles: Tiles, options: argparse.Namespace) -> measure.Row:
    """One table row: medians over the rounds, stock and tiled in turn."""
    costs: dict[str, list[list[Cost]]] = {"stock": [], "tiled": []}
    for turn in range(options.rounds):
        for name, found in costs.items():
            print(f"  round {turn + 1} of {options.rounds}: {name}, {shape}", file=sys.stderr, flush=True)
            found.append(measure_head(name, shape, tiles, options.seed))
    peak, seconds, losses = {}, {}, {}
    for name, rounds in costs.items():
        peak[name] = statistics.median(max(cost.peak_bytes for cost in ranks) for ranks in rounds)
        seconds[name] = statistics.median(sum(cost.cpu_seconds for cost in ranks) for ranks in rounds)
        losses[name] = torch.tensor(rounds[0][0].losses, dtype=torch.float64)
    difference = float((losses["tiled"] / losses["stock"] - 1).abs().max())
    return {
        "tokens": shape.tokens,
        "hidden": shape.hidden,
        "TP": shape.ranks,
        "stock peak, MB": round(peak["stock"] / 1e6),
        "tiled peak, MB": round(peak["tiled"] / 1e6),
        "peak, tiled / stock": round(peak["tiled"] / peak["stock"], 4),
        "of it workspace, MB": round((peak["tiled"] - shape.gradient_bytes) / 1e6),
        "stock, CPU s": round(seconds["stock"], 1),
        "tiled, CPU s": round(seconds["tiled"], 1),
        "CPU, tiled / stock": round(seconds["tiled"] / seconds["stock"], 2),
        "largest relative difference of a loss": float(f"{difference:.1e}"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=measure.whole_numbers, default=(4096, 16_384), metavar="N,N")
    parser.add_argument("--hidden", type=measure.whole_numbers, default=(256, 896), metavar="N,N")
    parser.add_argument("--ranks", type=measure.whole_numbers, default=(1, 2), metavar="N,N")
    parser.add_argument("--vocabulary", type=measure.whole_number, default=151_936, help="columns")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--tile-tokens", type=measure.whole_number, default=Tiles.tokens)
    parser.add_argument("--tile-columns", type=measure.whole_number, default=Tiles.columns)
    measure.add_common_arguments(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # and none before the fork
    tiles = Tiles(tokens=options.tile_tokens, columns=options.tile_columns)
    from megatron_exact.training import cpu_runtime

    cpu_runtime.install()
    import megatron.core.tensor_parallel
    import megatron.core.transformer.transformer_config  # noqa: F401

    table = [
        compare(
            Shape(
                tokens=tokens,
                hidden=hidden,
                ranks=ranks,
                vocabulary=options.vocabulary,
                dtype=options.dtype,
            ),
            tiles,
            options,
        )
        for tokens in options.tokens
        for hidden in options.hidden
        for ranks in options.ranks
    ]
    measure.publish(
        "loss_head",
        table,
        title=(
            f"Loss head over {options.vocabulary:,} columns, forward and backward, {options.dtype} on a CPU"
        ),
        notes=(
            f"Tiles of {tiles.tokens:,} tokens x {tiles.columns:,} columns; medians of {options.rounds} "
            "alternating rounds, one thread a rank. Peak: resident memory of one rank above its inputs, "
            "gradients included; CPU time: all ranks together.",
        ),
        file=options.json,
    )


if __name__ == "__main__":
    run_tool(main)
