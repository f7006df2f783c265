"""Texts of a `.parquet` file as bytes, row group by row group. Apart, because pyarrow is slow to import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_exact.data.raw_parts import Cursor, PartsWithCursors, RawPart

PARQUET_BATCH_ROWS = 64  # rows that are in memory at a time beside the part


def read_rows(path: Path, text_key: str, start: Cursor, part_bytes: int) -> PartsWithCursors:
    """Yield the parts of a column after `start`, see `FileInput.read`."""
    size = path.stat().st_size
    contents: list[bytes | None] = []
    records, part_size, total_rows = start.records, 0, 1
    for value, total_rows in _values(path, text_key, records):
        contents.append(value)
        part_size += len(value or b"")
        if part_size >= part_bytes:
            part = RawPart(name=str(path), kind="row", first=records + 1, contents=contents)
            records += len(contents)
            yield part, Cursor(records=records, progress_bytes=size * records // total_rows)
            contents, part_size = [], 0
    if contents:
        part = RawPart(name=str(path), kind="row", first=records + 1, contents=contents)
        yield part, Cursor(records=records + len(contents), progress_bytes=size)


def _values(path: Path, text_key: str, skipped_rows: int) -> Iterator[tuple[bytes | None, int]]:
    """(UTF-8 of the text, rows of the file) of each row; whole row groups are passed over unread."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError("reading .parquet needs the package pyarrow: pip install pyarrow") from error
    try:
        # pre_buffer would hold a whole row group, which may be gigabytes of text
        with pq.ParquetFile(path, pre_buffer=False) as file:
            _check_column(pa, path, file.schema_arrow, text_key)
            groups, ahead = list(range(file.metadata.num_row_groups)), skipped_rows
            while groups and file.metadata.row_group(groups[0]).num_rows <= ahead:
                ahead -= file.metadata.row_group(groups.pop(0)).num_rows
            batches = file.iter_batches(
                batch_size=PARQUET_BATCH_ROWS, row_groups=groups, columns=[text_key]
            )
            for batch in batches:
                # A nested column of the same first name comes along: parquet's names are paths
                column = batch.column(batch.schema.get_field_index(text_key)).slice(ahead)
                ahead -= min(ahead, batch.num_rows)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for value in column.cast(pa.large_binary()).to_pylist():
                    yield value, file.metadata.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or no parquet file ({error}): fetch it again") from error


def _check_column(pa: Any, path: Path, schema: Any, text_key: str) -> None:
    if text_key not in schema.names:
        raise ValueError(f"{path} has no column {text_key!r} (--text-key), only {', '.join(schema.names)}")
    if schema.names.count(text_key) > 1:
        raise ValueError(
            f"{path} has {schema.names.count(text_key)} columns named {text_key!r}: rename all but one of "
            "them, nothing says which holds the text"
        )
    kind = schema.field(text_key).type
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    if value_type not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise ValueError(f"{path}: the column {text_key!r} holds {kind}, not text (--text-key)")
