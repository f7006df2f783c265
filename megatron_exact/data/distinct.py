"""No corpus twice: each pair of files is in a pack once, whatever its name.

A corpus under two names is more than tokens counted double. A folder of shards draws its validation split
with a key of its own, so a shard that is also a source by itself holds out other documents there than in
the folder: what one of the two evaluates on, the other trains on.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_exact.command_line import progress_bar
from megatron_exact.data.indexed import IndexedTokens
from megatron_exact.data.manifest_entries import Shard
from megatron_exact.data.shards import Corpus, ShardedTokens, parts_of
from megatron_exact.files import sha256_file

HEAD_BYTES = 1 << 16  # of two .bin files, compared before they are read whole

NamedPart = tuple[str, IndexedTokens]


def named_parts(corpora: Iterable[Corpus]) -> list[NamedPart]:
    """All pairs of files of some sources, each with a name for messages."""
    return [(_name(corpus, part), part) for corpus in corpora for part in parts_of(corpus)]


def _name(corpus: Corpus, part: IndexedTokens) -> str:
    if isinstance(corpus, ShardedTokens):
        return f"shard {part.prefix.name} of the folder {corpus.prefix}"
    return f"source {corpus.prefix}"


def require_distinct_files(files: Iterable[tuple[str, Sequence[Path]]]) -> None:
    """Refuse a file that is there twice: by its path, through links, or under two names of one file.

    Args:
        files: of each part, its name and its files.

    Raises:
        ValueError: the two parts.
    """
    seen: dict[Hashable, int] = {}
    names: list[str] = []
    for index, (name, paths) in enumerate(files):
        names.append(name)
        for path in paths:
            status = os.stat(path)
            identities: list[Hashable] = [os.path.realpath(path)]
            if status.st_ino:  # some network file systems have none
                identities.append((status.st_dev, status.st_ino))
            for identity in identities:
                first = seen.setdefault(identity, index)
                if first != index:
                    raise ValueError(
                        f"{name} is the same file as {names[first]} ({path.name}): name the corpus once"
                    )


def require_distinct_content(parts: Sequence[NamedPart], described: Sequence[Shard]) -> None:
    """Refuse a copy. Only pairs with equal indices can be copies; where a record does not tell, the
    tokens of those are compared, whole only if they begin alike.

    Args:
        parts: from `named_parts`.
        described: their manifest entries, in the same order.

    Raises:
        ValueError: the two parts.
    """

    def is_unrecorded(group: Sequence[int]) -> bool:
        return any(described[index].bin_sha256 is None for index in group)

    def content(index: int) -> str:
        return described[index].bin_sha256 or sha256_file(parts[index][1].bin_path)

    holding = [index for index, shard in enumerate(described) if shard.bin_bytes]  # empty shards are alike
    alike = _groups(holding, lambda i: (described[i].idx_sha256, described[i].bin_bytes))
    candidates = [
        same
        for group in alike
        for same in (_groups(group, lambda i: _head(parts[i][1])) if is_unrecorded(group) else [group])
    ]
    with progress_bar("comparing equal indices", len(candidates), "group") as bar:
        for group in candidates:
            for copies in _groups(group, content):
                first, second = (parts[index][0] for index in copies[:2])
                raise ValueError(f"{second} is a copy of {first}: name the corpus once")
            bar.update(1)


def _groups(items: Iterable[int], key: Callable[[int], Hashable]) -> Iterator[list[int]]:
    """Those of the items whose keys are equal, where there are at least two."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return (group for group in found.values() if len(group) > 1)


def _head(part: IndexedTokens) -> str:
    with open(part.bin_path, "rb") as stream:
        return hashlib.sha256(stream.read(HEAD_BYTES)).hexdigest()
