"""What an export holds beside its weights: where it is from, and the window that `config.json` promises.

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
from megatron_exact.conversion.layout import iteration_of
from megatron_exact.data.hf_tokenizer import TOKENIZER_JSON
from megatron_exact.data.tokenizer_identity import tokenizer_sha256
from megatron_exact.files import fsync_path, write_json, write_text
from megatron_exact.integrity import content_digest, read_integrity
from megatron_exact.model.hf_config import ARCHITECTURES
from megatron_exact.model.hf_folder import CARRIED_FILES, CONFIG, HfFolder, copy_files, read_json_object
from megatron_exact.model.shapes import ModelShape
from megatron_exact.trainings import trained_row_tokens

TOKENIZER_SHA256 = "tokenizer_sha256"
"""Key of an export's record with the identity of its `tokenizer.json`: evaluation compares it."""
ORIGIN = "checkpoint"
"""Key of an export's record under which `origin_of` stands."""


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
    origin: dict[str, Any],
    dtypes: list[str],
    window: int,
) -> None:
    """Config, tokenizer, licences, record and model card.

    Args:
        target: folder of the export.
        hf: what was imported.
        run: run.json, None for an import that was not trained.
        origin: from `origin_of`.
        dtypes: names of the types of the weights.
        window: from `exported_window`.
    """
    copy_files(hf.path, target, tuple(name for name in CARRIED_FILES if name != CONFIG))
    config = dict(hf.config)
    # a base model's file names a class without the output layer that is here
    config["architectures"] = [ARCHITECTURES[hf.shape.architecture]]
    if len(dtypes) == 1:
        # transformers 5 writes dtype, older versions torch_dtype; some files have both
        config |= dict.fromkeys({"dtype", "torch_dtype"} & set(config) or {"torch_dtype"}, dtypes[0])
    if window != hf.shape.max_position_embeddings:
        config["max_position_embeddings"] = window
    if config == hf.config:
        copy_files(hf.path, target, (CONFIG,))
    else:
        write_json(target / CONFIG, config)
    fsync_path(target / CONFIG)
    iteration = origin["iteration"]
    summary = model_card.summary(hf, run, iteration, dtypes)
    tokenizer = target / TOKENIZER_JSON
    identity = {TOKENIZER_SHA256: tokenizer_sha256(tokenizer)} if tokenizer.is_file() else {}
    write_json(target / model_card.SUMMARY, {**summary, ORIGIN: origin, **identity})
    write_text(target / "README.md", model_card.model_card(hf, run, iteration, dtypes))


def origin_of(folder: Path) -> dict[str, Any]:
    """Which checkpoint an export was made from, by its content: it may be copied, but not changed.

    Args:
        folder: of one iteration.

    Returns:
        `iteration`, None for an import, and `sha256` over the hashes of the files, None without an
        integrity.json.

    Raises:
        ValueError: an integrity.json that cannot be read.
    """
    files = read_integrity(folder)
    return {"iteration": iteration_of(folder), "sha256": None if files is None else content_digest(files)}


def is_export_of(hf: str | Path, folder: Path) -> bool:
    """Whether a Hugging Face folder says that it was exported from this checkpoint as it is now.

    Args:
        hf: the Hugging Face folder.
        folder: of one iteration.

    Raises:
        ValueError: a record or an integrity.json that cannot be read.
    """
    record = Path(hf) / model_card.SUMMARY
    return record.is_file() and read_json_object(record).get(ORIGIN) == origin_of(folder)
