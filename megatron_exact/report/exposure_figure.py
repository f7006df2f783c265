"""Figure 1 of EXACT (arXiv 2605.10544): exposure of rows by bucket, before and after weighting.

"After weighting" means the share of the training signal: targets times weight over its sum. The weights of
a pack are those with which the treatment of a comparison was trained on it, where a record says so;
otherwise EXACT's with the paper's parameters. The caption names which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_exact.exposure import (
    DEFAULT_ALPHA,
    DEFAULT_GAMMA,
    MASS_SCALE,
    Weighting,
    build_weighting,
    default_tau,
)
from megatron_exact.exposure.weights import EmptyTailError
from megatron_exact.json_input import read_json_object
from megatron_exact.report.compared import RULE_NAMES, Compared, training_of
from megatron_exact.report.figures import BARS, figure_text, name_ticks, new_figure, save_figure
from megatron_exact.report.page import (
    Block,
    Details,
    Figure,
    Heading,
    Note,
    Paragraph,
    Table,
    Text,
    markdown_table,
    plain_table,
)
from megatron_exact.report.paper_numbers import SOURCE, TAIL_SHARES_16K
from megatron_exact.report.results import bucket_labels

MANIFEST = "manifest.json"
SHOWN_RULES = ("exact", "exact-normalized", "uniform-tail")
"""Rules whose weights depend on the effective context alone, so that figure 1 can show them."""
PARAMETERS = ("alpha", "gamma", "tau", "cap")
HAND_MADE = re.compile(r"weight_from_(\d{1,18})")
"""How a training record names a bucket weight that was set by hand."""
HEAD = ("effective context", "targets", "share", "weight", "share after")
ExposureRow = dict[str, Any]


def exposure_table(lower_bounds: ArrayLike, counts: ArrayLike, weights: ArrayLike) -> list[ExposureRow]:
    """Return one row for each bucket.

    Args:
        lower_bounds: integers [buckets], tokens.
        counts: integers [buckets], supervised targets.
        weights: floats [buckets], weight of a target.

    Returns:
        {`lower`, `targets`, `share`, `weight`, `weighted_share`}; both shares sum to 1 (0 without targets).
    """
    targets = np.asarray(counts, dtype=np.float64)
    mass = targets * np.asarray(weights, dtype=np.float64)
    shares = targets / max(targets.sum(), 1)
    weighted_shares = mass / mass.sum() if mass.sum() > 0 else mass
    columns = (np.asarray(lower_bounds), np.asarray(counts), shares, np.asarray(weights), weighted_shares)
    return [
        {
            "lower": int(lower),
            "targets": int(count),
            "share": float(share),
            "weight": float(weight),
            "weighted_share": float(weighted_share),
        }
        for lower, count, share, weight, weighted_share in zip(*columns, strict=True)
    ]


def weigh_for_display(
    counts: ArrayLike, lower_bounds: ArrayLike, row_tokens: int, *, alpha: float, gamma: float, tau: float
) -> tuple[Weighting, str | None]:
    """Return EXACT's weights, and a note where its tail is empty, which is an error in training.

    Args:
        counts: integers [buckets], targets of the train split.
        lower_bounds: integers [buckets], tokens.
        row_tokens: inputs of a row.
        alpha, gamma, tau: see `exposure.exact_weights`.

    Raises:
        ValueError: parameters that are not valid for any pack.
    """
    place = (counts, lower_bounds, row_tokens)
    try:
        return build_weighting("exact", *place, alpha=alpha, gamma=gamma, tau=tau), None
    except EmptyTailError as error:
        parameters = {"alpha": alpha, "gamma": gamma, "tau": float(tau)}
        weighting = replace(build_weighting("none", *place), rule="exact", parameters=parameters)
        return weighting, f"note: every weight is shown as 1, EXACT is an error here in training: {error}"


def tail_summary(table: Sequence[Mapping[str, Any]], tau: float) -> dict[str, Any]:
    """Return the buckets from `tau` tokens upwards together.

    Returns:
        {`tau`, `lower_bounds`, `targets`, `share`, `weighted_share`, `mean_extra_weight`}; the last is
        the mean of weight - 1 over the tail's targets, alpha under EXACT, 0 without targets.
    """
    tail = [row for row in table if row["lower"] >= tau]
    targets = sum(row["targets"] for row in tail)
    extra = sum(row["targets"] * (row["weight"] - 1) for row in tail)
    return {
        "tau": tau,
        "lower_bounds": [row["lower"] for row in tail],
        "targets": targets,
        "share": sum(row["share"] for row in tail),
        "weighted_share": sum(row["weighted_share"] for row in tail),
        "mean_extra_weight": extra / targets if targets else 0.0,
    }


def format_exposure_table(
    table: Sequence[Mapping[str, Any]], *, row_tokens: int, tau: float, markdown: bool = False
) -> str:
    """Return the table and a sentence about the tail, aligned for a terminal or as Markdown.

    Args:
        table: from `exposure_table`.
        row_tokens: inputs of a row.
        tau: tokens from which a bucket belongs to the tail; such rows are marked `*`.
        markdown: a Markdown table instead of plain columns.
    """
    labels = bucket_labels([row["lower"] for row in table], row_tokens)
    body = [
        [
            label + (" *" if row["lower"] >= tau else ""),
            f"{row['targets']:,}",
            f"{row['share']:.2%}",
            f"{row['weight']:.4f}",
            f"{row['weighted_share']:.2%}",
        ]
        for label, row in zip(labels, table, strict=True)
    ]
    tail = tail_summary(table, tau)
    sentence = (
        f"* tail, from tau = {tau:,g} tokens: {tail['share']:.2%} of {sum(r['targets'] for r in table):,} "
        f"targets, {tail['weighted_share']:.2%} of the signal after weighting "
        f"(mean extra weight {tail['mean_extra_weight']:.4f})"
    )
    if markdown:
        return markdown_table(HEAD, body) + "\n" + sentence.replace("*", "\\*", 1) + "\n"
    return "\n".join([*plain_table(HEAD, body), "", sentence]) + "\n"


def plot_exposure(
    path: str | Path, table: Sequence[Mapping[str, Any]], *, row_tokens: int, tau: float, title: str = ""
) -> None:
    """Draw share of targets and of training signal by bucket as a PNG, the tail shaded.

    Args:
        path: file to write.
        table: from `exposure_table`.
        row_tokens: inputs of a row.
        tau: tokens from which a bucket belongs to the tail.
        title: title above the figure.
    """
    figure, axes = new_figure(rows=1, heights=[1])
    axis = axes[0]
    places = np.arange(len(table))
    before = np.array([row["share"] for row in table]) * 100
    after = np.array([row["weighted_share"] for row in table]) * 100
    tail = tail_summary(table, tau)
    first = len(table) - len(tail["lower_bounds"])
    if tail["lower_bounds"]:
        axis.axvspan(first - 0.5, len(table) - 0.5, color="0.92", zorder=0)
        axis.text(
            len(table) - 0.55,
            1.01,
            f"tail, from {tau:,g} tokens: {tail['share']:.1%} of targets, "
            f"{tail['weighted_share']:.1%} after weighting",
            transform=axis.get_xaxis_transform(),
            ha="right",
            va="bottom",
            fontsize="small",
        )
    axis.bar(places - 0.2, before, 0.4, label="targets", **BARS[0])
    axis.bar(places + 0.2, after, 0.4, label="after weighting", **BARS[1])
    name_ticks(axis, list(places), bucket_labels([row["lower"] for row in table], row_tokens))
    axis.set_xlim(-0.6, len(table) - 0.4)
    axis.set_xlabel("effective left context of the target (tokens)")
    axis.set_ylabel("share (%)")
    axis.set_title(title, loc="left", pad=18)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


@dataclass(frozen=True, kw_only=True)
class PackExposure:
    """What one pack trains on."""

    name: str
    """Name of the pack's folder or of the file."""
    row_tokens: int
    """Inputs of a row."""
    tau: float
    """Tokens from which a bucket belongs to the tail."""
    table: list[ExposureRow]
    """From `exposure_table`."""
    weights: str
    """Where the weights come from, with their parameters, in words."""
    fingerprint: str | None = None
    """Fingerprint of the pack; None where the file does not contain it."""
    remark: str | None = None
    """What is special about its weights."""
    sources: tuple[tuple[str, str | None], ...] = ()
    """(name, licence) of its corpora; empty where the file does not name them."""


def read_pack(folder: str | Path) -> PackExposure:
    """Exposure of a pack's train split under EXACT with the paper's parameters, from its manifest alone.

    Raises:
        ValueError: a missing or damaged manifest.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: give a folder that megatron-exact pack has written")
    manifest = read_json_object(path, "pack the corpus again")
    try:
        row_tokens = int(manifest["row_tokens"])
        exposure = manifest["splits"]["train"]["exposure"]
        lower, counts = [[int(value) for value in exposure[key]] for key in ("lower", "counts")]
        sources = tuple(
            (re.split(r"[/\\]", source["prefix"])[-1], source.get("licence"))
            for source in manifest["sources"]
        )
        tau = default_tau(row_tokens)
        weighting, remark = weigh_for_display(
            counts, lower, row_tokens, alpha=DEFAULT_ALPHA, gamma=DEFAULT_GAMMA, tau=tau
        )
        table = exposure_table(lower, counts, weighting.bucket_weights)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} is not the manifest of a pack ({error}): pack the corpus again"
        ) from error
    used = {"alpha": DEFAULT_ALPHA, "gamma": DEFAULT_GAMMA, "tau": float(tau)}
    return PackExposure(
        name=Path(folder).resolve().name,
        row_tokens=row_tokens,
        tau=tau,
        table=table,
        weights=f"EXACT with {_in_words(used)}, the paper's; no training on this pack was given",
        fingerprint=manifest.get("fingerprint"),
        remark=remark,
        sources=sources,
    )


def as_trained(pack: PackExposure, comparisons: Sequence[Compared]) -> list[PackExposure]:
    """The exposure of a pack under the weights that treatments were trained with on it.

    A training belongs to the pack if its rows have the same length and, where it is the last training of
    its model, so that the comparison names its pack, the same fingerprint.

    Returns:
        One entry for each different set of weights, in the order of the comparisons; the pack as it was
        read where no record fits.

    Raises:
        ValueError: a record with parameters that cannot be applied to the pack.
    """
    lower = [row["lower"] for row in pack.table]
    counts = [row["targets"] for row in pack.table]
    found: dict[tuple[Any, ...], PackExposure] = {}
    for compared in comparisons:
        for run in compared.content["runs"]:
            for rule, recorded in _weightings(pack, run["treatment"]):
                try:
                    parameters = _parameters(recorded)
                    key = (rule, *sorted(parameters.items()))
                    if key in found:
                        continue
                    weighting = build_weighting(rule, counts, lower, pack.row_tokens, **parameters)
                except (ValueError, TypeError, OverflowError) as error:
                    raise ValueError(
                        f"the comparison of {compared.label} records weights that do not fit the pack "
                        f"{pack.name} ({error}): run megatron-exact compare again, or give another --pack"
                    ) from error
                words = f"{RULE_NAMES[rule]} with {_in_words(weighting.parameters)}"
                found[key] = replace(
                    pack,
                    tau=weighting.parameters["tau"],
                    table=exposure_table(lower, counts, weighting.bucket_weights),
                    weights=f"{words}, as in the training record of {compared.label}",
                    remark=None,
                )
    return list(found.values()) or [pack]


def _weightings(pack: PackExposure, run: dict[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return rule and recorded parameters of the weighted trainings of one model on the pack."""
    stages = training_of(run)
    return [
        (stage["rule"], stage.get("parameters") or {})
        for number, stage in enumerate(stages, 1)
        if stage["rule"] in SHOWN_RULES
        and stage.get("row_tokens") == pack.row_tokens
        and (number < len(stages) or run.get("fingerprint") in (None, pack.fingerprint))
    ]


def _parameters(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `build_weighting` for a record's parameters.

    Raises:
        ValueError: a value that is not a finite number, or a name that is not a parameter of such a rule.
    """
    found: dict[str, Any] = {}
    by_hand = []
    for name, value in recorded.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, not a finite number")
        if name == MASS_SCALE:
            found["match_mass"] = "exact"  # the only mass that there is to match
        elif bucket := HAND_MADE.fullmatch(name):
            by_hand.append((int(bucket[1]), float(value)))
        elif name in PARAMETERS:
            found[name] = float(value)
        else:
            raise ValueError(f"{name} is not a parameter of a rule that weighs by effective context")
    return {**found, "bucket_weights": tuple(by_hand)} if by_hand else found


def _in_words(parameters: Mapping[str, float]) -> str:
    """`alpha 0.15, gamma 0.5, tau 128`."""
    words = [
        "the mass of EXACT"
        if name == MASS_SCALE
        else f"weight {value:g} from {bucket[1]} tokens"
        if (bucket := HAND_MADE.fullmatch(name))
        else f"{name} {value:,g}"
        for name, value in parameters.items()
    ]
    return ", ".join(words)


def read_exposure(file: str | Path) -> PackExposure:
    """Exposure as `inspect_pack.py --json` printed it, with the parameters given there.

    Raises:
        ValueError: the file is not such output.
    """
    path = Path(file)
    content = read_json_object(path, "print it again with megatron-exact inspect --json")
    try:
        keys = {"lower": int, "targets": int, "share": float, "weight": float, "weighted_share": float}
        table = [{key: kind(row[key]) for key, kind in keys.items()} for row in content["buckets"]]
        if not table:
            raise ValueError("no buckets")
        tau = float(content["tail"]["tau"])
        used = content.get("parameters") or {"tau": tau}  # files of older versions lack some
        return PackExposure(
            name=path.stem,
            row_tokens=int(content["row_tokens"]),
            tau=tau,
            table=table,
            weights=f"EXACT with {_in_words({str(name): float(used[name]) for name in used})}, "
            "as given to megatron-exact inspect",
        )
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} is not the output of megatron-exact inspect --json ({error}): print it again"
        ) from error


def exposure_blocks(folder: Path, packs: Sequence[PackExposure]) -> list[Block]:
    """Return the section, with one figure for each pack written into `folder`."""
    before, after = TAIL_SHARES_16K
    blocks: list[Block] = [
        Heading(text="Figure 1: exposure by effective context"),
        Paragraph(
            text="Share of the supervised targets by effective left context, and share of the training "
            f"signal after weighting. In the paper's 16K stream ({SOURCE}) {before:.1%} of the "
            f"loss mass lie at 4K and more, {after:.1%} after weighting."
        ),
    ]
    for number, pack in enumerate(packs, 1):
        path = folder / f"exposure-{number}.png"
        title = f'Pack "{pack.name}", rows of {pack.row_tokens:,} tokens'
        if sum(other.name == pack.name for other in packs) > 1:
            title += f" ({number})"
        plot_exposure(path, pack.table, row_tokens=pack.row_tokens, tau=pack.tau, title=figure_text(title))
        blocks += [
            Heading(text=title, level=3),
            Figure(
                file=path.name,
                alt=f"Bars by bucket: {_sentence(pack)}",
                caption=f"{_sentence(pack)} Weights: {pack.weights}.",
            ),
            *([Note(text=pack.remark)] if pack.remark else []),
            Details(summary="The numbers of this figure", blocks=[_table(pack, title)]),
        ]
    missing = (
        "Not run: no pack was given (--pack DIR, or --exposure FILE of megatron-exact inspect --json)."
    )
    return blocks if packs else [*blocks, Note(text=missing)]


def _sentence(pack: PackExposure) -> str:
    tail: dict[str, Any] = tail_summary(pack.table, pack.tau)
    total = sum(row["targets"] for row in pack.table)
    return (
        f"Of {total:,} targets {tail['share']:.1%} have an effective context of {pack.tau:,g} tokens or "
        f"more; after weighting these carry {tail['weighted_share']:.1%} of the signal."
    )


def _table(pack: PackExposure, title: str) -> Table:
    labels = bucket_labels([row["lower"] for row in pack.table], pack.row_tokens)
    body: list[list[Text]] = [
        [
            label + (", tail" if row["lower"] >= pack.tau else ""),
            f"{row['targets']:,}",
            f"{row['share']:.2%}",
            f"{row['weight']:.4f}",
            f"{row['weighted_share']:.2%}",
        ]
        for label, row in zip(labels, pack.table, strict=True)
    ]
    head = ["effective context", "targets", "share", "weight", "share after weighting"]
    return Table(head=head, body=body, caption=f"Exposure: {title}")
