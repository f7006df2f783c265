"""A cell that several processes evaluate: the file of each share, and the cell that they make together.

    RESULTS/.shards/<suite>/<task>/<length>/<I>-of-<N>.jsonl

The first line is `{"shard": "I/N", "cell", "examples", "sha256"}`: examples of the whole cell, and the hash
of the lines that follow. These are the share's lines of the cell's file, verbatim. Example k of the cell is
line k // N of share k mod N, so a cell that is put together is bit-identical to one that a single process
has written, where the model's answer to a prompt does not depend on the batch that it is in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_exact.evaluation.result_folders import Cell, Example, cell_path
from megatron_exact.files import read_regular_file, write_text
from megatron_exact.json_input import parse_json_object
from megatron_exact.shares import Share

FOLDER = ".shards"


def shard_path(results: Path, cell: Cell, share: Share) -> Path:
    """Return where the examples of a share of a cell lie."""
    return results / FOLDER / str(cell) / f"{share.index}-of-{share.of}.jsonl"


def write_shard(results: Path, cell: Cell, share: Share, own: Sequence[Example], examples: int) -> None:
    """Write the examples of a share, atomically.

    Args:
        results: the result folder.
        cell: which.
        share: of this process.
        own: its examples, in the order of the cell.
        examples: how many the whole cell has.
    """
    assert len(own) == share.size(examples), (cell, share, len(own), examples)
    lines = [json.dumps(example.to_json(cell), ensure_ascii=True, allow_nan=False) for example in own]
    body = "".join(line + "\n" for line in lines)
    head = {"shard": str(share), "cell": str(cell), "examples": examples, "sha256": _sha256(body)}
    write_text(shard_path(results, cell, share), json.dumps(head) + "\n" + body)


def read_shard(results: Path, cell: Cell, share: Share) -> tuple[list[str], int] | None:
    """Return the lines of a share and the number of examples of its cell; None where it is not there.

    Raises:
        ValueError: a damaged file.
    """
    path = shard_path(results, cell, share)
    if not path.is_file():
        return None
    remedy = f"remove it and run --shard {share} again"
    head, _, body = read_regular_file(path).decode("utf-8", errors="replace").partition("\n")
    content = parse_json_object(head, f"line 1 of {path}", remedy)
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


def missing_shards(results: Path, cell: Cell, of: int) -> list[Share]:
    """Return the shares of a cell that are not there."""
    shares = [Share(index=index, of=of) for index in range(of)]
    return [share for share in shares if not shard_path(results, cell, share).is_file()]


def merge_cell(results: Path, cell: Cell, of: int) -> None:
    """Write the file of a cell from its shares, all of which are there.

    Raises:
        ValueError: a damaged share, or shares of cells with other numbers of examples; named.
    """
    shares = [Share(index=index, of=of) for index in range(of)]
    parts: list[list[str]] = []
    counts: list[int] = []
    for share in shares:
        found = read_shard(results, cell, share)
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


def remove_shards(results: Path, cell: Cell, of: int) -> None:
    """Remove the files of a cell that is put together, and folders that are empty then."""
    for index in range(of):
        shard_path(results, cell, Share(index=index, of=of)).unlink(missing_ok=True)
    folder = results / FOLDER / str(cell)
    while folder != results:
        try:
            folder.rmdir()
        except OSError:  # not empty, or not there: another process is a step ahead
            return
        folder = folder.parent


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
