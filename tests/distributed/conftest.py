"""Corpus, packs and a starting checkpoint shared by the distributed tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import jobs, ranks


@pytest.fixture(scope="session", autouse=True)
def megatron() -> None:
    ranks.import_megatron_once()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_corpus(tmp_path_factory.mktemp("corpus") / "docs")


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
