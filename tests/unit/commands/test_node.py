"""The launcher of a node of a SLURM job, with small programs in the place of ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HOLD = (
    "import os, pathlib, sys, time\nfrom megatron_exact.training import stop_signals\n"
    "stop_signals.hold(['--exit-signal-handler'])\n"
)
WAIT = (
    "pathlib.Path(os.environ['LOG_DIR'], 'up' + os.environ['RANK']).touch()\n"
    "while not stop_signals.pending(stop_signals.ASKING): time.sleep(0.1)\n"
)


def node(folder: Path, code: str) -> subprocess.Popen[bytes]:
    program = folder / "rank.py"
    program.write_text(HOLD + code)
    words = [
        "--standalone",
        "--nproc-per-node",
        "2",
        "--shutdown-timeout",
        "1",
        "--signals-to-handle",
        "SIGINT",
        str(program),
    ]
    variables = {"LOG_DIR": str(folder), "SLURM_NODEID": "3", "SLURMD_NODENAME": "n7"}
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_exact.commands.node", *words],
        cwd=ROOT,
        env={**os.environ, **variables, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=open(folder / "errors", "wb"),
        start_new_session=True,
    )


def ending(folder: Path) -> list[str]:
    return (folder / "node-00003.ending").read_text().rstrip("\n").split("\t")


@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_request_reaches_the_ranks_and_the_node_ends_with_0(how: str, tmp_path: Path) -> None:
    with node(tmp_path, WAIT) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("up?"))) < 2:
            assert process.poll() is None, (tmp_path / "errors").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        if how == "signal":
            process.send_signal(signal.SIGTERM)
        else:
            (tmp_path / "stop").touch()
        assert process.wait(timeout=120) == 0
    assert ending(tmp_path) == ["0", "", "n7", ""]
    assert "Traceback" not in (tmp_path / "errors").read_text()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("os.kill(os.getpid(), 9)", ("137", "signal", "rank 0 was ended by SIGKILL")),
        (
            "from megatron_exact.training.runtime import tell_launcher\n"
            "tell_launcher('the disk is full', 'user')\nsys.exit(1)",
            ("1", "user", "rank 0 ended with exit code 1: the disk is full"),
        ),
        ("sys.exit(65)", ("65", "nan", "rank 0 ended with exit code 65")),
        ("raise RuntimeError", ("1", "fault", "rank 0 ended with exit code 1")),
    ],
    ids=["killed", "refused", "not finite", "fault"],
)
def test_the_first_failure_is_noted(code: str, expected: tuple[str, str, str], tmp_path: Path) -> None:
    waits = "if os.environ['RANK'] == '1': time.sleep(600)\n"
    with node(
        tmp_path, waits.replace("time.sleep(600)", "os.execvp('sleep', ['sleep', '600'])") + code
    ) as process:
        # the other rank keeps TERM for itself: it is killed when the time is over
        assert process.wait(timeout=180) == int(expected[0])
    assert ending(tmp_path) == [*expected[:2], "n7", expected[2]]
