"""What an acceptance concludes: one verdict a check, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

Verdict = Literal["pass", "fail", "not run"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table."""

    name: str
    """What was checked."""
    verdict: Verdict
    """The conclusion; all but `pass` need a reason."""
    value: str = ""
    """What was measured, for readers."""
    bound: str = ""
    """What it was compared with; empty for a speed that has no bound."""
    reason: str = ""
    """Why it failed or was not run."""
    measured: dict[str, Any] = field(default_factory=dict)
    """The same numbers, for programs."""

    def __post_init__(self) -> None:
        assert self.verdict == "pass" or self.reason, f"{self.name}: {self.verdict} without a reason"


def not_run(name: str, reason: str) -> Check:
    """Return a check that was left out."""
    return Check(name=name, verdict="not run", reason=reason)


def compared(
    name: str,
    passed: bool,
    *,
    value: str,
    bound: str,
    reason: str,
    measured: dict[str, Any] | None = None,
) -> Check:
    """Return the verdict of a comparison.

    Args:
        name: of the check.
        passed: whether the value is within the bound.
        value: what was measured.
        bound: what it was compared with.
        reason: what a failure means; left out where it passed.
        measured: numbers for the JSON file.
    """
    return Check(
        name=name,
        verdict="pass" if passed else "fail",
        value=value,
        bound=bound,
        reason="" if passed else reason,
        measured=measured or {},
    )


def table(checks: Sequence[Check]) -> str:
    """Return the checks as lines of text, failures again at the end."""
    names = max((len(check.name) for check in checks), default=0)
    values = max((len(check.value) for check in checks), default=0)
    lines = []
    for check in checks:
        told = check.bound if check.verdict == "pass" else check.reason
        line = f"{check.verdict:<8}  {check.name:<{names}}  {check.value:<{values}}  {told}"
        lines.append(line.rstrip())
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in VERDICTS}
    lines += ["", ", ".join(f"{count} {verdict}" for verdict, count in counts.items())]
    lines += [f"FAILED  {check.name}: {check.reason}" for check in checks if check.verdict == "fail"]
    return "\n".join(lines)


VERDICTS: tuple[Verdict, ...] = ("pass", "fail", "not run")


def as_json(checks: Sequence[Check], machine: dict[str, Any], *, complete: bool) -> dict[str, Any]:
    """Return the content of `accept.json`.

    Args:
        checks: so far.
        machine: what is known of it.
        complete: whether all groups have run; before that the acceptance has not passed.
    """
    found = {
        "passed": complete and all(check.verdict != "fail" for check in checks),
        "complete": complete,
        "machine": machine,
        "checks": [asdict(check) for check in checks],
    }
    return cast(dict[str, Any], with_finite_numbers(found))


def with_finite_numbers(value: Any) -> Any:
    """Return a value for JSON, which has no NaN and no infinity: they become text that `float` reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: with_finite_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [with_finite_numbers(inner) for inner in value]
    return value
