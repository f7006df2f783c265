"""What an export holds beside its weights: where it is from, and the window that its files promise.

Engines read the longest prompt that they accept from `max_position_embeddings`, so an export says there
the longest rows that its weights were trained on, and no less than was imported. Other fields limit the
length as well (`LENGTH_LIMITS`): one that is below those rows is raised with the window. Nothing that the
model computes depends on them: `model/hf_config.py` takes plain rotary embedding and Llama 3's scaling,
which has an original length of its own, and refuses the kinds that may read the window (transformers'
modeling_rope_utils: dynamic, yarn, longrope).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
LENGTH_LIMITS = {
    # names under which engines look for the window; vLLM takes the smallest of those that are there
    CONFIG: (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "model_max_length",
        "max_target_positions",
        "max_sequence_length",
        "max_seq_length",
        "seq_len",
        "max_length",  # of generate(), from before there was a generation_config.json
    ),
    "tokenizer_config.json": ("model_max_length", "max_len"),
    GENERATION_CONFIG: ("max_length",),  # of prompt and answer together
}
"""File -> fields that limit the number of tokens, where they are numbers."""
TRUNCATION = re.compile(r'("truncation"\s*:\s*\{[^{}]*?"max_length"\s*:\s*)(\d+)')
"""In tokenizer.json, which is too large to be parsed for one number."""
SAMPLING = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "length_penalty",
    "max_new_tokens",
)
"""Fields of generation_config.json that change what `generate()` answers; an export leaves them alone."""
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


@dataclass(frozen=True, kw_only=True)
class LengthLimit:
    """A field that limits the number of tokens."""

    file: str
    """Its file."""
    field: str
    """Its name there."""
    tokens: float
    """Its value."""

    def __str__(self) -> str:
        """`tokenizer_config.json: model_max_length 32768`."""
        tokens = f"{self.tokens:.0f}" if self.tokens < 1 << 53 else f"{self.tokens:g}"
        return f"{self.file}: {self.field} {tokens}"


def length_limits(folder: Path, config: dict[str, Any]) -> Iterator[LengthLimit]:
    """Every field of a model folder that limits the number of tokens.

    Args:
        folder: with the other files.
        config: content of its config.json.

    Raises:
        ValueError: a file that cannot be read.
    """
    for file, fields in LENGTH_LIMITS.items():
        if file != CONFIG and not (folder / file).is_file():
            continue
        content = config if file == CONFIG else read_json_object(folder / file)
        for field in fields:
            value = content.get(field)
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield LengthLimit(file=file, field=field, tokens=value)
    if (folder / TOKENIZER_FILE).is_file():
        text = (folder / TOKENIZER_FILE).read_text(encoding="utf-8", errors="replace")
        if found := TRUNCATION.search(text):
            yield LengthLimit(
                file=TOKENIZER_FILE, field="truncation.max_length", tokens=float(found[2][:300])
            )


def reached_tokens(shape: ModelShape, run: dict[str, Any] | None, window: int) -> int:
    """Tokens that no file of an export may cut: the longest rows of training, or an extended window.

    Args:
        shape: of the imported config.
        run: as for `trained_row_tokens`.
        window: from `exported_window`.
    """
    extended = window if window > shape.max_position_embeddings else 0
    return max(trained_row_tokens(run) or 0, extended)


def sampling_fields(hf: HfFolder) -> dict[str, Any]:
    """Numbers and switches of generation_config.json that change the answers of `generate()`."""
    if GENERATION_CONFIG not in hf.files:
        return {}
    content = read_json_object(hf.path / GENERATION_CONFIG)
    return {field: content[field] for field in SAMPLING if isinstance(content.get(field), int | float)}


def _raise_limits(target: Path, config: dict[str, Any], reached: int, window: int) -> list[LengthLimit]:
    """Set every limit below `reached` to the window, `config` in place; returns what they were."""
    raised = [limit for limit in length_limits(target, config) if limit.tokens < reached]
    for limit in raised:
        if limit.file == CONFIG:
            config[limit.field] = window
        elif limit.file == TOKENIZER_FILE:
            text = (target / limit.file).read_bytes().decode("utf-8")
            write_text(target / limit.file, TRUNCATION.sub(rf"\g<1>{window}", text, count=1))
        else:
            content = read_json_object(target / limit.file)
            write_json(target / limit.file, {**content, limit.field: window})
    return raised


def write_files_beside_weights(
    target: Path,
    hf: HfFolder,
    run: dict[str, Any] | None,
    *,
    origin: dict[str, Any],
    dtypes: list[str],
    window: int,
) -> tuple[LengthLimit, ...]:
    """Config, tokenizer, licences, record and model card.

    Args:
        target: folder of the export.
        hf: what was imported.
        run: run.json, None for an import that was not trained.
        origin: from `origin_of`.
        dtypes: names of the types of the weights.
        window: from `exported_window`.

    Returns:
        The limits of length that were raised to the window, with the values that they had.
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
    raised = _raise_limits(target, config, reached_tokens(hf.shape, run, window), window)
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
    return tuple(raised)


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
