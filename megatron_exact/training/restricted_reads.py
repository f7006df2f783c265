"""Restricted reads of checkpoints: nothing in a checkpoint is executed.

Hashes do not protect against an attacker who can write the folder, since `integrity.json` can be rewritten
with the rest, and a scan before the load could be overtaken by an exchange of the file. Therefore the
reading functions of torch and Megatron are replaced, for every job and for the masking check, before any
file of a checkpoint is opened. In torch 2.13 and megatron-core 0.19.2 a load reaches a pickle in these
places:

`FileSystemReader.read_metadata` (torch/distributed/checkpoint/filesystem.py; Megatron's caching reader
calls it): `pickle.load` of `.metadata`. Replaced by `parse_metadata`.

`DefaultLoadPlanner.load_bytes` (torch/distributed/checkpoint/default_planner.py): `torch.load(...,
weights_only=False)` of every byte entry of a `.distcp` file: `common_state` with the arguments and the
schedule, `rng_state`, `rerun_state_machine_state`, states of the optimizer, `_extra_state`. Replaced by
`load_object`.

`FileSystemReader.read_data`: tensors, with `weights_only=True`. Not replaced; it opens only files that
`read_metadata` has let through.

`load_common` (megatron/core/dist_checkpointing/strategies/common.py): `torch.load` without `weights_only`
of `common.pt` of older versions, which an environment variable of torch makes unrestricted. Replaced by
`load_object`.

`TransformerEngineBaseModule.set_extra_state`: `pickle.loads` of a byte tensor, or `torch.load` of a
BytesIO. It gets bytes that are written here, from the result of `load_extra_state`.

`_load_base_checkpoint` (megatron/training/checkpointing.py): `torch.load` of the format with one file a
rank, and `torch_dcp` with its own readers. Not reachable: any format but torch_dist is an error.

`_get_filesystem_reader` (megatron/core/dist_checkpointing): readers of other packages (multi-storage
client, nvidia-resiliency-ext), one of them chosen by arguments inside the checkpoint. Replaced by torch's
reader.

`--use-checkpoint-args`, `--non-persistent-ckpt-type`, `--yaml-cfg` and Megatron's dataset formats
(`np.load`) are flags that are not supported (`flag_classes.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.serialization as serialization
import megatron.core.dist_checkpointing.strategies.torch as torch_strategy
import megatron.training.checkpointing as checkpointing
import torch
from megatron.core.dist_checkpointing import check_is_distributed_checkpoint
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_exact.command_line import describe
from megatron_exact.conversion.torch_dist_reader import (
    LARGEST_METADATA_BYTES,
    load_extra_state,
    load_object,
    parse_metadata,
)
from megatron_exact.files import read_regular_file
from megatron_exact.integrity import INTEGRITY_FILE, is_name, read_integrity
from megatron_exact.training.checkpoint_integrity import on_rank_0

_latest: tuple[bytes, Metadata] | None = None
"""sha256 and content of the last `.metadata` that was read; a load reads it four times."""
_only_listed = True


def install(*, only_listed: bool) -> None:
    """Replace the reads of torch and Megatron by restricted ones in this process.

    Args:
        only_listed: whether a file that integrity.json does not list is an error
            (False: `--skip-integrity-check`).
    """
    global _only_listed
    _only_listed = only_listed
    FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign, assignment]
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign, assignment]
    serialization.load_common = _load_common
    serialization._get_filesystem_reader = torch_strategy._get_filesystem_reader = _reader
    checkpointing._get_checkpoint_format = _torch_dist_only


def require_readable_index(checkpoint: Path) -> None:
    """Read `.metadata` once on rank 0, so that a hostile file is an error of one line.

    torch would try to read it a second time.

    Raises:
        AgreedError: on every rank, if it cannot be read.
    """

    def read() -> None:  # on_rank_0 would broadcast what it returns
        FileSystemReader(checkpoint).read_metadata()

    on_rank_0(read)


def _read_metadata(reader: FileSystemReader, *_: Any, **kwargs: Any) -> Metadata:
    """Read `.metadata`, and require that each of its records lies in a listed file of the folder."""
    global _latest
    folder = Path(reader.path)
    name = Path(reader._get_metadata_path(kwargs.get("rank"))).name
    data = read_regular_file(folder / name, LARGEST_METADATA_BYTES)
    digest = hashlib.sha256(data).digest()
    if _latest is None or _latest[0] != digest:
        _latest = digest, parse_metadata(data, folder / name)
    found = dataclasses.replace(_latest[1])
    _require_listed(folder, [name, *{_file_of(info) for info in found.storage_data.values()}])
    # as in torch: `storage_meta` of an older checkpoint is None
    found.storage_meta = found.storage_meta or StorageMeta()
    found.storage_meta.load_id = reader.load_id
    return found


def _file_of(info: Any) -> str:
    name = getattr(info, "relative_path", None)
    if not isinstance(name, str) or not is_name(name):
        raise ValueError(f"its .metadata names a record in {str(name)[:80]!r}, outside the folder")
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"its .metadata names records of {name} that are stored through a transformation")
    return name


def _require_listed(folder: Path, names: list[str]) -> None:
    listed = read_integrity(folder) if _only_listed else None
    for name in names:
        if listed is not None and name not in listed:
            raise ValueError(f"{folder / name} is not listed in {INTEGRITY_FILE} and is not read")


def _load_bytes(planner: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """Load a byte entry into the state dict of the planner."""
    name = read_item.dest_index.fqn
    loaded = load_object(value, f"the entry {name} of the checkpoint")
    if "_extra_state" in name and isinstance(loaded, list):
        loaded = [_safe_extra_state(item, name) for item in loaded]
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], loaded)
    else:
        planner.state_dict[name] = loaded


def _safe_extra_state(state: Any, name: str) -> Any:
    """Return the same state in bytes written here; without Transformer Engine nothing unpickles it."""
    if "transformer_engine" not in sys.modules:
        return state
    source = f"the entry {name} of the checkpoint"
    if isinstance(state, torch.Tensor) and state.numel():
        content = load_extra_state(state.detach().cpu().numpy().tobytes(), source)
        return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)
    if isinstance(state, io.BytesIO):  # before Transformer Engine 2.0
        state.seek(0)
        copy = io.BytesIO()
        torch.save(load_object(state, source), copy)
        copy.seek(0)
        return copy
    return state


def _load_common(checkpoint_dir: str) -> Any:
    """Load `common.pt`."""
    folder = Path(checkpoint_dir)
    _require_listed(folder, [COMMON_STATE_FNAME])
    return load_object(folder / COMMON_STATE_FNAME, str(folder / COMMON_STATE_FNAME))


def _reader(
    checkpoint_dir: str | Path, cache_metadata: bool = False, async_strategy: str = "mcore"
) -> FileSystemReader:
    """Return torch's reader, whatever the arguments inside the checkpoint ask for."""
    return (CachedMetadataFileSystemReader if cache_metadata else FileSystemReader)(checkpoint_dir)


def _torch_dist_only(checkpoint_name: str, args: Any) -> str:
    if not check_is_distributed_checkpoint(checkpoint_name):
        raise ValueError(
            f"{checkpoint_name} is not a torch_dist checkpoint: convert it with Megatron's tools first"
        )
    return "torch_dist"


def explain_read_error(error: CheckpointException, checkpoint: Path | None) -> ValueError:
    """Return a one-line error for torch's CheckpointException, which wraps the error that stopped a load.

    Args:
        error: the exception that was raised.
        checkpoint: folder of the checkpoint.
    """
    cause = next(iter(error.failures.values()))[0]
    text = describe(cause)
    if not isinstance(cause, ValueError | OSError):
        text = f"{type(cause).__name__}: {text}"
    return ValueError(f"{checkpoint} could not be loaded: {text}")
