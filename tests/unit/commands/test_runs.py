"""`preflight --rehearse`: what is rehearsed, and what is not. tests/cuda/test_rehearsal.py runs it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_exact.commands.runs import preflight
from megatron_exact.training import preflight as examination
from megatron_exact.training.memory_forecast import Cluster

JOB = ("--world-size", "4", "--bf16", "--pack", "packs/web")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of other processes, which are not started."""
    commands: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=7)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def found(monkeypatch: pytest.MonkeyPatch, verdict: examination.Verdict) -> list[Cluster]:
    """Let the preflight find one line with this verdict; the clusters that it was asked for."""
    clusters = []

    def examine(argv: list[str], cluster: Cluster) -> examination.Examination:
        clusters.append(cluster)
        check = examination.PreflightCheck(name="layout", verdict=verdict, detail="said")
        return examination.Examination(checks=[check], forecast=None, proposal=None)

    monkeypatch.setattr(examination, "examine", examine)
    return clusters


def test_what_passes_is_rehearsed_with_the_same_arguments(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clusters = found(monkeypatch, "ok")
    assert preflight(["--rehearse", "--gpu-memory-gib", "40", *JOB]) == 7
    (command,) = started
    assert command == [
        *(sys.executable, "-m", "megatron_exact", "rehearse", "--stages"),
        *("--world-size", "4", "--gpu-memory-gib", "40", "--bf16", "--pack", "packs/web"),
    ]
    assert clusters[0].reserve_gib == 6


def test_a_reserve_of_the_users_holds_for_both(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clusters = found(monkeypatch, "ok")
    assert preflight(["--rehearse", "--reserve-gib", "11", *JOB]) == 7
    assert clusters[0].reserve_gib == 11
    assert started[0][started[0].index("--reserve-gib") + 1] == "11"


def test_what_fails_is_not_rehearsed_and_the_last_line_says_so(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found(monkeypatch, "FAILED")
    assert preflight(["--rehearse", *JOB]) == 1
    assert started == []
    assert "not rehearsed" in capsys.readouterr().out.splitlines()[-1]
    assert preflight(list(JOB)) == 1
    assert "not rehearsed" not in capsys.readouterr().out
