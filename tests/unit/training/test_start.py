from __future__ import annotations

from pathlib import Path

import pytest

from megatron_exact.files import sha256_file
from megatron_exact.integrity import write_integrity
from megatron_exact.training.checkpoints.folders import TRACKER
from megatron_exact.training.checkpoints.start import choose_start, require_free_run


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
    with pytest.raises(ValueError, match="holds no checkpoint"):
        choose_start(str(tmp_path / "typo"), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="holds no checkpoint"):
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
    with pytest.raises(ValueError, match="holds no iter_0000003"):
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
    with pytest.raises(ValueError, match=r"holds a run already \(run.json\)"):
        require_free_run(str(run), run, fresh, is_own=False)
    # stopped before its first save: the same command begins it again
    require_free_run(str(run), run, choose_start(str(run), str(run)), is_own=True)
    checkpoint(run, "iter_0000003")
    with pytest.raises(ValueError, match="holds a run already"):
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
