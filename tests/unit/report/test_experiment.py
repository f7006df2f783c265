"""`tools/write_report.py`: the whole page from result files, and one line for whatever is wrong."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_exact.report.experiment import read_experiment, write_experiment_report
from tests import forked
from tests.unit.report.headless_browser import CHROMIUM, browser_tab
from tests.unit.report.small_comparisons import comparison, write_comparison, write_pack
from tests.unit.report.test_page_rendering import HOSTILE, Reader

SECTIONS = (
    *("What was compared", "Table 1: long-context generation", "Table 2: standard QA and reasoning"),
    *("Table 3: which weighting signal", "Figure 1: exposure by effective context"),
    *("Figure 3: evidence by distance and context", "Figure 4: relative lift"),
    *("Figure 5: evidence by distance", "Corpora, models and their licences"),
)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run_tool("write_report.py", *arguments)


def test_the_tool_writes_markdown_html_and_figures(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "comparison", comparison(has_probe=True))
    output = tmp_path / "report"
    done = run("--comparison", folder, "--pack", write_pack(tmp_path / "pack"), "--output", output)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(output / "report.md"), str(output / "report.html")]
    markdown, html = ((output / f"report.{kind}").read_text() for kind in ("md", "html"))
    for section in SECTIONS:
        assert f"\n## {section}\n" in markdown
        assert f">{section}</h2>" in html
    figures = {path.name for path in output.glob("*.png")}
    assert len(figures) == 5
    assert all(f"]({name})" in markdown for name in figures)
    assert html.count("data:image/png;base64,") == 5
    assert str(tmp_path) not in markdown + html


def test_a_wrong_input_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    done = run("--comparison", tmp_path, "--output", tmp_path / "report")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path} has no comparison.json: give a folder that megatron-exact compare has written\n"
    )
    assert not (tmp_path / "report").exists()


def test_without_inputs_everything_says_not_run(tmp_path: Path) -> None:
    markdown, _ = write_experiment_report(tmp_path, read_experiment([], [], []))
    page = markdown.read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        f"## {name}" for name in SECTIONS
    ]
    table = page.split("## Table 1")[1].split("## Table 2")[0]
    assert table.count("*not run*") == 28 * 6  # three cells a row; windows, tasks, examples
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_names_from_files_stay_text(tmp_path: Path) -> None:
    hostile = " ".join(HOSTILE)
    pages = []
    for number, name in enumerate((hostile, "x" * len(hostile))):
        licences = {"model": name, "corpora": [{"name": name, "licence": name}]}
        content = comparison(preset=None, name=name, licences=licences)
        content["notes"], content["methods"], content["lengths"] = [name], {name: name}, []
        content["pairing"]["statement"] = name
        folder = write_comparison(tmp_path / f"in{number}", content)
        files = read_experiment([str(folder)], [], [])
        pages.append(write_experiment_report(tmp_path / f"out{number}", files)[1].read_text())
    read, harmless = map(Reader, pages)
    assert read.tags == harmless.tags
    assert [name for name, _ in read.attributes] == [name for name, _ in harmless.attributes]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
def test_the_page_opens_in_a_browser(tmp_path: Path) -> None:
    compared = [
        str(write_comparison(tmp_path / "a", comparison(has_probe=True))),
        str(write_comparison(tmp_path / "b", comparison("random-same-mass", preset="qwen2.5-0.5b"))),
    ]
    files = read_experiment(compared, [str(write_pack(tmp_path / "pack"))], [])
    _, html = write_experiment_report(tmp_path / "report", files)
    leaking = tmp_path / "leaking.html"
    leaking.write_text(html.read_text().replace("<main>", '<main><img src="https://leak.invalid/x.png">'))
    with browser_tab(tmp_path / "profile") as tab:
        for width in (1280, 390):
            tab.open(html, width=width)
            # Whatever is too wide scrolls in a box of its own, never the page.
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            boxes = tab.evaluate(
                "[...document.querySelectorAll('.scroll')].map(b => [b.scrollWidth, b.clientWidth])"
            )
            assert len(boxes) > 8
            assert all(outer <= width for _, outer in boxes)
            assert width > 390 or any(inner > outer for inner, outer in boxes)
            images = tab.evaluate(
                "[...document.images].map(i => i.complete && i.naturalWidth > 0 && i.alt.length > 9)"
            )
            assert images == [True] * 5
            # numbers in figures stay readable on a phone: figures keep a size and scroll
            shown = tab.evaluate("[...document.images].map(i => i.clientWidth)")
            assert min(shown) >= 500
            assert [url for url in tab.requested() if not url.startswith(("file:", "data:"))] == []
            assert tab.complaints() == []
        tab.open(leaking, width=1280)
        tab.evaluate("document.images.length")
        assert any("Content Security Policy" in line for line in tab.complaints())


def contrast(one: str, other: str) -> float:
    """WCAG contrast of two colours `#rrggbb`."""
    from megatron_exact.report.figures import _luminance

    values = [_luminance([int(text[at : at + 2], 16) / 255 for at in (1, 3, 5)]) for text in (one, other)]
    return (max(values) + 0.05) / (min(values) + 0.05)


def test_text_has_contrast_in_light_and_dark() -> None:
    import re

    from megatron_exact.report.page import STYLESHEET

    schemes = re.findall(r":root \{(.*?)\}", STYLESHEET, flags=re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6});", scheme))
        for text in ("ink", "faint", "mark"):
            for ground in ("paper", "head"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
