"""A page as Markdown (GitHub's flavour) that reads as plain text too."""

from __future__ import annotations

import re
from urllib.parse import quote

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
)
from megatron_exact.report.tables import markdown_table

_ANYWHERE = re.compile(r"[\\`*<~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=[(\[:])|&(?=#?\w+;)")
"""What would be markup wherever it stands; brackets only where a link would begin."""


def markdown_page(page: Page) -> str:
    """The whole page, with a final line break."""
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
    body = [[_text(cell).replace("|", "\\|") for cell in cells] for cells in table.body]
    head = [_text(name).replace("|", "\\|") for name in table.head]
    lines = markdown_table(head, body, left_columns=table.left_columns).rstrip("\n")
    return f"{_at_start(_text(table.caption))}\n\n{lines}" if table.caption else lines


def _figure(figure: Figure) -> str:
    alt = re.sub(r"([\[\]])", r"\\\1", _text(figure.alt).replace("\\]", "]"))
    image = f"![{alt}]({quote(figure.file)})"
    return f"{image}\n\n{_at_start(_text(figure.caption))}" if figure.caption else image


def _heading(text: Text) -> str:
    """Text whose last number signs do not end the heading."""
    return re.sub(r"(?=(?<!#)#+$)", r"\\", _text(text))


def escape_markdown(text: str) -> str:
    """A text as Markdown that shows it, on one line, wherever it stands."""
    return _at_start(_inline(text, is_last=True))


def _text(text: Text) -> str:
    *before, last = pieces(text)
    return "".join(
        [*(_inline(part, is_last=False) for part in before), _inline(last, is_last=True)]
    ).strip()


def _inline(part: Inline, *, is_last: bool) -> str:
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
            return f"**{_inline(part.text.strip(), is_last=True)}**"
        case Faint():
            return f"*{_inline(part.text.strip(), is_last=True)}*"


def _at_start(text: str) -> str:
    """Text that begins a line, with the mark escaped that would make it something else."""
    found = re.match(r"[#>+=-]|\d+(?=[.)])", text)
    if found is None:
        return text
    place = 0 if not text[0].isdigit() else found.end()
    return text[:place] + "\\" + text[place:]


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
