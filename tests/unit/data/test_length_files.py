"""Files of lengths: every format gives the same histogram, and bad ones a line that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_exact.data import lengths
from megatron_exact.data.indexed import CODE_OF_DTYPE, HEADER, MAGIC, IndexedWriter
from megatron_exact.data.lengths import is_length_file, read_length_file

LENGTHS = [5, 1, 5, 700, 3_000_000, 5, 1]
PAIRS = [(5, 3), (1, 2), (700, 1), (3_000_000, 1)]


def write_npy(path: Path) -> None:
    np.save(path, np.array(LENGTHS, np.int32))


def write_txt(path: Path) -> None:
    path.write_text("\n".join(map(str, LENGTHS)) + "\n\n")


def write_csv(path: Path) -> None:
    path.write_text("length,count\n" + "".join(f"{length}, {count}\n" for length, count in PAIRS))


def write_bare_csv(path: Path) -> None:
    path.write_text("".join(f"{length},{count}\n" for length, count in [*PAIRS, (9, 0)]))


def write_json(path: Path) -> None:
    path.write_text(json.dumps({str(length): count for length, count in PAIRS}))


def write_json_pairs(path: Path) -> None:
    path.write_text(json.dumps([[5, 1], *PAIRS[1:], [5, 2]]))


def write_idx(path: Path) -> None:
    """An index alone, several sequences to some documents."""
    sequences = [5, 1, 2, 3, 700, 3_000_000, 5, 1]
    boundaries = [0, 1, 2, 4, 5, 6, 7, 8]
    code = CODE_OF_DTYPE[np.dtype(np.uint16)]
    path.write_bytes(
        HEADER.pack(MAGIC, 1, code, len(sequences), len(boundaries))
        + np.array(sequences, np.int32).tobytes()
        + np.zeros(len(sequences), np.int64).tobytes()
        + np.array(boundaries, np.int64).tobytes()
    )


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.npy", write_npy),
        ("a.txt", write_txt),
        ("a.csv", write_csv),
        ("b.csv", write_bare_csv),
        ("a.json", write_json),
        ("b.json", write_json_pairs),
        ("a.idx", write_idx),
    ],
)
def test_every_format(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    path = tmp_path / name
    write(path)
    assert is_length_file(path)
    found = read_length_file(path)
    assert dict(zip(found.lengths.tolist(), found.counts.tolist(), strict=True)) == dict(PAIRS)
    assert found.lengths.tolist() == sorted(found.lengths.tolist())


def test_an_index_of_one_sequence_a_document(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "c.bin", tmp_path / "c.idx", 100)
    for length in (3, 4, 3):
        writer.add(np.zeros(length, np.uint16))
    writer.close()
    (tmp_path / "c.bin").unlink()
    found = read_length_file(tmp_path / "c.idx")
    assert (found.lengths.tolist(), found.counts.tolist()) == ([3, 4], [2, 1])


def test_a_corpus_prefix_with_a_dot_is_no_file_of_lengths(tmp_path: Path) -> None:
    (tmp_path / "a.json.idx").touch()
    (tmp_path / "a.json").touch()
    assert not is_length_file(tmp_path / "a.json")
    assert not is_length_file(tmp_path / "data")


def test_text_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "BLOCK_BYTES", 3)
    (tmp_path / "a.txt").write_text("1\n2\n" * 50)
    assert read_length_file(tmp_path / "a.txt").counts.tolist() == [50, 50]
    (tmp_path / "a.txt").write_text("1\n2\n" * 50 + "x\n")
    with pytest.raises(ValueError, match="line 101: 'x'"):
        read_length_file(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "contains no lengths"),
        ("a.txt", b"5\n0\n", "a length of 0"),
        ("a.txt", b"5\n-4\n", "a length of -4"),
        ("a.txt", b"5\n6.5\n", "line 2: '6.5' is not a whole number"),
        ("a.txt", b"5\n99999999999999999999\n", "line 2"),
        ("a.txt", b"\xff\xfe\n", "is not text"),
        ("a.txt", b"2000000000000\n", "at most 2^40"),
        ("a.csv", b"", "contains no lengths"),
        ("a.csv", b"length,count\n", "contains no lengths"),
        ("a.csv", b"5,0\n", "contains no lengths"),
        ("a.csv", b"5,1,2\n", "pair 1"),
        ("a.csv", b"5,1\nx,2\n", "pair 2"),
        ("a.csv", b"5,-1\n", "-1 documents of 5 tokens"),
        ("a.csv", b"0,1\n", "a length of 0"),
        ("a.csv", b"99999999999999999999,1\n", "at most 2^40"),
        ("a.csv", b"1000000,562949953421311\n", r"about 5\.6e\+20 tokens are more than"),
        ("a.csv", b"1,1125899906842623\n" * 9000, r"about 1\.0e\+19 tokens are more than"),
        ("a.json", b'{"1048576": 1099511627777}', "more than the 2^60"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"5", "contains neither"),
        ("a.json", b"[[5, 1.5]]", "pair 1"),
        ("a.json", b"[[5, true]]", "pair 1"),
        ("a.json", b'{"5": 1e99}', "pair 1"),
        ("a.npy", b"", "is not a .npy file"),
        ("a.npy", b"PK\x03\x04", "is not a .npy file"),
        ("a.idx", b"", "is not a Megatron index"),
        ("a.idx", b"x" * 99, "is not a Megatron index"),
        ("a.idx", HEADER.pack(MAGIC, 1, 8, 5, 6), "shorter than its header"),
        ("a.idx", HEADER.pack(MAGIC, 1, 8, 0, 1) + bytes(8), "contains no lengths"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message.replace("^", r"\^")) as caught:
        read_length_file(path)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(0, np.int64), "contains no lengths"),
        (np.array([1.0, 2.0]), "contains float64"),
        (np.ones((2, 2), np.int64), r"\(2, 2\)"),
        (np.array([3, 0]), "a length of 0"),
        (np.array([object()], dtype=object), "not a .npy file of numbers"),
    ],
)
def test_bad_arrays(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_length_file(tmp_path / "a.npy")


def test_the_largest_histogram_that_can_be_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{1 << 20},{1 << 40}\n")
    assert read_length_file(tmp_path / "a.csv").tokens == 1 << 60


@pytest.mark.parametrize("name", ["a.npy", "a.txt", "a.csv", "a.json", "a.idx"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        read_length_file(tmp_path / name)
