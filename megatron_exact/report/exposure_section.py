"""Figure 1: what packed rows supervise, from packs or from what `inspect_pack.py --json` printed.

The weights of a pack are those with which the treatment of a comparison was trained on it, where a record
says so; otherwise EXACT's with the paper's parameters. The caption names which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_exact.exposure import DEFAULT_ALPHA, DEFAULT_GAMMA, build_weighting, default_tau
from megatron_exact.files import atomic_file
from megatron_exact.json_input import read_json_object
from megatron_exact.report.buckets import bucket_labels
from megatron_exact.report.compared import RULE_NAMES, Compared, training_of
from megatron_exact.report.exposure import (
    ExposureRow,
    exposure_table,
    plot_exposure,
    tail_summary,
    weigh_for_display,
)
from megatron_exact.report.figures import figure_text
from megatron_exact.report.page import Block, Details, Figure, Heading, Note, Paragraph, Table, Text
from megatron_exact.report.paper_numbers import SOURCE, TAIL_SHARES_16K

MANIFEST = "manifest.json"
SHOWN_RULES = ("exact", "exact-normalized", "uniform-tail")
"""Rules whose weights depend on the effective context alone, so that figure 1 can show them."""
PARAMETERS = ("alpha", "gamma", "tau", "cap")
HAND_MADE = re.compile(r"weight_from_(\d{1,18})")
"""How a training record names a bucket weight that was set by hand."""


@dataclass(frozen=True, kw_only=True)
class PackExposure:
    """What one pack trains on."""

    name: str
    """Of the pack's folder or of the file."""
    row_tokens: int
    """Inputs of a row."""
    tau: float
    """From how many tokens a bucket belongs to the tail."""
    table: list[ExposureRow]
    """From `exposure_table`."""
    weights: str
    """Where the weights come from, with their parameters, in words."""
    fingerprint: str | None = None
    """Of the pack; None where the file does not say."""
    remark: str | None = None
    """What is special about its weights."""
    sources: tuple[tuple[str, str | None], ...] = ()
    """(name, licence) of its corpora; none where the file does not say."""


def read_pack(folder: str | Path) -> PackExposure:
    """Exposure of a pack's train split under EXACT with the paper's parameters, from its manifest alone.

    Raises:
        ValueError: no manifest, or a damaged one.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: give a folder that pack_corpus.py has written")
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
        raise ValueError(f"{path} is no manifest of a pack ({error}): pack the corpus again") from error
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
                        f"{pack.name} ({error}): run compare_runs.py again, or give another --pack"
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
    """Rule and recorded parameters of the weighted trainings of one model on the pack."""
    stages = training_of(run)
    return [
        (stage["rule"], stage.get("parameters") or {})
        for number, stage in enumerate(stages, 1)
        if stage["rule"] in SHOWN_RULES
        and stage.get("row_tokens") == pack.row_tokens
        and (number < len(stages) or run.get("fingerprint") in (None, pack.fingerprint))
    ]


def _parameters(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `build_weighting` from a record's parameters.

    Raises:
        ValueError: a value that is not a finite number, or a name that no such rule has.
    """
    found: dict[str, Any] = {}
    by_hand = []
    for name, value in recorded.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, not a finite number")
        if bucket := HAND_MADE.fullmatch(name):
            by_hand.append((int(bucket[1]), float(value)))
        elif name in PARAMETERS:
            found[name] = float(value)
        else:
            raise ValueError(f"{name} is no parameter of a rule that weighs by effective context")
    return {**found, "bucket_weights": tuple(by_hand)} if by_hand else found


def _in_words(parameters: Mapping[str, float]) -> str:
    """`alpha 0.15, gamma 0.5, tau 128`."""
    words = [
        f"weight {value:g} from {bucket[1]} tokens"
        if (bucket := HAND_MADE.fullmatch(name))
        else f"{name} {value:,g}"
        for name, value in parameters.items()
    ]
    return ", ".join(words)


def read_exposure(file: str | Path) -> PackExposure:
    """Exposure as `inspect_pack.py --json` printed it, with the parameters given there.

    Raises:
        ValueError: it is no such file.
    """
    path = Path(file)
    content = read_json_object(path, "print it again with inspect_pack.py --json")
    try:
        keys = {"lower": int, "targets": int, "share": float, "weight": float, "weighted_share": float}
        table = [{key: kind(row[key]) for key, kind in keys.items()} for row in content["buckets"]]
        if not table:
            raise ValueError("no buckets")
        tau = float(content["tail"]["tau"])
        used = content.get("parameters") or {"tau": tau}  # files of older versions do not name all
        return PackExposure(
            name=path.stem,
            row_tokens=int(content["row_tokens"]),
            tau=tau,
            table=table,
            weights=f"EXACT with {_in_words({str(name): float(used[name]) for name in used})}, "
            "as inspect_pack.py was told",
        )
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} is no output of inspect_pack.py --json ({error}): print it again"
        ) from error


def exposure_blocks(folder: Path, packs: Sequence[PackExposure]) -> list[Block]:
    """The section, one figure a pack; written into `folder`."""
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
        title = f"{pack.name}, rows of {pack.row_tokens:,} tokens"
        if sum(other.name == pack.name for other in packs) > 1:
            title += f" ({number})"
        with atomic_file(path) as temporary:
            plot_exposure(
                temporary, pack.table, row_tokens=pack.row_tokens, tau=pack.tau, title=figure_text(title)
            )
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
    missing = "Not run: no pack was given (--pack DIR, or --exposure FILE of inspect_pack.py --json)."
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
