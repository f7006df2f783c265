"""Text that every machine has, the sources of Python's standard library, or a user's files, as one corpus.

The library has about 1,700 files and 30 MB where the interpreter ships its tests. Their lengths are
heavy-tailed like those of web text: half of the files are below 7 kB, the longest is a third of a megabyte.
Of a user's files, every one that is UTF-8 text is a document, whatever its suffix, also compressed
(`.md.gz`, `.txt.zst`); `.jsonl` (also compressed) and `.parquet` give their documents.
"""

from __future__ import annotations

import importlib
import json
import site
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_exact.data.documents import SUFFIXES, open_lines, read_documents
from megatron_exact.files import atomic_file

ENOUGH_BYTES = 8_000_000
"""Below this the standard library was stripped, and installed packages fill up."""
FILL_UP_BYTES = 30_000_000
MIN_DOCUMENTS = 20
MIN_BYTES = 400_000
LARGEST_FILE_BYTES = 256 << 20
"""Of the text of one plain file; a compressed one may be far smaller on disk."""
CUT_CHARACTERS = 16_000
"""A single plain file is cut at blank lines into documents of about this length."""
SHOWN_SUFFIXES = 5


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Files to read, in their order."""

    files: tuple[Path, ...]
    """Existing files."""
    description: str
    """For people: where the text comes from."""
    is_python_library: bool
    """Whether this is the default corpus, to which the pages of `pydoc_data` belong."""

    def identity(self) -> dict[str, object]:
        """Return what must stay the same for a corpus made from these files to be used again."""
        states = [(str(path), path.stat()) for path in self.files]
        return {
            "python": sys.version if self.is_python_library else None,
            "files": [[name, state.st_size, state.st_mtime_ns] for name, state in states],
        }


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """What a collected corpus contains."""

    description: str
    """See `Sources.description`."""
    documents: int
    """Texts written."""
    text_bytes: int
    """UTF-8 bytes of all texts."""
    skipped_files: dict[str, int]
    """Number of files that were left out, by suffix: empty, damaged, too large, or not UTF-8 text."""

    def skipped(self) -> str:
        """Return the files that were left out, for people; empty if there are none."""
        if not self.skipped_files:
            return ""
        kinds = sorted(self.skipped_files.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{number:,} {suffix or 'without suffix'}" for suffix, number in kinds[:SHOWN_SUFFIXES]]
        named += ["..."] if len(kinds) > SHOWN_SUFFIXES else []
        total = sum(self.skipped_files.values())
        return f"{total:,} files left out ({', '.join(named)}): empty, damaged or not UTF-8 text"

    def __str__(self) -> str:
        skipped = f"; {self.skipped()}" if self.skipped_files else ""
        return f"{self.description}: {self.documents:,} documents, {self.text_bytes:,} bytes{skipped}"


def find_sources(text: Path | None) -> Sources:
    """Return the user's files, or the standard library's where `text` is None.

    Raises:
        ValueError: a folder without files.
        FileNotFoundError: `text` does not exist.
    """
    if text is None:
        return _python_library()
    if text.is_dir():
        files = sorted(path for path in text.rglob("*") if path.is_file() and not _is_hidden(path, text))
        if not files:
            raise ValueError(f"{text} holds no file: name a file or a folder of text files (DEMO_TEXT)")
        return Sources(files=tuple(files), description=f"text files of {text}", is_python_library=False)
    if not text.exists():
        raise FileNotFoundError(f"{text} does not exist: name a file or a folder of text files (DEMO_TEXT)")
    return Sources(files=(text,), description=str(text), is_python_library=False)


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _python_library() -> Sources:
    library = Path(sysconfig.get_path("stdlib"))
    # topics.py is one literal: its pages are added as the texts that they are
    outside = {"site-packages", "dist-packages", "pydoc_data"}
    files = sorted(path for path in library.rglob("*.py") if not outside & set(path.parts))
    description = f"Python {sys.version.split()[0]} standard library ({library}) and pydoc topics"
    size = sum(path.stat().st_size for path in files)
    if size < ENOUGH_BYTES:
        filling = []
        for path in sorted(p for folder in site.getsitepackages() for p in Path(folder).rglob("*.py")):
            if size >= FILL_UP_BYTES:
                break
            filling.append(path)
            size += path.stat().st_size
        description += f" (stripped here), filled up with {len(filling):,} files of installed packages"
        files += filling
    return Sources(files=tuple(files), description=description, is_python_library=True)


def collect_corpus(sources: Sources, output: Path) -> CorpusSummary:
    """Write one JSON object a document (`name`, `text`) to `output`, atomically.

    Raises:
        ValueError: too little text for the demo, or a corpus file that is damaged.
    """
    documents = text_bytes = 0
    skipped: Counter[str] = Counter()
    with atomic_file(output) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for name, text in _texts(sources):
            if not text.strip():
                path = Path(name)
                is_compressed = path.suffix.lower() in (".gz", ".zst")
                skipped["".join(path.suffixes[-2:] if is_compressed else path.suffixes[-1:]).lower()] += 1
                continue
            stream.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
            documents += 1
            text_bytes += len(text.encode("utf-8"))
        summary = CorpusSummary(
            description=sources.description,
            documents=documents,
            text_bytes=text_bytes,
            skipped_files=dict(skipped),
        )
        if documents < MIN_DOCUMENTS or text_bytes < MIN_BYTES:
            left_out = f" ({summary.skipped()})" if skipped else ""
            raise ValueError(
                f"{sources.description}: {documents:,} documents with {text_bytes:,} bytes of text are too "
                f"little{left_out}; the demo needs {MIN_DOCUMENTS} documents and {MIN_BYTES:,} bytes, name "
                "more text: files of any suffix that are UTF-8 text, also .gz or .zst, .jsonl or .parquet"
            )
    return summary


def _texts(sources: Sources) -> Iterator[tuple[str, str]]:
    """(name, text) of each document; an empty text stands for a file that cannot be used."""
    corpora = tuple(suffix for suffix in SUFFIXES if suffix != ".txt")
    for path in sources.files:
        if path.name.lower().endswith(corpora) and not sources.is_python_library:
            yield from ((document.location, document.text) for document in read_documents(path))
        elif len(sources.files) == 1:
            yield from ((f"{path.name}, part {i}", part) for i, part in enumerate(_cut(_plain(path)), 1))
        else:
            yield str(path), _plain(path)
    if sources.is_python_library:
        try:
            topics = importlib.import_module("pydoc_data.topics").topics
        except ImportError:  # a stripped distribution
            return
        yield from ((f"pydoc topic {name}", topics[name]) for name in sorted(topics))


def _plain(path: Path) -> str:
    try:
        with open_lines(path) as (_, stream):
            content = stream.read(LARGEST_FILE_BYTES + 1)
        is_text = len(content) <= LARGEST_FILE_BYTES and b"\0" not in content
        return content.decode("utf-8-sig") if is_text else ""
    except ValueError:  # damaged compression, or no UTF-8
        return ""


def _cut(text: str) -> Iterator[str]:
    part: list[str] = []
    characters = 0
    for paragraph in text.split("\n\n"):
        part.append(paragraph)
        characters += len(paragraph) + 2
        if characters >= CUT_CHARACTERS:
            yield "\n\n".join(part)
            part, characters = [], 0
    if part:
        yield "\n\n".join(part)
