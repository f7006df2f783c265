"""What a GPTModel asks a checkpoint for, against what the importer writes.

The model is built by the driver's own steps (flags, validation, `GPTModelConfig`, our layer spec and
upstream's builder) on one forked rank without a GPU, with local layers or with Transformer Engine's.
"""

from __future__ import annotations

import json
import queue
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_exact.conversion.checkpoint_layout import extra_state_keys, megatron_shapes
from megatron_exact.model.hf_folder import copy_hf_folder, read_hf_folder
from megatron_exact.model.shapes import ModelShape, megatron_flags
from megatron_exact.training import cpu_runtime
from tests.distributed import ranks

SMALL_HEAD = 8
VOCABULARY_DIVISOR = 64
LAYERS = 2


def reduced(shape: ModelShape) -> ModelShape:
    """The same model in small: two layers, narrow heads, every ratio between the other widths kept."""
    factor = shape.head_dim // SMALL_HEAD
    widths = (shape.hidden_size, shape.ffn_hidden_size)
    assert not any(width % factor for width in widths)
    assert not shape.vocab_size % VOCABULARY_DIVISOR
    return replace(
        shape,
        num_layers=LAYERS,
        layers_without_rope=tuple(layer for layer in shape.layers_without_rope if layer < LAYERS),
        hidden_size=shape.hidden_size // factor,
        ffn_hidden_size=shape.ffn_hidden_size // factor,
        head_dim=SMALL_HEAD,
        vocab_size=shape.vocab_size // VOCABULARY_DIVISOR,
    )


def expected_keys(shape: ModelShape) -> dict[str, Any]:
    """What the importer writes: `tensors` {key: global shape} and `objects` [key]."""
    return {
        "tensors": {key: list(sizes) for key, sizes in megatron_shapes(shape).items()},
        "objects": sorted(extra_state_keys(shape.num_layers, qk_norm=shape.qk_norm)),
    }


def wanted_keys(
    shapes: dict[str, ModelShape], layers: str, folder: Path, change: Callable[[Any], None] | None = None
) -> dict[str, dict[str, Any]]:
    """What models ask a checkpoint for, by name, in the form of `expected_keys`.

    Args:
        shapes: the models.
        layers: value of `--transformer-impl`.
        folder: receives the rank's output.
        change: called with each GPTModelConfig before the model is built, for controls.
    """

    def job() -> None:
        found = {name: _keys_of(build_model(shape, layers, change)) for name, shape in shapes.items()}
        (folder / "keys.json").write_text(json.dumps(found))

    ranks.run_ranks(1, job, folder).check()
    keys: dict[str, dict[str, Any]] = json.loads((folder / "keys.json").read_text())
    return keys


def load_and_save(
    checkpoint: Path, layers: str, run: Path, change: Callable[[Any], None] | None = None
) -> None:
    """Load an imported checkpoint into a model, raising on any key of one side only, and save the model.

    Args:
        checkpoint: of the importer.
        layers: value of `--transformer-impl`.
        run: folder to make, as a training run leaves it after iteration 1.
        change: called with the GPTModelConfig before the model is built.
    """
    iteration = run / "iter_0000001"
    iteration.mkdir(parents=True)

    def job() -> None:
        import torch
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from megatron.core.dist_checkpointing.validation import StrictHandling

        filesystem_async._results_queue = queue.Queue()  # else a process that imports everything anew
        model = build_model(read_hf_folder(checkpoint / "hf").shape, layers, change)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))  # what is not loaded would show
        state = dist_checkpointing.load(
            model.sharded_state_dict(), checkpoint / "release", strict=StrictHandling.RAISE_ALL
        )
        model.load_state_dict({key: value for key, value in state.items() if key in model.state_dict()})
        dist_checkpointing.save({**model.sharded_state_dict(), "iteration": 1}, iteration)

    ranks.run_ranks(1, job, run.with_name(f"{run.name}-output")).check()
    (run / "latest_checkpointed_iteration.txt").write_text("1")
    copy_hf_folder(checkpoint, run)


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One line for each key that is missing, unknown or of another shape; empty if both agree."""
    ours, theirs = found["tensors"], expected["tensors"]
    lines = [
        f"{key}: the model asks for {ours.get(key)}, the importer writes {theirs.get(key)}"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
    ]
    objects = set(found["objects"]) ^ set(expected["objects"])
    return lines + [f"{key}: an object of one side only" for key in sorted(objects)]


def build_model(shape: ModelShape, layers: str, change: Callable[[Any], None] | None) -> Any:
    """A GPTModel on this rank, which becomes a world of its own.

    Args:
        shape: the model.
        layers: value of `--transformer-impl`.
        change: called with the GPTModelConfig before the model is built.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_exact.model.layer_specs import layer_spec

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
    sys.argv = [
        *("job", *megatron_flags(shape), *cpu_runtime.CPU_ARGUMENTS),
        *("--transformer-impl", layers),
        *("--seq-length", "64", "--max-position-embeddings", "64", "--micro-batch-size", "1"),
        *("--tokenizer-type", "NullTokenizer", "--make-vocab-size-divisible-by", "1"),
        *("--attention-dropout", "0", "--hidden-dropout", "0"),
    ]
    args = parse_args()
    validate_args(args)
    config = gpt_config_from_args(args)
    config.transformer_layer_spec = partial(layer_spec, post_norm=shape.post_norm)
    if change is not None:
        change(config)
    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def _keys_of(model: Any) -> dict[str, Any]:
    """Keys and global shapes of a model's sharded state."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)  # gate and up are one tensor only then
    leaves = list(nested_values(state))
    unknown = [leaf for leaf in leaves if not isinstance(leaf, ShardedTensor | ShardedObject)]
    assert not unknown, f"neither a tensor nor an object: {unknown}"
    return {
        "tensors": {
            leaf.key: list(leaf.global_shape) for leaf in leaves if isinstance(leaf, ShardedTensor)
        },
        "objects": sorted(leaf.unique_key for leaf in leaves if isinstance(leaf, ShardedObject)),
    }
