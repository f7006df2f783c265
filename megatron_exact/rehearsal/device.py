"""The null device of this process: activated before torch is imported, never beside a real driver.

A job cannot use it by accident. Only the rehearsals and the tests import this module, `activate` must be
called explicitly, and it raises an error in a process that has imported torch, on a machine that has a
driver, and in a rank that torchrun started. Wherever torch prints the device's name, it says what it is.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_exact.rehearsal.build import build_device
from megatron_exact.training.memory_forecast import GIB

H100_BYTES = int(79.1 * GIB)
"""Memory of a card of 80 GB that a process can use."""

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_active: NullDevice | None = None


class NullDevice:
    """The loaded libraries with their settings and counters."""

    def __init__(self, runtime: Any, devices: int, memory_bytes: int) -> None:
        self._runtime = runtime
        self._devices, self._memory_bytes = devices, memory_bytes
        self._callback: Any = None
        runtime.null_device_configure.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t]
        runtime.null_device_launches.restype = ctypes.c_ulong
        self.copy_at_most(None)

    def copy_at_most(self, longest_bytes: int | None) -> None:
        """Skip copies that are longer than this; None for no limit."""
        limit = 2**63 if longest_bytes is None else longest_bytes
        self._runtime.null_device_configure(self._devices, self._memory_bytes, limit)

    def launches(self) -> int:
        """Return the number of kernels and matrix products launched so far."""
        return int(self._runtime.null_device_launches())

    def on_synchronisation(self, function: Callable[[str], None]) -> None:
        """Call a function, in the waiting thread, whenever the host waits for the device."""

        def call(name: bytes) -> None:
            function(name.decode())

        self._callback = _Callback(call)  # kept: C holds no reference
        self._runtime.null_device_on_synchronisation(self._callback)


def activate(*, devices: int = 8, memory_bytes: int = H100_BYTES) -> NullDevice:
    """Make torch, which must not be imported yet, see cards that compute nothing.

    Args:
        devices: cards of this machine.
        memory_bytes: of each.

    Raises:
        ValueError: a process or a machine in which the device would be in the way of real work, or no
            compiler (`build.build_device`).
    """
    global _active
    if _active is not None:
        return _active
    refuse_real_work()
    libraries = build_device()
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Triton would compile for the card
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    runtime = ctypes.CDLL(str(libraries.runtime), ctypes.RTLD_GLOBAL)
    _active = NullDevice(runtime, devices, memory_bytes)
    ctypes.CDLL(str(libraries.driver), ctypes.RTLD_GLOBAL)  # it calls the runtime
    print(
        f"megatron_exact: NULL DEVICE, a rehearsal without a GPU: {devices} cards of "
        f"{memory_bytes / GIB:.1f} GiB that compute nothing",
        file=sys.stderr,
        flush=True,
    )
    return _active


def refuse_real_work() -> None:
    """Raise an error where the device would interfere with real work.

    Raises:
        ValueError: torch is imported already, torchrun started this process, or there is a driver.
    """
    if "torch" in sys.modules:
        raise ValueError(
            "the null device has to be in place before torch is imported: start tools/rehearse.py as a "
            "process of its own"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(
            "torchrun started this process: a rehearsal is not a rank of a job; start it alone"
        )
    driver = real_driver()
    if driver is not None:
        raise ValueError(
            f"this machine has an NVIDIA driver ({driver}): a rehearsal would hide its GPUs; run the job "
            "itself, or rehearse on a machine without GPUs"
        )


def real_driver() -> str | None:
    """Return what shows that this machine has an NVIDIA driver, or None."""
    for path in (Path("/dev/nvidiactl"), Path("/dev/nvidia0"), Path("/proc/driver/nvidia/version")):
        if path.exists():
            return str(path)
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return "libcuda.so.1"
