"""The first section of a report, for a reader with one minute, and the sections on loss and cost.

The summary says what was compared, whether it was paired, which averages moved and how small a difference
could have been seen, where the treatment is worse, and what it cost. It judges by the intervals of the
comparisons alone: a difference is above or below the baseline where its interval excludes 0.

Loss by effective context needs the training runs: the last evaluation of a run has unweighted sums of the
loss by bucket, on held-out targets that are the same in all arms of a seed. Its interval is Student's t
over the seeds; these sums have no variance over targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.evaluation.statistics import interval_of_pairs
from megatron_exact.exposure import default_tau
from megatron_exact.json_input import read_json_object, require_shape
from megatron_exact.report.compared import (
    REGIMES,
    STANDARD,
    Compared,
    difference_cell,
    estimate_of,
    interval_text,
    signed,
    suite_name,
    token_label,
)
from megatron_exact.report.page import (
    Block,
    Bullets,
    Faint,
    Heading,
    Note,
    Paragraph,
    Strong,
    Table,
    Text,
)
from megatron_exact.report.paper_numbers import QA_SUITE
from megatron_exact.report.results import bucket_labels, read_run, require_paired

EFFECT = "effect"
MOST_LISTED = 6
"""Differences that a line of the summary names; the tables have all."""
MOST_IN_FULL = 3
"""Comparisons up to which the summary spells out every difference; of more it counts, and the table has
the numbers."""
MILLINATS = 1000.0
NOT_STEPS = ("table", "report")
"""Steps of a ledger that are running while the page is written."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One number of a comparison, with the words for it."""

    compared: Compared
    """Which comparison."""
    what: str
    """`RULER trained` or `probe field-lookup, 4K to 64K`."""
    unit: str
    """`points` or `nats`."""
    entry: dict[str, Any]
    """Entry of comparison.json."""
    is_average: bool
    """Whether it is a headline; other differences are parts of one."""

    @property
    def direction(self) -> int | None:
        """1 or -1 where the interval lies above or below 0, 0 where it includes 0, None without one."""
        ends = self.entry["ci95"]
        if ends is None:
            return None
        return 1 if ends[0] > 0 else -1 if ends[1] < 0 else 0

    @property
    def is_usual(self) -> bool:
        """Whether the baseline is standard training."""
        return self.compared.baseline_rule in (STANDARD, None)

    @property
    def who(self) -> str:
        """The treatment, and the baseline where it is another one than the standard."""
        against = "" if self.is_usual else f" against {self.compared.baseline_name}"
        return f"{self.compared.treatment_name}{against}"

    def words(self) -> str:
        """Return `RULER trained +1.25 [+0.20, +2.30] points`."""
        numbers = f"{signed(self.entry['delta'], 2)} {interval_text(self.entry, 2)}"
        return f"{self.what} {numbers} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class ArmLosses:
    """Loss of one arm minus that of the baseline on the same held-out targets."""

    arm: str
    """Name of the arm."""
    labels: tuple[str, ...]
    """Ranges of effective context in tokens, shortest first, then `below the tail`, `tail` and `all`."""
    baseline: NDArray[np.float64]
    """[labels], mean loss of the baseline over the seeds, nats a target; NaN without targets."""
    deltas: NDArray[np.float64]
    """[labels, seeds], difference of the means, nats a target."""

    def difference(self, row: int) -> dict[str, Any]:
        """Return the mean difference over the seeds with its interval, thousandths of a nat a target."""
        values = MILLINATS * self.deltas[row]
        return {"delta": float(values.mean()), **interval_of_pairs(values).record("ci95", 1.0)}


def read_losses(triples: Sequence[Sequence[str]]) -> list[ArmLosses]:
    """Read the losses of arms, one triple for each arm and seed.

    Args:
        triples: name of the arm, folder of the baseline's training run, folder of the arm's.

    Raises:
        FileNotFoundError: a folder without a run.
        ValueError: a run without an evaluation, a pair that was scored on different targets, or seeds of
            one arm with different buckets.
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    for arm, baseline, treatment in triples:
        pairs.setdefault(arm, []).append((baseline, treatment))
    return [_arm_losses(arm, folders) for arm, folders in pairs.items()]


def _arm_losses(arm: str, folders: Sequence[tuple[str, str]]) -> ArmLosses:
    names: tuple[str, ...] | None = None
    means: list[NDArray[np.float64]] = []
    for pair in folders:
        baseline, treatment = map(read_run, pair)
        sides = baseline.final_evaluation, treatment.final_evaluation
        try:
            require_paired([sides[0]], [sides[1]], "last evaluations")
        except ValueError as error:
            raise ValueError(f"{arm}: {' and '.join(pair)}: {error}") from None
        weighting = baseline.run.get("weighting") or {}
        if "lower_bounds" not in weighting or "row_tokens" not in baseline.run:
            raise ValueError(f"{arm}: run.json of {pair[0]} has no lower_bounds or row_tokens: train again")
        lowers, rows = np.array(weighting["lower_bounds"]), int(baseline.run["row_tokens"])
        here = (*bucket_labels(lowers, rows), "below the tail", "tail", "all")
        if names not in (None, here):
            raise ValueError(
                f"{arm}: {pair[0]} has other buckets than the run before it: give each its name"
            )
        names, in_tail = here, lowers >= default_tau(rows)
        groups = np.vstack([np.eye(len(lowers), dtype=bool), ~in_tail, in_tail, np.ones_like(in_tail)])
        targets = groups @ sides[0].bucket_targets
        sums = groups @ np.stack([side.bucket_loss_sums for side in sides], axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append(sums / targets[:, None])
    assert names is not None
    both = np.stack(means, axis=2)  # [labels, sides, seeds]
    return ArmLosses(
        arm=arm, labels=names, baseline=both[:, 0].mean(axis=1), deltas=both[:, 1] - both[:, 0]
    )


def read_ledger(path: str | Path) -> dict[str, Any]:
    """Read ledger.json of an experiment.

    Raises:
        ValueError: the file is not a ledger.
    """
    content = read_json_object(path, "run megatron-exact experiment again")
    try:
        require_shape(content, {"steps": {"*": {"state": str, "seconds?": float, "commands?": [str]}}})
    except ValueError as error:
        raise ValueError(f"{path} is not a ledger ({error}): run megatron-exact experiment again") from None
    return content


def summary_blocks(
    comparisons: Sequence[Compared], losses: Sequence[ArmLosses], ledger: dict[str, Any] | None
) -> list[Block]:
    """Return the section "In one minute"; empty without comparisons."""
    if not comparisons:
        return []
    found = [one for compared in comparisons for one in differences(compared)]
    averages = [one for one in found if one.is_average]
    is_full = len(comparisons) <= MOST_IN_FULL
    items: list[Text] = [
        (Strong("Compared: "), _who(comparisons)),
        (Strong("Paired: "), _pairing(comparisons)),
        (Strong("Above the baseline: "), _moved(averages, 1, is_full=is_full)),
        (Strong("Below the baseline: "), _moved(averages, -1, is_full=is_full)),
        (Strong("Not decided: "), _undecided(averages)),
        (Strong("Where it hurts: "), _where_it_hurts(found, losses, is_full=is_full)),
    ]
    if cost := _cost_sentence(ledger):
        items.append((Strong("Cost: "), cost))
    return [Heading(text="In one minute"), Bullets(items=items), *_chance(averages), *_table(averages)]


def differences(compared: Compared) -> Iterator[Difference]:
    """Return the averages of a comparison, and the parts in which a loss can hide.

    Parts are windows of a suite, tasks of standard QA, and distances of the probe.
    """
    for entry in compared.aggregates:
        suite = entry["suite"]
        if entry["regime"] in REGIMES or not _has_regimes(compared, suite):
            regime = "" if entry["regime"] == "all" else f" {entry['regime']}"
            what = f"{suite_name(suite)}{regime}"
            yield Difference(compared=compared, what=what, unit="points", entry=entry, is_average=True)
    for entry in compared.lengths:
        if entry["length"]:
            what = f"{suite_name(entry['suite'])} at {token_label(entry['length'])}"
            yield Difference(compared=compared, what=what, unit="points", entry=entry, is_average=False)
    for entry in compared.content.get("cells") or []:
        if entry["suite"] == QA_SUITE:
            yield Difference(
                compared=compared, what=entry["task"], unit="points", entry=entry, is_average=False
            )
    probe = compared.probe or {}
    for entry in probe.get("kinds") or []:
        low, high = map(token_label, (entry["distances"][0], entry["distances"][-1]))
        what, measure = f"probe {entry['kind']}, {low} to {high}", entry["measures"][EFFECT]
        yield Difference(compared=compared, what=what, unit="nats", entry=measure, is_average=True)
    for entry in probe.get("distances") or []:
        what = f"probe {entry['kind']} at {token_label(entry['distance'])}"
        measure = entry["measures"][EFFECT]
        yield Difference(compared=compared, what=what, unit="nats", entry=measure, is_average=False)


def _has_regimes(compared: Compared, suite: str) -> bool:
    return any(entry["suite"] == suite and entry["regime"] in REGIMES for entry in compared.aggregates)


def _who(comparisons: Sequence[Compared]) -> str:
    """`Qwen2.5-0.5B: EXACT and Constant against Standard CPT, 3 pairs of runs each`."""
    against: dict[tuple[str, str], list[Compared]] = {}
    for one in comparisons:
        against.setdefault((one.label, one.baseline_name), []).append(one)
    parts = []
    for (label, baseline), group in against.items():
        names = list(dict.fromkeys(one.treatment_name for one in group))
        pairs = sorted({len(one.content["runs"]) for one in group})
        number = f"{pairs[0]}" if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
        noun = "pair" if pairs == [1] else "pairs"
        each = " each" if len(names) > 1 else ""
        parts.append(f"{label}: {_listed(names, ', ')} against {baseline}, {number} {noun} of runs{each}")
    return "; ".join(parts) + "."


def _pairing(comparisons: Sequence[Compared]) -> str:
    doubtful = [one for one in comparisons if not one.content["pairing"].get("verified")]
    if not doubtful:
        return "yes. The two sides of every pair agree in start, data, order, schedule and layout."
    names = _listed([f"{one.label}, {one.treatment_name}" for one in doubtful])
    return f"not verified for {len(doubtful)} of {len(comparisons)} comparisons ({names})."


def _listed(words: Sequence[str], separator: str = "; ") -> str:
    more = f"{separator}and {len(words) - MOST_LISTED} more" if len(words) > MOST_LISTED else ""
    return separator.join(words[:MOST_LISTED]) + more


def _grouped(found: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """The words of each name, in order."""
    groups: dict[str, list[str]] = {}
    for name, words in found:
        groups.setdefault(name, []).append(words)
    return groups


def _by_name(found: Sequence[tuple[str, str]]) -> str:
    """`EXACT: one; another. Constant: a third.`"""
    return " ".join(f"{name}: {_listed(words)}." for name, words in _grouped(found).items())


def _moved(averages: Sequence[Difference], direction: int, *, is_full: bool) -> str:
    """Averages on one side of the baseline: all of them, or of each treatment how many."""
    moved = [(one.who, one.words()) for one in averages if one.direction == direction]
    if not moved:
        return "no average."
    if is_full:
        return _by_name(moved)
    number = Counter(one.who for one in averages)
    names = [f"{who} ({count} of {number[who]})" for who, count in Counter(who for who, _ in moved).items()]
    return f"{'; '.join(names)}. In brackets: how many averages; the table below has them."


def _worst_by_name(found: Sequence[tuple[str, str]]) -> str:
    """`EXACT: probe at 128 -0.31 [-0.52, -0.11] nats and 2 more. Constant: one.`"""
    return " ".join(
        f"{name}: {words[0]}" + (f" and {len(words) - 1} more." if len(words) > 1 else ".")
        for name, words in _grouped(found).items()
    )


def _undecided(averages: Sequence[Difference]) -> str:
    """How many averages an interval leaves open, and what these could have shown."""
    open_ones = [one for one in averages if one.direction == 0]
    without = [one for one in averages if one.direction is None]
    parts = []
    if open_ones:
        text = f"{len(open_ones)} of {len(averages)} averages have an interval that includes 0"
        for unit in ("points", "nats"):
            sizes = [one.entry["detectable"] for one in open_ones if one.unit == unit and _is_known(one)]
            if sizes:
                low, high = f"{min(sizes):.2f}", f"{max(sizes):.2f}"
                span = low if low == high else f"{low} to {high}"
                text += f"; with 80 % power they would have shown {span} {unit}"
        parts.append(text)
    if without:
        parts.append(f"{len(without)} of {len(averages)} have no interval (the table says why)")
    return ". ".join(parts) + "." if parts else "nothing."


def _is_known(one: Difference) -> bool:
    return one.entry.get("detectable") is not None


def _where_it_hurts(found: Sequence[Difference], losses: Sequence[ArmLosses], *, is_full: bool) -> str:
    """Parts and losses whose interval lies on the wrong side of 0, largest first within each kind."""
    parts = [one for one in found if not one.is_average and one.direction == -1]
    if not is_full:  # that a control lies below EXACT is no harm
        parts = [one for one in parts if one.is_usual] or parts
    parts.sort(key=lambda one: (one.unit, one.entry["delta"]))
    found_here = [(one.who, one.words()) for one in parts]
    for arm in losses:
        for row, label in enumerate(arm.labels):
            entry = arm.difference(row)
            if label != "all" and entry["ci95"] is not None and entry["ci95"][0] > 0:
                where = {"tail": "of the tail", "below the tail": label}.get(
                    label, f"of contexts of {label}"
                )
                numbers = f"{signed(entry['delta'], 1)} {interval_text(entry, 1)}"
                found_here.append((f"arm {arm.arm}", f"loss {where} {numbers} thousandths of a nat"))
    if found_here:
        return _by_name(found_here) if is_full else _worst_by_name(found_here)
    num_decided = sum(one.direction is not None for one in found if not one.is_average)
    looked = "windows, tasks of standard QA and distances of the probe"
    looked += " and buckets of the loss" if losses else "; no losses were given (--losses)"
    return f"nowhere that {num_decided} intervals of single parts show ({looked})."


def _chance(averages: Sequence[Difference]) -> list[Block]:
    number = sum(one.direction is not None for one in averages)
    if number < 2:
        return []
    return [
        Note(
            text=f"These {number} intervals stand each for itself: where nothing differs, one in 20 "
            "excludes 0 by chance. p_holm in comparison.json is corrected within a comparison."
        )
    ]


def _table(averages: Sequence[Difference]) -> list[Block]:
    """Every average with what it could have shown."""
    if not averages:
        return []
    has_models = len({one.compared.label for one in averages}) > 1
    body: list[list[Text]] = [
        [
            *([one.compared.label] if has_models else []),
            one.who,
            f"{one.what}, {one.unit}",
            str(len(one.compared.content["runs"])),
            f"{one.entry['baseline']:.2f}",
            difference_cell(estimate_of(one.entry)),
            f"{one.entry['detectable']:.2f}" if _is_known(one) else Faint("not known"),
        ]
        for one in averages
    ]
    models = ["Model"] if has_models else []
    head = [*models, "Treatment", "Average", "Pairs", "Baseline", "Difference [95 %]", "80 % power from"]
    caption = "Every average against its baseline"
    return [
        Table(head=head, body=body, caption=caption, left_columns=2 + len(models)),
        Paragraph(
            text="80 % power from: the difference that a comparison of this size would have shown with "
            "80 % power. A smaller true difference may well be there and not be seen. With one pair of "
            "runs it is about other examples, not other seeds of training."
        ),
    ]


def loss_blocks(losses: Sequence[ArmLosses]) -> list[Block]:
    """Return the section on loss by effective context: arms as columns; empty without losses."""
    if not losses:
        return []
    alike: dict[tuple[Any, ...], list[ArmLosses]] = {}  # arms whose baselines are the same runs
    for arm in losses:
        of_baseline = arm.labels, arm.deltas.shape[1], arm.baseline.tobytes()
        alike.setdefault(of_baseline, []).append(arm)
    blocks: list[Block] = [
        Heading(text="Loss by effective context"),
        Paragraph(
            text="Unweighted validation loss of the last stage on held-out targets, the same in all arms "
            "of a seed, in thousandths of a nat a target: difference from the baseline, negative where the "
            "arm predicts better. Intervals are 95 %, Student's t over seeds."
        ),
    ]
    for (labels, number, _), arms in alike.items():
        body: list[list[Text]] = [
            [
                label,
                f"{MILLINATS * arms[0].baseline[row]:,.0f}",
                *(f"{signed(one['delta'], 1)} {interval_text(one, 1)}" for one in _row(arms, row)),
            ]
            for row, label in enumerate(labels)
            if np.isfinite(arms[0].baseline[row])
        ]
        head = ["effective context", "baseline", *(arm.arm for arm in arms)]
        caption = f"Loss minus the baseline's, {number} {'seed' if number == 1 else 'seeds'}"
        blocks.append(Table(head=head, body=body, caption=caption))
    return blocks


def _row(arms: Sequence[ArmLosses], row: int) -> list[dict[str, Any]]:
    return [arm.difference(row) for arm in arms]


def _kinds(ledger: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The steps of a ledger by kind."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, step in ledger["steps"].items():
        if name not in NOT_STEPS:
            kinds.setdefault(name.partition(":")[0], []).append(step)
    return kinds


def _minutes(steps: Sequence[dict[str, Any]]) -> float:
    return sum(step.get("seconds") or 0.0 for step in steps) / 60


def _cost_sentence(ledger: dict[str, Any] | None) -> str:
    if ledger is None:
        return ""
    kinds = _kinds(ledger)
    whole = sum(map(_minutes, kinds.values()))
    training = _minutes(kinds.get("train", []))
    text = f"{whole:,.0f} minutes of steps, {training:,.0f} of them training"
    commands = (line for steps in kinds.values() for step in steps for line in step.get("commands") or [])
    if any("sbatch" in line for line in commands):
        text += "; jobs of a batch system count only until they were submitted"
    return f"{text}."


def cost_blocks(ledger: dict[str, Any] | None) -> list[Block]:
    """Return the time of the steps of an experiment by kind; empty without a ledger."""
    if ledger is None:
        return []
    body: list[list[Text]] = [
        [
            kind,
            str(len(steps)),
            str(sum(step["state"] == "finished" for step in steps)),
            f"{_minutes(steps):.1f}",
        ]
        for kind, steps in _kinds(ledger).items()
    ]
    return [
        Heading(text="Cost"),
        Paragraph(
            text="Minutes of the steps as the experiment ran them, on whatever machine that was; a job of "
            "a batch system counts only until it was submitted."
        ),
        Table(
            head=["Step", "In all", "Finished", "Minutes"], body=body, caption="Steps of the experiment."
        ),
    ]
