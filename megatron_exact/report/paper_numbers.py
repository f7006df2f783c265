"""The numbers of EXACT (arXiv 2605.10544) that the report shows beside your own.

They are CSV files in `paper/`, which states where they come from. This file stands apart from
`paper_tables` because `compared`, on which the tables build, uses the numbers too.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SOURCE = "arXiv 2605.10544"
FOLDER = Path(__file__).parent / "paper"
QA_MODELS = ("Qwen2.5-1.5B", "Qwen2.5-3B", "LLaMA-3.2-3B")
"""The models that the paper's table 2 is the mean of."""
CONTROL_MODEL = "LLaMA-3.1-8B"
"""The model of the paper's table 3."""
CONTROL_RULES = {
    "Random same-mass": "random-same-mass",
    "Packed-position": "packed-position",
    "Uniform effective-context boost": "uniform-tail",
    "Normalized EXACT": "exact-normalized",
    "EXACT": "exact",
}
"""Method of table 3 -> name of the rule here."""
TAIL_SHARES_16K = (0.274, 0.303)
"""Share of the 4K+ tail in the paper's 16K stream, before and after weighting (figure 1)."""
MEAN_LIFTS = {
    ("nolima", "trained"): 39,
    ("nolima", "extrapolated"): 58,
    ("ruler", "trained"): 9,
    ("ruler", "extrapolated"): 8,
}
"""Relative lift in percent, mean over the seven models (figure 4)."""
PROBE_LIFTS = {"answer-position": (0.177, 2.20), "field-lookup": (0.311, 3.20)}
"""Difference in evidence margin (as the paper prints it) and in answers (points), 4K to 64K (figure 5)."""
PROBE_MODEL = "LLaMA-3.1-8B"
"""The model of PROBE_LIFTS."""
PROBE_RANGE = (4096, 65536)
"""Distances of PROBE_LIFTS in tokens."""
SUITE_TASKS = {
    "nolima": (
        "needle_set",
        "needle_set_hard",
        "needle_set_w_Distractor",
        "needle_set_MC",
        "needle_set_ONLYDirect",
        "needle_set_w_CoT",
    ),
    "ruler": (
        *("niah_single_1", "niah_single_2", "niah_single_3"),
        *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery"),
        *("vt", "cwe", "fwe"),
    ),
}
"""The tasks that the averages of table 1 are over, as they are called here."""
LONG_SUITES = tuple(SUITE_TASKS)
"""The suites of tables 1 and 3 and of figure 4."""
QA_SUITE = "qa"
"""The suite of table 2."""
RULER_EXAMPLES = 500
"""Examples of each RULER task at each window. For NoLiMa the paper states no number."""
CELL_EXAMPLES = {"ruler": RULER_EXAMPLES}
"""Examples of a cell by suite, where the paper states them."""
NUMBERS = ("standard_cpt", "exact", "delta", "ci95_low", "ci95_high")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Two sides and their difference, in points."""

    baseline: float | None
    """Standard continued pretraining; None where only the difference is known."""
    treatment: float | None
    """The other side."""
    delta: float
    """Treatment minus baseline, as printed."""
    ci95: tuple[float, float] | None
    """95 % interval of the difference; None where there is none."""
    no_interval: str = ""
    """Why there is none, where that is known."""
    examples: int | None = None
    """Examples of one run; None where that is not said, as in the paper."""

    @property
    def includes_zero(self) -> bool:
        """Whether the interval includes a difference of 0."""
        return self.ci95 is not None and self.ci95[0] <= 0 <= self.ci95[1]

    @property
    def lift_percent(self) -> float | None:
        """Difference in percent of the baseline; None without one above 0."""
        return 100 * self.delta / self.baseline if self.baseline else None


@dataclass(frozen=True, kw_only=True)
class MainResult:
    """One row of table 1."""

    model: str
    """Name of the model as the paper spells it."""
    window: str
    """Window of continued pretraining, such as `4K`."""
    suite: str
    """`nolima` or `ruler`."""
    regime: str
    """`trained` or `extrapolated`."""
    windows: tuple[str, ...]
    """Windows of evaluation, such as `1.5K`."""
    estimate: Estimate
    """With interval."""


def paper_models() -> tuple[str, ...]:
    """The seven models, in the order of table 1."""
    return tuple(dict.fromkeys(row.model for row in main_results()))


def find_paper_model(name: str) -> str | None:
    """The model of the paper that a name means, whatever its case; None for any other."""
    return next((model for model in paper_models() if model.lower() == name.lower()), None)


@lru_cache
def main_results() -> tuple[MainResult, ...]:
    """Table 1, 28 rows."""
    return tuple(
        MainResult(
            model=row["model"],
            window=row["cpt_window"],
            suite=row["benchmark"],
            regime=row["regime"],
            windows=tuple(row["evaluation_windows"].split(",")),
            estimate=_estimate(row),
        )
        for row in _rows("table1_main_results.csv")
    )


def paper_windows(model: str | None, suite: str, regime: str) -> tuple[str, ...] | None:
    """Windows of evaluation of one average of table 1, such as `1.5K`; None for what it does not have."""
    for row in main_results():
        if (row.model, row.suite, row.regime) == (model, suite, regime):
            return row.windows
    return None


@lru_cache
def standard_qa() -> dict[str, Estimate]:
    """Table 2: benchmark -> mean over QA_MODELS, `Macro` last."""
    return {row["benchmark"]: _estimate(row) for row in _rows("table2_standard_qa.csv")}


@lru_cache
def controls() -> dict[tuple[str, str, str], Estimate]:
    """Table 3: (rule, suite, regime) -> difference from standard continued pretraining."""
    return {
        (CONTROL_RULES[row["method"]], row["benchmark"], row["regime"]): _estimate(row)
        for row in _rows("table3_6_ablation_llama3.1_8b_16k.csv")
    }


@lru_cache
def corpora() -> tuple[tuple[str, str, str], ...]:
    """Table 4: (stages, models, mix of sources)."""
    return tuple(
        (row["stages"], row["backbones"], row["source_mix"]) for row in _rows("table4_cpt_corpora.csv")
    )


def _rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _estimate(row: dict[str, str]) -> Estimate:
    numbers = {name: float(row[name]) for name in NUMBERS if row.get(name)}
    low, high = numbers.get("ci95_low"), numbers.get("ci95_high")
    return Estimate(
        baseline=numbers.get("standard_cpt"),
        treatment=numbers.get("exact"),
        delta=numbers["delta"],
        ci95=None if low is None or high is None else (low, high),
    )
