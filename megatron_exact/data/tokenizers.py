"""Tokenizers of corpora: opening one, its special tokens, and the identity that binds it to a corpus.

A document becomes the tokens that the tokenizer itself puts at a start (Llama 3: BOS), its text, and one
EOD. Text never becomes a control token: a document that quotes `<|endoftext|>` or `<|fim_prefix|>` is split
into ordinary pieces, whether the file marks the token special or not (`is_control_token`). The exceptions
are tokens into which the tokenizer itself turns text: unknown words, and whole pieces that were added to a
vocabulary. They are counted by name (`counted_tokens`). Worker processes receive only the Rust tokenizer as
JSON, which loads in well under a second.

The identity of a Hugging Face tokenizer is a hash of everything that determines tokens: the model,
normalizer, pre-tokenizer, added tokens and what is put before a text, in canonical JSON. Chat templates,
truncation, padding, decoders, key order, spelling of merges and the number of files do not change it, so a
folder and the `tokenizer.json` in it have one identity. For a SentencePiece model it is the hash of the
file. How documents start and end in a corpus is not part of it: a corpus record states that separately
(`special_tokens`), and the sources of a pack must agree on both.

Older corpora and packs have the hash of the tokenizer's files. Such a hash is still recognized from these
files (`made_by`), so that nothing has to be made again.
"""

from __future__ import annotations

import array
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.hf_tokenizer import (
    HfTokenizer,
    HuggingFaceBackend,
    TextEncoder,
    doubt_about_ends,
    is_control_token,
    load_sentencepiece,
    read_hf_tokenizer,
)
from megatron_exact.files import sha256_file
from megatron_exact.tokenizer_files import TOKENIZER_FILES

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CorpusTokenizer:
    """A tokenizer with the rule for whole documents. It can be pickled: workers get a copy.

    Made by `load_tokenizer`.
    """

    path: Path
    """Absolute path of the folder or file."""
    kind: Literal["huggingface", "sentencepiece"]
    """Which library encodes."""
    vocab_size: int
    """Largest id + 1, added tokens included."""
    sha256: str
    """Hash of everything that determines tokens, see the head of this file."""
    eod_id: int
    """Id that ends every document."""
    eod_token: str
    """Text of the token that ends every document."""
    prefix_ids: tuple[int, ...]
    """Ids that start every document; may be empty."""
    backend: TextEncoder
    """Encoder of text, without special tokens."""
    unknown_id: int | None = None
    """Id of words that the tokenizer does not know, if it has one."""
    counted_tokens: tuple[tuple[int, str], ...] = ()
    """(id, text) of tokens other than the EOD whose occurrences in text a record counts."""

    def identity(self) -> dict[str, Any]:
        """Return {`path`, `kind`, `vocab_size`, `sha256`}, as in corpus records and manifests."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "sha256": self.sha256,
        }

    def special_tokens(self) -> dict[str, Any]:
        """Return {`prefix_ids`, `eod_id`, `eod_token`}, as in corpus records."""
        return {
            "prefix_ids": list(self.prefix_ids),
            "eod_id": self.eod_id,
            "eod_token": self.eod_token,
        }

    @property
    def num_added_tokens(self) -> int:
        """Number of tokens of every document that are not from its text."""
        return len(self.prefix_ids) + 1

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Return the tokens of whole documents: prefix, text, EOD; int32 [tokens] each."""
        flat, lengths = self.documents_of(self.backend.encode_batch(texts))
        ends = np.cumsum(lengths)
        return [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def documents_of(
        self, encoded: Sequence[list[int] | NDArray[np.uint32]]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Make documents of encoded texts: prefix, text and EOD of each.

        Args:
            encoded: ids of each text.

        Returns:
            All documents back to back, int32 [tokens], and their lengths, int32 [documents].
        """
        lengths = np.array([len(ids) for ids in encoded], np.int32) + np.int32(self.num_added_tokens)
        flat = np.empty(int(lengths.sum(dtype=np.int64)), np.int32)
        start, before = 0, len(self.prefix_ids)
        for ids, end in zip(encoded, np.cumsum(lengths, dtype=np.int64).tolist(), strict=True):
            flat[start : start + before] = self.prefix_ids
            # array.array reads a list three times as fast as numpy
            flat[start + before : end - 1] = array.array("i", ids) if isinstance(ids, list) else ids
            flat[end - 1] = self.eod_id
            start = end
        return flat, lengths


def load_tokenizer(
    path: str | Path, *, eod_token: str | None = None, add_bos: bool = True, force_eod: bool = False
) -> CorpusTokenizer:
    """Load a tokenizer from disk; nothing is downloaded and no code of the folder is run.

    Each contradiction between the files of a folder, transformers and the model's configs gives a warning.

    Args:
        path: a Hugging Face tokenizer folder, a `tokenizer.json`, or a SentencePiece `.model`.
        eod_token: text of the token that ends documents; None takes the tokenizer's eos.
        add_bos: whether documents start with the tokens that the tokenizer puts there: those of a Hugging
            Face post-processor, and the bos of a SentencePiece model that defines one. (SentencePiece
            leaves that choice to its caller; Llama 2 and Megatron's Llama recipes do put it.)
        force_eod: also accept an `eod_token` that is an ordinary piece of text.

    Raises:
        ValueError: a missing tokenizer, neither eos nor `eod_token`, or an `eod_token` that is not one
            token or, unless forced, one that is neither added nor special.
    """
    path = _existing(path)
    if _kind(path) == "sentencepiece":
        return _from_sentencepiece(path, eod_token=eod_token, add_bos=add_bos, force_eod=force_eod)
    read = read_hf_tokenizer(path)
    tokenizer = _from_huggingface(read, eod_token=eod_token, add_bos=add_bos, force_eod=force_eod)
    folder = path if path.is_dir() else path.parent
    why = "the tokenizer's eos" if eod_token is None else "as --eod-token says"
    tokens = {number: token for token, number in read.rust.get_vocab(with_added_tokens=True).items()}
    ends = doubt_about_ends(folder, tokenizer.eod_id, tokenizer.eod_token, why, tokens)
    for line in (*read.doubts, *ends):
        warnings.warn(line, stacklevel=2)
    return tokenizer


def identify_tokenizer(path: str | Path) -> dict[str, Any]:
    """Return {`path`, `kind`, `vocab_size`, `sha256`} of a tokenizer, whether or not it has an eos.

    Args:
        path: see `load_tokenizer`.

    Raises:
        ValueError: a missing tokenizer.
    """
    path = _existing(path)
    kind = _kind(path)
    if kind == "sentencepiece":
        vocab_size = load_sentencepiece(path).processor.get_piece_size()
        sha256 = tokenizer_sha256(path)
    else:
        read = read_hf_tokenizer(path, compare=False)
        vocab_size, sha256 = _vocab_size(read.rust), content_sha256(read)
    return {"path": str(path), "kind": kind, "vocab_size": vocab_size, "sha256": sha256}


def _existing(path: str | Path) -> Path:
    path = Path(os.path.abspath(path))  # links keep their own names, which show the kind
    if not path.exists():
        raise ValueError(
            f"tokenizer {path} does not exist: give a Hugging Face folder, a tokenizer.json or a "
            "SentencePiece .model"
        )
    return path


def _kind(path: Path) -> Literal["huggingface", "sentencepiece"]:
    if path.is_dir() or path.suffix == ".json":
        return "huggingface"
    if path.suffix == ".model":
        return "sentencepiece"
    raise ValueError(
        f"tokenizer {path} is neither a folder nor a .json nor a .model file: "
        "give a Hugging Face folder, a tokenizer.json or a SentencePiece .model"
    )


def _vocab_size(rust: Tokenizer) -> int:
    return max(rust.get_vocab(with_added_tokens=True).values()) + 1


def _from_huggingface(
    read: HfTokenizer, *, eod_token: str | None, add_bos: bool, force_eod: bool
) -> CorpusTokenizer:
    path, rust = read.path, read.rust
    token = _choose_eod(path, read.eos_token, eod_token)
    eod_id = rust.token_to_id(token)
    if eod_id is None:
        raise ValueError(_unknown_token(path, token))
    added = dict(rust.get_added_tokens_decoder())
    if eod_token is not None and eod_token != read.eos_token and not force_eod:
        _require_control(path, token, eod_id, {one.content for one in added.values()})
    sha256 = content_sha256(read)
    _mark_control_tokens_special(rust)
    unknown = getattr(rust.model, "unk_token", None)
    unknown_id = rust.token_to_id(unknown) if unknown else None
    counted = {number: one.content for number, one in added.items() if one.content.strip(" \t\r\n▁")}
    if unknown_id is not None:
        counted[unknown_id] = str(unknown)
    counted.pop(eod_id, None)
    return CorpusTokenizer(
        path=path,
        kind="huggingface",
        vocab_size=_vocab_size(rust),
        sha256=sha256,
        eod_id=eod_id,
        eod_token=token,
        prefix_ids=_choose_prefix(path, read.prefix_ids, eod_id, add_bos=add_bos),
        backend=HuggingFaceBackend(rust),
        unknown_id=unknown_id,
        counted_tokens=tuple(sorted(counted.items())),
    )


def _mark_control_tokens_special(rust: Tokenizer) -> None:
    """Mark control tokens special: only for special tokens can the library leave their spelling as text."""
    from tokenizers import AddedToken

    rust.add_special_tokens(
        [
            AddedToken(token.content, special=True, normalized=False)
            for token in rust.get_added_tokens_decoder().values()
            if not token.special and is_control_token(token.content, special=False)
        ]
    )


def _from_sentencepiece(
    path: Path, *, eod_token: str | None, add_bos: bool, force_eod: bool
) -> CorpusTokenizer:
    backend = load_sentencepiece(path)
    processor = backend.processor
    eos_id = processor.eos_id()
    eos_token = processor.id_to_piece(eos_id) if eos_id >= 0 else None
    token = _choose_eod(path, eos_token, eod_token)
    eod_id = processor.piece_to_id(token)
    if processor.id_to_piece(eod_id) != token:  # unknown pieces map to unk
        raise ValueError(_unknown_token(path, token))
    size = processor.get_piece_size()
    user_defined = _user_defined_pieces(backend.model)
    if token != eos_token and not force_eod:
        control = {processor.id_to_piece(i) for i in range(size) if processor.is_control(i)}
        _require_control(path, token, eod_id, control | set(user_defined.values()))
    bos_id, unknown_id = processor.bos_id(), processor.unk_id()
    counted = {number: piece for number, piece in user_defined.items() if piece.strip("▁ \n")}
    if unknown_id >= 0:
        counted[unknown_id] = processor.id_to_piece(unknown_id)
    counted.pop(eod_id, None)
    return CorpusTokenizer(
        path=path,
        kind="sentencepiece",
        vocab_size=size,
        sha256=tokenizer_sha256(path),
        eod_id=eod_id,
        eod_token=token,
        prefix_ids=_choose_prefix(path, (bos_id,) if bos_id >= 0 else (), eod_id, add_bos=add_bos),
        backend=backend,
        unknown_id=unknown_id if unknown_id >= 0 else None,
        counted_tokens=tuple(sorted(counted.items())),
    )


def _user_defined_pieces(model: bytes) -> dict[int, str]:
    """Return id and text of the symbols that a SentencePiece model always takes whole from text."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:  # no protobuf: they count as ordinary pieces
        return {}
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    return {number: piece.piece for number, piece in enumerate(proto.pieces) if piece.type == kind}


def _choose_eod(path: Path, eos_token: str | None, eod_token: str | None) -> str:
    token = eos_token if eod_token is None else eod_token
    if not token:
        raise ValueError(
            f"tokenizer {path} has no eos token to end documents with: name one by --eod-token"
        )
    return token


def _require_control(path: Path, token: str, eod_id: int, control: Collection[str]) -> None:
    """Check that the EOD is a control token; an ordinary piece of text ends documents only if forced."""
    if token in control:
        return
    likely = [
        one for one in sorted(control) if "end" in one.lower() or "eos" in one.lower() or one == "</s>"
    ]
    named = ", ".join(likely[:4] or sorted(control)[:4]) or "none"
    raise ValueError(
        f"{token!r} is an ordinary piece of text of tokenizer {path} (id {eod_id}), so every document "
        f"would end in a word: give an added or special token as --eod-token (there are {len(control)}, "
        f"such as {named}), or add --force-eod-token if the piece is meant"
    )


def _choose_prefix(path: Path, prefix: tuple[int, ...], eod_id: int, *, add_bos: bool) -> tuple[int, ...]:
    if not add_bos:
        return ()
    if eod_id in prefix:
        raise ValueError(
            f"tokenizer {path} starts documents with the same token {eod_id} that ends them, so a document "
            "would contain two EODs: use --no-bos, or another --eod-token"
        )
    return prefix


def _unknown_token(path: Path, token: str) -> str:
    return (
        f"{token!r} is not one token of tokenizer {path}: choose another --eod-token, one of its vocabulary"
    )


def tokenizer_sha256(path: str | Path) -> str:
    """Return the identity of a tokenizer, hex sha256; that of its files where it cannot be read.

    Args:
        path: a Hugging Face folder, a `tokenizer.json` or a SentencePiece `.model`.
    """
    path = Path(path)
    if path.is_file() and path.suffix != ".json":
        return sha256_file(path)
    return _sha256_of_files(path, _stamp(path))


@functools.lru_cache(maxsize=16)
def _sha256_of_files(path: Path, stamp: tuple[tuple[str, int, int], ...]) -> str:
    """Hash a tokenizer's files; `stamp` changes with them, so that the cache does not return old hashes."""
    try:
        return content_sha256(read_hf_tokenizer(path, compare=False))
    except ValueError:
        return files_sha256(path)


def content_sha256(tokenizer: HfTokenizer) -> str:
    """Hash what decides the tokens of a Hugging Face tokenizer that was read already."""
    content = json.loads(tokenizer.rust.to_str())  # written by the library, which has read it already
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
    """Drop settings that are off, because other versions of the library do not write them."""
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
    """Return id and text of added tokens; how they match matters only where text can become one."""
    found: list[list[Any]] = []
    for token_id, token in sorted(rust.get_added_tokens_decoder().items()):
        if is_control_token(token.content, special=token.special):
            found.append([token_id, token.content])
        else:
            matching = [token.single_word, token.lstrip, token.rstrip, token.normalized]
            found.append([token_id, token.content, *matching])
    return found


def files_sha256(path: str | Path) -> str:
    """Return the hash of older records, over a file's bytes, or name, size and bytes of a folder's
    files."""
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        file = path / name
        if file.is_file():
            content = file.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def made_by(sha256: str, path: str | Path) -> bool:
    """Return whether a recorded hash, of the present or the older kind, is that of the tokenizer at `path`.

    Args:
        sha256: hash in a corpus record or a manifest.
        path: a folder or a file; a folder has the identity of its `tokenizer.json` or `.model` too.
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
    """Return whether two recorded identities ({`path`, `kind`, `sha256`}) mean the same tokenizer.

    Paths are absolute. Equal hashes mean one tokenizer. Of unequal hashes one may be of the older kind:
    then the tokenizer at either path decides, if it is still the recorded one.
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
    """Return the present kind of hash of a recorded tokenizer; None if it is missing or another one."""
    path = Path(identity["path"])
    if path.exists() and made_by(identity["sha256"], path):
        return tokenizer_sha256(path)
    return None


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Return name, size and time of the files from which a tokenizer is read."""
    files = [path / name for name in TOKENIZER_FILES] if path.is_dir() else [path]
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)
