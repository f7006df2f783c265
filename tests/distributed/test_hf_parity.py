"""The model that the driver builds from an imported checkpoint is the Hugging Face model, on any layout."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_exact.conversion.import_hf import import_hf
from tests.distributed import hf_models, jobs, ranks
from tests.distributed.logits import logits_of

LOGITS_BOUND = 1e-4
LOSS_BOUND = 2e-6
GRAD_NORM_BOUND = 1e-5
LONG_TOKENS = 1500  # far enough for the scaled frequencies to turn

LAYOUTS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "tp1": (1, ()),
    "tp2": (2, ("--tensor-model-parallel-size", 2)),
    "pp2": (2, ("--pipeline-model-parallel-size", 2)),
    "tp2 pp2": (4, ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)),
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint of each model, made once."""

    @functools.cache
    def checkpoint(name: str) -> Path:
        folder = tmp_path_factory.mktemp("imported")
        import_hf(hf_models.save_model(name, folder / "hf"), folder / "checkpoint")
        return folder / "checkpoint"

    return checkpoint


def command(pack: Path, checkpoint: Path, run: Path, *extra: Any) -> list[Any]:
    """One iteration from an imported checkpoint; nothing says what the model is but the checkpoint."""
    return [
        *("--pack", pack, "--load", checkpoint, "--run-dir", run, "--log-row-ids"),
        *jobs.SCHEDULE,
        *("--train-iters", 1),
        *extra,
    ]


def long_document() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, hf_models.VOCABULARY, (LONG_TOKENS,), generator=generator)


def keep_logits(folder: Path) -> Callable[[], None]:
    """A patch that saves the logits of the long document before the first step."""

    def patch() -> None:
        from megatron.core import parallel_state

        from megatron_exact.training.run import TrainingRun

        stock = TrainingRun.finalize_grads

        def finalize(self: Any, model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
            stock(self, model, num_tokens, **kwargs)
            logits = logits_of(model[0].module, long_document(), (LONG_TOKENS,))
            if (
                parallel_state.is_pipeline_last_stage()
                and parallel_state.get_tensor_model_parallel_rank() == 0
            ):
                torch.save(logits, folder / "logits.pt")

        TrainingRun.finalize_grads = finalize  # type: ignore[method-assign]

    return patch


@functools.cache
def reference(name: str) -> torch.Tensor:
    with torch.no_grad():
        return hf_models.document_logits(hf_models.make_model(name), long_document())


@functools.cache
def step_of_transformers(name: str, pack: Path, rows: tuple[int, ...]) -> tuple[float, float]:
    """Loss of a global batch, documents one by one in float64, and the norm of its gradient."""
    model = hf_models.make_model(name).double()
    loss = hf_models.mean_loss(model, pack, "train", list(rows))
    loss.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return float(loss), float(torch.stack(norms).norm())


NEW = ("mistral", "smollm3", "phi3", "olmo2")
"""Families of which one layout is compared in `make test`, and the others in `make test-slow`."""
CASES = [
    pytest.param(
        *(name, layout),
        marks=[pytest.mark.slow] if name.startswith(NEW) and layout != "tp2" else [],
        id=f"{name}-{layout}",
    )
    for name in hf_models.CONFIGS
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_and_one_training_step(
    name: str, layout: str, imported: Callable[[str], Path], pack: Path, tmp_path: Path
) -> None:
    world, flags = LAYOUTS[layout]
    argv = command(pack, imported(name), tmp_path / "run", *flags)
    ranks.train(world, argv, tmp_path, keep_logits(tmp_path)).check()
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    expected = reference(name)
    assert logits.shape == expected.shape == (LONG_TOKENS, hf_models.VOCABULARY)
    difference = (logits - expected).abs()
    assert difference.max() <= LOGITS_BOUND, f"max {difference.max():.1e}, mean {difference.mean():.1e}"
    assert expected.std() > 0.3, "the logits are nearly constant: the test measures nothing"
    check_step(name, pack, tmp_path / "run")


def check_step(name: str, pack: Path, run: Path) -> None:
    (line,) = ranks.read_jsonl(run / "losses.jsonl")
    (rows,) = ranks.read_jsonl(run / "rows.jsonl")
    loss, grad_norm = step_of_transformers(name, pack, tuple(rows["rows"]))
    assert line["loss"] == pytest.approx(loss, rel=LOSS_BOUND)
    assert line["grad_norm"] == pytest.approx(grad_norm, rel=GRAD_NORM_BOUND)


QK_NORM = "qwen3 tied, 2 groups, wide heads"
POST_NORM = "olmo2 untied, 2 groups"
PARTLY = "phi3 untied, 2 groups, three quarters of a head turn"
NO_ROPE = "smollm3 tied, 2 groups, two of four layers without RoPE"


@pytest.mark.parametrize(
    "name", [QK_NORM, NO_ROPE, POST_NORM, pytest.param(PARTLY, marks=pytest.mark.slow)]
)
def test_layers_over_sequence_and_context_parallel_ranks(
    name: str, imported: Callable[[str], Path], pack: Path, tmp_path: Path
) -> None:
    """A rank has some heads and some tokens; context parallelism rotates after the norm, in attention."""
    flags = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--context-parallel-size", 2)
    ranks.train(4, command(pack, imported(name), tmp_path / "run", *flags), tmp_path).check()
    check_step(name, pack, tmp_path / "run")


def rotate_in_every_layer() -> None:
    """The control: context parallelism takes every layer for one with RoPE."""
    from megatron_exact.model.context_parallel import ContextParallelAttention

    stock = ContextParallelAttention.__init__

    def build(self: Any, **kwargs: Any) -> None:
        stock(self, **kwargs)
        self._has_rope = True

    ContextParallelAttention.__init__ = build  # type: ignore[method-assign]


def test_a_layer_without_rope_that_rotates_on_context_parallel_ranks_shows(
    imported: Callable[[str], Path], pack: Path, tmp_path: Path
) -> None:
    argv = command(pack, imported(NO_ROPE), tmp_path / "run", "--context-parallel-size", 2)
    ranks.train(2, argv, tmp_path, rotate_in_every_layer).check()
    (line,) = ranks.read_jsonl(tmp_path / "run" / "losses.jsonl")
    (rows,) = ranks.read_jsonl(tmp_path / "run" / "rows.jsonl")
    loss, _ = step_of_transformers(NO_ROPE, pack, tuple(rows["rows"]))
    assert abs(line["loss"] - loss) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [POST_NORM, NO_ROPE, PARTLY])
@pytest.mark.parametrize(
    "flags",
    [
        ("--separate-qkv",),
        ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1),
    ],
    ids=["separate projections", "recomputed layers"],
)
def test_layers_on_two_ranks_with(
    flags: tuple[Any, ...], name: str, imported: Callable[[str], Path], pack: Path, tmp_path: Path
) -> None:
    argv = command(pack, imported(name), tmp_path / "run", "--tensor-model-parallel-size", 2, *flags)
    ranks.train(2, argv, tmp_path).check()
    check_step(name, pack, tmp_path / "run")


def normalize_heads_of_each_rank_apart() -> None:
    """The control: a rank takes the mean square of its own heads for that of all."""
    from megatron_exact.model import layer_specs

    own: Any = lambda squares, group: squares * group.size()  # noqa: E731
    layer_specs._SumOverRanks.apply = own  # type: ignore[method-assign]


def test_a_norm_over_the_heads_of_one_rank_shows(
    imported: Callable[[str], Path], pack: Path, tmp_path: Path
) -> None:
    argv = command(pack, imported(POST_NORM), tmp_path / "run", "--tensor-model-parallel-size", 2)
    ranks.train(2, argv, tmp_path, normalize_heads_of_each_rank_apart).check()
    (line,) = ranks.read_jsonl(tmp_path / "run" / "losses.jsonl")
    (rows,) = ranks.read_jsonl(tmp_path / "run" / "rows.jsonl")
    loss, _ = step_of_transformers(POST_NORM, pack, tuple(rows["rows"]))
    assert abs(line["loss"] - loss) > 1e-4


def keep_gradients_of_head_norms_apart() -> None:
    """The control: tensor-parallel ranks do not sum the gradients of norms that they share."""
    # by its name, because the package has a function of the same name
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    stock = module._allreduce_non_tensor_model_parallel_grads

    def apart(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        assert config.qk_layernorm
        config.qk_layernorm = False
        stock(model, config, *args, **kwargs)
        config.qk_layernorm = True

    module._allreduce_non_tensor_model_parallel_grads = apart


def test_the_gradient_of_a_head_norm_is_that_of_all_heads(
    imported: Callable[[str], Path], pack: Path, tmp_path: Path
) -> None:
    """Negative control of the step on TP2: the loss is the same, the norm of the gradient is not."""
    argv = command(pack, imported(QK_NORM), tmp_path / "run", "--tensor-model-parallel-size", 2)
    ranks.train(2, argv, tmp_path, keep_gradients_of_head_norms_apart).check()
    (line,) = ranks.read_jsonl(tmp_path / "run" / "losses.jsonl")
    (rows,) = ranks.read_jsonl(tmp_path / "run" / "rows.jsonl")
    loss, grad_norm = step_of_transformers(QK_NORM, pack, tuple(rows["rows"]))
    assert line["loss"] == pytest.approx(loss, rel=LOSS_BOUND)
    assert abs(line["grad_norm"] - grad_norm) > 100 * GRAD_NORM_BOUND * grad_norm


def test_vocabulary_without_padding_on_four_ranks(
    imported: Callable[[str], Path], pack: Path, tmp_path: Path
) -> None:
    """100 rows on 1, 2 and 4 ranks: padding to 128 a rank would add terms to every softmax."""
    name = "llama untied, factor 8, all groups, wide heads"
    losses = []
    for tensor_parallel in (1, 2, 4):
        run = tmp_path / f"tp{tensor_parallel}"
        argv = command(pack, imported(name), run, "--tensor-model-parallel-size", tensor_parallel)
        ranks.train(tensor_parallel, argv, run).check()
        check_step(name, pack, run)
        losses.append(ranks.read_jsonl(run / "losses.jsonl")[0]["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=LOSS_BOUND)


def pad_the_vocabulary() -> None:
    """The control: upstream's default, which loads 100 rows into 128."""
    from megatron_exact.training import job_flags

    stock = job_flags.megatron_arguments

    def padded(*args: Any, **kwargs: Any) -> list[str]:
        argv = stock(*args, **kwargs)
        place = argv.index("--make-vocab-size-divisible-by")
        return [*argv[:place], "--make-vocab-size-divisible-by", "128", *argv[place + 2 :]]

    job_flags.megatron_arguments = padded


@pytest.mark.parametrize("head", ["stock", "tiled"])
def test_padding_is_not_silent(
    head: str, imported: Callable[[str], Path], pack: Path, tmp_path: Path
) -> None:
    """Negative control of the test above; the tiled head computes true columns only and does not care."""
    name = "llama untied, factor 8, all groups, wide heads"
    argv = command(pack, imported(name), tmp_path / "run", "--loss-head", head)
    ranks.train(1, argv, tmp_path, pad_the_vocabulary).check()
    (rows,) = ranks.read_jsonl(tmp_path / "run" / "rows.jsonl")
    loss, _ = step_of_transformers(name, pack, tuple(rows["rows"]))
    (line,) = ranks.read_jsonl(tmp_path / "run" / "losses.jsonl")
    if head == "stock":
        assert abs(line["loss"] - loss) > 1e-3
    else:
        assert line["loss"] == pytest.approx(loss, rel=LOSS_BOUND)
