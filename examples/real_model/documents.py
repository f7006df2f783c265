"""Real long documents for `make demo-real`: the text of four of Debian's documentation packages.

apt downloads them and dpkg unpacks them into a scratch folder; nothing is installed. A document is a page:
a chapter of a manual, or a whole one.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from zlib import crc32

from examples.local_text import MIN_DOCUMENTS, CorpusSummary
from megatron_exact.files import write_text

PACKAGES = ("debian-policy", "debian-reference-en", "developers-reference", "git-doc")
"""Seven megabytes of download."""
LICENCES = "GPL-2+, and others of Debian's copyright files"
SHORTEST_CHARACTERS = 400
"""Shorter pages are tables of contents and redirections."""
RUN_WORDS, MOST_COPIED = 8, 0.3
"""Words of a run, and the share of a document's runs that earlier documents may have."""
BLOCK_TAGS = frozenset(
    {"p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "h5", "pre", "dt", "dd", "blockquote", "table"}
)
SILENT_TAGS = frozenset({"script", "style", "nav", "head", "header", "footer"})


class _TextOfHtml(HTMLParser):
    """Collects the text of a page, a line for each block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.silent += tag in SILENT_TAGS
        if tag in BLOCK_TAGS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(0, self.silent - (tag in SILENT_TAGS))
        if tag in BLOCK_TAGS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.pieces.append(data)


def text_of_html(page: str) -> str:
    """Return the text of an HTML page without navigation, scripts and repeated blank lines."""
    parser = _TextOfHtml()
    parser.feed(page)
    parser.close()
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in "".join(parser.pieces).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def fetch_packages(folder: Path) -> Path:
    """Download Debian's documentation packages and unpack them, without installing them.

    Returns:
        The folder of their files, below `folder`.

    Raises:
        ValueError: no apt here, or a package that cannot be had; names the way around.
    """
    remedy = "name text of your own: make demo-real DEMO_TEXT=FOLDER"
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise ValueError(f"this machine has no apt-get and dpkg-deb to fetch Debian's documents: {remedy}")
    command = ["apt-get", "--quiet", "--quiet", "download", *PACKAGES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"apt-get could not download {', '.join(PACKAGES)} ({reason}): run `apt-get update`, or "
            f"{remedy}"
        )
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package.name, "unpacked"], cwd=folder, check=True)
    return folder / "unpacked"


def package_documents(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the pages below a folder, the longest first."""
    found = []
    for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
        name = path.name.lower().removesuffix(".gz")
        if not name.endswith((".html", ".txt", ".md")):
            continue
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue  # translations in other encodings
        text = text_of_html(text) if name.endswith(".html") else text.strip()
        if len(text) >= SHORTEST_CHARACTERS:
            found.append((str(path.relative_to(root)), text))
    yield from sorted(found, key=lambda document: (-len(document[1]), document[0]))


def without_copies(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Leave out documents most of whose runs of eight words stand in earlier ones.

    A package has its manual as one page, as chapters and as plain text. A copy among the validation
    documents would have been trained on.
    """
    seen: set[int] = set()
    for name, text in documents:
        words = re.findall(r"\w+", text.lower())
        runs = {
            crc32(" ".join(words[i : i + RUN_WORDS]).encode()) for i in range(len(words) - RUN_WORDS + 1)
        }
        if runs and len(runs & seen) <= MOST_COPIED * len(runs):
            seen |= runs
            yield name, text


def collect_packages(folder: Path) -> CorpusSummary:
    """Write the documents of the packages to `corpus.jsonl` in a folder, and return what it holds.

    Raises:
        ValueError: too few documents.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = list(without_copies(package_documents(fetch_packages(Path(scratch)))))
    if len(found) < MIN_DOCUMENTS:
        raise ValueError(
            f"{', '.join(PACKAGES)} hold {len(found)} documents, fewer than {MIN_DOCUMENTS}: name text of "
            "your own (DEMO_TEXT)"
        )
    lines = [json.dumps({"name": name, "text": text}, ensure_ascii=False) for name, text in found]
    write_text(folder / "corpus.jsonl", "\n".join(lines) + "\n")
    return CorpusSummary(
        description=f"Debian's packages {', '.join(PACKAGES)}",
        documents=len(found),
        text_bytes=sum(len(text.encode("utf-8")) for _, text in found),
        skipped_files={},
    )
