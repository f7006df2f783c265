"""tools/find_python.sh tries every candidate before it names one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "find_python.sh"
FAILING_SHIM = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"
OLDER = "#!/bin/sh\nexit 1\n"
WORKING = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'

is_312 = pytest.mark.skipif(sys.version_info[:2] != (3, 12), reason="needs a 3.12 to find")


def place(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)
    return path


def find(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    bash = "/bin/bash"
    environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home"), **variables}
    return subprocess.run(
        [bash, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH with nothing but what the script itself calls."""
    (tmp_path / "bin").mkdir()
    os.symlink("/bin/cat", tmp_path / "bin" / "cat")
    return tmp_path / "bin"


@is_312
def test_a_shim_that_fails_is_passed_over_for_a_pyenv_version(tmp_path: Path, tools: Path) -> None:
    place(tools, "python3.12", FAILING_SHIM)
    place(tools, "python3", OLDER)
    wanted = place(tmp_path, "home/.pyenv/versions/3.12.9/bin/python", WORKING)
    done = find(tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(wanted), "")


@is_312
def test_uv_is_asked_last(tmp_path: Path, tools: Path) -> None:
    wanted = place(tmp_path, "managed/python3.12", WORKING)
    place(tools, "uv", f'#!/bin/sh\necho "{wanted}"\n')
    assert find(tmp_path).stdout.strip() == str(wanted)


@is_312
def test_the_usual_name_comes_first(tmp_path: Path, tools: Path) -> None:
    wanted = place(tools, "python3.12", WORKING)
    place(tmp_path, "pyenv/versions/3.12.9/bin/python", WORKING)
    assert find(tmp_path, PYENV_ROOT=str(tmp_path / "pyenv")).stdout.strip() == str(wanted)


def test_none_says_what_to_install(tmp_path: Path, tools: Path) -> None:
    place(tools, "python3.12", FAILING_SHIM)
    done = find(tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: no Python 3.12")
    for remedy in ("apt-get install", "pyenv install 3.12", "uv python install 3.12", "make PYTHON="):
        assert remedy in done.stderr


def test_a_chosen_interpreter_is_used_or_refused(tmp_path: Path, tools: Path) -> None:
    wanted = place(tmp_path, "mine/python", WORKING)
    assert find(tmp_path, PYTHON=str(wanted)).stdout.strip() == str(wanted)
    done = find(tmp_path, PYTHON=str(place(tmp_path, "old/python", OLDER)))
    assert done.returncode == 1
    assert "does not run or is older than 3.12" in done.stderr


def test_an_environment_of_another_checkout_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    kept = tmp_path / "theirs" / "package.py"
    kept.touch()
    (tmp_path / ".venv").symlink_to("theirs")
    script = Path(__file__).parents[2] / "tools" / "install.sh"
    done = subprocess.run(
        ["bash", str(script), ".venv"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert ".venv is a link to theirs" in done.stderr
    assert kept.exists()
