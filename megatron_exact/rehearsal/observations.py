"""What a rehearsal counts: launches, waits of the host, messages, and operations that a GPU cannot do.

Each entry names the line of ours or Megatron's that caused it. Autograd runs the backward of a CUDA device
in a thread of its own, where no such line is on the stack; the entry then names the node of the graph.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

PACKAGES = ("/megatron_exact/", "/megatron/")
OURS_ASIDE = ("/megatron_exact/rehearsal/",)
_places: dict[CodeType, str | None] = {}


def _file_of(code: CodeType) -> str | None:
    """Return a source's path from `megatron_exact/` or `megatron/` on, or None for other sources."""
    if code not in _places:
        path, found = code.co_filename, None
        if not any(part in path for part in OURS_ASIDE):
            for package in PACKAGES:
                if package in path:
                    found = path[path.rindex(package) + 1 :]
                    break
        _places[code] = found
    return _places[code]


def current_place() -> str:
    """Return the innermost line of ours or Megatron's on the stack, else autograd's node, else any line."""
    frame: FrameType | None = sys._getframe(1)
    innermost = None
    while frame is not None:
        found = _file_of(frame.f_code)
        if found is not None:
            return f"{found}:{frame.f_lineno}"
        if innermost is None and not any(part in frame.f_code.co_filename for part in OURS_ASIDE):
            innermost = f"{frame.f_code.co_filename.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    import torch

    node = torch._C._current_autograd_node()
    return f"backward of {node.name()}" if node is not None else innermost or "unknown"


@dataclass
class Records:
    """Counters since the start of the rehearsal; two copies are subtracted with `since`."""

    launches: int = 0
    """Kernels and matrix products."""
    calls: Counter[str] = field(default_factory=Counter)
    """Operations of torch on the device, by name, without views and the like."""
    launches_by_operation: Counter[str] = field(default_factory=Counter)
    """Launches by the torch operation that caused them."""
    synchronisations: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(call or operation, place) -> how often the host waited for the device."""
    collective_calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(collective, group) -> calls."""
    collective_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(collective, group) -> bytes of this rank's larger buffer."""
    attention_plans: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(segments, longest segment) with which Transformer Engine called cuDNN's attention.

    cuDNN plans its kernel for each new pair, which takes milliseconds to seconds.
    """
    mixed_devices: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(operation, place) of operations with tensors of both the host and the device."""
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(error, place) of operations that the device cannot do."""
    not_computed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(operation, reason) of small operations without values, because no CPU version is known."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Operations that were not computed because of their size."""

    def copy(self) -> Records:
        """Copy all counters."""
        return Records(**{name: _copied(value) for name, value in vars(self).items()})

    def since(self, earlier: Records) -> Records:
        """Return what was counted after a copy."""
        return Records(
            **{name: _difference(value, getattr(earlier, name)) for name, value in vars(self).items()}
        )

    @property
    def host_synchronisations(self) -> int:
        """Return how often the host waited for the device."""
        return self.synchronisations.total()

    def collectives(self) -> dict[str, list[int]]:
        """Return `name (group)` -> [calls, bytes]."""
        return {
            f"{name} ({group})": [calls, self.collective_bytes[name, group]]
            for (name, group), calls in sorted(self.collective_calls.items())
        }

    def synchronised(self, call: str) -> None:
        """Count a wait of the host, at the line that is running."""
        self.synchronisations[call, current_place()] += 1

    def communicated(self, name: str, group: str, num_bytes: int) -> None:
        """Count a collective."""
        self.collective_calls[name, group] += 1
        self.collective_bytes[name, group] += num_bytes


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, Counter) else value


def _difference(later: Any, earlier: Any) -> Any:
    if not isinstance(later, Counter):
        return later - earlier
    return Counter({key: count - earlier[key] for key, count in later.items() if count != earlier[key]})
