"""The null device itself: what it allows, refuses, and does not pretend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_exact.rehearsal import build
from tests.cuda.conftest import REPOSITORY, Device

ACTIVATE = "from megatron_exact.rehearsal.device import activate; activate()"


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_mixing_devices_is_an_error_and_names_the_line(device: Device, tmp_path: Path) -> None:
    seen = device.see(tmp_path, "mixed_devices")
    assert "Expected all tensors to be on the same device" in seen["found"]
    ((what, times),) = seen["mixed_devices"].items()
    assert what.startswith("aten::add at ")
    assert times == 1
    assert len(seen["refused"]) == 1


def test_a_card_is_full_where_torch_says_so(device: Device, tmp_path: Path) -> None:
    seen = device.see(tmp_path, "out_of_memory")
    assert seen["allocated"] == seen["bytes"] == 70 << 30
    assert "CUDA out of memory. Tried to allocate 20.00 GiB" in seen["found"]


def test_an_operation_that_nobody_can_compute_is_on_record(device: Device, tmp_path: Path) -> None:
    seen = device.see(tmp_path, "without_a_cpu_version")
    (what,) = seen["not_computed"]
    assert "_flash_attention_forward" in what


def test_operations_that_arrive_whole_in_inference_mode_have_values(device: Device, tmp_path: Path) -> None:
    seen = device.see(tmp_path, "inference")
    assert seen["differences"] == [0.0]
    assert seen["mixed_devices"] == seen["refused"] == seen["not_computed"] == {}


def test_no_process_gets_the_device_by_importing_it(device: Device) -> None:
    code = (
        "import megatron_exact.rehearsal.device, megatron_exact.rehearsal.session, torch; "
        "print(torch.cuda.is_available())"
    )
    assert run_python(code).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("code", "variables", "reason"),
    [
        pytest.param(f"import torch; {ACTIVATE}", {}, "before torch is imported", id="after torch"),
        pytest.param(
            ACTIVATE, {"TORCHELASTIC_RUN_ID": "7"}, "torchrun started this process", id="in a job"
        ),
    ],
)
def test_real_work_is_left_alone(code: str, variables: dict[str, str], reason: str) -> None:
    ended = run_python(code, **variables)
    assert ended.returncode
    assert reason in ended.stderr


def test_a_machine_with_a_driver_is_left_alone(tmp_path: Path) -> None:
    compiler = build._program("CC", ("cc", "gcc", "clang"), "a C compiler")
    source = tmp_path / "driver.c"
    source.write_text("int cuInit(unsigned flags) { return 0; }\n")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    ended = run_python(ACTIVATE, LD_LIBRARY_PATH=str(tmp_path))
    assert ended.returncode
    assert "this machine has an NVIDIA driver (libcuda.so.1)" in ended.stderr


def test_a_missing_compiler_is_named_with_its_remedy(device: Device, tmp_path: Path) -> None:
    ended = run_python(ACTIVATE, PATH=str(tmp_path), CC="", XDG_CACHE_HOME=str(tmp_path))
    assert ended.returncode
    assert "a C compiler (for example apt-get install gcc) was not found: install it" in ended.stderr


def test_every_log_says_what_it_is(device: Device) -> None:
    ended = run_python(f"{ACTIVATE}; import torch; print(torch.cuda.get_device_name())")
    assert "null device of megatron_exact (computes nothing)" in ended.stdout
    assert "NULL DEVICE, a rehearsal without a GPU" in ended.stderr
