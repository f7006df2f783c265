"""What an average of a comparison is over, beside the paper's: windows, tasks, examples a cell.

An average over other windows or tasks is another quantity and gets a warning. Fewer examples make the same
quantity less certain; their number is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_exact.report.cells import suite_name
from megatron_exact.report.compared import UNKNOWN, Compared, token_label
from megatron_exact.report.page import Block, Note
from megatron_exact.report.paper_numbers import RULER_EXAMPLES, SUITE_TASKS


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """One average of a comparison."""

    who: str
    """The model or rule that it belongs to, as its table names it."""
    suite: str
    """`nolima` or `ruler`."""
    regime: str
    """`trained`, `extrapolated` or `all`."""
    windows: tuple[int, ...]
    """Tokens; empty where the comparison does not say."""
    has_other_windows: bool
    """Whether the paper's average is over other windows."""
    missing: tuple[str, ...]
    """Tasks of the paper without a cell, `vt at 2K, 4K` for one without it at these windows."""
    other: tuple[str, ...]
    """Tasks that the paper does not have."""
    examples: tuple[int, int] | None
    """Of its smallest and of its largest cell; None where the comparison lists no cells."""

    @property
    def what(self) -> str:
        """Suite and regime, such as `RULER trained`."""
        return f"{suite_name(self.suite)} {self.regime}"

    @property
    def is_as_in_paper(self) -> bool:
        """Whether it is over the paper's windows and tasks."""
        return self.examples is not None and not (self.has_other_windows or self.missing or self.other)

    @property
    def has_few_examples(self) -> bool:
        """Whether a cell has fewer examples than the paper says; it does so for RULER alone."""
        return self.suite == "ruler" and self.examples is not None and self.examples[0] < RULER_EXAMPLES

    @property
    def windows_text(self) -> str:
        """`1K, 2K`."""
        return ", ".join(map(token_label, self.windows)) or UNKNOWN

    @property
    def tasks_text(self) -> str:
        """`all 11`, or `9 of 11`: tasks that have all their cells."""
        if self.examples is None:
            return UNKNOWN
        num_tasks = len(SUITE_TASKS[self.suite])
        text = f"{num_tasks - len(self.missing)} of {num_tasks}" if self.missing else f"all {num_tasks}"
        return text + (f" and {len(self.other)} more" if self.other else "")

    @property
    def examples_text(self) -> str:
        """`500`, or `4 to 500` where cells differ."""
        if self.examples is None:
            return UNKNOWN
        low, high = self.examples
        return f"{low:,}" if low == high else f"{low:,} to {high:,}"

    def differences(self) -> Iterable[str]:
        """What is not as in the paper, in words."""
        if self.has_other_windows:
            yield f"at {self.windows_text}" if self.windows else "at unknown windows"
        if self.examples is None:
            yield "tasks unknown"
        if self.missing:
            yield f"without {', '.join(self.missing)}"
        if self.other:
            yield f"with {', '.join(self.other)} as well"


def coverage_of(
    compared: Compared, suite: str, regime: str, *, paper_windows: Sequence[str] | None, who: str
) -> Coverage:
    """What an average is over.

    Args:
        compared: the comparison.
        suite: `nolima` or `ruler`.
        regime: `trained`, `extrapolated` or `all`.
        paper_windows: of the paper's average, such as `1.5K`; None where it has none.
        who: model or rule.
    """
    windows = compared.windows(suite) if regime == "all" else compared.regime_windows(suite, regime)
    cells = {
        (str(entry["task"]), entry["length"]): int(entry["examples"])
        for entry in compared.content.get("cells") or []
        if entry["suite"] == suite and entry["length"] in windows
    }
    expected = (
        None if paper_windows is None else {compared.tokens_of(suite, text) for text in paper_windows}
    )
    tasks = {task for task, _ in cells}
    return Coverage(
        who=who,
        suite=suite,
        regime=regime,
        windows=tuple(windows),
        has_other_windows=expected is not None and set(windows) != expected,
        missing=tuple(_missing(suite, windows, set(cells))) if cells else (),
        other=tuple(sorted(tasks - set(SUITE_TASKS[suite]))),
        examples=(min(cells.values()), max(cells.values())) if cells else None,
    )


def _missing(suite: str, windows: Sequence[int], cells: set[tuple[str, int]]) -> Iterable[str]:
    for task in SUITE_TASKS[suite]:
        gaps = [tokens for tokens in windows if (task, tokens) not in cells]
        if len(gaps) == len(windows):
            yield task
        elif gaps:
            yield f"{task} at {', '.join(map(token_label, gaps))}"


def quantity_notes(coverages: Sequence[Coverage]) -> list[Block]:
    """A warning that names every average over other windows or tasks than the paper's; empty for none."""
    unlike = [one for one in coverages if not one.is_as_in_paper]
    if not unlike:
        return []
    found: dict[str, dict[str, list[str]]] = {}
    for one in unlike:
        for difference in one.differences():
            found.setdefault(difference, {}).setdefault(one.what, []).append(one.who)
    told = "".join(
        f" {difference[:1].upper()}{difference[1:]}: {_rows(by_what)}."
        for difference, by_what in found.items()
    )
    return [
        Note(
            text="These averages are over other windows or tasks than the paper's: they are not the same "
            f"quantity.{told}"
        )
    ]


def _rows(by_what: dict[str, list[str]]) -> str:
    """`RULER trained, RULER extrapolated (Qwen2.5-3B); NoLiMa trained (Qwen2.5-3B, Qwen2.5-7B)`."""
    together: dict[tuple[str, ...], list[str]] = {}
    for what, who in by_what.items():
        together.setdefault(tuple(dict.fromkeys(who)), []).append(what)
    return "; ".join(f"{', '.join(whats)} ({', '.join(who)})" for who, whats in together.items())


def examples_notes(coverages: Sequence[Coverage]) -> list[Block]:
    """A remark where cells have fewer examples than the paper's; empty for none."""
    few = [one for one in coverages if one.has_few_examples]
    if not few:
        return []
    by_what: dict[str, list[str]] = {}
    for one in few:
        by_what.setdefault(one.what, []).append(f"{one.who}: {one.examples_text}")
    return [
        Note(
            text=f"Fewer examples a cell than the paper's {RULER_EXAMPLES}, so that less is known: "
            f"{_rows(by_what)}."
        )
    ]
