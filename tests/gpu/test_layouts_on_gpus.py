"""The layouts of `layout_matrix.py` on GPUs, in bfloat16: Transformer Engine and our own attention.

Every job is a `torchrun` of its own, as users start it: a process that has used CUDA cannot be forked.
Not run where it was written: there was no GPU. `test_transformer_engine_calls.py` shows without one what
Transformer Engine's attention is given.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import jobs, ranks
from tests.distributed import layout_matrix as matrix

# not torch.cuda.device_count(), which the CPU runtime of other tests answers
GPUS = torch._C._cuda_getDeviceCount()
HAS_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None
IMPLEMENTATIONS = ("local", *(("transformer_engine",) if HAS_TRANSFORMER_ENGINE else ()))
HEAD_OF_16 = ("--hidden-size", 16 * jobs.HEADS)
"""Attention kernels need heads of a multiple of 8."""

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device")]

Records = list[dict[str, Any]]


def train(world: int, argv: list[Any]) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)),
        *("-m", "megatron_exact.training.pretrain", *map(str, argv)),
    ]
    environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_pack(jobs.make_corpus(tmp_path_factory.mktemp("corpus") / "docs"), "concat")


@pytest.fixture(scope="module")
def start(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    save = ("--init-method-std", 0.2, "--save", folder, "--save-interval", 2)
    train(1, jobs.command(pack, "none", 2, *jobs.LARGE, *HEAD_OF_16, *matrix.BF16, *save))
    return folder


@pytest.fixture(scope="module")
def records(
    pack: Path, start: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Records]:
    """Records of a job by layout (empty: the reference) and implementation; each runs once."""

    @functools.cache
    def run(name: str, implementation: str) -> Records:
        layout = matrix.LAYOUTS[name] if name else matrix.REFERENCE
        folder = tmp_path_factory.mktemp("run")
        stack = (*HEAD_OF_16, *matrix.BF16, "--transformer-impl", implementation)
        flags = (*jobs.LARGE, *stack, *layout.flags)
        begin = ("--pretrained-checkpoint", start, "--run-dir", folder)
        train(layout.world, jobs.command(pack, "exact", matrix.ITERATIONS, *begin, *flags))
        return ranks.read_jsonl(folder / "losses.jsonl")

    return run


def check(ours: Records, theirs: Records) -> None:
    assert len(ours) == matrix.ITERATIONS
    assert matrix.same_targets(ours, theirs)
    for key, difference in matrix.largest_differences(ours, theirs).items():
        assert difference <= matrix.BF16_BOUNDS[key], f"{key} differs by {difference:.1e}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", matrix.LAYOUTS)
def test_layout_agrees_with_one_gpu(
    name: str, implementation: str, records: Callable[[str, str], Records]
) -> None:
    layout = matrix.LAYOUTS[name]
    if layout.world > GPUS:
        pytest.skip(f"needs {layout.world} GPUs")
    if "--context-parallel-size" in layout.flags and implementation == "transformer_engine":
        pytest.skip("refused: tests/distributed/test_refusals.py")
    check(records(name, implementation), records("", implementation))


@pytest.mark.skipif(not HAS_TRANSFORMER_ENGINE, reason="needs Transformer Engine")
def test_transformer_engine_agrees_with_our_own_attention(
    records: Callable[[str, str], Records],
) -> None:
    check(records("", "transformer_engine"), records("", "local"))
