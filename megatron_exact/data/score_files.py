"""Stored confidence scores of a pack: two arrays of float16 [rows, row_tokens] a split, in shards of rows.

```
DIR/scores.json                    what was scored with what, complete or not
DIR/train/long-00000.npy           CE_long of each target, nats
DIR/train/difference-00000.npy     d = CE_long - CE_short, nats; the weights depend on it alone
```

The difference is stored instead of the short loss: two rounded losses of about 5 nats would leave an error
of 0.004 in a d that is often smaller, while a rounded d keeps 11 bits. Both are 0 where a target is
unsupervised; d is 0 where the short context is the long one. A shard appears whole or not at all, so a
scorer that was killed resumes with the next one.

These files stand in `data/` and not in `scoring.py` because the dataset reads them, without loading a
model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.command_line import progress_bar
from megatron_exact.data.manifest import Manifest
from megatron_exact.data.rows import RowReader
from megatron_exact.exposure import RowScores, gains
from megatron_exact.exposure.confidence import OLD_BORDER, border_record
from megatron_exact.files import atomic_file, sha256_file, write_json
from megatron_exact.folder_lock import LEASE, Lease
from megatron_exact.json_input import build_record, read_json_object

FORMAT_VERSION = 1
RECORD_NAME = "scores.json"
ARRAYS = ("long", "difference")
BEGIN_SECONDS = 120
"""How long a process waits for another that begins the folder."""
MOST_MAPPED = 256
"""Shards that a reader keeps mapped: each keeps a file open, and rows come from all of them."""


@dataclass(frozen=True, kw_only=True)
class ScoreRecord:
    """Content of scores.json."""

    format_version: int
    """Version of the format, FORMAT_VERSION."""
    fingerprint: str
    """Fingerprint of the pack."""
    row_tokens: int
    """Inputs of a row."""
    model: dict[str, Any]
    """Identity of the scorer: hashes of its config and weights."""
    dtype: str
    """dtype in which the scorer computed."""
    short_window: int
    """Tokens of a short window."""
    short_stride: int
    """Tokens from one short window to the next."""
    short_border: str = OLD_BORDER
    """Where targets belong past a window, one of `exposure.confidence.BORDERS`."""
    shard_rows: int
    """Rows of a shard; the last one of a split may have fewer."""
    rows: dict[str, int]
    """Rows of each split."""
    is_complete: bool
    """Whether every shard exists."""
    arrays: dict[str, str] = field(default_factory=dict)
    """sha256 of each file, once the scores are complete."""

    def shards(self, split: str) -> int:
        """Return the number of shards of a split."""
        return -(-self.rows[split] // self.shard_rows)

    def shape(self, split: str, shard: int) -> tuple[int, int]:
        """Return the shape of the arrays of a shard."""
        rows = min(self.shard_rows, self.rows[split] - shard * self.shard_rows)
        return rows, self.row_tokens

    def identity(self) -> dict[str, Any]:
        """Return what identifies scores, wherever they lie and however they are cut into shards."""
        names = ("fingerprint", "model", "dtype", "short_window", "short_stride")
        return {name: getattr(self, name) for name in names} | border_record(self.short_border)


def shard_name(split: str, array: str, shard: int) -> str:
    """Return the path of a shard's file below the folder."""
    return f"{split}/{array}-{shard:05}.npy"


def begin_scores(folder: str | Path, record: ScoreRecord) -> list[tuple[str, int]]:
    """Make the folder, or resume an unfinished one.

    Returns:
        (split, shard) of each missing shard.

    Raises:
        ValueError: the folder contains other scores, or something else.
    """
    folder = Path(folder)
    if not (folder / RECORD_NAME).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        remedy = "choose another --output"
        # processes of one job begin at the same time: one of them writes the record, the others compare
        with Lease(
            folder / LEASE, folder=folder, purpose="beginning it", remedy=remedy, wait_seconds=BEGIN_SECONDS
        ):
            if not (folder / RECORD_NAME).is_file():
                if any(not entry.name.startswith(".") for entry in folder.iterdir()):
                    raise ValueError(f"{folder} exists and has no {RECORD_NAME}: {remedy}")
                write_json(folder / RECORD_NAME, asdict(record))
                return missing_shards(folder, record)
    found = read_record(folder)
    ours, theirs = (asdict(replace(each, is_complete=False, arrays={})) for each in (record, found))
    for name, value in ours.items():
        if theirs[name] != value:
            raise ValueError(
                f"{folder} contains scores with {name} {theirs[name]}, not {value}: choose another "
                "--output, or remove it"
            )
    return missing_shards(folder, record)


def missing_shards(folder: str | Path, record: ScoreRecord) -> list[tuple[str, int]]:
    """Return (split, shard) of each missing shard."""
    return [
        (split, shard)
        for split in record.rows
        for shard in range(record.shards(split))
        if not all((Path(folder) / shard_name(split, array, shard)).is_file() for array in ARRAYS)
    ]


def write_shard(
    folder: str | Path,
    record: ScoreRecord,
    split: str,
    shard: int,
    arrays: dict[str, NDArray[np.floating]],
) -> None:
    """Write one shard.

    Args:
        folder: folder of the scores.
        record: record passed to `begin_scores`.
        split: name of the split.
        shard: number of the shard.
        arrays: [rows of the shard, row_tokens] for each name in ARRAYS.

    Raises:
        ValueError: a score that is not finite in float16.
    """
    for name in ARRAYS:
        with np.errstate(over="ignore"):  # infinity is an error below
            stored = arrays[name].astype("<f2")
        assert stored.shape == record.shape(split, shard), (name, stored.shape)
        if not np.isfinite(stored).all():
            row = int(np.flatnonzero(~np.isfinite(stored).all(axis=1))[0]) + shard * record.shard_rows
            raise ValueError(
                f"row {row} of the {split} split has a {name} score that is not a finite float16 number: "
                "the scorer's losses are not finite; score with --dtype float32 or another model"
            )
        path = Path(folder) / shard_name(split, name, shard)
        with atomic_file(path) as temporary, open(temporary, "wb") as stream:
            np.save(stream, stored, allow_pickle=False)


def finish_scores(folder: str | Path, record: ScoreRecord) -> ScoreRecord:
    """Hash all shards and mark the scores complete; return the written record.

    Raises:
        ValueError: a damaged file.
    """
    files = []
    for split in record.rows:
        for shard in range(record.shards(split)):
            for array in ARRAYS:
                open_shard(folder, record, split, array, shard)
                files.append(shard_name(split, array, shard))
    hashes = {name: sha256_file(Path(folder) / name) for name in files}
    finished = replace(record, is_complete=True, arrays=hashes)
    write_json(Path(folder) / RECORD_NAME, asdict(finished))
    return finished


def read_record(folder: str | Path) -> ScoreRecord:
    """Read and check scores.json.

    Raises:
        FileNotFoundError: the folder has no scores.
        ValueError: not JSON, another format, or a field missing or of another type.
    """
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: make the scores with megatron-exact score")
    content = read_json_object(path, "score the pack again")
    if content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version")
        raise ValueError(f"{path} has format_version {found!r}, this program reads {FORMAT_VERSION}")
    return build_record(ScoreRecord, content, str(path))


def verify_scores(folder: str | Path) -> int:
    """Hash every array again; return the number of bytes read.

    Raises:
        ValueError, FileNotFoundError: incomplete, missing or damaged.
    """
    record = read_record(folder)
    _require_complete(folder, record)
    total = 0
    for name, expected in record.arrays.items():
        path = Path(folder) / name
        found = sha256_file(path)
        if found != expected:
            raise ValueError(
                f"{path} has sha256 {found[:16]}... but {RECORD_NAME} says {expected[:16]}...: copy the "
                "scores again, or remove the file and score again"
            )
        total += path.stat().st_size
    return total


def open_record(folder: str | Path, manifest: Manifest, split: str) -> ScoreRecord:
    """Read the record of complete scores of this pack.

    Raises:
        ValueError, FileNotFoundError: missing, incomplete, of another pack, or without this split.
    """
    record = read_record(folder)
    if record.fingerprint != manifest.fingerprint:
        raise ValueError(
            f"{folder} contains scores of the pack {record.fingerprint[:16]}..., not of "
            f"{manifest.fingerprint[:16]}...: score this pack (megatron-exact score)"
        )
    if split not in record.rows:
        raise ValueError(f"{folder} has no scores of the {split} split: score it (--splits {split})")
    _require_complete(folder, record)
    return record


def check_shards(folder: str | Path, split: str) -> None:
    """Check by their sizes that the arrays which training reads exist in full.

    Raises:
        ValueError, FileNotFoundError: a missing or truncated array.
    """
    record = read_record(folder)
    for shard in range(record.shards(split)):
        path = Path(folder) / shard_name(split, "difference", shard)
        rows, tokens = record.shape(split, shard)
        if not path.is_file() or path.stat().st_size <= rows * tokens * np.dtype("<f2").itemsize:
            raise ValueError(
                f"{path} is missing or truncated: copy the scores again, or remove the file and score again"
            )


def _require_complete(folder: str | Path, record: ScoreRecord) -> None:
    if not record.is_complete:
        raise ValueError(f"{folder} is not complete: call megatron-exact score again, it resumes")


class ScoreReader:
    """Reader of one split's differences, mapped from disk; a pickle contains only the path.

    Args:
        folder: folder of the scores.
        manifest: manifest of the pack.
        split: name of the split.

    Raises:
        ValueError, FileNotFoundError: see `open_record`; at the first row that needs it, a damaged shard.
    """

    def __init__(self, folder: str | Path, manifest: Manifest, split: str) -> None:
        self.folder = Path(folder)
        self.split = split
        self.record = open_record(folder, manifest, split)
        self._shards: dict[int, NDArray[np.float16]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped files."""
        return {**self.__dict__, "_shards": {}}

    def read(self, row: int) -> RowScores:
        """Read the scores of row `row` of the plan.

        Raises:
            ValueError: the shard is damaged, or the row contains a score that is not finite.
        """
        shard, place = divmod(row, self.record.shard_rows)
        if shard not in self._shards:
            if len(self._shards) >= MOST_MAPPED:
                del self._shards[next(iter(self._shards))]
            self._shards[shard] = open_shard(self.folder, self.record, self.split, "difference", shard)
        scores = self._shards[shard][place].astype(np.float32)
        if not np.isfinite(scores).all():
            path = self.folder / shard_name(self.split, "difference", shard)
            raise ValueError(
                f"{path} contains a score that is not finite (row {row}): the file is damaged, remove it "
                "and score again"
            )
        return RowScores(difference=scores)


def gaining_counts(
    rows: RowReader, scores: ScoreReader, nats: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the supervised targets of a split by effective context, apart for those that gain from it.

    Args:
        rows: reader of the split; every row is read once.
        scores: its stored scores.
        nats: see `exposure.gains`.

    Returns:
        [buckets] targets that gain, and [buckets] all others.
    """
    num_buckets = len(rows.split.exposure.lower)
    found = np.zeros((2, num_buckets), dtype=np.int64)
    with progress_bar("reading scores", len(rows), "row") as bar:
        for number in range(len(rows)):
            row = rows.read(number)
            buckets = row.by_context(rows.bucket_of_context)
            supervised = row.loss_mask > 0
            helped = gains(scores.read(number).difference, nats)
            for place, chosen in enumerate((helped, ~helped)):
                found[place] += np.bincount(buckets[supervised & chosen], minlength=num_buckets)
            bar.update()
    return found[0], found[1]


def open_shard(
    folder: str | Path, record: ScoreRecord, split: str, array: str, shard: int
) -> NDArray[np.float16]:
    """Map one array of a shard, [rows of the shard, row_tokens].

    Raises:
        ValueError: the file cannot be read, or has another shape.
    """
    path = Path(folder) / shard_name(split, array, shard)
    expected = record.shape(split, shard)
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove it and score again") from error
    if found.dtype != np.dtype("<f2") or found.shape != expected:
        raise ValueError(
            f"{path} contains {found.dtype} {found.shape} where float16 {expected} is expected: remove "
            "it and score again"
        )
    mapped: NDArray[np.float16] = found.view(np.ndarray)
    return mapped
