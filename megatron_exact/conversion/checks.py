"""One check of a checkpoint, as a line of a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table."""

    name: str
    """What was looked at."""
    passed: bool
    """The verdict."""
    shape: tuple[int, ...] | None = None
    """Of the tensor."""
    max_difference: float | None = None
    """Largest absolute difference of two elements."""
    mean_difference: float | None = None
    """Mean absolute difference."""
    is_rounded: bool = False
    """Whether one side was rounded to the type of the other before they were compared."""
    detail: str = ""
    """What is wrong, or what was found."""

    def line(self, width: int) -> str:
        """The line, its name padded to `width`."""
        shape = "x".join(map(str, self.shape)) if self.shape is not None else ""
        numbers = " ".join(
            f"{'' if value is None else format(value, '.2e'):>9}"
            for value in (self.max_difference, self.mean_difference)
        )
        verdict = "FAILED" if not self.passed else "rounded" if self.is_rounded else "ok"
        return f"{self.name:<{width}} {shape:>14} {numbers} {verdict:>7}  {self.detail}".rstrip()


def table_header(width: int) -> str:
    """The heading above `Check.line`."""
    return f"{'name':<{width}} {'shape':>14} {'max diff':>9} {'mean diff':>9} {'verdict':>7}"
