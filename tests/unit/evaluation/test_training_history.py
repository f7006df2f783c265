"""What a comparison says of how a model came to be, from its export's record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from written_results import provenance, write_results

from megatron_exact.evaluation.comparison import compare_runs
from megatron_exact.evaluation.pairing import is_tuned_on_answers, trained_window, training_history

FIRST: dict[str, Any] = {
    "weighting": {"rule": "exact", "parameters": {"alpha": 0.15}},
    "row_tokens": 4096,
    "corpora": [{"name": "web", "licence": "odc-by"}, {"name": "books", "licence": None}],
    "start_checkpoint": {"sha256": "a", "run": None},
}
TUNING: dict[str, Any] = {
    "weighting": {"rule": "none"},
    "row_tokens": 2048,
    "corpora": [{"name": "dolly", "licence": "cc-by-sa-3.0"}],
    "start_checkpoint": {"sha256": "b", "run": FIRST},
}


def test_trainings_come_in_order_with_all_their_corpora() -> None:
    record = {"preset": "qwen2.5-0.5b", "import": {"licence": "apache-2.0"}, "run": TUNING}
    assert training_history(record) == {
        "preset": "qwen2.5-0.5b",
        "training": [
            {"rule": "exact", "parameters": {"alpha": 0.15}, "row_tokens": 4096},
            {"rule": "none", "parameters": {}, "row_tokens": 2048},
        ],
        "licences": {
            "model": "apache-2.0",
            "corpora": [
                {"name": "web", "licence": "odc-by"},
                {"name": "books", "licence": None},
                {"name": "dolly", "licence": "cc-by-sa-3.0"},
            ],
        },
    }


def test_a_model_without_a_record_has_no_history() -> None:
    empty = {"preset": None, "training": [], "licences": {"model": None, "corpora": []}}
    assert training_history(None) == empty
    assert training_history({"run": None, "import": None}) == empty


def test_the_window_of_a_tuned_model_is_that_of_its_longest_training() -> None:
    assert trained_window({"run": TUNING}) == 4096
    assert trained_window({"run": FIRST}) == 4096
    assert (
        trained_window({"run": {**FIRST, "row_tokens": 1024, "start_checkpoint": {"run": TUNING}}}) == 4096
    )
    for nothing in (None, {}, {"run": None}, {"run": {"seed": 1}}):
        assert trained_window(nothing) is None


def test_a_record_tells_whether_answers_were_supervised() -> None:
    tuned = {**TUNING, "supervision": {"targets": "answers", "template_sha256": "c"}}
    assert is_tuned_on_answers({"run": tuned})
    assert is_tuned_on_answers({"run": {**FIRST, "start_checkpoint": {"run": tuned}}})
    for nothing in (None, {"run": None}, {"run": TUNING}, {"run": {**FIRST, "supervision": None}}):
        assert not is_tuned_on_answers(nothing)


def test_a_comparison_carries_it(tmp_path: Path) -> None:
    cells = {("ruler", "vt", 1024): [0.0, 1.0]}
    sides = [
        write_results(tmp_path / rule, cells, provenance=provenance(weighting={"rule": rule}))
        for rule in ("none", "exact")
    ]
    content = compare_runs([sides[0]], [sides[1]])
    rules = [content["runs"][0][side]["training"][0]["rule"] for side in ("baseline", "treatment")]
    assert rules == ["none", "exact"]
