"""A report page: its blocks, their Markdown and HTML forms, and the files it consists of.

A page contains headings, paragraphs, tables, figures and notes, independent of their format, and both
renderers take the same page. Text is plain text everywhere: both renderers escape it, so a name from a
user's file is shown as it is and never read as markup.

The HTML page is one file: figures are embedded, and there are no external addresses and no scripts. The
Content-Security-Policy in its head forbids a browser to fetch anything. The Markdown (GitHub's flavour) is
readable as plain text too.

The renderer is Python and not a jinja2 template. Most of its work is ids, classes of columns and figures as
data, which a template would have to get from the same Python. And `text_html` is the only way by which text
reaches the page, whereas a template is safe only as long as `|safe` is never used for markup inside a text.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from megatron_exact.files import write_text

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]")
"""Characters that a page must not contain, or that change the direction of the text around them."""
_ANYWHERE = re.compile(r"[\\`*<~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=[(\[:])|&(?=#?\w+;)")
"""Markup that is valid anywhere in a line; brackets only where a link would begin."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LONG_CELL = 44
"""Characters above which a column of a table breaks its lines."""
STYLESHEET = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --faint: #595959; --line: #c4c4c4;
  --head: #eef1f4; --mark: #0b4f8a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --paper: #16181b; --faint: #b4b4b4; --line: #4a4d52; --head: #23272c;
    --mark: #8cc4ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 0 1rem; }
main { padding-bottom: 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1.5rem 0 1rem; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 2.5rem 0 .75rem; padding-top: .5rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.08rem; margin: 1.75rem 0 .5rem; }
p, ul { margin: .6rem 0; max-width: 46rem; }
a { color: var(--mark); }
nav ul { list-style: none; padding: 0; max-width: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
nav a { display: inline-block; padding: .35rem 0; }
code { font: .9em ui-monospace, "Liberation Mono", Menlo, monospace; }
pre { background: var(--head); border: 1px solid var(--line); padding: .75rem; overflow-x: auto; }
.note { border-left: .3rem solid var(--mark); background: var(--head); padding: .5rem .9rem; }
.faint { color: var(--faint); font-style: italic; }
.scroll { overflow-x: auto; border: 1px solid var(--line); margin: .4rem 0 1.2rem; overflow-wrap: normal;
  width: fit-content; max-width: 100%; }
.scroll:focus-visible, a:focus-visible, summary:focus-visible { outline: 3px solid var(--mark);
  outline-offset: 2px; }
.caption { font-weight: 600; margin-bottom: .2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .5rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
th.left, td.left { text-align: left; }
td.wrap, th.wrap { white-space: normal; min-width: 12rem; max-width: 22rem; }
thead th { background: var(--head); vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 600; background: var(--paper); position: sticky; left: 0; }
@media (max-width: 40rem) { body { font-size: .97rem; } table { width: max-content; }
  tbody th { white-space: normal; max-width: 40vw; } }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; max-width: 52rem; height: auto; background: #fff; }
@media (max-width: 40rem) { figure img { width: 34rem; max-width: none; } }
figcaption { margin-top: .4rem; max-width: 46rem; }
details { margin: .25rem 0; }
summary { cursor: pointer; padding: .4rem 0; color: var(--mark); }
@media print {
  .scroll { overflow: visible; border: 0; }
  nav { display: none; }
  .caption, h1, h2, h3 { break-after: avoid; }
  tr, figure { break-inside: avoid; }
}
""".strip()


@dataclass(frozen=True)
class Code:
    """A name or command inside a text, such as `Code("results.json")`."""

    text: str


@dataclass(frozen=True)
class Strong:
    """Emphasized words inside a text."""

    text: str


@dataclass(frozen=True)
class Faint:
    """De-emphasized words, such as `not run` in a cell."""

    text: str


Inline = str | Code | Strong | Faint
Text = Inline | tuple[Inline, ...]
"""One piece of text, or several one after another."""


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A heading below the title of the page."""

    text: Text
    """Text of the heading."""
    level: int = 2
    """2 for a section, 3 for a part of one."""


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Running text."""

    text: Text
    """Text without line breaks."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """A remark set apart: a limit, a warning."""

    text: Text
    """Text without line breaks."""


@dataclass(frozen=True, kw_only=True)
class Bullets:
    """A list without order."""

    items: Sequence[Text]
    """One line each."""


@dataclass(frozen=True, kw_only=True)
class CodeBlock:
    """Commands or output, line by line."""

    text: str
    """Text whose line breaks are kept."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells under a head; the first column names the rows."""

    head: Sequence[str]
    """Names of the columns."""
    body: Sequence[Sequence[Text]]
    """Rows of cells, as many as the head has."""
    caption: Text = ""
    """What the table shows; screen readers read it."""
    left_columns: int = 1
    """Number of left-aligned columns; the others are right-aligned."""

    def __post_init__(self) -> None:
        for cells in self.body:
            if len(cells) != len(self.head):
                raise ValueError(f"a row of {len(cells)} cells in a table of {len(self.head)} columns")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A PNG in the folder of the page."""

    file: str
    """Name of the file."""
    alt: str
    """What the figure shows, in words, for screen readers."""
    caption: Text = ""
    """Caption below the figure."""


@dataclass(frozen=True, kw_only=True)
class Details:
    """Blocks that a reader can unfold, such as the numbers behind a figure."""

    summary: Text
    """Text of the folded line."""
    blocks: Sequence[Block]
    """Blocks that are shown when unfolded."""


Block = Heading | Paragraph | Note | Bullets | CodeBlock | Table | Figure | Details


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page."""

    title: str
    """First heading, and the title of the HTML page."""
    blocks: Sequence[Block]
    """Blocks from top to bottom."""


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


def pieces(text: Text) -> tuple[Inline, ...]:
    """Return the pieces of a text."""
    return text if isinstance(text, tuple) else (text,)


def one_line(text: str) -> str:
    """Return a text without line breaks, with U+FFFD for each control character."""
    return _CONTROLS.sub("\ufffd", re.sub(r"\s+", " ", text))


def lines_of(text: str) -> list[str]:
    """Return the lines of a block of code, without control characters."""
    return [_CONTROLS.sub("\ufffd", line.expandtabs()) for line in text.splitlines()]


def plain_text(text: Text) -> str:
    """Return a text without its markup."""
    return one_line("".join(piece if isinstance(piece, str) else piece.text for piece in pieces(text)))


def html_page(page: Page, folder: str | Path) -> str:
    """Return the whole page as HTML.

    Args:
        page: content of the page.
        folder: folder of the figures.

    Raises:
        FileNotFoundError: a figure is missing.
    """
    return _Renderer(Path(folder)).page(page)


class _Renderer:
    """Renders one page, and numbers what needs an id."""

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
        return f'<figure><div class="scroll" tabindex="0">{image}</div>{caption}</figure>'

    def new_id(self, words: str) -> str:
        """Return an id of plain letters that the page has not used yet."""
        base = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "part"
        name, number = base, 1
        while name in self.ids:
            number += 1
            name = f"{base}-{number}"
        self.ids.add(name)
        return name


def text_html(text: Text) -> str:
    """Return an escaped text with the markup of its pieces."""
    return "".join(_inline_html(part) for part in pieces(text)).strip()


def _inline_html(part: Inline) -> str:
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
    """Return the class attribute of each column's cells."""
    styles = []
    for column in range(len(table.head)):
        longest = max((len(plain_text(cells[column])) for cells in table.body), default=0)
        names = ["left"] * (column < table.left_columns) + ["wrap"] * (longest > LONG_CELL)
        styles.append(f' class="{" ".join(names)}"' if names else "")
    return styles


def markdown_page(page: Page) -> str:
    """Return the whole page as Markdown, with a final line break."""
    blocks = [f"# {_heading(page.title)}", *(_block(block) for block in page.blocks)]
    return "\n\n".join(blocks) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_heading(block.text)}"
        case Paragraph():
            return _at_start(_text(block.text))
        case Note():
            return f"> {_at_start(_text(block.text))}"
        case Bullets():
            return "\n".join(f"* {_at_start(_text(item))}" for item in block.items)
        case CodeBlock():
            lines = lines_of(block.text)
            fence = "`" * max(3, 1 + _longest_ticks(block.text))
            return "\n".join([fence, *lines, fence])
        case Table():
            return _table(block)
        case Figure():
            return _figure(block)
        case Details():
            inside = "\n\n".join(_block(inner) for inner in block.blocks)
            return f"<details><summary>{_text(block.summary)}</summary>\n\n{inside}\n\n</details>"


def _table(table: Table) -> str:
    body = [[_cell(_text(cell)) for cell in cells] for cells in table.body]
    head = [_cell(_text(name)) for name in table.head]
    lines = markdown_table(head, body, left_columns=table.left_columns).rstrip("\n")
    return f"{_at_start(_text(table.caption))}\n\n{lines}" if table.caption else lines


def _figure(figure: Figure) -> str:
    alt = re.sub(r"([\[\]])", r"\\\1", _text(figure.alt).replace("\\]", "]"))
    image = f"![{alt}]({quote(figure.file)})"
    return f"{image}\n\n{_at_start(_text(figure.caption))}" if figure.caption else image


def _heading(text: Text) -> str:
    """Escape number signs at the end of a text, which would close the heading."""
    return re.sub(r"(?=(?<!#)#+$)", r"\\", _text(text))


def escape_markdown(text: str) -> str:
    """Escape a text so that Markdown shows it, on one line, wherever it is used."""
    return _at_start(_inline_markdown(text, is_last=True))


def escape_cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table, where a bar would end the cell."""
    return _cell(escape_markdown(text))


def _cell(markdown: str) -> str:
    return markdown.replace("|", "\\|")


def _text(text: Text) -> str:
    *before, last = pieces(text)
    return "".join(
        [*(_inline_markdown(part, is_last=False) for part in before), _inline_markdown(last, is_last=True)]
    ).strip()


def _inline_markdown(part: Inline, *, is_last: bool) -> str:
    match part:
        case str():
            escaped = _ANYWHERE.sub(r"\\\g<0>", one_line(part))
            return escaped[:-1] + "\\]" if escaped.endswith("]") and not is_last else escaped
        case Code():
            content = one_line(part.text)
            ticks = "`" * (1 + _longest_ticks(content))
            pad = " " if content[:1] in ("`", " ") or content[-1:] in ("`", " ") else ""
            return f"{ticks}{pad}{content}{pad}{ticks}" if content else ""
        case Strong():
            return _marked_markdown(part.text, "**")
        case Faint():
            return _marked_markdown(part.text, "*")


def _marked_markdown(text: str, mark: str) -> str:
    """Put marks around a text; spaces at its ends stay outside, where Markdown needs them."""
    shown = text.strip()
    before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return f"{before and ' '}{mark}{_inline_markdown(shown, is_last=True)}{mark}{after and ' '}"


def _at_start(text: str) -> str:
    """Escape a mark at the beginning of a line that would make it a list, quote or heading."""
    found = re.match(r"[#>+=-]|\d+(?=[.)])", text)
    if found is None:
        return text
    place = 0 if not text[0].isdigit() else found.end()
    return text[:place] + "\\" + text[place:]


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]], *, left_columns: int = 1) -> str:
    """Return an aligned Markdown table.

    Args:
        head: names of the columns.
        body: lines of cells, as many as the head has.
        left_columns: number of left-aligned columns; the others are right-aligned.

    Returns:
        Markdown with a final line break.

    Raises:
        ValueError: a line with another number of cells.
    """
    for cells in body:
        if len(cells) != len(head):
            raise ValueError(f"a line of {len(cells)} cells in a table of {len(head)} columns")
    first, *others = _aligned([head, *body], left_columns, least_width=3)
    rule = [
        "-" * len(cell) if column < left_columns else "-" * (len(cell) - 1) + ":"
        for column, cell in enumerate(first)
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (first, rule, *others))


def plain_table(head: Sequence[str], body: Sequence[Sequence[str]], *, left_columns: int = 1) -> list[str]:
    """Return the lines of an aligned table for a terminal: the head, a rule and the body.

    Args:
        head: names of the columns.
        body: lines of cells, as many as the head has.
        left_columns: number of left-aligned columns; the others are right-aligned.
    """
    lines = ["  ".join(cells) for cells in _aligned([head, *body], left_columns)]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _aligned(lines: Sequence[Sequence[str]], left_columns: int, *, least_width: int = 0) -> list[list[str]]:
    """Pad the cells of each column to one width."""
    widths = [max(least_width, *map(len, column)) for column in zip(*lines, strict=True)]
    return [
        [
            cell.ljust(width) if column < left_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        for cells in lines
    ]
