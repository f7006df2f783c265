"""The packers of other projects, called as their users call them, and a check of what each returns.

Each gets the pieces (lengths at most a row) ready-made and keeps its result in memory; reading lengths,
cutting long documents, shuffling and writing are left out of its time, and so are its imports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Packer:
    """One way to pack; `prepare` is outside the measured time, `pack` and nothing else inside."""

    name: str
    """As in the table."""
    prepare: Callable[[NDArray[np.int64], int], Any]
    """(pieces, row_tokens) -> the input of `pack`."""
    pack: Callable[[Any, int], Any]
    """(input, row_tokens) -> the packer's own result."""
    row_lengths: Callable[[Any], tuple[NDArray[np.int64], Rows]]
    """Result -> (length of every placed piece, row after row; pieces in each row)."""
    most_documents: int | None = None
    """Documents to time it on where more teach nothing (its batches are packed one by one)."""


def available_packers() -> tuple[list[Packer], list[str]]:
    """The packers that are installed, and a line for each that is not."""
    packers: list[Packer] = []
    missing = []
    for load in (_olmo_core, _trl):
        try:
            packers += load()
        except ImportError as error:
            missing.append(f"not installed ({error}): `make bench` installs benchmarks/requirements.txt")
    return packers, missing


def _olmo_core() -> list[Packer]:
    from olmo_core.data.utils import InstancePacker

    def prepare(pieces: NDArray[np.int64], row_tokens: int) -> Any:
        ends = np.cumsum(pieces)
        return np.stack((ends - pieces, ends), axis=1).astype(np.uint64)  # start and end of each document

    def pack(documents: Any, row_tokens: int) -> Any:
        return InstancePacker(row_tokens).pack_documents(documents)

    def row_lengths(result: Any) -> tuple[NDArray[np.int64], Rows]:
        instances, documents, _ = result
        lengths = (documents[:, 1] - documents[:, 0]).astype(np.int64)
        sizes = np.array([len(instance) for instance in instances], np.int64)
        order = np.fromiter((piece for instance in instances for piece in instance), np.int64)
        assert np.array_equal(np.sort(order), np.arange(lengths.size)), "a piece is missing or twice there"
        return lengths[order], sizes

    return [Packer(name="OLMo-core", prepare=prepare, pack=pack, row_lengths=row_lengths)]


def _trl() -> list[Packer]:
    import datasets
    import pyarrow as pa
    import trl.data_utils as trl_data

    datasets.disable_progress_bars()

    def prepare(pieces: NDArray[np.int64], row_tokens: int) -> Any:
        # Tokens of type null take no memory, so that what TRL does per token costs as little as it can.
        offsets = pa.array(np.concatenate(([0], np.cumsum(pieces))))
        documents = pa.LargeListArray.from_arrays(offsets, pa.nulls(int(pieces.sum())))
        return datasets.Dataset(datasets.table.InMemoryTable(pa.table({"input_ids": documents})))

    def pack(batch_documents: int | None, dataset: Any, row_tokens: int) -> Any:
        options = {"batch_size": batch_documents, "keep_in_memory": True, "load_from_cache_file": False}
        return trl_data.pack_dataset(dataset, row_tokens, strategy="bfd", map_kwargs=options)

    def plan(dataset: Any, row_tokens: int) -> Any:
        with mock.patch.object(trl_data, "pc", _LengthsOnly()):
            return pack(None, dataset, row_tokens)

    def row_lengths(result: Any) -> tuple[NDArray[np.int64], Rows]:
        chunks = result.with_format("arrow").data.column("seq_lengths").chunks
        sizes = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks]
        lengths = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
        return np.concatenate(lengths).astype(np.int64), np.concatenate(sizes).astype(np.int64)

    return [
        Packer(name="TRL, its planning loop alone", prepare=prepare, pack=plan, row_lengths=row_lengths),
        Packer(
            name="TRL as called, batches of 1,000",
            prepare=prepare,
            pack=partial(pack, 1000),
            row_lengths=row_lengths,
            most_documents=50_000,
        ),
    ]


class _LengthsOnly:
    """Stands for `pyarrow.compute` inside TRL's packer and leaves out the moving of tokens.

    TRL gathers all tokens into their rows, through an index of 8 bytes a token: it takes most of its time,
    and for 10^6 documents of this corpus more than 20 GB. Without it TRL is timed, and can be run, at what
    the others do: finding the rows. No piece is empty or longer than a row, so nothing is to be filtered
    or cut.
    """

    def __getattr__(self, name: str) -> Any:
        import pyarrow.compute

        return getattr(pyarrow.compute, name)

    def filter(self, pieces: Any, mask: Any) -> Any:
        return pieces

    def list_slice(self, pieces: Any, start: int, stop: int) -> Any:
        return pieces

    def take(self, table: Any, order: Any) -> Any:
        column = table.column_names.index("seq_lengths")
        return table.set_column(column, "seq_lengths", table.column(column).take(order))


def check_rows(
    lengths: NDArray[np.int64], sizes: Rows, pieces: NDArray[np.int64], row_tokens: int, *, name: str
) -> float:
    """Share of padding, once it is sure that every piece stands in a row and every row fits.

    Args:
        lengths: integers [pieces], of the placed pieces, row after row.
        sizes: integers [rows], pieces of each row.
        pieces: integers [pieces], what was to be packed, in any order.
        row_tokens: room of a row.
        name: of the packer.

    Raises:
        ValueError: a piece is missing, or a row is too full: the benchmark would compare nothing.
    """
    if sizes.sum() != lengths.size or (sizes < 1).any():
        raise ValueError(f"{name}: rows of {sizes.sum()} pieces for {lengths.size} placed pieces")
    wanted = np.bincount(pieces, minlength=row_tokens + 1)
    if not np.array_equal(np.bincount(lengths, minlength=row_tokens + 1), wanted):
        raise ValueError(f"{name} did not place every piece once: its time is not comparable")
    filled = np.add.reduceat(lengths, np.cumsum(sizes) - sizes)
    if filled.max(initial=0) > row_tokens:
        raise ValueError(f"{name} filled a row of {row_tokens} with {filled.max()} tokens")
    return float(1 - pieces.sum() / (sizes.size * row_tokens))
