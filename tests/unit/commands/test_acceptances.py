"""`accept` prints a line when a check has ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_exact.acceptance import accept as acceptance
from megatron_exact.acceptance.accept import Options
from megatron_exact.acceptance.verdicts import Check, not_run
from megatron_exact.commands.acceptances import accept


def test_a_check_that_was_not_run_says_why_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(options: Options, on_check: Callable[[Check], None]) -> list[Check]:
        checks = [Check(name="values", verdict="pass", value="1 nat"), not_run("speed", "no GPU")]
        for check in checks:
            on_check(check)
        return checks

    monkeypatch.setattr(acceptance, "accept", run)
    assert accept(["--cpu", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "pass      values  1 nat",
        "not run   speed  no GPU",
    ]
