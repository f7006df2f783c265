"""Whether the base image has what the GPU path needs; stops the build of the image otherwise.

Prints the versions found. It imports no CUDA library: a machine that builds images has no GPU.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

MINIMUM = {
    "torch": "2.13",  # pyproject.toml
    "numpy": "2.0",  # pyproject.toml
    "transformer-engine": "2.0",  # packed rows (qkv_format thd); tests/gpu were written for 2.20.2
}
"""Package of the base image, oldest version."""
TESTED = {"transformer-engine": "2.17.1"}
"""Package, version with which NVIDIA tested megatron-core 0.19.0 (its image 26.06)."""
APEX_MODULE = "fused_weight_gradient_mlp_cuda"


def faults() -> list[str]:
    """What is missing or too old, one line each; prints the versions found."""
    found = []
    if sys.version_info[:2] != (3, 12):
        found.append(f"Python {sys.version.split()[0]}: megatron-core 0.19.2 was tested with 3.12")
    for package, oldest in MINIMUM.items():
        try:
            there = version(package)
        except PackageNotFoundError:
            found.append(f"{package} is missing: choose a base image that has it")
            continue
        tested = TESTED.get(package, there)
        note = "" if there == tested else f" (NVIDIA tested megatron-core 0.19.0 with {tested})"
        print(f"{package} {there}{note}")
        # NVIDIA's torch calls itself 2.13.0a0+commit, which Version sorts before 2.13
        if Version(there).release < Version(oldest).release:
            found.append(f"{package} {there} is older than {oldest}: choose a newer base image")
    return found


def main() -> int:
    """Print what was found; returns the exit code."""
    complaints = faults()
    for line in complaints:
        print(f"error: {line}", file=sys.stderr)
    if importlib.util.find_spec(APEX_MODULE) is None:
        print(
            "warning: Apex is missing or has no CUDA extensions (the apex of PyPI is another project): "
            "jobs of the local spec run without gradient accumulation fusion",
            file=sys.stderr,
        )
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
