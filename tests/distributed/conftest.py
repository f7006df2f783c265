"""Corpus, packs and a starting checkpoint shared by the distributed tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_exact.data.indexed import IndexedWriter
from tests.distributed import jobs, ranks


@pytest.fixture(scope="session", autouse=True)
def megatron() -> None:
    ranks.import_megatron_once()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of heavy-tailed lengths, random ids, each ending in the last id of the vocabulary."""
    prefix = tmp_path_factory.mktemp("corpus") / "docs"
    generator = np.random.default_rng(0)
    writer = IndexedWriter(f"{prefix}.bin", f"{prefix}.idx", jobs.VOCABULARY)
    for length in np.clip(generator.lognormal(3.0, 1.1, 160), 2, 300).astype(int):
        document = generator.integers(0, jobs.VOCABULARY - 1, length)
        document[-1] = jobs.VOCABULARY - 1
        writer.add(document)
    writer.close()
    return prefix


@pytest.fixture(scope="session")
def pack(corpus: Path) -> Path:
    return jobs.make_pack(corpus, "concat")


@pytest.fixture(scope="session")
def checkpoint(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights from which every layout starts: random initialisation would depend on the layout."""
    folder = tmp_path_factory.mktemp("start")
    save = folder / "checkpoint"
    ranks.train(1, jobs.command(pack, "none", 2, "--save", save, "--save-interval", 2), folder).check()
    return save
