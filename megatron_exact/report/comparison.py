"""Tables of one comparison, from its `comparison.json` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_exact.files import write_text
from megatron_exact.json_input import read_json_object
from megatron_exact.report.compared import check_comparison
from megatron_exact.report.markdown import escape_markdown
from megatron_exact.report.tables import markdown_table

COMPARISON = "comparison.json"
PAGE = "comparison.md"


def write_comparison_page(folder: str | Path) -> Path:
    """Write `comparison.md` beside `comparison.json`; returns its path.

    Raises:
        ValueError: comparison.json is damaged.
    """
    folder = Path(folder)
    content = read_comparison(folder / COMPARISON)
    path = folder / PAGE
    write_text(path, comparison_page(content))
    return path


def read_comparison(path: str | Path) -> dict[str, Any]:
    """Content of a comparison.json.

    Raises:
        ValueError: it is no such file.
    """
    content = read_json_object(path, "run compare_runs.py again")
    check_comparison(Path(path), content)
    return content


def comparison_page(content: dict[str, Any]) -> str:
    """The Markdown page; texts of the file are shown as text, whatever they contain."""
    probe, statement = content.get("probe"), content["pairing"]["statement"]
    described = {**content["methods"], **(probe["methods"] if probe else {})}
    methods = "".join(
        f"* **{escape_markdown(name)}**: {escape_markdown(text)}\n" for name, text in described.items()
    )
    suites = [
        "## Macro averages, points\n\n" + aggregates_table(content["aggregates"]),
        "## Counts and tests\n\n" + _tests_table(content["aggregates"]),
        "## By length, points\n\n" + _lengths_table(content["lengths"]),
    ]
    sections = [
        "# Comparison",
        escape_markdown(f"{statement[:1].upper()}{statement[1:]}."),
        "".join(f"* {escape_markdown(note)}\n" for note in content["notes"]),
        _runs_table(content["runs"]),
        *(suites if content["aggregates"] else []),
        "## Evidence probe, nats and points\n\n" + probe_table(probe) if probe else "",
        "## How the numbers were made\n\n" + methods,
    ]
    return "\n\n".join(section.strip("\n") for section in sections if section) + "\n"


def aggregates_table(aggregates: Sequence[dict[str, Any]]) -> str:
    """Suite, regime, both sides, delta with its interval; an interval that holds 0 is marked so."""
    body = [
        [
            _text(entry["suite"]),
            _text(entry["regime"]),
            str(entry["cells"]),
            f"{entry['examples']:,}",
            *_numbers(entry),
        ]
        for entry in aggregates
    ]
    head = ["suite", "regime", "cells", "examples", "baseline", "treatment", "delta", "95 % interval"]
    return markdown_table([*head, "relative lift"], body, left_columns=2)


def probe_table(probe: dict[str, Any]) -> str:
    """What the evidence contributes by kind and range of distances: margin in nats, answers in points."""
    body = [
        [
            _text(entry["kind"]),
            f"{entry['distances'][0]:,} to {entry['distances'][1]:,}",
            measure,
            f"{entry['items']:,}",
            f"{values['baseline']:.3f}",
            f"{values['treatment']:.3f}",
            f"{values['delta']:+.3f}",
            f"[{values['ci95'][0]:+.3f}, {values['ci95'][1]:+.3f}]",
        ]
        for entry in probe["kinds"]
        for measure in ("effect", "answer_effect")
        for values in [entry["measures"][measure]]
    ]
    head = ["kind", "distances", "measure", "items", "baseline", "treatment", "delta", "95 % interval"]
    return markdown_table(head, body, left_columns=3)


def _tests_table(aggregates: Sequence[dict[str, Any]]) -> str:
    head = ["suite", "regime", "cells + / - / =", "examples + / - / =", "p", "p (Holm)"]
    body = [
        [
            _text(entry["suite"]),
            _text(entry["regime"]),
            _signs(entry["cell_signs"]),
            _signs(entry["example_signs"]),
            f"{entry['p_value']:.2g}",
            f"{entry['p_holm']:.2g}",
        ]
        for entry in aggregates
    ]
    if any(len(entry["pair_deltas"]) > 1 for entry in aggregates):
        head += ["p (pairs)", "delta of each pair"]
        for cells, entry in zip(body, aggregates, strict=True):
            p_value = entry["pair_level_p_value"]
            cells += [
                "-" if p_value is None else f"{p_value:.2g}",
                ", ".join(f"{delta:+.2f}" for delta in entry["pair_deltas"]),
            ]
    return markdown_table(head, body, left_columns=2)


def _lengths_table(lengths: Sequence[dict[str, Any]]) -> str:
    body = [
        [_text(entry["suite"]), str(entry["length"] or "none"), str(entry["cells"]), *_numbers(entry)]
        for entry in lengths
    ]
    head = ["suite", "tokens", "cells", "baseline", "treatment", "delta", "95 % interval", "relative lift"]
    return markdown_table(head, body)


def _runs_table(runs: Sequence[dict[str, Any]]) -> str:
    body = [
        [
            side,
            _text(run[side]["results"]),
            _weightings(run[side]),
            *(_text(run[side][key]) for key in ("seed", "iteration")),
        ]
        for run in runs
        for side in ("baseline", "treatment")
    ]
    return markdown_table(["side", "results", "token weighting", "seed", "iteration"], body, left_columns=3)


def _weightings(run: dict[str, Any]) -> str:
    """Rules of all trainings behind a model, first stage first."""
    stages = run.get("training") or [{"rule": run["token_weighting"]}]
    return _text(
        ", then ".join(dict.fromkeys(str(stage["rule"]) for stage in stages if stage["rule"])) or None
    )


def _numbers(entry: dict[str, Any]) -> list[str]:
    low, high = entry["ci95"]
    lift = entry["relative_lift_percent"]
    return [
        f"{entry['baseline']:.2f}",
        f"{entry['treatment']:.2f}",
        f"{entry['delta']:+.2f}",
        f"[{low:+.2f}, {high:+.2f}]" + (" holds 0" if low <= 0 <= high else ""),
        "-" if lift is None else f"{lift:+.1f} %",
    ]


def _signs(counts: dict[str, int]) -> str:
    return f"{counts['wins']:,} / {counts['losses']:,} / {counts['ties']:,}"


def _text(value: Any) -> str:
    return "unknown" if value is None else escape_markdown(str(value)).replace("|", "\\|")
