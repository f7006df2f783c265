"""Faults of results, comparisons and reports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.evaluation.comparison import COMPARISON, content_sha256, write_comparison
from tests.faults import matrix
from tests.faults.data import DEEP, Damage, _fifo, _link, _replace, _truncate, wait_for
from tests.faults.kit import Kit
from tests.faults.matrix import Row, refused

CELL = "b/ruler/vt/1024.jsonl"
SIZES = ("--resamples", 200)


def _compare(_: Kit, folder: Path) -> Sequence[Any]:
    sides = ("--baseline", folder / "a", "--treatment", folder / "b")
    return ("compare_runs.py", *sides, *SIZES, "--output", folder / "new")


def _report(_: Kit, folder: Path) -> Sequence[Any]:
    return ("write_report.py", "--comparison", folder, "--output", folder / "new")


def _lines(change: Callable[[list[dict[str, Any]]], object], name: str = CELL) -> Damage:
    """Change the examples of a cell, and sign it again, as whoever can compute a hash can."""

    def damage(folder: Path) -> None:
        from tests.unit.evaluation.written_results import sign_cells

        path = folder / name
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        change(lines)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sign_cells(folder / name.split("/")[0])

    return damage


def _first(**fields: Any) -> Damage:
    return _lines(lambda lines: lines[0].update(fields))


def _text_of_score(text: str) -> Damage:
    """Put a number that Python would not write into the first example."""

    def damage(folder: Path) -> None:
        from tests.unit.evaluation.written_results import sign_cells

        path = folder / CELL
        path.write_text(path.read_text().replace('"score": 1', f'"score": {text}', 1))
        sign_cells(folder / "b")

    return damage


def _info(change: Callable[[dict[str, Any]], object], name: str = "b/results.json") -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text())
        change(content)
        if name == COMPARISON:  # signed again: a comparison that contradicts itself is found all the same
            content["content_sha256"] = content_sha256(content)
        path.write_text(json.dumps(content))

    return damage


def results_row(name: str, fault: str, words: str, damage: Damage) -> Row:
    """Damaged results that are compared."""
    return refused(name, fault, words, _compare, damage=damage, material=lambda kit: kit.results)


def _edit_score(folder: Path) -> None:
    path = folder / CELL
    path.write_text(path.read_text().replace('"score": 0', '"score": 1', 1))


def _mix(folder: Path) -> None:
    shutil.copyfile(folder / "a/ruler/vt/1024.jsonl", folder / CELL)


def _duplicate(folder: Path) -> None:
    (folder / "b/ruler/vt copy").mkdir()
    shutil.copyfile(folder / CELL, folder / "b/ruler/vt copy/1024.jsonl")


def _exchange(folder: Path) -> None:
    one, other = folder / "b/ruler/vt", folder / "b/ruler/cwe"
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)


RESULTS = [
    results_row("score-edited", "a score edited from 0 to 1", "has changed since", _edit_score),
    results_row("cell-of-another-model", "a cell of another model copied in", "has changed since", _mix),
    results_row("cell-duplicated", "a cell copied to a second task", "is not in results.json", _duplicate),
    results_row("cell-gone", "a cell deleted", "is missing", lambda folder: (folder / CELL).unlink()),
    results_row("cells-exchanged", "two tasks exchanged", "has changed since", _exchange),
    results_row("score-nan", "a score of NaN, hash fitting", "1024.jsonl", _text_of_score("NaN")),
    results_row(
        "score-infinity", "a score of Infinity, hash fitting", "1024.jsonl", _text_of_score("Infinity")
    ),
    results_row("score-1e400", "a score of 1e400, hash fitting", "1024.jsonl", _text_of_score("1e400")),
    results_row(
        "score-huge", "a score of 400 digits, hash fitting", "1024.jsonl", _text_of_score("1" * 400)
    ),
    results_row(
        "score-negative", "a score of -0.1, hash fitting", "score -0.1 is not in 0..1", _first(score=-0.1)
    ),
    results_row(
        "score-above", "a score of 1.5, hash fitting", "score 1.5 is not in 0..1", _first(score=1.5)
    ),
    results_row(
        "score-true", "a score of true, hash fitting", "score True is not in 0..1", _first(score=True)
    ),
    results_row(
        "score-text", 'a score of "1", hash fitting', "score '1' is not in 0..1", _first(score="1")
    ),
    results_row(
        "score-null", "a score of null, hash fitting", "score None is not in 0..1", _first(score=None)
    ),
    results_row(
        "score-missing", "no score, hash fitting", "score", _lines(lambda lines: lines[0].pop("score"))
    ),
    results_row(
        "example-twice",
        "an example twice, hash fitting",
        "comes twice",
        _lines(lambda lines: lines.append(lines[0])),
    ),
    results_row(
        "example-missing", "an example deleted, hash fitting", "b", _lines(lambda lines: lines.pop())
    ),
    results_row(
        "example-of-another-task",
        "an example of another task, hash fitting",
        "it says task",
        _first(task="cwe"),
    ),
    results_row(
        "example-of-another-prompt",
        "an example with another prompt, hash fitting",
        "prompt",
        _first(prompt_sha256="0" * 64),
    ),
    results_row("example-no-object", "a line that is a list", "1024.jsonl", _replace(CELL, b"[1]\n")),
    results_row("example-deep", "a line nested 100,000 deep", "1024.jsonl", _replace(CELL, DEEP)),
    results_row("cell-cut", "a cell cut in the middle of a line", "1024.jsonl", _truncate(CELL, -20)),
    results_row("cell-empty", "an empty cell", "1024.jsonl", _truncate(CELL, 0)),
    results_row("cell-junk", "a cell of binary junk", "1024.jsonl", _replace(CELL, bytes(range(256)))),
    results_row("cell-fifo", "a FIFO in place of a cell", "1024.jsonl", _fifo(CELL)),
    results_row("cell-device", "a cell that links to /dev/zero", "1024.jsonl", _link(CELL, "/dev/zero")),
    results_row(
        "results-gone",
        "results.json deleted",
        "results.json",
        lambda folder: (folder / "b/results.json").unlink(),
    ),
    results_row(
        "results-junk",
        "results.json of binary junk",
        "results.json",
        _replace("b/results.json", bytes(range(256))),
    ),
    results_row(
        "results-list", "results.json that is a list", "results.json", _replace("b/results.json", b"[]")
    ),
    results_row(
        "results-deep", "results.json nested 100,000 deep", "results.json", _replace("b/results.json", DEEP)
    ),
    results_row(
        "results-version",
        "results.json of format_version 99",
        "format_version 99",
        _info(lambda content: content.update(format_version=99)),
    ),
    results_row(
        "results-hashes",
        "results.json whose hashes are a list",
        "cells is not an object",
        _info(lambda content: content.update(cells=[1])),
    ),
    results_row(
        "results-other-data",
        "sides of different data type",
        "dtype",
        _info(lambda content: content["backend"].update(dtype="bfloat16")),
    ),
]


def _entry(table: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    return _info(lambda content: change(content[table][0]), "comparison.json")


def _field(table: str, **fields: Any) -> Damage:
    return _entry(table, lambda entry: entry.update(fields))


def comparison_row(name: str, fault: str, words: str, damage: Damage) -> Row:
    """A damaged comparison that a report is made from."""
    return refused(name, fault, words, _report, damage=damage, material=lambda kit: kit.comparison)


def _raw(old: str, new: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "comparison.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return damage


COMPARISONS = [
    comparison_row(
        "delta-contradicts",
        "a delta that contradicts its sides",
        "its sides differ by",
        _field("aggregates", delta=40.0),
    ),
    comparison_row(
        "cell-delta-contradicts",
        "a cell's delta that contradicts its sides",
        "its sides differ by",
        _field("cells", delta=40.0),
    ),
    comparison_row(
        "lift-contradicts",
        "a relative lift that contradicts its sides",
        "relative_lift_percent",
        _field("aggregates", relative_lift_percent=400.0),
    ),
    comparison_row(
        "interval-upside-down",
        "an interval upside down",
        "ci95 begins at",
        _field("aggregates", ci95=[9.0, -9.0]),
    ),
    comparison_row(
        "interval-of-one", "an interval of one number", "comparison.json", _field("aggregates", ci95=[1.0])
    ),
    comparison_row(
        "interval-true",
        "an interval from false to true",
        "not a finite number",
        _field("aggregates", ci95=[False, True]),
    ),
    comparison_row(
        "points-above",
        "a side of 140 points",
        "outside of 0 to 100",
        _entry(
            "lengths",
            lambda entry: entry.update(
                treatment=140.0, delta=140.0 - entry["baseline"], relative_lift_percent=None
            ),
        ),
    ),
    comparison_row(
        "points-negative",
        "a side of -5 points",
        "outside of 0 to 100",
        _entry(
            "lengths",
            lambda entry: entry.update(
                baseline=-5.0, delta=entry["treatment"] + 5, relative_lift_percent=None
            ),
        ),
    ),
    comparison_row(
        "points-nan", "a side of NaN", "comparison.json", _raw('"baseline": 50', '"baseline": NaN')
    ),
    comparison_row(
        "points-400-digits",
        "a side of 400 digits",
        "comparison.json",
        _raw('"baseline": 50', f'"baseline": {"1" * 400}'),
    ),
    comparison_row(
        "points-text", "a side that is a text", "not a finite number", _field("cells", baseline="50")
    ),
    comparison_row("p-above", "a p value of 2", "p_value is 2", _field("aggregates", p_value=2)),
    comparison_row("p-true", "a p value of true", "p_value is True", _field("aggregates", p_value=True)),
    comparison_row("examples-negative", "-4 examples", "examples is -4", _field("aggregates", examples=-4)),
    comparison_row("examples-true", "true cells", "cells is True", _field("aggregates", cells=True)),
    comparison_row(
        "entry-twice",
        "an average twice",
        "comes twice",
        _info(lambda content: content["aggregates"].append(content["aggregates"][0]), "comparison.json"),
    ),
    comparison_row(
        "comparison-version",
        "comparison.json of format_version 99",
        "format_version 99",
        _info(lambda content: content.update(format_version=99), "comparison.json"),
    ),
    comparison_row(
        "comparison-junk",
        "comparison.json of binary junk",
        "comparison.json",
        _replace("comparison.json", bytes(range(256))),
    ),
    comparison_row(
        "comparison-deep",
        "comparison.json nested 100,000 deep",
        "comparison.json",
        _replace("comparison.json", DEEP),
    ),
    comparison_row(
        "comparison-list",
        "comparison.json that is a list",
        "comparison.json",
        _replace("comparison.json", b"[]"),
    ),
    comparison_row(
        "comparison-no-runs",
        "comparison.json without runs",
        "no runs",
        _info(lambda content: content.update(runs=[]), "comparison.json"),
    ),
    comparison_row(
        "comparison-fifo", "a FIFO in place of comparison.json", "comparison.json", _fifo("comparison.json")
    ),
]


# -- markup ----------------------------------------------------------------------------------------

MARKUP = (
    "<script>document.title='RAN'</script><img src=x onerror=\"document.title='RAN'\">"
    "<svg onload=\"document.title='RAN'\"></svg>\"'><iframe src=\"javascript:parent.document.title='RAN'\">"
    "</iframe>[a](javascript:alert(1)) ![b](http://127.0.0.1:9/c.png) | `d` <!-- e \n\n# f\n* g &lt;h&gt;"
)


def _with_markup(value: Any, key: str = "") -> Any:
    """The same value with markup in every text that the report may show."""
    fixed = {"regime", "kind", "suite"}  # names that choose a table; their markup has a row of its own
    if isinstance(value, dict):
        return {name: _with_markup(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_markup(inner, key) for inner in value]
    is_text = isinstance(value, str) and key not in fixed and not key.endswith(("_lengths", "sha256"))
    return value + MARKUP if is_text else value


def _markup_report(kit: Kit, folder: Path, change: Callable[[dict[str, Any]], Any]) -> tuple[Path, Path]:
    """Page and Markdown of a report of a comparison with markup."""
    kit.copy(kit.comparison, folder / "material")
    path = folder / "material/comparison.json"
    write_comparison(path.parent, change(json.loads(path.read_text())))
    label = "<b><script>document.title</script>label</b>"
    ended = matrix.run_tool(
        "write_report.py",
        ("--comparison", f"{label}={folder / 'material'}", "--output", folder / "new"),
        folder,
    )
    assert ended.code == 0, ended.output
    return folder / "new/report.html", folder / "new/report.md"


def _require_inert(page: Path, folder: Path) -> str:
    """Open a page in a real browser: nothing of it ran or was asked for. Returns its text."""
    from tests.unit.report.headless_browser import browser_tab

    with browser_tab(folder / "profile") as tab:
        tab.open(page, width=1000)
        assert "RAN" not in str(tab.evaluate("document.title")), "a script ran"
        assert (
            tab.evaluate(
                "document.querySelectorAll('script, iframe, [onerror], [onload], [onclick]').length"
            )
            == 0
        )
        assert tab.evaluate("document.querySelectorAll('a[href^=javascript]').length") == 0
        asked = [address for address in tab.requested() if not address.startswith(("file:", "data:"))]
        assert asked == []
        return str(tab.evaluate("document.body.textContent"))


def _markup_in_html(kit: Kit, folder: Path) -> None:
    page, _ = _markup_report(kit, folder, _with_markup)
    assert "onerror=" in _require_inert(page, folder), "the markup is not shown"


def _suite_markup(content: dict[str, Any]) -> dict[str, Any]:
    for table in ("aggregates", "lengths", "cells"):
        for entry in content[table]:
            entry["suite"] += MARKUP
            if "task" in entry:
                entry["task"] += MARKUP
    return content


def _markup_in_suites(kit: Kit, folder: Path) -> None:
    page, _ = _markup_report(kit, folder, _suite_markup)
    _require_inert(page, folder)


def _rendered(text: str) -> str:
    import markdown_it

    return markdown_it.MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(text)


def _require_inert_markdown(text: str) -> None:
    html = _rendered(text)
    for mark in ("<script", "<img src=x", "<svg", "<iframe", 'javascript:alert(1)"', '127.0.0.1:9/c.png"'):
        assert mark not in html, mark
    assert "onerror=" in html, "the markup is not shown"


def _markup_in_markdown(kit: Kit, folder: Path) -> None:
    _, text = _markup_report(kit, folder, _with_markup)
    _require_inert_markdown(text.read_text())


def _markup_in_comparison(kit: Kit, folder: Path) -> None:
    from megatron_exact.report.comparison_page import write_comparison_page

    kit.copy(kit.comparison, folder / "material")
    path = folder / "material/comparison.json"
    write_comparison(path.parent, _suite_markup(_with_markup(json.loads(path.read_text()))))
    _require_inert_markdown(write_comparison_page(folder / "material").read_text())


INERT = "no script runs, no address is asked for, the text is shown as text"
PAGES = [
    Row(
        name="markup-html",
        fault="markup and scripts in every text field of a comparison, report.html in headless Chromium",
        holds=INERT,
        seen="exit 0; title unchanged, no script, frame, handler or `javascript:` link, no request",
        run=_markup_in_html,
    ),
    Row(
        name="markup-suites",
        fault="markup and scripts in names of suites and tasks, report.html in headless Chromium",
        holds=INERT,
        seen="exit 0; title unchanged, no script, frame, handler or `javascript:` link, no request",
        run=_markup_in_suites,
    ),
    Row(
        name="markup-report-md",
        fault="the same in report.md, rendered as GitHub does",
        holds=INERT,
        seen="exit 0; no element, image or `javascript:` link",
        run=_markup_in_markdown,
    ),
    Row(
        name="markup-comparison-md",
        fault="the same in comparison.md, rendered as GitHub does",
        holds=INERT,
        seen="exit 0; no element, image or `javascript:` link",
        run=_markup_in_comparison,
    ),
]


# -- tools -----------------------------------------------------------------------------------------


def _full_disk(kit: Kit, folder: Path) -> None:
    kit.copy(kit.results, folder / "material")
    tool, *arguments = _compare(kit, folder / "material")
    before = matrix.contents(folder)
    ended = matrix.run_tool(tool, arguments, folder, first=lambda: matrix.limit_files(300))
    matrix.check_refusal(ended, "comparison.json")
    assert matrix.contents(folder) == before
    assert matrix.run_tool(tool, arguments, folder).code == 0


def _two_evaluations(kit: Kit, folder: Path) -> None:
    """A second call of one suite while the first is at it; another suite is let in."""
    from megatron_exact.folder_lock import Lease, held_output, output_lease

    (folder / "results").mkdir()

    def work() -> int:
        with held_output(folder / "results/ruler", "evaluating it", "choose another --output"):
            (folder / "there").touch()
            wait_for(folder / "go")
        return 0

    def second(_: int) -> None:
        wait_for(folder / "there")
        with held_output(folder / "results/nolima", "evaluating it"):
            pass
        with pytest.raises(ValueError, match="is in use by process"):
            Lease(output_lease(folder / "results/ruler"), folder=folder, purpose="x", remedy="x")
        (folder / "go").touch()

    ended = matrix.run_forked(work, folder, while_running=second)
    assert ended.code == 0, ended.output


TOOLS = [
    Row(
        name="compare-full-disk",
        fault="no file of compare_runs.py can grow beyond 300 bytes",
        holds="one line that names the file, nothing left; works once there is room",
        seen="exit 1, `comparison.json`; then exit 0",
        run=_full_disk,
    ),
    Row(
        name="evaluations-twice",
        fault="two evaluations of one suite at once into one folder",
        holds="the second is refused in one line; another suite may run beside",
        seen="`is in use by process`; the other suite is let in",
        run=_two_evaluations,
    ),
]

ROWS = [*matrix.quick(RESULTS), *matrix.quick(COMPARISONS), *PAGES, *TOOLS]
