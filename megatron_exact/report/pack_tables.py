"""Tables and a figure about a pack: the lengths in it, and which documents the stages of a chain read.

`format_lengths` and `plot_lengths` show the lengths of documents and of the segments that became of them,
and what cutting and padding cost; `format_ledger` shows for each source what every stage reads, how often,
and with what context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.report.figures import BARS, new_figure, save_figure
from megatron_exact.report.page import plain_table

QUANTILES = ("p10", "p50", "p90", "p99", "max")
KINDS = ("documents", "segments")


def format_lengths(lengths: Mapping[str, Any]) -> str:
    """Quantiles, log2 bins and two sentences for a terminal.

    Args:
        lengths: the `lengths` of `inspect_pack.py --json`.
    """
    known = [kind for kind in KINDS if lengths[kind] is not None]
    head = ["length (tokens)", "number", "mean", *QUANTILES]
    body = [[kind, *_summary_cells(lengths[kind])] for kind in known]
    lines = plain_table(head, body)
    head = ["tokens long"]
    for kind in known:
        head += [kind, "share", "of tokens"]
    bins = max((len(lengths[kind]["bins"]) for kind in known), default=0)
    first = min((_first_bin(lengths[kind]["bins"]) for kind in known), default=0)
    body = []
    for index in range(first, bins):
        cells = [_bin_label(1 << index)]
        for kind in known:
            cells += _bin_cells(lengths[kind], index)
        body.append(cells)
    return "\n".join([*lines, "", *plain_table(head, body), "", truncation_sentence(lengths)]) + "\n"


def _summary_cells(summary: Mapping[str, Any]) -> list[str]:
    mean = "-" if summary["mean"] is None else f"{summary['mean']:,.1f}"
    quantiles = [summary["quantiles"][name] for name in QUANTILES]
    return [f"{summary['documents']:,}", mean, *("-" if q is None else f"{q:,}" for q in quantiles)]


def _first_bin(bins: list[dict[str, int]]) -> int:
    return next((index for index, one in enumerate(bins) if one["documents"]), 0)


def _bin_label(lower: int) -> str:
    return f"{lower:,}-{2 * lower - 1:,}" if lower > 1 else "1"


def _bin_cells(summary: Mapping[str, Any], index: int) -> list[str]:
    if index >= len(summary["bins"]):
        return ["0", "0.00%", "0.00%"]
    one = summary["bins"][index]
    shares = (one["documents"] / summary["documents"], one["tokens"] / summary["tokens"])
    return [f"{one['documents']:,}", *(f"{share:.2%}" for share in shares)]


def truncation_sentence(lengths: Mapping[str, Any]) -> str:
    """What was cut, padded and left out, in words."""
    cut, padding = lengths["truncation"], lengths["padding"]
    return (
        f"cut: {cut['cut_documents']:,} documents ({cut['cut_documents_share']:.2%} of them); "
        f"{cut['tokens_after_cut_share']:.2%} of the tokens stand after a cut, without the beginning of "
        "their document; "
        f"{cut['rows_inside_document_share']:.2%} of the rows begin inside a document\n"
        f"padding: {padding['tokens']:,} inputs ({padding['share']:.4%}); "
        f"left out: {lengths['left_out_tokens']:,} tokens"
    )


def plot_lengths(path: str | Path, lengths: Mapping[str, Any], *, row_tokens: int, title: str = "") -> None:
    """Draw how documents and segments, and their tokens, are spread over lengths, as a PNG.

    Args:
        path: file to write.
        lengths: the `lengths` of `inspect_pack.py --json`.
        row_tokens: inputs of a row, marked by a line.
        title: above the figure.
    """
    figure, (upper, lower) = new_figure(rows=2, heights=(1, 1))
    known = [kind for kind in KINDS if lengths[kind] is not None]
    first = min(_first_bin(lengths[kind]["bins"]) for kind in known)
    bins = max(1, *(len(lengths[kind]["bins"]) for kind in known))
    styles: dict[str, dict[str, Any]] = {
        "documents": {**BARS[0], "label": "documents, before packing"},
        "segments": {**BARS[1], "label": "segments, in the rows"},
    }
    width = 0.8 / len(known)
    for place, kind in enumerate(known):
        summary = lengths[kind]
        at = np.arange(len(summary["bins"])) + (place - (len(known) - 1) / 2) * width
        for axis, what in ((upper, "documents"), (lower, "tokens")):
            values = [100 * one[what] / max(1, summary[what]) for one in summary["bins"]]
            axis.bar(at, values, width, linewidth=0.8, **styles[kind])
    upper.set_ylabel("share of\ntheir number (%)")
    lower.set_ylabel("share of\ntheir tokens (%)")
    edge = np.log2(row_tokens) - 0.5
    for axis in (upper, lower):
        axis.axvline(edge, color="0.25", linestyle="--", linewidth=1)
    upper.margins(y=0.2)  # the label stays above the bars
    upper.text(
        edge + 0.08,
        0.97,
        f"row: {row_tokens:,}",
        transform=upper.get_xaxis_transform(),
        ha="left",
        va="top",
        fontsize="small",
    )
    right = max(bins - 0.4, edge + 1.6)
    lower.set_xlim(first - 0.6, right)
    ticks = np.arange(first, int(right + 0.5))
    lower.set_xticks(ticks, [_short(1 << int(tick)) for tick in ticks], rotation=35, ha="right")
    lower.set_xlabel("length in tokens, from this power of two to the next")
    upper.set_title(title, loc="left")
    handles, labels = upper.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


def _short(tokens: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit:
            return f"{tokens // unit}{name}"
    return str(tokens)


def format_ledger(ledger: Mapping[str, Any]) -> str:
    """Tables: the stages; of each source what every stage reads, how often, and with what context.

    Args:
        ledger: from `data.stage_ledger.make_ledger`.
    """
    stages = ledger["stages"]
    names = stage_names(stages)
    body = [
        [
            name,
            str(stage["pack"]),
            f"{stage['row_tokens']:,}",
            stage["policy"],
            stage["corpus_slice"] or "all",
            stage["fingerprint"][:16],
        ]
        for name, stage in zip(names, stages, strict=True)
    ]
    lines = plain_table(["stage", "pack", "row", "policy", "slice", "fingerprint"], body, left_columns=2)
    for source in ledger["sources"]:
        lines += ["", *_source_lines(source, stages, names)]
    return "\n".join(lines) + "\n"


def stage_names(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """`4K`, `8K`, or the number of tokens of a row; with the folder's name where two have one length."""
    names = []
    for stage in stages:
        rows, rest = divmod(stage["row_tokens"], 1024)
        names.append(f"{stage['row_tokens']:,}" if rest else f"{rows}K")
    return [
        f"{name} {Path(stage['pack']).name}" if names.count(name) > 1 else name
        for name, stage in zip(names, stages, strict=True)
    ]


def _source_lines(
    source: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[str]:
    empty = f", {source['empty_documents']:,} more are empty" if source["empty_documents"] else ""
    lines = [
        f"{source['prefix']}: {source['documents']:,} documents, {source['tokens']:,} tokens{empty}",
        "",
    ]
    most = max(one["reads"] for one in source["times"])
    heads = [*map(str, range(min(most, 4) + 1))] + (["5 or more"] if most > 4 else [])
    head = [
        "read by",
        "documents",
        "share",
        "tokens",
        "share",
        "inputs",
        *(f"{times} x" for times in heads),
    ]
    body = []
    for name, stage in zip(names, source["stages"], strict=True):
        body.append(
            [
                name,
                f"{stage['documents']:,}",
                f"{stage['documents_share']:.2%}",
                f"{stage['tokens']:,}",
                f"{stage['tokens_share']:.2%}",
                f"{stage['inputs']:,}",
                *_times_cells(stage["times"], len(heads)),
            ]
        )
    read = sum(one["documents"] for one in source["times"] if one["reads"])
    inputs = sum(stage["inputs"] for stage in source["stages"])
    body.append(
        [
            "the chain",
            f"{read:,}",
            f"{read / source['documents']:.2%}",
            "",
            "",
            f"{inputs:,}",
            *_times_cells(source["times"], len(heads)),
        ]
    )
    lines += plain_table(head, body)
    lines += _overlap_lines(source, names)
    for group in source["groups"]:
        if any(targets is not None for targets in group["targets"]):
            lines += ["", *_group_lines(group, stages, names)]
    return lines


def _times_cells(times: Sequence[Mapping[str, int]], columns: int) -> list[str]:
    counts = [0] * columns
    for one in times:
        counts[min(one["reads"], columns - 1)] += one["documents"]
    return [f"{count:,}" for count in counts]


def _overlap_lines(source: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    lines = []
    overlap = source["overlap"]
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            documents, tokens = overlap["documents"][i][j], overlap["tokens"][i][j]
            shared = f"{documents:,} documents, {tokens:,} tokens" if documents else "no document"
            lines.append(f"read by {first} and {names[j]}: {shared}")
    for i, first in enumerate(names):
        for j, second in enumerate(names):
            if count := source["evaluated_and_trained"][i][j]:
                lines.append(f"WARNING: {first} evaluates on {count:,} documents that {second} trains on")
    return ["", *lines] if lines else []


def _group_lines(
    group: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[str]:
    read_by = " and ".join(names[stage] for stage in group["stages"])
    title = f"targets of the documents read by {read_by or 'no stage'} ({group['documents']:,} documents):"
    known = [number for number, targets in enumerate(group["targets"]) if targets is not None]
    lower = max((stages[number]["lower"] for number in known), key=len)
    body = []
    for bucket, edge in enumerate(lower):
        counts = [_count(group["targets"][number], bucket) for number in known]
        body.append([f"{edge:,}", *(f"{count:,}" for count in counts), f"{sum(counts):,}"])
    sums = [sum(group["targets"][number]) for number in known]
    body.append(["all", *(f"{count:,}" for count in sums), f"{sum(sums):,}"])
    head = ["context from", *(names[number] for number in known), "the chain"]
    return [title, *plain_table(head, body, left_columns=0)]


def _count(targets: Sequence[int], bucket: int) -> int:
    return targets[bucket] if bucket < len(targets) else 0
