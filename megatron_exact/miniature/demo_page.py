"""The report of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_exact.miniature.experiment import FinishedBase, FinishedTrial, corpus_commands, read_commands
from megatron_exact.miniature.readings import arms_of, far, nearby, row_title, signed
from megatron_exact.miniature.settings import DISTANT, EXAGGERATED_ALPHA, FAR, NEARBY, PAPER_ALPHA
from megatron_exact.report.page import (
    Block,
    Bullets,
    CodeBlock,
    Figure,
    Heading,
    Note,
    Page,
    Paragraph,
    Table,
)

Entry = dict[str, Any]


def demo_page(
    results: Entry,
    exposure: Entry,
    finished: Sequence[FinishedTrial],
    begun: FinishedBase,
    *,
    is_quick: bool,
) -> Page:
    """The page from `results.json`, the exposure table and the commands of the runs."""
    arms = list(arms_of(results, DISTANT).values())
    quick = [Note(text="This is the quick demo: a few steps, a smoke test. Its numbers mean nothing.")]
    blocks: list[Block] = [
        *(quick if is_quick else []),
        *_introduction(results, is_quick=is_quick),
        *_exposure(exposure),
        *_probe(arms),
        *_losses(arms, results["designs"][DISTANT]["exposure"]["labels"]),
        *_limits(),
        *_facts(results, finished, begun),
    ]
    return Page(
        title="Standard continued pretraining against EXACT, one seed of the miniature", blocks=blocks
    )


def _introduction(results: Entry, *, is_quick: bool) -> list[Block]:
    paper = "" if is_quick else f"EXACT weights at the paper's alpha of {PAPER_ALPHA}, and with "
    training = results["settings"]["training"]
    batch = training["rows_per_iteration"] * training["row_tokens"]
    base = ", ".join(f"{entry['correct']:.0f} at {entry['distance']}" for entry in results["base"])
    return [
        Paragraph(
            text="A very small Llama, shipped with the project, recalls facts of a made-up language over "
            "the short rows that it was trained on. It is continued on rows of "
            f"{training['row_tokens']} tokens, {training['iterations']} steps of {batch:,} tokens, in each "
            "arm from the same checkpoint on the same rows: with all token weights 1 (standard), with "
            f"{paper}EXACT weights at an exaggerated alpha of {EXAGGERATED_ALPHA:g}, which no paper uses "
            "and which makes visible what the weights do."
        ),
        Paragraph(
            text=f"Right answers (%) of the base model by distance of the evidence in tokens: {base}."
        ),
    ]


def _exposure(exposure: Entry) -> list[Block]:
    tail = exposure["tail"]
    body = [
        [
            f"from {bucket['lower']}",
            f"{bucket['targets']:,}",
            f"{bucket['share']:.1%}",
            f"{bucket['weight']:.3f}",
            f"{bucket['weighted_share']:.1%}",
        ]
        for bucket in exposure["buckets"]
    ]
    return [
        Heading(text="Exposure: which contexts the training targets have"),
        Paragraph(
            text="Supervised targets of the packed training rows by effective left context (tokens of "
            "their own document that are visible), at the paper's alpha. The tail begins at "
            f"{tail['tau']:g} tokens."
        ),
        Figure(file="exposure.png", alt="share of targets by effective context before and after weighting"),
        Table(head=["effective context", "targets", "share", "weight", "share after weighting"], body=body),
    ]


def _probe(arms: Sequence[Entry]) -> list[Block]:
    body = [
        [
            row_title(arm),
            signed(nearby(arm)["margin"]),
            signed(far(arm)["margin"]),
            signed(far(arm)["correct"], 1),
        ]
        for arm in arms
    ]
    standard = far(arms[0])
    return [
        Heading(text="Recall by distance of the evidence"),
        Paragraph(
            text="Questions with the evidence at a known distance. Margin: log p(right value) - log p("
            f"another value of the document), in nats. Near: {NEARBY[0]} to {NEARBY[1]} tokens, far: "
            f"{FAR[0]} to {FAR[1]}. Standard has a far margin of {standard['margin']['baseline']:.2f} and "
            f"{standard['correct']['baseline']:.1f} % right answers far away."
        ),
        Figure(file="margin.png", alt="margin by distance of all arms, and differences from standard"),
        Figure(file="accuracy.png", alt="right answers by distance of all arms, and differences"),
        Table(
            head=["arm", "near margin", "far margin", "far right answers"],
            body=body,
            caption="difference from standard [95 % interval over the questions, not over seeds]",
        ),
    ]


def _losses(arms: Sequence[Entry], labels: Sequence[str]) -> list[Block]:
    body = [
        [
            label,
            f"{arms[0]['losses']['buckets'][row]['baseline']:.4f}",
            *(f"{arm['losses']['buckets'][row]['delta']:+.4f}" for arm in arms),
        ]
        for row, label in enumerate(labels)
    ]
    for part in ("below", "tail", "all"):
        name = "below the tail" if part == "below" else part
        losses = [arm["losses"][part] for arm in arms]
        body.append([name, f"{losses[0]['baseline']:.4f}", *(f"{loss['delta']:+.4f}" for loss in losses)])
    return [
        Heading(text="Validation loss by effective context"),
        Paragraph(
            text="Unweighted, on documents that no arm was trained on, in nats a target: standard, and the "
            "other arms minus standard. All arms are scored on the same targets."
        ),
        Figure(file="losses.png", alt="validation loss minus standard by bucket of effective context"),
        Table(head=["effective context", "standard", *(row_title(arm) for arm in arms)], body=body),
    ]


def _limits() -> list[Block]:
    return [
        Heading(text="What this shows, and what it does not"),
        Bullets(
            items=[
                "It shows that the chain works: text became rows with a known exposure, one checkpoint was "
                "continued in arms that agree in pack, seed, schedule and layout, exported and probed.",
                "It is one seed. Another seed gives other differences; docs/miniature.md has several, the "
                "controls, and a corpus in which long contexts need no distant evidence.",
                "It says nothing about the size of an effect in a model of useful size, on text.",
            ]
        ),
    ]


def _facts(results: Entry, finished: Sequence[FinishedTrial], begun: FinishedBase) -> list[Block]:
    pairs = {str(arm["probe"]["pairing"]["statement"]) for arm in results["designs"][DISTANT]["arms"]}
    machine = results["machine"]
    commands = [
        *read_commands(begun.step.folder),
        *corpus_commands(finished[0]),
        *(line for done in finished for line in done.commands),
    ]
    return [
        Heading(text="Facts"),
        Bullets(
            items=[
                f"Pairing: {'; '.join(sorted(pairs))}",
                f"Machine: {machine['cores']} cores of {machine['cpu']}; commit {results['git_commit']}",
                *(
                    f"{done.trial.arm.title}: {done.seconds:.0f} s with export and probe"
                    for done in finished
                ),
            ]
        ),
        Heading(text="Commands"),
        Paragraph(
            text="Documents (corpus.jsonl) and questions (items.jsonl) are drawn by the demo itself, as "
            "tools/write_miniature_corpus.py draws them."
        ),
        CodeBlock(text="\n".join(commands)),
    ]
