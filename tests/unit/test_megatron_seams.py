"""The record of our seams with megatron-core is that of the pinned version, and finds what has changed."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.upstream import seams


def test_the_record_names_every_replacement() -> None:
    """Only the names: other tests of this process may have replaced them."""
    recorded = json.loads(seams.RECORD.read_text())
    imports, replaced = seams.seams()
    assert sorted(recorded["replaced"]) == replaced, "run: python -m tests.upstream.seams record"
    assert "megatron.training.training.training_log" in replaced
    pinned = Path("pyproject.toml").read_text().partition("megatron-core[training]==")[2].partition('"')[0]
    assert recorded["megatron-core"] == pinned
    assert "megatron.core.parallel_state" in imports or any("parallel_state" in name for name in imports)


def test_assignments_to_names_of_megatron_are_found() -> None:
    tree = ast.parse(
        """
import megatron.core.datasets.utils
import megatron.training.training as driver
import torch
from megatron.core.optimizer import DistributedOptimizer as Stock

megatron.core.datasets.utils.compile_helpers = None
driver.train_step = None
def install():
    Stock.load_state_dict = None
    torch.float = None
    driver.args.iteration = 1
own = driver.other
"""
    )
    assert seams.replaced_names(tree) == {
        "megatron.core.datasets.utils.compile_helpers",
        "megatron.training.training.train_step",
        "megatron.training.training.args.iteration",
        "megatron.core.optimizer.DistributedOptimizer.load_state_dict",
    }


def test_what_has_changed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {
        "old": "def same(a):\n    return a\ndef code(a):\n    return a\ndef words(a, b=1):\n    return a\n",
        "new": 'def same(a):\n    """New words."""\n    return a  # and a comment\n'
        "def code(a):\n    return 2 * a\ndef words(a, c=1):\n    return a\n",
    }
    for name, text in versions.items():
        (tmp_path / f"seam_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = {name: seams.described(f"seam_old.{name}") for name in ("same", "code", "words")}
    before["lost"] = {"signature": "()", "code": "0"}
    now = {name: seams.described(f"seam_new.{name}") for name in before}
    assert seams.compared(before, now) == {
        "is gone": ["lost"],
        "has another signature": ["words"],
        "has other code": ["code"],
    }
    assert seams.missing(["seam_new.same", "seam_new.lost", "seam_none"]) == ["seam_new.lost", "seam_none"]
