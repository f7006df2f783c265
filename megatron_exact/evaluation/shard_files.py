"""A cell that several processes evaluate: the file of each share, and the cell that they make together.

    RESULTS/.shards/<suite>/<task>/<length>/<I>-of-<N>.jsonl

The first line is `{"shard": "I/N", "cell", "made_of", "examples", "sha256"}`: a hash of the model, the
options and the data (`fingerprint`), examples of the whole cell, and the hash of the lines that follow. A
share that was made of something else is as good as absent. The lines are the share's lines of the cell's
file, verbatim. Example k of the cell is
line k // N of share k mod N, so a cell that is put together is bit-identical to one that a single process
has written, where the model's answer to a prompt does not depend on the batch that it is in.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_exact.evaluation.result_folders import Cell, Example, cell_path
from megatron_exact.files import read_regular_file, write_text
from megatron_exact.json_input import parse_json_object
from megatron_exact.shares import Share

FOLDER = ".shards"
SHARD_FILE = re.compile(r"\d+-of-\d+\.jsonl")


def fingerprint(content: Any) -> str:
    """Return the hash of what answers depend on, for `made_of`; keys may come in any order."""
    return _sha256(json.dumps(content, sort_keys=True))


def shard_path(results: Path, cell: Cell, share: Share) -> Path:
    """Return where the examples of a share of a cell lie."""
    return results / FOLDER / str(cell) / f"{share.index}-of-{share.of}.jsonl"


def write_shard(
    results: Path, cell: Cell, share: Share, made_of: str, own: Sequence[Example], examples: int
) -> None:
    """Write the examples of a share, atomically.

    Args:
        results: the result folder.
        cell: which.
        share: of this process.
        made_of: fingerprint of its model, options and data.
        own: its examples, in the order of the cell.
        examples: how many the whole cell has.
    """
    assert len(own) == share.size(examples), (cell, share, len(own), examples)
    lines = [json.dumps(example.to_json(cell), ensure_ascii=True, allow_nan=False) for example in own]
    body = "".join(line + "\n" for line in lines)
    head = {
        "shard": str(share),
        "cell": str(cell),
        "made_of": made_of,
        "examples": examples,
        "sha256": _sha256(body),
    }
    write_text(shard_path(results, cell, share), json.dumps(head) + "\n" + body)


def read_shard(results: Path, cell: Cell, share: Share, made_of: str) -> tuple[list[str], int] | None:
    """Return the lines of a share and the number of examples of its cell.

    Returns:
        None where it is not there, or was made of another model, other options or other data; a warning
        names such a file.

    Raises:
        ValueError: a damaged file.
    """
    path = shard_path(results, cell, share)
    if not path.is_file():
        return None
    remedy = f"remove it and run --shard {share} again"
    head, _, body = read_regular_file(path).decode("utf-8", errors="replace").partition("\n")
    content = parse_json_object(head, f"line 1 of {path}", remedy)
    if content.get("made_of") != made_of:
        warnings.warn(
            f"{path} was made by another model, other options or other data (or an older version): it is "
            f"ignored, and --shard {share} makes it again",
            stacklevel=2,
        )
        return None
    examples = content.get("examples")
    lines = body.splitlines()
    is_intact = (
        (content.get("shard"), content.get("cell")) == (str(share), str(cell))
        and content.get("sha256") == _sha256(body)
        and type(examples) is int
        and len(lines) == share.size(examples)
    )
    if not is_intact:
        raise ValueError(f"{path} is damaged: its lines are not those that its first line names; {remedy}")
    assert type(examples) is int
    return lines, examples


def missing_shards(results: Path, cell: Cell, of: int, made_of: str) -> list[Share]:
    """Return the shares of a cell that are not there; a damaged one is, and `merge_cell` names it."""

    def is_there(share: Share) -> bool:
        try:
            return read_shard(results, cell, share, made_of) is not None
        except ValueError:
            return True

    return [share for share in (Share(index=index, of=of) for index in range(of)) if not is_there(share)]


def merge_cell(results: Path, cell: Cell, of: int, made_of: str) -> None:
    """Write the file of a cell from its shares, all of which are there.

    Raises:
        ValueError: a damaged share, or shares of cells with other numbers of examples; named.
    """
    shares = [Share(index=index, of=of) for index in range(of)]
    parts: list[list[str]] = []
    counts: list[int] = []
    for share in shares:
        found = read_shard(results, cell, share, made_of)
        assert found is not None, (cell, share)
        parts.append(found[0])
        counts.append(found[1])
    for share, count in zip(shares, counts, strict=True):
        if count != counts[0]:
            raise ValueError(
                f"{shard_path(results, cell, share)} is of a cell of {count} examples, that of share "
                f"{shares[0]} of {counts[0]}: remove both and run their --shard again"
            )
    lines = [parts[position % of][position // of] for position in range(counts[0])]
    write_text(cell_path(results, cell), "\n".join(lines) + "\n")


def remove_shards(results: Path, cell: Cell) -> None:
    """Remove all shares of a finished cell, of any number of processes, and folders that are empty then."""
    folder = results / FOLDER / str(cell)
    for path in folder.iterdir() if folder.is_dir() else ():
        if SHARD_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)
    while folder != results:
        try:
            folder.rmdir()
        except OSError:  # not empty, or not there: another process is a step ahead
            return
        folder = folder.parent


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
