"""The corpora that go into a pack: named, checked and described before anything is planned."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.command_line import progress_bar
from megatron_exact.data.corpus_record import CorpusRecord
from megatron_exact.data.indexed import IndexedTokens
from megatron_exact.data.manifest import Source, TokenizerIdentity
from megatron_exact.files import sha256_file

MAX_SOURCES = 1 << 16  # segment_source is uint16
WEIGHT = re.compile(r"\+?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?")


def parse_source(text: str) -> tuple[float | None, Path]:
    """Split `[WEIGHT:]PREFIX`.

    Raises:
        ValueError: a weight that is no finite number above 0, or no prefix.
    """
    head, colon, tail = text.partition(":")
    if not colon or Path(text + ".idx").exists():
        if not text:
            raise ValueError("a source is empty: give [WEIGHT:]PREFIX")
        return None, Path(text)
    if not WEIGHT.fullmatch(head) or float(head) <= 0:
        raise ValueError(
            f"weight {head!r} of source {text!r} is not a number above 0: give [WEIGHT:]PREFIX"
        )
    if not tail:
        raise ValueError(f"source {text!r} has a weight but no prefix: give [WEIGHT:]PREFIX")
    return float(head), Path(tail)


def parse_sources(sources: Sequence[str]) -> tuple[list[float | None], list[Path]]:
    """Weights and prefixes of all sources.

    Raises:
        ValueError: none at all, too many, some with a weight and some without, or one named twice.
    """
    if not sources:
        raise ValueError("no source: give at least one --source [WEIGHT:]PREFIX")
    if len(sources) > MAX_SOURCES:
        raise ValueError(f"{len(sources)} sources: at most {MAX_SOURCES} fit, merge some")
    parsed = [parse_source(text) for text in sources]
    weights = [weight for weight, _ in parsed]
    if None in weights and any(weight is not None for weight in weights):
        raise ValueError(
            f"{weights.count(None)} of {len(weights)} sources have no weight: give all of them one or none"
        )
    seen: dict[Path, str] = {}
    for text, (_, prefix) in zip(sources, parsed, strict=True):
        real = Path(os.path.realpath(prefix.with_name(prefix.name + ".idx")))
        if real in seen:
            raise ValueError(f"sources {seen[real]!r} and {text!r} are the same corpus: name it once")
        seen[real] = text
    return weights, [prefix for _, prefix in parsed]


def check_documents(corpus: IndexedTokens) -> None:
    """Raise ValueError if a corpus has no documents, or one of no tokens."""
    if corpus.num_documents == 0:
        raise ValueError(f"{corpus.prefix} has no documents: tokenize a corpus that has some")
    empty = np.flatnonzero(np.asarray(corpus.document_tokens) == 0)
    if empty.size:
        raise ValueError(
            f"{corpus.prefix}: {empty.size} documents have no token, the first is number {empty[0]}: "
            "tokenize the corpus again without empty documents"
        )


def describe_sources(
    corpora: Sequence[IndexedTokens],
    weights: Sequence[float | None],
    records: Sequence[CorpusRecord | None],
    output: Path,
) -> list[Source]:
    """Manifest entries of all sources, the indices hashed.

    Raises:
        ValueError: an index that its corpus record does not know, or the copy of another source.
    """
    described: list[Source] = []
    with progress_bar("hashing indices", sum(c.idx_path.stat().st_size for c in corpora), "B") as bar:
        for corpus, weight, record in zip(corpora, weights, records, strict=True):
            idx_sha256 = sha256_file(corpus.idx_path, bar.update)
            if record is not None and record.idx_sha256 != idx_sha256:
                raise ValueError(
                    f"{corpus.idx_path} has sha256 {idx_sha256[:16]}... but its record says "
                    f"{record.idx_sha256[:16]}...: the corpus was changed, tokenize it again"
                )
            source = Source(
                prefix=stored_path(corpus.prefix, output),
                weight=weight,
                documents=corpus.num_documents,
                tokens=corpus.num_tokens,
                idx_sha256=idx_sha256,
                bin_bytes=corpus.bin_bytes,
                bin_sha256=record.bin_sha256 if record else None,
                raw_files=tuple(record.raw_files) if record else (),
                licence=record.licence if record else None,
            )
            for other in described:
                same = (other.idx_sha256, other.bin_sha256) == (source.idx_sha256, source.bin_sha256)
                if same and source.bin_sha256 is not None:
                    raise ValueError(f"{source.prefix} is a copy of {other.prefix}: name the corpus once")
            described.append(source)
    return described


def stored_path(path: Path, output: Path) -> str:
    """`path` relative to the pack, absolute where they have no folder but the root in common.

    Links in the folders above are resolved. One that is the file itself keeps its name: in a Hugging Face
    cache `tokenizer.json` is a link to a blob whose name says nothing.
    """
    real = os.path.normpath(Path(os.path.realpath(path.parent)) / path.name)
    folder = os.path.realpath(output)
    if os.path.commonpath((real, folder)) == os.path.sep:
        return real
    return os.path.relpath(real, folder)


def agree_on_tokenizer(
    prefixes: Sequence[Path],
    records: Sequence[CorpusRecord | None],
    given: TokenizerIdentity | None,
    output: Path,
) -> TokenizerIdentity | None:
    """One identity for all sources, or None with one warning when nothing says which."""
    known: list[tuple[str, dict[str, Any]]] = []
    if given is not None:
        known.append(("--tokenizer", asdict(given)))
    known += [(str(p), r.tokenizer) for p, r in zip(prefixes, records, strict=True) if r is not None]
    if not known:
        warnings.warn(
            "no source has a corpus record and no --tokenizer is given: the pack will not say which "
            "tokenizer made it, and training cannot check the vocabulary",
            stacklevel=2,
        )
        return None
    first_name, first = known[0]
    for name, identity in known[1:]:
        if identity["sha256"] != first["sha256"]:
            raise ValueError(
                f"{name} was made with tokenizer {identity['path']} (sha256 {identity['sha256'][:16]}...) "
                f"but {first_name} means {first['path']} ({first['sha256'][:16]}...): tokenize all with one"
            )
    unknown = [str(p) for p, r in zip(prefixes, records, strict=True) if r is None]
    if unknown and given is None:
        warnings.warn(
            f"{', '.join(unknown)} has no corpus record: taken to be made with {first['path']}",
            stacklevel=2,
        )
    return TokenizerIdentity(**{**first, "path": stored_path(Path(first["path"]), output)})
