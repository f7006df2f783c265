"""The two tokenizer libraries behind one method: text to ids, without special tokens.

Both pickle as their own file format, so a worker process gets a tokenizer without reading a folder again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextEncoder(Protocol):
    """What a `CorpusTokenizer` needs."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; nothing is added, cut or read as a control token."""
        ...


class HuggingFaceBackend:
    """A Rust tokenizer that encodes text as text only, whole, and pickles as JSON."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()  # a saved limit would silently cut documents
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # text that spells a special token stays text

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def __getstate__(self) -> str:
        return self._tokenizer.to_str()

    def __setstate__(self, state: str) -> None:
        from tokenizers import Tokenizer

        self.__init__(Tokenizer.from_str(state))  # type: ignore[misc]


class SentencePieceBackend:
    """A SentencePiece model; by its own rule text never becomes a control symbol."""

    def __init__(self, model: bytes) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise ValueError(
                "reading a .model tokenizer needs the package sentencepiece: pip install sentencepiece"
            ) from error
        self._model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self.processor.encode(
            texts, out_type=int, add_bos=False, add_eos=False, num_threads=1
        )
        return encoded

    def __getstate__(self) -> bytes:
        return self._model

    def __setstate__(self, state: bytes) -> None:
        self.__init__(state)  # type: ignore[misc]
