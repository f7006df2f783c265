"""Results that others can check: verification of result folders, and answers in the authors' own formats.

`export_predictions` writes what the scorers of the benchmarks' authors read:

    ruler/<length>/<task>.jsonl                     NVIDIA/RULER: `evaluate.py --data_dir ruler/<length>`
    nolima/<task>/<length>/<question>_<book>.json   adobe-research/NoLiMa: `gather_results.ipynb`

Both read more than result folders contain. `input` of RULER is the prompt where the evaluation kept prompts
(`--keep-prompts`) and otherwise empty; its scorer shows it and computes nothing from it. NoLiMa's
`completion_tokens` is 0, because generated tokens are not counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.evaluation.pairing import read_verified, suite_record, unbound
from megatron_exact.evaluation.result_folders import (
    Cell,
    ResultFolder,
    read_result_folder,
)
from megatron_exact.evaluation.suites.suite import find_suite
from megatron_exact.files import sha256_file, write_json, write_text
from megatron_exact.json_input import read_json_lines

EXPORTED = ("ruler", "nolima")


@dataclass(frozen=True, kw_only=True)
class VerifiedCell:
    """What was found about one cell."""

    name: str
    """`str(Cell)`, or a file of a comparison."""
    examples: int
    """Examples read; 0 where they could not be."""
    checks: tuple[str, ...]
    """What was verified."""
    fault: str
    """Empty, or what is wrong."""
    unverified: str = ""
    """Empty, or what could not be verified, and why."""


def verify_results(path: str | Path) -> Iterator[VerifiedCell]:
    """Verify the cells of a result folder one by one: hash, number, model and options, prompts, scores.

    Where results.json is missing, or its cells are not those of the folder, there is one entry for all.
    """
    try:
        folder = read_result_folder(path)
    except ValueError as error:
        yield VerifiedCell(name=str(path), examples=0, checks=(), fault=str(error))
        return
    for cell in folder.files:
        try:
            examples = len(read_verified(folder, cell).ids)
        except ValueError as error:
            yield VerifiedCell(name=str(cell), examples=0, checks=(), fault=str(error))
            continue
        rows = [row for _, row in read_json_lines(folder.files[cell], "evaluate the cell again")]
        done = {
            "hash": str(cell) in folder.cell_hashes,
            "model, protocol and code": str(cell) in folder.bindings,
            **_scores_checked(folder, cell, rows),
            "prompts": all(row.get("prompts") is not None for row in rows),
        }
        yield VerifiedCell(
            name=str(cell),
            examples=examples,
            checks=tuple(check for check, is_done in done.items() if is_done),
            fault="",
            unverified=unbound(folder),
        )


def _scores_checked(folder: ResultFolder, cell: Cell, rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Return which scores were computed again: all, or for standard QA those of wrong choices."""
    if cell.suite not in (folder.info.get("suites") or {}):
        return {}
    suite, record = find_suite(cell.suite), suite_record(folder, cell.suite)
    found = [
        suite.score_by_record(cell.task, row["prediction"], row["references"], record) is not None
        for row in rows
    ]
    return {"scores": True} if all(found) else {"scores of wrong choices": any(found)}


def verify_compared(content: dict[str, Any]) -> Iterator[VerifiedCell]:
    """Verify that the files that a comparison was made from are those that lie there now."""
    for run in content["runs"]:
        for side in ("baseline", "treatment"):
            folder = Path(str(run[side].get("results")))
            files = run[side].get("files") or {}
            if not files:
                fault = "the comparison has no hashes of its results: run megatron-exact compare again"
                yield VerifiedCell(name=str(folder), examples=0, checks=(), fault=fault)
            for name, digest in sorted(files.items()):
                path = folder / name
                fault = ""
                if not path.is_file():
                    fault = f"{path} is not there: verify where it was compared, or compare again"
                elif sha256_file(path) != digest:
                    fault = f"{path} has changed since it was compared: run megatron-exact compare again"
                yield VerifiedCell(name=str(path), examples=0, checks=("hash",), fault=fault)


def export_predictions(path: str | Path, output: str | Path) -> list[Path]:
    """Write the answers of RULER and NoLiMa in the formats of their authors.

    Args:
        path: result folder.
        output: folder to write into.

    Returns:
        The files.

    Raises:
        ValueError: a damaged folder, or one without these suites.
    """
    folder, written = read_result_folder(path), []
    for cell in folder.files:
        if cell.suite not in EXPORTED:
            continue
        read_verified(folder, cell)
        lines = [row for _, row in read_json_lines(folder.files[cell], "evaluate the cell again")]
        write = _write_ruler if cell.suite == "ruler" else _write_nolima
        written += write(Path(output), folder, cell, lines)
    if not written:
        raise ValueError(f"{path} has no {' and no '.join(EXPORTED)}: evaluate one of them first")
    return written


def _write_ruler(output: Path, folder: ResultFolder, cell: Cell, lines: list[dict[str, Any]]) -> list[Path]:
    rows = [
        {
            "index": number,
            "pred": line["prediction"],
            "input": "".join(line.get("prompts") or [""]),
            "outputs": line["references"],
            "others": {"id": line["id"]},
            "truncation": -1,
            "length": line["prompt_tokens"],
        }
        for number, line in enumerate(lines)
    ]
    path = output / "ruler" / str(cell.length) / f"{cell.task}.jsonl"
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return [path]


def _write_nolima(
    output: Path, folder: ResultFolder, cell: Cell, lines: list[dict[str, Any]]
) -> list[Path]:
    """One file for each question and book, as their code writes."""
    record = suite_record(folder, cell.suite)
    metric = (record.get("metrics") or {}).get(cell.task, "contains")
    model = (folder.info.get("model") or {}).get("name")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        question = line.get("question") or find_suite(cell.suite).drawn_with(str(line["id"]))
        groups.setdefault((question, str(line.get("book") or "")), []).append(line)
    written = []
    for (question, book), members in sorted(groups.items()):
        name = f"{question}_{Path(book).stem}"
        content = {
            "eval_name": f"{model}_book_{name}",
            "test_name": question,
            "model_name": model,
            "haystack_path": book,
            "context_length": cell.length,
            "document_depth_percent_min": 0,
            "document_depth_percent_max": 100,
            "document_depth_percent_intervals": record.get("placements"),
            "metric": metric,
            "protocol": record.get("protocol"),
            "result_dir": "",
            "results": [
                {
                    "metric": int(line["score"]),
                    "response": line["prediction"],
                    "gold_answers": line["references"],
                    "placement_metadata": {"depth": line.get("depth")},
                    "prompt_tokens": line["prompt_tokens"],
                    "completion_tokens": 0,
                }
                for line in sorted(members, key=lambda line: float(line.get("depth") or 0))
            ],
        }
        path = output / "nolima" / cell.task / str(cell.length) / f"{name}.json"
        write_json(path, content)
        written.append(path)
    return written
