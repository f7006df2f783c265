"""Generated examples on disk, so that both arms of a comparison and a restart share one generation.

An entry is named by the hash of everything that decides its content. The content would come out the same
without the cache (every cell has a seed of its own): it saves time, it is not what pairs two runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_exact.files import write_text
from megatron_exact.json_input import parse_json_object

FORMAT = 1
Document = dict[str, Any]


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/megatron-exact/examples`, or under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "megatron-exact" / "examples"


def cached_documents(
    cache: Path, key: Mapping[str, Any], make: Callable[[], list[Document]]
) -> list[Document]:
    """The documents of a key, made if they are not there; a damaged entry is made again."""
    identity = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    path = cache / f"{hashlib.sha256(identity.encode()).hexdigest()}.jsonl"
    with contextlib.suppress(OSError, ValueError):
        lines = path.read_text(encoding="utf-8").splitlines()
        parsed = [parse_json_object(line, str(path), "it is made again") for line in lines[1:]]
        if parsed and lines[0] == identity and parsed[-1] == {"documents": len(lines) - 2}:
            return parsed[:-1]
    documents = make()
    body = [json.dumps(document) for document in documents]
    write_text(path, "\n".join([identity, *body, json.dumps({"documents": len(body)})]) + "\n")
    return documents


def cell_seed(seed: int, *names: object) -> int:
    """A seed of 64 bits for one cell: no cell depends on what ran before it."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
