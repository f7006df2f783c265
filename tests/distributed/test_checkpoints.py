"""Checkpoints that are damaged, cut off, pruned, or written in the background, in whole jobs."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.integrity import check_integrity, read_integrity
from tests.distributed import jobs, ranks

TRACKER = "latest_checkpointed_iteration.txt"


def command(pack: Path, run: Path, checkpoint: Path, iterations: int, *extra: Any) -> list[Any]:
    """The same command starts and resumes; saves every second iteration."""
    start = ("--load", run, "--save", run, "--pretrained-checkpoint", checkpoint, "--save-interval", 2)
    return jobs.command(pack, "exact", iterations, *start, *extra)


@pytest.fixture(scope="module")
def finished(pack: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations on two ranks, saved at 2 and 4, never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    ranks.train(2, command(pack, folder / "run", checkpoint, 4), folder).check()
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(path: Path, num_bytes: int = 64) -> None:
    """Change a bit in some bytes of the largest weight in a file, as a disk or a network might."""
    from megatron_exact.conversion.torch_dist_reader import load_metadata

    stored = load_metadata(path.parent / ".metadata").storage_data
    inside = [
        info
        for index, info in stored.items()
        if info.relative_path == path.name and not index.fqn.startswith("optimizer.")
    ]
    largest = max(inside, key=lambda info: info.length)
    data = bytearray(path.read_bytes())
    middle = largest.offset + largest.length // 2
    for position in range(middle, middle + num_bytes):
        data[position] ^= 1
    path.write_bytes(data)


def losses(run: Path) -> str:
    return (run / "losses.jsonl").read_text()


def test_every_save_is_sealed_as_upstream_would(finished: Path) -> None:
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    for name in ("iter_0000002", "iter_0000004"):
        verify_integrity_manifest(str(finished / name))
        results = check_integrity(finished / name) or []
        assert [fault for _, fault in results] == [None] * len(results)
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"} == {
            name for name, _ in results
        }
    times = [(finished / name).stat().st_mtime_ns for name in ("iter_0000004/integrity.json", TRACKER)]
    assert times == sorted(times)
    start = json.loads((finished / "run.json").read_text())["start_checkpoint"]
    assert start["verified"] is True
    assert len(start["sha256"]) == 64


def test_flipped_bytes_are_found_and_the_iteration_before_is_taken(
    run: Path, finished: Path, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    flip(run / "iter_0000004" / "__1_0.distcp")
    ended = ranks.train(2, command(pack, run, checkpoint, 4), tmp_path / "o").check()
    assert "resuming from iter_0000002" in ended.outputs[0]
    assert "not taken: iter_0000004 is damaged: the sha256 of __1_0.distcp differs" in ended.outputs[0]
    assert losses(run) == losses(finished)
    assert read_integrity(run / "iter_0000004") is not None
    assert all(fault is None for _, fault in check_integrity(run / "iter_0000004") or [("", "none")])


def test_without_the_check_flipped_bytes_load_in_silence(
    run: Path, finished: Path, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """What the check is for; and a constant learning rate has no length, so a run may be made longer."""
    longer = command(pack, run, checkpoint, 5)
    whole = Path(shutil.copytree(finished, tmp_path / "whole"))
    ranks.train(2, command(pack, whole, checkpoint, 5), tmp_path / "o1").check()
    for shard in (run / "iter_0000004").glob("*.distcp"):
        flip(shard)
    ended = ranks.train(2, [*longer, "--skip-integrity-check"], tmp_path / "o2").check()
    assert "contents of" in ended.outputs[0]
    assert "are not verified" in ended.outputs[0]
    good, bad = ranks.read_jsonl(whole / "losses.jsonl"), ranks.read_jsonl(run / "losses.jsonl")
    assert len(good) == len(bad) == 5
    assert good[:4] == bad[:4]
    assert (good[4]["loss"], good[4]["grad_norm"]) != (bad[4]["loss"], bad[4]["grad_norm"])


def test_when_all_are_damaged_nothing_starts(
    run: Path, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    before = losses(run)
    flip(run / "iter_0000004" / "__0_0.distcp")
    (run / "iter_0000002" / "metadata.json").unlink()
    ended = ranks.train(2, command(pack, run, checkpoint, 6), tmp_path / "o")
    assert all(ended.codes)
    errors = [
        line for output in ended.outputs for line in output.splitlines() if line.startswith("error: ")
    ]
    assert len(errors) == 1
    assert "no intact checkpoint: iter_0000004 is damaged: the sha256 of __0_0.distcp differs" in errors[0]
    assert "; iter_0000002 lacks metadata.json;" in errors[0]
    assert "Traceback" not in "".join(ended.outputs)
    assert losses(run) == before


def test_a_checkpoint_without_hashes_is_refused_until_it_is_sealed(
    run: Path, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from megatron_exact.conversion.seal import seal_checkpoints

    for sealed in run.glob("iter_*/integrity.json"):
        sealed.unlink()
    argv = jobs.command(pack, "exact", 5, "--load", run, "--no-load-optim", "--finetune")
    ended = ranks.train(1, argv, tmp_path / "o1")
    assert ended.codes == [1]
    assert "iter_0000004 lacks integrity.json; iter_0000002 lacks integrity.json" in ended.outputs[0]
    assert f"megatron-exact seal-checkpoint {run}" in ended.outputs[0]
    flip(run / "iter_0000002" / "__0_0.distcp")
    four, two = sorted(seal_checkpoints(run), key=lambda sealing: sealing.name, reverse=True)
    assert four.is_sealed
    assert not two.is_sealed
    assert "is damaged" in two.detail
    assert all(fault is None for _, fault in check_integrity(run / "iter_0000004") or [("", "none")])


@pytest.mark.parametrize("content", ["", None], ids=["empty", "missing"])
def test_a_tracker_that_a_full_disk_left_empty_does_not_stop_the_run(
    content: str | None, run: Path, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Upstream would stop, or start from the beginning, with exit code 0."""
    (run / TRACKER).unlink()
    if content is not None:
        (run / TRACKER).write_text(content)
    ended = ranks.train(1, command(pack, run, checkpoint, 4), tmp_path / "o").check()
    assert "the run is finished: iteration 4 of 4" in ended.outputs[0]


def test_a_resume_needs_the_record_of_the_run(
    run: Path, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (run / "run.json").unlink()
    ended = ranks.train(1, command(pack, run, checkpoint, 6), tmp_path / "o")
    assert ended.codes == [1]
    assert "run.json is missing, so nobody knows what the checkpoints were trained on" in ended.outputs[0]


def no_more_than(num_bytes: int) -> Callable[[], None]:
    """Writing beyond this size of a file fails, as on a full disk."""

    def patch() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return patch


def test_a_full_disk_leaves_the_last_checkpoint(
    run: Path, finished: Path, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.rmtree(run / "iter_0000004")
    (run / TRACKER).write_text("2")
    argv = command(pack, run, checkpoint, 4)
    size = (run / "iter_0000002" / "__0_0.distcp").stat().st_size
    ended = ranks.train(2, argv, tmp_path / "o1", no_more_than(size // 2))
    assert all(ended.codes)
    errors = [line for line in ended.outputs[0].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "iter_0000004 could not be written (rank 0, 1; " in errors[0]
    assert "start the same command again" in errors[0]
    assert (run / TRACKER).read_text() == "2"
    assert not (run / "iter_0000004" / "integrity.json").exists()
    ended = ranks.train(2, argv, tmp_path / "o2").check()
    assert "resuming from iter_0000002" in ended.outputs[0]
    assert "iter_0000004 is newer than" in ended.outputs[0]
    assert losses(run) == losses(finished)


def test_asynchronous_saves_hold_what_synchronous_ones_do(
    finished: Path, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = command(pack, run, checkpoint, 4, "--async-save", "--exit-interval", 2)
    ended = ranks.train(2, first, tmp_path / "o1").check()
    assert "async" in ended.outputs[0]
    assert (run / TRACKER).read_text() == "2"
    results = check_integrity(run / "iter_0000002") or []
    assert [fault for _, fault in results] == [None] * len(results)
    assert {"__0_0.distcp", "__1_0.distcp"} < {name for name, _ in results}
    ended = ranks.train(2, command(pack, run, checkpoint, 4, "--async-save"), tmp_path / "o2").check()
    assert "resuming from iter_0000002" in ended.outputs[0]
    assert losses(run) == losses(finished)
    assert sorted(path.name for path in run.glob("iter_*")) == ["iter_0000002", "iter_0000004"]


@pytest.mark.parametrize("flags", [(), ("--async-save",)], ids=["sync", "async"])
def test_older_checkpoints_go_when_a_newer_one_is_complete(
    flags: tuple[str, ...], pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = command(pack, run, checkpoint, 4, "--save-interval", 1, "--keep-last", 2, *flags)
    ended = ranks.train(1, argv, tmp_path / "o").check()
    assert "--keep-last 2: removed iter_0000001" in ended.outputs[0]
    # no step has shown yet that the last one is good: it comes on top
    assert sorted(path.name for path in run.iterdir() if "iter_" in path.name) == [
        "iter_0000002",
        "iter_0000003",
        "iter_0000004",
    ]
    assert all(fault is None for _, fault in check_integrity(run / "iter_0000004") or [("", "none")])


def die(*_: Any) -> None:
    os._exit(9)


@pytest.mark.parametrize("what", ["copying", "writing"])
def test_a_writer_that_dies_ends_the_job(what: str, pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Upstream waits for it without end."""
    run = tmp_path / "run"

    def die_when_busy() -> None:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

        from megatron_exact.training import checkpoint_integrity

        if what == "copying":
            FileSystemWriterAsync.preload_tensors = staticmethod(die)  # type: ignore[method-assign]
        else:
            checkpoint_integrity.WriteThenHash.__call__ = die  # type: ignore[method-assign]

    argv = command(pack, run, checkpoint, 4, "--async-save")
    ended = ranks.train(1, argv, tmp_path / "o", die_when_busy)
    assert ended.codes == [1]
    assert "the process that writes the checkpoints of rank 0 has ended (exit code 9)" in ended.outputs[0]
    assert not (run / TRACKER).exists()


def test_a_save_that_cannot_be_handed_over_ends_the_job(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Upstream's queue prints why, drops the request, and waits for it without end."""

    def hand_over_what_has_no_name() -> None:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

        FileSystemWriterAsync.preload_tensors = staticmethod(lambda *_: None)  # type: ignore[method-assign]

    argv = command(pack, tmp_path / "run", checkpoint, 4, "--async-save")
    ended = ranks.train(1, argv, tmp_path / "o", hand_over_what_has_no_name)
    assert ended.codes == [1]
    assert "the checkpoint could not be handed to the process that writes it: " in ended.outputs[0]
    assert not (tmp_path / "run" / TRACKER).exists()


def test_another_length_is_refused_where_it_would_bend_the_past(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    cosine = ("--lr-decay-style", "cosine", "--min-lr", "1e-4")
    ranks.train(1, command(pack, run, checkpoint, 2, *cosine), tmp_path / "o1").check()
    before = losses(run)
    ended = ranks.train(1, command(pack, run, checkpoint, 3, *cosine), tmp_path / "o2")
    assert ended.codes == [1]
    samples = 2 * jobs.GLOBAL_BATCH
    assert f"the run has followed a cosine learning rate over {samples} samples" in ended.outputs[0]
    assert "Traceback" not in ended.outputs[0]
    assert losses(run) == before
    same = command(pack, run, checkpoint, 3, *cosine, "--lr-decay-iters", 2)
    ranks.train(1, same, tmp_path / "o3").check()
    rates = [line["learning_rate"] for line in ranks.read_jsonl(run / "losses.jsonl")]
    # a cosine from 1e-3 to 1e-4 in 2 iterations, then its end: the rates of the steps that were taken
    assert rates == pytest.approx([1e-3, 5.5e-4, 1e-4])
