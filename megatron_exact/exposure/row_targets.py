"""What a weighting rule may ask about the targets of one packed row.

`data/row_targets.py` answers. Nothing is computed before it is asked for, so a rule pays for what it uses:
a rule of buckets costs one table look-up a segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """What files say about the targets of one row (`data/score_files.py`)."""

    difference: NDArray[np.floating]
    """[S], cross-entropy with the whole effective context visible minus that with a short window of it,
    nats; 0 where the two are the same or the target is unsupervised."""


class RowTargets(Protocol):
    """The targets of one row of S inputs: target j is the token that input j predicts."""

    @property
    def row_id(self) -> int:
        """Row of the plan."""

    @property
    def supervised(self) -> NDArray[np.bool_]:
        """[S], whether the target's loss counts."""

    @property
    def effective_context(self) -> NDArray[np.int64]:
        """[S], in [0, S]; any value where unsupervised."""

    @property
    def random_places(self) -> NDArray[np.int64]:
        """[supervised targets of the row], in [0, n) for a split of n supervised targets.

        A keyed bijection of [0, n) applied to the numbers of the row's targets in the order of the plan: in
        an epoch every place occurs once, and a target has the same place in every epoch, on every layout.
        """

    @property
    def scores(self) -> RowScores:
        """Stored scores of the row.

        Raises:
            ValueError: the job was given none.
        """

    def by_context[T: np.generic](self, of_context: NDArray[T]) -> NDArray[T]:
        """`of_context[effective_context]` without looking anything up: a slice a segment is copied.

        Args:
            of_context: [S + 1], value at context 0, 1, ..., S.

        Returns:
            [S], of the same dtype, of its own.
        """
