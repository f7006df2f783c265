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
    decoder.layers.self_attention.linear_qkv.bias                 [L, (H + 2 G) d]      Qwen2
    decoder.layers.self_attention.linear_proj.weight              [L, h, H d]
    decoder.layers.mlp.linear_fc1.layer_norm_weight               [L, h]
    decoder.layers.mlp.linear_fc1.weight                          [L, 2 f, h]           gate, then up
    decoder.layers.mlp.linear_fc2.weight                          [L, h, f]
    decoder.final_layernorm.weight                                [h]
    output_layer.weight                                           [V, h]                untied models
    common_state/shard_0_1                                        object [{"checkpoint_version": 3.0,
                                                                  "iteration": 0}]
    decoder.layers.{self_attention.linear_proj, self_attention.linear_qkv,
      mlp.linear_fc1, mlp.linear_fc2}._extra_state/shard_i_L      object [None], i = 0 .. L-1
    decoder.final_layernorm._extra_state/shard_0_1                object [None]

The names follow the modules of Transformer Engine's layer spec; the local spec's separate norms are saved
under the same keys, so one file serves both. Chunks are row ranges of one layer; a loader cuts what its
ranks need out of them, on any layout. The vocabulary has exactly V rows: padded rows would have weight 0,
so logit 0, and enter the softmax.

Two imports of one model give the same bytes: nothing of the machine, the time or the path is stored.
"""

from __future__ import annotations

import re
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
BACKEND_FILE = "metadata.json"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
INDEX_FILE = ".metadata"
MOST_DIGITS = 18
"""Of an iteration: more is no number that a run reaches."""
BLOCK_BYTES = 32 << 20
"""Largest piece of a tensor that is in memory at a time."""


def find_iteration(checkpoint: str | Path, iteration: int | None = None) -> Path:
    """The folder of one iteration.

    Args:
        checkpoint: folder that was given to `--save`, or was written by `tools/import_hf.py`.
        iteration: its number; None for the one that the tracker names.

    Raises:
        ValueError: no such checkpoint.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is no folder: give the folder of a run or of an import")
    if iteration is not None:
        name = f"iter_{iteration:07d}"
    else:
        tracker = checkpoint / TRACKER
        if not tracker.is_file():
            raise ValueError(f"{checkpoint} holds no {TRACKER}: give the folder of a run or of an import")
        text = tracker.read_text(errors="replace").strip()
        if text != RELEASE and re.fullmatch(rf"[0-9]{{1,{MOST_DIGITS}}}", text) is None:
            raise ValueError(
                f"{tracker} says {text[:40]!r}, no iteration and not {RELEASE!r}: name one by --iteration"
            )
        name = RELEASE if text == RELEASE else f"iter_{int(text):07d}"
    folder = checkpoint / name
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in checkpoint.glob("iter_*"))[-5:])
        raise ValueError(f"{checkpoint} holds no {name}" + (f"; there are {there}" if there else ""))
    return folder


def is_iteration_name(name: str) -> bool:
    """Whether Megatron gives this name to the folder of an iteration: at least seven ASCII digits."""
    digits = name.removeprefix("iter_")
    is_number = re.fullmatch(rf"[0-9]{{7,{MOST_DIGITS}}}", digits) is not None
    return is_number and name == f"iter_{int(digits):07d}"


def iteration_of(folder: Path) -> int | None:
    """Number of an iteration's folder, None for a release."""
    return None if folder.name == RELEASE else int(folder.name.removeprefix("iter_"))


def row_blocks(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Cut `rows` into ranges [start, stop) of at most BLOCK_BYTES each, at least one row."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]
