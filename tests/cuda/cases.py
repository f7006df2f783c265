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

import numpy as np
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


def _forget_boundaries() -> None:
    """Let the model take each micro-batch for one document."""
    from megatron_exact.training import batch

    stock = batch.packed_seq_params

    def one_segment(cu_seqlens: torch.Tensor, longest: int, row_tokens: int) -> Any:
        return stock(cu_seqlens[:, [0, -1]], row_tokens, row_tokens)

    batch.packed_seq_params = one_segment


def _keep_gradients(path: Path) -> None:
    """Write the gradients of each step, name -> float32, once all micro-batches have added theirs."""
    import megatron.training.training as driver

    stock = driver.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        model, run = args[2], args[6]  # model parts, forward_backward_func

        def forward_backward(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            found = {
                name.replace("module.", ""): parameter.main_grad.cpu().numpy()
                for part in model
                for name, parameter in part.named_parameters()
            }
            np.savez(path, **found)
            return result

        return stock(*args[:6], forward_backward, *args[7:], **kwargs)

    driver.train_step = train_step


def train(
    folder: Path,
    argv: list[Any],
    *,
    rotates_twice: bool = False,
    forgets_boundaries: bool = False,
    keeps_gradients: bool = False,
    damaged_pass: int | None = None,
) -> int:
    """A whole training job.

    Args:
        folder: receives what was seen.
        argv: of the job.
        rotates_twice: whether queries and keys are turned by twice the angle.
        forgets_boundaries: whether a row is one document.
        keeps_gradients: whether the gradients of the last step are written.
        damaged_pass: forward pass that has an infinite loss.
    """
    from megatron_exact.model import packed_attention
    from megatron_exact.training import pretrain

    if damaged_pass is not None:
        _damage_loss(damaged_pass)
    if forgets_boundaries:
        _forget_boundaries()
    if keeps_gradients:
        _keep_gradients(folder / "gradients.npz")

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
            "calls": dict(records.calls),
            "attention_plans": [[*plan, calls] for plan, calls in records.attention_plans.items()],
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


def seen_of(records: Records) -> dict[str, Any]:
    """What must be empty after a sound run."""
    return {name: by_place(getattr(records, name)) for name in ("mixed_devices", "refused", "not_computed")}


def score_tokens(folder: Path, model: str, pack: str, rows: list[int]) -> int:
    """Long and short context losses of some rows, by a scorer that chooses its device itself."""
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  # imports make tensors, too

    from megatron_exact.data.rows import RowReader
    from megatron_exact.exposure.confidence import ShortWindows
    from megatron_exact.scoring import Scorer, score_rows

    reader = RowReader(pack, "train")
    with emulated() as records:
        scorer = Scorer(Path(model), reader.row_tokens, device=None, dtype="float32")
        found = score_rows(reader, rows, ShortWindows(window=16, stride=12), scorer)
    arrays = {name: array.tolist() for name, array in found.items()}
    return write(
        folder, {"device": str(next(scorer.model.parameters()).device), **arrays, **seen_of(records)}
    )


def probe(folder: Path, model: str, items: list[dict[str, Any]]) -> int:
    """Scores of items of the evidence probe, on the device that the engine chooses."""
    from transformers import AutoModelForCausalLM

    from megatron_exact.evaluation.engine import existing_device
    from megatron_exact.evaluation.probe import score_items
    from megatron_exact.evaluation.probe_items import ProbeItem

    asked = [ProbeItem(**{name: _as_tuples(value) for name, value in item.items()}) for item in items]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with emulated() as records:
        place = existing_device(None)
        found = score_items(loaded.to(place), None, asked, batch_tokens=200)
    scores = [[*result.scores, *result.scores_ablated] for result in found]
    return write(folder, {"device": place, "scores": scores, **seen_of(records)})


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(part) for part in value) if isinstance(value, list) else value


def answers(folder: Path, model: str, texts: list[str], device: str | None) -> int:
    """Greedy answers of the evaluation engine (lm-eval's `hf`).

    Args:
        folder: receives what was seen.
        model: Hugging Face folder with a tokenizer.
        texts: questions.
        device: `cpu`, or None for the device that the engine chooses.
    """
    from functools import partial

    import lm_eval.models.huggingface  # noqa: F401  # imports make tensors, too

    from megatron_exact.evaluation.engine import Backend, Engine, load_model, load_tokenizer, resolve
    from megatron_exact.evaluation.prompts import Prompts, Template

    prompts = Prompts(load_tokenizer(Path(model)), Template(kind="none", text=None))
    with emulated() as records:
        backend = resolve(Backend(device=device), Path(model))
        load = partial(load_model, Path(model), prompts, backend, 128)
        engine = Engine(load=load, prompts=prompts, window=128)
        documents = [{"input": text, "prefix": ""} for text in texts]
        found = engine.answers("questions", documents, generation_tokens=4, delimiter=" ", window=128)
    place = str(next(engine.loaded.model.parameters()).device)
    return write(folder, {"device": place, "answers": found, **seen_of(records)})


def acceptance(folder: Path, work: str, arguments: dict[str, Any], *, is_full_size: bool) -> int:
    """A piece of work of an acceptance; one of full size has values for what steers it alone."""
    from megatron_exact.acceptance.rank_work import carry_out

    limit = session.FULL_SIZE_LIMIT if is_full_size else None
    records = Records()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    fresh = FreshMemory.ZEROS if is_full_size else FreshMemory.NAN
    is_alone = int(os.environ["WORLD_SIZE"]) == 1
    with Emulation(device.activate(), records, limit=limit, fresh=fresh):
        use_for_all_groups(records, are_absent=is_alone, limit=limit)
        carry_out(work, folder, arguments)
    return 0


def host_copies(folder: Path) -> int:
    """What `--async-save` hands to the process that writes."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

    from megatron_exact.training.checkpoint_saving import with_host_copies

    values = [torch.arange(12.0).view(3, 4), torch.arange(5), torch.full((2,), 7.0)]
    with emulated():
        given = [values[0].cuda(), values[1].cuda(), values[2].clone()]
        buckets = [("file", "key", ([], [(number, tensor) for number, tensor in enumerate(given)]))]
        request = AsyncRequest(print, (0, buckets, "queue"), [], preload_fn=lambda: buckets)
        changed = with_host_copies(request)
        given[0].zero_()  # the next step writes to the weights while the file is written
        (_, _, (_, pairs)) = changed.async_fn_args[1][0]
        staged = changed.preload_fn()[0][2][1]
    return write(
        folder,
        {
            "devices": [tensor.device.type for _, tensor in pairs],
            "shared": [tensor.is_shared() for _, tensor in pairs],
            "equal": [torch.equal(tensor, value) for (_, tensor), value in zip(pairs, values, strict=True)],
            "same": [a is b for (_, a), (_, b) in zip(pairs, staged, strict=True)],
            "others": [changed.async_fn_args[0], changed.async_fn_args[2]],
        },
    )


def inference(folder: Path) -> int:
    """Operations that reach the device whole in inference mode, and lazy conjugates, on both sides."""

    def work(place: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        states, weight = (torch.randn(*size, generator=generator) for size in ((2, 3, 4), (5, 4)))
        turned = states.to(place).transpose(0, 1).contiguous()
        output = torch.nn.functional.linear(turned, weight.to(place)).transpose(1, 2).reshape(3, 10)
        complex_ = torch.complex(output, output + 1)
        parts = [output, (complex_.conj() * complex_).real, complex_.conj().imag.clone()]
        return torch.cat([*parts, torch.where(output > 0, output, torch.nan)]).nan_to_num(nan=7.0).cpu()

    with torch.inference_mode():
        here = work("cpu")
        with emulated() as records:
            there = work("cuda")
    return write(folder, {"differences": differences([there], [here]), **seen_of(records)})
