"""The result folder of one evaluated model, written by `evaluate_model.py` and `probe_evidence.py`.

    results.json                   model, options, and the sha256 of every finished cell (`cells`)
    <suite>/<task>/<length>.jsonl  one object for each example; such a file is a cell
    probe.json                     model and options of the evidence probe
    probe/<kind>.jsonl             one object for each item

`results.json` is `{"format_version", "model": {"name", "config_sha256", "tokenizer_sha256",
"weights_sha256"}, "lm_eval", "provenance", "backend": {"name", "dtype", "calls": [{"versions", ...}]},
"suites": {suite: {"options", "template", "sources": {name: sha256}}}, "cells": {cell: sha256},
"bindings": {cell: {"examples", "code", "sha256"}}}`. A binding hashes a cell's file together with the
model, options and code that made it (`cell_binding`), so that a cell of another folder or another record is
noticed. This finds mistakes and edits by hand, not somebody who computes the hashes again. Folders of older
versions have no `cells` or no `bindings`, and what they say is taken as it is; `compare` and
`verify-results` say so.

A file gets its name when all its examples are scored: a file that exists and has a hash is a finished
cell, and an interrupted call resumes with the others. Cells are read one at a time, because a full
evaluation is much larger than its averages.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.files import sha256_file, write_json, write_text
from megatron_exact.folder_lock import LEASE, Lease
from megatron_exact.json_input import read_json_lines, read_json_object, require_shape

FORMAT_VERSION = 1
"""Version of the formats of results.json and probe.json."""
RESULTS = "results.json"
PROBE = "probe.json"
PROBE_FOLDER = "probe"
CELL_FILE = re.compile(r"(0|[1-9]\d*)\.jsonl")
SHOWN_CHARACTERS = 60
MERGE_SECONDS = 30
"""Seconds that a call waits for others that write their results into the folder."""
PROBE_RESULT = {
    "id": (str, int),
    "kind": str,
    "distance": int,
    "context": int,
    "item_sha256": str,
    **dict.fromkeys(("margin", "margin_ablated", "correct", "correct_ablated"), float),
    "form?": str,
}
"""Keys of an item that `compare_runs.py` reads."""
PROBE_FIXED = ("format_version", "model", "provenance", "options", "items", "dtype")
"""Entries of probe.json that hold for the whole folder."""


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


@dataclass(frozen=True, kw_only=True, order=True)
class ProbeCell:
    """Items of one kind at one place of the grid."""

    kind: str
    """Kind of the items, such as `field-lookup`."""
    distance: int
    """Tokens from the last evidence token to the first answer token: 1 where they are neighbours."""
    context: int
    """Tokens of the prompt, all of which stand before the answer."""

    def __str__(self) -> str:
        return f"{self.kind}/{self.distance}/{self.context}"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt, the model's answer, and its score."""

    id: str
    """Unique inside the cell, and the same for every model."""
    prompt_sha256: str
    """Hash of the rendered prompt; for likelihood tasks of all contexts and continuations."""
    prompt_tokens: int
    """Length of the (longest) prompt without what is generated."""
    prediction: str
    """The generated text, or the choice of the highest likelihood."""
    references: tuple[str, ...]
    """Answers that count as right."""
    score: float
    """Score in 0..1."""
    depth: float | None = None
    """Percent of the haystack's tokens before the needle (NoLiMa), else None."""
    question: str | None = None
    """Name of the question (NoLiMa), else None."""
    book: str | None = None
    """Name of the book (NoLiMa), else None."""
    prompts: tuple[str, ...] | None = None
    """What `prompt_sha256` is the hash of, where prompts are kept."""

    def to_json(self, cell: Cell) -> dict[str, Any]:
        """Return the object of the results file."""
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
        more: dict[str, Any] = {"depth": self.depth, "question": self.question, "book": self.book}
        more["prompts"] = None if self.prompts is None else list(self.prompts)
        return {**content, **{name: value for name, value in more.items() if value is not None}}


@dataclass(frozen=True, kw_only=True)
class ResultFolder:
    """The result folder of one evaluated model."""

    path: Path
    """Path of the folder."""
    info: dict[str, Any]
    """Content of `results.json`."""
    files: dict[Cell, Path]
    """Every cell of the folder, in order."""

    @property
    def provenance(self) -> dict[str, Any] | None:
        """Record of the training that made the model; None for a model without one."""
        value = self.info.get("provenance")
        return value if isinstance(value, dict) and value else None

    @property
    def cell_hashes(self) -> dict[str, str]:
        """sha256 of the file of each cell, by `str(cell)`; empty in folders of older versions."""
        return dict(self.info.get("cells") or {})

    @property
    def bindings(self) -> dict[str, dict[str, Any]]:
        """Number of examples, code and binding of each cell, by `str(cell)`; empty in older folders."""
        return dict(self.info.get("bindings") or {})

    @property
    def weights(self) -> Any:
        """Hashes of the weights that were evaluated; None where they are not recorded."""
        model = self.info.get("model")
        return model.get("weights_sha256") if isinstance(model, dict) else None


@dataclass(frozen=True, kw_only=True)
class CellExamples:
    """The examples of one cell, or the items of one cell of the probe, in the order of the file."""

    path: Path
    """Path of the file; for the probe, of the result folder."""
    ids: list[str]
    """[examples], unique ids."""
    prompts: list[str]
    """[examples], sha256 of each prompt; for the probe, of the whole item."""
    references: list[Any]
    """[examples], the answers that count as right; None where the file lacks them."""
    scores: NDArray[np.float64]
    """[examples], scores in 0..1; for the probe [items, measures]."""
    units: list[str] | None = None
    """[examples], what was drawn together, where the file says it: the forms of the probe's items."""
    predictions: list[Any] = field(default_factory=list)
    """[examples], answers of the model; empty for the probe."""


def text_sha256(*parts: str) -> str:
    """Return the hex sha256 of texts; for one text it is the hash of its UTF-8 bytes."""
    text = parts[0] if len(parts) == 1 else json.dumps(parts, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def cell_path(results: Path, cell: Cell) -> Path:
    """Return the path of the examples of a cell."""
    return results / cell.suite / cell.task / f"{cell.length}.jsonl"


def write_cell(results: Path, cell: Cell, examples: Sequence[Example]) -> None:
    """Write a finished cell, atomically."""
    lines = [json.dumps(example.to_json(cell), ensure_ascii=True, allow_nan=False) for example in examples]
    write_text(cell_path(results, cell), "\n".join(lines) + "\n")


def read_result_folder(path: str | Path) -> ResultFolder:
    """Find the cells of a folder; the examples are not read yet.

    Raises:
        ValueError: a missing or damaged results.json, or a folder without cells.
    """
    path = Path(path)
    record = path / RESULTS
    if not record.is_file():
        raise ValueError(
            f"{path} has no {RESULTS}: give a folder that megatron-exact evaluate has finished"
        )
    info = read_json_object(record, "evaluate the model again")
    if info.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise ValueError(
            f"{record} has format_version {info['format_version']!r}, this program reads {FORMAT_VERSION}: "
            "evaluate the model again"
        )
    files = cell_files(path)
    _require_recorded(record, info, files)
    _require_bound(record, info)
    if not files:
        raise ValueError(f"{path} has no <suite>/<task>/<length>.jsonl: evaluate the model again")
    return ResultFolder(path=path, info=info, files=files)


def cell_files(results: Path) -> dict[Cell, Path]:
    """Return the finished cells of a folder, in order."""
    found = {
        Cell(suite=file.parts[-3], task=file.parts[-2], length=int(file.stem)): file
        for file in results.glob("*/*/*.jsonl")
        if CELL_FILE.fullmatch(file.name) and not any(part.startswith(".") for part in file.parts[-3:])
    }
    return dict(sorted(found.items()))


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
            "evaluation was stopped; call megatron-exact evaluate with the same options again, or into "
            "another --output"
        )


def cell_binding(info: dict[str, Any], cell: str, *, sha256: str, examples: int, code: str) -> str:
    """Return one hash for a cell and what it was made with.

    Args:
        info: content of results.json.
        cell: `str(Cell)`.
        sha256: of the cell's file.
        examples: lines of the file.
        code: version of the code that scored them.
    """
    suite = (info.get("suites") or {}).get(cell.partition("/")[0]) or {}
    backend = info.get("backend") or {}
    calls = backend.get("calls") or [{}]
    content = {
        **{name: info.get(name) for name in ("model", "lm_eval", "provenance")},
        "backend": {name: backend.get(name) for name in ("name", "dtype")},
        "generation": calls[0].get("generation"),
        "options": suite.get("options"),
        "template": suite.get("template"),
        **{"cell": cell, "sha256": sha256, "examples": examples, "code": code},
    }
    return text_sha256(json.dumps(content, sort_keys=True))


def _require_bound(record: Path, info: dict[str, Any]) -> None:
    """Raise ValueError for a cell that was not made with the model and options of results.json."""
    if info.get("bindings") is None:
        return
    bindings, cells = info["bindings"], info.get("cells") or {}
    remedy = "put its own results.json back, or evaluate the cell again"
    try:
        require_shape(bindings, {"*": {"examples": int, "code": str, "sha256": str}})
    except ValueError as error:
        raise ValueError(f"{record}: bindings: {error}: {remedy}") from error
    for name in sorted({*bindings, *cells}):
        bound = bindings.get(name)
        if bound is None or name not in cells:
            raise ValueError(
                f"{record} has {name} in {'cells' if bound is None else 'bindings'} alone: it was edited, "
                f"or the cell is of another folder; {remedy}"
            )
        found = cell_binding(info, name, sha256=cells[name], examples=bound["examples"], code=bound["code"])
        if found != bound["sha256"]:
            raise ValueError(
                f"{record.parent / name}.jsonl was not made with the model, template and options that "
                f"{RESULTS} names: the cell is of another folder, or {RESULTS} was edited; {remedy}"
            )


def read_cell(folder: ResultFolder, cell: Cell) -> CellExamples:
    """Read the examples of one cell.

    Raises:
        ValueError: a line that is not an example of this cell, an id that comes twice, no line, or fewer
            than were evaluated; with the file and the number of the line.
    """
    examples = read_cell_file(folder.files[cell], cell, folder.cell_hashes.get(str(cell)))
    bound = folder.bindings.get(str(cell))
    if bound is not None and len(examples.ids) != bound["examples"]:
        raise ValueError(
            f"{examples.path} has {len(examples.ids):,} of the {bound['examples']:,} examples that were "
            "evaluated: remove the file and evaluate the cell again"
        )
    return examples


def read_cell_file(path: Path, cell: Cell, sha256: str | None = None) -> CellExamples:
    """Read the examples of one file, whose hash is checked if one is given; see `read_cell`."""
    if sha256 is not None and sha256_file(path) != sha256:
        raise ValueError(
            f"{path} has changed since megatron-exact evaluate wrote it, or is of another model: remove "
            "the file and evaluate the cell again"
        )
    ids: list[str] = []
    prompts: list[str] = []
    references: list[Any] = []
    scores: list[float] = []
    predictions: list[Any] = []
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
            raise ValueError(f"{place} is not an example of this cell ({reason}): {remedy}") from error
        seen.add(name)
        ids.append(name)
        prompts.append(example["prompt_sha256"])
        references.append(example.get("references"))
        scores.append(float(example["score"]))
        predictions.append(example.get("prediction"))
    if not ids:
        raise ValueError(f"{path} is empty: remove it and evaluate the cell again")
    return CellExamples(
        path=path,
        ids=ids,
        prompts=prompts,
        references=references,
        scores=np.array(scores, dtype=np.float64),
        predictions=predictions,
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
    kept = example.get("prompts")
    if kept is not None:
        require_shape(kept, [str], "prompts")
        if text_sha256(*kept) != example["prompt_sha256"]:
            raise ValueError("prompt_sha256 is not the hash of its prompts")
    score = example["score"]
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if not (is_number and math.isfinite(score) and 0 <= score <= 1):
        raise ValueError(f"score {score!r} is not in 0..1")


def read_scores(results: Path, cell: Cell) -> list[float]:
    """Read the scores of a finished cell.

    Raises:
        ValueError: its file is damaged.
    """
    scores: list[float] = read_cell_file(cell_path(results, cell), cell).scores.tolist()
    return scores


def merged_info(results: Path, info: dict[str, Any], suite: str, record: dict[str, Any]) -> dict[str, Any]:
    """Return the content of results.json with one more suite, or with more of an existing one.

    Args:
        results: the folder; it may not exist yet.
        info: entries for the whole folder; the `calls` of its `backend` are merged.
        suite: name of the suite.
        record: its `options`, `template` and `sources`; sources are merged.

    Raises:
        ValueError: the folder contains another model, other options, or something else.
    """
    content = {"format_version": FORMAT_VERSION, **info}
    before = _read(results)
    if before is None:
        return {**content, "suites": {suite: record}, "cells": {}, "bindings": {}}
    for name, value in content.items():
        if name != "backend":
            _require_same(results, name, before.get(name), value)
    content["backend"] = _united_backend(results, before.get("backend"), content["backend"])
    suites = before["suites"]
    if suite in suites:
        there = suites[suite]
        _require_same(results, f"options of {suite}", there.get("options"), record["options"])
        _require_same(results, f"template of {suite}", there.get("template"), record["template"])
        sources = there.get("sources") or {}
        common = {name: sources[name] for name in sources if name in record["sources"]}
        _require_same(results, "data", common, {name: record["sources"][name] for name in common})
        record = {**record, "sources": {**sources, **record["sources"]}}
    # older folders lack them
    cells = {name: before[name] for name in ("cells", "bindings") if before.get(name) is not None}
    return {**content, "suites": {**suites, suite: record}, **cells}


def write_merged(results: Path, info: dict[str, Any], suite: str, record: dict[str, Any]) -> dict[str, Any]:
    """Write what `merged_info` returns, under a lease so that concurrent calls keep each other's suites.

    Raises:
        ValueError: as `merged_info`: another call may have filled the folder in the meantime.
    """
    results.mkdir(parents=True, exist_ok=True)
    with _alone_in(results):
        merged = merged_info(results, info, suite, record)
        write_json(results / RESULTS, merged)
    return merged


def record_cell(results: Path, cell: Cell, sha256: str, *, examples: int, code: str) -> None:
    """Write hash and binding of a finished cell into results.json.

    Raises:
        ValueError: the file has changed since the cell was finished.
    """
    with _alone_in(results):
        content = _read(results)
        if content is None or content.get("cells") is None:  # a folder of an older version
            return
        before = content["cells"].get(str(cell), sha256)
        if before != sha256:
            raise ValueError(
                f"{results / str(cell)}.jsonl has changed since it was written, or is of another model: "
                "remove the file and call again to evaluate the cell again"
            )
        if str(cell) not in content["cells"]:
            content["cells"] = dict(sorted({**content["cells"], str(cell): sha256}.items()))
            if content.get("bindings") is not None:
                bound = cell_binding(content, str(cell), sha256=sha256, examples=examples, code=code)
                entry = {"examples": examples, "code": code, "sha256": bound}
                content["bindings"] = dict(sorted({**content["bindings"], str(cell): entry}.items()))
            write_json(results / RESULTS, content)


def is_recorded(results: Path, cell: Cell) -> bool:
    """Return whether results.json has the hash of a cell; True for older folders, which have no hashes."""
    cells = (_read(results) or {}).get("cells")
    return cells is None or str(cell) in cells


def forget_cell(results: Path, cell: Cell) -> None:
    """Remove the hash of a cell, whose file was removed, from results.json."""
    with _alone_in(results):
        content = _read(results)
        if content is not None and (content.get("cells") or {}).pop(str(cell), None) is not None:
            (content.get("bindings") or {}).pop(str(cell), None)
            write_json(results / RESULTS, content)


def _alone_in(results: Path) -> Lease:
    """Return the lease of an existing folder; other calls wait for it."""
    return Lease(
        results / LEASE,
        folder=results,
        purpose="writing its results.json",
        remedy="choose another --output",
        wait_seconds=MERGE_SECONDS,
    )


def _united_backend(results: Path, before: Any, now: dict[str, Any]) -> dict[str, Any]:
    """Merge how all calls of a folder ran the model; they must share dtype, engine and generation."""
    if before is None:
        raise ValueError(
            f"{results} was made by a version that did not record backend and dtype, so they cannot be "
            "compared with the present ones: choose another --output"
        )
    for name in ("name", "dtype"):
        _require_same(results, f"backend: {name}", before.get(name), now[name])
    calls = before.get("calls") or []
    for call in calls:
        _require_same(
            results, "backend: generation", call.get("generation"), now["calls"][0].get("generation")
        )
    return {**now, "calls": [*calls, *(call for call in now["calls"] if call not in calls)]}


def _read(results: Path) -> dict[str, Any] | None:
    path = results / RESULTS
    if not path.is_file():
        others = [] if not results.is_dir() else [entry.name for entry in results.iterdir()]
        others = [
            name for name in others if not name.startswith(".")
        ]  # hidden files belong to another call
        if set(others) - {PROBE_FOLDER, PROBE}:  # probe_evidence.py may have been here first
            raise ValueError(f"{results} exists and has no {RESULTS}: choose another --output")
        return None
    content = read_json_object(path, "choose another --output")
    try:
        if not isinstance(content["suites"], dict):
            raise TypeError("suites is not an object")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): choose another --output") from error
    return content


def _require_same(results: Path, name: str, before: Any, now: Any) -> None:
    """Raise ValueError, naming the first difference, unless a folder was made with the present values."""
    if before != now:
        raise ValueError(
            f"{results} was made with another {name}: {_difference(before, now)}; "
            "choose another --output, or repeat the options"
        )


def _difference(before: Any, now: Any) -> str:
    """Describe the first difference briefly."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}, key=lambda name: (name != "protocol", name)):
            if before.get(name) != now.get(name):
                return f"{name} {_difference(before.get(name), now.get(name))}"
    return f"{str(before)[:SHOWN_CHARACTERS]!r} there, {str(now)[:SHOWN_CHARACTERS]!r} now"


def require_same_probe(results: Path, info: dict[str, Any]) -> None:
    """Raise ValueError if the folder contains the probe of another model, or one with other options."""
    if not (results / PROBE).is_file():
        if (results / PROBE_FOLDER).exists():
            raise ValueError(f"{results / PROBE_FOLDER} exists without a {PROBE}: choose another --output")
        return
    before = read_probe_record(results)
    for name in PROBE_FIXED:
        _require_same(results, name, before.get(name), info[name])


def read_probe_record(results: Path) -> dict[str, Any]:
    """Read probe.json.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = results / PROBE
    if not path.is_file():
        raise ValueError(f"{results} has no {PROBE}: run megatron-exact probe into it")
    content = read_json_object(path, "probe the model again")
    try:
        if not isinstance(content["items"]["kinds"], dict):
            raise TypeError("items.kinds is not an object")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): probe the model again") from error
    return content


def read_probe_folder(path: str | Path) -> ResultFolder:
    """Read the record of a finished probe as a result folder without suites.

    Raises:
        ValueError: a missing or unfinished probe.
    """
    path = Path(path)
    info = read_probe_record(path)
    if not info.get("finished"):
        raise ValueError(
            f"the probe in {path} is not finished: run megatron-exact probe again with its options"
        )
    return ResultFolder(path=path, info=info, files={})


def read_probe_results(results: Path, kind: str) -> list[dict[str, Any]]:
    """Read the objects of the finished cells of a kind, in the order of the file, which may be missing.

    Raises:
        ValueError: a line that is not an object with the keys of a result.
    """
    path = results / PROBE_FOLDER / f"{kind}.jsonl"
    if not path.is_file():
        return []
    found = []
    for place, content in read_json_lines(path, "probe the model again"):
        try:
            require_shape(content, PROBE_RESULT)
        except ValueError as error:
            raise ValueError(
                f"{place} is not a result of the probe ({error}): probe the model again"
            ) from error
        found.append(content)
    return found


def cell_of(result: dict[str, Any]) -> ProbeCell:
    """Return the cell to which a result belongs."""
    return ProbeCell(kind=result["kind"], distance=result["distance"], context=result["context"])


def write_probe_results(results: Path, kind: str, found: Sequence[dict[str, Any]]) -> None:
    """Write the file of a kind."""
    lines = [json.dumps(result, ensure_ascii=True, allow_nan=False) for result in found]
    write_text(results / PROBE_FOLDER / f"{kind}.jsonl", "\n".join(lines) + "\n")
