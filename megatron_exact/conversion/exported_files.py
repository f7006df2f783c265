"""What an export holds beside its weights, above all the window that its `config.json` promises.

Engines read the longest prompt that they accept from `max_position_embeddings`, so an export says there
the longest rows that its weights were trained on, and no less than was imported. Nothing that the model
computes depends on it: `model/hf_config.py` takes plain rotary embedding and Llama 3's scaling, which has
an original length of its own, and refuses the kinds that may read the window (transformers'
modeling_rope_utils: dynamic, yarn, longrope).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_exact.conversion import model_card
from megatron_exact.files import fsync_path, write_json, write_text
from megatron_exact.model.hf_folder import CARRIED_FILES, CONFIG, HfFolder, copy_files
from megatron_exact.model.shapes import ModelShape


def trained_row_tokens(run: dict[str, Any] | None) -> int | None:
    """Tokens of the longest rows that the weights were trained on; None where no record says so.

    The trainings before count too: instruction tuning on short rows follows training on long ones.

    Args:
        run: run.json of the last training, whose `start_checkpoint` holds that of the one before; None for
            an import.
    """
    longest: int | None = None
    while isinstance(run, dict):
        row_tokens = run.get("row_tokens")
        if isinstance(row_tokens, int):
            longest = max(longest or 0, row_tokens)
        start = run.get("start_checkpoint")
        run = start.get("run") if isinstance(start, dict) else None
    return longest


def exported_window(shape: ModelShape, run: dict[str, Any] | None, wanted: int | None = None) -> int:
    """What the export says as `max_position_embeddings`, tokens.

    Args:
        shape: of the imported config.
        run: as for `trained_row_tokens`.
        wanted: the user's choice, if any.

    Raises:
        ValueError: a choice below the rows of training, or one that no config can have.
    """
    trained = trained_row_tokens(run)
    if wanted is None:
        return max(shape.max_position_embeddings, trained or 0)
    if trained is not None and wanted < trained:
        raise ValueError(
            f"--max-position-embeddings {wanted} is below the {trained} tokens of the rows that the model "
            f"was trained on, so that engines would refuse prompts that it knows: give {trained} or more"
        )
    return replace(shape, max_position_embeddings=wanted).max_position_embeddings


def write_files_beside_weights(
    target: Path,
    hf: HfFolder,
    run: dict[str, Any] | None,
    *,
    iteration: int | None,
    dtypes: list[str],
    window: int,
) -> None:
    """Config, tokenizer, licences, record and model card.

    Args:
        target: folder of the export.
        hf: what was imported.
        run: run.json, None for an import that was not trained.
        iteration: that is exported, None for an import.
        dtypes: names of the types of the weights.
        window: from `exported_window`.
    """
    copy_files(hf.path, target, tuple(name for name in CARRIED_FILES if name != CONFIG))
    config = dict(hf.config)
    if len(dtypes) == 1:
        # transformers 5 writes dtype, older versions torch_dtype; the file keeps its spelling
        config["dtype" if "dtype" in config else "torch_dtype"] = dtypes[0]
    if window != hf.shape.max_position_embeddings:
        config["max_position_embeddings"] = window
    if config == hf.config:
        copy_files(hf.path, target, (CONFIG,))
    else:
        write_json(target / CONFIG, config)
    fsync_path(target / CONFIG)
    write_json(target / model_card.SUMMARY, model_card.summary(hf, run, iteration, dtypes))
    write_text(target / "README.md", model_card.model_card(hf, run, iteration, dtypes))
