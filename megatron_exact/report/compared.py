"""Comparisons as a report uses them: read, checked and named, with the cells of its tables and their
coverage.

`LABEL=DIR` gives a comparison a label, `DIR` alone is labelled by what its models say about themselves. A
label that is a model of the paper puts the comparison into that model's rows.

`Coverage` compares what an average is over with the paper's average: windows, tasks, examples per cell. An
average over other windows or tasks is another quantity and gets a warning. With fewer examples the same
quantity is less certain, so their number is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_exact.evaluation.comparison import content_sha256
from megatron_exact.evaluation.suites.suite import find_suite
from megatron_exact.exposure import (
    DEFAULT_ALPHA,
    DEFAULT_GAMMA,
    MASS_SCALE,
    default_tau,
)
from megatron_exact.exposure.row_weights import DEFAULT_EVIDENCE_NATS
from megatron_exact.files import sha256_file
from megatron_exact.json_input import read_json_object, require_shape
from megatron_exact.report.page import Block, Faint, Note, Strong, Text
from megatron_exact.report.paper_numbers import (
    CELL_EXAMPLES,
    RULER_EXAMPLES,
    SUITE_TASKS,
    Estimate,
    find_paper_model,
)

COMPARISON = "comparison.json"
FORMAT_VERSION = 1
POINTS = 100.0
ROUNDING = 1e-6
"""Tolerance for sums of floats."""
PLACES: dict[str, tuple[str, ...]] = {
    "aggregates": ("regime",),
    "lengths": ("length",),
    "cells": ("task", "length"),
}
"""Keys that, together with the suite, identify an entry of each table."""
UNKNOWN = "unknown"
RULE_UNKNOWN = "rule unknown"
FEW_EXAMPLES = 100
"""Fewer are marked at the number: one answer then moves the average of a cell by more than a point."""
K_TOKENS = 1024
"""Tokens that K means, as in the paper's windows."""
STANDARD, EXACT = "none", "exact"
RULE_NAMES = {
    "none": "Standard CPT",
    "exact": "EXACT",
    "exact-normalized": "Normalized EXACT",
    "exact-evidence": "EXACT with evidence (ours)",
    "uniform-tail": "Uniform effective-context boost",
    "packed-position": "Packed-position",
    "random-same-mass": "Random same-mass",
    "constant": "Constant, same mean",
}
"""Names of rules in tables; other rules keep their own name."""
Lines = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One comparison: a treatment against a baseline, of one model."""

    label: str
    """Of the model."""
    paper_model: str | None
    """The model of the paper that it is; None for any other."""
    content: dict[str, Any]
    """comparison.json."""
    baseline_rule: str | None
    """Token weighting of the baseline; None where no file says it."""
    baseline_name: str
    """As `treatment_name`."""
    treatment_rule: str | None
    """Of the treatment."""
    treatment_name: str
    """The rule as tables name it, with parameters that are not the paper's, such as `EXACT (alpha 1)`."""

    @property
    def is_exact(self) -> bool:
        """EXACT with the paper's parameters against the standard, as far as the files say."""
        names = (RULE_NAMES[EXACT], RULE_UNKNOWN)
        return self.baseline_rule in (STANDARD, None) and self.treatment_name in names

    @property
    def aggregates(self) -> Lines:
        """Macro averages by suite and regime; may be empty."""
        return list(self.content.get("aggregates") or [])

    @property
    def lengths(self) -> Lines:
        """Averages by suite and length."""
        return list(self.content.get("lengths") or [])

    @property
    def probe(self) -> dict[str, Any] | None:
        """The evidence probe of both sides; None if it was not run."""
        value = self.content.get("probe")
        return value if isinstance(value, dict) else None

    def regime_windows(self, suite: str, regime: str) -> list[int]:
        """Windows in tokens that a suite was evaluated at in `trained` or `extrapolated`."""
        named = (self.content.get("options") or {}).get(f"{regime}_lengths") or []
        asked = {self.tokens_of(suite, text) for text in named}
        return [tokens for tokens in self.windows(suite) if tokens in asked]

    def tokens_of(self, suite: str, window: str) -> int:
        """Return the tokens of a window such as `1.5K` as this comparison counts them for a suite."""
        k_tokens = (self.content.get("options") or {}).get(f"{suite}_k_tokens")
        return window_tokens(window, int(k_tokens or K_TOKENS))

    def windows(self, suite: str) -> list[int]:
        """Return all windows of a suite in tokens; empty for a suite without windows."""
        found = {entry["length"] for entry in self.lengths if entry["suite"] == suite}
        return sorted(found - {0})


def window_tokens(text: str, k_tokens: int = K_TOKENS) -> int:
    """Return the tokens of a window such as `1.5K` or `512`."""
    return int(Fraction(text.rstrip("Kk")) * (k_tokens if text[-1:] in "Kk" else 1))


def token_label(tokens: int) -> str:
    """Return `1.5K` for 1,536, where K is 1,024; numbers that 512 does not divide are written out."""
    if tokens > 0 and tokens % (K_TOKENS // 2) == 0:
        return f"{tokens / K_TOKENS:g}K"
    return f"{tokens:,}"


def signed(value: float, digits: int) -> str:
    """Format a number with its sign, such as `+1.25`; what rounds to 0 is `+0.00`."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def estimate_of(entry: dict[str, Any]) -> Estimate:
    """Return the numbers of one entry of a comparison."""
    ends = entry["ci95"]
    return Estimate(
        baseline=float(entry["baseline"]),
        treatment=float(entry["treatment"]),
        delta=float(entry["delta"]),
        ci95=None if ends is None else (float(ends[0]), float(ends[1])),
        no_interval=str(entry.get("ci95_reason") or ""),
        examples=entry.get("examples"),
    )


def interval_text(entry: dict[str, Any], digits: int, name: str = "ci95") -> str:
    """Return `[+0.20, +2.30]`, or a dash and the reason where a comparison has no interval.

    Args:
        entry: entry of the comparison.
        digits: digits after the point.
        name: key of the interval; its reason is `NAME_reason`.
    """
    ends = entry[name]
    if ends is None:
        return f"- ({entry.get(f'{name}_reason') or 'no interval'})"
    return f"[{signed(ends[0], digits)}, {signed(ends[1], digits)}]"


def includes_zero(entry: dict[str, Any]) -> bool:
    """Return whether a difference of 0 is not excluded: the interval includes 0 or is missing."""
    return entry["ci95"] is None or entry["ci95"][0] <= 0 <= entry["ci95"][1]


def read_compared(arguments: Sequence[str]) -> list[Compared]:
    """Read comparisons, each `DIR` or `LABEL=DIR`.

    Raises:
        ValueError: a folder without a comparison, a damaged one, one that mixes rules, or two that are the
            same by label, rule and parameters.
    """
    read = [_read_one(argument) for argument in arguments]
    seen: dict[tuple[str, str | None, str], str] = {}
    for argument, compared in zip(arguments, read, strict=True):
        key = (compared.label, compared.baseline_rule, compared.treatment_name)
        if key in seen and _overlap(compared, read[arguments.index(seen[key])]):
            raise ValueError(
                f"{seen[key]} and {argument} are both {compared.treatment_name} of {compared.label}: "
                "give one of them a label of its own (LABEL=DIR), or compare all seeds in one comparison"
            )
        seen.setdefault(key, argument)
    return read


def _overlap(one: Compared, other: Compared) -> bool:
    """Whether two comparisons hold numbers for the same place."""
    suites = [{entry["suite"] for entry in compared.aggregates} for compared in (one, other)]
    return bool(suites[0] & suites[1]) or (one.probe is not None and other.probe is not None)


def _read_one(argument: str) -> Compared:
    label, folder = _split(argument)
    path = folder / COMPARISON
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {COMPARISON}: give a folder that megatron-exact compare has written"
        )
    content = read_json_object(path, "run megatron-exact compare again")
    check_comparison(path, content)
    require_unchanged(path, content)
    sides = [[run[side] for run in content["runs"]] for side in ("baseline", "treatment")]
    (baseline_rule, baseline_name), (treatment_rule, treatment_name) = (_rule(path, side) for side in sides)
    name = label or _model_name(sides[1]) or _model_name(sides[0]) or folder.resolve().name
    model = find_paper_model(name)
    return Compared(
        label=model or name,
        paper_model=model,
        content=content,
        baseline_rule=baseline_rule,
        baseline_name=baseline_name,
        treatment_rule=treatment_rule,
        treatment_name=treatment_name,
    )


def _split(argument: str) -> tuple[str | None, Path]:
    """Label and folder of an argument; a folder whose own name has a `=` is taken as it is."""
    label, equals, rest = argument.partition("=")
    if not equals or Path(argument).is_dir():
        return None, Path(argument)
    if not label.strip() or not rest:
        raise ValueError(f"{argument!r} is not a comparison: write DIR or LABEL=DIR")
    return label.strip(), Path(rest)


def check_comparison(path: Path, content: dict[str, Any]) -> None:
    """Check what pages are made from.

    Raises:
        ValueError: a field that is missing, or numbers that contradict each other; it names the entry.
    """
    try:
        _check(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is not a comparison ({reason}): run megatron-exact compare again"
        ) from error


def require_unchanged(path: Path, content: dict[str, Any]) -> None:
    """Check that the cells which were compared, where they still lie there, are what they were.

    `results.json` may have changed: it names cells that were evaluated later.

    Raises:
        ValueError: a cell was edited, thinned or replaced since; it names the file.
    """
    for run in content["runs"]:
        for side in ("baseline", "treatment"):
            for name, digest in sorted((run[side].get("files") or {}).items()):
                cell = Path(str(run[side].get("results"))) / name
                if cell.suffix == ".jsonl" and cell.is_file() and sha256_file(cell) != digest:
                    raise ValueError(
                        f"{cell} has changed since {path} was made from it: run megatron-exact compare "
                        "again, or put the file back"
                    )


_SIDE = {
    "files?": {"*": str},
    "training?": [{"rule": str, "parameters?": dict, "row_tokens?": int}],
    "licences?": {"corpora?": [dict]},
}
_MEASURE = {"baseline": float, "treatment": float, "delta": float, "ci95?": [float]}
_MEASURED = {
    "kind": str,
    "items": int,
    "measures": {"effect": _MEASURE, "correct": _MEASURE, "*": _MEASURE},
}
_SHAPE = {
    "format_version": int,
    "pairing": {"statement": str},
    "runs": [{"baseline": _SIDE, "treatment": _SIDE}],
    "options?": dict,
    "methods?": dict,
    "notes?": [str],
    "probe?": {
        "methods?": dict,
        "cells?": [{**_MEASURED, "distance": int, "context": int}],
        "distances?": [{**_MEASURED, "distance": int}],
        "kinds?": [{**_MEASURED, "distances": [int]}],
    },
}
"""What the report reads from a comparison.json, apart from the numbers of the suites."""


def _check(content: Any) -> None:
    """Raise an error unless everything that the report reads exists, as `compare` wrote it."""
    require_shape(content, _SHAPE)
    if content.get("content_sha256") not in (None, content_sha256(content)):
        raise ValueError("it has changed since megatron-exact compare wrote it")
    if content["format_version"] != FORMAT_VERSION or isinstance(content["format_version"], bool):
        raise ValueError(
            f"format_version {content['format_version']!r}, this program reads {FORMAT_VERSION}"
        )
    for name, value in (content.get("options") or {}).items():
        if name.endswith("_k_tokens"):
            require_shape(value, int, f"options.{name}")
    if not content["runs"] or not isinstance(content["pairing"]["statement"], str):
        raise ValueError("no runs")
    for run in content["runs"]:
        for side in ("baseline", "treatment"):
            run[side].get("model")
    for name in ("aggregates", "lengths", "cells"):
        seen = set()
        for entry in content.get(name) or []:
            place = tuple(entry[key] for key in ("suite", *PLACES[name]))
            if not isinstance(entry["suite"], str):
                raise TypeError(f"suite {entry['suite']!r}")
            if place in seen:
                raise ValueError(f"{_place(name, place)} comes twice")
            seen.add(place)
            _check_estimate(_place(name, place), entry, largest=POINTS)
            _check_tests(_place(name, place), entry)
    if not content.get("aggregates") and not content.get("probe"):
        raise ValueError("neither aggregates nor a probe")
    for name in ("cells", "distances", "kinds"):
        for entry in (content.get("probe") or {}).get(name) or []:
            for measure, values in entry["measures"].items():
                where = f"probe: {measure} of {entry['kind']} in {name}"
                _check_estimate(where, values, largest=math.inf)


def _place(name: str, place: Sequence[Any]) -> str:
    return f"{name}: {'/'.join(map(str, place))}"


def _check_estimate(place: str, entry: dict[str, Any], *, largest: float) -> None:
    """Raise an error if the numbers of one entry contradict each other."""
    named = {name: entry[name] for name in ("baseline", "treatment", "delta")}
    for key in ("ci95", "ci95_these_seeds"):
        ends = entry[key] if key == "ci95" else entry.get(key)
        if ends is None:
            reason = entry.get(f"{key}_reason")
            if not isinstance(reason, str | None) or (key == "ci95" and not reason):
                raise ValueError(f"{place}: {key} is null and {key}_reason {reason!r} does not say why")
            continue
        low, high = ends
        named |= {f"{key}: low": low, f"{key}: high": high}
    if entry.get("detectable") is not None:
        named["detectable"] = entry["detectable"]
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{place}: {name} is {value!r}, not a finite number")
    for name in ("baseline", "treatment"):
        if largest < math.inf and not -ROUNDING <= named[name] <= largest + ROUNDING:
            raise ValueError(f"{place}: {name} is {named[name]!r}, outside of 0 to {largest:g}")
    between = named["treatment"] - named["baseline"]
    if abs(named["delta"] - between) > ROUNDING * max(1, abs(named["baseline"]), abs(named["treatment"])):
        raise ValueError(f"{place}: delta is {named['delta']!r}, its sides differ by {between!r}")
    for key in ("ci95", "ci95_these_seeds"):
        low, high = named.get(f"{key}: low", 0), named.get(f"{key}: high", 0)
        if low > high:
            raise ValueError(f"{place}: {key} begins at {low!r} and ends at {high!r}")
    lift = entry.get("relative_lift_percent")
    if lift is not None and abs(lift * named["baseline"] / 100 - between) > ROUNDING * max(1, abs(lift)):
        raise ValueError(f"{place}: relative_lift_percent is {lift!r}, its sides differ by {between!r}")


def _check_tests(place: str, entry: dict[str, Any]) -> None:
    """Raise unless counts are counts and p values lie in 0..1, where there are any."""
    for name in ("cells", "examples"):
        value = entry.get(name, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"{place}: {name} is {value!r}, not a count")
    for name in ("p_value", "p_holm", "p_value_these_seeds", "pair_level_p_value"):
        value = entry.get(name)
        if value is not None and (isinstance(value, bool) or not 0 <= value <= 1):
            raise ValueError(f"{place}: {name} is {value!r}, outside of 0 to 1")


def training_of(run: dict[str, Any]) -> Lines:
    """The trainings behind one side of a pair, first stage first: rule, parameters, row_tokens."""
    stages = run.get("training")
    if stages:
        return list(stages)
    rule = run.get("token_weighting")
    return [] if rule is None else [{"rule": rule, "parameters": {}, "row_tokens": None}]


def _rule(path: Path, runs: Sequence[dict[str, Any]]) -> tuple[str | None, str]:
    """Rule of one side and its name. Instruction tuning after the weighted stages is `none` and no rule."""
    found = {_rule_of_run(run) for run in runs}
    if len(found) > 1:
        names = " and ".join(sorted(name for _, name in found))
        raise ValueError(f"{path} mixes runs of {names} on one side: compare each rule by itself")
    return found.pop()


def _rule_of_run(run: dict[str, Any]) -> tuple[str | None, str]:
    stages = training_of(run)
    if not stages:
        return None, RULE_UNKNOWN
    weighted = [stage for stage in stages if stage["rule"] != STANDARD]
    rules = list(dict.fromkeys(stage["rule"] for stage in weighted)) or [STANDARD]
    name = " then ".join(RULE_NAMES.get(rule, rule) for rule in rules)
    unusual = dict.fromkeys(text for stage in weighted for text in _unusual(stage))
    return "+".join(rules), name + (f" ({', '.join(unusual)})" if unusual else "")


def _unusual(stage: dict[str, Any]) -> Iterable[str]:
    """Parameters that are not the paper's, in words."""
    row_tokens = stage.get("row_tokens")
    usual = {
        "alpha": DEFAULT_ALPHA,
        "gamma": DEFAULT_GAMMA,
        "tau": default_tau(row_tokens or 0),
        "evidence_nats": DEFAULT_EVIDENCE_NATS,
    }
    without_effect = {"gamma"} if stage["rule"] == "uniform-tail" else set()
    if not row_tokens:
        without_effect.add("tau")
    for name, value in (stage.get("parameters") or {}).items():
        if name == MASS_SCALE:  # the number itself depends on the pack, and so on the seed
            yield "mass of EXACT"
        elif name not in without_effect and value is not None and value != usual.get(name):
            yield f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"


def _model_name(runs: Sequence[dict[str, Any]]) -> str | None:
    """The preset of a side's models, else the name of their folder."""
    for run in runs:
        if run.get("preset"):
            return str(run["preset"])
        model = run.get("model")
        if isinstance(model, dict) and model.get("name"):
            return str(model["name"])
    return None


NOT_RUN = Faint("not run")
REGIMES = ("trained", "extrapolated")
SIDES = ("standard", "EXACT", "delta [95 %]")


def suite_name(suite: str) -> str:
    """A suite as tables name it."""
    return find_suite(suite).title


def difference_cell(estimate: Estimate) -> Text:
    """`+1.25 [+0.20, +2.30]`; an interval that includes 0, and few examples, are marked in words."""
    text = signed(estimate.delta, 2)
    if estimate.ci95 is not None:
        text += f" [{signed(estimate.ci95[0], 2)}, {signed(estimate.ci95[1], 2)}]"
    elif estimate.no_interval:
        text += f" - ({estimate.no_interval})"
    marks = ["includes 0"] if estimate.includes_zero else []
    if estimate.examples is not None and estimate.examples < FEW_EXAMPLES:
        marks.append(f"only {estimate.examples} example{'s' if estimate.examples > 1 else ''}")
    return (text + " ", Strong(", ".join(marks))) if marks else text


def find_aggregate(compared: Compared, suite: str, regime: str) -> Estimate | None:
    """The macro average of a suite and regime; None if it was not run."""
    for entry in compared.aggregates:
        if (entry["suite"], entry["regime"]) == (suite, regime):
            return estimate_of(entry)
    return None


def side_names(side: str) -> list[str]:
    """Heads of three columns: both sides and their difference."""
    return [f"{side}: {name}" for name in SIDES]


def side_cells(estimate: Estimate | None) -> list[Text]:
    """Their cells; None: not run."""
    if estimate is None:
        return [NOT_RUN] * 3
    return [f"{estimate.baseline:.2f}", f"{estimate.treatment:.2f}", difference_cell(estimate)]


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """One average of a comparison."""

    who: str
    """The model or rule that it belongs to, as its table names it."""
    suite: str
    """Name of a suite."""
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
        return self.examples is not None and self.examples[0] < CELL_EXAMPLES.get(self.suite, 0)

    @property
    def windows_text(self) -> str:
        """`1K, 2K`."""
        return ", ".join(map(token_label, self.windows)) or UNKNOWN

    @property
    def tasks_text(self) -> str:
        """`all 11`, or `9 of 11`: tasks that have all their cells."""
        if self.examples is None:
            return UNKNOWN
        num_tasks = len(SUITE_TASKS.get(self.suite, ()))
        if not num_tasks:
            return f"{len(self.other)}"
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
        suite: name of a suite; one that the paper does not have has none of its tasks.
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
        other=tuple(sorted(tasks - set(SUITE_TASKS.get(suite, ())))),
        examples=(min(cells.values()), max(cells.values())) if cells else None,
    )


def _missing(suite: str, windows: Sequence[int], cells: set[tuple[str, int]]) -> Iterable[str]:
    for task in SUITE_TASKS.get(suite, ()):
        gaps = [tokens for tokens in windows if (task, tokens) not in cells]
        if len(gaps) == len(windows):
            yield task
        elif gaps:
            yield f"{task} at {', '.join(map(token_label, gaps))}"


def quantity_notes(coverages: Sequence[Coverage]) -> list[Block]:
    """Return a warning that names every average over other windows or tasks than the paper's, if any."""
    unlike = [one for one in coverages if not one.is_as_in_paper]
    if not unlike:
        return []
    found: dict[str, dict[str, list[str]]] = {}
    for one in unlike:
        for difference in one.differences():
            found.setdefault(difference, {}).setdefault(one.what, []).append(one.who)
    text = "".join(
        f" {difference[:1].upper()}{difference[1:]}: {_rows(by_what)}."
        for difference, by_what in found.items()
    )
    return [
        Note(
            text="These averages are over other windows or tasks than the paper's: they are not the same "
            f"quantity.{text}"
        )
    ]


def _rows(by_what: dict[str, list[str]]) -> str:
    """`RULER trained, RULER extrapolated (Qwen2.5-3B); NoLiMa trained (Qwen2.5-3B, Qwen2.5-7B)`."""
    together: dict[tuple[str, ...], list[str]] = {}
    for what, who in by_what.items():
        together.setdefault(tuple(dict.fromkeys(who)), []).append(what)
    return "; ".join(f"{', '.join(whats)} ({', '.join(who)})" for who, whats in together.items())


def examples_notes(coverages: Sequence[Coverage]) -> list[Block]:
    """Return a remark about cells with fewer examples than the paper's, if any."""
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
