"""Steps are reused, continued or redone, and never mix the files of two runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_exact.demo.workspace import Step, Workspace, hash_of_code, read_stamp


class Recorder:
    """A step's build function that counts its calls and notes what it found."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []

    def __call__(self, folder: Path) -> None:
        self.found.append(sorted(path.name for path in folder.iterdir() if path.name != "step.json"))
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{len(self.found)}.txt").write_text("made")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def workspace(tmp_path: Path, said: list[str]) -> Workspace:
    return Workspace(tmp_path / "work", said.append)


def fail(folder: Path) -> None:
    (folder / "half").write_text("half")
    raise KeyboardInterrupt


def test_a_finished_step_is_reused(workspace: Workspace, said: list[str]) -> None:
    build = Recorder()
    first = workspace.step("pack", {"rows": 4}, build)
    second = workspace.step("pack", {"rows": 4}, build)
    assert build.found == [[]]
    assert (first.reused, second.reused) == (False, True)
    assert (first.key, first.seconds) == (second.key, second.seconds)
    assert said == ["pack: nothing changed, using what was made before"]


@pytest.mark.parametrize("change", ["options", "missing file", "shorter file", "stamp"])
def test_any_change_starts_again_from_an_empty_folder(
    workspace: Workspace, said: list[str], change: str
) -> None:
    build = Recorder()
    step = workspace.step("pack", {"rows": 4}, build, resumable=True)
    made = step.folder / "data" / "1.txt"
    if change == "missing file":
        made.unlink()
    elif change == "shorter file":
        made.write_text("")
    elif change == "stamp":
        (step.folder / "step.json").write_text("{")
    workspace.step("pack", {"rows": 5 if change == "options" else 4}, build, resumable=True)
    assert build.found == [[], []]
    assert "starting it again" in said[0]


def test_an_interrupted_step_is_redone_unless_it_can_go_on(workspace: Workspace, said: list[str]) -> None:
    for resumable, expected in ((False, []), (True, ["half"])):
        name = f"step_{resumable}"
        with pytest.raises(KeyboardInterrupt):
            workspace.step(name, {"a": 1}, fail, resumable=resumable)
        stamp = read_stamp(workspace.folder / name)
        assert stamp is not None
        assert not stamp["finished"]
        build = Recorder()
        step = workspace.step(name, {"a": 1}, build, resumable=resumable)
        assert build.found == [expected]
        assert step.seconds >= stamp["seconds"] if resumable else True
    assert "continuing" in said[-1]


def test_an_interrupted_step_of_other_options_is_not_continued(workspace: Workspace) -> None:
    with pytest.raises(KeyboardInterrupt):
        workspace.step("train", {"seed": 1}, fail, resumable=True)
    build = Recorder()
    workspace.step("train", {"seed": 2}, build, resumable=True)
    assert build.found == [[]]


def test_keys_follow_earlier_steps(workspace: Workspace) -> None:
    def chain(rows: int) -> Step:
        first = workspace.step("first", {"rows": rows}, Recorder())
        return workspace.step("second", {"first": first.key}, Recorder())

    one = chain(1)
    assert chain(1).reused
    two = chain(2)
    assert not two.reused
    assert one.key != two.key


def test_one_process_at_a_time(workspace: Workspace) -> None:
    with workspace.held(), pytest.raises(ValueError, match=r"in use by process .*a demo"), workspace.held():
        pass
    with workspace.held():
        pass


def test_the_hash_of_code_sees_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.py").write_text("1")
    (tmp_path / "single.py").write_text("2")
    parts = ("part", "single.py")
    seen = {hash_of_code(tmp_path, parts)}
    (tmp_path / "part" / "notes.md").write_text("no code")
    assert hash_of_code(tmp_path, parts) in seen
    (tmp_path / "part" / "a.py").write_text("3")
    seen.add(hash_of_code(tmp_path, parts))
    (tmp_path / "part" / "a.py").rename(tmp_path / "part" / "b.py")
    seen.add(hash_of_code(tmp_path, parts))
    assert len(seen) == 3
