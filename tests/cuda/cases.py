"""What the tests of this folder run on the null device, each in forked ranks of its own.

A function writes what it saw as JSON; numbers are compared in the tests, where the reference is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_exact.rehearsal import device, session
from megatron_exact.rehearsal.emulation import Emulation, FreshMemory
from megatron_exact.rehearsal.groups import use_for_all_groups
from megatron_exact.rehearsal.observations import Records


@contextmanager
def emulated(fresh: str = "nan") -> Iterator[Records]:
    """Everything is computed; new memory is NaN, so that whoever reads what nobody wrote is seen."""
    records = Records()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with Emulation(device.activate(), records, fresh=FreshMemory(fresh)):
        yield records


def write(folder: Path, seen: Any) -> int:
    """Leave what a rank saw; 0 for a good end."""
    (folder / f"seen{os.environ['RANK']}.json").write_text(json.dumps(seen))
    return 0


def by_place(counter: Any) -> dict[str, int]:
    """`call at place` -> count."""
    return {" at ".join(key): count for key, count in counter.items()}


def _damage_loss(forward_pass: int) -> None:
    """Make one loss of one forward pass infinite, as a kernel that fails would."""
    import megatron_exact.training.run as training_run

    run: Any = training_run
    stock, passes = run.weighted_token_loss, [0]

    def damaged(token_losses: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        passes[0] += 1
        if passes[0] == forward_pass:
            places = torch.arange(token_losses.numel(), device="cuda").view_as(token_losses)
            token_losses = token_losses.masked_fill(places == 21, torch.inf)
        return stock(token_losses, *args, **kwargs)

    run.weighted_token_loss = damaged


def train(
    folder: Path, argv: list[Any], *, rotates_twice: bool = False, damaged_pass: int | None = None
) -> int:
    """A whole training job.

    Args:
        folder: receives what was seen.
        argv: of the job.
        rotates_twice: whether queries and keys are turned by twice the angle.
        damaged_pass: forward pass that has an infinite loss.
    """
    from megatron_exact.model import packed_attention
    from megatron_exact.training import pretrain

    if damaged_pass is not None:
        _damage_loss(damaged_pass)

    if rotates_twice:
        right = packed_attention.rotate_packed
        packed_attention.rotate_packed = lambda values, cu_seqlens, freqs, **kwargs: right(
            values, cu_seqlens, 2 * freqs, **kwargs
        )
    with emulated() as records:
        use_for_all_groups(records, are_absent=int(os.environ["WORLD_SIZE"]) == 1)
        watch = session.StepWatch(records)
        watch.install()
        try:
            code = pretrain.main([str(word) for word in argv])
        except SystemExit as end:  # --exit-interval
            code = int(end.code or 0)
    return code or write(
        folder,
        {
            "steps": [
                {
                    "micro_batches": step.micro_batches,
                    "launches": step.seen.launches,
                    "synchronisations": by_place(step.seen.synchronisations),
                    "collectives": step.seen.collectives(),
                }
                for step in watch.steps
                if step.seen is not None
            ],
            "mixed_devices": by_place(records.mixed_devices),
            "refused": by_place(records.refused),
            "not_computed": by_place(records.not_computed),
            "peak_bytes": max(watch.peaks.values()),
        },
    )


def mixed_devices(folder: Path) -> int:
    """An operation on tensors of both sides."""
    with emulated() as records:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        try:
            found = str(here + there)
        except RuntimeError as error:
            found = str(error)
    return write(
        folder,
        {
            "found": found,
            "mixed_devices": by_place(records.mixed_devices),
            "refused": by_place(records.refused),
        },
    )


def out_of_memory(folder: Path) -> int:
    """A tensor larger than the card, and one that fits."""
    torch.cuda.set_device(0)
    fits = torch.empty(70 << 30, dtype=torch.uint8, device="cuda")
    allocated = torch.cuda.memory_allocated()
    try:
        torch.empty(20 << 30, dtype=torch.uint8, device="cuda")
        found = "fits"
    except torch.OutOfMemoryError as error:
        found = str(error)
    return write(folder, {"allocated": allocated, "bytes": fits.numel(), "found": found})


def without_a_cpu_version(folder: Path) -> int:
    """An operation that CUDA has and the CPU has not."""
    with emulated() as records:
        half = torch.randn(4, 16, 8, 64, device="cuda", dtype=torch.float16)
        boundaries = torch.tensor([0, 4], dtype=torch.int32, device="cuda")
        torch.ops.aten._flash_attention_forward(
            half[:, 0], half[:, 0], half[:, 0], boundaries, boundaries, 4, 4, 0.0, False, False
        )
    return write(folder, {"not_computed": by_place(records.not_computed)})


def gradients(function: Any, inputs: list[torch.Tensor], factor: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of sum(factor * function(inputs)), on the host."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    (output.float() * factor).sum().backward()
    return [tensor.float().cpu() for tensor in (output.detach(), *(leaf.grad for leaf in leaves))]  # type: ignore[union-attr]


def differences(here: list[torch.Tensor], there: list[torch.Tensor]) -> list[float]:
    """Largest difference of each pair, relative to the largest value."""
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(here, there, strict=True)]


def attention(folder: Path, lengths: list[int]) -> int:
    """The flash path of the packed attention against one call a segment, and with a segment too many."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_exact.model.packed_attention import attend_by_segment, attend_with_flash

    def packing(lengths: list[int], place: str) -> PackedSeqParams:
        boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        boundaries = boundaries.to(place)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        )

    torch.manual_seed(0)
    tokens = sum(lengths)
    states = [torch.randn(tokens, heads, 16).bfloat16() for heads in (4, 2, 2)]
    factor = torch.randn(tokens, 4, 16)
    one = [lengths[0] - 1, 1, *lengths[1:]]  # the negative control: another boundary
    with emulated() as records:
        reference = gradients(
            lambda q, k, v: attend_by_segment(q, k, v, packing(lengths, "cpu"), 0.25),
            [state.float() for state in states],
            factor,
        )
        on_device = [state.cuda() for state in states]
        found = [
            gradients(
                lambda q, k, v, given=given: attend_with_flash(q, k, v, packing(given, "cuda"), 0.25),
                on_device,
                factor.cuda(),
            )
            for given in (lengths, one)
        ]
    return write(
        folder,
        {
            "right": differences(found[0], reference),
            "wrong": differences(found[1], reference),
            "not_computed": by_place(records.not_computed),
        },
    )


def rotation(folder: Path, lengths: list[int]) -> int:
    """RoPE of packed rows against Megatron's, segment by segment, and how often the host waits."""
    import types

    import megatron.core.models.common.embeddings.rope_utils as rope_utils

    from megatron_exact.model.packed_attention import rotate_packed

    group = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    angles = torch.outer(torch.arange(max(lengths)), 1e4 ** (-torch.arange(8) / 8.0))
    freqs = torch.cat([angles, angles], dim=-1)[:, None, None]
    values, factor = torch.randn(2, sum(lengths), 4, 24).unbind()  # the last 8 of a head do not turn
    with emulated() as records:
        reference = gradients(
            lambda x: rope_utils._apply_rotary_pos_emb_thd(x, boundaries, freqs, cp_group=group),
            [values],
            factor,
        )
        cu_seqlens, freqs = boundaries.cuda(), freqs.cuda()
        on_device, factor = values.cuda(), factor.cuda()
        before = records.copy()
        leaf = on_device.clone().requires_grad_()
        for _ in range(3):  # layers
            output = rotate_packed(leaf, cu_seqlens, freqs)
        (output * factor).sum().backward()
        seen = records.since(before)
        found = [output.detach().cpu(), leaf.grad.cpu()]  # type: ignore[union-attr]
    return write(
        folder,
        {
            "right": differences(found, reference),
            "wrong": differences(found, [reference[0].roll(1, 0), reference[1].roll(1, 0)]),
            "synchronisations": by_place(seen.synchronisations),
            "lookups": seen.calls["aten::repeat_interleave"],
        },
    )


def loss_head(folder: Path) -> int:
    """The tiled head on the device against the plain formula in float64 on the host."""
    from megatron_exact.model.loss_head import tiled_token_losses
    from megatron_exact.model.shapes import Tiles

    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 1, 24), torch.randn(100, 24)
    labels, factor = torch.randint(0, 97, (1, 40)), torch.rand(1, 40)

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = hidden[:, 0] @ weight[:97].t()
        return torch.nn.functional.cross_entropy(logits, labels[0], reduction="none")[None]

    reference = gradients(plain, [hidden.double(), weight.double()], factor)
    with emulated() as records:
        tiles = Tiles(tokens=16, columns=32)
        to = labels.cuda()
        before = records.copy()
        found = gradients(
            lambda h, w: tiled_token_losses(h, w, to, vocabulary=97, tiles=tiles),
            [hidden.cuda(), weight.cuda()],
            factor.cuda(),
        )
        waits = records.since(before).synchronisations
    places = [place for place in by_place(waits) if "loss_head" in place]
    return write(folder, {"right": differences(found, reference), "waits_in_the_head": places})


def check_masking(folder: Path, argv: list[Any]) -> int:
    """The masking check of a job."""
    from megatron_exact.training.masking_check import run

    with emulated() as records:
        use_for_all_groups(records, are_absent=True)
        code = run([str(word) for word in argv], num_documents=4, as_json=True)
    return code or write(folder, {"refused": by_place(records.refused)})


def rehearse(folder: Path, argv: list[Any], rank: int, world_size: int) -> int:
    """A rank of a job whose other ranks are absent, with values for what steers it alone."""
    from dataclasses import asdict

    torch.cuda.device_count = lambda: session.GPUS_PER_NODE  # type: ignore[assignment]
    result = session.rehearse_rank([str(word) for word in argv], rank, world_size)
    return write(folder, asdict(result))
