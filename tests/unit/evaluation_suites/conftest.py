"""Things that are dear to make and never change."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_exact.evaluation.prompts import Prompts, Template
from tests.unit.evaluation_suites.small_evaluation import small_tokenizer, write_small_model


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    """Base model's prompts of the small tokenizer."""
    return Prompts(small_tokenizer(), Template(kind="none", text=None))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model; not to be written into."""
    return write_small_model(tmp_path_factory.mktemp("models") / "small")
