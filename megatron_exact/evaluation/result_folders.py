"""The folder that `tools/evaluate_model.py` writes, read and checked.

`RESULTS/results.json` tells of the model, the options and the sha256 of every finished cell (`cells`;
folders of older versions have none: their scores are taken as they are),
`RESULTS/<suite>/<task>/<length>.jsonl` holds one object an example: `id`, `task`, `length`,
`prompt_sha256`, `references`, `score` (0..1) and more that the
statistics do not need. A cell is one such file. Files are read one cell at a time: a full evaluation is
larger than what is kept of it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.files import sha256_file
from megatron_exact.json_input import read_json_lines, read_json_object

RESULTS = "results.json"
FORMAT_VERSION = 1
CELL_FILE = re.compile(r"(0|[1-9]\d*)\.jsonl")


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """One task at one length: the unit over which scores are averaged."""

    suite: str
    """Folder of the suite, such as `ruler`."""
    task: str
    """Folder of the task, such as `niah_single_1`."""
    length: int
    """Tokens of the prompt; 0 for tasks without a length (standard QA)."""

    def __str__(self) -> str:
        return f"{self.suite}/{self.task}/{self.length}"


@dataclass(frozen=True, kw_only=True)
class ResultFolder:
    """What one evaluated model left behind."""

    path: Path
    """The folder."""
    info: dict[str, Any]
    """`results.json`."""
    files: dict[Cell, Path]
    """Every cell of the folder, in order."""

    @property
    def provenance(self) -> dict[str, Any] | None:
        """Record of the training that made the model; None for a model that came without one."""
        value = self.info.get("provenance")
        return value if isinstance(value, dict) and value else None

    @property
    def cell_hashes(self) -> dict[str, str]:
        """sha256 of the file of each cell, by `str(cell)`; empty in folders of older versions."""
        return dict(self.info.get("cells") or {})

    @property
    def weights(self) -> Any:
        """Hashes of the weights that were evaluated; None where they are not recorded."""
        model = self.info.get("model")
        return model.get("weights_sha256") if isinstance(model, dict) else None


@dataclass(frozen=True, kw_only=True)
class CellExamples:
    """The examples of one cell, in the order of the file."""

    path: Path
    """The file."""
    ids: list[str]
    """[examples], unique."""
    prompts: list[str]
    """[examples], sha256 of each prompt."""
    references: list[Any]
    """[examples], the answers that count as right; None where the file has none."""
    scores: NDArray[np.float64]
    """[examples], 0..1."""


def read_result_folder(path: str | Path) -> ResultFolder:
    """Find the cells of a folder; the examples are not read yet.

    Raises:
        ValueError: no results.json, one that is damaged, or no cell.
    """
    path = Path(path)
    record = path / RESULTS
    if not record.is_file():
        raise ValueError(f"{path} has no {RESULTS}: give a folder that evaluate_model.py has finished")
    info = read_json_object(record, "evaluate the model again")
    if info.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise ValueError(
            f"{record} has format_version {info['format_version']!r}, this program reads {FORMAT_VERSION}: "
            "evaluate the model again"
        )
    files = {
        Cell(suite=file.parts[-3], task=file.parts[-2], length=int(file.stem)): file
        for file in path.glob("*/*/*.jsonl")
        if CELL_FILE.fullmatch(file.name) and not any(part.startswith(".") for part in file.parts[-3:])
    }
    _require_recorded(record, info, files)
    if not files:
        raise ValueError(f"{path} holds no <suite>/<task>/<length>.jsonl: evaluate the model again")
    return ResultFolder(path=path, info=info, files=dict(sorted(files.items())))


def read_cell(folder: ResultFolder, cell: Cell) -> CellExamples:
    """Read the examples of one cell.

    Raises:
        ValueError: a line that is no example of this cell, an id that comes twice, or no line; with the
            file and the number of the line.
    """
    return read_cell_file(folder.files[cell], cell, folder.cell_hashes.get(str(cell)))


def _require_recorded(record: Path, info: dict[str, Any], files: dict[Cell, Path]) -> None:
    """Raise ValueError unless the cells are those that results.json names, where it names them."""
    named = info.get("cells")
    if named is None:
        return
    if not isinstance(named, dict) or not all(isinstance(value, str) for value in named.values()):
        raise ValueError(f"{record}: cells is not an object of hashes: evaluate the model again")
    there = {str(cell) for cell in files}
    for name in sorted(there ^ set(named)):
        fault = "lies there and is not in" if name in there else "is missing, which is in"
        raise ValueError(
            f"{record.parent / name}.jsonl {fault} {RESULTS}: results of two models may be mixed, or the "
            "evaluation was stopped; call evaluate_model.py with the same options again, or into another "
            "--output"
        )


def read_cell_file(path: Path, cell: Cell, sha256: str | None = None) -> CellExamples:
    """`read_cell` of one file, which must have this hash where one is given."""
    if sha256 is not None and sha256_file(path) != sha256:
        raise ValueError(
            f"{path} has changed since evaluate_model.py wrote it, or is of another model: remove the file "
            "and evaluate the cell again"
        )
    ids: list[str] = []
    prompts: list[str] = []
    references: list[Any] = []
    scores: list[float] = []
    seen: set[str] = set()
    remedy = "remove the file and evaluate the cell again"
    for place, example in read_json_lines(path, remedy):
        try:
            _check_example(example, cell)
            name = str(example["id"])
            if name in seen:
                raise ValueError(f"id {name!r} comes twice")
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{place} is no example of this cell ({reason}): {remedy}") from error
        seen.add(name)
        ids.append(name)
        prompts.append(example["prompt_sha256"])
        references.append(example.get("references"))
        scores.append(float(example["score"]))
    if not ids:
        raise ValueError(f"{path} is empty: remove it and evaluate the cell again")
    return CellExamples(
        path=path,
        ids=ids,
        prompts=prompts,
        references=references,
        scores=np.array(scores, dtype=np.float64),
    )


def _check_example(example: Any, cell: Cell) -> None:
    if not isinstance(example, dict):
        raise TypeError("not an object")
    if not isinstance(example["id"], str | int):
        raise TypeError(f"id {example['id']!r}")
    if (example["task"], example["length"]) != (cell.task, cell.length):
        raise ValueError(f"it says task {example['task']!r}, length {example['length']!r}")
    if not isinstance(example["prompt_sha256"], str) or not example["prompt_sha256"]:
        raise TypeError(f"prompt_sha256 {example['prompt_sha256']!r}")
    score = example["score"]
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if not (is_number and math.isfinite(score) and 0 <= score <= 1):
        raise ValueError(f"score {score!r} is not in 0..1")
