"""Memory of a real one-process job on the CPU, above what the process held before the model."""

from __future__ import annotations

import ctypes
import gc
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.pack import PackOptions, pack_corpora
from tests.distributed import ranks

GIVE_BACK = ((-1, 1 << 17), (-2, 0), (-3, 1 << 16), (-4, 1 << 16))
"""glibc's M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX: what is freed goes back at once."""


def make_pack(folder: Path, *, row_tokens: int, vocabulary: int, rows: int) -> Path:
    """A pack of random documents, lengths lognormal about an eighth of a row."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    writer = IndexedWriter(f"{folder}/docs.bin", f"{folder}/docs.idx", vocabulary)
    tokens = 0
    while tokens < (rows + 1) * row_tokens:
        length = int(np.clip(generator.lognormal(np.log(row_tokens / 8), 1.0), 2, 2 * row_tokens))
        writer.add(generator.integers(0, vocabulary, length))
        tokens += length
    writer.close()
    options = PackOptions(row_tokens=row_tokens, policy="concat", seed=1, validation_fraction=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this corpus has no tokenizer
        pack_corpora([str(folder / "docs")], folder / "pack", options)
    return folder / "pack"


@dataclass(frozen=True)
class Resident:
    """Resident bytes of a job above those before its model was built."""

    between_steps: int
    """After the first step: weights, gradients, optimizer, and what the libraries have loaded meanwhile."""
    peak: int
    """The most that the steps after it needed."""


def measure_job(argv: Sequence[Any], folder: Path) -> Resident:
    """Resident size of a job of three steps or more, in its steady state.

    Freed blocks go back to the system at once, so that what is measured is what lives, not what the
    allocator keeps. Buffers that the libraries of matrix products keep
    for themselves are there before.

    Args:
        argv: of a job of one rank.
        folder: receives the output.
    """
    result = folder / "resident.json"

    def patch() -> None:
        import megatron.training.training as driver

        for option, value in GIVE_BACK:  # the CPU runtime asks for the opposite, for speed
            ctypes.CDLL(None).mallopt(option, value)
        _warm_up_kernels()
        stock_setup, stock_step = driver.setup_model_and_optimizer, driver.train_step
        before = between = steps = 0

        def setup(*args: Any, **kwargs: Any) -> Any:
            nonlocal before
            before = _status("VmRSS")
            return stock_setup(*args, **kwargs)

        def train_step(*args: Any, **kwargs: Any) -> Any:
            nonlocal between, steps
            if steps == 1:
                gc.collect()
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
                between = _status("VmRSS")
            steps += 1
            ended = stock_step(*args, **kwargs)
            if steps > 1:
                result.write_text(json.dumps([between - before, _status("VmHWM") - before]))
            return ended

        driver.setup_model_and_optimizer = setup
        driver.train_step = train_step

    ranks.train(1, argv, folder, patch).check()
    return Resident(*json.loads(result.read_text()))


def _warm_up_kernels() -> None:
    """Products of the size to come: the libraries keep buffers of their own for them from then on."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.zeros(4096, 512, dtype=dtype)
        weight = torch.zeros(2816, 512, dtype=dtype)
        wide = hidden @ weight.t()
        wide.t() @ hidden
        wide @ weight


def _status(name: str) -> int:
    """A size of /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")
