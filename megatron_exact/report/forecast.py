"""Tables of a what-if: packs that were not made, their exposure, and what weighting would do to it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_exact.exposure import bucket_lower_bounds
from megatron_exact.report.exposure import exposure_table, tail_summary, weigh_for_display
from megatron_exact.report.tables import plain_table

PLACE = ("row", "policy", "mix")
Cell = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where the tail starts: at a number of tokens, or at a fraction of each row length."""

    tokens: float | None = None
    """Tokens; None for a fraction."""
    divisor: int = 1
    """The fraction is row / divisor."""

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """From `2048`, `2K` or `row/4`.

        Raises:
            ValueError: neither.
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
        """Tokens, for rows of this length."""
        return max(1, row_tokens // self.divisor) if self.tokens is None else self.tokens


def forecast_cells(
    packs: Sequence[Mapping[str, Any]],
    *,
    taus: Sequence[Threshold],
    alphas: Sequence[float],
    gammas: Sequence[float],
) -> list[Cell]:
    """Weigh each pack in every way: a flat list, one cell a combination.

    Args:
        packs: what the packs would be, at least {`row_tokens`, `counts`}; copied into the cells.
        taus, alphas, gammas: parameters of EXACT.

    Returns:
        The pack's values with `tau`, `alpha`, `gamma`, `buckets` and `tail` as `inspect_pack.py --json`
        prints them, and `note`, None or why training would refuse. `counts` is in the buckets.

    Raises:
        ValueError: parameters that a pack does not permit, the row length named.
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
    """`6:24:32`, or `all` where nothing is weighted."""
    return "all" if mix is None else ":".join(f"{weight:g}" for weight in mix)


def format_forecast(cells: Sequence[Mapping[str, Any]]) -> str:
    """Three tables for a terminal: the packs, their exposure, and the weighting.

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
    head = [*PLACE, *(_short(edge) for edge in edges)]
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


def _short(edge: int) -> str:
    return f"{edge // 1024}K" if edge >= 1024 and edge % 1024 == 0 else str(edge)
