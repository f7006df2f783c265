"""What is written is what torch's own loader reads, and what is read is what any layout wrote."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_exact.conversion.torch_dist_reader import (
    Chunk,
    ShardedTensor,
    TorchDistCheckpoint,
    load_metadata,
)
from megatron_exact.conversion.torch_dist_writer import Block, _TensorRecords
from megatron_exact.integrity import check_integrity
from tests.unit.conversion.small_models import (
    as_ranks,
    flip_bit,
    rows_of,
    whole,
    write_checkpoint,
)

LAYERS = 3
KEYS = {
    "embedding.word_embeddings.weight": (11, 6),
    "decoder.layers.self_attention.linear_proj.weight": (LAYERS, 6, 8),
    "decoder.layers.mlp.linear_fc1.weight": (LAYERS, 20, 6),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": (LAYERS, 6),
    "decoder.final_layernorm.weight": (6,),
}


def random_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in KEYS.items()}


def reader(checkpoint: Path) -> TorchDistCheckpoint:
    return TorchDistCheckpoint(checkpoint / "release", lambda key: not key.startswith("optimizer."))


@pytest.mark.parametrize("cut", [whole, as_ranks])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_row_of_every_layout(tmp_path: Path, cut: Any, dtype: torch.dtype) -> None:
    tensors = random_tensors(dtype)
    extra = {"optimizer.state.exp_avg.x": torch.zeros(4)}
    checkpoint = write_checkpoint(tmp_path / "c", {**tensors, **extra}, LAYERS, cut=cut)
    with reader(checkpoint) as stored:
        assert stored.other_tensors == set(extra)
        assert set(stored.tensors) == set(KEYS)
        for key, tensor in tensors.items():
            for layer in range(LAYERS) if key.startswith("decoder.layers") else (None,):
                expected = tensor if layer is None else tensor[layer]
                for start, stop in ((0, len(expected)), (1, len(expected) - 2), (2, 2), (3, 4)):
                    found = rows_of(stored, key, layer, start, stop)
                    assert torch.equal(found, expected[start:stop]), (key, layer, start, stop)


@given(data=st.data())
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_grid_of_records(tmp_path: Path, data: st.DataObject) -> None:
    """Rows and columns cut anywhere, records in any order."""
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)))
    cuts = [
        sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=3))}) for length in shape
    ]

    def grid(key: str, _: tuple[int, ...]) -> Any:
        if not key.startswith("decoder.layers"):
            return whole(key, _)
        pieces = [
            ((a, b, c), (a2 - a, b2 - b, c2 - c))
            for a, a2 in itertools.pairwise(cuts[0])
            for b, b2 in itertools.pairwise(cuts[1])
            for c, c2 in itertools.pairwise(cuts[2])
        ]
        return iter(data.draw(st.permutations(pieces)))

    tensor = torch.arange(int(np.prod(shape)), dtype=torch.float32).view(shape)
    key = "decoder.layers.mlp.linear_fc2.weight"
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    checkpoint = write_checkpoint(tmp_path / "c", {key: tensor}, shape[0], cut=grid)
    layer = data.draw(st.integers(0, shape[0] - 1))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, shape[1]), st.integers(0, shape[1]))))
    with reader(checkpoint) as stored:
        assert torch.equal(rows_of(stored, key, layer, start, stop), tensor[layer, start:stop])


def test_torch_reads_what_was_written(tmp_path: Path) -> None:
    tensors = random_tensors()
    checkpoint = write_checkpoint(tmp_path / "c", tensors, LAYERS, cut=as_ranks)
    import torch.distributed.checkpoint as torch_checkpoint

    found = {key: torch.empty_like(tensor) for key, tensor in tensors.items()}
    torch_checkpoint.load(found, storage_reader=FileSystemReader(checkpoint / "release"), no_dist=True)
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor), key


def test_the_same_tensors_give_the_same_bytes_and_integrity_holds(tmp_path: Path) -> None:
    for name in "ab":
        write_checkpoint(tmp_path / name, random_tensors(), LAYERS)
    files = sorted(path.name for path in (tmp_path / "a" / "release").iterdir())
    assert files == [".metadata", "__0_0.distcp", "integrity.json", "metadata.json"]
    for name in files:
        ours, theirs = ((tmp_path / folder / "release" / name).read_bytes() for folder in "ab")
        assert ours == theirs, name
        assert str(tmp_path).encode() not in ours
    release = tmp_path / "a" / "release"
    assert check_integrity(release) == [
        (".metadata", None),
        ("__0_0.distcp", None),
        ("metadata.json", None),
    ]
    flip_bit(release / "__0_0.distcp", 5000)
    (release / "metadata.json").unlink()
    (release / "more.distcp").touch()
    results = dict(check_integrity(release) or ())
    assert results == {
        ".metadata": None,
        "__0_0.distcp": "sha256 differs",
        "metadata.json": "missing",
        "more.distcp": "not listed",
    }
    (release / "integrity.json").unlink()
    assert check_integrity(release) is None


def test_upstream_accepts_our_integrity_file(tmp_path: Path) -> None:
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import (
        save_integrity_manifest,
        verify_integrity_manifest,
    )

    release = write_checkpoint(tmp_path / "c", random_tensors(), LAYERS) / "release"
    verify_integrity_manifest(str(release))
    ours = json.loads((release / "integrity.json").read_text())
    about = ours.pop("checkpoint")
    assert (about["origin"], about["iteration"], about["run_id"]) == ("imported", 0, None)
    assert about["sizes"] == {name: (release / name).stat().st_size for name in ours["files"]}
    save_integrity_manifest(str(release))
    assert json.loads((release / "integrity.json").read_text()) == ours
    flip_bit(release / "__0_0.distcp", 5000)
    with pytest.raises(CheckpointingException, match="hash mismatch"):
        verify_integrity_manifest(str(release))


def test_a_flipped_bit_in_any_tensor_is_found_without_integrity_file(tmp_path: Path) -> None:
    """torch loads it without a word."""
    tensors = random_tensors()
    checkpoint = write_checkpoint(tmp_path / "c", tensors, LAYERS)
    file = checkpoint / "release" / "__0_0.distcp"
    for key, tensor in tensors.items():
        position = file.read_bytes().index(tensor.numpy().tobytes()) + tensor.nbytes // 2
        flip_bit(file, position)
        with reader(checkpoint) as stored, pytest.raises(ValueError, match=r"CRC-32 differs.*copy"):
            rows_of(stored, key, 0 if key.startswith("decoder.layers") else None, 0, 1)
        flip_bit(file, position)
    with reader(checkpoint) as stored:
        rows_of(stored, key, None, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (1, 3, 5), (1, 1024, 48), (1, 1)])
def test_a_record_is_what_torch_save_writes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The zip file around the bytes is made without torch; two tensors of one shape share its form."""
    records = _TensorRecords()
    for seed in (1, 2):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

        def parts(tensor: torch.Tensor = tensor) -> Iterator[np.ndarray[Any, Any]]:
            data = tensor.reshape(-1).view(torch.uint8).numpy()
            yield from (data[start : start + 1000] for start in range(0, data.size, 1000))

        block = Block(
            key="k", global_shape=shape, offsets=(0,) * len(shape), shape=shape, dtype=dtype, parts=parts
        )
        saved = io.BytesIO()
        torch.save(tensor, saved)
        assert b"".join(map(bytes, records.of(block).getbuffer())) == saved.getvalue()
    other = tensor.clone()
    if other.numel():  # the comparison sees one element
        other.view(-1)[-1] += 1
        torch.save(other, changed := io.BytesIO())
        assert changed.getvalue() != saved.getvalue()


class Evil:
    """Runs a command when it is unpickled in the usual way."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def change_metadata(checkpoint: Path, change: Any) -> None:
    """Write `.metadata` again after `change(metadata)`."""
    file = checkpoint / "release" / ".metadata"
    metadata: Metadata = load_metadata(file)
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def test_a_prepared_metadata_runs_nothing(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", random_tensors(), LAYERS)
    mark = tmp_path / "mark"
    for place in ("planner_data", "storage_meta", "version"):
        fresh = tmp_path / place
        shutil.copytree(checkpoint, fresh)
        change_metadata(fresh, lambda metadata, place=place: setattr(metadata, place, Evil(mark)))
        with pytest.raises(ValueError, match=r"asks for posix\.mkdir"):
            reader(fresh)
        assert not mark.exists()
        FileSystemReader(fresh / "release").read_metadata()  # negative control: the usual way
        assert mark.exists()
        mark.rmdir()


def test_a_prepared_record_runs_nothing(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", random_tensors(), LAYERS)
    mark = tmp_path / "mark"
    stream = io.BytesIO()
    torch.save(Evil(mark), stream)
    file = checkpoint / "release" / "__0_0.distcp"

    def point_to_the_end(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == "decoder.final_layernorm.weight":
                info.offset, info.length = file.stat().st_size, len(stream.getvalue())

    change_metadata(checkpoint, point_to_the_end)
    with open(file, "ab") as target:
        target.write(stream.getvalue())
    with reader(checkpoint) as stored, pytest.raises(ValueError, match=r"asks for posix\.mkdir"):
        rows_of(stored, "decoder.final_layernorm.weight", None, 0, 1)
    assert not mark.exists()


def shift_chunk(metadata: Any) -> None:
    chunk = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks[1]
    chunk.offsets = torch.Size([0, 0, 0])


def drop_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks.pop()


def leave_folder(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../__0_0.distcp"


def beyond_the_file(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.length = 1 << 40


def negative(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.offset = -1


def wrong_types(metadata: Any) -> None:
    metadata.state_dict_metadata = {3: 4}


def no_storage(metadata: Any) -> None:
    metadata.storage_data = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shift_chunk, "overlap|KeyError|damaged"),
        (drop_chunk, "do not fill"),
        (leave_folder, "outside the folder"),
        (beyond_the_file, "asks for"),
        (negative, "is not a shape"),
        (wrong_types, "not text"),
        (no_storage, "damaged"),
    ],
)
def test_contradictions_in_the_metadata(tmp_path: Path, change: Any, message: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", random_tensors(), LAYERS, cut=as_ranks)
    change_metadata(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        reader(checkpoint)


def test_records_of_another_type_or_shape(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", random_tensors(), LAYERS)

    def lie(metadata: Any) -> None:
        metadata.state_dict_metadata["decoder.final_layernorm.weight"].properties.dtype = torch.bfloat16

    change_metadata(checkpoint, lie)
    with reader(checkpoint) as stored, pytest.raises(ValueError, match=r"it contains torch\.float32"):
        rows_of(stored, "decoder.final_layernorm.weight", None, 0, 1)


@given(data=st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_end_in_an_error_or_in_the_truth(tmp_path: Path, data: st.DataObject) -> None:
    """Damage outside what is read may pass; a wrong number may not."""
    tensors = random_tensors()
    checkpoint = tmp_path / "c"
    shutil.rmtree(checkpoint, ignore_errors=True)
    write_checkpoint(checkpoint, tensors, LAYERS)
    name = data.draw(st.sampled_from((".metadata", "__0_0.distcp", "__0_0.distcp", "metadata.json")))
    file = checkpoint / "release" / name
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[position] = data.draw(st.integers(0, 255))
        else:
            del content[position:]
            break
        content = content or bytearray(b"x")
    file.write_bytes(content)
    try:
        with reader(checkpoint) as stored:
            found = {
                key: rows_of(stored, key, None, 0, len(tensors[key]))
                for key in stored.tensors
                if not key.startswith("decoder.layers") and key in tensors
            }
    except ValueError:
        return
    # a damaged key may have become another name, never another number
    for key, tensor in found.items():
        if name != ".metadata":
            assert torch.equal(tensor, tensors[key])


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a torch_dist checkpoint"):
        reader(tmp_path)
    checkpoint = write_checkpoint(tmp_path / "c", random_tensors(), LAYERS)
    (checkpoint / "release" / "__0_0.distcp").unlink()
    with pytest.raises(ValueError, match="missing"):
        reader(checkpoint)
    (checkpoint / "release" / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"contains no \.metadata"):
        reader(checkpoint)
    (checkpoint / "release" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ValueError, match="zarr"):
        reader(checkpoint)


def test_the_chunks_of_a_layer_are_those_that_a_scan_finds() -> None:
    # layers 0 and 1 in one chunk, layer 2 in two chunks of rows, layer 3 in two of columns
    cuts = [((0, 0, 0), (2, 4, 6)), ((2, 0, 0), (1, 1, 6)), ((2, 1, 0), (1, 3, 6))]
    cuts += [((3, 0, 0), (1, 4, 2)), ((3, 0, 2), (1, 4, 4))]
    chunks = tuple(
        Chunk(offsets=offsets, shape=shape, file=Path("x"), start=0, length=0) for offsets, shape in cuts
    )
    tensor = ShardedTensor(shape=(4, 4, 6), dtype=torch.float32, chunks=chunks)
    for _ in range(2):  # made, then remembered
        assert [tensor.chunks_of(layer) for layer in range(4)] == [
            chunks[:1],
            chunks[:1],
            chunks[1:3],
            chunks[3:],
        ]
    assert tensor.chunks_of(None) == chunks
    assert tensor.chunks_of(4) == ()
