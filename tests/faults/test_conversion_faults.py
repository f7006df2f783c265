from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import conversion
from tests.faults.kit import Kit
from tests.faults.matrix import Row, as_parameters


@pytest.mark.parametrize("row", as_parameters(conversion.ROWS))
def test_fault(row: Row, kit: Kit, tmp_path: Path) -> None:
    row.run(kit, tmp_path)
