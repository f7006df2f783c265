"""The tiled loss head on ranks and in whole jobs: against float64, and against upstream's own head."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import jobs, ranks

ROW, BATCH, HIDDEN, PADDED = 24, 2, 16, 104
TILES = ((16, 10), (10_000, 10_000))
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
# All columns, some padded, and so few that the second rank has none
VOCABULARIES = (PADDED, 97, 40)


def make_inputs(dtype: torch.dtype, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [S, b, h], the whole weight, labels and token weights [b, S]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROW, BATCH, HIDDEN, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(PADDED, HIDDEN, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (BATCH, ROW), generator=generator)
    token_weights = 10 ** (4 * torch.rand(BATCH, ROW, generator=generator) - 3)
    token_weights[0, : ROW // 3] = 0.0
    return hidden, weight, labels, token_weights


def plain(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and gradients, float64, on one process."""
    hidden, weight = (part.double().requires_grad_() for part in (hidden, weight))
    logits = torch.einsum("sbh,vh->bsv", hidden, weight[:vocabulary])
    losses = logits.exp().sum(-1).log() - logits.gather(2, labels[:, :, None])[:, :, 0]
    return losses.detach(), *torch.autograd.grad((losses * token_weights).sum(), (hidden, weight))


def build_layer(weight: Tensor, *, sequence_parallel: bool) -> Any:
    """Upstream's output layer with this rank's rows of the weight."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    group = parallel_state.get_tensor_model_parallel_group()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=weight.dtype,
        pipeline_dtype=weight.dtype,
        tensor_model_parallel_size=group.size(),
        sequence_parallel=sequence_parallel,
    )
    layer = ColumnParallelLinear(
        HIDDEN,
        PADDED,
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        gather_output=False,
        tp_group=group,
    )
    layer.weight.data.copy_(weight.chunk(group.size())[group.rank()])
    return layer


def difference(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    assert found.shape == expected.shape
    norm = float(expected.norm())
    return float((found.double() - expected).norm()) / (norm or 1.0)


def check_head(
    dtype: torch.dtype,
    vocabulary: int,
    tiles: tuple[int, int],
    *,
    sequence_parallel: bool,
    is_expected: bool,
) -> None:
    """One case on this rank; raises where losses or gradients leave the bounds."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_exact.model.loss_head import TiledLossHead
    from megatron_exact.model.shapes import Tiles

    inputs = make_inputs(dtype, vocabulary)
    hidden, weight, labels, token_weights = inputs
    layer = build_layer(weight, sequence_parallel=sequence_parallel)
    rank, world = layer.tp_group.rank(), layer.tp_group.size()
    expected, of_hidden, of_weight = plain(*inputs, vocabulary)
    of_weight = of_weight.chunk(world)[rank]
    unequal = plain(*inputs[:3], torch.ones_like(token_weights), vocabulary)[1]
    if layer.sequence_parallel:
        hidden, of_hidden, unequal = (part.chunk(world)[rank] for part in (hidden, of_hidden, unequal))

    def gradients(head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        leaf = hidden.clone().requires_grad_()
        layer.weight.grad = None
        losses = head(leaf)
        (losses * token_weights).sum().backward()
        assert leaf.grad is not None
        return losses.detach(), leaf.grad, layer.weight.grad

    head = TiledLossHead(vocabulary=vocabulary, tiles=Tiles(tokens=tiles[0], columns=tiles[1]))
    found = gradients(
        lambda leaf: head(
            hidden_states=leaf,
            output_layer=layer,
            output_weight=None,
            labels=labels,
            config=layer.config,
            expected_factors=token_weights if is_expected else None,
        )
    )
    name = (
        f"{dtype} vocabulary {vocabulary} tiles {tiles} sequence parallel {sequence_parallel} expected "
        f"{is_expected}"
    )
    for part, ours, theirs in zip(
        ("losses", "hidden", "weight"), found, (expected, of_hidden, of_weight), strict=True
    ):
        assert difference(ours, theirs) <= BOUND[dtype], f"{name}: {part} {difference(ours, theirs):.1e}"
    # Negative control: without the token weights the same comparison fails clearly
    assert difference(found[1], unequal) > 10 * BOUND[dtype]
    if vocabulary < PADDED or dtype != torch.float32:
        return

    def stock(leaf: Tensor) -> Tensor:
        losses: Tensor = vocab_parallel_cross_entropy(layer(leaf)[0], labels.t().contiguous())
        return losses.t().contiguous()

    for part, ours, theirs in zip(("losses", "hidden", "weight"), found, gradients(stock), strict=True):
        assert difference(ours, theirs.double()) <= 1e-6, f"{name}: {part} differs from upstream's"


@pytest.mark.parametrize("world", [1, 2])
def test_losses_and_gradients_on_ranks(world: int, tmp_path: Path) -> None:
    def job() -> None:
        from megatron.core import parallel_state

        torch.distributed.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=world)
        parallel_state.initialize_model_parallel(world)
        for dtype in BOUND:
            for vocabulary in VOCABULARIES:
                for tiles in TILES:
                    for is_parallel, is_expected in itertools.product({False, world > 1}, (False, True)):
                        check_head(
                            dtype,
                            vocabulary,
                            tiles,
                            sequence_parallel=is_parallel,
                            is_expected=is_expected,
                        )
        print("all cases checked")

    ended = ranks.run_ranks(world, job, tmp_path).check()
    assert all("all cases checked" in output for output in ended.outputs)


LAYOUTS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "tp1 untied": (1, ("--untie-embeddings-and-output-weights", "--micro-batch-size", 2)),
    "tp2 sequence parallel": (2, ("--tensor-model-parallel-size", 2, "--sequence-parallel")),
    "pp2 micro-batch 2": (2, ("--pipeline-model-parallel-size", 2, "--micro-batch-size", 2)),
    "dp2 overlap": (2, ("--overlap-grad-reduce",)),
    "bf16": (1, ("--bf16", "--micro-batch-size", 2)),
}
SMALL_TILES = ("--loss-head-tokens", 48, "--loss-head-columns", 40)


def refuse_the_other_head(chosen: str) -> Callable[[], None]:
    """A patch under which a job fails if it calls the head that it should not."""

    def patch() -> None:
        from megatron.core.models.common.language_module.language_module import LanguageModule

        from megatron_exact.model.loss_head import TiledLossHead

        def fail(*_: Any, **__: Any) -> Any:
            raise ValueError(f"the job was told to use the {chosen} head")

        if chosen == "tiled":
            LanguageModule.compute_language_model_loss = fail
        else:
            TiledLossHead.__call__ = fail  # type: ignore[method-assign]

    return patch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_job_agrees_with_upstreams_head(
    layout: str, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    world, flags = LAYOUTS[layout]
    # The checkpoint's embeddings are tied; alone on one rank, the same seed gives the same weights
    start = () if "untied" in layout else ("--pretrained-checkpoint", checkpoint)
    records, evaluations = {}, {}
    for head, more in (("tiled", SMALL_TILES), ("stock", ())):
        run = tmp_path / head
        argv = jobs.command(pack, "exact", 3, *start, *flags, "--loss-head", head, *more)
        argv += ["--run-dir", run, "--eval-iters", 1, "--eval-interval", 3]
        ranks.train(world, argv, tmp_path / f"{head}-output", refuse_the_other_head(head)).check()
        records[head] = ranks.read_jsonl(run / "losses.jsonl")
        evaluations[head] = ranks.read_jsonl(run / "evaluations.jsonl")
    layout_record = json.loads((tmp_path / "tiled" / "run.json").read_text())["layout"]
    assert [layout_record[f"loss_head{end}"] for end in ("", "_tokens", "_columns")] == ["tiled", 48, 40]
    pairs = list(zip(records["tiled"], records["stock"], strict=True))
    assert len(pairs) == 3
    if layout == "bf16":  # rounding of the gradients shows from the second iteration on
        pairs, bounds = pairs[:1], {"loss": 1e-6, "weighted_loss": 1e-6, "grad_norm": 1e-2}
    else:
        pairs += zip(evaluations["tiled"], evaluations["stock"], strict=True)
        bounds = {"loss": 1e-6, "weighted_loss": 1e-6, "grad_norm": 1e-5}
    for ours, theirs in pairs:
        assert ours["bucket_targets"] == theirs["bucket_targets"]
        for key, bound in bounds.items():
            if theirs.get(key) is None:  # an evaluation has no gradient
                assert ours.get(key) is None
                continue
            found = abs(ours[key] / theirs[key] - 1)
            assert found <= bound, f"{key}: relative difference {found:.1e}"
    # Negative control: an iteration moves the loss far more than the heads differ
    assert abs(records["tiled"][1]["loss"] / records["tiled"][0]["loss"] - 1) > 1e-4


def test_a_model_that_the_head_does_not_support_stops_the_job_in_one_line(
    pack: Path, tmp_path: Path
) -> None:
    argv = jobs.command(pack, "none", 1, "--use-mup", "--mup-base-hidden-size", jobs.HIDDEN // 2)
    ended = ranks.train(1, argv, tmp_path)
    assert ended.codes == [1]
    errors = [line for line in ended.outputs[0].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "--use-mup is not supported: no supported model family has it" in errors[0]
