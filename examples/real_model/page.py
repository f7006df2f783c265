"""The page of `make demo-real`, from the result files of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_exact.json_input import read_json_object
from megatron_exact.report.compared import Compared, interval_text, signed
from megatron_exact.report.experiment import (
    comparison_blocks,
    field_blocks,
    licence_blocks,
    probe_blocks,
    read_experiment,
)
from megatron_exact.report.exposure_figure import PackExposure, exposure_blocks
from megatron_exact.report.page import (
    Block,
    Bullets,
    Code,
    CodeBlock,
    Details,
    Figure,
    Heading,
    Note,
    Page,
    Paragraph,
    Table,
    Text,
    write_page,
)
from megatron_exact.report.results import (
    BucketComparison,
    RunResults,
    compare_buckets,
    compare_group,
    plot_comparisons,
    read_run,
    require_paired,
)

LABEL = "SmolLM2-135M-Instruct"
TITLE = "A trained model on real documents: standard training and EXACT"
STANDARD, EXACT = "standard", "EXACT"
BUCKETS = "loss-by-bucket.png"


@dataclass(frozen=True, kw_only=True)
class DemoResults:
    """What the steps have left."""

    corpus: str
    """The documents, in words."""
    packs: Sequence[Path]
    """The pack of training first, then packs that were only measured."""
    runs: dict[str, Path]
    """Run folders of the arms `standard` and `exact`."""
    texts: Path
    """From `continue_texts`."""
    comparison: Path
    """Folder of compare_runs.py."""
    seconds: Sequence[tuple[str, float]]
    """Step and its wall time."""
    commands: Sequence[str]
    """The commands, in order."""


def write_demo_page(folder: Path, results: DemoResults) -> tuple[Path, Path]:
    """Write `report.md`, `report.html` and the figures.

    Returns:
        Paths of the Markdown and of the HTML file.

    Raises:
        ValueError: a result is damaged, or the runs are not a pair.
    """
    files = read_experiment([f"{LABEL}={results.comparison}"], [str(pack) for pack in results.packs], [])
    (compared,), packs = files.comparisons, files.packs
    standard, exact = (read_run(results.runs[arm]) for arm in ("standard", "exact"))
    require_paired(standard.losses, exact.losses, "losses")
    steps, row_tokens = len(standard.losses), packs[0].row_tokens
    blocks: list[Block] = [
        Paragraph(
            text=f"{LABEL} (135 million parameters, dequantized from four bits) was continued for {steps} "
            f"steps of one row of {row_tokens:,} tokens, twice from the same weights: once with all token "
            f"weights 1 ({STANDARD}), once with {EXACT} weights. Everything else is the same: rows, order, "
            f"seed and schedule. The text: {results.corpus}."
        ),
        Note(
            text=f"{steps * row_tokens:,} tokens an arm are very few, and one seed is one draw. This page "
            "shows that the chain works on a trained model and what its tools measure. It cannot show "
            "whether EXACT helps: see the experiment over five seeds in docs/miniature.md, and the paper."
        ),
        *exposure_blocks(folder, packs),
        *loss_blocks(folder, standard, exact, packs[0]),
        *text_blocks(results.texts),
        *field_blocks(folder, [compared]),
        *probe_blocks(folder, [compared]),
        *ruler_blocks(compared),
        *limit_blocks(compared, steps),
        *comparison_blocks([compared]),
        *licence_blocks([compared], packs),
        Heading(text="Times and commands"),
        Table(
            head=["step", "seconds"],
            body=[[name, f"{seconds:.0f}"] for name, seconds in results.seconds],
            caption="Wall time of each step",
        ),
        Details(summary="The commands, in order", blocks=[CodeBlock(text="\n".join(results.commands))]),
    ]
    return write_page(folder, Page(title=TITLE, blocks=blocks))


def loss_blocks(folder: Path, standard: RunResults, exact: RunResults, pack: PackExposure) -> list[Block]:
    """Return the section about the validation loss; its figure is written into `folder`."""
    lowers = np.array([bucket["lower"] for bucket in pack.table])
    in_tail = lowers >= pack.tau
    last = standard.final_evaluation, exact.final_evaluation
    rows = compare_buckets(*last, lowers, pack.row_tokens)
    plot_comparisons(
        folder / BUCKETS,
        rows,
        first_tail_bucket=int(np.argmax(in_tail)),
        baseline_name=STANDARD,
        treatment_name=EXACT,
    )
    groups = [
        compare_group("below the tail", *last, ~in_tail),
        compare_group("tail", *last, in_tail),
        compare_group("all", *last, np.ones_like(in_tail)),
    ]
    first = standard.losses[0].loss, exact.losses[0].loss
    same = "the same number in both arms" if first[0] == first[1] else f"{first[1]:.6f} in the other arm"
    return [
        Heading(text="Validation loss by effective context"),
        Paragraph(
            text=f"Unweighted mean loss in nats a target after {last[0].iteration} steps, on "
            f"{last[0].targets:,} targets of documents that neither arm was trained on. Before the first "
            f"step the first row has a loss of {first[0]:.6f}, {same}, since both start from one "
            f"checkpoint. Negative differences are targets that {EXACT} predicts better. There is no "
            "interval: evaluations store sums by bucket."
        ),
        Figure(
            file=BUCKETS,
            alt="Validation loss of both arms by bucket, and their difference; numbers in the table.",
            caption="The loss falls with the context that a target sees: the trained model uses it.",
        )
        if rows[-1].baseline < rows[0].baseline
        else Figure(file=BUCKETS, alt="Validation loss of both arms by bucket, and their difference."),
        Table(
            head=["effective context", "targets", STANDARD, EXACT, "difference"],
            body=[_loss_row(row) for row in (*rows, *groups)],
            caption="Validation loss, nats a target",
        ),
    ]


def _loss_row(row: BucketComparison) -> list[Text]:
    if not row.targets:
        return [row.label, "0", "-", "-", "-"]
    numbers = f"{row.baseline:.4f}", f"{row.treatment:.4f}", f"{row.difference:+.5f}"
    return [row.label, f"{row.targets:,}", *numbers]


def text_blocks(path: Path) -> list[Block]:
    """Return the section with what each model writes."""
    content = read_json_object(path, "run the demo again")
    names = {"before": "before training", "standard": STANDARD, "exact": EXACT}
    blocks: list[Block] = [
        Heading(text="Text of both models"),
        Paragraph(
            text="Each model continues the same beginnings, always with its most likely token. After so "
            "few steps the arms write nearly the same words."
        ),
    ]
    for place, prompt in enumerate(content["prompts"]):
        body: list[list[Text]] = [
            [names[name], texts[place]] for name, texts in content["continuations"].items()
        ]
        blocks.append(
            Table(head=["model", "continuation"], body=body, caption=f"{prompt} ...", left_columns=2)
        )
    return blocks


def ruler_blocks(compared: Compared) -> list[Block]:
    """Return the cells of RULER with the intervals of their differences."""
    body: list[list[Text]] = [
        [
            str(cell["task"]),
            f"{cell['length']:,}",
            f"{cell['examples']:,}",
            f"{cell['baseline']:.1f}",
            f"{cell['treatment']:.1f}",
            signed(cell["delta"], 1),
            interval_text(cell, 1),
        ]
        for cell in compared.content.get("cells") or []
    ]
    head = ["task", "window", "examples", STANDARD, EXACT, "difference", "95 % interval"]
    return [
        Heading(text="A few cells of RULER"),
        Paragraph(
            text=(
                "Points, 0 to 100, of two of RULER's eleven tasks in the model's own chat template: ",
                Code("niah_single_1"),
                " asks for a number hidden in repeated sentences, ",
                Code("vt"),
                " for all variables that a chain of assignments gives one value. A dash instead of an "
                "interval names the reason: with so few examples, and none or few of them answered "
                "differently, the data do not say how uncertain a difference is.",
            )
        ),
        Table(head=head, body=body, caption="RULER, by cell"),
    ]


def limit_blocks(compared: Compared, steps: int) -> list[Block]:
    """Return what the page shows and what it does not, with the numbers that say so."""
    kinds = (compared.probe or {}).get("kinds") or []
    effects = [
        f"{entry['kind']} {signed(effect['baseline'], 2)} nats, difference of the arms "
        f"{signed(effect['delta'], 3)} {interval_text(effect, 3)}"
        for entry in kinds
        for effect in [entry["measures"]["effect"]]
    ]
    return [
        Heading(text="What this shows, and what it does not"),
        Bullets(
            items=[
                "It shows a trained model imported, trained, exported and evaluated by the commands of a "
                "real experiment, with the pairing of the arms verified.",
                f"Evidence changes what the model answers. Effect in the {STANDARD} arm, all distances: "
                + "; ".join(effects)
                + ".",
                f"It does not show an effect of EXACT. {steps} steps at a small learning rate hardly move "
                "the weights, and a difference whose interval excludes 0 would be about these two models, "
                "not about other seeds.",
                "The model was tuned to follow instructions before it was continued on plain text here. It "
                "reads the evidence probe without its chat template.",
                "The documents are few and alike. The exposure of a web corpus is another one.",
            ]
        ),
    ]
