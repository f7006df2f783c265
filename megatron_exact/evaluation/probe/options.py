"""What is asked of a model, and the items that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from megatron_exact.evaluation.probe.cloze import (
    ANSWER_POSITION,
    FIELD_LOOKUP,
    Maker,
    answer_position,
    field_lookup,
)
from megatron_exact.evaluation.probe.field import (
    EVIDENCE_FIELD,
    evidence_field,
    own_needles,
    read_field_needles,
)
from megatron_exact.evaluation.probe.filler import own_filler, read_filler
from megatron_exact.evaluation.probe.grid import KINDS, cells_of
from megatron_exact.evaluation.probe.items import ProbeCell, ProbeItem, read_items
from megatron_exact.evaluation.probe.placement import Writer, place
from megatron_exact.evaluation.sample_cache import cell_seed
from megatron_exact.files import sha256_file

ITEMS_PER_CELL = 100


@dataclass(frozen=True, kw_only=True)
class ItemSource:
    """Items by cell. A cell at a time is in memory: a full grid is gigabytes of prompts."""

    cells: tuple[ProbeCell, ...]
    """In order."""
    items_of: Callable[[ProbeCell], list[ProbeItem]]
    """The same items at every call."""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """A probe as a user asks for it."""

    kinds: tuple[str, ...] = KINDS
    """Of our own items."""
    distances: tuple[int, ...] = ()
    """In tokens; none: a log grid."""
    contexts: tuple[int, ...] = ()
    """Of the field, in tokens; none: a log grid."""
    items_per_cell: int = ITEMS_PER_CELL
    """Of our own items."""
    seed: int = 0
    """Of our own items."""
    filler: Path | None = None
    """A text; None: our own sentences."""
    needles: Path | None = None
    """A NoLiMa needle set for the field; None: our own."""
    items: Path | None = None
    """Items made elsewhere, in the place of our own."""

    def __post_init__(self) -> None:
        if self.items_per_cell < 1 or self.seed < 0:
            raise ValueError(
                f"{self.items_per_cell} items a cell, seed {self.seed}: give at least 1, and a seed of "
                "at least 0"
            )
        other = self.distances or self.contexts or self.filler or self.needles or self.kinds != KINDS
        if self.items is not None and other:
            raise ValueError(
                "--items brings its own kinds, distances, contexts and texts: leave the other options out"
            )
        for option, value in (("--contexts", self.contexts), ("--needles", self.needles)):
            if value and EVIDENCE_FIELD not in self.kinds:
                raise ValueError(
                    f"{option} is read by {EVIDENCE_FIELD} alone: add it to --kinds, or leave {option} out"
                )

    def record(self) -> dict[str, Any]:
        """For probe.json: what decides the items; files by their hashes."""
        if self.items is not None:
            return {"items": sha256_file(self.items)}
        return {
            "kinds": list(self.kinds),
            "distances": list(self.distances),
            "contexts": list(self.contexts),
            "items_per_cell": self.items_per_cell,
            "seed": self.seed,
            "filler": None if self.filler is None else sha256_file(self.filler),
            "needles": None if self.needles is None else sha256_file(self.needles),
        }

    def item_source(self, tokenizer: Any, window: int | None) -> ItemSource:
        """The items, made when they are asked for.

        Every cell draws from a seed of its own: its items do not depend on which other cells there are, and
        items of different cells are independent of each other.

        Args:
            tokenizer: of transformers.
            window: tokens that the model reads at most; None: no limit.

        Raises:
            ValueError: cells that cannot be filled.
        """
        if self.items is not None:
            given: dict[ProbeCell, list[ProbeItem]] = {}
            for item in read_items(self.items):
                given.setdefault(item.cell, []).append(item)
            return ItemSource(cells=tuple(sorted(given)), items_of=given.__getitem__)
        cells = cells_of(self.kinds, self.distances, self.contexts, window)
        writer = Writer(tokenizer)
        makers = {kind: self._maker(kind, writer) for kind in dict.fromkeys(cell.kind for cell in cells)}
        longest = max(cell.context for cell in cells)
        filler = (
            own_filler(longest, tokenizer) if self.filler is None else read_filler(self.filler, tokenizer)
        )

        def items_of(cell: ProbeCell) -> list[ProbeItem]:
            items = []
            for number in range(self.items_per_cell):
                name = f"{cell.distance}-{cell.context}-{number}"
                draw = Random(cell_seed(self.seed, "probe", cell.kind, name))
                question = makers[cell.kind](draw)
                items.append(place(question, cell, name, writer=writer, filler=filler, draw=draw))
            return items

        return ItemSource(cells=tuple(cells), items_of=items_of)

    def _maker(self, kind: str, writer: Writer) -> Maker:
        if kind == EVIDENCE_FIELD:
            needles = own_needles() if self.needles is None else read_field_needles(self.needles)
            return evidence_field(writer, needles)
        return {ANSWER_POSITION: answer_position, FIELD_LOOKUP: field_lookup}[kind](writer)
