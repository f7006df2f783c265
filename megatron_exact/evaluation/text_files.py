"""Texts that a user names by an option."""

from __future__ import annotations

from pathlib import Path


def read_text_file(path: Path, option: str) -> str:
    """The text of a file.

    Args:
        path: of the file.
        option: that names it, such as `--essays`.

    Raises:
        ValueError: it is no file, or not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{option} {path}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is not UTF-8 ({error.reason} at byte {error.start})") from error
