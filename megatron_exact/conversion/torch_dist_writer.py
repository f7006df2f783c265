"""Writing a torch_dist checkpoint one block at a time, without Megatron and without a process group.

torch's own writer does the writing (`torch.distributed.checkpoint.FileSystemWriter`); a planner of ours
hands it one record at a time, and the record is written a megabyte at a time: what was read is checked,
summed (CRC-32), hashed for `integrity.json` and written while it is in the processor's cache. Memory does
not depend on the size of a record. `checkpoint_layout.py` describes the format.

A record has the bytes of `torch.save`, but torch copies the tensor and computes its CRC-32 at 2.5 GB/s.
Here the zip file around a tensor is made once for each shape (`_RecordForm`), and the CRC-32, computed at
12 GB/s, is filled in behind the bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import mmap
import os
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal.isal_zlib import crc32
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_exact.conversion.checkpoint_layout import (
    BACKEND,
    BACKEND_FILE,
    COMMON_STATE,
    INDEX_FILE,
    extra_state_keys,
    is_iteration_name,
    iteration_of,
)
from megatron_exact.files import sha256_file
from megatron_exact.integrity import Belonging, write_integrity

RECORD_OVERHEAD_BYTES = 1 << 16  # of the zip file around a tensor's bytes; it takes about 1.3 kB


@dataclass(frozen=True, kw_only=True)
class Block:
    """A piece of a tensor that is read and written as one."""

    key: str
    """Key of the tensor."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offsets: tuple[int, ...]
    """Where the piece begins, one number an axis."""
    shape: tuple[int, ...]
    """Its shape, with as many axes."""
    dtype: torch.dtype
    """dtype of the tensor."""
    parts: Callable[[], Iterator[np.ndarray[Any, Any]]]
    """Yields the bytes of the piece from front to back, uint8 [num_bytes] in all, row-major. An array is
    valid until the next one is asked for."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the piece."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_torch_dist(folder: Path, blocks: Sequence[Block], objects: Mapping[str, bytes]) -> dict[str, str]:
    """Write all files of one iteration into an empty folder.

    Args:
        folder: where to write.
        blocks: pieces that tile every tensor.
        objects: key -> what torch.save wrote (`object_record`).

    Returns:
        File name -> sha256, as in integrity.json.
    """
    writer = _Writer(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "torch.distributed is unavailable or uninitialized": as meant
            save(
                {},  # the planner knows what to write
                storage_writer=writer,
                planner=_BlockPlanner(blocks, objects),
                no_dist=True,
            )
    except CheckpointException as error:
        # torch wraps whatever stopped the writing, a full disk, ^C or SIGTERM alike
        raise error.failures[0][0] from None
    backend = folder / BACKEND_FILE
    backend.write_text(json.dumps(BACKEND))
    hashes = {
        **writer.hashes(),
        **{name: sha256_file(folder / name) for name in (INDEX_FILE, BACKEND_FILE)},
    }
    iteration = iteration_of(folder) if is_iteration_name(folder.name) else None
    write_integrity(folder, hashes, Belonging(origin="imported", iteration=iteration or 0))
    return hashes


def objects_of_release(num_layers: int, *, qk_norm: bool = False) -> dict[str, bytes]:
    """Return the objects beside the tensors that Megatron's loader asks for; see `extra_state_keys`."""
    common = object_record({"checkpoint_version": 3.0, "iteration": 0})
    empty = object_record(None)
    return {COMMON_STATE: common, **dict.fromkeys(extra_state_keys(num_layers, qk_norm=qk_norm), empty)}


def object_record(value: Any) -> bytes:
    """Return the bytes of one object, as Megatron stores it: torch.save of a list of one."""
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream.getvalue()


class _BlockPlanner(SavePlanner):
    """A plan that is the list of blocks and objects itself.

    Every item is handed to the writer as bytes. torch.save into the file would call the file's `write`
    from C++, where an exception, a full disk or ^C, ends the process; into memory it calls none. A tensor's
    bytes do not pass through torch.save at all.
    """

    def __init__(self, blocks: Sequence[Block], objects: Mapping[str, bytes]) -> None:
        self._makers: dict[MetadataIndex, Callable[[], io.BytesIO]] = {}
        self._items: list[WriteItem] = []
        records = _TensorRecords()
        for key, record in objects.items():
            index = MetadataIndex(key)
            self._items.append(WriteItem(index=index, type=WriteItemType.BYTE_IO))
            self._makers[index] = functools.partial(_Record, (record,))
        for block in blocks:
            index = MetadataIndex(block.key, torch.Size(block.offsets))
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.shape)),
                properties=TensorProperties(dtype=block.dtype),
                size=torch.Size(block.global_shape),
            )
            self._items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
            self._makers[index] = functools.partial(records.of, block)

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Do nothing: the state dict is empty."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        as_bytes = [
            dataclasses.replace(
                plan,
                items=[dataclasses.replace(item, type=WriteItemType.BYTE_IO) for item in plan.items],
            )
            for plan in plans
        ]
        return as_bytes, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> io.BytesIO:
        return self._makers[write_item.index]()


class _Record(io.BytesIO):
    """Bytes of an item in parts, in the type that torch's writer asks for.

    The writer gives what `getbuffer` returns to the stream, which is a `_HashingStream`.
    """

    def __init__(self, parts: Iterable[Any]) -> None:
        super().__init__()
        self._parts = parts

    def getbuffer(self) -> Any:
        return self._parts


class _TensorRecords:
    """Makes the records of tensors; those of one shape and dtype share a form."""

    def __init__(self) -> None:
        self._forms: dict[tuple[tuple[int, ...], torch.dtype], _RecordForm] = {}

    def of(self, block: Block) -> _Record:
        """Return the record of a block, which is read while the record is written."""
        return _Record(self._parts(block))

    def _parts(self, block: Block) -> Iterator[Any]:
        key = (block.shape, block.dtype)
        if key not in self._forms:
            self._forms[key] = _RecordForm(*key)
        form = self._forms[key]
        yield form.head
        crc = size = 0
        for part in block.parts():
            crc = crc32(part, crc)
            size += part.nbytes
            yield part
        assert size == block.num_bytes, "a block has all its bytes"
        yield form.tail(crc)


class _RecordForm:
    """What torch.save writes before and after the bytes of a tensor of one shape and dtype.

    torch itself makes it, with the bytes left out (`torch.serialization.skip_data`). Three things after the
    bytes depend on their CRC-32: that number in their data descriptor and in the central directory, and
    torch's `serialization_id`, whose last 20 digits combine the CRC-32 of all entries before it.

    Args:
        shape: of the tensor.
        dtype: of its elements.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        tensor = torch.empty(shape, dtype=dtype)
        assert 0 < tensor.nbytes < 1 << 32  # other entries have other headers
        memory = mmap.mmap(-1, tensor.nbytes + RECORD_OVERHEAD_BYTES, flags=mmap.MAP_PRIVATE)
        with torch.serialization.skip_data():
            torch.save(tensor, memory)  # type: ignore[arg-type]  # it has the one method that is used
        end = memory.tell()
        with zipfile.ZipFile(io.BytesIO(memoryview(memory)[:end])) as archive:
            entries = archive.infolist()
            directory = archive.start_dir
        names = [entry.filename.partition("/")[2] for entry in entries]
        data, last = names.index("data/0"), names.index(".data/serialization_id")
        starts = [_entry_start(memory, entry.header_offset) for entry in entries]
        after = starts[data] + tensor.nbytes
        self.head = memory[: starts[data]]
        self._tail = memory[after:end]
        self._crcs = [entry.CRC for entry in entries[:last]]
        self._data = data
        places = [directory]  # of each entry in the central directory
        for _ in entries:
            sizes = struct.unpack_from("<HHH", memory, places[-1] + 28)  # name, extra field, comment
            places.append(places[-1] + 46 + sum(sizes))
        self._crc_places = [4, places[data] + 16 - after]
        id_start = starts[last] - after
        self._id_place = id_start + 20
        self._id = slice(id_start, id_start + 40)
        self._id_crc_places = [id_start + 40 + 4, places[last] + 16 - after]

    def tail(self, crc: int) -> bytes:
        """What follows the bytes of a tensor with this CRC-32."""
        tail = bytearray(self._tail)
        for place in self._crc_places:
            struct.pack_into("<I", tail, place, crc)
        combined = 0
        for number, value in enumerate(self._crcs):
            mixed = (
                (crc if number == self._data else value) + 0x9E3779B9 + (combined << 6) + (combined >> 2)
            )
            combined = (combined ^ mixed) & (1 << 64) - 1
        tail[self._id_place : self._id_place + 20] = b"%020d" % combined
        for place in self._id_crc_places:
            struct.pack_into("<I", tail, place, crc32(tail[self._id]))
        return bytes(tail)


def _entry_start(memory: mmap.mmap, header: int) -> int:
    """First byte of an entry's content, from its local header."""
    name_bytes, extra_bytes = struct.unpack_from("<HH", memory, header + 26)
    return header + 30 + int(name_bytes) + int(extra_bytes)


class _Writer(FileSystemWriter):
    """torch's writer: one file, one thread, no copy ahead, nothing in `.metadata` that names a place."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, thread_count=1, sync_files=True, per_thread_copy_ahead=0)
        self.fs = self._files = _HashingFiles()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()

    def hashes(self) -> dict[str, str]:
        """Return file name -> sha256 of the record files."""
        return {name: digest.hexdigest() for name, digest in self._files.digests.items()}


class _HashingFiles(FileSystem):
    """Hashes every .distcp file while it is written, front to back."""

    def __init__(self) -> None:
        self.digests: dict[str, Any] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        path = Path(path)
        with super().create_stream(path, mode) as stream:
            if path.suffix != ".distcp":
                yield stream
                return
            digest = self.digests[path.name] = hashlib.sha256()
            yield _HashingStream(stream, digest)


class _HashingStream:
    """A file that can only be appended to."""

    def __init__(self, stream: Any, digest: Any) -> None:
        self._stream = stream
        self._digest = digest

    def write(self, parts: Iterable[Any]) -> int:
        """Append the parts of a `_Record`, each hashed and written before the next one is made."""
        count = 0
        for part in parts:
            self._digest.update(part)
            count += self._stream.write(part)
        return count

    def tell(self) -> int:
        position: int = self._stream.tell()
        return position

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        number: int = self._stream.fileno()
        return number

    def close(self) -> None:
        self._stream.close()
