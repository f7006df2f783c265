"""Question-answer records in the fields of Dolly-15K: `instruction`, `context` (may be empty), `response`.

From JSON lines on disk, or from the Hub. The paper (EXACT, arXiv 2605.10544) tunes on Dolly-15K.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.data.compressed_lines import open_lines
from megatron_exact.data.corpus_inputs import FileInputs
from megatron_exact.data.documents import JSON_LINES_SUFFIXES
from megatron_exact.json_input import parse_corpus_line

DOLLY = "databricks/databricks-dolly-15k"
FIELDS = ("instruction", "context", "response")
DOLLY_LICENCE = "CC BY-SA 3.0"
"""As the data set's card states it."""
SEVERAL_FILES = "records"
FIELDS = ("instruction", "context", "response")
MANIFEST = "manifest"
"""`manifest.json` is the pack's, so a corpus beside it has another name."""


@dataclass(frozen=True, kw_only=True)
class QaRecord:
    """One record; white space at the edges of its texts is gone."""

    location: str
    """File and line, or data set and row, for messages."""
    instruction: str
    """What is asked; not empty."""
    context: str
    """What the question is about; may be empty."""
    response: str
    """The answer; not empty."""

    def question(self, context_place: str) -> str:
        """What the user says: instruction and context, the latter `before` or `after`."""
        parts = [self.context, self.instruction]
        if context_place == "after":
            parts.reverse()
        return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class QaInput:
    """Where records come from."""

    name: str
    """Of their corpus, which manifests and run records carry along."""
    rows: Iterable[tuple[str, Any]]
    """(location, what should be a record) in order; read once."""
    raw_files: list[dict[str, Any]]
    """{`path`, `bytes`, `sha256`} of each file."""
    hub: dict[str, Any] | None = None
    """Data set of the Hub, for the corpus record."""


def qa_files(paths: Sequence[str | Path]) -> QaInput:
    """Records of JSON lines files.

    Raises:
        ValueError, FileNotFoundError: a file that cannot be read, or of another kind.
    """
    for path in map(Path, paths):
        if not path.name.lower().endswith(JSON_LINES_SUFFIXES):
            raise ValueError(
                f"{path}: question-answer records are read from {', '.join(JSON_LINES_SUFFIXES)}"
            )
    files = FileInputs(paths)
    name = Path(paths[0]).name.lower().partition(".jsonl")[0] if len(paths) == 1 else ""
    return QaInput(
        name=name if name not in ("", MANIFEST) else SEVERAL_FILES,
        rows=_lines([Path(path) for path in paths]),
        raw_files=files.raw_files(),
    )


def qa_hub(repo: str = DOLLY, *, revision: str | None = None) -> QaInput:
    """Records of a data set of the Hub, its `train` split, pinned to one commit.

    Args:
        repo: with the fields of Dolly-15K.
        revision: branch, tag or commit; None means the newest. The commit it means now is recorded.

    Raises:
        ValueError: `datasets` is not installed, or the Hub cannot be reached.
    """
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            "reading from the Hub needs the package datasets: pip install datasets, or name local files "
            "with --input"
        ) from error
    try:
        commit = huggingface_hub.HfApi().dataset_info(repo, revision=revision).sha
        rows = datasets.load_dataset(repo, split="train", revision=commit)
    except Exception as error:  # the libraries raise many types
        raise ValueError(
            f"{repo} at {revision or 'its newest revision'} cannot be read ({type(error).__name__}): check "
            "the network, or download its .jsonl and name it with --input"
        ) from error
    located = ((f"{repo}:row {number}", row) for number, row in enumerate(rows, 1))
    hub = {"repo": repo, "config": None, "split": "train", "revision": commit}
    return QaInput(name=repo.rpartition("/")[2], rows=located, raw_files=[], hub=hub)


def as_record(location: str, row: Any) -> QaRecord:
    """Check one row.

    Raises:
        ValueError: no object, a field that is no text, or no instruction or response.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{location}: {_kind(row)} is no record with instruction, context and response")
    texts = {}
    for field in FIELDS:
        text = row.get(field)
        if text is None and field == "context":
            text = ""
        if not isinstance(text, str):
            raise ValueError(f"{location}: {field} is {_kind(text)}, not text")
        texts[field] = text.strip()
        if not texts[field] and field != "context":
            raise ValueError(f"{location}: {field} is empty")
    return QaRecord(location=location, **texts)


def _kind(value: Any) -> str:
    if isinstance(value, NotJson):
        return f"a line that is no JSON ({value.reason})"
    return "missing" if value is None else f"a {type(value).__name__}"


def _lines(paths: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    for path in paths:
        with open_lines(path) as (_, stream):
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                location = f"{path}:{number}"
                try:
                    yield location, parse_corpus_line(line.decode("utf-8"), *FIELDS)
                except ValueError as error:
                    yield location, NotJson(str(error))


class NotJson:
    """A line that is no JSON: a fault of its record, not of the file."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
