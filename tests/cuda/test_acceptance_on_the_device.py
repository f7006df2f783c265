"""An acceptance on the null device: the CUDA branch of each check, with real values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.acceptance.accept import Options, WorkFailedError, accept
from tests.cuda.conftest import Device


class OnDevice:
    """A `Launch` that forks ranks with the null device."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def __call__(
        self, work: str, folder: Path, *, ranks: int, is_full_size: bool = False, **arguments: Any
    ) -> list[dict[str, Any]]:
        ended = self.device.run(
            folder, "acceptance", on=ranks, work=work, arguments=arguments, is_full_size=is_full_size
        )
        if any(ended.codes):
            raise WorkFailedError(f"exit codes {ended.codes}: {ended.outputs[0][-2000:]}")
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def test_the_cuda_branch_passes_and_no_speed_is_reported(device: Device, tmp_path: Path) -> None:
    groups = ("kernels", "masking", "transformers", "collectives", "throughput")
    checks = accept(Options(output=tmp_path / "accepted", ranks=2, only=groups), launch=OnDevice(device))
    by_name = {check.name: check for check in checks}
    assert {name: check.reason for name, check in by_name.items() if check.verdict == "fail"} == {}
    assert by_name["documents are kept apart"].verdict == "pass"
    assert by_name["loss against transformers (random weights)"].verdict == "pass"
    assert by_name["kernel: packed attention"].measured["bound"] == 0.02  # bfloat16, the flash path
    assert by_name["values of collectives"].verdict == "pass"
    for name in ("bandwidth of collectives", "speed of 4 layers of llama3.1_8b_16k"):
        assert by_name[name].verdict == "not run"
        assert by_name[name].reason == "the device of a rehearsal computes nothing"


@pytest.mark.slow
def test_memory_of_a_layer_stack_is_that_of_the_formula(device: Device, tmp_path: Path) -> None:
    options = Options(
        output=tmp_path / "accepted", ranks=1, only=("memory",), recipe="qwen2.5_0.5b_4k", stack_layers=2
    )
    checks = {check.name: check for check in accept(options, launch=OnDevice(device))}
    found = checks["memory against the formula"]
    assert found.verdict == "pass", found
    assert found.measured["peak_gib"] == pytest.approx(found.measured["forecast_gib"], rel=0.03)


@pytest.mark.slow
def test_a_job_resumes(device: Device, tmp_path: Path) -> None:
    options = Options(output=tmp_path / "accepted", ranks=1, only=("resume",))
    (check,) = accept(options, launch=OnDevice(device))
    assert check.verdict == "pass", check
