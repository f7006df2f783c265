"""How a model is run: engine, number type and device, settled before the model is loaded.

Two scores are comparable if both models ran in one number type on one engine, so both are resolved here
and recorded: `auto` means the type in which the weights are stored, for either engine, and two exports may
be stored in different ones. A device that is not there is refused: lm-eval would run on the CPU instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_exact.json_input import parse_json_object, read_json_object

BACKENDS = ("hf", "vllm")
AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")
STORED_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Names of floating-point types in safetensors files."""
PACKAGES = {"hf": ("torch", "transformers"), "vllm": ("torch", "transformers", "vllm")}
HEADER_LENGTH_BYTES = 8
LARGEST_HEADER_BYTES = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """How to run the model; none of it belongs to the question that is asked."""

    name: str = "hf"
    """`hf`: transformers on CPU or GPU; `vllm`, where it is installed."""
    device: str | None = None
    """Such as `cpu` or `cuda:0` (hf); None: a GPU where there is one."""
    dtype: str = AUTO
    """Type of the weights, one of DTYPES; `auto`: as stored."""
    batch_size: int | None = None
    """Prompts at a time (hf); None: 1."""
    tensor_parallel: int | None = None
    """GPUs that share one model (vllm); None: 1."""

    def __post_init__(self) -> None:
        if self.name not in BACKENDS:
            raise ValueError(f"--backend {self.name}: choose {' or '.join(BACKENDS)}")
        if self.dtype not in (AUTO, *DTYPES):
            raise ValueError(f"--dtype {self.dtype}: choose one of {', '.join((AUTO, *DTYPES))}")
        if self.name == "hf" and self.tensor_parallel is not None:
            raise ValueError("--tensor-parallel is for --backend vllm: leave it out")
        if self.name == "vllm" and self.device is not None:
            raise ValueError("--device has no effect on vllm: set CUDA_VISIBLE_DEVICES instead")
        if self.name == "vllm" and self.batch_size is not None:
            raise ValueError(
                "--batch-size has no effect on vllm, which forms its own batches: leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class ResolvedBackend:
    """A backend on this machine, for one model."""

    name: str
    """`hf` or `vllm`."""
    dtype: str
    """One of DTYPES."""
    device: str | None
    """Of hf; None for vllm, which chooses by itself."""
    batch_size: int
    """Prompts at a time (hf)."""
    tensor_parallel: int
    """GPUs that share one model (vllm)."""
    versions: dict[str, str]
    """Of the packages that compute."""

    def record(self) -> dict[str, Any]:
        """For results.json: `name` and `dtype` hold for a folder, `calls` has the rest for each call."""
        call: dict[str, Any] = {"versions": self.versions}
        if self.name == "hf":
            call |= {"device": self.device, "batch_size": self.batch_size}
        else:
            call["tensor_parallel"] = self.tensor_parallel
        return {"name": self.name, "dtype": self.dtype, "calls": [call]}


def resolve(backend: Backend, model: Path) -> ResolvedBackend:
    """Settle everything that `backend` leaves open.

    Args:
        backend: as a user asks for it.
        model: Hugging Face folder.

    Raises:
        ValueError: an engine that is not installed, a device that is not there, or weights of a type that
            is not among DTYPES.
    """
    return ResolvedBackend(
        name=backend.name,
        dtype=stored_dtype(model) if backend.dtype == AUTO else backend.dtype,
        device=None if backend.name == "vllm" else existing_device(backend.device),
        batch_size=backend.batch_size or 1,
        tensor_parallel=backend.tensor_parallel or 1,
        versions=installed_versions(backend.name),
    )


def installed_versions(name: str) -> dict[str, str]:
    """Versions of the packages that run a model. Raises ValueError if one is not installed."""
    try:
        return {package: version(package) for package in PACKAGES[name]}
    except PackageNotFoundError as error:
        remedy = ", or take --backend hf" if name == "vllm" else ""
        raise ValueError(f"{error.name} is not installed: install it{remedy}") from error


def existing_device(name: str | None) -> str:
    """The device of this name, or without one a GPU where there is one, as torch spells it.

    Raises:
        ValueError: no device, or one that this machine has not.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is no device: give cpu, cuda or cuda:0") from error
    if device.type == "cpu":
        return "cpu"
    kind = getattr(torch, device.type, None)
    count = 0 if kind is None or not hasattr(kind, "device_count") else kind.device_count()
    if (device.index or 0) >= count:
        there = f"{count} of these devices here, counted from 0" if count else "none of these devices here"
        raise ValueError(f"--device {name}: torch finds {there}: name one that is there, or cpu")
    return name


def stored_dtype(model: Path) -> str:
    """The type that a model folder's config names, or else that of its first weights.

    Raises:
        ValueError: it is none of DTYPES.
    """
    config = read_json_object(model / "config.json", "copy the model again", wide_integers=True)
    named = config.get("dtype") or config.get("torch_dtype")
    found: str = str(named).removeprefix("torch.") if named else _type_of_first_weights(model)
    if found not in DTYPES:
        raise ValueError(f"{model} is stored as {found}: choose --dtype {', '.join(DTYPES)}")
    return found


def _type_of_first_weights(model: Path) -> str:
    for path in sorted(model.glob("*.safetensors")):
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
            header_bytes = stream.read(min(length, LARGEST_HEADER_BYTES))
        header = parse_json_object(header_bytes, f"the header of {path}", "copy the model again")
        try:
            kinds = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has no safetensors header: copy the model again") from error
        floating: list[str] = [STORED_TYPES.get(kind, kind) for kind in kinds if "F" in kind]
        if floating:
            return floating[0]
    return "no floating-point type"
