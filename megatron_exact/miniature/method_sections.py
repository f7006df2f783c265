"""Sections of `docs/miniature.md` about the set-up: what was run, on what, chosen how, showing what."""

from __future__ import annotations

from typing import Any

from megatron_exact.miniature.readings import DOUBT, arms_of, row_title, weighted_shares
from megatron_exact.miniature.settings import DISTANT, DOSES, FAR, PAPER_ALPHA, RATES_TRIED
from megatron_exact.report.page import Block, Bullets, Code, CodeBlock, Heading, Note, Paragraph, Table

Entry = dict[str, Any]
FAR_WORDS = f"{FAR[0]} to {FAR[1]} tokens"


def introduction(results: Entry) -> list[Block]:
    """What was run."""
    settings, training = results["settings"], results["settings"]["training"]
    base = {entry["distance"]: entry for entry in results["base"]}
    reach = ", ".join(f"{entry['correct']:.0f} at {distance}" for distance, entry in base.items())
    asked = results["designs"][DISTANT]["questions"]
    steps, batch = training["iterations"], training["rows_per_iteration"] * training["row_tokens"]
    return [
        Paragraph(
            text=(
                "A very small Llama that recalls facts over the distances of its short rows is continued "
                "on "
                "rows four times as long, in arms that differ in nothing but the weights of their tokens. "
                "The question is the paper's: does weight on targets with a long effective context teach "
                "the use of distant evidence sooner, and is it the effective context that does it? "
                "Everything ran through this project's own tools and training entry; this page is written "
                "by ",
                Code("tools/run_miniature.py"),
                " from its results.",
            )
        ),
        Bullets(
            items=[
                "Language: 82 words. A document states facts (k07 v21) in its first quarter and asks for "
                "each once behind it (ask k07 v21); the rest is filler that carries no information. "
                "Lengths "
                f"are lognormal with median 72 words and spread 1.05, cut at {training['row_tokens'] - 1}, "
                f"so questions whose answer is far away are rare: {asked['far_share']:.1%} of the "
                f"{asked['number']:,} questions of all seeds are about facts {asked['far_from']} or more "
                "tokens back.",
                (
                    "Base model: ",
                    Code("examples/miniature/base"),
                    ", never trained on rows of more than 128 "
                    f"tokens. Right answers (%) by distance in tokens: {reach}.",
                ),
                f"Arms: {steps} steps of {batch:,} tokens in rows of {training['row_tokens']}, from the "
                f"same "
                f"checkpoint, peak learning rate {training['learning_rate']:g}; gamma 0.5 and tau "
                f"{results['designs'][DISTANT]['exposure']['tau']}, a quarter of the row, as in the paper. "
                f"Alpha {PAPER_ALPHA} is the paper's; alpha 1 and 4 are exaggerations.",
                f"Seeds: {settings['seeds']}. A seed draws the documents, what is held out and the order "
                f"of "
                "rows; all arms of a seed share all of it.",
                f"Probe: {settings['items_per_distance']} questions at each distance, the same for all "
                "models. Margin: log p(right value) - log p(another value of the document). Right: the "
                "right value beats the other 31; by chance 3 %, and 12 to 13 % far away for a model that "
                "knows which eight values a document states but not which of them is asked for. Effect: "
                "margin minus the margin where another fact stands in the place of the evidence.",
                f"Primary measure, fixed before the runs: the margin over the distances {FAR_WORDS}.",
                "Intervals are 95 %. Of probes: bootstrap over seeds, then items, both sides in pairs. Of "
                "losses and where it is said: Student's t over the seeds. A bootstrap over so few seeds is "
                "too narrow, so an arm is called above or below only where both leave out 0; other "
                f'differences have a "{DOUBT}" behind them in tables, and figures of the probe draw the '
                "wider of both on either side. None is corrected for the number of arms.",
            ]
        ),
    ]


def exposure(results: Entry) -> list[Block]:
    """Shares by bucket before and after weighting."""
    table, training = results["designs"][DISTANT]["exposure"], results["settings"]["training"]
    read = training["iterations"] * training["rows_per_iteration"] * training["row_tokens"]
    arms = arms_of(results, DISTANT)
    names = [name for name in [arm.name for arm in DOSES] if arms[name]["weights"]]
    shares = [weighted_shares(table["share"], arms[name]["weights"]) for name in names]
    body = [
        [label, f"{table['share'][row]:.1%}", *(f"{column[row]:.1%}" for column in shares)]
        for row, label in enumerate(table["labels"])
    ]
    tail = [lower >= table["tau"] for lower in table["lower"]]
    total = [
        sum(share for share, inside in zip(column, tail, strict=True) if inside)
        for column in (table["share"], *shares)
    ]
    body.append(["tail", *(f"{share:.1%}" for share in total)])
    return [
        Heading(text="Exposure"),
        Paragraph(
            text=f"Supervised targets of the training rows by effective left context "
            f"({table['targets']:,} a seed on average), and their share after weighting. An arm reads "
            f"{read:,} tokens of these rows, about {read / table['targets']:.0%}. Weights and shares are "
            "computed on all of them, so random same-mass has exactly EXACT's mass over all rows, and over "
            "those that are read nearly."
        ),
        Table(
            head=["effective context", "standard", *(row_title(arms[name]) for name in names)], body=body
        ),
    ]


def limits(results: Entry) -> list[Block]:
    """How it was chosen, and what it cannot show."""
    size = results["settings"]["model"]
    rates = ", ".join(f"{rate:g}" for rate in RATES_TRIED)
    return [
        Heading(text="What was chosen how"),
        Paragraph(
            text=(
                "The base model was trained until it recalled over its own rows. Number of steps and "
                "learning rate of the arms were chosen on standard training alone, on the first seed, "
                "before any weighted run was looked at: so few steps that far recall is unfinished and "
                "that all arms fit into less than an hour, and of the rates "
                f"{rates} the one with the lowest validation loss (",
                Code(
                    "tools/run_miniature.py --output tried/RATE --seeds 1 --arms standard "
                    "--designs distant --learning-rate RATE"
                ),
                " leaves it in tried/RATE/results.json as ",
                Code("baseline_losses"),
                "). Distances, ranges, seeds and arms were fixed then, too. Nothing was tuned on a "
                "weighted arm, and no run was left out. One rule is younger: that Student's t must agree "
                "with the bootstrap came in while the runs were going on. It can only take differences "
                "away, from EXACT as from all.",
            )
        ),
        Paragraph(
            text="The design itself is no random draw. Corpus, model, initialisation, probe and alphas "
            "follow an exploratory experiment outside this project in which weighted arms had been run and "
            "EXACT had gained, so a gain was expected here. Code, documents, seeds and schedule are new. "
            "The RoPE base of 500 is part of that design: with the usual 10,000 such a base model recalls "
            "at four times its rows without further training and leaves little to gain."
        ),
        Heading(text="What this cannot show"),
        Bullets(
            items=[
                f"{size['num_layers']} layers of width {size['hidden_size']} and a language whose only "
                "structure is recall. The paper's models are thousands of times larger and read text; "
                "nothing here says how large an effect is there.",
                "In the main design a tail target that needs evidence mostly needs distant evidence, by "
                "construction; in the counter-case none does. Text is a mixture of both, in unknown parts.",
                "Where standard itself is at chance (see the counter-case), the probe tells nothing of "
                "weights: neither that they are harmless nor that they are useless.",
                "Alphas of 1 and 4 are not the paper's. Where only they move the probe, the paper's alpha "
                "does too little to be seen with these seeds, which is not the same as nothing.",
                "Far recall is unfinished. An arm that learns it sooner need not end higher.",
                "Questions are of one kind, and the same for all seeds. The margin is a finer measure than "
                "right answers; a gain in margin need not be a gain in answers.",
                "The other answer of the margin is a value that the prompt has asked for before, and no "
                "fact is asked for twice. So part of a margin may be knowing what is left, not which "
                "value belongs to the key.",
                "Few seeds: intervals over seeds rest on as many values as there are seeds. All seeds "
                "start from one base model, so no interval holds what another base model would give.",
            ]
        ),
    ]


def reproduction(results: Entry) -> list[Block]:
    """Machine, commit, command."""
    machine, seconds = results["machine"], results["seconds"]
    versions = ", ".join(f"{name} {value}" for name, value in sorted(results["versions"].items()) if value)
    return [
        Heading(text="How to make this page"),
        CodeBlock(text="make reproduce"),
        Paragraph(
            text=(
                "which is ",
                Code("python tools/run_miniature.py --output .cache/miniature --page docs"),
                f". The runs are of commit {results['git_commit']}. What is computed from them and told "
                "here may be of a later one: ",
                Code("--page-from docs/miniature/results.json"),
                " writes the page from the results without running anything. Machine: "
                f"{machine['cores']} cores of {machine['cpu']}, {machine['system']}. Versions: "
                f"{versions}. {seconds['number']} runs took {seconds['seconds'] / 60:.0f} minutes of wall "
                "time in all, those side by side counted each.",
            )
        ),
        Note(
            text="Another machine rounds sums in another order: numbers differ there by less than the "
            "intervals, and the words of this page follow the numbers."
        ),
    ]
