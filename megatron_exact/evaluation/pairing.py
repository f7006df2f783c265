"""The two sides of a comparison: which folders pair, which lengths were trained, which examples match.

`results.json` contains the `megatron_exact.json` of a model under `provenance`, whose `run` is the run.json
of the training. `megatron_exact.lineage` decides whether two such records are a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.evaluation.result_folders import (
    Cell,
    CellExamples,
    ResultFolder,
    read_cell,
    read_result_folder,
)
from megatron_exact.evaluation.suites.suite import (
    K_TOKENS,
    Suite,
    TokenLength,
    find_suite,
    registered,
    token_lengths,
)
from megatron_exact.json_input import require_shape
from megatron_exact.lineage import (
    NEEDED,
    compares_whole_configuration,
    first_difference,
    trained_corpora,
    trained_row_tokens,
    trainings,
    unproved_pair,
)

PAIRED = "training verified as paired"
NOT_PAIRED = "training not verifiably paired"
TRAINED, EXTRAPOLATED, ALL = "trained", "extrapolated", "all"
REGIMES = (TRAINED, EXTRAPOLATED, ALL)
"""Which lengths an average is over, in the order of the paper's tables."""
REMEDY = "evaluate both models with the same options"
SCORE_ROUNDING = 1e-9


def training_history(provenance: dict[str, Any] | None) -> dict[str, Any]:
    """Return how a model was trained, for the description of a run in a comparison.

    Args:
        provenance: the `megatron_exact.json` of the model; None for a model without one.

    Returns:
        {`preset`: name or None, `training`: [{`rule`, `parameters`, `row_tokens`}], first stage first,
        `licences`: {`model`: of the model that training started from, or None, `corpora`: [{`name`,
        `licence`}]}}.
    """
    provenance = provenance or {}
    run = last_run(provenance)
    imported = provenance.get("import")
    return {
        "preset": provenance.get("preset"),
        "training": [
            {
                "rule": record["weighting"].get("rule"),
                "parameters": record["weighting"].get("parameters") or {},
                "row_tokens": record.get("row_tokens"),
            }
            for record in trainings(run)
            if isinstance(record.get("weighting"), dict)
        ],
        "licences": {
            "model": imported.get("licence") if isinstance(imported, dict) else None,
            "corpora": trained_corpora(run),
        },
    }


def trained_window(provenance: dict[str, Any] | None) -> int | None:
    """Return the tokens of the longest rows that a model was trained on; None without a record.

    Earlier trainings count too, because tuning on short rows follows training on long ones.
    """
    return trained_row_tokens(last_run(provenance))


def is_tuned_on_answers(provenance: dict[str, Any] | None) -> bool:
    """Return whether a training of the model supervised the answers of question-answer records."""
    return any(record.get("supervision") for record in trainings(last_run(provenance)))


def last_run(provenance: dict[str, Any] | None) -> Any:
    """Return run.json of the last training; empty for a model without a record."""
    provenance = provenance or {}
    return provenance.get("run", provenance)


def training_record(folder: ResultFolder) -> dict[str, Any] | None:
    """Return run.json of the training behind a result folder, with `export_iteration`, or None."""
    provenance = folder.provenance
    if provenance is None:
        return None
    run = last_run(provenance)
    if not isinstance(run, dict) or not run:
        return None
    return {**run, "export_iteration": provenance.get("iteration")}


def check_training_pair(baseline: ResultFolder, treatment: ResultFolder) -> str | None:
    """Compare the trainings of both sides of a pair.

    Returns:
        None if they are one pair, else why that cannot be verified.

    Raises:
        ValueError: both sides have a record and the records disagree.
    """
    before, after = training_record(baseline), training_record(treatment)
    without = [
        str(folder.path) for folder, record in ((baseline, before), (treatment, after)) if record is None
    ]
    if before is None or after is None:
        verb = "carries" if len(without) == 1 else "carry"
        return f"{' and '.join(without)} {verb} no record of a training"
    difference = first_difference(before, after)
    if difference is not None:
        raise ValueError(
            f"{baseline.path} and {treatment.path} were not trained as a pair: {difference}; "
            "compare runs that differ in their token weighting alone"
        )
    missing = [key for key in NEEDED if key not in before or key not in after]
    if missing:
        return f"the records of {baseline.path} and {treatment.path} do not both name {', '.join(missing)}"
    return unproved_pair(before, after)


def read_sides(
    baselines: Sequence[str | Path],
    treatments: Sequence[str | Path],
    read: Callable[[str | Path], ResultFolder] = read_result_folder,
) -> tuple[list[ResultFolder], list[ResultFolder]]:
    """Read the folders of both sides.

    Args:
        baselines: folders of one side, one for each seed.
        treatments: folders of the other side, as many.
        read: function that reads one folder.

    Raises:
        ValueError: different numbers of folders, or a model twice on one side.
    """
    if len(baselines) != len(treatments) or not baselines:
        raise ValueError(
            f"{len(baselines)} baseline and {len(treatments)} treatment runs: runs pair in order, "
            "give as many on each side"
        )
    for side in (baselines, treatments):
        places = [Path(path).resolve() for path in side]
        twice = next(
            (path for path, place in zip(side, places, strict=True) if places.count(place) > 1), None
        )
        if twice is not None:
            raise ValueError(f"{twice} is given twice on one side: several runs are several seeds")
    before, after = [[read(path) for path in side] for side in (baselines, treatments)]
    for folders in (before, after):
        for one, other in combinations(folders, 2):
            if one.weights is not None and one.weights == other.weights:
                raise ValueError(
                    f"{one.path} and {other.path} are the same weights: several runs on one side are "
                    "several seeds, give each model once"
                )
    return before, after


def pairing(before: Sequence[ResultFolder], after: Sequence[ResultFolder]) -> dict[str, Any]:
    """Return whether all pairs of trainings are verified as paired, and a statement about it.

    Raises:
        ValueError: both sides of a pair have a record and the records disagree.
    """
    reasons = [
        reason
        for one, other in zip(before, after, strict=True)
        if (reason := check_training_pair(one, other)) is not None
    ]
    if reasons:
        return {"verified": False, "statement": f"{NOT_PAIRED}: {'; '.join(reasons)}"}
    records = [
        (training_record(one), training_record(other)) for one, other in zip(before, after, strict=True)
    ]
    agree = "pack, start checkpoint, seed and configuration agree"
    if not all(one and other and compares_whole_configuration(one, other) for one, other in records):
        agree = (
            "pack, start checkpoint, seed, schedule and layout agree; a record of an earlier version names "
            "no other flags"
        )
    return {"verified": True, "statement": f"{PAIRED}: {agree}"}


@dataclass(frozen=True, kw_only=True)
class Regimes:
    """Lengths of both regimes; a length in neither counts in `all` only."""

    trained: Sequence[TokenLength] = ()
    """Lengths up to the window of training."""
    extrapolated: Sequence[TokenLength] = ()
    """Lengths beyond the window of training."""
    k_tokens: Mapping[str, int] = field(default_factory=dict)
    """Tokens that K means in these lengths, by name of suite; by default what K means in that suite."""

    def __post_init__(self) -> None:
        for suite in ("", *self.k_tokens):
            both = set(self.tokens(TRAINED, suite)) & set(self.tokens(EXTRAPOLATED, suite))
            if both:
                raise ValueError(
                    f"{min(both):,} tokens are among the trained and the extrapolated lengths: "
                    "give each length once"
                )

    def tokens(self, regime: str, suite: str) -> tuple[int, ...]:
        """Return the lengths of a regime in tokens, as a suite counts them."""
        lengths = self.trained if regime == TRAINED else self.extrapolated
        return tuple(length.tokens(self.k_of(find_suite(suite))) for length in lengths)

    def k_of(self, suite: Suite) -> int:
        """Return the tokens that K means in the lengths of a suite."""
        return self.k_tokens.get(suite.name, suite.k_tokens[0])

    def for_folders(self, folders: Sequence[ResultFolder]) -> Regimes:
        """The same lengths; where nobody said what K means for a suite, as the results' protocol counts."""
        recorded = {
            name: find_suite(name).k_of_record(suite_record(folder, name))
            for folder in folders
            for name in {cell.suite for cell in folder.files}
        }
        return replace(self, k_tokens={**recorded, **self.k_tokens})

    def of(self, suite: str, length: int) -> tuple[str, ...]:
        """Return the regimes in which a cell of this length counts."""
        named = [regime for regime in (TRAINED, EXTRAPOLATED) if length in self.tokens(regime, suite)]
        return (*named, ALL)

    def require_evaluated(self, lengths: set[tuple[str, int]]) -> None:
        """Raise ValueError if no suite was evaluated at one of the given lengths.

        Args:
            lengths: (suite, tokens) of all cells.
        """
        named = {TRAINED: self.trained, EXTRAPOLATED: self.extrapolated}
        for regime, asked in named.items():
            for place, length in enumerate(asked):
                if not lengths:
                    raise ValueError(
                        f"length {length}: the folders have no suite, only an evidence probe: leave out "
                        "--trained-lengths and --extrapolated-lengths"
                    )
                if not any(self.tokens(regime, suite)[place] == tokens for suite, tokens in lengths):
                    there = ", ".join(str(tokens) for tokens in sorted({tokens for _, tokens in lengths}))
                    raise ValueError(
                        f"no suite was evaluated at the {regime} length {length}, only at {there} tokens: "
                        "leave it out, or evaluate it"
                    )

    @classmethod
    def of_record(cls, options: Mapping[str, Any]) -> Regimes:
        """Return the regimes that `record` wrote into a comparison.json.

        Raises:
            ValueError: the lengths are damaged.
        """
        lengths = {regime: options.get(f"{regime}_lengths") or [] for regime in (TRAINED, EXTRAPOLATED)}
        recorded = {suite.name: options.get(f"{suite.name}_k_tokens") for suite in registered().values()}
        return cls(
            trained=tuple(one for word in lengths[TRAINED] for one in token_lengths(str(word))),
            extrapolated=tuple(one for word in lengths[EXTRAPOLATED] for one in token_lengths(str(word))),
            k_tokens={name: k_tokens for name, k_tokens in recorded.items() if type(k_tokens) is int},
        )

    def record(self) -> dict[str, Any]:
        """Return both regimes for comparison.json, and what K means in suites where it is not 1,024."""
        return {
            "trained_lengths": [str(length) for length in self.trained],
            "extrapolated_lengths": [str(length) for length in self.extrapolated],
            **{
                f"{suite.name}_k_tokens": self.k_of(suite)
                for suite in registered().values()
                if suite.k_tokens != (K_TOKENS,)
            },
        }


@dataclass(frozen=True, kw_only=True)
class CellScores:
    """Scores of one cell, matched example by example."""

    baseline: tuple[NDArray[np.float64], ...]
    """One array for each pair of runs: [examples] of a suite, 0..1, or [items, measures] of the probe."""
    treatment: tuple[NDArray[np.float64], ...]
    """The same examples in the same order."""
    units: tuple[tuple[str, ...], ...]
    """Name of each example's unit, for each pair; examples with the same name were drawn together."""
    is_shared: bool
    """Whether the examples are also the same in all pairs, in the same order."""

    @property
    def differences(self) -> tuple[NDArray[np.float64], ...]:
        """Return treatment minus baseline of each pair."""
        return tuple(after - before for before, after in zip(self.baseline, self.treatment, strict=True))

    @property
    def has_larger_units(self) -> bool:
        """Whether several examples were drawn together."""
        return any(len(set(names)) < len(names) for names in self.units)

    @property
    def examples(self) -> int:
        """Number of examples of one run; the rounded mean over the pairs of runs where they differ."""
        return round(sum(map(len, self.baseline)) / len(self.baseline))


def common_cells(folders: Sequence[ResultFolder]) -> list[Cell]:
    """Return the cells of all folders, in order.

    Raises:
        ValueError: a cell that only some of the folders have.
    """
    first, *others = folders
    for other in others:
        for rich, poor in ((first, other), (other, first)):
            missing = [cell for cell in rich.files if cell not in poor.files]
            if missing:
                raise ValueError(
                    f"{poor.path} lacks {len(missing)} of the {len(rich.files)} cells of {rich.path}, the "
                    f"first being {missing[0]}: finish its evaluation, or compare without that suite"
                )
    return list(first.files)


def backend_of(folder: ResultFolder) -> dict[str, Any]:
    """Return what a folder records about how its suites ran; empty for a folder of an older version."""
    backend = folder.info.get("backend")
    return backend if isinstance(backend, dict) and "calls" in backend else {}


def require_same_backend(before: Sequence[ResultFolder], after: Sequence[ResultFolder]) -> None:
    """Check that both sides of a pair ran on one engine in one dtype and generated alike.

    Folders that record no backend are not compared. Calls of older versions record no `generation`: then
    answers followed a model's generation_config.json, such as its repetition penalty.

    Raises:
        ValueError: they differ; names both folders and what differs.
    """
    for one, other in zip(before, after, strict=True):
        ours, theirs = backend_of(one), backend_of(other)
        for name, words in (("name", "on the backend"), ("dtype", "in dtype")):
            if ours and theirs and ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"{one.path} was evaluated {words} {ours.get(name)}, {other.path} {words} "
                    f"{theirs.get(name)}: {REMEDY}"
                )
        generations = [
            (folder, call.get("generation"))
            for folder in (one, other)
            for call in backend_of(folder).get("calls", ())
        ]
        for folder, generation in generations:
            if generation != generations[0][1]:
                first, before = generations[0]
                raise ValueError(
                    f"{first.path} was evaluated with the generation {before or 'of an earlier version'}, "
                    f"{folder.path} with {generation or 'that of an earlier version'}: {REMEDY}"
                )


def suite_record(folder: ResultFolder, suite: str) -> dict[str, Any]:
    """The options that a suite was evaluated with; empty where the folder does not say."""
    suites = folder.info.get("suites")
    record = suites.get(suite) if isinstance(suites, dict) else None
    options = record.get("options") if isinstance(record, dict) else None
    return options if isinstance(options, dict) else {}


def require_same_protocol(folders: Sequence[ResultFolder]) -> None:
    """Refuse folders whose results of a suite were made by different protocols.

    Raises:
        ValueError: names both folders and protocols.
    """
    first: dict[str, ResultFolder] = {}
    for folder in folders:
        for name in sorted({cell.suite for cell in folder.files}):
            other = first.setdefault(name, folder)
            ours, theirs = (suite_record(each, name).get("protocol") for each in (other, folder))
            if ours != theirs:
                raise ValueError(
                    f"{other.path} has {name} by the protocol {ours or 'of an earlier version'}, "
                    f"{folder.path} by {theirs or 'that of an earlier version'}: {REMEDY}"
                )


def missing_from_grid(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that are missing everywhere although their suite has the task and the length."""
    missing = []
    for suite in sorted({cell.suite for cell in cells}):
        inside = {(cell.task, cell.length) for cell in cells if cell.suite == suite}
        lengths = sorted({length for _, length in inside if length > 0})
        for task in sorted({task for task, length in inside if length > 0}):
            missing += [
                Cell(suite=suite, task=task, length=length)
                for length in lengths
                if (task, length) not in inside
            ]
    return missing


def unbound(folder: ResultFolder) -> str:
    """Return why the cells of a folder cannot be verified as its model's; empty where they can."""
    if folder.info.get("suites") is None or folder.info.get("bindings") is not None:
        return ""
    what = "bindings" if folder.info.get("cells") is not None else "hashes and bindings"
    return (
        f"its results.json has no {what} (an older version made it, or somebody removed them), so that "
        "edited or exchanged answers would not be noticed; evaluate into a new folder to be sure"
    )


def read_verified(folder: ResultFolder, cell: Cell) -> CellExamples:
    """Read the examples of a cell, and compute their scores again from what the model answered.

    Folders of an older version do not say how they were scored.

    Raises:
        ValueError: a score that the answer does not have, or see `read_cell`.
    """
    examples = read_cell(folder, cell)
    if cell.suite not in (folder.info.get("suites") or {}):
        return examples
    suite, record = find_suite(cell.suite), suite_record(folder, cell.suite)
    parts = zip(examples.ids, examples.predictions, examples.references, examples.scores, strict=True)
    for name, prediction, references, score in parts:
        where = f"{examples.path}, id {name}"
        try:
            require_shape(prediction, str, "prediction")
            require_shape(references, [str], "references")
            if not references:
                raise ValueError("references is empty")
        except ValueError as error:
            raise ValueError(f"{where}: {error}: {REMEDY}") from error
        expected = suite.score_by_record(cell.task, prediction, references, record)
        if expected is not None and abs(expected - score) > SCORE_ROUNDING:
            raise ValueError(
                f"{where}: the score is {score:g}, but its answer {prediction[:40]!r} has {expected:g} by "
                "the metric of results.json: the file was edited; remove it and evaluate the cell again"
            )
    return examples


def read_matched(
    cell: Cell, baselines: Sequence[ResultFolder], treatments: Sequence[ResultFolder]
) -> CellScores:
    """Read one cell of a suite of all runs; pair number i is `baselines[i]` with `treatments[i]`.

    Raises:
        ValueError: the sides of a pair differ in an id, a prompt or a reference; it names the first one.
    """
    pairs = [
        (read_verified(one, cell), read_verified(other, cell))
        for one, other in zip(baselines, treatments, strict=True)
    ]
    return match_examples(pairs, find_suite(cell.suite).drawn_with)


def match_examples(
    pairs: Sequence[tuple[CellExamples, CellExamples]],
    drawn_with: Callable[[str], str] = str,
    what: str = "examples",
    remedy: str = REMEDY,
) -> CellScores:
    """Match the examples of both sides of each pair by id, in the order of the first pair where it can be.

    Raises:
        ValueError: the sides of a pair differ; it names `what` and the first difference.
    """
    first = pairs[0][0]
    before, after, units, is_shared = [], [], [], True
    for ours, theirs in pairs:
        difference = difference_of_examples(ours, theirs)
        if difference is not None:
            raise ValueError(
                f"{ours.path} and {theirs.path} are not the same {what}: {difference}; {remedy}"
            )
        order = ours
        if difference_of_examples(first, ours) is None:
            order = first
        else:
            is_shared = False
        units.append(tuple(order.units or map(drawn_with, order.ids)))
        before.append(_in_order_of(order, ours))
        after.append(_in_order_of(order, theirs))
    return CellScores(
        baseline=tuple(before), treatment=tuple(after), units=tuple(units), is_shared=is_shared
    )


def difference_of_examples(one: CellExamples, other: CellExamples) -> str | None:
    """What differs between the examples of two files in whatever order, in words; None if nothing."""
    if one is other:
        return None
    if len(one.ids) != len(other.ids):
        return f"{len(one.ids):,} and {len(other.ids):,} examples"
    place = {name: position for position, name in enumerate(other.ids)}
    for position, name in enumerate(one.ids):
        if name not in place:
            return f"id {name!r} is in the first only"
        there = place[name]
        if one.prompts[position] != other.prompts[there]:
            return f"the prompt of id {name!r} differs ({one.prompts[position]} and {other.prompts[there]})"
        if one.references[position] != other.references[there]:
            return f"the references of id {name!r} differ"
    return None


def _in_order_of(order: CellExamples, examples: CellExamples) -> NDArray[np.float64]:
    if order.ids == examples.ids:
        return examples.scores
    place = {name: position for position, name in enumerate(examples.ids)}
    return examples.scores[[place[name] for name in order.ids]]
