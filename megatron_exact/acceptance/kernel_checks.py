"""Every kernel that a packed row passes, against a plain formula in float64, forward and backward.

The formulas are written out here and share no code with what they check: attention is a dense softmax with
an explicit mask, RoPE a product of complex numbers. Each comparison has a negative control, a formula with
one fault, from which the kernel must differ by more than the bound; else the comparison proves nothing.

T = tokens, H = query heads, G = key/value groups, D = head dimension, h = hidden size, V = vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Largest difference relative to the largest value. bfloat16 rounds to 2^-9; an attention kernel rounds its
probabilities too, and a weight's gradient is a sum of rounded products."""

Formula = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A kernel and its reference."""

    name: str
    """For the table."""
    kernel: Formula
    """Takes the inputs as they are on the device."""
    reference: Formula
    """Takes the same inputs in float64."""
    wrong: Formula
    """The reference with a fault."""
    inputs: Sequence[Tensor]
    """Leaves of autograd, on the device."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the inputs."""

    lengths: tuple[int, ...]
    """Tokens of the segments."""
    heads: int
    """H."""
    groups: int
    """G."""
    head_dim: int
    """D."""
    hidden: int
    """h."""
    vocabulary: int
    """V."""


SMALL = Sizes(lengths=(7, 1, 30, 10), heads=4, groups=2, head_dim=16, hidden=48, vocabulary=200)
"""For a CPU, and for the device of the tests."""
FULL = Sizes(
    lengths=(600, 1, 37, 1100, 310), heads=16, groups=4, head_dim=128, hidden=2048, vocabulary=32_000
)
"""For a GPU: heads as those of the models, a row of 2,048 tokens."""


def measure(device: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Compare every kernel that is there.

    Args:
        device: `cuda` or `cpu`.
        sizes: of the inputs.

    Returns:
        For each kernel `name`, and `error`, `control` and `bound`, or `reason` where it was not run.
    """
    found: list[dict[str, Any]] = []
    for comparison in (
        *_attention(device, sizes),
        *_rotation(device, sizes),
        *_norm(device, sizes),
        _loss_head(device, sizes),
    ):
        if isinstance(comparison, Comparison):
            found.append(compare(comparison))
        else:
            found.append(comparison)
    return found


def compare(comparison: Comparison) -> dict[str, Any]:
    """Run a kernel, its reference and the control; differences are those of outputs and gradients."""
    inputs = [tensor.detach() for tensor in comparison.inputs]
    exact = [tensor.double() for tensor in inputs]
    shape = comparison.reference(*exact).shape
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(shape, generator=generator).to(inputs[0].device)
    ours = _with_gradients(comparison.kernel, inputs, factor)
    right = _with_gradients(comparison.reference, exact, factor)
    wrong = _with_gradients(comparison.wrong, exact, factor)
    return {
        "name": comparison.name,
        "error": _largest_difference(ours, right),
        "control": _largest_difference(ours, wrong),
        "bound": BOUNDS[inputs[0].dtype],
    }


def _with_gradients(function: Formula, inputs: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Output and gradients of sum(factor * function(inputs)), on the host in float64."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    total = (output * factor.to(output.dtype)).sum()
    gradients = torch.autograd.grad(total, leaves)
    return [part.detach().cpu().double() for part in (output, *gradients)]


def _largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the largest relative difference of all pairs; NaN if a value is NaN."""
    differences = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(differences).max())  # Python's max skips a NaN that is not first


def _random(device: str, dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    """Normal values that do not depend on the device's generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device).to(dtype)


def _boundaries(lengths: Sequence[int], device: str) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32).to(device)


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


# ----------------------------------------------------------------------------------------------------
# Attention inside segments.


def dense_attention(lengths: Sequence[int], scale: float) -> Formula:
    """Return causal attention inside segments as a softmax over all T x T scores.

    Args:
        lengths: tokens of the segments.
        scale: of the scores.
    """
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(segment))
    allowed = (segment[:, None] == segment) & (place[:, None] >= place)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[T, H, D] and twice [T, G, D] -> [T, H, D]."""
        share = query.shape[1] // key.shape[1]
        keys, values = (part.repeat_interleave(share, dim=1) for part in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
        masked = scores.masked_fill(~allowed.to(query.device), -math.inf)
        return torch.einsum("hqk,khd->qhd", masked.softmax(-1), values)

    return attend


def _attention(device: str, sizes: Sizes) -> Iterator[Comparison | dict[str, Any]]:
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_exact.model.packed_attention import attend_by_segment, attend_with_flash

    dtype, lengths, scale = _dtype(device), sizes.lengths, 1 / math.sqrt(sizes.head_dim)
    tokens, boundaries, longest = sum(lengths), _boundaries(lengths, device), max(lengths)
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    counts = (sizes.heads, sizes.groups, sizes.groups)
    inputs = [
        _random(device, dtype, tokens, count, sizes.head_dim, seed=seed)
        for seed, count in enumerate(counts)
    ]
    leaking = (lengths[0] + lengths[1], *lengths[2:])  # the second document sees the first

    def comparison(name: str, kernel: Formula) -> Comparison:
        return Comparison(
            name=name,
            kernel=kernel,
            reference=dense_attention(lengths, scale),
            wrong=dense_attention(leaking, scale),
            inputs=inputs,
        )

    ours = attend_with_flash if device == "cuda" else attend_by_segment
    yield comparison("packed attention", lambda q, k, v: ours(q, k, v, packing, scale))
    name = "Transformer Engine's attention"
    if not _has_transformer_engine(device):
        yield _without_engine(name, device)
    else:
        engine = importlib.import_module("transformer_engine.pytorch")
        attention = engine.DotProductAttention(
            sizes.heads, sizes.head_dim, num_gqa_groups=sizes.groups, attn_mask_type="padding_causal"
        )

        def with_engine(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output = attention(
                query,
                key,
                value,
                qkv_format="thd",
                attn_mask_type="padding_causal",
                cu_seqlens_q=boundaries,
                cu_seqlens_kv=boundaries,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
            return output.view(query.shape)  # type: ignore[no-any-return]

        yield comparison(name, with_engine)
    name = "flash-attn"
    if device != "cuda" or importlib.util.find_spec("flash_attn") is None:
        yield {"name": name, "reason": "flash-attn is not installed" if device == "cuda" else _NEEDS_GPU}
    else:
        flash = importlib.import_module("flash_attn").flash_attn_varlen_func

        yield comparison(
            name,
            lambda q, k, v: flash(
                q, k, v, boundaries, boundaries, longest, longest, softmax_scale=scale, causal=True
            ),
        )


_WITHOUT_ENGINE = "Transformer Engine is not installed: jobs run the local layers"
_NEEDS_GPU = "its kernels need a GPU"


def _has_transformer_engine(device: str) -> bool:
    return device == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def _without_engine(name: str, device: str) -> dict[str, Any]:
    """Return why a kernel of Transformer Engine is not run."""
    return {"name": name, "reason": _WITHOUT_ENGINE if device == "cuda" else _NEEDS_GPU}


# ----------------------------------------------------------------------------------------------------
# Rotary embedding, norm and loss head.


def complex_rotation(lengths: Sequence[int], frequencies: Tensor) -> Formula:
    """Return RoPE as a product of complex numbers, positions restarting in each segment.

    Args:
        lengths: tokens of the segments.
        frequencies: [D / 2].
    """
    positions = torch.cat([torch.arange(length) for length in lengths]).double()

    def rotate(values: Tensor) -> Tensor:
        """[T, H, D]; the first half of a head is the real part, the second the imaginary one."""
        angles = torch.outer(positions, frequencies.double()).to(values.device)[:, None]
        half = values.shape[-1] // 2
        turned = torch.complex(values[..., :half], values[..., half:]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat([turned.real, turned.imag], dim=-1)

    return rotate


def _rotation(device: str, sizes: Sizes) -> Iterator[Comparison | dict[str, Any]]:
    import megatron.core.models.common.embeddings.rope_utils as rope_utils

    from megatron_exact.model.packed_attention import rotate_packed

    lengths = sizes.lengths
    half = sizes.head_dim // 2
    frequencies = 1e4 ** (-torch.arange(half) / half)
    angles = torch.outer(torch.arange(max(lengths)).float(), frequencies).to(device)
    freqs = torch.cat([angles, angles], dim=-1)[:, None, None]
    boundaries = _boundaries(lengths, device)
    inputs = [_random(device, _dtype(device), sum(lengths), sizes.heads, sizes.head_dim, seed=3)]
    kernels: dict[str, Formula] = {
        "RoPE of packed rows": lambda values: rotate_packed(values, boundaries, freqs)
    }
    name, theirs = "Transformer Engine's RoPE", rope_utils.fused_apply_rotary_pos_emb_thd
    if not _has_transformer_engine(device):
        yield _without_engine(name, device)
    elif theirs is None:
        yield {"name": name, "reason": "Megatron finds no fused RoPE for packed rows in Transformer Engine"}
    else:
        kernels[name] = lambda values: theirs(values, boundaries, freqs)
    for name, kernel in kernels.items():
        yield Comparison(
            name=name,
            kernel=kernel,
            reference=complex_rotation(lengths, frequencies),
            wrong=complex_rotation((lengths[0] + lengths[1], *lengths[2:]), frequencies),
            inputs=inputs,
        )


def plain_norm(eps: float) -> Formula:
    """Return RMSNorm as its formula."""

    def norm(hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden / (hidden.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    return norm


def _norm(device: str, sizes: Sizes) -> Iterator[Comparison | dict[str, Any]]:
    from torch.func import functional_call

    from megatron_exact.model.layer_specs import RMSNorm

    dtype = _dtype(device)
    ours = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), sizes.hidden).to(device)
    modules: dict[str, torch.nn.Module] = {"RMSNorm": ours}
    name = "Transformer Engine's RMSNorm"
    if _has_transformer_engine(device):
        engine = importlib.import_module("transformer_engine.pytorch")
        modules[name] = engine.RMSNorm(sizes.hidden, eps=ours.eps, params_dtype=dtype).to(device)
    else:
        yield _without_engine(name, device)
    hidden = _random(device, dtype, sum(sizes.lengths), sizes.hidden, seed=4)
    weight = 1 + _random(device, dtype, sizes.hidden, seed=5) / 4
    for name, module in modules.items():
        yield Comparison(
            name=name,
            kernel=lambda h, w, module=module: functional_call(module, {"weight": w}, (h,)),
            reference=plain_norm(ours.eps),
            wrong=lambda h, w: plain_norm(ours.eps)(h, w.roll(1)),
            inputs=[hidden, weight],
        )


def _loss_head(device: str, sizes: Sizes) -> Comparison:
    from megatron_exact.model.loss_head import tiled_token_losses
    from megatron_exact.model.shapes import Tiles

    dtype, tokens, rows = _dtype(device), sum(sizes.lengths), sizes.vocabulary
    vocabulary = rows - 3  # the last rows of the weight are padding
    labels = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(6)).to(
        device
    )
    hidden = _random(device, dtype, tokens, 1, sizes.hidden, seed=7)
    weight = _random(device, dtype, rows, sizes.hidden, seed=8) / math.sqrt(sizes.hidden)
    tiles = Tiles(tokens=tokens // 3, columns=vocabulary // 3)

    def plain(states: Tensor, table: Tensor, shift: int = 0) -> Tensor:
        logits = states[:, 0] @ table[:vocabulary].t()
        wanted = labels[0].roll(shift)
        return (logits.logsumexp(-1) - logits.gather(1, wanted[:, None])[:, 0])[None]

    return Comparison(
        name="loss head",
        kernel=lambda h, w: tiled_token_losses(h, w, labels, vocabulary=vocabulary, tiles=tiles),
        reference=plain,
        wrong=lambda h, w: plain(h, w, shift=1),
        inputs=[hidden, weight],
    )
