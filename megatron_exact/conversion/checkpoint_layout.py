"""The torch_dist checkpoint that an import writes, file by file and key by key.

    CHECKPOINT/latest_checkpointed_iteration.txt   "release"
    CHECKPOINT/release/__0_0.distcp                the records, one after the other
    CHECKPOINT/release/.metadata                   pickle of torch.distributed.checkpoint's Metadata:
                                                   key -> shape, dtype, chunks; (key, offset) -> record
    CHECKPOINT/release/metadata.json               {"sharded_backend": "torch_dist",
                                                    "sharded_backend_version": 1}
    CHECKPOINT/release/integrity.json              {"algorithm": "sha256", "files": {name: hex}}
    CHECKPOINT/hf/                                 config, tokenizer, record of the import
                                                   (model/hf_folder.py)

A record is what `torch.save` writes: a zip file, not compressed, with `data.pkl` (dtype, shape, strides)
and `data/0` (the bytes, row-major), and a CRC-32 of each. V = vocab_size, L = layers, h = hidden_size,
f = ffn_hidden_size, d = head_dim, H = query heads, G = key/value groups:

    embedding.word_embeddings.weight                              [V, h]
    decoder.layers.self_attention.linear_qkv.layer_norm_weight    [L, h]
    decoder.layers.self_attention.linear_qkv.weight               [L, (H + 2 G) d, h]   per group: q, k, v
    decoder.layers.self_attention.linear_qkv.bias                 [L, (H + 2 G) d]      with a q/k/v bias
    decoder.layers.self_attention.{q_layernorm, k_layernorm}.weight
                                                                  [L, d]                with q/k norm
    decoder.layers.self_attention.linear_proj.weight              [L, h, H d]
    decoder.layers.mlp.linear_fc1.layer_norm_weight               [L, h]
    decoder.layers.mlp.linear_fc1.weight                          [L, 2 f, h]           gate, then up
    decoder.layers.mlp.linear_fc2.weight                          [L, h, f]
    decoder.final_layernorm.weight                                [h]
    decoder.layers.{self_attention.linear_proj, mlp.linear_fc2}.output_norm.weight
                                                                  [L, h]                with post_norm, in
                                                                  place of both layer_norm_weight; q and
                                                                  k norm have H d and G d values there
    output_layer.weight                                           [V, h]                untied models
    common_state/shard_0_1                                        object [{"checkpoint_version": 3.0,
                                                                  "iteration": 0}]
    decoder.layers.{self_attention.linear_proj, self_attention.linear_qkv,
      mlp.linear_fc1, mlp.linear_fc2}._extra_state/shard_i_L      object [None], i = 0 .. L-1
    decoder.layers.self_attention.{q_layernorm,
      k_layernorm}._extra_state/shard_i_L                         object [None], likewise, with q/k norm
    decoder.final_layernorm._extra_state/shard_0_1                object [None]

The names follow the modules of Transformer Engine's layer spec; the local spec's separate norms are saved
under the same keys, so one file serves both. Chunks are row ranges of one layer; a loader cuts what its
ranks need out of them, on any layout. The vocabulary has exactly V rows: padded rows would have weight 0,
so logit 0, and enter the softmax.

Which Hugging Face tensors make up which of these is a table of the model's family (`model/family.py`).

Two imports of one model give the same bytes: nothing of the machine, the time or the path is stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_exact.model.families import family_of
from megatron_exact.model.family import LAYERS, TensorName
from megatron_exact.model.shapes import ModelShape

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
BACKEND_FILE = "metadata.json"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
INDEX_FILE = ".metadata"
MOST_DIGITS = 18
"""Most digits of an iteration; no run reaches a longer number."""
BLOCK_BYTES = 32 << 20
"""Largest record of an import, in bytes of its tensor."""
CACHED_BYTES = 1 << 20
"""Piece that is read, looked at and written while it is in the processor's cache."""

BUFFERS = re.compile(
    r"(?:^|\.)(?:rotary_emb\.(?:inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|(?:self_)?attn\.(?:masked_)?bias|attention\.(?:masked_)?bias|causal_mask|position_ids)$"
)
"""Tensors that a model computes when it is built: rotary tables, causal masks, position numbers.

Older versions of transformers saved them, and its loader ignores them (5.23: rotary tables and
`position_ids` in `_adjust_missing_and_unexpected_keys`, masks in `_keys_to_ignore_on_load_unexpected`).
No parameter of a supported family has such a name.
"""
ROTARY_FREQUENCIES = "rotary_emb.inv_freq"

EXTRA_STATE_MODULES = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer for which Megatron's loader wants an object `_extra_state`, empty without fp8."""
QK_NORM_EXTRA_STATE_MODULES = ("self_attention.k_layernorm", "self_attention.q_layernorm")
"""Modules of a layer with q/k norm that have one as well."""
FINAL_NORM_EXTRA_STATE = "decoder.final_layernorm._extra_state/shard_0_1"
"""Transformer Engine's norm (2.20.2) loads it, and ours does so that both read the same files."""
COMMON_STATE = "common_state/shard_0_1"
"""Object with the iteration and the version of the layout."""

OTHER_OBJECTS = ("common_state/", "rng_state/", "rerun_state_machine_state/")
OPTIMIZER_KEYS = ("optimizer.", "optimizer/", "chained_", "opt_param_scheduler")
"""Prefixes of what training saves beside the model; an export does not read it."""


def find_iteration(checkpoint: str | Path, iteration: int | None = None) -> Path:
    """Return the folder of one iteration.

    Args:
        checkpoint: the `--save` folder of a run, or the output of an import.
        iteration: its number; None for the one that the tracker names.

    Raises:
        ValueError: no such checkpoint.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not a folder: give the folder of a run or of an import")
    if iteration is not None:
        name = f"iter_{iteration:07d}"
    else:
        tracker = checkpoint / TRACKER
        if not tracker.is_file():
            raise ValueError(
                f"{checkpoint} contains no {TRACKER}: give the folder of a run or of an import"
            )
        text = tracker.read_text(errors="replace").strip()
        if text != RELEASE and re.fullmatch(rf"[0-9]{{1,{MOST_DIGITS}}}", text) is None:
            raise ValueError(
                f"{tracker} says {text[:40]!r}, no iteration and not {RELEASE!r}: name one by --iteration"
            )
        name = RELEASE if text == RELEASE else f"iter_{int(text):07d}"
    folder = checkpoint / name
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in checkpoint.glob("iter_*"))[-5:])
        raise ValueError(f"{checkpoint} contains no {name}" + (f"; there are {there}" if there else ""))
    return folder


def is_iteration_name(name: str) -> bool:
    """Return whether Megatron names an iteration's folder like this: `iter_` and seven or more digits."""
    digits = name.removeprefix("iter_")
    is_number = re.fullmatch(rf"[0-9]{{7,{MOST_DIGITS}}}", digits) is not None
    return is_number and name == f"iter_{int(digits):07d}"


def iteration_of(folder: Path) -> int | None:
    """Return the number of an iteration's folder, None for a release."""
    return None if folder.name == RELEASE else int(folder.name.removeprefix("iter_"))


def row_blocks(rows: int, row_bytes: int, block_bytes: int = BLOCK_BYTES) -> list[tuple[int, int]]:
    """Cut `rows` into ranges [start, stop) of at most `block_bytes` each, at least one row."""
    step = max(1, block_bytes // max(1, row_bytes))
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def names_of(shape: ModelShape) -> tuple[TensorName, ...]:
    """Return every Megatron tensor of a model with the Hugging Face tensors that it is made of."""
    return family_of(shape).tensors_of(shape)


def megatron_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return key -> global shape of every tensor of the model in a torch_dist checkpoint."""
    return {
        name.megatron: (*((shape.num_layers,) if name.per_layer else ()), *name.lengths)
        for name in names_of(shape)
    }


def layers_of(name: TensorName, shape: ModelShape) -> tuple[int | None, ...]:
    """Return the layers that have a tensor; (None,) for one outside the layers."""
    return tuple(range(shape.num_layers)) if name.per_layer else (None,)


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every Hugging Face tensor, layer by layer."""
    return {
        part.name.format(layer=layer): part.lengths
        for name, layer in in_model_order(shape)
        for part in name.parts
    }


def in_model_order(shape: ModelShape) -> Iterator[tuple[TensorName, int | None]]:
    """Yield (line, layer) in the order in which the model applies them: embedding, layers, norm, head."""
    names = names_of(shape)
    first = next(i for i, name in enumerate(names) if name.per_layer)
    last = max(i for i, name in enumerate(names) if name.per_layer) + 1
    yield from ((name, None) for name in names[:first])
    yield from ((name, layer) for layer in range(shape.num_layers) for name in names[first:last])
    yield from ((name, None) for name in names[last:])


def is_buffer(name: str) -> bool:
    """Return whether a Hugging Face tensor is computed by the model instead of learned."""
    return BUFFERS.search(name) is not None


def extra_state_keys(num_layers: int, *, qk_norm: bool = False) -> list[str]:
    """Return the keys of the empty objects that Megatron's loader asks a checkpoint for.

    Args:
        num_layers: number of layers of the model.
        qk_norm: whether query and key heads have a norm.
    """
    modules = (*EXTRA_STATE_MODULES, *(QK_NORM_EXTRA_STATE_MODULES if qk_norm else ()))
    layers = [
        f"{LAYERS}{module}._extra_state/shard_{layer}_{num_layers}"
        for layer in range(num_layers)
        for module in modules
    ]
    return [*layers, FINAL_NORM_EXTRA_STATE]


def is_training_state(key: str) -> bool:
    """Return whether a key of a checkpoint belongs to the optimizer, the schedule or the random state."""
    return key.startswith((*OPTIMIZER_KEYS, *OTHER_OBJECTS))


def is_extra_state(key: str) -> bool:
    """Return whether a key is an `_extra_state` object of a module: it contains no weights."""
    return "._extra_state/shard_" in key
