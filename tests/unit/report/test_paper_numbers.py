"""The paper's tables as data: whole, and consistent where the paper is."""

from __future__ import annotations

import pytest

from megatron_exact.report.paper_numbers import (
    CONTROL_RULES,
    FOLDER,
    MEAN_LIFTS,
    Estimate,
    controls,
    corpora,
    find_paper_model,
    main_results,
    paper_models,
    standard_qa,
)


def test_table_1_has_all_rows_and_its_differences_are_those_of_its_sides() -> None:
    rows = main_results()
    assert len(rows) == 28
    assert len(paper_models()) == 7
    assert len({(row.model, row.suite, row.regime) for row in rows}) == 28
    for row in rows:
        estimate = row.estimate
        assert estimate.baseline is not None
        assert estimate.treatment is not None
        assert estimate.ci95 is not None
        assert estimate.treatment - estimate.baseline == pytest.approx(estimate.delta, abs=0.0151)
        assert estimate.ci95[0] < estimate.delta < estimate.ci95[1]


def test_two_intervals_of_table_1_hold_0() -> None:
    crossing = [(row.model, row.suite, row.regime) for row in main_results() if row.estimate.includes_zero]
    assert crossing == [("Qwen2.5-7B", "nolima", "trained"), ("LLaMA-3.2-1B", "ruler", "extrapolated")]


def test_three_intervals_of_table_3_hold_0() -> None:
    assert len(controls()) == 4 * len(CONTROL_RULES)
    crossing = [key for key, estimate in controls().items() if estimate.includes_zero]
    assert crossing == [
        ("random-same-mass", "nolima", "trained"),
        ("random-same-mass", "ruler", "trained"),
        ("packed-position", "ruler", "extrapolated"),
    ]


def test_table_3_repeats_the_differences_of_table_1() -> None:
    for row in main_results():
        if row.model == "LLaMA-3.1-8B":
            assert controls()["exact", row.suite, row.regime].delta == row.estimate.delta
            assert controls()["exact", row.suite, row.regime].ci95 != row.estimate.ci95  # as printed


def test_mean_lifts_of_the_text_follow_from_table_1() -> None:
    for (suite, regime), percent in MEAN_LIFTS.items():
        lifts = [
            row.estimate.lift_percent or 0.0
            for row in main_results()
            if (row.suite, row.regime) == (suite, regime)
        ]
        assert round(sum(lifts) / len(lifts)) == percent


def test_the_macro_average_of_table_2() -> None:
    rows = {name: estimate for name, estimate in standard_qa().items() if name != "Macro"}
    assert len(rows) == 6
    baseline = sum(row.baseline or 0.0 for row in rows.values()) / 6
    treatment = sum(row.treatment or 0.0 for row in rows.values()) / 6
    assert round(baseline, 2) == 51.86  # the paper prints 51.85
    assert round(treatment, 2) == standard_qa()["Macro"].treatment
    assert round(sum(row.delta for row in rows.values()) / 6, 2) == standard_qa()["Macro"].delta


def test_models_are_found_whatever_their_case() -> None:
    assert find_paper_model("llama-3.1-8b") == "LLaMA-3.1-8B"
    assert find_paper_model("Qwen2.5-0.5B-Instruct") is None
    assert {model for _, models, _ in corpora() for model in models.split("; ")} == {
        model.replace("LLaMA", "Llama") for model in paper_models()
    }


def test_the_data_say_where_they_come_from() -> None:
    assert "arXiv 2605.10544" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    ("ci95", "holds"),
    [((-1.0, 1.0), True), ((0.0, 1.0), True), ((0.01, 1.0), False), ((-2.0, -1.0), False)],
)
def test_holding_0(ci95: tuple[float, float], holds: bool) -> None:
    assert Estimate(baseline=1, treatment=1, delta=0, ci95=ci95).includes_zero is holds
    assert not Estimate(baseline=1, treatment=1, delta=0, ci95=None).includes_zero


def test_lift_of_nothing_is_unknown() -> None:
    assert Estimate(baseline=0.0, treatment=1, delta=1, ci95=None).lift_percent is None
