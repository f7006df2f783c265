"""The cells of the probe: distances on a log grid, for the field with contexts as the second axis."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_exact.evaluation.probe.cloze import ANSWER_POSITION, FIELD_LOOKUP, HEAD_TOKENS
from megatron_exact.evaluation.probe.field import EVIDENCE_FIELD
from megatron_exact.evaluation.probe.items import ProbeCell

KINDS = (ANSWER_POSITION, FIELD_LOOKUP, EVIDENCE_FIELD)
SHORTEST_DISTANCE = 64
SHORTEST_CONTEXT = 256
LONGEST = 65_536
"""The paper's longest distance."""


def powers_of_two(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... up to and with `last`."""
    found = []
    while first <= last:
        found.append(first)
        first *= 2
    return found


def cells_of(
    kinds: Sequence[str], distances: Sequence[int], contexts: Sequence[int], window: int | None
) -> list[ProbeCell]:
    """The cells to fill.

    Args:
        kinds: some of `KINDS`.
        distances: in tokens; none: powers of two from 64 up to 65,536 or what the window holds.
        contexts: of the field, in tokens; none: powers of two from 256 up to the same.
        window: tokens that the model reads at most; None: no limit.

    Returns:
        The cells, by kind, then from short to long. A cloze item has a context of its distance and 96
        tokens; cells of the field whose context does not hold the distance and as many are left out.

    Raises:
        ValueError: an unknown kind, a length given twice, or one that nothing can be made of.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(f"kinds {', '.join(unknown) or '(none)'}: choose from {', '.join(KINDS)}")
    for name, given in (("--distances", distances), ("--contexts", contexts)):
        if len(set(given)) != len(given):
            raise ValueError(f"{name}: give each length once")
    limit = LONGEST if window is None else min(window, LONGEST)
    wide = distances or powers_of_two(SHORTEST_DISTANCE, limit)
    if not distances and window is not None:
        wide = [distance for distance in wide if distance + HEAD_TOKENS <= window]
    deep = contexts or powers_of_two(SHORTEST_CONTEXT, limit)
    cells = []
    for kind in (kind for kind in KINDS if kind in kinds):
        if kind != EVIDENCE_FIELD:
            cells += [_cell(kind, distance, distance + HEAD_TOKENS) for distance in sorted(wide)]
            continue
        grid = [(distance, context) for distance in sorted(wide) for context in sorted(deep)]
        cells += [_cell(kind, *pair) for pair in grid if pair[0] + HEAD_TOKENS <= pair[1]]
        unused = (set(distances) - {cell.distance for cell in cells if cell.kind == kind}) | (
            set(contexts) - {cell.context for cell in cells if cell.kind == kind}
        )
        if unused:
            raise ValueError(
                f"{kind}: no cell has {min(unused):,} tokens, since a context holds its distance and "
                f"{HEAD_TOKENS} tokens: leave it out, or give longer --contexts or shorter --distances"
            )
    if not cells:
        raise ValueError(
            f"a window of {window} tokens holds no cell: it takes {SHORTEST_DISTANCE + HEAD_TOKENS}"
        )
    return cells


def _cell(kind: str, distance: int, context: int) -> ProbeCell:
    return ProbeCell(kind=kind, distance=distance, context=context)
