"""Separate projections for queries, keys and values against the fused one, from one checkpoint."""

from __future__ import annotations

import queue
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.model.families import PRESETS
from tests.distributed import hf_models, jobs, layout_matrix, ranks, sharded_keys

HEADS, HEAD_DIM, HIDDEN, TOKENS = 4, 6, 24, 10
BOUND = 1e-6
SEPARATE = ("--separate-qkv",)


def relative(ours: Any, theirs: Any) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def make_module(kind: Any, groups: int) -> Any:
    """A projection of either kind on this rank, float64, random."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    ranks_of_model = parallel_state.get_tensor_model_parallel_world_size()
    module = kind(
        HIDDEN,
        (HEADS + 2 * groups) * HEAD_DIM,
        config=TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_query_groups=groups,
            kv_channels=HEAD_DIM,
            tensor_model_parallel_size=ranks_of_model,
            use_cpu_initialization=True,
            params_dtype=torch.float64,
        ),
        init_method=partial(torch.nn.init.normal_, std=0.5),
        gather_output=False,
        bias=True,
        skip_bias_add=False,
        is_expert=False,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return module


def load_from(source: Any, module: Any, file: Path) -> None:
    """Give a projection the weights of another one, through a checkpoint."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    if torch.distributed.get_rank() == 0:
        file.mkdir()
    torch.distributed.barrier()
    stacked = ((0, 0, 1),)  # layers are
    dist_checkpointing.save(source.sharded_state_dict("qkv.", stacked, metadata), file)
    wanted = module.sharded_state_dict("qkv.", stacked, metadata)
    loaded = dist_checkpointing.load(wanted, file, strict=StrictHandling.RAISE_ALL)
    module.load_state_dict({key.removeprefix("qkv."): value for key, value in loaded.items()})


def forward_and_backward(module: Any) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
    output = module(hidden)[0]
    (output * torch.randn(output.shape, dtype=torch.float64, generator=generator)).sum().backward()
    assert hidden.grad is not None
    return output, hidden.grad


def initialize_model_parallel() -> None:
    """All ranks in one tensor-parallel group; checkpoints are written by the ranks alone."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    filesystem_async._results_queue = queue.Queue()  # else a process that imports everything anew
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(torch.distributed.get_world_size())
    model_parallel_cuda_manual_seed(1)


@pytest.mark.parametrize("world", [1, 2])
def test_outputs_and_gradients_are_those_of_the_fused_projection(world: int, tmp_path: Path) -> None:
    def job() -> None:
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear

        from megatron_exact.model.separate_qkv import PROJECTIONS, SeparateQkvLinear

        initialize_model_parallel()
        for groups in [groups for groups in (1, 2, HEADS) if groups % world == 0]:
            fused, separate = (
                make_module(ColumnParallelLinear, groups),
                make_module(SeparateQkvLinear, groups),
            )
            load_from(fused, separate, tmp_path / f"there{groups}")
            there, here = forward_and_backward(fused), forward_and_backward(separate)
            assert max(map(relative, here, there)) < BOUND
            # every gradient of the fused one, by its head on this rank, is one of the separate ones
            first = separate.first_group * (separate.group_heads + 2)
            seen = 0
            for kind in ("weight", "bias"):
                heads = getattr(fused, kind).grad.unflatten(0, (-1, HEAD_DIM))
                for part in PROJECTIONS:
                    expected = heads[[head - first for head in separate.heads_of(part)]].flatten(0, 1)
                    assert relative(getattr(getattr(separate, part), kind).grad, expected) < BOUND
                    seen += expected.numel()
            assert seen == sum(parameter.numel() for parameter in fused.parameters())
            # and back, to the bit
            again = make_module(ColumnParallelLinear, groups)
            load_from(separate, again, tmp_path / f"back{groups}")
            assert torch.equal(again.weight, fused.weight)
            assert torch.equal(again.bias, fused.bias)

    ranks.run_ranks(world, job, tmp_path / "output").check()


def test_heads_in_another_order_are_seen(tmp_path: Path) -> None:
    """Negative control: all queries, then all keys, then all values, as if there were no groups."""

    def job() -> None:
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear

        from megatron_exact.model.separate_qkv import SeparateQkvLinear

        initialize_model_parallel()
        starts = {"linear_q": range(HEADS), "linear_k": range(4, 6), "linear_v": range(6, 8)}
        SeparateQkvLinear.heads_of = lambda _, part: list(starts[part])  # type: ignore[method-assign]
        fused, separate = make_module(ColumnParallelLinear, 2), make_module(SeparateQkvLinear, 2)
        load_from(fused, separate, tmp_path / "there")
        there, here = forward_and_backward(fused), forward_and_backward(separate)
        assert min(map(relative, here, there)) > 1e5 * BOUND

    ranks.run_ranks(1, job, tmp_path / "output").check()


def make_separate(config: Any) -> None:
    """Change the configuration of a model that is to be built."""
    from megatron_exact.model.layer_specs import separate_qkv_spec

    config.transformer_layer_spec = separate_qkv_spec


def test_a_checkpoint_has_the_keys_and_shapes_of_the_fused_layout(tmp_path: Path) -> None:
    shapes = {name: sharded_keys.reduced(PRESETS[name]) for name in ("qwen2.5-0.5b", "llama-3.1-8b")}
    found = sharded_keys.wanted_keys(shapes, "local", tmp_path, make_separate)
    for name, shape in shapes.items():
        assert sharded_keys.differences(found[name], sharded_keys.expected_keys(shape)) == []


QWEN = next(name for name in hf_models.CONFIGS if name.startswith("qwen2 tied"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == QWEN else pytest.mark.slow, id=name)
        for name in hf_models.CONFIGS
    ],
)
def test_there_and_back_is_the_same_bits(name: str, tmp_path: Path) -> None:
    """Hugging Face > import > separate projections, every key accounted for > save > export."""
    import_hf(hf_models.save_model(name, tmp_path / "hf"), tmp_path / "checkpoint")
    sharded_keys.load_and_save(tmp_path / "checkpoint", "local", tmp_path / "run", make_separate)
    export_hf(tmp_path / "run", tmp_path / "exported")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("exported", "hf"))
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


LAYOUTS = (
    *(
        "TP2 + SP",
        "PP2, micro-batch 2",
        "micro-batch 4",
        "recompute full",
        "TP2",
        "VPP, 2 x 2 stages",
        "TP2 x PP2 + SP",
    ),
    *("DP2, distributed optimizer, overlapped", "CP2 x TP2 + SP"),
)


@pytest.fixture(scope="module")
def strong(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start whose attention is not all but uniform, so that a fault in it is seen."""
    return layout_matrix.make_start(pack, tmp_path_factory.mktemp("strong") / "checkpoint")


@pytest.fixture(scope="module")
def fused(pack: Path, strong: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Records of six iterations with the fused projection, on one process."""
    folder = tmp_path_factory.mktemp("fused")
    return layout_matrix.run(layout_matrix.REFERENCE, "exact", pack, strong, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_is_that_of_the_fused_projection_on_every_layout(
    name: str, pack: Path, strong: Path, fused: list[dict[str, Any]], tmp_path: Path
) -> None:
    layout = layout_matrix.LAYOUTS[name]
    found = layout_matrix.run(layout, "exact", pack, strong, tmp_path, *SEPARATE)
    for key, difference in layout_matrix.largest_differences(found, fused).items():
        assert difference < layout_matrix.BOUNDS[key], key
    assert layout_matrix.same_targets(found, fused)


@pytest.mark.slow
def test_what_it_trains_exports_as_what_the_fused_projection_trains(pack: Path, tmp_path: Path) -> None:
    """Hugging Face > import > training > export, both ways; by SGD, as Adam blows up what is almost 0."""
    import_hf(hf_models.save_model(QWEN, tmp_path / "hf"), tmp_path / "checkpoint")
    exported = [load_file(tmp_path / "hf" / "model.safetensors")]
    for name, world, flags in (("fused", 1, ()), ("separate", 2, (*layout_matrix.TP2, *SEPARATE))):
        run = tmp_path / name
        argv = [
            *("--pack", pack, "--token-weighting", "exact", *jobs.SCHEDULE, "--train-iters", 3),
            *("--pretrained-checkpoint", tmp_path / "checkpoint", "--load", run, "--save", run),
            *("--save-interval", 3, "--optimizer", "sgd", "--lr", 0.1, *flags),
        ]
        ranks.train(world, argv, tmp_path / f"output-{name}").check()
        export_hf(run, tmp_path / f"hf-{name}")
        exported.append(load_file(tmp_path / f"hf-{name}" / "model.safetensors"))
    start, fused, separate = exported
    assert set(fused) == set(separate) == set(start)
    for key, tensor in fused.items():
        assert relative(separate[key], tensor) < 1e-5, key
        assert relative(start[key], tensor) > 1e-4 or key.endswith("k_proj.bias"), key  # it was trained
