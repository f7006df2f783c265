"""Which model was evaluated: hashes of its files, and the training that its export tells of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_exact.command_line import progress_bar
from megatron_exact.evaluation.prompts import tokenizer_sha256
from megatron_exact.files import sha256_file
from megatron_exact.json_input import read_json_object

EXPORT_RECORD = "megatron_exact.json"
"""Written by `tools/export_hf.py` beside the weights."""


def require_model_folder(model: Path) -> list[Path]:
    """The files with the weights of a model folder, in order. Raises ValueError if it is none."""
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} has no config.json: name a Hugging Face model folder")
    weights = sorted(model.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{model} has no *.safetensors: export the model with tools/export_hf.py")
    return weights


def model_identity(model: Path) -> dict[str, Any]:
    """Name, sizes and hashes of a model folder; no path, so that a copy is the same model.

    Raises:
        ValueError: no model folder.
    """
    weights = require_model_folder(model)
    total = sum(path.stat().st_size for path in weights)
    with progress_bar(f"hashing {model.name}", total, "B") as bar:
        hashes = {path.name: sha256_file(path, bar.update) for path in weights}
    return {
        "name": model.resolve().name,
        "config_sha256": sha256_file(model / "config.json"),
        "tokenizer_sha256": tokenizer_sha256(model),
        "weights_sha256": hashes,
    }


def max_positions(model: Path) -> int | None:
    """`max_position_embeddings` of the config, if it has one."""
    config = read_json_object(model / "config.json", "copy the model again", wide_integers=True)
    value = config.get("max_position_embeddings")
    return int(value) if isinstance(value, int) else None


def read_provenance(model: Path) -> dict[str, Any] | None:
    """The record of the run that made this model; None for a model that nobody exported with our tool.

    Raises:
        ValueError: a record that cannot be read.
    """
    path = model / EXPORT_RECORD
    if not path.is_file():
        return None
    return read_json_object(path, "export the model again")
