"""The licence that a model folder states in its own card."""

from __future__ import annotations

import re
from pathlib import Path

CARD = "README.md"
LARGEST_HEAD = 64 << 10
"""Characters of a card that are looked at: its front matter is at the top."""


def stated_licence(folder: str | Path) -> str | None:
    """`license` (or `license_name` where that says `other`) of the card's front matter; None without.

    The front matter is not parsed as YAML: one line `license: apache-2.0` is all that is looked for.
    """
    card = Path(folder) / CARD
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(LARGEST_HEAD)
    matter = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, flags=re.DOTALL)
    if matter is None:
        return None
    values = dict(
        re.findall(r"^(license|license_name):[ \t]*[\"']?([^\s\"'#]+)", matter[1], flags=re.MULTILINE)
    )
    licence = values.get("license")
    return values.get("license_name", licence) if licence == "other" else licence
