"""Tokenizers that encode text: Hugging Face folders and files, and SentencePiece models.

`HuggingFaceBackend` and `SentencePieceBackend` put the two libraries behind one protocol (`TextEncoder`):
text to ids, without special tokens. Both pickle as their own file format, so a worker process gets a
tokenizer without reading a folder again.

A Hugging Face folder means what its `tokenizer.json` says: that file is what the model was pretrained with,
and what the tokenizers library and transformers 4 load. transformers 5 rebuilds some folders by the class
that `tokenizer_config.json` names and may split text differently (a `GPT2Tokenizer` loses the digit
splitting of SmolLM). So the file encodes, and the result of transformers on a fixed probe text is compared
with it, which takes about three seconds once per command. From `tokenizer_config.json`,
`special_tokens_map.json` and `added_tokens.json` come only the tokens that the file lacks, and which token
is eos.

A folder without `tokenizer.json` (`vocab.json` with `merges.txt`, or `tokenizer.model`) is converted by
transformers; code of a folder is never run.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_exact.json_input import read_json_object
from megatron_exact.tokenizer_files import (
    ADDED_TOKENS,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer


TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
END_OF_TEXT_FILES = ("config.json", "generation_config.json")
"""Files of a model folder that name the ids which end a text."""
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CONTROL_BRACKETS = {"<": ">", "[": "]", "{": "}", "|": "|"}
SHORT_PROBE = "a"
PROBE_TEXTS = (
    "The quick brown fox's 3 jumps: it'll cost $12,345.678 in 2024, or 1234567890 on 07/11/1999.",
    "  two leading spaces,   three inside, a tab\there,\n\n\ntwo blank lines\r\nand a trailing one ",
    "Ünïcödé façade, naïve café, Straße; İstanbul; cafe\u0301 and ﬁ, \uff11\uff12\uff13 ½ ²",
    "漢字かな交じり文。中文分词测试,한국어 문장입니다.",
    "Русский текст, ελληνικά, العربية, हिन्दी, ภาษาไทย",
    "\U0001f600\U0001f469\u200d\U0001f4bb → “quotes” — dashes… ∑∫√",
    "def f(x, *, key=None):\n    return x[0] += 1  # comment\n\tif (a && b) { p->q(); }\n</html>",
    "HTTPServerError camelCase snake_case https://example.org/a?b=c&d=1 e-mail@host.tld 3.14e-10",
    "<|endoftext|> <s> </s> <unk> [INST] <<SYS>> <|im_start|>user <0x0A> <tool_call>",
)
"""Texts on which transformers and the file are compared: digits, spaces, accents, CJK, code, control
tokens."""


class TextEncoder(Protocol):
    """What a `CorpusTokenizer` needs from a tokenizer library."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text; nothing is added, truncated or read as a control token."""
        ...

    def text_of(self, text: str, token_id: int) -> str | None:
        """Return the part of a text that became the first token of this id; None without such a token."""
        ...


class HuggingFaceBackend:
    """A Rust tokenizer that encodes a whole text as text only, and pickles as JSON.

    Args:
        tokenizer: changed in place; without truncation or padding, with its control tokens marked special.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._state: str | None = None
        tokenizer.encode_special_tokens = True  # text that spells a special token stays text

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded at first use: most workers that encode with gigatoken never need it."""
        from tokenizers import Tokenizer

        assert self._state is not None
        tokenizer = Tokenizer.from_str(self._state)
        tokenizer.encode_special_tokens = True
        return tokenizer

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
        if self._state is None:
            self._state = self._tokenizer.to_str()
        return self._state

    def __setstate__(self, state: str) -> None:
        self._state = state


class SentencePieceBackend:
    """A SentencePiece model; by its own rules text never becomes a control symbol.

    Attributes:
        model: bytes of the `.model` file.
        processor: processor of the library.
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
        pieces = self.processor.encode(
            text, out_type=str
        )  # an unknown word is a piece with its own spelling
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
        ValueError: it is not such a file.
    """
    if remedy := tiktoken_remedy(path):
        raise ValueError(remedy)
    model = path.read_bytes()
    try:
        backend = SentencePieceBackend(model) if model else None
    except RuntimeError as error:
        raise ValueError(f"{path} is not a SentencePiece model ({error})") from error
    if backend is None or backend.processor.get_piece_size() == 0:
        raise ValueError(f"{path} is not a SentencePiece model: it has no pieces, copy or train it again")
    return backend


def tiktoken_remedy(path: Path) -> str | None:
    """Return a message if a file is a tiktoken vocabulary, as `original/tokenizer.model` of Llama 3 is."""
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


@dataclass(frozen=True, kw_only=True)
class HfTokenizer:
    """Content of a folder or a `tokenizer.json`, before the end of documents is chosen."""

    path: Path
    """Path of the folder or file."""
    rust: Tokenizer
    """Tokenizer of the file, with added tokens that only the other files of the folder name."""
    eos_token: str | None
    """Text of the eos, where the folder names one that exists."""
    prefix_ids: tuple[int, ...]
    """Ids that are put before a text."""
    doubts: tuple[str, ...]
    """One line for each contradiction between the file, the other files of the folder and transformers."""


def read_hf_tokenizer(path: Path, *, compare: bool = True) -> HfTokenizer:
    """Read a tokenizer folder or a `tokenizer.json`.

    Args:
        path: a folder, or the file.
        compare: also compare with what transformers makes of a folder (it imports torch).

    Raises:
        ValueError: a missing tokenizer, one that cannot be read, or files that contradict each other.
    """
    if not path.is_dir():
        rust = load_tokenizer_json(path)
        return HfTokenizer(
            path=path, rust=rust, eos_token=None, prefix_ids=prefix_of(rust), doubts=_without_dropout(rust)
        )
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{path} has no tokenizer: a tokenizer.json or tokenizer.model is needed there")
    if not (path / TOKENIZER_JSON).is_file():
        return _convert_folder(path)
    rust = load_tokenizer_json(path / TOKENIZER_JSON)
    doubts = [*_without_dropout(rust)]
    config = _read_object(path / TOKENIZER_CONFIG)
    names = {**_named(_read_object(path / SPECIAL_TOKENS_MAP)), **_named(config)}
    _add_declared_tokens(path, rust, config, names, doubts)
    prefix = prefix_of(rust)
    if "bos_token" in names:
        doubts += _doubt_about_bos(path, config.get("add_bos_token"), prefix)
    eos = names.get("eos_token")
    if compare and (eos is None or _has_loader_files(path)):
        loaded, failure = _auto_tokenizer(path)
        if loaded is None:
            doubts.append(
                f"transformers {_version()} cannot load {path} ({failure}): the corpus is what its "
                "tokenizer.json says, but evaluation and other tools will not load this folder"
            )
        else:
            difference = difference_from_transformers(rust, prefix, loaded)
            if difference is not None:
                doubts.append(difference_line(path, loaded, difference))
            default = loaded.eos_token
            if eos is None and default is not None and rust.token_to_id(str(default)) is not None:
                eos = str(default)  # the default of the class
    return HfTokenizer(path=path, rust=rust, eos_token=eos, prefix_ids=prefix, doubts=tuple(doubts))


def load_tokenizer_json(path: Path) -> Tokenizer:
    """Load a `tokenizer.json` with the tokenizers library.

    Raises:
        ValueError: it is not such a file.
    """
    from tokenizers import Tokenizer

    try:
        rust = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library ({error})") from error
    rust.no_truncation()  # a saved limit would silently cut documents
    rust.no_padding()
    return rust


def load_for_rendering(folder: Path) -> tuple[Any, str | None]:
    """Load the tokenizer of a folder as an object of transformers, for chat templates and for lm-eval.

    Where transformers' own loader splits text differently from `tokenizer.json`, the returned object
    encodes as the file says, as the corpora of this project do.

    Returns:
        The object, and a line if it had to be replaced or cannot be what made a corpus.

    Raises:
        ValueError: transformers cannot load the folder.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer: copy tokenizer.json beside the weights")
    loaded, failure = _auto_tokenizer(folder)
    if loaded is None:
        raise ValueError(f"{folder} could not be loaded as a Hugging Face tokenizer ({failure})")
    if not (folder / TOKENIZER_JSON).is_file():
        return loaded, _difference_from_sentencepiece(folder, loaded)
    read = read_hf_tokenizer(folder, compare=False)
    difference = difference_from_transformers(read.rust, read.prefix_ids, loaded)
    if difference is None:
        return loaded, None
    import transformers

    known = {
        name: str(token)
        for name, token in loaded.special_tokens_map.items()
        if name in NAMED_TOKENS and read.rust.token_to_id(str(token)) is not None
    }
    replaced = transformers.PreTrainedTokenizerFast(
        tokenizer_object=read.rust,
        chat_template=loaded.chat_template,
        model_max_length=loaded.model_max_length,
        padding_side=loaded.padding_side,
        clean_up_tokenization_spaces=False,
        **known,
    )
    return replaced, difference_line(folder, loaded, difference)


def difference_from_transformers(rust: Tokenizer, prefix: Sequence[int], loaded: Any) -> str | None:
    """Describe the first difference between transformers and the file on a probe text; None if equal."""
    rust.encode_special_tokens = True
    try:
        texts = list(PROBE_TEXTS)
        theirs = loaded(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        for text, ids in zip(texts, theirs["input_ids"], strict=True):
            ours = rust.encode(text, add_special_tokens=False).ids
            if list(ids) != ours:
                return _describe_difference(text, ours, list(ids), rust, loaded)
    finally:
        rust.encode_special_tokens = False
    begun = list(loaded(SHORT_PROBE, verbose=False)["input_ids"])
    inside = list(loaded(SHORT_PROBE, add_special_tokens=False, verbose=False)["input_ids"])
    if begun[: len(prefix)] != list(prefix) or begun[len(prefix) :][: len(inside)] != inside:
        start = begun[: next((n for n, token in enumerate(begun) if [token] == inside[:1]), len(begun))]
        return (
            f"a text starts with {list(prefix) or 'itself'} by the files and with {start or 'itself'} there"
        )
    return None


def difference_line(path: Path, loaded: Any, difference: str) -> str:
    """Return one line about a difference, for the user."""
    return (
        f"transformers {_version()} loads {path} as {type(loaded).__name__} and makes other tokens of text "
        f"than its tokenizer.json says ({difference}): the file is followed here, in corpora and in "
        "evaluation; tools that load the folder by AutoTokenizer follow transformers"
    )


def model_ends(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the ids that end a text according to `config.json` and `generation_config.json`, by file."""
    found = {}
    for name in END_OF_TEXT_FILES:
        value = _read_object(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if all(isinstance(one, int) and not isinstance(one, bool) for one in ids) and ids:
            found[name] = tuple(ids)
    return found


def doubt_about_ends(
    folder: Path, eod_id: int, eod_token: str, why: str, tokens: Mapping[int, str]
) -> list[str]:
    """Return a line if the model's configs beside a tokenizer name other ids as the end of a text.

    Args:
        folder: folder of the model.
        eod_id: id that ends documents.
        eod_token: its text.
        why: why it is this one, for the message.
        tokens: text of each id, for the message.
    """
    others = {name: ids for name, ids in model_ends(folder).items() if eod_id not in ids}
    if not others:
        return []
    named = " and ".join(
        f"{name} names {', '.join(f'{one} ({tokens.get(one)})' for one in ids)}"
        for name, ids in others.items()
    )
    return [
        f"{folder}: every document ends with {eod_id} ({eod_token}), {why}, but {named} as the end of a "
        "text: the model may know only that one; choose by --eod-token"
    ]


def look_at_vocabulary(folder: Path, rows: int) -> list[str]:
    """Compare the tokenizer of a model folder with the model, without transformers.

    Args:
        folder: folder of the model; without a tokenizer there is nothing to compare.
        rows: rows of the model's embedding.

    Returns:
        One line for each doubt.

    Raises:
        ValueError: ids without a row of the embedding.
    """
    try:
        vocabulary, eos = _vocabulary(folder)
    except ValueError as error:
        return [f"its tokenizer cannot be read: {error}"]
    if not vocabulary:
        return []
    tokens = {token_id: token for token, token_id in vocabulary.items()}
    largest = max(tokens)
    if largest >= rows:
        first = min(token_id for token_id in tokens if token_id >= rows)
        raise ValueError(
            f"{folder}: the tokenizer has {largest + 1} ids but the embedding {rows} rows, and {first} "
            f"({tokens[first]!r}) is the first id without one: config.json and tokenizer are not of one "
            "model, or rows for added tokens were left out"
        )
    if eos is None or eos not in vocabulary:
        if model_ends(folder):
            return []
        return [
            "neither the tokenizer nor config.json names a token that ends a text: name one by --eod-token "
            "when tokenizing"
        ]
    return doubt_about_ends(folder, vocabulary[eos], eos, "the tokenizer's eos", tokens)


def token_text(path: Path, token_id: int) -> str | None:
    """Return the text of a token of a folder, `tokenizer.json` or `.model`; None if it cannot be read."""
    try:
        vocabulary, _ = _vocabulary(path)
    except ValueError:
        return None
    return next((token for token, number in vocabulary.items() if number == token_id), None)


def eos_of(path: Path) -> tuple[int, str] | None:
    """Return id and text of the eos of a folder; None where it is not named or cannot be read."""
    try:
        vocabulary, eos = _vocabulary(path)
    except ValueError:
        return None
    return None if eos is None or eos not in vocabulary else (vocabulary[eos], eos)


def _vocabulary(folder: Path) -> tuple[dict[str, int], str | None]:
    """Return the id of every token of a folder or file by its text, and the eos."""
    if folder.suffix == ".model" and folder.is_file():
        processor = load_sentencepiece(folder).processor
        pieces = {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}
        return pieces, processor.id_to_piece(processor.eos_id()) if processor.eos_id() >= 0 else None
    if folder.is_file() or (folder / TOKENIZER_JSON).is_file():
        read = read_hf_tokenizer(folder, compare=False)
        return read.rust.get_vocab(with_added_tokens=True), read.eos_token
    config = _read_object(folder / TOKENIZER_CONFIG)
    names = {**_named(_read_object(folder / SPECIAL_TOKENS_MAP)), **_named(config)}
    vocabulary: dict[str, int] = {}
    if (folder / "tokenizer.model").is_file():
        vocabulary, eos = _vocabulary(folder / "tokenizer.model")
        names = {**({} if eos is None else {"eos_token": eos}), **names}
    elif (folder / "vocab.json").is_file():
        vocabulary = {
            token: number
            for token, number in _read_object(folder / "vocab.json").items()
            if type(number) is int
        }
    if vocabulary:
        vocabulary.update({content: number for number, content, _ in _declared(folder, config)})
    return vocabulary, names.get("eos_token")


def is_control_token(content: str, *, special: bool) -> bool:
    """Return whether an added token steers a model, so that text which spells it must stay text.

    This holds for special tokens, and for others in the brackets of control tokens (`<|fim_prefix|>`,
    `<tool_call>`, `[PAD]`). Runs of spaces, letters and words are pieces of text that are added whole.
    """
    if special:
        return True
    text = content.strip().strip("▁")
    return len(text) > 2 and CONTROL_BRACKETS.get(text[0]) == text[-1]


def prefix_of(rust: Tokenizer) -> tuple[int, ...]:
    """Return what the post-processor puts before a text; what it adds at the end is replaced by our EOD."""
    probe = rust.encode(SHORT_PROBE, add_special_tokens=True)
    prefix: list[int] = []
    for token_id, is_added in zip(probe.ids, probe.special_tokens_mask, strict=True):
        if not is_added:
            break
        prefix.append(token_id)
    return tuple(prefix)


def _without_dropout(rust: Tokenizer) -> tuple[str, ...]:
    dropout = getattr(rust.model, "dropout", None)
    if not dropout:
        return ()
    rust.model.dropout = None
    return (f"tokenizer.json has a BPE dropout of {dropout}, which would make tokens random: it is off",)


def _named(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of the tokens that a config names, by name such as `eos_token`."""
    found = {}
    for name in NAMED_TOKENS:
        value = content.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str) and text:
            found[name] = text
    return found


def _add_declared_tokens(
    path: Path, rust: Tokenizer, config: Mapping[str, Any], names: Mapping[str, str], doubts: list[str]
) -> None:
    """Add the tokens that only the other files of a folder have, as transformers does.

    Declared tokens have ids. Of tokens that are only named, bos and eos are added, because documents may
    start and end with them. An id that contradicts the file is a doubt, or an error for eos.
    """
    from tokenizers import AddedToken

    for token_id, content, special in _declared(path, config):
        if rust.token_to_id(content) is None:
            rust.add_tokens([AddedToken(content, special=special, normalized=not special)])
        found = rust.token_to_id(content)
        if found == token_id:
            continue
        line = (
            f"{path} gives {content!r} the id {token_id} in {TOKENIZER_CONFIG} or {ADDED_TOKENS}, but in "
            f"its {TOKENIZER_JSON} it is {found}"
        )
        if content == names.get("eos_token"):
            raise ValueError(f"{line}: the files are not of one tokenizer, copy the folder again")
        doubts.append(f"{line}: the latter is used")
    for name in ("bos_token", "eos_token"):
        if name in names and rust.token_to_id(names[name]) is None:
            rust.add_special_tokens([AddedToken(names[name], special=True, normalized=False)])


def _declared(path: Path, config: Mapping[str, Any]) -> list[tuple[int, str, bool]]:
    """Return (id, text, special) of `added_tokens_decoder` and `added_tokens.json`, sorted by id."""
    found: dict[str, tuple[int, bool]] = {}
    for content, token_id in _read_object(path / ADDED_TOKENS).items():
        if isinstance(token_id, int):
            found[content] = (token_id, False)
    decoder = config.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, Mapping) else ():
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str) and text and str(number).isdecimal():
            special = bool(token.get("special")) if isinstance(token, Mapping) else True
            found[text] = (int(number), special)
    return sorted((token_id, content, special) for content, (token_id, special) in found.items())


def _doubt_about_bos(path: Path, flag: object, prefix: tuple[int, ...]) -> list[str]:
    """Return a line if `add_bos_token` of tokenizer_config.json contradicts the file, which decides.

    transformers 5 does not read the flag beside a tokenizer.json; version 4 did for Llama's class.
    """
    if not isinstance(flag, bool) or flag == bool(prefix):
        return []
    return [
        f"{path}: documents start with {list(prefix) or 'their text'}, as the post-processor of "
        f"{TOKENIZER_JSON} says (and transformers {_version()} does), although add_bos_token is "
        f"{str(flag).lower()} in {TOKENIZER_CONFIG}"
    ]


def _has_loader_files(path: Path) -> bool:
    return any((path / name).is_file() for name in (TOKENIZER_CONFIG, "config.json"))


def _convert_folder(path: Path) -> HfTokenizer:
    """Read a folder of vocabulary files as transformers converts it."""
    if remedy := tiktoken_remedy(path / "tokenizer.model"):
        raise ValueError(remedy)
    loaded, failure = _auto_tokenizer(path)
    if loaded is None:
        raise ValueError(
            f"{path} could not be loaded as a Hugging Face tokenizer ({failure}); "
            "a SentencePiece model without Hugging Face files is given as the .model file itself"
        )
    rust = getattr(loaded, "backend_tokenizer", None)
    if rust is None:
        raise ValueError(
            f"{path} is a {type(loaded).__name__} without a tokenizer.json: convert it to a fast tokenizer"
        )
    from tokenizers import Tokenizer

    rust = Tokenizer.from_str(rust.to_str())
    rust.no_truncation()
    rust.no_padding()
    doubt = _difference_from_sentencepiece(path, loaded)
    return HfTokenizer(
        path=path,
        rust=rust,
        eos_token=loaded.eos_token,
        prefix_ids=prefix_of(rust),
        doubts=() if doubt is None else (doubt,),
    )


def _difference_from_sentencepiece(folder: Path, loaded: Any) -> str | None:
    """Return a line if transformers splits text differently from the SentencePiece model it converted."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        return None
    try:
        processor = load_sentencepiece(path).processor
    except ValueError:
        return None
    texts = list(PROBE_TEXTS)
    theirs = loaded(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    for text, ids in zip(texts, theirs, strict=True):
        ours = processor.encode(text, out_type=int)
        if list(ids) != ours:
            return (
                f"transformers {_version()} converts {path} to a {type(loaded).__name__} that makes other "
                f"tokens than SentencePiece does of {_short(text)}: a corpus made with the .model file and "
                "one made with the folder differ, and evaluation goes by transformers"
            )
    return None


def _auto_tokenizer(path: Path) -> tuple[Any, str | None]:
    """transformers' tokenizer of a folder, or None and why not."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        if not _has_loader_files(path):
            return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / TOKENIZER_JSON)), None
        return (
            transformers.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            ),
            None,
        )
    except Exception as error:  # many types, from several libraries
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _describe_difference(
    text: str, ours: Sequence[int], theirs: Sequence[int], rust: Tokenizer, loaded: Any
) -> str:
    first = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
    mine = [rust.id_to_token(token) for token in ours[first : first + 4]]
    other = loaded.convert_ids_to_tokens(list(theirs[first : first + 4]))
    return f"of {_short(text)} {mine} in the file, {other} there"


def _read_object(path: Path) -> dict[str, Any]:
    """Read a small JSON object; empty for a missing file."""
    if not path.is_file():
        return {}
    return read_json_object(path, "copy it again", wide_integers=True)


def _short(text: str) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _version() -> str:
    return importlib.metadata.version("transformers")
