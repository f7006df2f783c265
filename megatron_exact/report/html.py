"""A page as one HTML file: figures inside it, no address outside it, no script.

The Content-Security-Policy in its head forbids a browser to fetch anything, so a page that tried would
show it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_exact.report.page import (
    Block,
    Bullets,
    Code,
    CodeBlock,
    Details,
    Faint,
    Figure,
    Heading,
    Inline,
    Note,
    Page,
    Paragraph,
    Strong,
    Table,
    Text,
    lines_of,
    one_line,
    pieces,
    plain_text,
)
from megatron_exact.report.stylesheet import STYLESHEET

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LONG_CELL = 44
"""Characters; a column with a longer text breaks its lines."""


def html_page(page: Page, folder: str | Path) -> str:
    """The whole page.

    Args:
        page: what it says.
        folder: where the files of its figures lie.

    Raises:
        FileNotFoundError: a figure is missing.
    """
    return _Renderer(Path(folder)).page(page)


class _Renderer:
    """One page being written: it numbers what needs an id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids: set[str] = set()
        self.sections: list[tuple[str, str]] = []
        """(id, words) of the headings of level 2, for the list of contents."""

    def page(self, page: Page) -> str:
        title = escape(one_line(page.title))
        body = self.blocks(page.blocks)
        links = "".join(f'<li><a href="#{name}">{words}</a></li>\n' for name, words in self.sections)
        contents = f'<nav aria-label="Contents"><ul>\n{links}</ul></nav>\n' if links else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
            f"<title>{title}</title>\n<style>\n{STYLESHEET}\n</style>\n</head>\n<body>\n"
            f"<main>\n<h1>{title}</h1>\n{contents}{body}\n</main>\n</body>\n</html>\n"
        )

    def blocks(self, blocks: Sequence[Block]) -> str:
        return "\n".join(self.block(block) for block in blocks)

    def block(self, block: Block) -> str:
        match block:
            case Heading():
                name = self.new_id(plain_text(block.text))
                if block.level == 2:
                    self.sections.append((name, text_html(block.text)))
                return f'<h{block.level} id="{name}">{text_html(block.text)}</h{block.level}>'
            case Paragraph():
                return f"<p>{text_html(block.text)}</p>"
            case Note():
                return f'<p class="note" role="note">{text_html(block.text)}</p>'
            case Bullets():
                return "<ul>\n" + "".join(f"<li>{text_html(item)}</li>\n" for item in block.items) + "</ul>"
            case CodeBlock():
                return f'<pre tabindex="0"><code>{escape(chr(10).join(lines_of(block.text)))}</code></pre>'
            case Table():
                return self.table(block)
            case Figure():
                return self.figure(block)
            case Details():
                inside = self.blocks(block.blocks)
                return f"<details><summary>{text_html(block.summary)}</summary>\n{inside}\n</details>"

    def table(self, table: Table) -> str:
        classes = _column_classes(table)
        head = "".join(
            f'<th scope="col"{style}>{text_html(name)}</th>'
            for name, style in zip(table.head, classes, strict=True)
        )
        body = ""
        for cells in table.body:
            row = [f"<td{style}>{text_html(cell)}</td>" for cell, style in zip(cells, classes, strict=True)]
            row[0] = f'<th scope="row"{classes[0]}>{text_html(cells[0])}</th>'
            body += f"<tr>{''.join(row)}</tr>\n"
        name = self.new_id(plain_text(table.caption)[:40] or "table")
        caption, label = "", 'aria-label="table"'
        if table.caption:
            caption = f'<p class="caption" id="{name}">{text_html(table.caption)}</p>\n'
            label = f'aria-labelledby="{name}"'
        return (
            f'{caption}<div class="scroll" role="region" tabindex="0" {label}>\n<table {label}>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>"
        )

    def figure(self, figure: Figure) -> str:
        data = base64.b64encode((self.folder / figure.file).read_bytes()).decode("ascii")
        image = f'<img src="data:image/png;base64,{data}" alt="{escape(one_line(figure.alt))}">'
        caption = f"\n<figcaption>{text_html(figure.caption)}</figcaption>" if figure.caption else ""
        return f"<figure>{image}{caption}</figure>"

    def new_id(self, words: str) -> str:
        """An id of plain letters that the page has not used yet."""
        base = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "part"
        name, number = base, 1
        while name in self.ids:
            number += 1
            name = f"{base}-{number}"
        self.ids.add(name)
        return name


def text_html(text: Text) -> str:
    """A text, escaped, with the markup of its pieces."""
    return "".join(_inline(part) for part in pieces(text)).strip()


def _inline(part: Inline) -> str:
    match part:
        case str():
            return escape(one_line(part))
        case Code():
            return f"<code>{escape(one_line(part.text))}</code>"
        case Strong():
            return f"<strong>{escape(one_line(part.text))}</strong>"
        case Faint():
            return f'<span class="faint">{escape(one_line(part.text))}</span>'


def _column_classes(table: Table) -> list[str]:
    """The class attribute of each column's cells."""
    styles = []
    for column in range(len(table.head)):
        longest = max((len(plain_text(cells[column])) for cells in table.body), default=0)
        names = ["left"] * (column < table.left_columns) + ["wrap"] * (longest > LONG_CELL)
        styles.append(f' class="{" ".join(names)}"' if names else "")
    return styles
