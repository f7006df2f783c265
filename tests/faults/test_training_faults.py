from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import ranks
from tests.faults import training
from tests.faults.kit import Kit
from tests.faults.matrix import Row, as_parameters


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    ranks.import_megatron_once()


@pytest.mark.parametrize("row", as_parameters([*training.CHECKPOINTS, *training.FLAGS, *training.OTHERS]))
def test_fault(row: Row, kit: Kit, tmp_path: Path) -> None:
    row.run(kit, tmp_path)
