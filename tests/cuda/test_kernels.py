"""Our CUDA paths with values: attention, rotary embedding, loss head."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.conftest import Device


@pytest.mark.parametrize("lengths", [[24], [7, 1, 30, 9]])
def test_the_flash_path_attends_inside_segments(lengths: list[int], device: Device, tmp_path: Path) -> None:
    seen = device.see(tmp_path, "attention", lengths=lengths)
    assert seen["not_computed"] == {}
    assert max(seen["right"]) < 1e-2  # bfloat16
    assert min(seen["wrong"]) > 0.1


def test_packed_rows_are_rotated_by_the_position_in_their_segment_without_a_wait(
    device: Device, tmp_path: Path
) -> None:
    seen = device.see(tmp_path, "rotation", lengths=[5, 1, 17, 9])
    assert max(seen["right"]) < 1e-6
    assert min(seen["wrong"]) > 0.1
    assert seen["synchronisations"] == {}
    assert seen["lookups"] == 1  # three layers ask


def test_the_tiled_loss_head_is_exact_and_never_waits(device: Device, tmp_path: Path) -> None:
    seen = device.see(tmp_path, "loss_head")
    assert max(seen["right"]) < 1e-5
    assert seen["waits_in_the_head"] == []
