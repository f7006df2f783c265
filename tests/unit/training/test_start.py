from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.files import sha256_file
from megatron_exact.integrity import Belonging, Previous, previous_of, write_integrity
from megatron_exact.training.checkpoint_start import TRACKER, choose_start, require_free_run


def checkpoint(folder: Path, name: str, content: bytes = b"tensors") -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / ".metadata").write_bytes(b"index")
    (path / "metadata.json").write_text("{}")
    (path / "__0_0.distcp").write_bytes(content)
    write_integrity(path, {entry.name: sha256_file(entry) for entry in path.iterdir()})
    number = name.removeprefix("iter_")
    (folder / TRACKER).write_text(str(int(number)) if number.isdigit() else number)
    return path


def test_no_load_starts_fresh(tmp_path: Path) -> None:
    start = choose_start(None, str(tmp_path))
    assert (start.load, start.is_resume, start.arguments()) == (None, False, [])


@pytest.mark.parametrize("make_folder", [True, False])
def test_load_equal_to_save_without_checkpoint_starts_fresh_and_says_so(
    make_folder: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    if make_folder:
        folder.mkdir()
    start = choose_start(str(folder), str(tmp_path / "." / "run"))
    assert start.arguments() == []
    assert "starting fresh" in start.message


def test_load_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains no checkpoint"):
        choose_start(str(tmp_path / "typo"), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="contains no checkpoint"):
        choose_start(str(tmp_path / "typo"), None)


def test_resume_takes_the_newest_intact_iteration_and_names_the_others(tmp_path: Path) -> None:
    for name in ("iter_0000002", "iter_0000004", "iter_0000010"):
        checkpoint(tmp_path, name)
    (tmp_path / "iter_0000010" / "__0_0.distcp").write_bytes(b"")
    start = choose_start(str(tmp_path), str(tmp_path))
    assert start.arguments() == ["--load", str(tmp_path), "--ckpt-step", "4"]
    assert start.is_resume
    assert "iter_0000010 has an empty __0_0.distcp" in start.message


def test_a_step_that_is_asked_for_is_not_exchanged(tmp_path: Path) -> None:
    for name in ("iter_0000002", "iter_0000004"):
        checkpoint(tmp_path, name)
    assert choose_start(str(tmp_path), None, step=2).iteration == 2
    (tmp_path / "iter_0000002" / "metadata.json").unlink()
    with pytest.raises(ValueError, match="no intact checkpoint: iter_0000002 lacks metadata"):
        choose_start(str(tmp_path), None, step=2)
    with pytest.raises(ValueError, match="contains no iter_0000003"):
        choose_start(str(tmp_path), None, step=3)


def test_pretrained_weights_serve_until_the_run_has_its_own(tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    checkpoint(base, "release")
    start = choose_start(str(run), str(run), str(base))
    assert start.arguments() == ["--load", str(base), "--finetune"]
    assert not start.is_resume
    checkpoint(run, "iter_0000003")
    start = choose_start(str(run), str(run), str(base))
    assert start.arguments() == ["--load", str(run), "--ckpt-step", "3"]
    assert start.is_resume


def test_what_is_newer_than_the_tracker_is_not_taken(tmp_path: Path) -> None:
    """After a course was given up by --ckpt-step, or another run left its checkpoints there."""
    for name in ("iter_0000006", "iter_0000003"):
        checkpoint(tmp_path, name)
    start = choose_start(str(tmp_path), str(tmp_path))
    assert start.iteration == 3
    assert "iter_0000006 is newer than" in start.message
    (tmp_path / TRACKER).write_text("6")
    assert choose_start(str(tmp_path), str(tmp_path)).iteration == 6


def test_a_step_belongs_to_where_the_weights_first_came_from(tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    for name in ("iter_0000002", "iter_0000004"):
        checkpoint(base, name)
    assert choose_start(str(run), str(run), str(base), step=2).iteration == 2
    checkpoint(run, "iter_0000009")
    assert choose_start(str(run), str(run), str(base), step=2).iteration == 9


def test_a_folder_with_another_run_is_not_begun_again(tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    checkpoint(base, "iter_0000002")
    fresh = choose_start(str(base), str(run))
    require_free_run(str(run), run, fresh, is_own=False)
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"already contains a run \(run.json\)"):
        require_free_run(str(run), run, fresh, is_own=False)
    # stopped before its first save: the same command begins it again
    require_free_run(str(run), run, choose_start(str(run), str(run)), is_own=True)
    checkpoint(run, "iter_0000003")
    with pytest.raises(ValueError, match="already contains a run"):
        require_free_run(str(run), None, fresh, is_own=False)
    require_free_run(str(run), run, choose_start(str(run), str(run)), is_own=True)


def test_a_garbage_tracker_stops_with_a_remedy(tmp_path: Path) -> None:
    """Upstream stops with exit code 0."""
    checkpoint(tmp_path, "iter_0000002")
    (tmp_path / TRACKER).write_text("garbage")
    with pytest.raises(ValueError, match="says 'garbage'"):
        choose_start(str(tmp_path), str(tmp_path))


def test_a_first_save_that_was_cut_off_is_no_checkpoint(tmp_path: Path) -> None:
    """Nothing was ever complete there: the same command has to begin again by itself."""
    path = checkpoint(tmp_path, "iter_0000005")
    (tmp_path / TRACKER).unlink()
    assert choose_start(str(tmp_path), str(tmp_path)).is_resume  # sealed: only the tracker was not written
    (path / "integrity.json").unlink()
    start = choose_start(str(tmp_path), str(tmp_path))
    assert start.arguments() == []
    assert "a first save that was cut off" in start.message
    require_free_run(str(tmp_path), tmp_path, start, is_own=True)
    with pytest.raises(ValueError, match=r"integrity\.json"):  # of another run it is damaged
        choose_start(str(tmp_path), str(tmp_path / "other"))
    (tmp_path / TRACKER).write_text("5")  # and here a save was complete once
    with pytest.raises(ValueError, match=r"integrity\.json"):
        choose_start(str(tmp_path), str(tmp_path))


RUN = {"run_id": "a" * 32, "weighting": {"rule": "exact"}, "fingerprint": "f" * 64}


def save(folder: Path, number: int, previous: Path | None, **about: Any) -> Path:
    """An iteration as a job of the run leaves it."""
    shutil.rmtree(folder / f"iter_{number:07d}", ignore_errors=True)
    path = checkpoint(folder, f"iter_{number:07d}", b"%d" % number)
    own: dict[str, Any] = {"run_id": RUN["run_id"], "weighting": "exact", "fingerprint": RUN["fingerprint"]}
    belonging = Belonging(
        origin="saved",
        **{"iteration": number, **own, **about},
        previous=None if previous is None else previous_of(previous),
    )
    names = [".metadata", "metadata.json", "__0_0.distcp"]
    write_integrity(path, {name: sha256_file(path / name) for name in names}, belonging)
    return path


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A run saved at 2, 4 and 6."""
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    last: Path | None = None
    for iteration in (2, 4, 6):
        last = save(tmp_path, iteration, last)
    return tmp_path


def resume(folder: Path, **how: Any) -> Any:
    return choose_start(str(folder), str(folder), **how)


def test_the_checkpoints_of_a_run_are_taken_in_their_chain(chain: Path) -> None:
    start = resume(chain)
    assert start.iteration == 6
    assert start.message == f"resuming from iter_0000006 of {chain}"
    assert start.previous == previous_of(chain / "iter_0000004")
    older = start.fall_back("is damaged")
    assert older.iteration == 4
    assert older.fall_back("is damaged").iteration == 2


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "run": ({"run_id": "b" * 32}, "belongs to another run: its integrity.json says iteration 6, run bbbb"),
    "rule": ({"weighting": "none"}, "belongs to another run: .* weighting none"),
    "pack": ({"fingerprint": "0" * 64}, "belongs to another run: .* pack 0000"),
    "renamed": ({"iteration": 4}, "was renamed: its integrity.json says iteration 4, run aaaa"),
}


@pytest.mark.parametrize("which", OTHER)
@pytest.mark.parametrize("is_resume", [True, False])
def test_a_checkpoint_of_another_run_or_iteration_stops_the_job(
    is_resume: bool, which: str, chain: Path, tmp_path: Path
) -> None:
    """Resuming from an older one would hide a mistake."""
    about, words = OTHER[which]
    save(chain, 6, chain / "iter_0000004", **about)
    with pytest.raises(ValueError, match=f"iter_0000006 {words}"):
        resume(chain) if is_resume else choose_start(None, str(tmp_path / "new"), str(chain))


def test_an_older_checkpoint_of_another_run_is_passed_over(chain: Path) -> None:
    save(chain, 4, chain / "iter_0000002", run_id="b" * 32)
    (chain / TRACKER).write_text("6")
    start = resume(chain).fall_back("is damaged")
    assert start.iteration == 2
    assert "iter_0000004 belongs to another run" in start.message


def test_an_older_checkpoint_outside_the_chain_is_passed_over(chain: Path) -> None:
    """Of a copy of the run that went another way, with the same run id."""
    save(chain, 5, chain / "iter_0000002")
    (chain / TRACKER).write_text("6")
    start = resume(chain).fall_back("is damaged")
    assert start.iteration == 4
    assert (
        "iter_0000005 is not in the course that led to iter_0000006, which continued iteration 4"
        in start.message
    )
    save(chain, 4, None)
    (chain / TRACKER).write_text("6")
    start = resume(chain).fall_back("is damaged")
    assert start.iteration == 2
    assert "iter_0000004 is not the checkpoint that iter_0000006 continued" in start.message


def test_a_checkpoint_that_does_not_name_its_run(chain: Path) -> None:
    """It is taken where the run is of an older version, not where every save of the run names it."""
    checkpoint(chain, "iter_0000008")
    with pytest.raises(ValueError, match="iter_0000008 does not name its run, as all of this run do"):
        resume(chain)
    assert resume(chain, needs_integrity=False).iteration == 8
    for record in ({**RUN, "run_id_since": 8}, {key: RUN[key] for key in ("weighting", "fingerprint")}):
        (chain / "run.json").write_text(json.dumps(record))
        start = resume(chain)
        assert start.iteration == 8
        assert start.message.endswith("names no run: Megatron or an older version wrote it")


def test_what_a_tool_sealed_is_taken_with_a_line(chain: Path) -> None:
    path = checkpoint(chain, "iter_0000008")
    names = [".metadata", "metadata.json", "__0_0.distcp"]
    hashes = {name: sha256_file(path / name) for name in names}
    write_integrity(path, hashes, Belonging(origin="sealed", iteration=8))
    assert resume(chain).message.endswith("nothing shows which run it belongs to")
    write_integrity(path, hashes, Belonging(origin="sealed", iteration=4))
    with pytest.raises(ValueError, match="iter_0000008 was renamed"):
        resume(chain)


def test_a_file_of_another_size_is_found_without_reading_it(chain: Path) -> None:
    (chain / "iter_0000006" / "__0_0.distcp").write_bytes(b"longer")
    start = resume(chain)
    assert start.iteration == 4
    assert "__0_0.distcp has 6 bytes instead of 1" in start.message


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a link": lambda path: path.symlink_to("nowhere"),
    "a folder": os.mkdir,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_something_else_in_the_place_of_tracker_or_folder_is_no_hang(kind: str, chain: Path) -> None:
    (chain / TRACKER).unlink()
    SPECIAL[kind](chain / TRACKER)
    if kind != "a folder":
        SPECIAL[kind](chain / "iter_0000008")
    start = resume(chain)
    assert start.iteration == 6
    assert f"latest_checkpointed_iteration.txt is {kind} and is not read" in start.message


@pytest.mark.parametrize("text", ["9" * 5000, "\u00b2", "6.0", "-6", "six"])
def test_a_tracker_that_names_no_iteration_is_one_line(text: str, chain: Path) -> None:
    (chain / TRACKER).write_text(text)
    with pytest.raises(
        ValueError, match=r"latest_checkpointed_iteration.txt says .*neither an iteration"
    ) as told:
        resume(chain)
    assert len(str(told.value)) < 500


@pytest.mark.parametrize("step", ["x", "-1", "1.0", "\u00b2", "9" * 5000, ""])
def test_a_step_that_is_no_number_is_one_line_with_its_flag(step: str) -> None:
    from megatron_exact.training.job import _iteration

    assert _iteration("12") == 12
    with pytest.raises(ValueError, match=r"--ckpt-step .* is not an iteration") as told:
        _iteration(step)
    assert len(str(told.value)) < 200


def test_folders_that_are_not_named_like_iterations_are_none(chain: Path) -> None:
    for name in ("iter_\u00b2", "iter_6", "iter_000000006", "iter_" + "9" * 200, "iter_backup"):
        (chain / name).mkdir()
    assert resume(chain).iteration == 6


def test_a_record_that_is_none_is_one_line_with_its_name(chain: Path) -> None:
    for junk in (b"[]", b"\x00\xff\xfe", b"", b"{", b'{"resumes": 3}', b"[" * 100_000):
        (chain / "run.json").write_bytes(junk)
        with pytest.raises(ValueError, match=r"run\.json") as told:
            resume(chain)
        assert "\n" not in str(told.value)


def test_the_manifest_of_an_iteration_reads_back(chain: Path) -> None:
    from megatron_exact.integrity import read_seal

    seal = read_seal(chain / "iter_0000004")
    assert seal is not None
    assert seal.belonging is not None
    two = sha256_file(chain / "iter_0000002" / "integrity.json")
    assert seal.belonging.previous == Previous(iteration=2, sha256=two)
    assert seal.sizes == {".metadata": 5, "metadata.json": 2, "__0_0.distcp": 1}
    content = json.loads((chain / "iter_0000004" / "integrity.json").read_text())
    for key, value in (("iteration", "4"), ("run_id", 3), ("previous", []), ("sizes", {"other": 1})):
        about = {**content["checkpoint"], key: value}
        file = chain / "iter_0000004" / "integrity.json"
        file.write_text(json.dumps({**content, "checkpoint": about}))
        with pytest.raises(ValueError, match="is not a list of sha256 hashes"):
            read_seal(chain / "iter_0000004")
