"""Tokenizers for corpora: Hugging Face folders or `tokenizer.json`, and SentencePiece models.

A document becomes the tokens that the tokenizer itself puts at a start (Llama 3: BOS), its text, and one
EOD. Text never becomes a control token: a document that quotes `<|endoftext|>` or `<|fim_prefix|>` is cut
into ordinary pieces, whether the file marks the token special or not (`is_control_token`). The exceptions
are tokens that the model itself makes of text, unknown words and whole pieces that were added to a
vocabulary; they are counted by name (`counted_tokens`).

What travels to worker processes is only the Rust tokenizer as JSON, which loads in well under a second.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.hf_tokenizer import (
    TOKENIZER_FILES,
    HfTokenizer,
    doubt_about_ends,
    is_control_token,
    read_hf_tokenizer,
)
from megatron_exact.data.tokenizer_backends import HuggingFaceBackend, TextEncoder, load_sentencepiece
from megatron_exact.data.tokenizer_identity import content_sha256, tokenizer_sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "TOKENIZER_FILES",
    "CorpusTokenizer",
    "identify_tokenizer",
    "load_tokenizer",
    "tokenizer_sha256",
]


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
    """Of what decides tokens: see `tokenizer_identity`."""
    eod_id: int
    """Id that ends every document."""
    eod_token: str
    """Its text."""
    prefix_ids: tuple[int, ...]
    """Ids that start every document; may be empty."""
    backend: TextEncoder
    """Encodes text without special tokens."""
    unknown_id: int | None = None
    """Id of words that the tokenizer does not know, if it has one."""
    counted_tokens: tuple[tuple[int, str], ...] = ()
    """(id, text) of tokens besides the EOD that a record counts where text becomes one."""

    def identity(self) -> dict[str, Any]:
        """{`path`, `kind`, `vocab_size`, `sha256`}, as corpus records and manifests hold it."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "sha256": self.sha256,
        }

    def special_tokens(self) -> dict[str, Any]:
        """{`prefix_ids`, `eod_id`, `eod_token`}, as corpus records hold it."""
        return {
            "prefix_ids": list(self.prefix_ids),
            "eod_id": self.eod_id,
            "eod_token": self.eod_token,
        }

    @property
    def num_added_tokens(self) -> int:
        """Tokens of every document that are not its text."""
        return len(self.prefix_ids) + 1

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Tokens of whole documents: prefix, text, EOD; int32 [tokens] each."""
        prefix, end = list(self.prefix_ids), [self.eod_id]
        return [np.array(prefix + ids + end, dtype=np.int32) for ids in self.backend.encode_batch(texts)]


def load_tokenizer(
    path: str | Path, *, eod_token: str | None = None, add_bos: bool = True, force_eod: bool = False
) -> CorpusTokenizer:
    """Load a tokenizer from disk; nothing is downloaded and no code of the folder is run.

    Warns, a line each, where the files of a folder, transformers or the model's configs say otherwise.

    Args:
        path: a Hugging Face tokenizer folder, a `tokenizer.json`, or a SentencePiece `.model`.
        eod_token: text of the token that ends documents; None takes the tokenizer's eos.
        add_bos: whether documents start with the tokens that the tokenizer puts there: those of a Hugging
            Face post-processor, and the bos of a SentencePiece model that defines one. (SentencePiece
            leaves that choice to its caller; Llama 2 and Megatron's Llama recipes do put it.)
        force_eod: take an `eod_token` that is an ordinary piece of text, too.

    Raises:
        ValueError: no tokenizer there, no eos and no `eod_token`, or an `eod_token` that is not one token
            or, unless forced, one that is neither added nor special.
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
    """{`path`, `kind`, `vocab_size`, `sha256`} of a tokenizer, whether or not it can end documents.

    Args:
        path: see `load_tokenizer`.

    Raises:
        ValueError: no tokenizer there.
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
    path = Path(os.path.abspath(path))  # links keep their own names, which tell the kind
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
    """The library leaves the spelling of special tokens as text when asked to, and that of others never."""
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
    """Id and text of the symbols that a SentencePiece model always takes whole from text."""
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
    """An ordinary piece of text ends documents only if that is forced."""
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
            "would hold two EOD: use --no-bos, or another --eod-token"
        )
    return prefix


def _unknown_token(path: Path, token: str) -> str:
    return (
        f"{token!r} is not one token of tokenizer {path}: choose another --eod-token, one of its vocabulary"
    )
