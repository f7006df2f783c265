"""`tools/probe_evidence.py`: the items of a probe on one model, cell by cell, into a result folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_exact.command_line import progress_bar
from megatron_exact.evaluation.backend import AUTO, Backend, resolve
from megatron_exact.evaluation.engine import load_tokenizer
from megatron_exact.evaluation.model_identity import (
    max_positions,
    model_identity,
    read_provenance,
    require_model_folder,
)
from megatron_exact.evaluation.probe.items import ProbeCell, encode_item
from megatron_exact.evaluation.probe.options import ProbeOptions
from megatron_exact.evaluation.probe.results import (
    FORMAT_VERSION,
    PROBE,
    cell_of,
    read_results,
    require_same_probe,
    write_results,
)
from megatron_exact.evaluation.probe.scoring import BATCH_TOKENS, score_items
from megatron_exact.files import write_json
from megatron_exact.folder_lock import held_output


@dataclass(frozen=True, kw_only=True)
class ProbeBackend:
    """How to run the model."""

    device: str | None = None
    """Such as `cpu` or `cuda:0`; None: a GPU where there is one."""
    dtype: str = AUTO
    """Type of the weights, one of `backend.DTYPES`; `auto`: as stored."""
    batch_tokens: int = BATCH_TOKENS
    """Of the KV cache at a time."""


@dataclass(frozen=True, kw_only=True)
class CellSummary:
    """Means of a finished cell."""

    cell: ProbeCell
    """Which."""
    items: int
    """How many."""
    margin: float
    """With the evidence, nats."""
    margin_ablated: float
    """Without."""
    correct: float
    """Share of right answers with the evidence, 0..1."""
    correct_ablated: float
    """Without."""
    is_new: bool
    """False if an earlier call had finished it."""


class Probe:
    """One probe of one model; `run` does the work."""

    def __init__(
        self,
        model: str | Path,
        results: str | Path,
        options: ProbeOptions,
        *,
        backend: ProbeBackend | None = None,
        allow_beyond_positions: bool = False,
    ) -> None:
        """Make the items and check everything that can be checked before the model is loaded.

        Args:
            model: Hugging Face folder.
            results: folder to write, or to go on with.
            options: what to ask.
            backend: how to run the model.
            allow_beyond_positions: whether items may exceed the model's max_position_embeddings.

        Raises:
            ValueError: no model, a device that is not there, items that cannot be made or do not fit the
                model, or a folder with the probe of another model or other items.
        """
        self.model, self.results = Path(model), Path(results)
        self.backend = backend or ProbeBackend()
        require_model_folder(self.model)
        self.how = resolve(Backend(device=self.backend.device, dtype=self.backend.dtype), self.model)
        identity = model_identity(self.model)
        self.tokenizer = load_tokenizer(self.model)
        positions = None if allow_beyond_positions else max_positions(self.model)
        self.source = options.item_source(self.tokenizer, positions)
        self.counts, digest = self._count(positions)
        kinds: dict[str, int] = {}
        for cell, count in self.counts.items():
            kinds[cell.kind] = kinds.get(cell.kind, 0) + count
        self.info: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": identity,
            "provenance": read_provenance(self.model),
            "options": options.record(),
            "items": {"sha256": digest, "kinds": kinds},
            "dtype": self.how.dtype,
        }
        require_same_probe(self.results, self.info)

    def _count(self, positions: int | None) -> tuple[dict[ProbeCell, int], str]:
        """Items of every cell, each of which must fit the model, and one hash for all."""
        counts: dict[ProbeCell, int] = {}
        digest = hashlib.sha256()
        with progress_bar("items", len(self.source.cells), "cell") as bar:
            for cell in self.source.cells:
                items = self.source.items_of(cell)
                for item in items:
                    encoded = encode_item(item, self.tokenizer)
                    if positions is not None and encoded.window > positions:
                        raise ValueError(
                            f"item {item.id!r} of {cell} takes {encoded.window:,} positions, the model's "
                            f"max_position_embeddings is {positions:,}: choose shorter ones, or "
                            "--allow-beyond-positions to extrapolate"
                        )
                    digest.update(f"{cell}/{item.id} {encoded.sha256}\n".encode())
                counts[cell] = len(items)
                bar.update()
        return counts, digest.hexdigest()

    def run(self, on_cell: Callable[[CellSummary], object] = lambda _: None) -> list[CellSummary]:
        """Score every cell that is not there yet; `on_cell` is called after each.

        Raises:
            ValueError: a result that is damaged, or no finite number, or another call is at this probe.
        """
        self.results.mkdir(parents=True, exist_ok=True)
        with held_output(self.results / "probe", "evaluating it", "choose another --output"):
            require_same_probe(self.results, self.info)
            return self._run(on_cell)

    def _run(self, on_cell: Callable[[CellSummary], object]) -> list[CellSummary]:
        self._write_record(finished=False)
        done = {kind: read_results(self.results, kind) for kind in self.info["items"]["kinds"]}
        found = []
        with progress_bar("probe", 2 * sum(self.counts.values()), "prompt") as bar:
            for cell, count in self.counts.items():
                there = [result for result in done[cell.kind] if cell_of(result) == cell]
                is_new = len(there) != count
                if is_new:
                    there = self._score(cell, bar.update)
                    done[cell.kind] += there
                    write_results(self.results, cell.kind, done[cell.kind])
                else:
                    bar.update(2 * count)
                found.append(_summary(cell, there, is_new))
                on_cell(found[-1])
        self._write_record(finished=True)
        return found

    def _score(self, cell: ProbeCell, on_prompt: Callable[[int], object]) -> list[dict[str, Any]]:
        scored = score_items(
            self.loaded,
            self.tokenizer,
            self.source.items_of(cell),
            batch_tokens=self.backend.batch_tokens,
            on_prompt=on_prompt,
        )
        return [result.to_json() for result in scored]

    def _write_record(self, *, finished: bool) -> None:
        about = {
            "backend": {"device": self.how.device, "batch_tokens": self.backend.batch_tokens},
            "versions": self.how.versions,
        }
        write_json(self.results / PROBE, {**self.info, **about, "finished": finished})

    @cached_property
    def loaded(self) -> Any:
        """The model, loaded when the first cell needs it."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self.model, dtype=self.how.dtype, trust_remote_code=False, local_files_only=True
        )
        return model.to(self.how.device).eval()


def _summary(cell: ProbeCell, results: list[dict[str, Any]], is_new: bool) -> CellSummary:
    measures = ("margin", "margin_ablated", "correct", "correct_ablated")
    means = {name: sum(result[name] for result in results) / len(results) for name in measures}
    return CellSummary(cell=cell, items=len(results), is_new=is_new, **means)
