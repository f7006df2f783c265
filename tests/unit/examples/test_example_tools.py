"""The tools of the examples work from any folder, and say in one line where the examples are not there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if "use_examples" in path.read_text())
ARGUMENTS = {"train_miniature_base": ["--output", "x"], "write_miniature_corpus": ["--output", "x"]}


def call(tool: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(tool), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)


def test_all_seven_are_here() -> None:
    assert {tool.stem for tool in TOOLS} == {
        *("run_demo", "run_evaluate_demo", "run_miniature", "run_miniature_demo", "run_real_demo"),
        *("train_miniature_base", "write_miniature_corpus"),
    }


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_without_the_examples_a_tool_says_so(tmp_path: Path, tool: Path) -> None:
    (tmp_path / "tools").mkdir()
    copy = shutil.copy(tool, tmp_path / "tools")
    (tmp_path / "work").mkdir()
    done = call(copy, *ARGUMENTS.get(tool.stem, []), folder=tmp_path / "work")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"error: .* contains no examples/miniature, .* a checkout of the sources\n", done.stderr
    )
    assert list((tmp_path / "work").iterdir()) == []


def test_a_checkout_is_found_from_any_folder_and_before_examples_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "__init__.py").write_text("raise ImportError('these are not ours')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    options = ("--output", "texts", "--tokens", "1000", "--questions", "1")
    done = call(ROOT / "tools" / "write_miniature_corpus.py", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "texts").iterdir()} == {"corpus.jsonl", "questions.jsonl"}
