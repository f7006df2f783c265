from __future__ import annotations

from pathlib import Path

import pytest

from megatron_exact.integrity import Belonging, write_integrity
from megatron_exact.training import checkpoint_saving
from megatron_exact.training.checkpoint_saving import prune
from megatron_exact.training.checkpoint_start import checkpoints_in


def saved(folder: Path, name: str, *, is_complete: bool = True) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"tensors")
    if is_complete:
        (path / "integrity.json").write_text("{}")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("keep", "left"), [(1, [6]), (2, [4, 6]), (9, [2, 4, 6])])
def test_the_newest_complete_ones_stay(keep: int, left: list[int], tmp_path: Path) -> None:
    for iteration in (2, 4, 6):
        saved(tmp_path, f"iter_{iteration:07d}")
    prune(tmp_path, 6, keep)
    assert names(tmp_path) == [f"iter_{iteration:07d}" for iteration in left]


def test_what_is_not_of_this_course_or_not_complete_is_left_alone(tmp_path: Path) -> None:
    for name in ("iter_0000002", "iter_0000004", "iter_0000099", "release"):
        saved(tmp_path, name)
    saved(tmp_path, "iter_0000003", is_complete=False)
    saved(tmp_path, "iter_0000006", is_complete=False)  # an asynchronous save still in progress
    (tmp_path / "run.json").write_text("{}")
    assert prune(tmp_path, 4, 1) == ["iter_0000002"]
    assert names(tmp_path) == [
        *("iter_0000003", "iter_0000004", "iter_0000006", "iter_0000099"),
        *("release", "run.json"),
    ]


def test_a_checkpoint_of_another_run_is_left_alone(tmp_path: Path) -> None:
    for iteration, run_id in ((2, "ours"), (4, "theirs"), (6, "ours"), (8, "ours")):
        path = saved(tmp_path, f"iter_{iteration:07d}")
        about = Belonging(origin="saved", iteration=iteration, run_id=run_id)
        write_integrity(path, {"__0_0.distcp": "0" * 64}, about)
    assert prune(tmp_path, 8, 1, "ours") == ["iter_0000006", "iter_0000002"]
    assert names(tmp_path) == ["iter_0000004", "iter_0000008"]


def test_nothing_goes_unless_the_save_itself_is_complete(tmp_path: Path) -> None:
    saved(tmp_path, "iter_0000002")
    saved(tmp_path, "iter_0000004", is_complete=False)
    assert prune(tmp_path, 4, 1) == []
    assert names(tmp_path) == ["iter_0000002", "iter_0000004"]


def test_a_kill_in_between_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for iteration in (2, 4, 6):
        saved(tmp_path, f"iter_{iteration:07d}")

    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_saving.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, 6, 1)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["iter_0000006", "iter_0000002"]
    assert prune(tmp_path, 6, 1) == ["iter_0000002"]
    assert names(tmp_path) == ["iter_0000006"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = saved(tmp_path / "elsewhere", "iter_0000002")
    run = tmp_path / "run"
    saved(run, "iter_0000004")
    (run / "iter_0000002").symlink_to(elsewhere)
    assert prune(run, 4, 1) == []
    assert (elsewhere / "integrity.json").exists()


def test_every_mth_stays(tmp_path: Path) -> None:
    for iteration in (5, 10, 15, 20, 25):
        saved(tmp_path, f"iter_{iteration:07d}")
    assert prune(tmp_path, 25, 1, every=10) == ["iter_0000015", "iter_0000005"]
    assert names(tmp_path) == ["iter_0000010", "iter_0000020", "iter_0000025"]
