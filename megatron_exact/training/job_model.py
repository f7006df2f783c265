"""Which model a job trains: from the checkpoint it starts from, from `--preset`, or from the user's flags.

A checkpoint made by `tools/import_hf.py`, and every run, has a folder `hf/` that says what the model is.
Its shape gives the Megatron flags. A flag of the user's that names the same thing is compared, never
obeyed: upstream would take other rotary frequencies or another epsilon without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_exact.data.hf_tokenizer import eos_of, token_text
from megatron_exact.data.manifest import Manifest
from megatron_exact.data.tokenizer_identity import made_by
from megatron_exact.files import atomic_folder, write_json, write_text
from megatron_exact.model.hf_config import hf_config_of_shape
from megatron_exact.model.hf_folder import (
    CHAT_TEMPLATE,
    CONFIG,
    TOKENIZER_FILES,
    HfFolder,
    carry_document_end,
    copy_files,
    copy_hf_folder,
    has_hf_folder,
    hf_folder_of,
    read_hf_folder,
)
from megatron_exact.model.megatron_flags import (
    SWITCHES,
    flag_of,
    megatron_arguments_of,
    megatron_flags,
    shape_of_megatron_arguments,
)
from megatron_exact.model.presets import matching_preset, preset
from megatron_exact.model.shapes import ModelShape, compare_shapes
from megatron_exact.training.arguments import flag_value, has_flag


@dataclass(frozen=True, kw_only=True)
class JobModel:
    """What is known about a job's model before Megatron is imported."""

    shape: ModelShape | None
    """None: the user's flags alone describe it."""
    source: str
    """Where the shape comes from, for messages."""
    folder: HfFolder | None
    """`hf/` of the checkpoint that the job loads, if it has one."""

    @property
    def description(self) -> str | None:
        """One line for the log; None if nothing but the flags is known."""
        if self.shape is None:
            return None
        name = matching_preset(self.shape)
        return f"the model is that of {self.source}" + (f" ({name})" if name and self.folder else "")

    def flags(self, argv: Sequence[str]) -> list[str]:
        """The Megatron flags of the shape that the user has not given.

        Args:
            argv: the user's flags.

        Raises:
            ValueError: names every flag that contradicts the shape, or one that Megatron would not read.
        """
        if self.shape is None:
            _check_flags_of_shape(argv)
            return []
        expected = megatron_arguments_of(self.shape)
        wrong = [line for name, value in expected.items() if (line := _contradiction(argv, name, value))]
        if wrong:
            raise ValueError(f"{'; '.join(wrong)}, says {self.source}: drop these flags")
        return megatron_flags(
            self.shape, without=[flag for flag in map(flag_of, expected) if has_flag(argv, flag)]
        )

    def check_arguments(self, args: Any) -> None:
        """Compare the model that Megatron is about to build, whichever flag it comes from.

        Args:
            args: Megatron's validated namespace.

        Raises:
            ValueError: names every field that differs.
        """
        if self.shape is None:
            return
        found = shape_of_megatron_arguments(args)
        window = self.shape.max_position_embeddings  # says nothing about the weights
        lines = compare_shapes(replace(found, max_position_embeddings=window), self.shape)
        if lines:
            raise ValueError(f"the flags describe another model than {self.source}: {'; '.join(lines)}")


def choose_model(preset_name: str | None, load: Path | None, save: str | None) -> JobModel:
    """Decide where the shape comes from.

    Args:
        preset_name: value of `--preset`.
        load: folder that the job loads from (`Start.load`).
        save: folder that the job saves to.

    Raises:
        ValueError: preset and checkpoint, or checkpoint and output folder, disagree.
    """
    named = preset(preset_name) if preset_name is not None else None
    if load is None or not has_hf_folder(load):
        return JobModel(shape=named, source=f"--preset {preset_name}", folder=None)
    folder = read_hf_folder(hf_folder_of(load))
    source = str(folder.path / CONFIG)
    if named is not None and named != folder.shape:
        lines = compare_shapes(folder.shape, named)
        raise ValueError(f"{source} is not --preset {preset_name}: {'; '.join(lines)}")
    if (
        save is not None
        and has_hf_folder(save)
        and read_hf_folder(hf_folder_of(save)).shape != folder.shape
    ):
        raise ValueError(
            f"{hf_folder_of(save)} describes another model than {source}: choose another --save"
        )
    return JobModel(shape=folder.shape, source=source, folder=folder)


def check_against_pack(model: JobModel, manifest: Manifest) -> list[str]:
    """Compare the pack's tokenizer with the model's, its ids with the embedding, its rows with the window.

    Returns:
        What to say where nothing could be compared, or where the rows are longer than the model is used to.

    Raises:
        ValueError: another tokenizer, or ids beyond the embedding.
    """
    if model.shape is None:
        return []
    doubts = []
    if manifest.row_tokens > model.shape.max_position_embeddings:
        doubts.append(
            f"rows of {manifest.row_tokens} tokens are longer than the window of "
            f"{model.shape.max_position_embeddings} that {model.source} promises"
        )
    if manifest.tokenizer is None:
        return [*doubts, "the pack names no tokenizer: whether it is the model's cannot be checked"]
    if manifest.tokenizer.vocab_size > model.shape.vocab_size:
        raise ValueError(
            f"the pack's tokenizer has {manifest.tokenizer.vocab_size} ids but {model.source} has an "
            f"embedding of {model.shape.vocab_size} rows: tokenize the corpus with the model's tokenizer"
        )
    if model.folder is None:
        return doubts
    path = model.folder.path
    if not model.folder.has_tokenizer:
        return [*doubts, f"{path} holds no tokenizer: whether the pack's is the model's cannot be checked"]
    if not made_by(manifest.tokenizer.sha256, path):
        raise ValueError(
            f"the pack was tokenized with {manifest.tokenizer.path} (sha256 "
            f"{manifest.tokenizer.sha256[:12]}...), which is not the tokenizer in {path}: tokenize the "
            "corpus with that one"
        )
    return doubts


def write_hf_folder(model: JobModel, args: Any, manifest: Manifest) -> str | None:
    """Leave `hf/` in the folder of `--save`, so that an export needs that folder alone; an old one stays.

    A model that is tuned on question-answer records takes their template along, in place of any other, and
    every model the token that ends the documents of its corpus (`carry_document_end`).

    Args:
        model: of the job.
        args: Megatron's validated namespace, with our options.
        manifest: of the pack.

    Returns:
        A line to say if the model cannot be exported, else None.
    """
    if args.save is None:
        return None
    if has_hf_folder(args.save):
        _leave_document_end(hf_folder_of(args.save), args.pack, manifest)  # a start may have been killed
        return None
    if model.folder is not None:
        copy_hf_folder(model.folder.path.parent, args.save)
        _leave_template(hf_folder_of(args.save), manifest)
        _leave_document_end(hf_folder_of(args.save), args.pack, manifest)
        return None
    try:
        shape = model.shape or shape_of_megatron_arguments(args)
    except ValueError as error:
        return f"no hf folder is written, this run cannot be exported: {error}"
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    with atomic_folder(hf_folder_of(args.save)) as building:
        write_json(building / CONFIG, hf_config_of_shape(shape, dtype=dtype))
        tokenizer = manifest.tokenizer_path(args.pack)
        if tokenizer is not None and tokenizer.is_dir():
            copy_files(tokenizer, building, TOKENIZER_FILES)
        elif tokenizer is not None and tokenizer.is_file():
            name = f"tokenizer{tokenizer.suffix}"  # .json or .model
            (building / name).write_bytes(tokenizer.read_bytes())
        _leave_document_end(building, args.pack, manifest)
    _leave_template(hf_folder_of(args.save), manifest)
    return None


def _leave_template(folder: Path, manifest: Manifest) -> None:
    if manifest.supervision is not None:
        write_text(folder / CHAT_TEMPLATE, manifest.supervision.template)


def _leave_document_end(folder: Path, pack: str, manifest: Manifest) -> None:
    """Nothing is known of a corpus without a record whose tokenizer has no eos, or is not there."""
    path = manifest.tokenizer_path(pack)
    tokens = manifest.document_tokens
    if path is None or not path.exists():
        path = folder
    if tokens is None:
        eos = eos_of(path)
        if eos is not None:
            carry_document_end(folder, *eos, bos=None)
        return
    first = tokens.prefix_ids[0] if len(tokens.prefix_ids) == 1 else None
    text = None if first is None else token_text(path, first)
    bos = None if first is None or text is None else (first, text)
    carry_document_end(folder, tokens.eod_id, tokens.eod_token, bos)


def _check_flags_of_shape(argv: Sequence[str]) -> None:
    """Refuse flags that would begin a run which they could not resume, because `hf/` of it says otherwise.

    Raises:
        ValueError: the flag and its remedy.
    """
    groups = flag_value(argv, "--num-query-groups")
    if groups is not None and not has_flag(argv, "--group-query-attention"):
        raise ValueError(
            f"--num-query-groups {groups} without --group-query-attention has no effect: add that flag, or "
            "drop this one for as many groups as heads"
        )


def _contradiction(argv: Sequence[str], argument: str, value: Any) -> str | None:
    """What is wrong with the user's flag for an argument, None if it is absent or agrees."""
    flag = flag_of(argument)
    if argument in SWITCHES:
        wrong = has_flag(argv, flag) and value != SWITCHES[argument][1]
        return f"{flag} is given but the model has {argument} {value}" if wrong else None
    text = flag_value(argv, flag)
    if text is None:
        return None
    try:
        agrees = type(value)(text) == value
    except ValueError:
        agrees = False
    return None if agrees else f"{flag} {text} is given but the model has {value}"
