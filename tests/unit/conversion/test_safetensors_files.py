from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_exact.conversion.safetensors_files import SafetensorsFolder, read_header
from tests.unit.conversion.small_models import LLAMA, QWEN, random_weights, read_weights, write_model

INDEX = "model.safetensors.index.json"


def write_raw(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A folder whose only weight file has this header."""
    folder.mkdir(exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(prefix + text + data)
    return folder


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_of_the_library(tmp_path: Path, num_files: int, dtype: torch.dtype) -> None:
    folder = write_model(tmp_path / "hf", QWEN, dtype=dtype, num_files=num_files)
    expected = read_weights(folder)
    with SafetensorsFolder(folder) as weights:
        assert {name: tensor.shape for name, tensor in weights.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in expected.items()
        }
        assert weights.num_bytes == sum(tensor.nbytes for tensor in expected.values())
        assert len(weights.files) == num_files
        for name, tensor in expected.items():
            low, high = len(tensor) // 3, len(tensor) - len(tensor) // 4
            data = bytearray(tensor[low:high].nbytes)
            weights.read_rows(name, low, high - low, memoryview(data))
            assert torch.equal(
                torch.frombuffer(data, dtype=dtype).view(tensor[low:high].shape), tensor[low:high]
            )


BAD_HEADERS: dict[str, tuple[Any, bytes, int | None, str]] = {
    "huge length": ({}, b"", 1 << 62, "announces a header"),
    "length beyond the file": ({}, b"", 3, "announces a header"),
    "no JSON": (b"{", b"", None, "not JSON"),
    "deep JSON": (b"[" * 100_000, b"", None, "deep"),
    "huge number": (b"1" * 10_000, b"", None, "10,000 digits"),
    "no object": ([1], b"", None, "not an object"),
    "twice": (b'{"a": {}, "a": {}}', b"", None, "twice"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"abcd", None, "without dtype"),
    "negative shape": ({"a": entry([-1], 0, 4)}, b"abcd", None, "the shape"),
    "fractional shape": ({"a": entry([1.0], 0, 4)}, b"abcd", None, "the shape"),  # type: ignore[list-item]
    "huge shape": ({"a": entry([1 << 62, 1 << 62], 0, 4)}, b"abcd", None, "takes"),
    "many axes": ({"a": entry([1] * 9, 0, 4)}, b"abcd", None, "the shape"),
    "unknown dtype": ({"a": entry([1], 0, 4, "F4")}, b"abcd", None, "unknown dtype"),
    "quantized": ({"a": entry([4], 0, 4, "I8")}, b"abcd", None, "quantized"),
    "reversed": ({"a": entry([1], 4, 0)}, b"abcd", None, "takes 4"),
    "negative offset": ({"a": entry([1], -4, 0)}, b"abcd", None, "places"),
    "beyond the file": ({"a": entry([2], 0, 8)}, b"abcd", None, "its header asks for"),
    "truncated": ({"a": entry([2], 0, 8)}, b"abcdefg", None, "its header asks for"),
    "bytes left over": ({"a": entry([1], 0, 4)}, b"abcdefgh", None, "its header asks for"),
    "overlap": ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"abcdef", None, "overlaps"),
    "same place": ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"abcd", None, "overlaps"),
    "gap": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"a" * 12, None, "gap"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(tmp_path: Path, case: str) -> None:
    header, data, length, message = BAD_HEADERS[case]
    folder = write_raw(tmp_path / "hf", header, data, length)
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsFolder(folder)
    assert "model.safetensors" in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", ".."])
def test_an_index_may_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (tmp_path / "x.safetensors").write_bytes(b"")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="not a \\.safetensors file of the folder"):
        SafetensorsFolder(folder)


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf", LLAMA, num_files=3)
    index = json.loads((folder / INDEX).read_text())
    second = folder / "model-00002-of-00003.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SafetensorsFolder(folder)

    (folder / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], "x": second.name}}))
    refused("says tensor 'x' is in")
    listed = dict(index["weight_map"])
    del listed["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))
    refused("does not name")
    (folder / INDEX).write_text("[]")
    refused("not an object")
    (folder / INDEX).write_text("{}")
    refused("no weight_map")
    (folder / INDEX).write_text(json.dumps(index))
    content = second.read_bytes()
    second.unlink()
    refused("lacks model-00002-of-00003")
    second.write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    refused("is in .* and in")
    second.write_bytes(content)
    SafetensorsFolder(folder).close()
    (folder / INDEX).unlink()
    refused("neither model.safetensors nor model.safetensors.index.json: copy the index")


def test_pickles_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        SafetensorsFolder(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"contains no model\.safetensors"):
        SafetensorsFolder(tmp_path)
    torch.save(random_weights(LLAMA), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="save_pretrained"):
        SafetensorsFolder(tmp_path)


def test_single_file_beside_an_index_is_ambiguous(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf", LLAMA)
    (folder / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="remove the one"):
        SafetensorsFolder(folder)


@given(data=st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_headers_end_in_an_error_or_a_whole_file(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever is accepted tiles the file exactly."""
    good = {"a": entry([2, 3], 0, 24), "b": entry([1], 24, 28), "c": entry([2], 28, 32, "BF16")}
    text = bytearray(json.dumps(good).encode())
    content = bytearray(struct.pack("<Q", len(text)) + text + bytes(range(32)))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(("byte", "cut", "insert", "digit")))
        if kind == "byte":
            content[position] = data.draw(st.integers(0, 255))
        elif kind == "digit":
            content[position] = ord(data.draw(st.sampled_from('0123456789-e.[]{},:"')))
        elif kind == "cut":
            del content[position:]
            break
        else:
            content[position:position] = data.draw(st.binary(min_size=1, max_size=9))
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    try:
        tensors, _ = read_header(file)
    except ValueError:
        return
    covered = sorted((t.offset, t.offset + t.row_bytes * t.shape[0]) for t in tensors.values())
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for low, high in covered:
        assert low == end
        end = high
    assert end == len(content)
