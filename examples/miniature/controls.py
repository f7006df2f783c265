"""The page `docs/controls.md`: is it the place of the weight, its mass, or the scale of the loss?

    python tools/run_experiment.py examples/experiments/miniature.toml
    python tools/run_experiment.py examples/experiments/miniature_evidence.toml
    python tools/run_experiment.py examples/experiments/miniature_evidence_near.toml
    python -m examples.miniature.controls --collect experiments/miniature experiments/miniature-evidence \\
        experiments/miniature-evidence-near --page docs
    python -m examples.miniature.controls --page docs        # from docs/miniature/controls.json alone

The numbers are those of the experiments' comparisons; the words follow the intervals, whatever came out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.miniature.experiment import FAR
from examples.miniature.results import DOUBT, direction, marked
from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.evaluation.power import components_of, pairs_needed, units_of_deltas
from megatron_exact.experiments.definition import ArmPart, read_experiment_file
from megatron_exact.experiments.experiment_plan import Planner
from megatron_exact.files import write_json, write_text
from megatron_exact.json_input import read_json_object
from megatron_exact.report.comparison_page import read_comparison
from megatron_exact.report.page import (
    Block,
    Bullets,
    CodeBlock,
    Heading,
    Page,
    Paragraph,
    Table,
    Text,
    markdown_page,
)
from megatron_exact.report.summary import read_ledger, read_losses

EXAMPLES = Path("examples/experiments")
MAIN, EVIDENCE, NEAR_EVIDENCE = "miniature", "miniature-evidence", "miniature-evidence-near"
RESULTS = Path("miniature") / "controls.json"
REFERENCE = "exact-1"
LOSSES = ("below the tail", "tail", "all")
MEASURES = {"margin": 2, "correct": 1}
"""Measure of the probe -> digits after the point."""
ABOUT = {
    "exact-0.15": "EXACT at the paper's alpha",
    "exact-1": "EXACT at alpha 1, an exaggeration",
    "constant-1": "every target alike: the scale of the loss",
    "random-1": "EXACT's weights at targets drawn at random",
    "position-1": "tail by the position in the row, not in the document",
    "uniform-1": "EXACT's tail, without the inverse frequency",
    "exact-1-gamma-1": "gamma 1 instead of 0.5",
    "exact-1-tau-256": "tau 256 instead of 128",
    "evidence-1": "EXACT's mass for the targets that gain from far context",
}
QUESTIONS = (
    ("Does EXACT at alpha 1 help?", "standard", REFERENCE),
    ("Does the paper's alpha?", "standard", "exact-0.15"),
    ("Is it the scale of the loss?", "standard", "constant-1"),
    ("The same, against EXACT:", REFERENCE, "constant-1"),
    ("Is it any weight of this mass?", REFERENCE, "random-1"),
    ("Is it the position in the row?", REFERENCE, "position-1"),
    ("Is it the inverse frequency?", REFERENCE, "uniform-1"),
    ("Does gamma matter?", REFERENCE, "exact-1-gamma-1"),
    ("Does tau?", REFERENCE, "exact-1-tau-256"),
)
"""What is asked, baseline and arm whose comparison answers it."""
EVIDENCE_QUESTIONS = (
    ("EXACT against standard:", "standard", REFERENCE),
    ("Evidence-aware against standard:", "standard", "evidence-1"),
    ("Evidence-aware against EXACT:", REFERENCE, "evidence-1"),
    ("Random same-mass against EXACT:", REFERENCE, "random-1"),
)
EVIDENCE_SECTIONS = (
    (
        EVIDENCE,
        "Evidence-aware exposure",
        "exact-evidence (ours, not the paper's) gives EXACT's mass of the tail only to targets whose loss "
        "the far context lowers, by scores of the standard arm of the same seed. A corpus of a third of "
        "the size, in which far targets need far evidence.",
    ),
    (
        NEAR_EVIDENCE,
        "The same where no evidence is far",
        "The counter-case of the miniature: long contexts that no answer needs. Standard's far recall is "
        "at chance here, so a far margin that does not move shows nothing. The losses do: few targets of "
        "the tail gain by their scores, and those by chance, so each bears a large part of the mass, which "
        "is fixed. Training warns of that.",
    ),
)
Results = dict[str, Any]


def collect(folder: Path) -> Results:
    """Take from a finished experiment what the page needs.

    Args:
        folder: what `run_experiment.py` wrote.

    Raises:
        ValueError: a step is missing, or the experiment has no probe over the page's distances.
    """
    ledger = read_ledger(folder / "ledger.json")
    experiment = read_experiment_file(ledger["experiment"])
    planner = Planner(experiment, folder)
    if any(step["state"] != "finished" for step in ledger["steps"].values()):
        raise ValueError(f"{folder}: not every step is finished: run run_experiment.py again")
    pairs: dict[str, Results] = {}
    for (base, arm), path in zip(planner.pairs, planner.comparisons, strict=True):
        comparison = read_comparison(path / "comparison.json")
        pairs.setdefault(base.name, {})[arm.name] = _far_measures(comparison, path)
    runs = [
        read_json_object(planner.run_folder(seed, arm) / "run.json", "train again")
        for arm in experiment.arms
        for seed in experiment.seeds
    ]
    triples = [
        (arm.name, *(str(planner.run_folder(seed, one)) for one in (planner.base, arm)))
        for arm in planner.others
        for seed in experiment.seeds
    ]
    losses = {
        one.arm: {label: one.difference(one.labels.index(label)) for label in LOSSES}
        for one in read_losses(triples)
    }
    size = len(experiment.seeds)
    return {
        "name": experiment.name,
        "file": Path(ledger["experiment"]).name,
        "seeds": list(experiment.seeds),
        "commits": sorted({str(run["git_commit"]) for run in runs}),
        "arms": [
            _arm_record(arm, runs[place * size : (place + 1) * size])
            for place, arm in enumerate(experiment.arms)
        ],
        "against": pairs,
        "losses": losses,
    }


def _far_measures(comparison: Results, path: Path) -> Results:
    for kind in comparison["probe"]["kinds"]:
        if tuple(kind["distances"]) == FAR:
            return {name: kind["measures"][name] for name in MEASURES}
    raise ValueError(f"{path} has no range of distances {FAR}: give it to [probe] of the experiment")


def _arm_record(arm: ArmPart, runs: Sequence[Results]) -> Results:
    weights = [run["weighting"]["mean_weight"] for run in runs]
    return {
        "name": arm.name,
        "rule": arm.rule,
        "parameters": arm.parameters,
        "mean_weight": sum(weights) / len(weights),
        "largest_weight": max(weight for run in runs for weight in run["weighting"]["weights"] or [1.0]),
    }


def controls_page(experiments: dict[str, Results]) -> Page:
    """Return the page of the experiments that were run, by their names.

    Raises:
        ValueError: the main one is missing.
    """
    if MAIN not in experiments:
        raise ValueError(f"there are no results of {MAIN}: give its folder to --collect")
    blocks: list[Block] = [
        *_introduction(experiments[MAIN]),
        *_questions(experiments[MAIN]),
        *_tables(experiments[MAIN]),
    ]
    for name, title, text in EVIDENCE_SECTIONS:
        if name in experiments:
            blocks += [
                Heading(text=title),
                Paragraph(text=text),
                *_answers(experiments[name], EVIDENCE_QUESTIONS),
            ]
            blocks += _tables(experiments[name])
    return Page(title="Place, mass or scale", blocks=[*blocks, *_remaking(experiments)])


def _introduction(results: Results) -> list[Block]:
    seeds = len(results["seeds"])
    return [
        Paragraph(
            text="EXACT multiplies the loss of some targets. That changes three things at once: where the "
            "weight lies, how much of it there is, and the size of the whole loss. This page takes them "
            "apart in the miniature (miniature.md describes model, language and probe): one file, "
            f"examples/experiments/{results['file']}, {seeds} seeds, arms that differ in the weights of "
            "their targets alone. Constant, random same-mass and packed position have exactly the mean "
            "weight of EXACT at the same alpha. From the first five seeds plan_power.py asked for nine to "
            "see the paper's alpha; no interval accounts for that look at the data."
        ),
        Paragraph(
            text=f"Far: {FAR[0]} to {FAR[1]} tokens between evidence and question. Margin: log p(right "
            "value) - log p(another value of the document), nats; right answers: points. A difference "
            "counts where the bootstrap's interval and Student's t over the seeds both exclude 0, as in "
            f'the miniature; others have a "{DOUBT}". No interval is corrected for the number of arms.'
        ),
    ]


def _questions(results: Results) -> list[Block]:
    return [Heading(text="The answers"), *_answers(results, QUESTIONS)]


def _answers(results: Results, questions: Sequence[tuple[str, str, str]]) -> list[Block]:
    """One line a question: the margin of an arm against another, and what its interval says."""
    items: list[Text] = []
    first, losses = results["arms"][0]["name"], results["losses"]
    for question, base, arm in questions:
        entry = results["against"].get(base, {}).get(arm)
        if entry is None:
            continue
        margin, correct = entry["margin"], entry["correct"]
        words = {1: "lies above", -1: "lies below", 0: "cannot be told apart from"}
        least = margin.get("detectable")
        power = "" if direction(margin) or not least else f"; {least:.2f} would have been seen"
        if power and abs(margin["delta"]) > least / 2:
            power += f", and {_seeds_needed(margin)} seeds would show this difference with 80 % power"
        items.append(
            f"{question} {arm} {words[direction(margin)]} {base} in the far margin: "
            f"{marked(margin)} nats{power}. Far right answers {marked(correct, 1)}."
            + (f" Validation loss {_millinats(losses[arm]['all'])} thousandths." if base == first else "")
        )
    return [Bullets(items=items)]


def _seeds_needed(measure: Results) -> int | None:
    pilot = components_of(units_of_deltas(measure["pair_deltas"]))
    return pairs_needed(pilot, abs(measure["delta"]))


def _tables(results: Results) -> list[Block]:
    blocks: list[Block] = []
    arms = {arm["name"]: arm for arm in results["arms"]}
    for base, against in results["against"].items():
        body: list[list[Text]] = [
            [
                name,
                ABOUT[name],
                f"{arms[name]['mean_weight']:.3f}",
                f"{arms[name]['largest_weight']:.2f}",
                *(marked(entry[measure], digits) for measure, digits in MEASURES.items()),
                ", ".join(f"{delta:+.2f}" for delta in entry["margin"]["pair_deltas"]),
            ]
            for name, entry in against.items()
        ]
        head = ["arm", "what it is", "mean weight", "largest", "far margin", "far right answers", "by seed"]
        caption = f"Differences from {base} [95 % interval]"
        blocks.append(Table(head=head, body=body, caption=caption, left_columns=2))
    body = [
        [name, *(_millinats(entry) for entry in losses.values())]
        for name, losses in results["losses"].items()
    ]
    caption = (
        "Unweighted validation loss minus that of the first arm [95 % interval, Student's t], thousandths "
        "of a nat a target"
    )
    blocks.append(Table(head=["arm", *LOSSES], body=body, caption=caption))
    return blocks


def _millinats(entry: Results) -> str:
    ends = entry["ci95"]
    is_seen = ends is not None and not ends[0] <= 0 <= ends[1]
    interval = "" if ends is None else f" [{ends[0]:+.1f}, {ends[1]:+.1f}]"
    return f"{entry['delta']:+.1f}{interval}" + ("" if is_seen else f" {DOUBT}")


def _remaking(experiments: dict[str, Results]) -> list[Block]:
    known = [experiments[name] for name in (MAIN, EVIDENCE, NEAR_EVIDENCE) if name in experiments]
    commands = [f"python tools/run_experiment.py examples/experiments/{one['file']}" for one in known]
    folders = " ".join(f"experiments/{one['name']}" for one in known)
    commands.append(f"python -m examples.miniature.controls --collect {folders} --page docs")
    commits = sorted({commit for one in known for commit in one["commits"]})
    return [
        Heading(text="How to make this page"),
        CodeBlock(text="\n".join(commands)),
        Paragraph(
            text=f"The runs are of commit {' and '.join(commits)}, on two CPU cores. "
            "python -m examples.miniature.controls --page docs writes the page again from its numbers, "
            "docs/miniature/controls.json. Another machine rounds sums in another order: numbers differ "
            "there by less than the intervals. What the miniature cannot show is said on its page; it "
            "holds here, too."
        ),
    ]


def main() -> None:
    """Collect results, write the page."""
    parser = ToolParser(
        prog="python -m examples.miniature.controls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--collect", nargs="+", type=Path, metavar="DIR", help="finished experiments")
    parser.add_argument(
        "--page", type=Path, required=True, metavar="DIR", help="where controls.md and miniature/ lie"
    )
    options = parser.parse_args()
    path = options.page / RESULTS
    if options.collect:
        found = [collect(folder) for folder in options.collect]
        write_json(path, {one["name"]: one for one in found})
    experiments = read_json_object(path, "collect the results again: --collect")
    write_text(options.page / "controls.md", markdown_page(controls_page(experiments)))
    print(options.page / "controls.md")


if __name__ == "__main__":
    run_tool(main)
