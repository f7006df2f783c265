"""Compile the null device with the system's C compiler, once for each version of torch and of the sources.

Neither a CUDA compiler nor a driver is needed. Two libraries are built: one stands in for the CUDA runtime
and cuBLAS, one for the driver. Every other function that torch's libraries import (and Transformer
Engine's, where it is installed) gets a version that prints its name and fails. So another version of torch
stops with an error that says what is missing, and never runs NVIDIA's code on a missing device.

torch is located but not imported here, because importing it binds its references.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "sources"
RUNTIME = "libnull_cuda_runtime.so"
DRIVER = "libcuda.so.1"
"""The name under which torch opens the driver; it takes a library of that name that is already loaded."""

IMPORTERS = ("libc10_cuda.so", "libtorch_cuda.so", "libtorch_cuda_linalg.so", "libtorch_python.so")
"""torch's libraries whose references the runtime library resolves; Transformer Engine's are added."""
TRANSFORMER_ENGINE_LIBRARIES = ("*.so", "wheel_lib/*.so", "../transformer_engine_torch*.so")
"""Locations of its libraries below the package's folder, for its wheels and for a build from source."""
REPLACED = re.compile(r"^(_*cuda|cublas|nccl|cusolver|cusparse|cufft|cudnn|cuFile|curand)[A-Z_]")
"""Prefixes of CUDA's libraries; `__cudaRegister...` too."""
ANSWERS_WITHOUT_DEVICE = re.compile(r"(Error|Status)(String|Name)|GetVersion|GetProperty|LastError")
"""Functions that need no device and do not return a status."""
DRIVER_ENTRY = re.compile(rb"\0(cu[A-Z][A-Za-z0-9_]+)(?=\0)")
"""torch looks up driver functions by names that `libc10_cuda.so` contains as text."""


@dataclass(frozen=True, kw_only=True)
class Libraries:
    """The compiled device."""

    runtime: Path
    """CUDA runtime and cuBLAS."""
    driver: Path
    """`libcuda.so.1`."""


@dataclass(frozen=True, kw_only=True)
class CudaTorch:
    """An installed torch that was built for CUDA."""

    folder: Path
    """Folder of the package."""
    version: str
    """Version of torch."""
    cuda: str
    """Version of CUDA that it was built for, such as 13.0."""

    @property
    def cuda_number(self) -> int:
        """Return the version as CUDA writes it: 13000."""
        major, minor = self.cuda.split(".")[:2]
        return int(major) * 1000 + int(minor) * 10


def find_torch() -> CudaTorch:
    """Find the installed torch without importing it.

    Raises:
        ValueError: none is installed, or one without CUDA.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("torch is not installed: install the requirements of this package first")
    folder = Path(spec.submodule_search_locations[0])
    text = (folder / "version.py").read_text(encoding="utf-8")
    found = {name: _assigned(text, name) for name in ("__version__", "cuda")}
    version, cuda = found["__version__"], found["cuda"]
    if cuda is None or not (folder / "lib" / "libtorch_cuda.so").is_file():
        raise ValueError(
            f"torch {version} is a build without CUDA, whose code a rehearsal runs: install the CUDA build "
            "of the same version (PyPI's wheel for Linux; no GPU is needed)"
        )
    return CudaTorch(folder=folder, version=version or "unknown", cuda=cuda)


def transformer_engine_libraries() -> list[Path]:
    """Return the libraries of the installed Transformer Engine that use CUDA; empty if not installed."""
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(spec.submodule_search_locations[0])
    return sorted({path.resolve() for glob in TRANSFORMER_ENGINE_LIBRARIES for path in folder.glob(glob)})


def _assigned(text: str, name: str) -> str | None:
    found = re.search(rf"^{name}\b[^=\n]*=\s*'([^']*)'", text, re.MULTILINE)
    return found[1] if found else None


def cache_folder() -> Path:
    """Return the cache folder of compiled devices: `$XDG_CACHE_HOME`, or `.cache` in the home folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "megatron_exact" / "null_device"


def build_device() -> Libraries:
    """Return the compiled device, from the cache or compiled now.

    Raises:
        ValueError: torch without CUDA, no compiler, no headers of the CUDA runtime, or a failed
        compilation.
    """
    torch = find_torch()
    transformer_engine = transformer_engine_libraries()
    folder = cache_folder() / _key(torch, transformer_engine)
    libraries = Libraries(runtime=folder / RUNTIME, driver=folder / DRIVER)
    if libraries.driver.is_file():
        return libraries
    compiler = _program("CC", ("cc", "gcc", "clang"), "a C compiler (for example apt-get install gcc)")
    symbols = _program("NM", ("nm",), "nm (for example apt-get install binutils)")
    include = ["-I", str(_cuda_headers(torch)), "-idirafter", str(SOURCES / "headers")]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as name:
        building = Path(name)
        compile_ = functools.partial(_compile, compiler, building, torch.cuda_number, include)
        runtime_object = compile_("runtime.o", [SOURCES / "null_runtime.c"], "-c")
        importers = [*(torch.folder / "lib" / name for name in IMPORTERS), *transformer_engine]
        wanted = _undefined(symbols, importers)
        wanted = {name for name in wanted if REPLACED.match(name)}
        wanted = {name for name in wanted if not ANSWERS_WITHOUT_DEVICE.search(name)}
        refusals = _write_refusals(building, "runtime", wanted - _defined(symbols, runtime_object))
        compile_(
            RUNTIME, [runtime_object, refusals], "-shared", f"-Wl,-soname,{RUNTIME}", "-lpthread", "-ldl"
        )
        driver_object = compile_("driver.o", [SOURCES / "null_driver.c"], "-c")
        entries = _driver_entries(symbols, torch) - _defined(symbols, driver_object)
        refusals = _write_refusals(building, "driver", entries)
        compile_(DRIVER, [driver_object, refusals], "-shared", f"-Wl,-soname,{DRIVER}")
        result = Path(tempfile.mkdtemp(dir=folder.parent, prefix="built-"))
        for library in (RUNTIME, DRIVER):
            shutil.copy(building / library, result / library)
    try:
        result.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(result)
        if not libraries.driver.is_file():
            raise
    return libraries


def _key(torch: CudaTorch, transformer_engine: Iterable[Path]) -> str:
    digest = hashlib.sha256(f"{torch.version} {torch.cuda} {platform.machine()}".encode())
    for path in transformer_engine:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    for path in sorted([*SOURCES.rglob("*.[ch]"), Path(__file__)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _program(variable: str, names: Sequence[str], what: str) -> str:
    for name in (os.environ.get(variable), *names):
        path = shutil.which(name) if name else None
        if path is not None:
            return path
    raise ValueError(f"the null device is compiled on first use, and {what} was not found: install it")


def _cuda_headers(torch: CudaTorch) -> Path:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    packages = torch.folder.parent / "nvidia"
    places = [*sorted(packages.glob("*/include")), Path(home) / "include"]
    for place in places:
        if (place / "driver_types.h").is_file():
            return place
    raise ValueError(
        f"no folder of {packages} contains CUDA's header driver_types.h, nor does {home}: install torch "
        "with its nvidia packages, or set CUDA_HOME"
    )


def _compile(
    compiler: str,
    building: Path,
    cuda_number: int,
    include: Sequence[str],
    output: str,
    inputs: Sequence[Path],
    *options: str,
) -> Path:
    command = [compiler, "-O2", "-fPIC", f"-DCUDA_VERSION_OF_TORCH={cuda_number}", *include]
    command += [*map(str, inputs), *options, "-o", str(building / output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{compiler} could not compile the null device: {done.stderr.strip()[-600:]}")
    return building / output


def _undefined(symbols: str, libraries: Iterable[Path]) -> set[str]:
    return _listed(
        symbols, "--undefined-only", [path for path in libraries if path.is_file()], dynamic=True
    )


def _defined(symbols: str, compiled: Path) -> set[str]:
    return _listed(symbols, "--defined-only", [compiled], dynamic=False)


def _listed(symbols: str, which: str, files: Sequence[Path], *, dynamic: bool) -> set[str]:
    command = [symbols, which, *(["-D"] if dynamic else []), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{symbols} cannot read {files[0]}: {done.stderr.strip()[-300:]}")
    names = (line.split()[-1].partition("@")[0] for line in done.stdout.splitlines() if line.strip())
    return {name for name in names if not name.endswith(":")}


def _driver_entries(symbols: str, torch: CudaTorch) -> set[str]:
    """Return the driver functions that torch looks up by name, or links."""
    content = (torch.folder / "lib" / "libc10_cuda.so").read_bytes()
    entries = {name.decode() for name in DRIVER_ENTRY.findall(content)}
    linked = _undefined(symbols, [torch.folder / "lib" / "libcaffe2_nvrtc.so"])
    return entries | {name for name in linked if re.match(r"^cu[A-Z]", name)}


def _write_refusals(building: Path, name: str, functions: Iterable[str]) -> Path:
    """Return C functions that print what was called and fail with the status for 'not supported'."""
    path = building / f"{name}_refusals.c"
    lines = ["#include <stdio.h>", "#define REFUSES(name) int name(void) { \\"]
    lines += [r'    fprintf(stderr, "null device: " #name " is not there\n"); return 801; }']
    lines += [f"REFUSES({function})" for function in sorted(functions)]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path
