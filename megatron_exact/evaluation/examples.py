"""One evaluated example, and the file of a cell that holds them.

A cell is written when all its examples are scored, under its final name at once: a file that exists is a
finished cell, and a second call goes on with the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.evaluation.result_folders import Cell, read_cell_file
from megatron_exact.files import write_text


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt, what the model made of it, and what that is worth."""

    id: str
    """Unique inside the cell, and the same for every model."""
    prompt_sha256: str
    """Of the rendered prompt; for likelihood tasks of all contexts and continuations."""
    prompt_tokens: int
    """Length of the (longest) prompt without what is generated."""
    prediction: str
    """The generated text, or the choice of the highest likelihood."""
    references: tuple[str, ...]
    """Answers that count."""
    score: float
    """0..1."""
    depth: float | None = None
    """Percent of the haystack before the needle (NoLiMa), else None."""

    def to_json(self, cell: Cell) -> dict[str, Any]:
        """The object of the results file."""
        content = {
            "id": self.id,
            "task": cell.task,
            "length": cell.length,
            "prompt_sha256": self.prompt_sha256,
            "prompt_tokens": self.prompt_tokens,
            "prediction": self.prediction,
            "references": list(self.references),
            "score": self.score,
        }
        return content if self.depth is None else {**content, "depth": self.depth}


def text_sha256(*parts: str) -> str:
    """Hex sha256 of texts; of one text it is the hash of its UTF-8 bytes."""
    text = parts[0] if len(parts) == 1 else json.dumps(parts, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def cell_path(results: Path, cell: Cell) -> Path:
    """Where the examples of a cell lie."""
    return results / cell.suite / cell.task / f"{cell.length}.jsonl"


def write_cell(results: Path, cell: Cell, examples: Sequence[Example]) -> None:
    """Write a finished cell, atomically."""
    lines = [json.dumps(example.to_json(cell), ensure_ascii=True, allow_nan=False) for example in examples]
    write_text(cell_path(results, cell), "\n".join(lines) + "\n")


def read_scores(results: Path, cell: Cell) -> list[float]:
    """Scores of a finished cell.

    Raises:
        ValueError: its file is damaged.
    """
    scores: list[float] = read_cell_file(cell_path(results, cell), cell).scores.tolist()
    return scores
