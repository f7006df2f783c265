"""The null device's process, packs and a checkpoint to start from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.rehearsal.build import build_device
from megatron_exact.rehearsal.device import real_driver
from tests.distributed import jobs, ranks

REPOSITORY = Path(__file__).parents[2]
SMALL = (
    *("--num-layers", 2, "--hidden-size", 64, "--global-batch-size", 4),
    *("--init-method-std", 0.2),  # with weights of this size attention matters before any training
    "--bf16",  # CUDA's flash attention takes nothing else, and heads of a multiple of 8 values
)


class Device:
    """What runs functions of `tests.cuda.cases` on ranks with the null device."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cuda.server"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def run(self, folder: Path, function: str, *, on: int = 1, **arguments: Any) -> ranks.Ended:
        """Run a function on `on` ranks; what it saw is in `folder`."""
        assert self._process.stdin is not None
        request = {"function": function, "ranks": on, "folder": str(folder), "arguments": arguments}
        print(json.dumps(request, default=str), file=self._process.stdin, flush=True)
        answer = self._answer()
        return ranks.Ended(answer["codes"], answer["outputs"])

    def see(self, folder: Path, function: str, *, on: int = 1, **arguments: Any) -> dict[str, Any]:
        """Run a function that has to end well; what rank 0 saw."""
        self.run(folder, function, on=on, **arguments).check()
        found: dict[str, Any] = json.loads((folder / "seen0.json").read_text())
        return found

    def end(self) -> None:
        """End the process, which has nothing to put away."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the null device's process ended with {self._process.wait()}"
        return json.loads(line)


@pytest.fixture(scope="session")
def device() -> Iterator[Device]:
    """The process with the null device; a machine that cannot have one says why."""
    driver = real_driver()
    if driver is not None:
        pytest.skip(f"a real driver is there ({driver}): tests/gpu runs on it")
    try:
        build_device()
    except ValueError as error:
        if "without CUDA" in str(error):  # a CPU-only torch: nothing of CUDA's code is there to run
            pytest.skip(str(error))
        raise
    process = Device()
    yield process
    process.end()


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_pack(jobs.make_corpus(tmp_path_factory.mktemp("corpus") / "docs"), "concat")


@pytest.fixture(scope="session")
def on_cpu() -> Callable[[list[Any], Path], ranks.Ended]:
    """Run a job on the CPU runtime, in ranks forked from this process."""
    ranks.import_megatron_once()

    def train(argv: list[Any], folder: Path) -> ranks.Ended:
        return ranks.train(1, [*argv, "--cpu"], folder).check()

    return train


@pytest.fixture(scope="session")
def checkpoint(
    pack: Path,
    tmp_path_factory: pytest.TempPathFactory,
    on_cpu: Callable[[list[Any], Path], ranks.Ended],
) -> Path:
    """Weights from which both devices start: each draws its own random numbers."""
    folder = tmp_path_factory.mktemp("start")
    save = folder / "checkpoint"
    on_cpu(jobs.command(pack, "none", 1, *SMALL, "--save", save, "--save-interval", 1), folder)
    return save
