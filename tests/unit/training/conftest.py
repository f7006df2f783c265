"""A small chain of stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from stage_runs import ARGUMENTS, make_pack, save_checkpoint

from megatron_exact.training.stages import StageRun, plan_chain


@pytest.fixture
def packs(tmp_path: Path) -> list[str]:
    return [make_pack(tmp_path / "long", 128), make_pack(tmp_path / "short", 64)]


@pytest.fixture
def runs(packs: list[str], tmp_path: Path) -> list[StageRun]:
    save_checkpoint(tmp_path / "base", 1)
    base = str(tmp_path / "base")
    return plan_chain(packs, tmp_path / "out", start=base, arms=["none", "exact"], arguments=ARGUMENTS)
