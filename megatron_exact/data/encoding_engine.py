"""gigatoken as the engine that encodes a corpus, where it agrees with the tokenizer's own library.

The tokens of a corpus are by definition those of the reference: the tokenizers library, or SentencePiece
for a `.model`. gigatoken reads the same definitions, is far faster (`benchmarks/tokenising.py`), and is
used only as long as it gives the same tokens:

* at the start both encode a text that is made to find differences, and the first documents;
* throughout, one document in `check_every` is encoded by both.

A tokenizer that gigatoken cannot load, or encodes differently at the start, is encoded by the reference. A
difference that is found later stops the job, because earlier documents may contain the same fault.
"""

# ruff: noqa: RUF001 (the probe text contains letters that look alike)

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import random
import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.hf_tokenizer import (
    PROBE_TEXTS,
    HuggingFaceBackend,
    SentencePieceBackend,
    TextEncoder,
)

ENGINES = ("auto", "gigatoken", "reference")
"""`auto`: gigatoken where it agrees; `gigatoken`: an error where it does not; `reference`: never."""
CHECK_EVERY = 1000
"""Default: one document in so many is encoded by both."""
SMALL_INPUT_BYTES = 4 << 20
"""Size below which loading and comparing a second engine takes longer than it saves."""
FIRST_DOCUMENTS = 100
FIRST_CHARACTERS = 1 << 18  # a quarter of a second for the reference
CACHE_BYTES = 256 << 20
"""Growth of this process after which gigatoken is reloaded: it caches every word that it has seen."""
PROBED_ADDED_TOKENS = 500
RANDOM_PROBE_TEXTS = 200


_BEYOND = re.compile("[\U00010000-\U0010ffff]")
NORMAL_FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")


@functools.cache
def _unsettled_units(old: str) -> NDArray[np.bool_]:
    """Mark the UTF-16 code units, [65536], of `old` and of characters that Python's table does not know.

    No unit of a character beyond the first plane is marked.
    """
    marked = np.array([unicodedata.category(chr(unit)) == "Cn" for unit in range(0x10000)])
    marked[[ord(one) for one in old if ord(one) < 0x10000]] = True
    return marked


def has_unsettled_characters(text: str, old: str = "") -> bool:
    """Return whether libraries with Unicode tables of different age may split or normalize a text apart.

    That is where it has characters that Python's table does not know: Unicode 17 added a dozen letters and
    digits on which gigatoken 0.10 and tokenizers 0.23 differ. Or one of `old`, see `old_characters`.
    """
    if text.isascii():
        return False
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), np.uint16)
    if _unsettled_units(old)[units].any():
        return True
    if units.size == len(text):  # no character beyond the first plane
        return False
    return any(one in old or unicodedata.category(one) == "Cn" for one in set(_BEYOND.findall(text)))


def old_characters(definition: str) -> str:
    """Return the characters that the tokenizers library normalizes otherwise than Python does.

    Its table is older: tokenizers 0.23 leaves 108 marks of Arabic, Indic and rarer scripts where they stand
    under NFC, the normalizer of Qwen2.5, and gigatoken sorts them. Of a known character the normal forms
    never change (UAX #15, stability), so each text without these is normalized alike.

    Args:
        definition: content of a tokenizer.json.
    """
    from tokenizers import normalizers

    found: set[str] = set()
    for form in NORMAL_FORMS:
        if f'"{form}"' not in json.dumps(json.loads(definition).get("normalizer")):
            continue
        normalizer = getattr(normalizers, form)()
        for one in _characters_of_normal_forms():
            # alone, after it the mark that is sorted first, and before it the one that is sorted last
            for text in (one, f"{one}\u0334", f"\u0345{one}"):
                if normalizer.normalize_str(text) != unicodedata.normalize(form, text):
                    found.add(one)
    return "".join(sorted(found))


@functools.cache
def _characters_of_normal_forms() -> str:
    """Return all characters that a normal form moves or replaces."""
    every = (chr(number) for number in range(0x110000) if not 0xD800 <= number < 0xE000)
    return "".join(one for one in every if unicodedata.combining(one) or unicodedata.decomposition(one))


class GigatokenEncoder:
    """gigatoken with the definition of one tokenizer; pickles as that definition.

    Args:
        definition: content of a tokenizer.json.

    Raises:
        ValueError, ImportError: gigatoken is not installed, or cannot read this definition.
    """

    def __init__(self, definition: str) -> None:
        self._definition = definition
        self._load()

    def _load(self) -> None:
        from gigatoken import Tokenizer

        self._library = Tokenizer.from_json(self._definition)
        self._resident_limit = _resident_bytes() + CACHE_BYTES

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the ids of each text, uint32 [tokens].

        Raises:
            EngineFailureError: the library failed.
        """
        if _resident_bytes() > self._resident_limit:
            del self._library  # first, so that its memory is free for the next one
            self._load()
        encoded = []
        for number, text in enumerate(texts):
            try:
                encoded.append(self._library.encode(text))
            except BaseException as error:
                # a panic of Rust code is not an Exception; interrupts and signals are passed on
                if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                    raise
                raise EngineFailureError(number, f"{type(error).__name__}: {error}") from None
        return encoded

    def __getstate__(self) -> str:
        return self._definition

    def __setstate__(self, state: str) -> None:
        self.__init__(state)  # type: ignore[misc]


class EngineFailureError(Exception):
    """gigatoken failed on a text.

    Attributes:
        number: number of the text in the call.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


class EngineDifferenceError(ValueError):
    """gigatoken and the reference give different tokens of a document."""


@dataclass(frozen=True, kw_only=True)
class CheckedEngine:
    """gigatoken and the reference with which it is compared. It can be pickled: workers get a copy."""

    fast: GigatokenEncoder
    """Encoder of all texts."""
    reference: TextEncoder
    """Encoder of the texts that are checked."""
    check_every: int = CHECK_EVERY
    """One document in this many is checked."""
    old: str = ""
    """Characters whose documents the reference encodes, see `old_characters`."""

    def encode(self, texts: list[str], locations: list[str]) -> list[NDArray[np.uint32]]:
        """Return the ids of each text, after comparing those that the sample contains.

        Which documents are in the sample depends on their file and line alone.

        Raises:
            EngineDifferenceError: the reference gives other tokens of a document in the sample.
            ValueError: the library failed on a document.
        """
        are_apart = [has_unsettled_characters(text, self.old) for text in texts]
        try:
            encoded = self.fast.encode(
                ["" if is_apart else text for is_apart, text in zip(are_apart, texts, strict=True)]
            )
        except EngineFailureError as error:
            raise ValueError(
                f"{locations[error.number]}: gigatoken failed on this document ({error}): run the same "
                "command with --engine reference"
            ) from None
        for number, (location, text, ids) in enumerate(zip(locations, texts, encoded, strict=True)):
            if are_apart[number]:
                encoded[number] = np.array(self.reference.encode_batch([text])[0], np.uint32)
            elif zlib.crc32(location.encode("utf-8", "surrogatepass")) % self.check_every == 0:
                expected = self.reference.encode_batch([text])[0]
                if difference := describe_difference(text, ids, expected):
                    raise EngineDifferenceError(
                        f"{location}: gigatoken gives other tokens than the tokenizer's own library "
                        f"({difference}), and documents that were not compared may differ, too: run the "
                        "same command with --engine reference, and report the text to the authors of "
                        "gigatoken"
                    )
        return encoded


def choose_engine(
    engine: str, reference: TextEncoder, first: Sequence[str], input_bytes: int, check_every: int
) -> tuple[CheckedEngine | None, str]:
    """Choose the engine that encodes a corpus.

    Args:
        engine: one of ENGINES.
        reference: encoder that defines the tokens.
        first: the first documents that will be encoded.
        input_bytes: size of all inputs, 0 if unknown.
        check_every: see `CheckedEngine`.

    Returns:
        gigatoken, or None for the reference; and a line for the user, empty where there was no choice.

    Raises:
        ValueError: `gigatoken` was requested and cannot be used.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}: choose one of {', '.join(ENGINES)}")
    if check_every < 1:
        raise ValueError(f"check_every is {check_every}: one document in so many is checked, at least 1")
    if engine == "reference" or (engine == "auto" and 0 < input_bytes < SMALL_INPUT_BYTES):
        return None, ""
    library = "SentencePiece" if isinstance(reference, SentencePieceBackend) else "tokenizers"
    try:
        definition, added = definition_of(reference)
        fast = GigatokenEncoder(definition)
        old = old_characters(definition)
    except ImportError as error:
        reason = f"gigatoken cannot be imported ({error})"
    except Exception as error:  # the library raises several types
        reason = f"gigatoken does not support this tokenizer: {' '.join(str(error).split())[:200]}"
    else:
        difference = first_difference(fast, reference, [*probe_texts(added), *_beginning(first)], old)
        if difference is None:
            version = importlib.metadata.version("gigatoken")
            return (
                CheckedEngine(fast=fast, reference=reference, check_every=check_every, old=old),
                f"engine: gigatoken {version}, equal to {library} on a probe text and the first "
                f"{min(len(first), FIRST_DOCUMENTS)} documents; 1 document in {check_every:,} is checked",
            )
        reason = f"gigatoken gives other tokens than {library} ({difference})"
    if engine == "gigatoken":
        raise ValueError(f"{reason}: leave out --engine gigatoken")
    return None, f"engine: {library}, because {reason}"


def definition_of(reference: TextEncoder) -> tuple[str, list[str]]:
    """Return the tokenizer.json of a reference for gigatoken, and the texts of all its added tokens.

    gigatoken has no setting that keeps the spelling of a control token as text, so the definition lacks
    these tokens.

    Raises:
        ValueError: gigatoken cannot read this kind of tokenizer.
    """
    if isinstance(reference, HuggingFaceBackend):
        content = json.loads(reference.__getstate__())
    elif isinstance(reference, SentencePieceBackend):
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        content = json.loads(sentencepiece_to_tokenizer_json(reference.model))
    else:
        raise ValueError(f"a {type(reference).__name__} has no tokenizer.json")
    added = content.get("added_tokens", [])
    content["added_tokens"] = [one for one in added if not one["special"]]
    return json.dumps(content), [one["content"] for one in added]


def _beginning(documents: Sequence[str]) -> list[str]:
    """Return the first documents, the last of them truncated."""
    texts, room = [], FIRST_CHARACTERS
    for text in documents[:FIRST_DOCUMENTS]:
        texts.append(text[:room])
        room -= len(texts[-1])
        if room <= 0:
            break
    return texts


def first_difference(
    fast: GigatokenEncoder, reference: TextEncoder, texts: Sequence[str], old: str = ""
) -> str | None:
    """Describe where two engines first differ.

    Texts that gigatoken would not encode (`has_unsettled_characters`) are skipped.
    """
    texts = [text for text in texts if not has_unsettled_characters(text, old)]
    try:
        encoded = fast.encode(texts)
    except EngineFailureError as error:
        return f"it fails on {_shown(texts[error.number])}: {error}"
    for text, ids, expected in zip(texts, encoded, reference.encode_batch(texts), strict=True):
        if difference := describe_difference(text, ids, expected):
            return difference
    return None


def describe_difference(
    text: str, ids: NDArray[np.uint32] | Sequence[int], expected: Sequence[int]
) -> str | None:
    """Describe how the ids of a text differ from those expected; None if they are equal."""
    found = np.asarray(ids, np.int64)
    wanted = np.asarray(expected, np.int64)
    if np.array_equal(found, wanted):
        return None
    shared = min(found.size, wanted.size)
    first = int(np.flatnonzero(np.append(found[:shared] != wanted[:shared], True))[0])
    return (
        f"token {first} of {_shown(text)} and what follows is {found[first : first + 4].tolist()}, "
        f"expected {wanted[first : first + 4].tolist()}"
    )


def probe_texts(added: Sequence[str] = ()) -> list[str]:
    """Return fixed texts that are made to find differences between two engines.

    Args:
        added: texts of a tokenizer's added tokens, put beside letters, spaces and ends of lines.
    """
    shown = [text for text in added[:PROBED_ADDED_TOKENS] if text]
    texts = [
        *PROBE_TEXTS,
        *(f"a{text}b {text} {text}{text}\n{text.strip()}\t{text.lower()}." for text in shown),
        *(
            f"x{' ' * n}y{' ' * n}\n{chr(10) * n}z{chr(9) * n}{chr(13) + chr(10)}{' ' * n}"
            for n in range(1, 20)
        ),
        *(f"{'7' * n} {'7' * n}.{'٣' * n}{'１' * n}{'²' * n}x{'Ⅷ' * n}" for n in range(1, 12)),
        "it's IT'S we'Ve I'LL they'RE he'D I'm 'ſ 'S's 'TT ''s '\u212as don\u2019t 'é 'll've",
        "cafe\u0301 e\u0301\u0323\u0300 \u0301a \u200d\u200b\u00ad\ufeff\u2060 \u00a0",
        "\u3000\u2028\u2029\u0085\u180e\u1680x\u00a0y \u3000z",
        "\x00\x01\x1f\x7f\x80\x9f \ufffd\ue000\U000f0000 \U000e0001",
        "DŽ Dž dž ǅ ʰ ª º ߀ ௧ ꘠ ൏ 〇 ㊿ ๓ Ⅻ ⁴ ₅ ۝ ॐ ß ẞ İ ı ſt ﬃ K Å Ω ℡ ㍿ ｱｲｳ ﾊﾟ",
        "가각간 \u1100\u1161\u11a8 ㄱㄴ あいうえおがぎ\u304b\u3099 カタカナー ",
        "漢字\u3005々〆ヶ 𠮷野家 \U0002f800 ，。！？",
        "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽 ☺️ ❤ \u20e3 1️⃣ ©®™ ←→⇒ ½¾ €£¥₿ ∮∭ ⠿ 𝔘𝔫𝔦 𝟘𝟙 🄰 ꙮ",
        "a" * 3000
        + " "
        + "ab" * 1500
        + "\n"
        + "é漢" * 700
        + "-" * 500
        + "=" * 499
        + "." * 70
        + "\U0001f600" * 50,
        " " * 1000 + "\n" * 500 + "\t" * 300 + " \n" * 100 + "\r" * 20 + "x" + " " * 77,
        "ABCdef GHIjkl XMLHttpRequest2 McDonald's iPhone12Pro ALLCAPS'S ÀÉîõü ΑΒΓαβγ АБВгд aBcDeF_gH-iJ",
        "\\begin{align*} x_{i}^{2} &= \\frac{1}{2} \\\\ \\end{align*} $$",
        " `code` ~~~ ``` ### --- *** ___ /* */ // <!-- -->",
        '{"a":[1,2.5e-3,null],"b":"\\u00e9\\n"}\r\n\t\tif(x!=y&&z||!w){return(*p)++;}#!/bin/sh\n@decorator\nSELECT*FROM',
        "",
        " ",
        "\n",
        "\ufeff",
    ]
    generator = random.Random(0)
    return [*texts, *(random_text(generator) for _ in range(RANDOM_PROBE_TEXTS))]


_RANDOM_RANGES = (
    (0x20, 0x7F),
    (0x00, 0x300),
    (0x300, 0x600),
    (0x600, 0x1100),
    (0x1100, 0x2000),
    (0x2000, 0x2E80),
    (0x2E80, 0xA000),
    (0xA000, 0xD800),
    (0xE000, 0x10000),
    (0x10000, 0x20000),
    (0x20000, 0x32000),
    (0xE0000, 0x110000),
)
_RANDOM_PIECES = (
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'s",
    "'LL",
    "1",
    "23",
    "٣",
    ".",
    "--",
    "the",
    "The",
    "漢",
    "é",
    "\u0301",
)


def random_text(generator: random.Random, longest: int = 64) -> str:
    """Return a text of up to `longest` pieces: characters of one or two ranges, and what is frequent.

    It contains only characters that Python's Unicode table knows.
    """
    ranges = generator.choices(_RANDOM_RANGES, k=generator.randint(1, 2))
    pieces: list[str] = []
    length = generator.randint(1, longest)
    while len(pieces) < length:
        if generator.random() < 0.3:
            pieces.append(generator.choice(_RANDOM_PIECES))
            continue
        one = chr(generator.randrange(*generator.choice(ranges)))
        if unicodedata.category(one) != "Cn":
            pieces.append(one)
    return "".join(pieces)


def _resident_bytes() -> int:
    """Return the memory of this process; 0 where the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _shown(text: str) -> str:
    shown = json.dumps(text, ensure_ascii=True)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
