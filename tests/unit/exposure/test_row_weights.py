"""How weights are dealt out to a row, against loops over its targets."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from plans import plain_bucket

from megatron_exact.exposure import RowScores, RowTargets, RowWeights, bucket_lower_bounds
from megatron_exact.exposure.row_weights import (
    ContextWeights,
    PermutedWeights,
    PositionWeights,
    TableWeights,
)

S = 40
EDGES = bucket_lower_bounds(S)
WEIGHTS = np.array([0.0, 0.5, 1.25, 3.0])
COUNTS = np.array([7, 0, 2, 5])


@dataclass
class PlainTargets:
    """A row written out."""

    row_id: int
    supervised: NDArray[np.bool_]
    effective_context: NDArray[np.int64]
    random_places: NDArray[np.int64]

    @property
    def scores(self) -> RowScores:
        raise ValueError("no scores")

    def by_context[T: np.generic](self, of_context: NDArray[T]) -> NDArray[T]:
        return of_context[self.effective_context]


def a_row(seed: int) -> PlainTargets:
    rng = np.random.default_rng(seed)
    supervised = rng.random(S) < 0.3
    supervised[rng.permutation(S)[: max(0, supervised.sum() - COUNTS.sum())]] = False
    places = rng.permutation(COUNTS.sum())[: supervised.sum()]
    supervised[np.flatnonzero(supervised)[places.size :]] = False
    return PlainTargets(seed, supervised, rng.integers(0, S + 1, S), places)


def make(kind: type[TableWeights]) -> TableWeights:
    return kind(row_tokens=S, lower_bounds=EDGES, counts=COUNTS, weights=WEIGHTS)


def plain_weight(rule: RowWeights, row: PlainTargets, position: int) -> float:
    if isinstance(rule, ContextWeights):
        return WEIGHTS[plain_bucket(int(row.effective_context[position]), S)]
    if isinstance(rule, PositionWeights):
        return WEIGHTS[plain_bucket(position + 1, S)]
    dealt = [weight for weight, count in zip(WEIGHTS, COUNTS, strict=True) for _ in range(count)]
    return dealt[row.random_places[row.supervised[:position].sum()]]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
@pytest.mark.parametrize("kind", [ContextWeights, PositionWeights, PermutedWeights])
def test_a_row_against_a_loop(kind: type[TableWeights], seed: int) -> None:
    rule, row = make(kind), a_row(seed)
    asked: RowTargets = row  # the test's row answers what a rule may ask
    found = pickle.loads(pickle.dumps(rule)).weigh_row(asked)  # noqa: S301
    assert (found.dtype, found.shape) == (np.float32, (S,))
    assert np.isfinite(found).all()
    for position in np.flatnonzero(row.supervised).tolist():
        assert found[position] == np.float32(plain_weight(rule, row, position))


@pytest.mark.parametrize("kind", [ContextWeights, PositionWeights, PermutedWeights])
def test_a_row_is_not_the_rules_own_array(kind: type[TableWeights]) -> None:
    rule, row = make(kind), a_row(1)
    first = rule.weigh_row(row)
    expected = first.copy()
    first[:] = -1
    assert (rule.weigh_row(row) == expected).all()


def test_mean_weight() -> None:
    assert make(ContextWeights).mean_weight == (2 * 1.25 + 5 * 3) / 14
    empty = ContextWeights(row_tokens=S, lower_bounds=EDGES, counts=np.zeros(4, np.int64), weights=WEIGHTS)
    assert empty.mean_weight == 1
