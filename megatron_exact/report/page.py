"""What a page says, apart from how it is written down: headings, paragraphs, tables, figures, notes.

`markdown.py` and `html.py` render the same page. Text is plain text everywhere: both renderers escape it,
so a name from a user's file is shown as it is and never read as markup.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]")
"""Characters that no page may hold, or that turn the direction of the text around them."""


@dataclass(frozen=True)
class Code:
    """A name or command inside a text, such as `Code("results.json")`."""

    text: str


@dataclass(frozen=True)
class Strong:
    """Words that stand out inside a text."""

    text: str


@dataclass(frozen=True)
class Faint:
    """Words that stand back, such as `not run` in a cell."""

    text: str


Inline = str | Code | Strong | Faint
Text = Inline | tuple[Inline, ...]
"""One piece of text, or several one after another."""


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A heading below the title of the page."""

    text: Text
    """Its words."""
    level: int = 2
    """2 for a section, 3 for a part of one."""


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Running text."""

    text: Text
    """Without line breaks."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """A remark set apart: a limit, a warning."""

    text: Text
    """Without line breaks."""


@dataclass(frozen=True, kw_only=True)
class Bullets:
    """A list without order."""

    items: Sequence[Text]
    """One line each."""


@dataclass(frozen=True, kw_only=True)
class CodeBlock:
    """Commands or output, line by line."""

    text: str
    """Line breaks are kept."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells under a head; the first column names the rows."""

    head: Sequence[str]
    """Names of the columns."""
    body: Sequence[Sequence[Text]]
    """Rows of cells, as many as the head has."""
    caption: Text = ""
    """What the table shows, also for those who only hear it."""
    left_columns: int = 1
    """So many columns are set flush left, the others flush right."""

    def __post_init__(self) -> None:
        for cells in self.body:
            if len(cells) != len(self.head):
                raise ValueError(f"a row of {len(cells)} cells in a table of {len(self.head)} columns")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A PNG in the folder of the page."""

    file: str
    """Its name there."""
    alt: str
    """What it shows, in words, for those who do not see it."""
    caption: Text = ""
    """Below the figure."""


@dataclass(frozen=True, kw_only=True)
class Details:
    """Blocks that a reader unfolds, such as the numbers behind a figure."""

    summary: Text
    """What is to be unfolded."""
    blocks: Sequence[Block]
    """Shown then."""


Block = Heading | Paragraph | Note | Bullets | CodeBlock | Table | Figure | Details


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page."""

    title: str
    """First heading, and the title of the HTML page."""
    blocks: Sequence[Block]
    """From top to bottom."""


def pieces(text: Text) -> tuple[Inline, ...]:
    """The pieces of a text."""
    return text if isinstance(text, tuple) else (text,)


def one_line(text: str) -> str:
    """Text without line breaks, and U+FFFD for each control character."""
    return _CONTROLS.sub("\ufffd", re.sub(r"\s+", " ", text))


def lines_of(text: str) -> list[str]:
    """The lines of a block of code, without control characters."""
    return [_CONTROLS.sub("\ufffd", line.expandtabs()) for line in text.splitlines()]


def plain_text(text: Text) -> str:
    """A text without its markup."""
    return one_line("".join(piece if isinstance(piece, str) else piece.text for piece in pieces(text)))
