"""Commands of the tests of the real model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROW_TOKENS = 2048


def tool(name: str, *arguments: Any) -> str:
    """Run a tool as a user does and return its output."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def job(pack: Path, load: Path, iterations: int, *more: Any, rule: str = "exact") -> list[Any]:
    """Command line of a job of one row an iteration; later words win."""
    return [
        *("--pack", pack, "--load", load, "--token-weighting", rule, "--log-row-ids"),
        *("--global-batch-size", 1, "--micro-batch-size", 1, "--train-iters", iterations),
        *("--lr", "1e-5", "--lr-decay-style", "constant", "--log-interval", 1, "--eval-iters", 0),
        *more,
    ]
