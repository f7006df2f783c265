"""Which interval of a difference between two models covers: a simulation, and its page docs/intervals.md.

Each scenario draws many experiments from a known distribution, so that the true difference is known, and
lets every candidate give its 95 % interval. A candidate is honest if 95 % of its intervals contain the
truth; among honest ones the narrow one is better. `compare_runs.py` offers what this study chose, and the
column `offered` calls the very functions that it calls.
"""

from __future__ import annotations

import argparse
import datetime
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from measure import command, commit, whole_number
from numpy.typing import NDArray
from scipy import optimize, special

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.evaluation import statistics
from megatron_exact.evaluation.statistics import FEWEST_EVENTS, FEWEST_PAIRS
from megatron_exact.files import write_text
from megatron_exact.report.page import markdown_table

EPILOG = """example:
  python benchmarks/coverage.py --output docs/intervals.md
  python benchmarks/coverage.py --experiments 200     # a quick look, to the terminal
"""
EXPERIMENTS, RESAMPLES = 1000, 400
LOWEST, HIGHEST = 0.93, 0.97
"""The coverage that is asked for."""
CRITICAL = float(special.ndtri(0.975))
WIDTH = 108
Array = NDArray[np.float64]
Ends = tuple[float, float] | None
Draw = Callable[[np.random.Generator], "Experiment"]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Differences between the two sides as one evaluation would give them."""

    cells: Sequence[Array]
    """One array [examples, pairs of runs] a cell."""
    questions: NDArray[np.int64] | None = None
    """[examples], the question of each example where cells repeat the same questions."""
    is_shared: bool = True
    """Whether all pairs of runs answered the same examples."""

    def units(self) -> statistics.Units:
        """As `compare_runs` takes it."""
        members = []
        for values in self.cells:
            names = range(len(values)) if self.questions is None else self.questions.tolist()
            members.append(
                (
                    1.0,
                    statistics.cell_units(
                        list(values.T), [names] * values.shape[1], is_shared=self.is_shared
                    ),
                )
            )
        return statistics.average_units(members, across_cells=self.questions is not None)

    def samples(self) -> list[Array]:
        """One array a cell, [examples], or a single one of the questions' means over all cells."""
        means = [values.mean(axis=1) for values in self.cells]
        if self.questions is None:
            return means
        total = np.mean(means, axis=0)
        return [np.bincount(self.questions, weights=total) / np.bincount(self.questions)]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A distribution of experiments."""

    name: str
    """For the tables."""
    draw: Draw
    """One experiment."""
    truth: float
    """What intervals are to contain."""


@dataclass(kw_only=True)
class Score:
    """What became of a candidate's intervals in one scenario."""

    given: list[bool] = field(default_factory=list)
    """Whether there was an interval, by experiment."""
    covered: list[bool] = field(default_factory=list)
    """Whether it contained the truth, of those that were given."""
    widths: list[float] = field(default_factory=list)
    """Of those that were given, in points."""
    excluded: list[bool] = field(default_factory=list)
    """Whether it excluded 0, by experiment."""

    def add(self, ends: Ends, truth: float) -> None:
        """Count one interval."""
        self.given.append(ends is not None)
        self.excluded.append(ends is not None and not ends[0] <= 0 <= ends[1])
        if ends is not None:
            self.covered.append(ends[0] - 1e-12 <= truth <= ends[1] + 1e-12)
            self.widths.append(100 * (ends[1] - ends[0]))

    @property
    def offered(self) -> float:
        """Share of experiments with an interval."""
        return float(np.mean(self.given))

    @property
    def coverage(self) -> float:
        """Of the intervals that were given."""
        return float(np.mean(self.covered)) if self.covered else float("nan")

    @property
    def wrong(self) -> float:
        """Share of all experiments whose interval misses the truth."""
        return self.offered * (1 - self.coverage) if self.covered else 0.0

    def text(self) -> str:
        """`95.1 / 4.2 / 61`."""
        if not self.covered:
            return "-"
        numbers = (
            f"{100 * self.coverage:.1f} / {np.mean(self.widths):.1f} / {100 * np.mean(self.excluded):.0f}"
        )
        return numbers if self.offered > 0.995 else f"{numbers} ({100 * self.offered:.0f})"


# ----------------------------------------------------------------------------------------------------
# Candidates.


@dataclass(frozen=True, kw_only=True)
class Bootstrapped:
    """Resampled averages over cells."""

    estimate: float
    """The average."""
    error: float
    """Its standard error."""
    acceleration: float
    """Of the skewness, for BCa."""
    means: Array
    """[resamples]."""
    errors: Array
    """[resamples], the standard error in each resample."""


def bootstrap(samples: Sequence[Array], resamples: int, rng: np.random.Generator) -> Bootstrapped:
    """Resample each sample by itself; counts of distinct values are multinomial."""
    weight = 1 / len(samples)
    means, variances, cubes, squares, variance = np.zeros(resamples), np.zeros(resamples), 0.0, 0.0, 0.0
    for values in samples:
        number = len(values)
        distinct, repeats = np.unique(values, return_counts=True)
        counts = rng.multinomial(number, repeats / number, size=resamples)
        own = counts @ distinct / number
        means += weight * own
        variances += weight**2 * (counts @ distinct**2 / number - own**2) / (number - 1)
        deviations = weight * (values - values.mean()) / number
        cubes, squares = cubes + float(np.sum(deviations**3)), squares + float(np.sum(deviations**2))
        variance += float(np.sum(deviations**2)) * number / (number - 1)
    return Bootstrapped(
        estimate=weight * float(sum(values.mean() for values in samples)),
        error=variance**0.5,
        acceleration=cubes / (6 * squares**1.5) if squares > 0 else 0.0,
        means=means,
        errors=np.sqrt(np.maximum(variances, 0)),
    )


def percentile(drawn: Bootstrapped) -> Ends:
    """Efron 1979."""
    return statistics.percentiles(drawn.means)


def bca(drawn: Bootstrapped) -> Ends:
    """Bias-corrected and accelerated, Efron 1987."""
    below = np.mean(drawn.means < drawn.estimate - 1e-12) + np.mean(drawn.means <= drawn.estimate + 1e-12)
    bias = special.ndtri(np.clip(below / 2, 1e-3, 1 - 1e-3))
    shifted = bias + np.array([-CRITICAL, CRITICAL])
    levels = special.ndtr(bias + shifted / (1 - drawn.acceleration * shifted))
    low, high = np.quantile(drawn.means, levels)
    return float(low), float(high)


def studentised(drawn: Bootstrapped) -> Ends:
    """Bootstrap of t; resamples without variance have no t and are left out."""
    usable = drawn.errors > 1e-9
    if drawn.error <= 1e-12 or not usable.any():
        return drawn.estimate, drawn.estimate
    ratios = (drawn.means[usable] - drawn.estimate) / drawn.errors[usable]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return drawn.estimate - float(high) * drawn.error, drawn.estimate - float(low) * drawn.error


def student(samples: Sequence[Array]) -> Ends:
    """Student's t over units with Satterthwaite's degrees of freedom, without any correction."""
    parts = [float(np.var(values, ddof=1)) / len(values) / len(samples) ** 2 for values in samples]
    freedom = [part**2 / (len(values) - 1) for part, values in zip(parts, samples, strict=True)]
    mean = float(np.mean([values.mean() for values in samples]))
    if sum(parts) == 0:
        return mean, mean
    half = float(special.stdtrit(sum(parts) ** 2 / sum(freedom), 0.975)) * sum(parts) ** 0.5
    return mean - half, mean + half


def offered(experiment: Experiment) -> Ends:
    """What `compare_runs` gives."""
    return statistics.student_interval(experiment.units()).ends


def these_seeds(experiment: Experiment) -> Ends:
    """What `compare_runs` gives for the seeds at hand."""
    return statistics.student_interval(experiment.units().of_these_seeds()).ends


def over_seeds(experiment: Experiment) -> Ends:
    """Student's t over the pairs of runs alone."""
    averages = experiment.units().averages
    half = float(special.stdtrit(len(averages) - 1, 0.975)) * averages.std(ddof=1) / len(averages) ** 0.5
    return float(averages.mean() - half), float(averages.mean() + half)


def seeds_then_examples(experiment: Experiment, resamples: int, rng: np.random.Generator) -> Ends:
    """Percentiles where pairs of runs and then examples are resampled."""
    draws = np.mean(
        [
            statistics.resampled_means(
                list(values.T), is_shared=experiment.is_shared, resamples=resamples, rng=rng
            )
            for values in experiment.cells
        ],
        axis=0,
    )
    pairs = statistics.pair_weights(draws.shape[1], resamples, rng)
    return statistics.percentiles(np.sum(draws * pairs, axis=1))


def exact(values: Array) -> Ends:
    """Clopper and Pearson's bounds of the rates of wins and losses, each at 97.5 %, subtracted."""
    wins, losses = int(np.sum(values > 0)), int(np.sum(values < 0))
    return _exact(wins, losses, len(values))


@cache
def _exact(wins: int, losses: int, number: int) -> Ends:
    def ends(count: int) -> tuple[float, float]:
        low = 0.0 if count == 0 else float(special.betaincinv(count, number - count + 1, 0.0125))
        high = 1.0 if count == number else float(special.betaincinv(count + 1, number - count, 0.9875))
        return low, high

    (low_win, high_win), (low_loss, high_loss) = ends(wins), ends(losses)
    return low_win - high_loss, high_win - low_loss


def score_interval(values: Array) -> Ends:
    """Tango 1998, "Equivalence test and confidence interval for the difference of paired proportions"."""
    return _score(int(np.sum(values > 0)), int(np.sum(values < 0)), len(values))


@cache
def _score(wins: int, losses: int, number: int) -> Ends:
    def statistic(delta: float) -> float:
        linear = -wins - losses + (2 * number - wins + losses) * delta
        constant = -losses * delta * (1 - delta)
        rate = (max(linear**2 - 8 * number * constant, 0) ** 0.5 - linear) / (4 * number)
        variance = number * (2 * rate + delta * (1 - delta))
        if variance <= 0:
            return float(np.sign(wins - losses - number * delta)) * 1e9
        return (wins - losses - number * delta) / variance**0.5

    middle, edge = (wins - losses) / number, 1 - 1e-9
    low = (
        -1.0
        if statistic(-edge) < CRITICAL
        else optimize.brentq(lambda delta: statistic(delta) - CRITICAL, -edge, middle)
    )
    high = (
        1.0
        if statistic(edge) > -CRITICAL
        else optimize.brentq(lambda delta: statistic(delta) + CRITICAL, middle, edge)
    )
    return float(low), float(high)


# ----------------------------------------------------------------------------------------------------
# Scenarios.


def right_or_wrong(number: int, win: float, loss: float, cells: int = 1) -> Scenario:
    """Cells of examples that the treatment wins, loses or ties."""

    def draw(rng: np.random.Generator) -> Experiment:
        return Experiment(
            cells=[
                rng.choice([1.0, -1.0, 0.0], size=(number, 1), p=[win, loss, 1 - win - loss])
                for _ in range(cells)
            ]
        )

    size = f"{number:,} examples" if cells == 1 else f"{cells} cells of {number:,}"
    return Scenario(
        name=f"{size}; {100 * win:g} % wins, {100 * loss:g} % losses", draw=draw, truth=win - loss
    )


def fractions(number: int, *, is_skewed: bool) -> Scenario:
    """Scores between 0 and 1, as those of RULER's cwe and fwe."""
    after, before = ((5, 0.5), (2, 0.5)) if is_skewed else ((3, 2), (2.5, 2))

    def draw(rng: np.random.Generator) -> Experiment:
        return Experiment(cells=[rng.beta(*after, size=(number, 1)) - rng.beta(*before, size=(number, 1))])

    name = "fractions near the ceiling" if is_skewed else "fractions"
    return Scenario(
        name=f"{number:,} {name}", draw=draw, truth=after[0] / sum(after) - before[0] / sum(before)
    )


def seeds(
    pairs: int,
    number: int,
    of_seeds: float,
    of_examples: float,
    *,
    effect: float = 0.0,
    is_shared: bool = True,
) -> Scenario:
    """Pairs of runs whose effect varies from seed to seed and from example to example.

    Args:
        pairs: of runs.
        number: of examples.
        of_seeds: standard deviation of a seed's effect on the chance of a right answer.
        of_examples: of an example's.
        effect: of the treatment on that chance, before it is cut to 0..1.
        is_shared: whether all pairs answer the same examples.
    """

    def chances(rng: np.random.Generator, examples: int, runs: int) -> tuple[Array, Array]:
        columns = runs if not is_shared else 1
        easy = 0.5 + 0.25 * rng.standard_normal((examples, columns))
        own = of_examples * rng.standard_normal((examples, columns))
        lifted = easy + own + of_seeds * rng.standard_normal(runs) + effect
        return np.broadcast_to(np.clip(easy, 0, 1), lifted.shape), np.clip(lifted, 0, 1)

    def draw(rng: np.random.Generator) -> Experiment:
        before, after = chances(rng, number, pairs)
        right, better = rng.random(before.shape) < before, rng.random(after.shape) < after
        return Experiment(cells=[better.astype(float) - right], is_shared=is_shared)

    truth = 0.0
    if effect:
        before, after = chances(np.random.default_rng(1), 4000, 400)
        truth = float(np.mean(after - before))
    own = "" if is_shared else ", each seed its own"
    return Scenario(
        name=f"{pairs} seeds, {number} examples{own}; seeds differ by {100 * of_seeds:g} points, examples "
        f"by {100 * of_examples:g}" + (f"; effect {100 * truth:.1f}" if effect else ""),
        draw=draw,
        truth=truth,
    )


def questions(spread: float, *, number: int = 58, depths: int = 26, cells: int = 6) -> Scenario:
    """NoLiMa's structure: every question at every depth and length; the truth is over other questions."""
    asked = np.repeat(np.arange(number), depths)

    def draw(rng: np.random.Generator) -> Experiment:
        easy, own = 0.3 + 0.4 * rng.random(number), spread * rng.standard_normal(number)
        found = []
        for cell in range(cells):
            before = easy - 0.03 * cell
            after = np.clip(before + own, 0, 1)
            right = rng.random((number, depths)) < before[:, None]
            better = rng.random((number, depths)) < after[:, None]
            found.append((better.astype(float) - right).reshape(-1, 1))
        return Experiment(cells=found, questions=asked)

    middle = np.linspace(0.3, 0.7, 401)[:, None]
    own = spread * special.ndtri((np.arange(400) + 0.5) / 400)
    truth = float(
        np.mean(
            [
                np.mean(np.clip(middle - 0.03 * cell + own, 0, 1) - middle + 0.03 * cell)
                for cell in range(cells)
            ]
        )
    )
    size = f"{number} questions x {depths} depths x {cells} lengths"
    return Scenario(
        name=f"{size}; questions differ by {100 * spread:g} points",
        draw=draw,
        truth=truth if spread else 0.0,
    )


ONE_PAIR = (
    *(right_or_wrong(20, 0.3, 0.2), right_or_wrong(20, 0.2, 0.2), right_or_wrong(20, 0.05, 0.0)),
    *(right_or_wrong(20, 0.6, 0.05), right_or_wrong(50, 0.1, 0.1), right_or_wrong(50, 0.3, 0.1)),
    *(right_or_wrong(200, 0.1, 0.1), right_or_wrong(200, 0.15, 0.08), right_or_wrong(200, 0.01, 0.01)),
    *(right_or_wrong(200, 0.1, 0.0), right_or_wrong(200, 0.05, 0.0), right_or_wrong(200, 0.9, 0.02)),
    *(right_or_wrong(500, 0.01, 0.01), right_or_wrong(500, 0.04, 0.0), right_or_wrong(500, 0.002, 0.0)),
    *(
        right_or_wrong(7540, 0.003, 0.0),
        right_or_wrong(7540, 0.002, 0.002),
        right_or_wrong(7540, 0.1, 0.08),
    ),
    *(fractions(20, is_skewed=False), fractions(50, is_skewed=True), fractions(500, is_skewed=True)),
    *(right_or_wrong(4, 0.3, 0.2, cells=11), right_or_wrong(20, 0.1, 0.02, cells=11)),
    *(right_or_wrong(20, 0.02, 0.0, cells=11), right_or_wrong(500, 0.05, 0.04, cells=11)),
)
SEEDS = (
    *(
        seeds(2, 200, 0.05, 0.1),
        seeds(3, 200, 0.0, 0.1),
        seeds(3, 200, 0.05, 0.1),
        seeds(3, 200, 0.12, 0.1),
    ),
    *(seeds(3, 20, 0.05, 0.1), seeds(4, 200, 0.0, 0.1), seeds(4, 200, 0.05, 0.1), seeds(4, 200, 0.12, 0.4)),
    *(seeds(5, 200, 0.0, 0.1), seeds(5, 200, 0.05, 0.1), seeds(5, 20, 0.05, 0.1), seeds(5, 200, 0.05, 0.4)),
    *(seeds(5, 200, 0.05, 0.1, is_shared=False), seeds(6, 200, 0.05, 0.1), seeds(10, 200, 0.0, 0.1)),
    *(seeds(10, 200, 0.05, 0.1), seeds(10, 200, 0.12, 0.1), seeds(10, 200, 0.02, 0.4)),
    *(seeds(6, 200, 0.05, 0.1, effect=0.1), seeds(10, 200, 0.05, 0.1, effect=0.1)),
)
QUESTIONS = (
    questions(0.0),
    questions(0.05),
    questions(0.15),
    questions(0.0, depths=1),
    questions(0.15, depths=1),
)


# ----------------------------------------------------------------------------------------------------
# The study.


@dataclass(frozen=True, kw_only=True)
class Study:
    """How much is simulated."""

    experiments: int
    """A scenario."""
    resamples: int
    """Of the bootstraps."""
    seed: int
    """Of all random numbers."""

    def runs(self, scenario: Scenario) -> Iterable[tuple[Experiment, np.random.Generator]]:
        """The experiments of a scenario; they depend on its name alone."""
        rng = statistics.generator(self.seed, scenario.name)
        for _ in range(self.experiments):
            yield scenario.draw(rng), rng


def one_pair(study: Study, scenario: Scenario) -> dict[str, Score]:
    """All candidates that know units alone."""
    scores: dict[str, Score] = {}

    def add(name: str, ends: Ends) -> None:
        scores.setdefault(name, Score()).add(ends, scenario.truth)

    for experiment, rng in study.runs(scenario):
        samples = experiment.samples()
        drawn = bootstrap(samples, study.resamples, rng)
        if experiment.questions is not None:
            examples = [values.mean(axis=1) for values in experiment.cells]
            add("examples (percentile)", percentile(bootstrap(examples, study.resamples, rng)))
        add("percentile", percentile(drawn))
        add("BCa", bca(drawn))
        add("studentised", studentised(drawn))
        add("Student's t", student(samples))
        is_one_of_three = len(samples) == 1 and experiment.questions is None and _are_signs(samples[0])
        if is_one_of_three:
            add("exact", exact(samples[0]))
            add("score", score_interval(samples[0]))
        add("offered", offered(experiment))
    return scores


def _are_signs(values: Array) -> bool:
    return bool(np.all(np.isin(values, (-1.0, 0.0, 1.0))))


def many_seeds(study: Study, scenario: Scenario) -> dict[str, Score]:
    """Candidates that know of several pairs of runs."""
    scores: dict[str, Score] = {}
    for experiment, rng in study.runs(scenario):
        found = {
            "seeds, then examples (percentile)": seeds_then_examples(experiment, study.resamples, rng),
            "t over seeds": over_seeds(experiment),
            "these seeds": these_seeds(experiment),
            "offered": offered(experiment),
        }
        for name, ends in found.items():
            scores.setdefault(name, Score()).add(ends, scenario.truth)
    return scores


def rejections(study: Study, scenario: Scenario) -> list[float]:
    """Shares of p < 0.05: exchanged examples, exchanged pairs of runs, what is claimed."""
    found = []
    for experiment, rng in study.runs(scenario):
        units = experiment.units()
        of_these_seeds = statistics.exchange_p(units, resamples=study.resamples, rng=rng)
        over = statistics.pair_level_p(units.averages)
        found.append(
            (
                of_these_seeds < 0.05,
                over is not None and over < 0.05,
                statistics.claimed_p(units, of_these_seeds) < 0.05,
            )
        )
    return [float(share) for share in np.mean(found, axis=0)]


Scored = dict[str, dict[str, Score]]


def table(scored: Scored) -> str:
    """One row a scenario, one column a candidate."""
    candidates = list(dict.fromkeys(name for scores in scored.values() for name in scores))
    body = [
        [name, *(scores[candidate].text() if candidate in scores else "" for candidate in candidates)]
        for name, scores in scored.items()
    ]
    return markdown_table(["scenario", *candidates], body)


def verdict(scored: Scored) -> list[str]:
    """What the tables say of the interval that is offered, as sentences."""
    found = {name: scores["offered"] for name, scores in scored.items()}
    often = {name: score for name, score in found.items() if score.offered >= 0.5}
    outside = [
        f"{name} ({100 * score.coverage:.1f} %, offered in {100 * score.offered:.0f} %)"
        for name, score in often.items()
        if not LOWEST <= score.coverage <= HIGHEST
    ]
    covers = [score.coverage for score in often.values()]
    wrong = max(found.items(), key=lambda item: item[1].wrong)
    lines = [
        f"The offered interval is given in at least half of the experiments of {len(often)} of "
        f"{len(found)} scenarios. There it covers {100 * min(covers):.1f} to {100 * max(covers):.1f} %.",
        f"Outside of {100 * LOWEST:.0f} to {100 * HIGHEST:.0f} %: "
        + ("; ".join(outside) + "." if outside else "no scenario."),
        f"Over all experiments of a scenario, given or not, an interval that misses the truth comes in "
        f"{100 * wrong[1].wrong:.1f} % at most ({wrong[0]}).",
    ]
    return lines


def paragraph(text: str) -> str:
    """Wrapped as the other pages are."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_on_hyphens=False) + "\n"


def page(study: Study) -> str:
    """Run the study and write the page."""
    pairs = {scenario.name: one_pair(study, scenario) for scenario in ONE_PAIR}
    asked = {scenario.name: one_pair(study, scenario) for scenario in QUESTIONS}
    several = {scenario.name: many_seeds(study, scenario) for scenario in SEEDS}
    tested = {scenario.name: rejections(study, scenario) for scenario in (*TESTED, *SEEDS)}
    noise = 100 * (0.05 * 0.95 / study.experiments) ** 0.5
    head = ["scenario", "examples exchanged", "pairs of runs exchanged", "`p_value`"]
    rates = markdown_table(
        head, [[name, *(f"{100 * share:.1f}" for share in shares)] for name, shares in tested.items()]
    )
    sections = [
        "# Which interval covers\n",
        paragraph(
            f"""Made by `benchmarks/coverage.py`, which simulates every number of this page again.
            `compare_runs.py` gives the interval of the column "offered", by the same functions. Each
            scenario draws {study.experiments:,} experiments from a known distribution; a coverage of
            95 % is known to about {noise:.1f} points (one standard error). Bootstraps have
            {study.resamples} resamples."""
        ),
        paragraph(
            """Cells of the tables are coverage in % / mean width in points / share of experiments whose
            interval excludes 0 in % (power where there is an effect, false alarms where there is
            none). A number in brackets is the share of experiments with an interval, where it is not
            all of them; coverage and width are then over those."""
        ),
        "## What follows\n",
        *(f"{paragraph(line)}" for line in verdict({**pairs, **asked, **several})),
        paragraph(
            f"""`compare_runs.py` gives Student's t over the units that were drawn, corrected for
            skewness, and no interval where fewer than {FEWEST_EVENTS} units differ from the most
            common outcome or where there are 2 to {FEWEST_PAIRS - 1} pairs of runs. Few units that
            differ in one direction are the case in which withheld intervals would have missed most:
            coverage of those that remain may lie above 97 %."""
        ),
        "## One pair of runs\n",
        paragraph(
            """Examples are units, cells count equally. "exact" combines Clopper-Pearson bounds of wins
            and losses, "score" is Tango's interval; both know a single cell of right and wrong
            answers only."""
        ),
        table(pairs),
        "\n## Questions that come in several cells\n",
        paragraph(
            """NoLiMa asks each question at every depth and length. "examples (percentile)" counts them
            as independent, as `--resample cells` does; the other columns take a question as one unit."""
        ),
        table(asked),
        "\n## Several pairs of runs\n",
        paragraph(
            """Seeds change the effect of the treatment for all examples, examples change it for all
            seeds. The truth is over other seeds and other examples. "these seeds" is about other
            examples alone, so it misses this truth where seeds differ: that is why it has its name.
            "seeds, then examples" is `--resample cells`."""
        ),
        table(several),
        "\n## Tests of no difference\n",
        paragraph(
            """Share of experiments with p < 0.05, in %; without an effect it should be 5 or less.
            Exchanging the sides of examples holds for these seeds only: where seeds differ it finds
            differences that other seeds do not have. Exchanging whole pairs of runs cannot reach 0.05
            with fewer than six pairs. `p_value`, which Holm's correction uses, is the first with one
            pair of runs, and otherwise the larger of the second and of Student's t."""
        ),
        rates,
        "\n## How it was made\n",
        f"- command: `{command()}`\n- commit: {commit()}, {datetime.datetime.now(datetime.UTC).date()}\n"
        f"- seed {study.seed}, {study.experiments:,} experiments a scenario, {study.resamples} resamples\n",
    ]
    return "\n".join(section.rstrip("\n") + "\n" for section in sections)


TESTED = (
    right_or_wrong(20, 0.1, 0.1),
    right_or_wrong(200, 0.1, 0.1),
    right_or_wrong(200, 0.15, 0.08),
    questions(0.15),
)


def main() -> int:
    """Simulate, and write or print the page."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--experiments", type=whole_number, default=EXPERIMENTS, help="a scenario (%(default)s)"
    )
    parser.add_argument(
        "--resamples", type=whole_number, default=RESAMPLES, help="of bootstraps (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="page to write (default: print it)")
    arguments = parser.parse_args()
    text = page(
        Study(experiments=arguments.experiments, resamples=arguments.resamples, seed=arguments.seed)
    )
    if arguments.output is None:
        print(text)
    else:
        write_text(arguments.output, text)
    return 0


if __name__ == "__main__":
    run_tool(main)
