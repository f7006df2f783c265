"""The exposure table: targets by effective context, all that a weighting rule has to know of the data.

`inspect_pack.py PACK --exposure-table exposure_table.json` writes it for a pack. Without one, an
`ExposureCounter` counts it from the batches that a stack would train on. The file is JSON of under 2 KB; it
is checked when it is read, and its sha256 binds all fields. numpy alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.targets import TargetLayout
from megatron_exact.exposure import (
    Weighting,
    bucket_index,
    bucket_lower_bounds,
    build_weighting,
    context_of_positions,
)
from megatron_exact.files import write_json
from megatron_exact.json_input import as_json, build_record, read_json_object

FORMAT_VERSION = 1
REMEDY = "write it again with `megatron-exact inspect PACK --exposure-table FILE` or ExposureCounter"

Labels = Literal["row", "document"]
"""Which token the target of an input is. `row`: the next token of the row, also where a document ends
(Megatron, transformers, TRL, OLMo-core). `document`: labels were shifted inside each document, so that
every target belongs to the document of its input (torchtitan's text loader)."""
LABELS: tuple[Labels, ...] = ("row", "document")


@dataclass(frozen=True, kw_only=True)
class ExposureTable:
    """Supervised training targets by bucket of effective context."""

    format_version: int
    """FORMAT_VERSION."""
    row_tokens: int
    """Inputs of a row, or the longest document of a padding-free batch: the largest effective context."""
    lower_bounds: tuple[int, ...]
    """Lower edges of the buckets, tokens."""
    counts: tuple[int, ...]
    """Targets of each bucket of effective context."""
    position_counts: tuple[int, ...] | None
    """Targets of each bucket of packed position + 1, for `packed-position`; None where not counted."""
    fingerprint: str | None
    """Fingerprint of the pack; None where batches were counted."""
    sha256: str
    """Hex sha256 of all other fields."""

    def weighting(self, rule: str = "exact", **parameters: Any) -> Weighting:
        """Apply a weighting rule, as training on Megatron does.

        Args:
            rule: a name in `exposure.RULES`.
            parameters: fields of `exposure.RuleParameters`: alpha, gamma, tau, cap, ...

        Raises:
            ValueError: an unknown rule, one that needs more than this table, or parameters out of range.
        """
        positions = self.position_counts
        return build_weighting(
            rule,
            self.counts,
            self.lower_bounds,
            self.row_tokens,
            position_counts=None if positions is None else lambda: np.array(positions, dtype=np.int64),
            **parameters,
        )


def make_table(
    row_tokens: int,
    counts: ArrayLike,
    *,
    position_counts: ArrayLike | None = None,
    fingerprint: str | None = None,
) -> ExposureTable:
    """Make a table of counts, [buckets] each, in the order of `bucket_lower_bounds(row_tokens)`.

    Raises:
        ValueError: counts of another number of buckets, negative, or all 0.
    """
    table = ExposureTable(
        format_version=FORMAT_VERSION,
        row_tokens=row_tokens,
        lower_bounds=tuple(bucket_lower_bounds(row_tokens).tolist()),
        counts=tuple(np.asarray(counts).tolist()),
        position_counts=None if position_counts is None else tuple(np.asarray(position_counts).tolist()),
        fingerprint=fingerprint,
        sha256="",
    )
    fault = _fault(table)
    if fault is not None:
        raise ValueError(f"an exposure table {fault}")
    return replace(table, sha256=_digest(table))


def table_of_pack(pack_dir: str | Path, *, source_root: str | Path | None = None) -> ExposureTable:
    """Make the table of a pack's training split, the counts of which every rule starts from.

    Packs of question-answer records get no counts by packed position.

    Raises:
        ValueError, FileNotFoundError: the pack or, where the plan alone does not say which documents
            continue, a corpus is damaged or missing.
    """
    manifest = read_manifest(pack_dir)
    positions = None
    if manifest.supervision is None:
        positions = TargetLayout(pack_dir, manifest, "train", source_root).position_counts()
    return make_table(
        manifest.row_tokens,
        manifest.splits["train"].exposure.counts,
        position_counts=positions,
        fingerprint=manifest.fingerprint,
    )


def write_table(table: ExposureTable, path: str | Path) -> None:
    """Write a table as JSON, atomically."""
    write_json(path, asdict(table))


def read_table(path: str | Path) -> ExposureTable:
    """Read and check a table.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, another format, a field that is missing, of another type or out of range, or a
            sha256 that does not match because the file was edited.
    """
    content = read_json_object(path, REMEDY)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}, this program reads {FORMAT_VERSION}: {REMEDY}"
        )
    table = build_record(ExposureTable, content, str(path), REMEDY)
    fault = _fault(table)
    if fault is None and table.sha256 != _digest(table):
        fault = f"says sha256 {table.sha256[:16]}... but its content gives {_digest(table)[:16]}..."
    if fault is not None:
        raise ValueError(f"{path} {fault}: it was edited or damaged, {REMEDY}")
    return table


def _digest(table: ExposureTable) -> str:
    content = {name: value for name, value in as_json(asdict(table)).items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _fault(table: ExposureTable) -> str | None:
    """Name a value that no table can have although its type is right; None if all are possible."""
    if table.row_tokens < 1:
        return f"has row_tokens {table.row_tokens}, which must be at least 1"
    bounds = tuple(bucket_lower_bounds(table.row_tokens).tolist())
    if table.lower_bounds != bounds:
        return f"has lower_bounds {table.lower_bounds}, rows of {table.row_tokens} tokens have {bounds}"
    for name in ("counts", "position_counts"):
        counts = getattr(table, name)
        if counts is not None and len(counts) != len(bounds):
            return f"has {len(counts)} {name} for {len(bounds)} buckets"
        if counts is not None and min(counts) < 0:
            return f"has {name} {counts}, which must not be negative"
        if counts is not None and sum(counts) != sum(table.counts):
            return f"has {sum(counts)} targets in {name} and {sum(table.counts)} in counts"
    if not any(table.counts):
        return "has no targets: count the data that will be trained on"
    return None


class ExposureCounter:
    """Counts an exposure table from batches, before training.

    Every batch costs one pass over its positions. A sample serves: the weights depend on the shares of the
    tail's buckets alone.

    Args:
        row_tokens: inputs of a row; for padding-free batches the longest document.
        labels: which token the target of an input is, see `Labels`.

    Raises:
        ValueError: `row_tokens` below 1, or unknown `labels`.
    """

    def __init__(self, row_tokens: int, *, labels: Labels = "row") -> None:
        require_labels(labels)
        self.row_tokens = row_tokens
        self.labels = labels
        buckets = bucket_lower_bounds(row_tokens).size
        self._counts = np.zeros(buckets, dtype=np.int64)
        self._position_counts: NDArray[np.int64] | None = np.zeros(buckets, dtype=np.int64)

    def add(
        self, position_ids: ArrayLike, supervised: ArrayLike | None = None, *, last_continues: Any = True
    ) -> None:
        """Count the targets of rows.

        Args:
            position_ids: integers [..., T], from 0 in each document; numpy or a CPU tensor.
            supervised: booleans [..., T], whether each target counts (`labels != -100`); None: all do.
            last_continues: whether the document of a row's last target continues after the row; a bool or
                booleans [...].

        Raises:
            ValueError: shapes that differ, or position ids that do not restart or are too large.
        """
        positions = np.asarray(position_ids)
        require_positions(positions, self.row_tokens)
        counted = np.ones(positions.shape, bool) if supervised is None else np.asarray(supervised, bool)
        if counted.shape != positions.shape:
            raise ValueError(
                f"supervised {counted.shape} and position_ids {positions.shape} differ in shape: both have "
                "one entry for each input"
            )
        if self.labels == "document":
            context = positions + 1
        else:
            context = context_of_positions(positions, last_continues=np.asarray(last_continues))
        self._count(self._counts, context[counted])
        if self._position_counts is not None and positions.shape[-1] == self.row_tokens:
            places = np.broadcast_to(np.arange(1, self.row_tokens + 1), positions.shape)
            self._count(self._position_counts, places[counted])
        else:
            self._position_counts = None  # such batches have no packed positions

    def add_lengths(self, lengths: Iterable[int]) -> None:
        """Count whole documents of these lengths in tokens, each target inside its document.

        A document of n tokens has n - 1 targets, of context 1 to n - 1. With `labels="document"` the
        lengths are numbers of inputs, and there are n targets.

        Raises:
            ValueError: a length below 1 or above `row_tokens`.
        """
        for length in lengths:
            if not 1 <= length <= self.row_tokens:
                raise ValueError(
                    f"a document of {length} tokens does not fit rows of {self.row_tokens}: every length "
                    f"must lie in [1, {self.row_tokens}]"
                )
            targets = length if self.labels == "document" else length - 1
            self._count(self._counts, np.arange(1, targets + 1))
        self._position_counts = None

    def table(self) -> ExposureTable:
        """Return the table of everything counted so far.

        Raises:
            ValueError: nothing was counted.
        """
        return make_table(self.row_tokens, self._counts, position_counts=self._position_counts)

    def _count(self, counts: NDArray[np.int64], context: NDArray[np.integer]) -> None:
        counts += np.bincount(bucket_index(context, self.row_tokens), minlength=counts.size)


def require_labels(labels: str) -> None:
    """Raise ValueError for a name that is not in LABELS."""
    if labels not in LABELS:
        raise ValueError(f"labels is {labels!r}: choose {' or '.join(map(repr, LABELS))}")


def require_positions(positions: Any, row_tokens: int) -> None:
    """Check position ids, numpy or torch: from 0, up by 1 or back to 0, and below `row_tokens`.

    Args:
        positions: integers [..., T]; every row [T] begins a document.
        row_tokens: largest number of inputs of a document.

    Raises:
        ValueError: other position ids, or no integers.
    """
    kind = str(positions.dtype)
    if "int" not in kind or positions.ndim == 0 or positions.shape[-1] == 0:
        raise ValueError(
            f"position_ids of dtype {kind} and shape {tuple(positions.shape)}: integers [..., T] are needed"
        )
    after, before = positions[..., 1:], positions[..., :-1]
    if bool((positions[..., 0] != 0).any()) or bool(((after != 0) & (after != before + 1)).any()):
        raise ValueError(
            "position_ids must begin each row with 0 and then go up by 1 or back to 0, where a document "
            "begins: give positions inside documents, not offsets of a learned embedding or of a cache"
        )
    if int(positions.max()) >= row_tokens:
        raise ValueError(
            f"position_ids reach {int(positions.max())}, the exposure table is of {row_tokens} tokens: "
            "it was counted for another window, count one for this"
        )
