"""The two tokenizer libraries behind one method: text to ids, without special tokens.

Both pickle as their own file format, so a worker process gets a tokenizer without reading a folder again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


class TextEncoder(Protocol):
    """What a `CorpusTokenizer` needs."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; nothing is added, cut or read as a control token."""
        ...

    def text_of(self, text: str, token_id: int) -> str | None:
        """The part of a text that became the first token of this id; None where none did."""
        ...


class HuggingFaceBackend:
    """A Rust tokenizer that encodes text as text only, whole, and pickles as JSON.

    Args:
        tokenizer: changed in place; without truncation or padding, its control tokens marked special.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # text that spells a special token stays text

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def text_of(self, text: str, token_id: int) -> str | None:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        for found, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if found == token_id:
                return text[start:stop]
        return None

    def __getstate__(self) -> str:
        return self._tokenizer.to_str()

    def __setstate__(self, state: str) -> None:
        from tokenizers import Tokenizer

        self.__init__(Tokenizer.from_str(state))  # type: ignore[misc]


class SentencePieceBackend:
    """A SentencePiece model; by its own rule text never becomes a control symbol.

    Attributes:
        model: bytes of the `.model` file.
        processor: of the library.
    """

    def __init__(self, model: bytes) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise ValueError(
                "reading a .model tokenizer needs the package sentencepiece: pip install sentencepiece"
            ) from error
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self.processor.encode(
            texts, out_type=int, add_bos=False, add_eos=False, num_threads=1
        )
        return encoded

    def text_of(self, text: str, token_id: int) -> str | None:
        pieces = self.processor.encode(text, out_type=str)  # an unknown word is a piece as it is written
        for piece, found in zip(pieces, self.processor.encode(text, out_type=int), strict=True):
            if found == token_id:
                return str(piece).replace("▁", " ").strip()
        return None

    def __getstate__(self) -> bytes:
        return self.model

    def __setstate__(self, state: bytes) -> None:
        self.__init__(state)  # type: ignore[misc]


def load_sentencepiece(path: Path) -> SentencePieceBackend:
    """Read a SentencePiece `.model`.

    Raises:
        ValueError: it is none.
    """
    if remedy := tiktoken_remedy(path):
        raise ValueError(remedy)
    model = path.read_bytes()
    try:
        backend = SentencePieceBackend(model) if model else None
    except RuntimeError as error:
        raise ValueError(f"{path} is no SentencePiece model ({error})") from error
    if backend is None or backend.processor.get_piece_size() == 0:
        raise ValueError(f"{path} is no SentencePiece model: it holds no piece, copy or train it again")
    return backend


def tiktoken_remedy(path: Path) -> str | None:
    """What to say of a file that is a tiktoken vocabulary, as `original/tokenizer.model` of Llama 3 is."""
    if not path.is_file():
        return None
    with open(path, "rb") as stream:
        is_tiktoken = all(TIKTOKEN_LINE.fullmatch(stream.readline(1024)) for _ in range(2))
    if not is_tiktoken:
        return None
    return (
        f"{path} is a tiktoken vocabulary, not a SentencePiece model: use the tokenizer.json of the same "
        "model (the Hugging Face folder, for Llama 3 the one above original/)"
    )
