"""A page on disk: Markdown and HTML beside its figures."""

from __future__ import annotations

from pathlib import Path

from megatron_exact.files import write_text
from megatron_exact.report.html import html_page
from megatron_exact.report.markdown import markdown_page
from megatron_exact.report.page import Page


def write_page(folder: str | Path, page: Page, *, name: str = "report") -> tuple[Path, Path]:
    """Write `NAME.md` and `NAME.html` into the folder where the figures of the page already lie.

    Returns:
        Paths of the Markdown and of the HTML file.

    Raises:
        FileNotFoundError: a figure is missing.
    """
    markdown, html = Path(folder) / f"{name}.md", Path(folder) / f"{name}.html"
    content = html_page(page, folder)
    write_text(markdown, markdown_page(page))
    write_text(html, content)
    return markdown, html
