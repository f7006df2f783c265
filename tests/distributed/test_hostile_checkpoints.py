"""Checkpoints that ask for code, with hashes of their own that agree: nothing of them runs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_exact.conversion.torch_dist_reader import load_metadata
from megatron_exact.files import sha256_file
from tests.distributed import jobs, ranks

ITERATION = "iter_0000002"


class Asks:
    """An object whose pickle makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def seal_again(folder: Path) -> None:
    """Hashes and sizes that agree with what lies there, as whoever can write the folder can make them."""
    file = folder / "integrity.json"
    record = json.loads(file.read_text())
    there = sorted(path for path in folder.iterdir() if path != file)
    record["files"] = {path.name: sha256_file(path) for path in there}
    if "checkpoint" in record:
        record["checkpoint"]["sizes"] = {path.name: path.stat().st_size for path in there}
    file.write_text(json.dumps(record))


def plant_metadata(folder: Path, mark: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Asks(mark)))


def plant_entry(key: str, save: Callable[[Any, io.BytesIO], None]) -> Callable[[Path, Path], None]:
    """A byte entry, or the record of a tensor, whose bytes ask for code."""

    def plant(folder: Path, mark: Path) -> None:
        index = load_metadata(folder / ".metadata")
        place = next(place for place in index.storage_data if place.fqn.startswith(key))
        info = index.storage_data[place]
        record = io.BytesIO()
        save([Asks(mark)], record)
        shard = folder / info.relative_path
        start = shard.stat().st_size
        with open(shard, "ab") as stream:
            stream.write(record.getvalue())
        index.storage_data[place] = dataclasses.replace(info, offset=start, length=len(record.getvalue()))
        (folder / ".metadata").write_bytes(pickle.dumps(index))

    return plant


def plant_common(folder: Path, mark: Path) -> None:
    torch.save({"iteration": 2, "args": Asks(mark)}, folder / "common.pt")


def old_format(value: Any, stream: io.BytesIO) -> None:
    torch.save(value, stream, _use_new_zipfile_serialization=False)


def bare_pickle(value: Any, stream: io.BytesIO) -> None:
    pickle.dump(value, stream)


PLACES: dict[str, Callable[[Path, Path], None]] = {
    "metadata": plant_metadata,
    "common_state": plant_entry("common_state", torch.save),
    "common_state, old format": plant_entry("common_state", old_format),
    "common_state, bare pickle": plant_entry("common_state", bare_pickle),
    "common.pt": plant_common,
    "rng_state": plant_entry("rng_state", torch.save),
    "extra state": plant_entry("decoder.layers.mlp.linear_fc1._extra_state", torch.save),
    "optimizer": plant_entry("optimizer.distributed.dp_group_idx_0.optimizer", torch.save),
    "tensor": plant_entry("decoder.final_layernorm.weight", torch.save),
}


@pytest.fixture(scope="module")
def finished(pack: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations, to be gone on with."""
    folder = tmp_path_factory.mktemp("finished")
    ranks.train(1, command(pack, folder / "run", checkpoint, 2), folder).check()
    return folder / "run"


def command(pack: Path, run: Path, checkpoint: Path, iterations: int, *extra: Any) -> list[Any]:
    start = ("--load", run, "--save", run, "--pretrained-checkpoint", checkpoint, "--save-interval", 2)
    return jobs.command(pack, "exact", iterations, *start, "--use-distributed-optimizer", *extra)


def load_everything(folder: Path) -> None:
    """Every entry of a checkpoint, through the functions that Megatron calls."""
    from megatron.core.dist_checkpointing import load_common_state_dict
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    load_common_state_dict(str(folder))
    wanted: dict[str, Any] = {}
    for key, entry in load_metadata(folder / ".metadata").state_dict_metadata.items():
        is_tensor = isinstance(entry, TensorStorageMetadata)
        wanted[key] = torch.empty(entry.size, dtype=entry.properties.dtype) if is_tensor else io.BytesIO()
    load(wanted, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("is_restricted", [True, False], ids=["restricted", "stock"])
def test_no_reader_of_a_checkpoint_runs_what_it_finds(
    is_restricted: bool, finished: Path, tmp_path: Path
) -> None:
    """The control: torch's and Megatron's own readers run what lies in most places."""

    def read() -> int:
        from torch.distributed.checkpoint.api import CheckpointException

        from megatron_exact.training import restricted_reads

        if is_restricted:
            restricted_reads.install(only_listed=True)
        load_everything(finished / ITERATION)
        outcomes = {}
        for place, plant in PLACES.items():
            mark = tmp_path / f"executed-{len(outcomes)}"
            folder = Path(shutil.copytree(finished / ITERATION, tmp_path / f"at-{len(outcomes)}"))
            plant(folder, mark)
            seal_again(folder)
            try:
                load_everything(folder)
                said = "loaded"
            except (ValueError, pickle.UnpicklingError, CheckpointException) as error:
                said = " ".join(str(error).split())
            outcomes[place] = (mark.exists(), said)
        (tmp_path / "outcomes.json").write_text(json.dumps(outcomes))
        return 0

    ranks.run_ranks(1, read, tmp_path / "o").check()
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    executed = {place for place, (was_executed, _) in outcomes.items() if was_executed}
    if is_restricted:
        assert not executed
        for place, (_, said) in outcomes.items():
            assert said != "loaded", place
            if place != "tensor":
                assert "it asks for" in said or "cannot be read" in said, (place, said)
    else:
        assert executed >= {"metadata", "common_state", "rng_state", "extra state", "optimizer"}


def test_records_outside_the_folder_or_unlisted_are_not_read(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished / ITERATION, tmp_path / "hostile"))
    index = load_metadata(folder / ".metadata")
    shard = next(iter(index.storage_data.values())).relative_path
    shutil.copy(folder / shard, tmp_path / "outside")
    shutil.copy(folder / shard, folder / "unlisted")

    def read() -> int:
        from torch.distributed.checkpoint.api import CheckpointException

        from megatron_exact.training import restricted_reads

        restricted_reads.install(only_listed=True)
        listed = (folder / "integrity.json").read_text()
        for name, words in (
            ("../outside", "outside the folder"),
            (str(tmp_path / "outside"), "outside the folder"),
            ("unlisted", "is not listed in integrity.json"),
        ):
            for place, info in index.storage_data.items():
                index.storage_data[place] = dataclasses.replace(info, relative_path=name)
            (folder / ".metadata").write_bytes(pickle.dumps(index))
            (folder / "integrity.json").write_text(listed)
            with pytest.raises((ValueError, CheckpointException), match=words):
                load_everything(folder)
        return 0

    ranks.run_ranks(1, read, tmp_path / "o").check()


def errors(ended: ranks.Ended) -> list[str]:
    return [line for output in ended.outputs for line in output.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("place", "way"),
    [("metadata", "pretrained"), ("rng_state", "resume"), ("common_state", "unchecked")],
)
def test_a_job_ends_with_one_line_and_nothing_is_executed(
    place: str, way: str, finished: Path, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run, mark = Path(shutil.copytree(finished, tmp_path / "hostile")), tmp_path / "executed"
    PLACES[place](run / ITERATION, mark)
    seal_again(run / ITERATION)
    argv = command(pack, run, checkpoint, 4)
    if way == "pretrained":
        argv = command(pack, tmp_path / "new", run, 4)
    if way == "unchecked":
        argv.append("--skip-integrity-check")
    before = (run / "losses.jsonl").read_text()
    ended = ranks.train(1, argv, tmp_path / "o")
    assert ended.codes == [1]
    (line,) = errors(ended)
    assert "system, which no" in line
    assert "AssertionError" not in line
    assert "Traceback" not in ended.outputs[0]
    assert not mark.exists()
    assert (run / "losses.jsonl").read_text() == before


def test_the_masking_check_runs_nothing_either(finished: Path, pack: Path, tmp_path: Path) -> None:
    run, mark = Path(shutil.copytree(finished, tmp_path / "hostile")), tmp_path / "executed"
    plant_metadata(run / ITERATION, mark)
    seal_again(run / ITERATION)

    def check() -> int:
        from megatron_exact.training.masking_check import run as check_masking

        argv = jobs.command(pack, "exact", 4, "--load", run)
        return check_masking([str(word) for word in argv], num_documents=1, as_json=True)

    ended = ranks.run_ranks(1, check, tmp_path / "o")
    assert ended.codes == [1]
    assert len(errors(ended)) == 1
    assert not mark.exists()


def test_an_extra_state_of_transformer_engine_is_written_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its tensors come through; a pickle that asks for code does not reach the module that unpickles it."""
    import sys
    import types

    from megatron_exact.training import restricted_reads

    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    state = {"scale_fwd": torch.rand(3), "extra_fp8_variables": {"num_gemms": 1, "fp8_checkpoint": True}}

    def as_bytes(value: Any) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)

    found = restricted_reads._safe_extra_state(as_bytes(state), "x._extra_state")
    again = pickle.loads(found.numpy().tobytes())  # noqa: S301  # bytes that were just written
    assert torch.equal(again["scale_fwd"], state["scale_fwd"])
    assert again["extra_fp8_variables"] == state["extra_fp8_variables"]
    empty = torch.empty(0, dtype=torch.uint8)
    assert restricted_reads._safe_extra_state(empty, "x._extra_state") is empty
    mark = tmp_path / "executed"
    with pytest.raises(ValueError, match=r"it asks for posix\.system"):
        restricted_reads._safe_extra_state(as_bytes({"scale_fwd": Asks(mark)}), "x._extra_state")
    assert not mark.exists()
