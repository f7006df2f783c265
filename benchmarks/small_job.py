"""A training job of a small Llama on this machine's CPU, whose steps a benchmark runs and times itself.

Upstream's driver runs the job; only its `train_step` is replaced, by a function that gets the stock one as
a call without arguments, and may do anything else in between: contenders alternate step by step in one
process, on one thread.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.pack import PackOptions, pack_corpora

MEDIAN_TOKENS = 600
SIGMA = 1.0
VOCABULARY = 8192

Clock = tuple[float, float]
"""Wall and CPU seconds."""


def document_lengths(documents: int, seed: int) -> NDArray[np.int64]:
    """Lognormal, at least 2 tokens."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN_TOKENS), SIGMA, documents)
    return np.maximum(2, drawn).astype(np.int64)


def rows_of_segments(row_tokens: int, rows: int, seed: int) -> list[list[int]]:
    """Segments of rows that cut the stream of documents as `concat` does."""
    lengths = document_lengths(rows * row_tokens // MEDIAN_TOKENS + 1, seed)
    ends = np.union1d(np.cumsum(lengths), np.arange(1, rows + 1) * row_tokens)
    pieces = np.diff(ends[ends <= rows * row_tokens], prepend=0)
    split_at = np.searchsorted(np.cumsum(pieces), np.arange(1, rows) * row_tokens) + 1
    return [part.tolist() for part in np.split(pieces, split_at)]


def make_pack(folder: Path, *, row_tokens: int, rows: int, seed: int) -> Path:
    """A pack of at least `rows` rows of random tokens."""
    writer = IndexedWriter(f"{folder}/docs.bin", f"{folder}/docs.idx", VOCABULARY)
    generator = np.random.default_rng(seed)
    for length in document_lengths((rows + 1) * row_tokens // MEDIAN_TOKENS + 1, seed):
        writer.add(generator.integers(1, VOCABULARY, length))
    writer.close()
    options = PackOptions(row_tokens=row_tokens, policy="concat", seed=seed, validation_fraction=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the corpus has no tokenizer
        pack_corpora([f"{folder}/docs"], folder / "pack", options)
    return folder / "pack"


def timed(work: Callable[[], Any]) -> tuple[Any, Clock]:
    """What the call returns, and what it took."""
    began = time.perf_counter(), time.process_time()
    result = work()
    return result, (time.perf_counter() - began[0], time.process_time() - began[1])


def run_job(argv: Sequence[Any], step: Callable[[Callable[[], Any], int], Any]) -> None:
    """Run a job of one rank in this process.

    Args:
        argv: arguments of `megatron_exact.training.pretrain`.
        step: called in place of upstream's `train_step`, with the stock step and the number of steps taken
            before; returns what the stock step returned.

    Raises:
        ValueError: the job ended badly.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()}, MASTER_ADDR="127.0.0.1")
    import megatron.training.training as driver

    from megatron_exact.training import pretrain

    stock, steps = driver.train_step, iter(range(10**9))
    typed = list(sys.argv)  # the job replaces it by Megatron's flags, and the result tells the command
    driver.train_step = lambda *args, **kwargs: step(lambda: stock(*args, **kwargs), next(steps))
    try:
        code = pretrain.main([str(word) for word in argv])
    finally:
        driver.train_step = stock
        sys.argv = typed
    if code:
        raise ValueError(f"the training job ended with exit code {code}: its error is above")
