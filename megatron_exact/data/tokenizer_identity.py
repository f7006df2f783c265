"""Which tokenizer made a corpus: a hash of what decides tokens, and when two of them are one.

`sha256` of a Hugging Face tokenizer is over the model, normalizer, pre-tokenizer, added tokens and what is
put before a text, in canonical JSON. Chat templates, truncation, padding, decoders, key order, spelling of
merges and the number of files make no difference, so a folder and the `tokenizer.json` in it are one. Of a
SentencePiece model it is over the file. How documents start and end in a corpus is no part of it: a corpus
record has that beside it (`special_tokens`), and the sources of a pack must agree on both.

Corpora and packs made before had the hash of the tokenizer's files. Such a hash is still known by the files
that lie there (`made_by`), so nothing has to be made again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_exact.data.hf_tokenizer import (
    TOKENIZER_FILES,
    HfTokenizer,
    is_control_token,
    read_hf_tokenizer,
)
from megatron_exact.json_input import parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def tokenizer_sha256(path: str | Path) -> str:
    """Hex sha256 of what decides the tokens of a tokenizer; of its files where it cannot be read.

    Args:
        path: a Hugging Face folder, a `tokenizer.json` or a SentencePiece `.model`.
    """
    path = Path(path)
    if path.is_file() and path.suffix != ".json":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return _sha256_of_files(path, _stamp(path))


@functools.lru_cache(maxsize=16)
def _sha256_of_files(path: Path, stamp: tuple[tuple[str, int, int], ...]) -> str:
    """`stamp` is what makes a changed tokenizer another key."""
    try:
        return content_sha256(read_hf_tokenizer(path, compare=False))
    except ValueError:
        return files_sha256(path)


def content_sha256(tokenizer: HfTokenizer) -> str:
    """The same for a Hugging Face tokenizer that was read already."""
    content = parse_json(tokenizer.rust.to_str(), "the tokenizer", "copy it again")
    model = content["model"]
    if "merges" in model:  # "a b" before tokenizers 0.20, ["a", "b"] since
        model["merges"] = [one.split(" ") if isinstance(one, str) else one for one in model["merges"]]
    decisive = {
        "model": _without_defaults(model),
        "normalizer": _without_defaults(content.get("normalizer")),
        "pre_tokenizer": _without_defaults(content.get("pre_tokenizer")),
        "added_tokens": _added_tokens(tokenizer.rust),
        "prefix_ids": list(tokenizer.prefix_ids),
    }
    text = json.dumps(decisive, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_defaults(value: Any) -> Any:
    """Settings that are off go, because other versions of the library do not write them."""
    if isinstance(value, list):
        return [_without_defaults(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: one if key in ("vocab", "merges") else _without_defaults(one)
        for key, one in value.items()
        if not (one is None or one is False or one == "") and key != "trim_offsets"
    }


def _added_tokens(rust: Tokenizer) -> list[list[Any]]:
    """Id and text of each; how it is matched counts only where text can become it."""
    found: list[list[Any]] = []
    for token_id, token in sorted(rust.get_added_tokens_decoder().items()):
        if is_control_token(token.content, special=token.special):
            found.append([token_id, token.content])
        else:
            matching = [token.single_word, token.lstrip, token.rstrip, token.normalized]
            found.append([token_id, token.content, *matching])
    return found


def files_sha256(path: str | Path) -> str:
    """The hash of older records: of a file's bytes, or of name, size and bytes of a folder's files."""
    path = Path(path)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        file = path / name
        if file.is_file():
            content = file.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def made_by(sha256: str, path: str | Path) -> bool:
    """Whether a recorded hash is that of the tokenizer at `path`, of today's kind or of the one before.

    Args:
        sha256: of a corpus record or a manifest.
        path: a folder or a file; a folder is also what its `tokenizer.json` or a `.model` in it is.
    """
    path = Path(path)
    if path.is_dir():
        names = [name for name in TOKENIZER_FILES if name.endswith((".model", "tokenizer.json"))]
        inside = [path / name for name in names if (path / name).is_file()]
    else:
        inside = []
    if any(sha256 == files_sha256(one) for one in (path, *inside)):
        return True
    return sha256 == tokenizer_sha256(path)


def same_tokenizer(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two recorded identities ({`path`, `kind`, `sha256`}, absolute paths) mean one tokenizer.

    Equal hashes do. Of unequal ones, one may be of the kind before: then the tokenizer that lies at either
    path decides, if it is still the one that was recorded.
    """
    if one["sha256"] == other["sha256"]:
        return True
    if one["kind"] != other["kind"]:
        return False
    for here, there in ((one, other), (other, one)):
        path = Path(here["path"])
        if path.exists() and made_by(here["sha256"], path) and made_by(there["sha256"], path):
            return True
    resolved = [current_sha256(identity) for identity in (one, other)]
    return resolved[0] is not None and resolved[0] == resolved[1]


def current_sha256(identity: Mapping[str, Any]) -> str | None:
    """Today's hash of a recorded tokenizer; None if the tokenizer at its path is gone or another one."""
    path = Path(identity["path"])
    if path.exists() and made_by(identity["sha256"], path):
        return tokenizer_sha256(path)
    return None


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the files that a tokenizer is read from."""
    files = [path / name for name in TOKENIZER_FILES] if path.is_dir() else [path]
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)
