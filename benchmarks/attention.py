"""Packed attention against upstream's dense mask: time, memory, and what the FLOPs promise.

    python benchmarks/attention.py
    python benchmarks/attention.py --row-tokens 2048 --rounds 1

Stock is upstream's `DotProductAttention` with the mask that a packed row needs, causal inside documents:
row_tokens^2 scores a head, whatever the documents. Ours is `PackedAttention`, which computes the causal
half of segment_tokens^2 for each segment. Both run forward and backward in float32 on one thread, on rows
of lognormal documents (median 600 tokens, sigma 1), cut as `concat` cuts them.

The promise is the ratio of the FLOPs, row_tokens^2 / (sum of segment_tokens^2 / 2); "kept" is the measured
ratio of CPU times over it. Calls alternate. Peak is what the resident memory rises above the inputs in a
process of its own; mask is the size of a boolean mask of the row, none of which may be in ours.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import measure
import small_job
import torch
from loss_head import MEBIBYTE, forget_peak, resident_bytes
from torch import Tensor

from megatron_exact.command_line import ToolParser, run_tool

HEADS, HEAD_DIM = 6, 64


def boundaries(segments: list[int]) -> Tensor:
    """int32 [segments + 1]."""
    return torch.tensor([0, *segments]).cumsum(0).to(torch.int32)


def packed_parameters(segments: list[int]) -> Any:
    """Upstream's carrier of boundaries."""
    from megatron.core.packed_seq_params import PackedSeqParams

    ends, longest = boundaries(segments), max(segments)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def dense_mask(segments: list[int]) -> Tensor:
    """bool [1, 1, S, S], true where attention is forbidden, as upstream's masks are."""
    document = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
    return ~(document[:, None] == document).tril()[None, None]


def build_attention(name: str) -> Callable[[list[Tensor], list[int]], Tensor]:
    """(query, key, value [S, H, D], segments) -> output [S, H * D]."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_exact.model.packed_attention import PackedAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
    )
    arguments = (config, 1, AttnMaskType.arbitrary, "self")
    if name == "packed":
        packed = PackedAttention(*arguments)
        return lambda inputs, segments: packed(*inputs, packed_seq_params=packed_parameters(segments))
    stock = DotProductAttention(*arguments)

    def dense(inputs: list[Tensor], segments: list[int]) -> Tensor:
        output = stock(*(part[:, None] for part in inputs), attention_mask=dense_mask(segments))
        return output.squeeze(1)

    return dense


def inputs_of(row_tokens: int, seed: int) -> list[Tensor]:
    """Query, key and value [S, H, D] with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shape = (row_tokens, HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


def forward_backward(attend: Callable[..., Tensor], inputs: list[Tensor], segments: list[int]) -> Tensor:
    """The output; gradients stay in the inputs."""
    for part in inputs:
        part.grad = None
    output = attend(inputs, segments)
    output.backward(torch.ones_like(output))
    return output.detach()


def peak_bytes(attend: Callable[..., Tensor], row_tokens: int, segments: list[int], seed: int) -> int:
    """Rise of the resident memory of one call, in a forked process."""

    def child(sender: Any) -> None:
        inputs = inputs_of(row_tokens, seed)
        forget_peak()
        before = resident_bytes("VmRSS")
        forward_backward(attend, inputs, segments)
        sender.send(resident_bytes("VmHWM") - before)

    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender,))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError:
        raise ValueError(
            f"attention over {row_tokens} tokens ended: its error is above, or memory was too small"
        ) from None
    finally:
        process.join()


def compare(row_tokens: int, options: argparse.Namespace) -> measure.Row:
    """One table row."""
    kinds = {name: build_attention(name) for name in ("stock", "packed")}
    rows = small_job.rows_of_segments(row_tokens, options.rows, options.seed)
    inputs = inputs_of(row_tokens, options.seed)
    squares = [sum(length**2 for length in segments) for segments in rows]
    longest = rows[max(range(len(rows)), key=squares.__getitem__)]
    # before memory is used here, which a fork would share
    peaks = {name: peak_bytes(attend, row_tokens, longest, options.seed) for name, attend in kinds.items()}
    seconds = dict.fromkeys(kinds, 0.0)
    difference = 0.0
    for segments in rows:
        outputs: dict[str, Tensor] = {}
        times = measure.time_interleaved(
            {
                name: functools.partial(forward_backward, attend, inputs, segments)
                for name, attend in kinds.items()
            },
            options.rounds,
            inspect=outputs.__setitem__,
        )
        for name, timing in times.items():
            seconds[name] += timing.cpu_seconds
        difference = max(difference, float((outputs["stock"] - outputs["packed"]).abs().max()))
    promise = len(rows) * row_tokens**2 / (sum(squares) / 2)
    gain = seconds["stock"] / seconds["packed"]
    return {
        "row tokens": row_tokens,
        "segments a row": sum(map(len, rows)) / len(rows),
        "stock, CPU s": seconds["stock"],
        "packed, CPU s": seconds["packed"],
        "times faster": gain,
        "promised by FLOPs": promise,
        "kept": f"{gain / promise:.0%}",
        "stock peak, MB": round(peaks["stock"] / 1e6),
        "packed peak, MB": round(peaks["packed"] / 1e6),
        "mask, MB": round(row_tokens**2 / MEBIBYTE, 1),
        "largest difference": float(f"{difference:.1e}"),
    }


def main() -> None:
    """Run the benchmark."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row-tokens", type=measure.whole_numbers, default=(4096, 8192), metavar="N,N")
    parser.add_argument("--rows", type=measure.whole_number, default=3, help="rows; default: %(default)s")
    measure.add_common_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from megatron_exact.training import cpu_runtime

    cpu_runtime.install()
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(options.seed)
        table = [compare(row_tokens, options) for row_tokens in options.row_tokens]
        dist.destroy_process_group()
    gigaflops = 2 * 2 * HEADS * HEAD_DIM * max(options.row_tokens) ** 2 / 1e9
    measure.publish(
        "attention",
        table,
        title=f"Attention of packed rows, {HEADS} heads of {HEAD_DIM}, float32 on one CPU thread",
        notes=(
            f"Sums over {options.rows} rows of the medians of {options.rounds} alternating rounds; a dense "
            f"forward pass at the longest row has {math.ceil(gigaflops)} GFLOP. Peaks are of the row with "
            "the longest segments.",
        ),
        file=options.json,
    )


if __name__ == "__main__":
    run_tool(main)
