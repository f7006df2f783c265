"""`CHECKPOINT/hf/`: the files of a Hugging Face model other than its weights.

A checkpoint folder made by `tools/import_hf.py`, and the folder of every run that started from one,
contains

    hf/config.json                  unchanged
    hf/generation_config.json       if there was one
    hf/tokenizer.json, ...          the tokenizer files that were there, licence files
    hf/megatron_exact_import.json   shape, dtype and source of the weights

so that an export needs that folder alone. Code files are never copied, and nothing here is executed.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact import json_input
from megatron_exact.files import atomic_folder, fsync_path, write_json
from megatron_exact.model.families import shape_of_hf_config
from megatron_exact.model.shapes import ModelShape
from megatron_exact.tokenizer_files import CHAT_TEMPLATE_FILES, TOKENIZER_CONFIG, TOKENIZER_FILES

HF_FOLDER = "hf"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
IMPORT_RECORD = "megatron_exact_import.json"
COPIED_TOKENIZER_FILES = (*TOKENIZER_FILES, *CHAT_TEMPLATE_FILES)
LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
CARRIED_FILES = (CONFIG, GENERATION_CONFIG, *COPIED_TOKENIZER_FILES, *LICENCE_FILES)
"""Files of a Hugging Face folder that travel with the weights; everything else stays behind."""
LARGEST_JSON_BYTES = 4 << 20
MODEL_CARD = "README.md"
LARGEST_CARD_HEAD = 64 << 10
"""Characters of a card that are read: its front matter is at the top."""


@dataclass(frozen=True, kw_only=True)
class HfFolder:
    """The files of a Hugging Face model without its weights."""

    path: Path
    """The folder itself."""
    config: dict[str, Any]
    """Content of `config.json`."""
    shape: ModelShape
    """Shape that the config describes."""
    files: tuple[str, ...]
    """Names of the files that travel with the weights, in alphabetical order."""
    import_record: dict[str, Any] | None
    """Content of megatron_exact_import.json; None in a folder that was not imported."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether one of the files contains a vocabulary."""
        vocabularies = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}
        return bool(vocabularies & set(self.files))


def hf_folder_of(checkpoint: str | Path) -> Path:
    """Return where the Hugging Face files of a checkpoint folder lie, whether or not they exist."""
    return Path(checkpoint) / HF_FOLDER


def has_hf_folder(checkpoint: str | Path) -> bool:
    """Return whether a checkpoint folder has the files of its Hugging Face model."""
    return (hf_folder_of(checkpoint) / CONFIG).is_file()


def read_hf_folder(folder: str | Path) -> HfFolder:
    """Read `config.json` and list the files beside it.

    Args:
        folder: `CHECKPOINT/hf`, or any Hugging Face model folder.

    Raises:
        ValueError: no folder, no config, or a config that is not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: a checkpoint made by megatron-exact import-hf, and a run that "
            "started from one, has it"
        )
    config_file = folder / CONFIG
    if not config_file.is_file():
        raise ValueError(f"{folder} contains no {CONFIG}: copy the model's own {CONFIG} there")
    files = tuple(sorted(name for name in CARRIED_FILES if (folder / name).is_file()))
    for name in files:
        file_inside(folder, name)
    config = read_json_object(config_file)
    record = folder / IMPORT_RECORD
    return HfFolder(
        path=folder,
        config=config,
        shape=shape_of_hf_config(config, str(config_file)),
        files=files,
        import_record=read_json_object(record) if record.is_file() else None,
    )


def file_inside(folder: Path, name: str) -> Path:
    """Return a file of a folder that may come from an untrusted source, checked to lie inside it.

    A link may lead to another place in the folder, or from a snapshot of the Hub's cache to its blobs
    (CACHE/models--X/snapshots/REVISION/NAME -> ../../blobs/HASH). Any other link could bring a private file
    of this machine into a model that is published later.

    Raises:
        ValueError: a link that leads elsewhere.
    """
    file, root = (folder / name).resolve(), folder.resolve()
    is_cached = root.parent.name == "snapshots" and file.is_relative_to(root.parent.parent / "blobs")
    if not file.is_relative_to(root) and not is_cached:
        raise ValueError(
            f"{folder / name} is a link to {str(file)!r}, outside the folder: copy the file itself there"
        )
    return folder / name


def copy_hf_folder(
    source: str | Path, target: str | Path, config: dict[str, Any] | None = None
) -> Path | None:
    """Copy `source/hf` to `target/hf`, whole or not at all; an existing copy is kept.

    Args:
        source: checkpoint folder that a run starts from.
        target: folder that the run saves to; made if missing.
        config: content of the copy's `config.json`; None for that of the source.

    Returns:
        The copy, None if the source has no `hf` folder.

    Raises:
        ValueError: the target contains the files of another model.
    """
    if not has_hf_folder(source):
        return None
    origin, copy = hf_folder_of(source), hf_folder_of(target)
    if origin.resolve() == copy.resolve():
        return copy
    if has_hf_folder(target):
        if read_json_object(origin / CONFIG) != read_json_object(copy / CONFIG):
            raise ValueError(
                f"{copy / CONFIG} differs from {origin / CONFIG}: {target} belongs to another model; "
                "choose another output folder"
            )
        return copy
    with atomic_folder(copy) as building:
        copy_files(origin, building, (*CARRIED_FILES, IMPORT_RECORD))
        if config is not None:
            write_json(building / CONFIG, config)
    return copy


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copy the contents of those named files that exist; return their names."""
    copied = [name for name in names if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, target / name)
        fsync_path(target / name)
    return copied


def carry_document_end(folder: Path, eod_id: int, eod_token: str, bos: tuple[int, str] | None) -> None:
    """Add the token that ends the documents of a corpus to every file that names ends of texts.

    Generation stops at the ids of `generation_config.json` (else `config.json`); evaluation asks the
    tokenizer. End tokens that the model already has are kept. A tokenizer without `tokenizer_config.json`
    gets one: without it transformers knows neither the eos nor how to load the file.

    Args:
        folder: `CHECKPOINT/hf` of a new run.
        eod_id: id of the document end.
        eod_token: its text.
        bos: id and text of what documents start with; None where they start with their text.
    """
    bos_id = None if bos is None else bos[0]
    for name in (CONFIG, GENERATION_CONFIG):
        path = folder / name
        content = read_json_object(path) if path.is_file() else {}
        known = content.get("eos_token_id")
        ends = [] if known is None else known if isinstance(known, list) else [known]
        if eod_id not in ends:
            content["eos_token_id"] = [eod_id, *ends] if ends else eod_id
            content.setdefault("bos_token_id", bos_id)  # the default of transformers is 1
            write_json(path, content)
    named = {"eos_token": eod_token, **({} if bos is None else {"bos_token": bos[1]})}
    config = folder / TOKENIZER_CONFIG
    if config.is_file():
        for path in (config, folder / "special_tokens_map.json"):
            content = read_json_object(path) if path.is_file() else {}
            token = content.get("eos_token")
            if content and (token.get("content") if isinstance(token, dict) else token) != eod_token:
                write_json(path, {**content, "eos_token": eod_token})
    elif (folder / "tokenizer.json").is_file():
        write_json(config, {"tokenizer_class": "PreTrainedTokenizerFast", **named})
    elif (folder / "tokenizer.model").is_file():
        flags = {"add_bos_token": bos is not None, "add_eos_token": False}
        write_json(config, {"tokenizer_class": "LlamaTokenizer", **named, **flags})


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the object in a small JSON file of a Hugging Face folder.

    Raises:
        ValueError: see `json_input.read_json`.
    """
    return json_input.read_json_object(
        path, "copy it again", largest_bytes=LARGEST_JSON_BYTES, wide_integers=True
    )


def stated_licence(folder: str | Path) -> str | None:
    """Return `license` (`license_name` where that says `other`) of the card's front matter, or None.

    The front matter is not parsed as YAML: only a line such as `license: apache-2.0` is looked for.
    """
    card = Path(folder) / MODEL_CARD
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(LARGEST_CARD_HEAD)
    matter = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, flags=re.DOTALL)
    if matter is None:
        return None
    values = dict(
        re.findall(r"^(license|license_name):[ \t]*[\"']?([^\s\"'#]+)", matter[1], flags=re.MULTILINE)
    )
    licence = values.get("license")
    return values.get("license_name", licence) if licence == "other" else licence
