"""The ledger of a chain of stages, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_exact.report.tables import plain_table


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
