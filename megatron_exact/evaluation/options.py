"""What is asked of a model: the options that decide the examples and what counts as right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.evaluation.suites import nolima, qa, ruler

SUITES: dict[str, tuple[str, ...]] = {
    "ruler": tuple(ruler.TASKS),
    "nolima": nolima.TASKS,
    "qa": qa.TASKS,
}
ONLY_OF = {
    "essays": "ruler",
    "nolima_data": "nolima",
    "placements": "nolima",
    "qa_data": "qa",
    "shots": "qa",
}
"""Options that one suite reads and no other."""
RULER_SAMPLES = 500
"""Examples a cell in RULER's paper and in EXACT's."""


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """One suite as a user asks for it."""

    suite: str
    """`ruler`, `nolima` or `qa`."""
    lengths: tuple[int, ...] = ()
    """Windows in tokens, prompt and generation together; none for `qa`."""
    tasks: tuple[str, ...] = ()
    """Some of the suite's tasks; none: all."""
    samples: int | None = None
    """Examples a cell; None: 500 (RULER), every question at every depth (NoLiMa), all (QA)."""
    seed: int = 0
    """Of the generated examples."""
    template: str | None = None
    """`none`, `model` or a file, see `prompts.read_template`; None: not said."""
    essays: Path | None = None
    """RULER: text of the essays; None: from the Hub."""
    nolima_data: Path | None = None
    """NoLiMa: folder of its data."""
    placements: int = nolima.PLACEMENTS
    """NoLiMa: number of depths."""
    qa_data: Path | None = None
    """QA: folder of local copies; None: the Hub."""
    shots: int | None = None
    """QA: worked examples in a prompt; None: each task's own number."""
    allow_beyond_positions: bool = False
    """Whether a window may exceed the model's max_position_embeddings."""

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise ValueError(f"{self.suite!r} is no suite: choose one of {', '.join(SUITES)}")
        unknown = set(self.tasks) - set(SUITES[self.suite])
        if unknown:
            raise ValueError(
                f"{self.suite} has no task {min(unknown)!r}: choose from {', '.join(SUITES[self.suite])}"
            )
        if self.suite == "qa" and self.lengths:
            raise ValueError("--lengths has no meaning for qa: leave it out")
        for name, suite in ONLY_OF.items():
            default = type(self).__dataclass_fields__[name].default
            if self.suite != suite and getattr(self, name) != default:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{option} has no meaning for {self.suite}, only for {suite}: leave it out"
                )
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"--shots {self.shots}: give 0 or more worked examples")
        if self.suite != "qa" and not self.lengths:
            raise ValueError(f"--lengths is needed for {self.suite}, such as 1K,2K")
        if len(set(self.lengths)) != len(self.lengths):
            raise ValueError(f"--lengths {self.lengths}: give each length once")
        if self.suite == "nolima" and self.nolima_data is None:
            raise ValueError(
                "--nolima-data is needed: the folder of your copy of NoLiMa (docs/evaluation.md)"
            )
        if self.placements < 1:
            raise ValueError(f"{self.placements} placements: give 1 or more")

    @property
    def chosen_tasks(self) -> tuple[str, ...]:
        """The tasks to run, in the suite's order."""
        return tuple(task for task in SUITES[self.suite] if not self.tasks or task in self.tasks)

    def record(self) -> dict[str, Any]:
        """What decides the examples of a cell, for results.json; without tasks, lengths and paths."""
        common = {"samples": self.effective_samples, "seed": self.seed}
        if self.suite == "nolima":
            return {
                **common,
                "placements": self.placements,
                "generation_tokens": nolima.GENERATION_TOKENS,
                "metric": "contains",
            }
        if self.suite == "qa":
            return {"samples": self.samples, "shots": self.shots, "metrics": qa.METRICS}
        tokens = {name: task.generation_tokens for name, task in ruler.TASKS.items()}
        return {**common, "generation_tokens": tokens, "metric": "string match, all references"}

    @property
    def effective_samples(self) -> int | None:
        """`samples` with RULER's default."""
        return RULER_SAMPLES if self.samples is None and self.suite == "ruler" else self.samples
