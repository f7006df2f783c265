"""The page on place, mass and scale: its words follow invented results, and it is that of its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.miniature import controls
from megatron_exact.report.page import markdown_page

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"


def measure(delta: float, half: float = 0.2) -> dict[str, Any]:
    return {
        "baseline": 1.0,
        "treatment": 1.0 + delta,
        "delta": delta,
        "ci95": [delta - half, delta + half],
        "detectable": 0.4,
        "pair_deltas": [delta - 0.01, delta, delta + 0.01, delta],
    }


def results(constant: float) -> dict[str, Any]:
    arms = ["standard", "exact-1", "constant-1"]
    entry = {"margin": measure(constant), "correct": measure(constant)}
    loss = {label: {"delta": 2.0, "ci95": [1.0, 3.0]} for label in controls.LOSSES}
    return {
        "name": controls.MAIN,
        "file": "miniature.toml",
        "seeds": [1, 2, 3, 4],
        "commits": ["abc"],
        "arms": [{"name": name, "mean_weight": 1.25, "largest_weight": 3.5} for name in arms],
        "against": {"standard": {"constant-1": entry}},
        "losses": {"constant-1": loss},
    }


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        (1.0, "lies above standard in the far margin: +1.00 [+0.80, +1.20] nats. Far"),
        (-1.0, "lies below standard in the far margin: -1.00 [-1.20, -0.80] nats. Far"),
        (
            0.1,
            "cannot be told apart from standard in the far margin: +0.10 [-0.10, +0.30] ? nats; 0.40 would "
            "have been seen. Far right answers +0.1 [-0.1, +0.3] ?. Validation loss +2.0 [+1.0, +3.0] thou",
        ),
    ],
)
def test_words_follow_the_interval(delta: float, words: str) -> None:
    text = markdown_page(controls.controls_page({controls.MAIN: results(delta)}))
    assert f"Is it the scale of the loss? constant-1 {words}" in text
    assert "| constant-1 | every target alike: the scale of the loss | 1.250 | 3.50 |" in " ".join(
        text.split()
    )
    assert "Evidence-aware" not in text, "an experiment that was not run has no section"


def test_an_undecided_difference_says_how_many_seeds_show_it() -> None:
    """Four seeds whose differences spread by 0.5 around 0.5: `plan_power.py --deltas` says 8."""
    content = results(0.5)
    margin = measure(0.5, half=0.8)
    margin["pair_deltas"] = [0.0, 0.5, 1.0, 0.5]
    content["against"]["standard"]["constant-1"]["margin"] = margin
    assert "and 8 seeds would show this difference with 80 % power" in markdown_page(
        controls.controls_page({controls.MAIN: content})
    )


def test_every_arm_of_the_files_has_a_name() -> None:
    for name in (controls.MAIN, controls.EVIDENCE, controls.NEAR_EVIDENCE):
        file = ROOT / controls.EXAMPLES / f"{name.replace('-', '_')}.toml"
        experiment = controls.read_experiment_file(file)
        assert experiment.name == name
        assert {arm.name for arm in experiment.arms[1:]} <= set(controls.ABOUT)


def test_the_page_is_that_of_its_numbers() -> None:
    content = json.loads((DOCS / controls.RESULTS).read_text())
    expected = markdown_page(controls.controls_page(content))
    assert (DOCS / "controls.md").read_text() == expected, "write it again: --page docs"


def test_results_without_the_main_experiment_are_refused() -> None:
    with pytest.raises(ValueError, match="no results of miniature: give its folder"):
        controls.controls_page({})
