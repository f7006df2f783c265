"""A preflight as text."""

from __future__ import annotations

from megatron_exact.training.preflight.examine import Examination
from megatron_exact.training.preflight.memory import GIB, MemoryForecast

PARTS = ("weights", "gradients", "optimizer", "activations", "working", "total")


def format_examination(found: Examination) -> str:
    """Checks, memory by pipeline stage, a layout that fits where the one asked for does not, verdict."""
    lines = [f"{check.verdict:<8}{check.name:<11}{check.detail}" for check in found.checks]
    if found.forecast is not None:
        lines += ["", *memory_table(found.forecast)]
    if found.proposal is not None:
        lines += ["", "a layout that fits:", "", *memory_table(found.proposal), ""]
        lines += [f"    {flag} {value or ''}".rstrip() for flag, value in found.proposal.layout.flags()]
    elif any(check.verdict == "FAILED" and check.name in ("memory", "layout") for check in found.checks):
        lines += ["", "no layout of these GPUs fits: take more GPUs, shorter rows or a smaller batch"]
    failures = sum(check.verdict == "FAILED" for check in found.checks)
    verdict = "the run can start and fits" if found.passed else f"{failures} checks failed"
    return "\n".join([*lines, "", verdict])


def memory_table(forecast: MemoryForecast) -> list[str]:
    """GiB a GPU, a line for each pipeline stage."""
    head = f"GiB a GPU, {forecast.layout.describe()}"
    lines = [head, f"{'pipeline stage':<16}{'parameters':>16}" + "".join(f"{part:>13}" for part in PARTS)]
    for stage in forecast.stages():
        numbers = "".join(f"{getattr(stage, part) / GIB:>13.2f}" for part in PARTS)
        lines.append(f"{stage.pipeline_rank:<16}{stage.parameters:>16,}{numbers}")
    return lines
