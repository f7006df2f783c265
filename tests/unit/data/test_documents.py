"""Every kind of input file, and what is wrong with one document or a whole file."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_exact.data.documents import (
    Cursor,
    Document,
    FileInput,
    check_inputs,
    decode_part,
    read_documents,
)

TEXTS = ["one", "two\nlines", "Grüße, 世界 \U0001f600", "  spaces  ", "a\u2028b\x85c", "x" * 300_000]


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts).encode()


def write(path: Path, content: bytes) -> Path:
    """Compress as the suffix says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.ZstdCompressor().compress(content)
    path.write_bytes(content)
    return path


def write_parquet(path: Path, texts: list[str | None], column: str = "text", kind: object = None) -> Path:
    table = pa.table({"id": list(range(len(texts))), column: pa.array(texts, kind or pa.string())})
    pq.write_table(table, path, row_group_size=100)
    return path


def texts_of(path: Path, **options: str) -> list[str]:
    return [document.text for document in read_documents(path, **options)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".JSONL"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write(path, json_lines(TEXTS))
    documents = list(read_documents(path))
    assert [document.text for document in documents] == TEXTS
    assert [document.location for document in documents] == [f"{path}:{n}" for n in range(1, 7)]
    positions = [document.position_bytes for document in documents]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


def test_json_lines_of_other_writers(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbf{"text": "bom"}\r\n\n  \n{"text": "\xc3\xbc"}\n{"text": "no newline at the end"}'
    )
    assert texts_of(write(tmp_path / "a.jsonl", content)) == ["bom", "ü", "no newline at the end"]


def test_the_text_key(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", json_lines(TEXTS, "content"))
    table = write_parquet(tmp_path / "a.parquet", TEXTS, "content")
    assert texts_of(lines, text_key="content") == texts_of(table, text_key="content") == TEXTS
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no field 'text' \(--text-key\), only 'id', 'con"):
        texts_of(lines)
    with pytest.raises(ValueError, match=r"no column 'text' \(--text-key\), only id, content"):
        texts_of(table)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet(tmp_path: Path, kind: object) -> None:
    texts = [f"{text}{n}" for n in range(50) for text in TEXTS[:5]]
    path = write_parquet(tmp_path / "a.parquet", texts, kind=kind)
    documents = list(read_documents(path))
    assert [document.text for document in documents] == texts
    assert documents[101].location == f"{path}:row 102"
    assert documents[-1].position_bytes == path.stat().st_size


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfline\r\n\n\nline\n")
    assert list(read_documents(path)) == [
        Document(text="line\r\n\n\nline\n", location=str(path), position_bytes=path.stat().st_size)
    ]


def test_zstd_in_several_frames(tmp_path: Path) -> None:
    frames = [zstandard.ZstdCompressor().compress(json_lines([text])) for text in TEXTS]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert texts_of(tmp_path / "a.jsonl.zst") == TEXTS


INVALID_LINES = {
    "invalid UTF-8 (byte 0xff at offset 10": b'{"text": "\xff"}',
    "invalid JSON (Expecting": b'{"text": }',
    "invalid JSON (Unterminated": b'{"text": "cut',
    "the line is not a JSON object but a list": b'["text"]',
    "no field 'text'": b'{"texts": "x"}',
    "the field 'text' is not text but a int": b'{"text": 3}',
    "the field 'text' is not text but a list": b'{"text": []}',
    "it gives the field 'text' twice": b'{"text": "a", "text": "b"}',
    "invalid Unicode (a lone surrogate": b'{"text": "a\\ud800b"}',
    "nested too deeply": b"[" * 200_000,
}


@pytest.mark.parametrize(("reason", "line"), INVALID_LINES.items(), ids=range(len(INVALID_LINES)))
def test_an_invalid_line_stops_or_is_skipped(tmp_path: Path, reason: str, line: bytes) -> None:
    path = write(tmp_path / "a.jsonl", json_lines(["good"]) + line + b"\n" + json_lines(["better"]))
    with pytest.raises(ValueError, match="--skip-invalid") as error:
        texts_of(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert reason in str(error.value)
    skipped: list[str] = []
    kept = [document.text for document in read_documents(path, on_invalid=skipped.append)]
    assert kept == ["good", "better"]
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{path}:2: ")


def test_invalid_parquet_rows_and_text_files(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["good", "bad", "better"])
    table = pq.read_table(path)
    broken = pa.array([b"good", b"b\xff", b"better"]).view(pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("text"), "text", broken), path)
    skipped: list[str] = []
    kept = [document.text for document in read_documents(path, on_invalid=skipped.append)]
    assert kept == ["good", "better"]
    assert skipped == [f"{path}:row 2: invalid UTF-8 (byte 0xff at offset 1 of this document)"]
    with pytest.raises(ValueError, match=r"row 2: invalid UTF-8"):
        texts_of(path)
    with pytest.raises(ValueError, match=r"a\.txt: invalid UTF-8 \(byte 0x80 at offset 2"):
        texts_of(write(tmp_path / "a.txt", b"ab\x80"))


def test_documents_without_text_are_no_error(tmp_path: Path) -> None:
    """Empty strings and nulls are found, with their place, and left out; white space is text."""
    texts = ["good", None, "", " ", "\r\n", "better"]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\r\n" for text in texts)
    paths = [
        write(tmp_path / "a.jsonl", b"\xef\xbb\xbf\r\n" + lines),
        write_parquet(tmp_path / "a.parquet", texts),
    ]
    for path in paths:
        assert texts_of(path) == ["good", " ", "\r\n", "better"]
        decoded = [
            d for part, _ in FileInput(path=path).read(Cursor(), 1) for d in decode_part(part, "text")
        ]
        assert [text for _, text, _ in decoded] == ["good", "", "", " ", "\r\n", "better"]
    for content in (b"", b"\xef\xbb\xbf"):
        assert texts_of(write(tmp_path / "a.txt", content)) == []
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "nulls.parquet")
    assert texts_of(tmp_path / "nulls.parquet") == []


def test_unused_fields_may_hold_anything_that_is_json(tmp_path: Path) -> None:
    digits = b"9" * 5000
    unused = (digits, b"-" + digits, b"1e" + digits, b"NaN", b'{"text": 1, "text": 2}', b'[{"text": "x"}]')
    lines = [b'{"a": %s, "text": "x%d"}\n' % (value, number) for number, value in enumerate(unused)]
    path = write(tmp_path / "a.jsonl", b"".join(lines))
    assert texts_of(path) == [f"x{number}" for number in range(len(unused))]
    with pytest.raises(ValueError, match=r"b\.jsonl:1: the field 'text' is not text but a int"):
        texts_of(write(tmp_path / "b.jsonl", b'{"text": %s}\n' % digits))


def test_parquet_columns_of_one_name(tmp_path: Path) -> None:
    arrays = [pa.array(["x"]), pa.array(["y"]), pa.array([1])]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays(arrays, names=["text", "text", "n"]), path)
    with pytest.raises(ValueError, match=r"a\.parquet has 2 columns named 'text': rename"):
        texts_of(path)
    pq.write_table(pa.Table.from_arrays(arrays, names=["n", "text", "n"]), path)  # others do not matter
    assert texts_of(path) == ["y"]
    nested = pa.array([{"text": "inner"}])
    pq.write_table(pa.table({"meta": nested, "text": ["outer"], "text.x": ["other"]}), path)
    assert texts_of(path) == ["outer"]
    pq.write_table(pa.table({"text": nested}), path)
    with pytest.raises(ValueError, match=r"column 'text' contains struct<text: string>, not text"):
        texts_of(path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_file_stops_even_when_skipping(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        write_parquet(path, TEXTS)
    else:
        write(path, json_lines([f"{n} {n * n}" for n in range(5000)]))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"garbage" * 100)
    with pytest.raises(ValueError, match=rf"a\{suffix} is damaged or"):
        list(read_documents(path, on_invalid=lambda message: None))


def test_a_parquet_column_of_numbers_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column 'text' contains int64, not text"):
        texts_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(("package", "suffix"), [("zstandard", ".jsonl.zst"), ("pyarrow", ".parquet")])
def test_a_missing_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, suffix: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=f"pip install {package}"):
        texts_of(path)


def test_inputs_are_checked_before_any_work(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", json_lines(TEXTS))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.csv").write_text("x")
    check_inputs([good])
    check_inputs([good, tmp_path / "empty.txt"])
    for paths, error, reason in (
        ([], ValueError, "no input file"),
        ([tmp_path / "missing.jsonl"], FileNotFoundError, "does not exist"),
        ([tmp_path], ValueError, "is a folder: name the files in it"),
        ([good, tmp_path / "empty.jsonl"], ValueError, "is empty"),
        ([tmp_path / "a.csv"], ValueError, r"inputs end in \.jsonl"),
        ([good, tmp_path / "." / "a.jsonl"], ValueError, "given twice"),
    ):
        with pytest.raises(error, match=reason):
            check_inputs(paths)


def test_a_large_file_is_streamed(tmp_path: Path) -> None:
    """The second line is bad, the rest is not even read."""
    path = write(tmp_path / "a.jsonl", json_lines(["first"]) + b"bad\n" + json_lines(TEXTS * 20))
    documents = read_documents(path)
    assert next(documents).position_bytes < path.stat().st_size / 2


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
@pytest.mark.parametrize("part_bytes", [1, 700, 1 << 20])
def test_reading_goes_on_from_any_cursor(tmp_path: Path, suffix: str, part_bytes: int) -> None:
    """One huge document among tiny ones, blank lines, nulls and several row groups."""
    texts = [*(f"{n} text" for n in range(220)), "x" * 300_000, *(f"{n} more" for n in range(30))]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        write_parquet(path, [*texts[:9], None, *texts[9:]])
    else:
        lines = json_lines(texts).replace(b"\n", b"\n\n", 50)
        write(path, lines if suffix != ".txt" else b"one text")

    def read(start: Cursor) -> list[tuple[list[tuple[str, str | None, str]], Cursor]]:
        parts = FileInput(path=path).read(start, part_bytes)
        return [(list(decode_part(part, "text")), cursor) for part, cursor in parts]

    whole = read(Cursor())
    assert [text for part, _ in whole for _, text, _ in part if text] == (
        texts if suffix != ".txt" else ["one text"]
    )
    for number in range(0, len(whole), max(1, len(whole) // 12)):
        assert read(whole[number][1]) == whole[number + 1 :]
    assert read(whole[-1][1]) == []
    assert whole[-1][1].progress_bytes == path.stat().st_size
