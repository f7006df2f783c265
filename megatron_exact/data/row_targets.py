"""The targets of a row, as a weighting rule asks for them (`exposure.RowTargets`)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.manifest import Manifest
from megatron_exact.data.rows import Row
from megatron_exact.data.shuffle import KeyedPermutation, derive_key
from megatron_exact.data.target_layout import TargetLayout
from megatron_exact.exposure import RowScores


class TargetOrder:
    """The supervised targets of a split in the order of the plan, and the random place of each.

    A function of pack and seed alone. Holds one int64 a row at most; a pickle holds nothing of it and
    counts again.

    Args:
        pack_dir: a packed dataset.
        manifest: of it.
        split: `train` or `validation`.
        seed: of the permutation.
        source_root: where the corpora lie now, if not where the manifest says.

    Raises:
        ValueError: a pack whose targets cannot be counted, see `TargetLayout`.
    """

    def __init__(
        self,
        pack_dir: str | Path,
        manifest: Manifest,
        split: str,
        *,
        seed: int,
        source_root: str | Path | None = None,
    ) -> None:
        self._arguments = (pack_dir, manifest, split, seed, source_root)
        self._row_tokens = manifest.row_tokens
        self._before = TargetLayout(pack_dir, manifest, split, source_root).targets_before()
        key = derive_key("random places of targets", seed)
        self.permutation = KeyedPermutation(manifest.splits[split].supervised_targets, key)

    def targets_before(self, row: int) -> int:
        """Supervised targets before row `row`, in [0, rows]."""
        return row * self._row_tokens if self._before is None else int(self._before[row])

    def places(self, row: int) -> NDArray[np.int64]:
        """Random place of each supervised target of a row, [targets], in [0, n) for n in the split."""
        return self.permutation.part(self.targets_before(row), self.targets_before(row + 1))

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self._arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pack_dir, manifest, split, seed, source_root = state["arguments"]
        self.__init__(pack_dir, manifest, split, seed=seed, source_root=source_root)  # type: ignore[misc]


class ScoreSource(Protocol):
    """Stored scores of the rows of one split; has to survive a pickle to a data worker."""

    def read(self, row: int) -> RowScores:
        """Scores of row `row` of the plan."""


class TargetsOfRow:
    """See `exposure.RowTargets`; `row` is row `row_id` of the plan."""

    def __init__(
        self, row: Row, row_id: int, *, order: TargetOrder | None = None, scores: ScoreSource | None = None
    ) -> None:
        self.row_id = row_id
        self._row = row
        self._order = order
        self._scores = scores

    @cached_property
    def supervised(self) -> NDArray[np.bool_]:
        """[S]."""
        return self._row.loss_mask > 0

    @cached_property
    def effective_context(self) -> NDArray[np.int64]:
        """[S]."""
        return self._row.by_context(np.arange(self._row.tokens.size + 1))

    @property
    def random_places(self) -> NDArray[np.int64]:
        """[supervised targets]."""
        assert self._order is not None, "the dataset prepares what the rule says it uses"
        return self._order.places(self.row_id)

    @cached_property
    def scores(self) -> RowScores:
        """Stored scores."""
        if self._scores is None:
            raise ValueError("this weighting rule needs stored scores: name them with --confidence-scores")
        return self._scores.read(self.row_id)

    def by_context[T: np.generic](self, of_context: NDArray[T]) -> NDArray[T]:
        """[S]."""
        return self._row.by_context(of_context)
