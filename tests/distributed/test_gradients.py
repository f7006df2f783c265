"""Gradients of a full global batch against a hand-written reference, on several layouts."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.manifest import read_manifest
from tests.distributed import jobs, plain_llama, ranks

BOUND = 1e-6
ALPHA, GAMMA, EPS, TAU = 0.15, 0.5, 1e-6, jobs.ROW_TOKENS / 4
SEED = 1234  # Megatron's default --seed

LAYOUTS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "tp1": (1, ("--micro-batch-size", 2)),
    "tp2": (2, ("--tensor-model-parallel-size", 2)),
    "pp2 micro-batch 2": (2, ("--pipeline-model-parallel-size", 2, "--micro-batch-size", 2)),
    "dp2": (2, ()),
}
CUT_ALONG = {  # dimension along which tensor parallelism cuts a weight; others are whole on each rank
    "word_embeddings.weight": 0,
    "linear_qkv.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
}


def dump_first_gradients(folder: Path) -> Callable[[], None]:
    """A patch that saves every rank's parameters and finished gradients of the first iteration."""

    def patch() -> None:
        from megatron.core import parallel_state

        from megatron_exact.training.run import TrainingRun

        stock = TrainingRun.finalize_grads

        def finalize(self: Any, model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
            stock(self, model, num_tokens, **kwargs)
            path = folder / f"grads{os.environ['RANK']}.pt"
            if path.exists():
                return
            named = model[0].module.named_parameters()
            torch.save(
                {
                    "tp": parallel_state.get_tensor_model_parallel_rank(),
                    "pp": parallel_state.get_pipeline_model_parallel_rank(),
                    "dp": parallel_state.get_data_parallel_rank(),
                    "parameters": {n: (p.detach().clone(), p.main_grad.clone()) for n, p in named},
                },
                path,
            )

        TrainingRun.finalize_grads = finalize  # type: ignore[method-assign]

    return patch


def whole_parameters(folder: Path, world: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(value, gradient) of every parameter as one rank alone would hold it."""
    dumps = [torch.load(folder / f"grads{rank}.pt", weights_only=True) for rank in range(world)]
    num_stages = max(dump["pp"] for dump in dumps) + 1
    pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for dump in sorted((d for d in dumps if d["dp"] == 0), key=lambda d: (d["pp"], d["tp"])):
        for name, pair in dump["parameters"].items():
            words = name.split(".")
            if words[:2] == ["decoder", "layers"]:
                words[2] = str(int(words[2]) + dump["pp"] * jobs.LAYERS // num_stages)
            pieces.setdefault(".".join(words), []).append(pair)
    return {
        name: tuple(_join(name, list(part)) for part in zip(*pairs, strict=True))
        for name, pairs in pieces.items()
    }  # type: ignore[misc]


def _join(name: str, shards: list[Tensor]) -> Tensor:
    dimension = next((cut for suffix, cut in CUT_ALONG.items() if name.endswith(suffix)), None)
    if len(shards) == 1 or dimension is None:
        return shards[0]
    if name.endswith("linear_fc1.weight"):  # each rank holds [its gate; its up]
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(shards, dim=dimension)


def weight_of(context: int, counts: list[int], lower: list[int]) -> float:
    """EXACT's weight, from METHOD.md's formulas."""

    def bucket(l: int) -> int:  # noqa: E741
        return min(len(lower) - 1, max(0, int(math.log2(l)) - 2) if l else 0)

    tail = [b for b in range(len(lower)) if lower[b] >= TAU]
    b = bucket(context)
    if b not in tail:
        return 1.0
    total = sum(counts[j] for j in tail)
    q = {j: counts[j] / total for j in tail}
    r = {j: (q[j] + EPS) ** -GAMMA for j in tail}
    return 1 + ALPHA * r[b] / sum(q[j] * r[j] for j in tail)


def reference_gradients(pack: Path, rule: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of METHOD.md's objective over the first global batch, float64."""
    exposure = read_manifest(pack).splits["train"].exposure
    counts, lower = list(exposure.counts), list(exposure.lower)
    dataset = PackedDataset(pack, "train", num_samples=jobs.GLOBAL_BATCH, seed=SEED)
    leaves = {name: value.double().requires_grad_() for name, value in parameters.items()}
    numerator, targets, mass = torch.zeros((), dtype=torch.float64), 0, 0.0
    for index in range(jobs.GLOBAL_BATCH):
        item, row = dataset[index], dataset.reader.read(dataset.row_of(index))
        boundaries = row.cu_seqlens.tolist()
        losses = plain_llama.row_losses(item["tokens"], item["labels"], boundaries, leaves)
        for start, end in itertools.pairwise(boundaries):
            for position in range(start, end):
                if not row.loss_mask[position]:
                    continue
                inside = position + 1 < end or (end == jobs.ROW_TOKENS and row.last_continues)
                weight = 1.0
                if rule != "none":
                    weight = weight_of(position - start + 1 if inside else 0, counts, lower)
                numerator = numerator + weight * losses[position]
                targets += 1
                mass += weight
    loss = numerator / (mass if rule == "exact-normalized" else targets)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("rule", ["none", "exact", "exact-normalized"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_agree_with_plain_reference(
    layout: str, rule: str, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    world, flags = LAYOUTS[layout]
    argv = jobs.command(pack, rule, 1, "--pretrained-checkpoint", checkpoint, *flags)
    ranks.train(world, argv, tmp_path, dump_first_gradients(tmp_path)).check()
    found = whole_parameters(tmp_path, world)
    copy = found.pop("output_layer.weight", None)  # the last stage's copy of the tied embedding
    if copy is not None:
        assert torch.equal(copy[1], found["embedding.word_embeddings.weight"][1])
    expected = reference_gradients(pack, rule, {name: value for name, (value, _) in found.items()})
    worst = {
        name: float((gradient.double() - expected[name]).norm() / expected[name].norm())
        for name, (_, gradient) in found.items()
    }
    name = max(worst, key=lambda key: worst[key])
    assert worst[name] <= BOUND, f"{name}: relative difference {worst[name]:.1e}"
    if rule == "exact":  # negative control: without the weights the same comparison fails clearly
        unweighted = reference_gradients(pack, "none", {key: value for key, (value, _) in found.items()})
        wrong = found[name][1].double() - unweighted[name]
        assert float(wrong.norm() / unweighted[name].norm()) > 1000 * BOUND
