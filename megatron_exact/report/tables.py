"""Markdown tables that read as plain text too, and plain ones for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]], *, left_columns: int = 1) -> str:
    """An aligned table.

    Args:
        head: names of the columns.
        body: lines of cells, as many as the head has.
        left_columns: so many columns are set flush left, the others flush right.

    Returns:
        Markdown with a final line break.

    Raises:
        ValueError: a line with another number of cells.
    """
    for cells in body:
        if len(cells) != len(head):
            raise ValueError(f"a line of {len(cells)} cells in a table of {len(head)} columns")
    lines = [list(head), *(list(cells) for cells in body)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]

    def joined(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * width if column < left_columns else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    return "\n".join([joined(lines[0]), joined(rule), *map(joined, lines[1:])]) + "\n"


def plain_table(head: Sequence[str], body: Sequence[Sequence[str]], *, left_columns: int = 1) -> list[str]:
    """Lines of an aligned table for a terminal: the head, a rule and the body.

    Args:
        head: names of the columns.
        body: lines of cells, as many as the head has.
        left_columns: so many columns are set flush left, the others flush right.
    """
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in (head, *body)
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
