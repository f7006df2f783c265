"""Tokenizers for corpora: Hugging Face folders or `tokenizer.json`, and SentencePiece models.

A document becomes the tokens that the tokenizer itself puts at a start (Llama 3: BOS), its text, and one
EOD. Text never becomes a control token: a document that quotes `<|endoftext|>` is cut into ordinary pieces.

Hugging Face's own loader decides what a folder means (it imports torch, seconds, once); what travels to
worker processes is only its Rust tokenizer as JSON, which loads in well under a second.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.tokenizer_backends import HuggingFaceBackend, SentencePieceBackend, TextEncoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Every file of a tokenizer folder that can change a token; chat templates cannot.
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
PROBE = "a"


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
    """Over names and bytes of the tokenizer's files, or over the bytes of the single file."""
    eod_id: int
    """Id that ends every document."""
    eod_token: str
    """Its text."""
    prefix_ids: tuple[int, ...]
    """Ids that start every document; may be empty."""
    backend: TextEncoder
    """Encodes text without special tokens."""

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
    path: str | Path, *, eod_token: str | None = None, add_bos: bool = True
) -> CorpusTokenizer:
    """Load a tokenizer from disk; nothing is downloaded and no code of the folder is run.

    Args:
        path: a Hugging Face tokenizer folder, a `tokenizer.json`, or a SentencePiece `.model`.
        eod_token: text of the token that ends documents; None takes the tokenizer's eos.
        add_bos: whether documents start with the tokens that the tokenizer puts there: those of a Hugging
            Face post-processor, and the bos of a SentencePiece model that defines one. (SentencePiece
            leaves that choice to its caller; Llama 2 and Megatron's Llama recipes do put it.)

    Raises:
        ValueError: no tokenizer there, no eos and no `eod_token`, or an `eod_token` that is not one token.
    """
    path = _existing(path)
    kind = _kind(path)
    if kind == "sentencepiece":
        return _from_sentencepiece(path, eod_token=eod_token, add_bos=add_bos)
    rust, eos_token = _load_folder(path) if path.is_dir() else (_load_json(path), None)
    return _from_huggingface(path, rust, eos_token, eod_token=eod_token, add_bos=add_bos)


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
        vocab_size = _load_sentencepiece(path).processor.get_piece_size()
    else:
        vocab_size = _vocab_size(_load_folder(path)[0] if path.is_dir() else _load_json(path))
    return {
        "path": str(path),
        "kind": kind,
        "vocab_size": vocab_size,
        "sha256": tokenizer_sha256(path),
    }


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


def _load_sentencepiece(path: Path) -> SentencePieceBackend:
    model = path.read_bytes()
    try:
        backend = SentencePieceBackend(model) if model else None
    except RuntimeError as error:
        raise ValueError(f"{path} is no SentencePiece model ({error})") from error
    if backend is None or backend.processor.get_piece_size() == 0:
        raise ValueError(f"{path} is no SentencePiece model: it holds no piece, copy or train it again")
    return backend


def tokenizer_sha256(path: str | Path) -> str:
    """Hex sha256 of a tokenizer's content: a file's bytes, or name, size and bytes of a folder's files."""
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


def _load_json(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is no tokenizer.json of the tokenizers library ({error})") from error


def _load_folder(path: Path) -> tuple[Tokenizer, str | None]:
    """The Rust tokenizer of a folder and its eos token."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{path} holds no tokenizer: a tokenizer.json or tokenizer.model is needed there")
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        if not any((path / name).is_file() for name in ("tokenizer_config.json", "config.json")):
            loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
        else:
            loaded = transformers.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # many types, from several libraries
        raise ValueError(
            f"{path} could not be loaded as a Hugging Face tokenizer ({type(error).__name__}: {error}); "
            "a SentencePiece model without Hugging Face files is given as the .model file itself"
        ) from error
    rust = getattr(loaded, "backend_tokenizer", None)
    if rust is None:
        raise ValueError(
            f"{path} is a {type(loaded).__name__} without a tokenizer.json: convert it to a fast tokenizer"
        )
    return rust, loaded.eos_token


def _from_huggingface(
    path: Path, rust: Tokenizer, eos_token: str | None, *, eod_token: str | None, add_bos: bool
) -> CorpusTokenizer:
    token = _choose_eod(path, eos_token, eod_token)
    eod_id = rust.token_to_id(token)
    if eod_id is None:
        raise ValueError(_unknown_token(path, token))
    backend = HuggingFaceBackend(rust)
    # The mask marks what the post-processor added. What it adds at the end, often an eos, is left out:
    # the EOD is ours.
    probe = rust.encode(PROBE, add_special_tokens=True)
    prefix: list[int] = []
    for token_id, is_added in zip(probe.ids, probe.special_tokens_mask, strict=True):
        if not is_added:
            break
        prefix.append(token_id)
    return CorpusTokenizer(
        path=path,
        kind="huggingface",
        vocab_size=_vocab_size(rust),
        sha256=tokenizer_sha256(path),
        eod_id=eod_id,
        eod_token=token,
        prefix_ids=_choose_prefix(path, tuple(prefix), eod_id, add_bos=add_bos),
        backend=backend,
    )


def _from_sentencepiece(path: Path, *, eod_token: str | None, add_bos: bool) -> CorpusTokenizer:
    backend = _load_sentencepiece(path)
    processor = backend.processor
    eos_id = processor.eos_id()
    token = _choose_eod(path, processor.id_to_piece(eos_id) if eos_id >= 0 else None, eod_token)
    eod_id = processor.piece_to_id(token)
    if processor.id_to_piece(eod_id) != token:  # unknown pieces map to unk
        raise ValueError(_unknown_token(path, token))
    bos_id = processor.bos_id()
    return CorpusTokenizer(
        path=path,
        kind="sentencepiece",
        vocab_size=processor.get_piece_size(),
        sha256=tokenizer_sha256(path),
        eod_id=eod_id,
        eod_token=token,
        prefix_ids=_choose_prefix(path, (bos_id,) if bos_id >= 0 else (), eod_id, add_bos=add_bos),
        backend=backend,
    )


def _choose_eod(path: Path, eos_token: str | None, eod_token: str | None) -> str:
    token = eos_token if eod_token is None else eod_token
    if not token:
        raise ValueError(
            f"tokenizer {path} has no eos token to end documents with: name one by --eod-token"
        )
    return token


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
