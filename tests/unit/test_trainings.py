"""The trainings behind a model, walked from the record of the last one."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_exact.trainings import trained_corpora, trainings

FIRST: dict[str, Any] = {"seed": 1, "corpora": [{"name": "web", "licence": None}], "start_checkpoint": None}
SECOND: dict[str, Any] = {
    "seed": 2,
    "corpora": [{"name": "books", "licence": "mit"}, {"name": "web", "licence": "odc-by"}],
    "start_checkpoint": {"sha256": "a", "run": FIRST},
}
LAST: dict[str, Any] = {
    "seed": 3,
    "corpora": [{"name": "books", "licence": "mit"}],
    "start_checkpoint": {"sha256": "b", "run": SECOND},
}


def test_trainings_come_first_one_first() -> None:
    assert [record["seed"] for record in trainings(LAST)] == [1, 2, 3]
    assert trainings(FIRST) == [FIRST]


@pytest.mark.parametrize("run", [None, {}, "run", []])
def test_an_import_has_none(run: Any) -> None:
    assert trainings(run) == trained_corpora(run) == []


@pytest.mark.parametrize("start", [None, "somewhere", {}, {"sha256": "a"}, {"run": None}, {"run": {}}])
def test_a_start_without_a_record_ends_the_walk(start: Any) -> None:
    assert [record["seed"] for record in trainings({"seed": 4, "start_checkpoint": start})] == [4]


def test_corpora_are_united_and_no_licence_hides_another() -> None:
    assert trained_corpora(LAST) == [
        {"name": "web", "licence": None},
        {"name": "books", "licence": "mit"},
        {"name": "web", "licence": "odc-by"},
    ]
