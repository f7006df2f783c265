"""What a data worker holds in memory does not depend on the corpus, however many workers there are.

The corpus has an index of 60 MB and a pack of as much; its `.bin` is a hole. What a worker maps of these
files is the page cache's, in memory once for all, and the kernel may drop it. Everything else that is
private to a worker is compared with what one has that reads a tiny corpus.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_corpora import random_documents, write_corpus

from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.indexed import CODE_OF_DTYPE, HEADER, MAGIC, VERSION
from megatron_exact.data.pack import PackOptions, pack_corpora

pytestmark = pytest.mark.filterwarnings(
    "ignore:no source has a corpus record",
    "ignore:the validation split",
    "ignore:This process",  # is multi-threaded, says Python of any fork
    "ignore:This DataLoader",  # has more workers than this machine has cores
)
DOCUMENTS = 3_000_000
DOCUMENT_TOKENS = 180
ROW_TOKENS = 512
INDEX_BYTES = HEADER.size + 12 * DOCUMENTS + 8 * (DOCUMENTS + 1)
ALLOWED_BYTES = 8 << 20  # noise of the interpreter
ROWS_A_WORKER = 3


def pack_corpus_of(root: Path, documents: int) -> Path:
    """A pack of documents of one length, in a folder with its corpus."""
    root.mkdir()
    if documents < 1000:
        write_corpus(root / "c", random_documents([DOCUMENT_TOKENS] * documents))
    else:
        dtype = np.dtype(np.uint16)
        header = HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], documents, documents + 1)
        with open(root / "c.idx", "wb") as stream:
            stream.write(header)
            stream.write(np.full(documents, DOCUMENT_TOKENS, dtype="<i4").tobytes())
            stream.write((np.arange(documents) * (DOCUMENT_TOKENS * dtype.itemsize)).tobytes())
            stream.write(np.arange(documents + 1).tobytes())
        with open(root / "c.bin", "wb") as stream:
            stream.truncate(documents * DOCUMENT_TOKENS * dtype.itemsize)
    options = PackOptions(row_tokens=ROW_TOKENS, policy="concat", seed=1)
    pack_corpora([str(root / "c")], root / "pack", options)
    return root / "pack"


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("memory")
    return {"tiny": pack_corpus_of(root / "tiny", 40), "large": pack_corpus_of(root / "large", DOCUMENTS)}


class CopyingDataset(PackedDataset):
    """What must not be: every worker keeps a copy of the index."""

    copy: bytes | None = None

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.copy is None:
            self.copy = self.reader.source(0).prefix.with_suffix(".idx").read_bytes()
        return super().__getitem__(index)


def memory_of(pid: int, files_below: Path) -> tuple[int, int]:
    """Memory of a process, bytes.

    Returns:
        (private memory without that of the files below a folder, proportional memory of those files: a
        page that n processes map counts 1/n).
    """
    private = proportional = 0
    is_ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):  # the head of a mapping
            is_ours = len(rest) > 4 and Path(rest[4]).is_relative_to(files_below)
        elif name == "Pss:" and is_ours:
            proportional += int(rest[0]) * 1024
        elif name in ("Private_Dirty:", "Private_Clean:") and not is_ours:
            private += int(rest[0]) * 1024
    return private, proportional


def worker_memory(kind: type[PackedDataset], pack: Path, start: str, workers: int) -> list[tuple[int, int]]:
    """`memory_of` each worker of a DataLoader after each has read some rows."""
    count = workers * ROWS_A_WORKER
    dataset = kind(pack, "train", num_samples=count)
    PackedDataset.__getitem__(dataset, 0)  # what the main process of a job has mapped, a fork has too
    loader: Any = torch.utils.data.DataLoader(
        dataset,
        num_workers=workers,
        multiprocessing_context=torch.multiprocessing.get_context(start),
        persistent_workers=True,
    )
    batches = iter(loader)
    for _ in range(count):
        next(batches)
    found = [memory_of(worker.pid, pack.parent) for worker in batches._workers]
    batches._shutdown_workers()
    return found


@pytest.mark.parametrize(("start", "numbers"), [("fork", (1, 4)), ("spawn", (2,))])
def test_memory_of_workers(packs: dict[str, Path], start: str, numbers: tuple[int, ...]) -> None:
    """A spawned worker first imports torch, which takes seconds: two show what four would."""
    large = packs["large"]
    files = [path for path in large.parent.rglob("*") if path.suffix in (".idx", ".npy")]
    on_disk = sum(path.stat().st_size for path in files)
    assert on_disk > 1.5 * INDEX_BYTES
    ((tiny, _),) = worker_memory(PackedDataset, packs["tiny"], start, 1)
    for workers in numbers:
        found = worker_memory(PackedDataset, large, start, workers)
        assert len(found) == workers
        for private, _ in found:
            assert private < tiny + ALLOWED_BYTES
        assert sum(proportional for _, proportional in found) < on_disk


def test_the_measure_sees_a_copied_index(packs: dict[str, Path]) -> None:
    ((tiny, _),) = worker_memory(PackedDataset, packs["tiny"], "fork", 1)
    ((copied, _),) = worker_memory(CopyingDataset, packs["large"], "fork", 1)
    assert copied > tiny + INDEX_BYTES - ALLOWED_BYTES
