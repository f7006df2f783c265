"""The page of one comparison: its tables as Markdown, from its `comparison.json`.

`aggregates_table` and `probe_table` are also what `megatron-exact compare` prints on the terminal.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_exact.files import write_text
from megatron_exact.json_input import read_json_object
from megatron_exact.report.compared import COMPARISON, check_comparison, includes_zero, interval_text
from megatron_exact.report.page import escape_cell, escape_markdown, markdown_table

PAGE = "comparison.md"


def write_comparison_page(folder: str | Path) -> Path:
    """Write `comparison.md` beside `comparison.json`; return its path.

    Raises:
        ValueError: comparison.json is damaged.
    """
    folder = Path(folder)
    content = read_comparison(folder / COMPARISON)
    path = folder / PAGE
    write_text(path, comparison_page(content))
    return path


def read_comparison(path: str | Path) -> dict[str, Any]:
    """Read and check a comparison.json.

    Raises:
        ValueError: the file is not a comparison.
    """
    content = read_json_object(path, "run megatron-exact compare again")
    check_comparison(Path(path), content)
    return content


def comparison_page(content: dict[str, Any]) -> str:
    """Return the Markdown page; texts from the file are escaped, so that they are shown as text."""
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
    smallest = "".join(f"* {escape_markdown(line)}\n" for line in detectable_lines(content))
    sections = [
        "# Comparison",
        escape_markdown(f"{statement[:1].upper()}{statement[1:]}."),
        "".join(f"* {escape_markdown(note)}\n" for note in content["notes"]),
        _runs_table(content["runs"]),
        *(suites if content["aggregates"] else []),
        "## Evidence probe, nats and points\n\n" + probe_table(probe) if probe else "",
        f"## {DETECTABLE}\n\n{smallest}" if smallest else "",
        "## How the numbers were made\n\n" + methods,
    ]
    return "\n\n".join(section.strip("\n") for section in sections if section) + "\n"


def aggregates_table(aggregates: Sequence[dict[str, Any]]) -> str:
    """Return suite, regime, both sides, and delta with its interval, which is marked if it includes 0."""
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
    """Return the effect of the evidence by kind and range of distances: margin in nats, answers in
    points."""
    body = [
        [
            _text(entry["kind"]),
            f"{entry['distances'][0]:,} to {entry['distances'][1]:,}",
            measure,
            f"{entry['items']:,}",
            f"{values['baseline']:.3f}",
            f"{values['treatment']:.3f}",
            f"{values['delta']:+.3f}",
            _interval(values, 3),
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
        head += ["p (pairs)", "p (these seeds)", "95 % interval, these seeds", "delta of each pair"]
        for cells, entry in zip(body, aggregates, strict=True):
            p_values = (entry["pair_level_p_value"], entry.get("p_value_these_seeds"))
            cells += [
                *("-" if p_value is None else f"{p_value:.2g}" for p_value in p_values),
                _interval(entry, 2, "ci95_these_seeds") if "ci95_these_seeds" in entry else "-",
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
    """Return the rules of all trainings behind a model, first stage first; a repeated one stands once."""
    stages = run.get("training") or [{"rule": run["token_weighting"]}]
    rules = itertools.groupby(str(stage["rule"]) for stage in stages if stage["rule"])
    return _text(", then ".join(rule for rule, _ in rules) or None)


def _numbers(entry: dict[str, Any]) -> list[str]:
    has_zero = entry["ci95"] is not None and includes_zero(entry)
    lift = entry["relative_lift_percent"]
    return [
        f"{entry['baseline']:.2f}",
        f"{entry['treatment']:.2f}",
        f"{entry['delta']:+.2f}",
        _interval(entry, 2) + (" includes 0" if has_zero else ""),
        "-" if lift is None else f"{lift:+.1f} %",
    ]


def _interval(entry: dict[str, Any], digits: int, name: str = "ci95") -> str:
    """Return `interval_text` for Markdown, with the reason for a missing interval escaped."""
    reason = entry.get(f"{name}_reason")
    return interval_text({**entry, f"{name}_reason": reason and _text(reason)}, digits, name)


def _signs(counts: dict[str, int]) -> str:
    return f"{counts['wins']:,} / {counts['losses']:,} / {counts['ties']:,}"


def _text(value: Any) -> str:
    return "unknown" if value is None else escape_cell(str(value))


def detectable_lines(content: dict[str, Any]) -> list[str]:
    """Return one line for each average with the smallest difference that it could have shown.

    Empty for comparisons that do not record it.
    """
    lines = [
        f"{entry['suite']} {entry['regime']}: {entry['detectable']:.2f} points"
        for entry in content["aggregates"]
        if entry.get("detectable") is not None
    ]
    for kind in content.get("probe", {}).get("kinds", []):
        low, high = kind["distances"]
        for name in ("effect", "answer_effect"):
            value = kind["measures"].get(name, {}).get("detectable")
            if value is not None:
                unit = "nats" if name == "effect" else "points"
                lines.append(f"probe {kind['kind']} {low:,} to {high:,}, {name}: {value:.3g} {unit}")
    return lines


DETECTABLE = "Smallest difference that would have been seen with 80 % power"
"""Heading of `detectable_lines`."""


def power_lines(plan: dict[str, Any], effect: float | None) -> list[str]:
    """Return the plan of one average (`power.plan_record`) as text for a terminal."""
    deviations, kind = plan["standard_deviations"], plan["units"]
    parts = ", ".join(
        f"{'unknown' if value is None else format(value, '.3g')} ({name})"
        for name, value in (
            ("seeds", deviations["seeds"]),
            (kind, deviations["units"]),
            ("both together", deviations["both"]),
        )
    )
    plural = "s" * (plan["pairs"] != 1)
    lines = [
        f"{plan['average']}, from {plan['pairs']} pair{plural} of runs: standard deviations {parts}, "
        f"in {plan['unit']}",
        f"  smallest difference that is seen with {plan['power']:.0%} power:",
    ]
    factors = list(dict.fromkeys(one["examples_factor"] for one in plan["detectable"]))
    rows = [["seeds", *(f"{kind} x {factor}" for factor in factors)]]
    for number in dict.fromkeys(one["pairs"] for one in plan["detectable"]):
        found = [one for one in plan["detectable"] if one["pairs"] == number]
        mark = "" if number == 1 or found[0]["is_over_seeds"] else " *"
        cells = ["-" if one["effect"] is None else f"{one['effect']:.3g}{mark}" for one in found]
        rows.append([str(number), *cells])
    width = 2 + max(len(cell) for row in rows for cell in row)
    lines += ["    " + "".join(cell.rjust(width) for cell in row) for row in rows]
    if any("*" in cell for row in rows for cell in row):
        lines.append("    * the interval excludes 0, but a test over so few seeds cannot be significant")
    if plan["pairs"] == 1:
        lines.append(f"  about other {kind} only: one pair of runs says nothing about other seeds")
    for needed in plan["pairs_needed"] or ():
        what = "more seeds than can help" if needed["pairs"] is None else f"{needed['pairs']} seeds"
        simulated = (
            f" (simulated: {needed['simulated_power']:.0%} of comparisons significant)"
            if "simulated_power" in needed
            else ""
        )
        lines.append(
            f"  a difference of {effect:g} needs {what} with {kind} x {needed['examples_factor']}"
            f"{simulated}"
        )
    return lines
