"""The material of the faults, made once for each worker, and which rows `make test` leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import kit as kits


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> kits.Kit:
    # Imported here once: tools are forked from this process.
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    kits.settle()
    return kits.Kit(Path(tmp_path_factory.mktemp("kit")))
