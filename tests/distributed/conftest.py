"""Corpus, packs and a starting checkpoint shared by the distributed tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    return _start(pack, tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="session")
def deep_checkpoint(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such weights for two pipeline stages of two virtual ones."""
    return _start(pack, tmp_path_factory.mktemp("deep_start"), *jobs.DEEP)


def _start(pack: Path, folder: Path, *flags: Any) -> Path:
    save = folder / "checkpoint"
    argv = jobs.command(pack, "none", 2, "--save", save, "--save-interval", 2, *flags)
    ranks.train(1, argv, folder).check()
    return save
