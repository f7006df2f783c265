"""Figure 1: what packed rows supervise, from packs or from what `inspect_pack.py --json` printed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.exposure import DEFAULT_ALPHA, DEFAULT_GAMMA, default_tau
from megatron_exact.files import atomic_file
from megatron_exact.json_input import read_json_object
from megatron_exact.report.buckets import bucket_labels
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
    return PackExposure(
        name=Path(folder).resolve().name,
        row_tokens=row_tokens,
        tau=tau,
        table=table,
        remark=remark,
        sources=sources,
    )


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
        return PackExposure(
            name=path.stem,
            row_tokens=int(content["row_tokens"]),
            tau=float(content["tail"]["tau"]),
            table=table,
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
            f"signal after EXACT's weighting. In the paper's 16K stream ({SOURCE}) {before:.1%} of the "
            f"loss mass lie at 4K and more, {after:.1%} after weighting."
        ),
    ]
    for number, pack in enumerate(packs, 1):
        path = folder / f"exposure-{number}.png"
        title = f"{pack.name}, rows of {pack.row_tokens:,} tokens"
        with atomic_file(path) as temporary:
            plot_exposure(
                temporary, pack.table, row_tokens=pack.row_tokens, tau=pack.tau, title=figure_text(title)
            )
        blocks += [
            Heading(text=title, level=3),
            Figure(file=path.name, alt=f"Bars by bucket: {_sentence(pack)}", caption=_sentence(pack)),
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
