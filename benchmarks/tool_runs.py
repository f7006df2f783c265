"""Run a tool as a process of its own and measure what it cost: time, memory, bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class ToolRun:
    """Cost of one process with its children."""

    wall_seconds: float
    """From starting the interpreter to its end."""
    cpu_seconds: float
    """User and system time."""
    peak_anonymous_bytes: int
    """Most private memory (RssAnon, all processes of the tool together), sampled every 20 ms."""
    peak_resident_bytes: int
    """Most resident memory (VmRSS likewise): with the pages of mapped files, which the kernel can drop."""
    storage_bytes: int
    """Bytes sent towards storage, mapped files included (`write_bytes` of /proc/PID/io)."""


def run_tool_process(words: Sequence[str], cwd: Path) -> ToolRun:
    """Run `python WORDS...` to its end.

    Raises:
        ValueError: it failed; with the last line that it said.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        # vfork plus wait4: the figures of this one child, whatever else this process has started
        child = subprocess.Popen([sys.executable, *words], cwd=cwd, stdout=output, stderr=subprocess.STDOUT)
        anonymous = resident = storage = 0
        while True:
            done, status, usage = os.wait4(child.pid, os.WNOHANG)
            if done:
                break
            family = _with_descendants(child.pid)
            memory = [_memory(pid) for pid in family]
            anonymous = max(anonymous, sum(private for private, _ in memory))
            resident = max(resident, sum(whole for _, whole in memory))
            storage = max(storage, sum(_storage_bytes(pid) for pid in family))
            time.sleep(SAMPLE_SECONDS)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            said = output.read().strip().splitlines()
            raise ValueError(
                f"{' '.join(words[:2])} ended with {child.returncode}: {said[-1] if said else ''}"
            )
    return ToolRun(
        wall_seconds=wall,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_anonymous_bytes=anonymous,
        peak_resident_bytes=resident,
        storage_bytes=storage,
    )


def _with_descendants(pid: int) -> list[int]:
    family = [pid]
    for parent in family:  # grows while it is walked
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{task}/children").read_text(encoding="ascii")
                family += [int(child) for child in children.split()]
        except OSError:  # gone meanwhile
            continue
    return family


def _memory(pid: int) -> tuple[int, int]:
    """(RssAnon, VmRSS) in bytes; zeros for a process that is gone."""
    found = {"RssAnon": 0, "VmRSS": 0}
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0, 0
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024
    return found["RssAnon"], found["VmRSS"]


def _storage_bytes(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/io").read_text(encoding="ascii").split()
    except OSError:  # gone, or not ours to see
        return 0
    return int(fields[fields.index("write_bytes:") + 1])
