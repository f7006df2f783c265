"""One cluster, one pack and one uninterrupted run for all tests of this folder."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import jobs
from tests.slurm.cluster import Cluster

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's folders are too long for munge's socket
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_pack(jobs.make_corpus(tmp_path_factory.mktemp("corpus") / "docs"), "concat")


class Submit:
    """Submits `examples/slurm/train.sbatch` for a small job on two nodes: TP2 x PP2, or a rank a node."""

    def __init__(self, cluster: Cluster, pack: Path) -> None:
        self.cluster, self.pack = cluster, pack

    def __call__(self, run: Path, train_iters: int, *words: object, options: tuple[str, ...] = ()) -> int:
        layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
        return self._submit(run, train_iters, 2, (*layout, *words), options)

    def a_rank_a_node(
        self, run: Path, train_iters: int, *words: object, options: tuple[str, ...] = ()
    ) -> int:
        """The cheaper job: two data-parallel ranks."""
        return self._submit(run, train_iters, 1, words, options)

    def _submit(
        self, run: Path, train_iters: int, ranks: int, words: tuple[object, ...], options: tuple[str, ...]
    ) -> int:
        run.parent.mkdir(parents=True, exist_ok=True)
        own = (*jobs.LARGE, "--cpu", "--log-row-ids")  # steps long enough to be interrupted
        argv = jobs.command(self.pack, "exact", train_iters, *own, *words)
        return self.cluster.submit(
            CHECKOUT / "examples" / "slurm" / "train.sbatch",
            ("--nodes=2", f"--output={run.parent}/%x-%j.out", *options),
            {
                "RUN_DIR": str(run),
                "GPUS_PER_NODE": str(ranks),
                "PYTHON": sys.executable,
                "OMP_NUM_THREADS": "1",
            },
            [str(word) for word in argv],
            CHECKOUT,
        )


@pytest.fixture(scope="session")
def submit(cluster: Cluster, pack: Path) -> Submit:
    return Submit(cluster, pack)
