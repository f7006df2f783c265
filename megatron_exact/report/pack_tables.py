"""Tables and figures about packs, those that were made and those that a forecast describes.

* `format_lengths` and `plot_lengths`: lengths of documents and of the segments that became of them, and
  what cutting and padding cost.
* `format_ledger`: for each source what every stage of a chain reads, how often, and with what context.
* `format_forecast` and `plot_forecast`: packs that were not made, and what weighting would do to them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.exposure import bucket_lower_bounds
from megatron_exact.report.exposure_figure import exposure_table, tail_summary, weigh_for_display
from megatron_exact.report.figures import BARS, COLOURS, new_figure, save_figure
from megatron_exact.report.page import plain_table

QUANTILES = ("p10", "p50", "p90", "p99", "max")
KINDS = ("documents", "segments")
PLACE = ("row", "policy", "mix")
Cell = dict[str, Any]
POLICY_ORDER = ("concat", "best-fit")
MAX_SERIES = 6  # policy x mix; more could not be distinguished
PANELS_A_LINE = 3
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one for each row length
INCHES_A_PANEL = 3.1
DODGE = 0.36  # octaves that the series of one row length share
TITLE: dict[str, Any] = {"loc": "left", "fontsize": "small"}
Series = list[Mapping[str, Any]]


def format_lengths(lengths: Mapping[str, Any]) -> str:
    """Return quantiles, log2 bins and two sentences for a terminal.

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
    """Describe what was cut, padded and left out."""
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
    """Draw the distributions of documents and segments, and of their tokens, over lengths, as a PNG.

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
    """Return tables of the stages, and for each source of what every stage reads, how often and how.

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
    """Return names such as `4K`, or the tokens of a row; with the folder's name where lengths are equal."""
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


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where the tail starts: at a number of tokens, or at a fraction of each row length."""

    tokens: float | None = None
    """Number of tokens; None for a fraction."""
    divisor: int = 1
    """The fraction is row / divisor."""

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Parse `2048`, `2K` or `row/4`.

        Raises:
            ValueError: another text.
        """
        scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
        try:
            if text.startswith("row/"):
                divisor = int(text.removeprefix("row/"))
                if divisor >= 1:
                    return cls(divisor=divisor)
            else:
                return cls(tokens=float(text[:-1] if scale > 1 else text) * scale)
        except ValueError:
            pass
        raise ValueError(
            f"tau {text!r} is neither tokens, such as 2048 or 2K, nor a fraction such as row/4"
        )

    def of(self, row_tokens: int) -> float:
        """Return the tokens for rows of this length."""
        return max(1, row_tokens // self.divisor) if self.tokens is None else self.tokens


def forecast_cells(
    packs: Sequence[Mapping[str, Any]],
    *,
    taus: Sequence[Threshold],
    alphas: Sequence[float],
    gammas: Sequence[float],
) -> list[Cell]:
    """Weigh each pack in every way and return one cell for each combination.

    Args:
        packs: what the packs would be, at least {`row_tokens`, `counts`}; copied into the cells.
        taus, alphas, gammas: parameters of EXACT.

    Returns:
        The pack's values with `tau`, `alpha`, `gamma`, `buckets` and `tail` as `inspect_pack.py --json`
        prints them, and `note`: None, or why it is an error in training. `counts` is in the buckets.

    Raises:
        ValueError: parameters that are not valid for a pack; names its row length.
    """
    cells = []
    for pack, tau, alpha, gamma in itertools.product(packs, taus, alphas, gammas):
        row_tokens = pack["row_tokens"]
        lower, threshold = bucket_lower_bounds(row_tokens), tau.of(row_tokens)
        try:
            weighting, note = weigh_for_display(
                pack["counts"], lower, row_tokens, alpha=alpha, gamma=gamma, tau=threshold
            )
        except ValueError as error:
            raise ValueError(f"rows of {row_tokens:,}: {error}") from error
        table = exposure_table(lower, pack["counts"], weighting.bucket_weights)
        values = {key: value for key, value in pack.items() if key != "counts"}
        parameters = {"tau": threshold, "alpha": alpha, "gamma": gamma}
        tail = tail_summary(table, threshold)
        cells.append({**values, **parameters, "buckets": table, "tail": tail, "note": note})
    return cells


def mix_label(mix: Sequence[float] | None) -> str:
    """Return `6:24:32`, or `all` without weights."""
    return "all" if mix is None else ":".join(f"{weight:g}" for weight in mix)


def format_forecast(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return three tables for a terminal: the packs, their exposure, and the weighting.

    Args:
        cells: from `forecast_cells`.
    """
    packs = list({_place(cell): cell for cell in cells}.values())
    notes = list(dict.fromkeys(f"{_place(c)[0]}, {c['policy']}: {c['note']}" for c in cells if c["note"]))
    sections = [_pack_table(packs), _exposure_table(packs), _weighting_table(cells)]
    return "\n\n".join(["\n".join(lines) for lines in sections] + notes) + "\n"


def _place(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{cell['row_tokens']:,}", cell["policy"], mix_label(cell["mix"])


def _pack_table(packs: Sequence[Mapping[str, Any]]) -> list[str]:
    head = [*PLACE, "", "rows", "segments", "padding", "left out", "documents cut", "tokens after a cut"]
    body = [
        [
            *_place(cell),
            "=" if cell["exact"] else "~",
            f"{cell['rows']:,}",
            f"{cell['segments']:,}",
            f"{cell['padding_share']:.4%}",
            f"{cell['left_out_tokens']:,}",
            f"{cell['cut_documents_share']:.2%}",
            f"{cell['tokens_after_cut_share']:.2%}",
        ]
        for cell in packs
    ]
    return ["the packs (= as pack_corpus would make it, ~ expected)", "", *_table(head, body)]


def _exposure_table(packs: Sequence[Mapping[str, Any]]) -> list[str]:
    edges = max(([bucket["lower"] for bucket in cell["buckets"]] for cell in packs), key=len)
    body = []
    for cell in packs:
        shares = [f"{100 * bucket['share']:.2f}" for bucket in cell["buckets"]]
        body.append([*_place(cell), *shares, *[""] * (len(edges) - len(shares))])
    head = [*PLACE, *(_tokens(edge) for edge in edges)]
    title = "share of targets (%) by effective context, from so many tokens up to the next column"
    return [title, "", *_table(head, body)]


def _weighting_table(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    head = [*PLACE, "tau", "alpha", "gamma", "tail share", "after", "weights of the tail's buckets"]
    body = []
    for cell in cells:
        weights = [f"{b['weight']:.4f}" for b in cell["buckets"] if b["lower"] >= cell["tau"]]
        shares = [f"{cell['tail'][name]:.2%}" for name in ("share", "weighted_share")]
        parameters = [f"{cell['tau']:,g}", f"{cell['alpha']:g}", f"{cell['gamma']:g}"]
        body.append([*_place(cell), *parameters, *shares, " ".join(weights)])
    return ["EXACT weighting: tail share of the training signal, before and after", "", *_table(head, body)]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A plain table whose row lengths are set flush right and policy and mix flush left."""
    width = max(len(line[0]) for line in (head, *body))
    return plain_table(
        [head[0].rjust(width), *head[1:]],
        [[line[0].rjust(width), *line[1:]] for line in body],
        left_columns=len(PLACE),
    )


def plot_forecast(path: str | Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """Draw the cells of one weighting (the first, if there are several) as a PNG.

    Above, one panel for each policy and mix with a line for each row length. Below, by row length: the
    tail's share before and after weighting, and the shares of padding and of tokens after a cut.

    Args:
        path: file to write.
        cells: from `forecast_cells`.

    Raises:
        ValueError: more policies and mixes than can be distinguished.
    """
    from matplotlib.figure import Figure

    chosen = _first_weighting(cells)
    require_few_series({(cell["policy"], mix_label(cell["mix"])) for cell in chosen})
    series: dict[tuple[str, str], Series] = {}
    for cell in sorted(chosen, key=lambda cell: (POLICY_ORDER.index(cell["policy"]), cell["row_tokens"])):
        series.setdefault((cell["policy"], mix_label(cell["mix"])), []).append(cell)
    num_mixes = len({mix for _, mix in series})
    # A line of panels for each policy, if its mixes fit there.
    columns = num_mixes if 1 < num_mixes <= PANELS_A_LINE else min(PANELS_A_LINE, max(2, len(series)))
    lines = -(-len(series) // columns)
    figure = Figure(figsize=(INCHES_A_PANEL * columns, 2.6 * (lines + 1) + 0.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(lines, 1.15))
    upper, lower = parts
    _draw_exposure(upper, series, columns, lines)
    _draw_costs(lower, series, cells[0])
    save_figure(figure, path)


def require_few_series(series: Collection[tuple[str, str]]) -> None:
    """Check that a figure can distinguish the combinations of policy and mix.

    Raises:
        ValueError: how many there are.
    """
    if len(series) > MAX_SERIES:
        raise ValueError(
            f"{len(series)} policies and mixes are too many for one figure: --plot draws up to {MAX_SERIES}"
        )


def _first_weighting(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first cell of each pack."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for cell in cells:
        found.setdefault((cell["row_tokens"], cell["policy"], mix_label(cell["mix"])), cell)
    return list(found.values())


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize="small")


def _tokens(value: int) -> str:
    return f"{value // 1024}K" if value >= 1024 and value % 1024 == 0 else f"{value:,}"


def _draw_exposure(figure: Any, series: Mapping[tuple[str, str], Series], columns: int, lines: int) -> None:
    from matplotlib import colormaps

    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    rows = sorted({cell["row_tokens"] for cells in series.values() for cell in cells})
    shades = colormaps["viridis_r"](np.linspace(0.12, 1, len(rows)))
    widest = max((cell["buckets"] for cells in series.values() for cell in cells), key=len)
    for axis, ((policy, mix), cells) in zip(axes, series.items(), strict=False):
        _tidy(axis)
        for cell in cells:
            place = rows.index(cell["row_tokens"])
            axis.plot(
                [100 * bucket["share"] for bucket in cell["buckets"]],
                color=shades[place],
                marker=MARKERS[place % len(MARKERS)],
                markersize=3.5,
                linewidth=1.2,
                label=_tokens(cell["row_tokens"]),
            )
        axis.set_title(policy + ("" if mix == "all" else f", mix {mix}"), loc="left", fontsize="medium")
        edges = [_tokens(bucket["lower"]) for bucket in widest]
        axis.set_xticks(range(len(edges)), edges, rotation=90)
    axes[0].set_ylim(bottom=0)  # of all: they share it, and now all lines are there
    for axis in axes[len(series) :]:
        axis.remove()
    for axis in axes[: len(series) : columns]:
        axis.set_ylabel("share of targets (%)")
    label = "effective left context of the target (tokens; lower edge of the bucket)"
    figure.supxlabel(label, fontsize="medium")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, title="row length", loc="outside right center", frameon=False, fontsize="small"
    )


def _draw_costs(figure: Any, series: Mapping[tuple[str, str], Series], first: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    mixes = list(dict.fromkeys(mix for _, mix in series))
    for index, ((policy, mix), cells) in enumerate(series.items()):
        style: dict[str, Any] = {
            "color": COLOURS[(mixes.index(mix) if len(mixes) > 1 else index) % len(COLOURS)],
            "linestyle": "-" if policy == "concat" else "--",
            "marker": "o" if policy == "concat" else "s",
            "markersize": 4,
            "linewidth": 1.2,
        }
        name = policy + ("" if mix == "all" else f", {mix}")
        at = np.array([cell["row_tokens"] for cell in cells])
        shift = DODGE * ((index + 0.5) / len(series) - 0.5)  # so that series do not hide each other
        beside = at * 2**shift
        before = [100 * cell["tail"]["share"] for cell in cells]
        after = [100 * cell["tail"]["weighted_share"] for cell in cells]
        left.plot(beside, before, markerfacecolor="none", label=name, **style)
        left.plot(beside, after, **{**style, "linestyle": "none"})
        left.vlines(beside, before, after, color=style["color"], linewidth=1)
        right.plot(at, [100 * cell["tokens_after_cut_share"] for cell in cells], label=name, **style)
    rows = sorted({cell["row_tokens"] for cells in series.values() for cell in cells})
    for axis in (left, right):
        _tidy(axis)
        axis.set_xscale("log", base=2)
        axis.set_xticks(rows, [_tokens(row) for row in rows])
        axis.minorticks_off()
        axis.set_xlabel("row length (tokens)")
        axis.set_ylim(bottom=0)
    parameters = f"alpha {first['alpha']:g}, gamma {first['gamma']:g}"
    left.set_title(f"tail: share of targets, hollow; after\nweighting, full ({parameters})", **TITLE)
    right.set_title("tokens after a cut, without the\nbeginning of their document", **TITLE)
    left.set_ylabel("share (%)")
    right.set_ylabel("share of tokens (%)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize="small")
