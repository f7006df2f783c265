"""`plan-power` from the command line, on comparisons of made-up results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from written_results import write_probe, write_results

from megatron_exact.commands.evaluations import compare
from megatron_exact.commands.experiments import plan_power


def results(folder: Path, seed: int, lift: float) -> str:
    """Two tasks of 40 examples, easy and hard ones alike for all models."""
    rng, easy = np.random.default_rng(seed), np.random.default_rng(0)
    cells = {}
    for task in ("vt", "cwe"):
        chance = np.clip(easy.random(40) + lift, 0, 1)
        cells["ruler", task, 1024] = (rng.random(40) < chance).astype(float).tolist()
    return str(write_results(folder, cells))


@pytest.fixture
def comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    sides = [
        [results(tmp_path / f"{side}{seed}", 2 * seed + (side == "b"), lift) for seed in range(6)]
        for side, lift in (("a", 0.0), ("b", 0.1))
    ]
    output = tmp_path / "comparison"
    words = ["--baseline", *sides[0], "--treatment", *sides[1], "--trained-lengths", "1K"]
    compare([*words, "--output", str(output), "--resamples", "200"])
    printed = capsys.readouterr().out
    assert "Smallest difference that would have been seen with 80 % power:" in printed
    (entry,) = (
        one
        for one in json.loads((output / "comparison.json").read_text())["aggregates"]
        if one["regime"] == "trained"
    )
    assert f"ruler trained: {entry['detectable']:.2f} points" in printed
    assert f"ruler trained: {entry['detectable']:.2f} points" in (output / "comparison.md").read_text()
    return output


def test_from_a_comparison(comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(comparison), "--only", "ruler trained", "--effect", "10", "--pairs", "4,6,12"]
    plan_power([*words, "--examples", "1,4", "--simulations", "100", "--json"])
    (plan,) = json.loads(capsys.readouterr().out)
    assert (plan["average"], plan["unit"], plan["pairs"]) == ("ruler trained", "points", 6)
    seen = {(one["pairs"], one["examples_factor"]): one["effect"] for one in plan["detectable"]}
    assert seen[12, 4] < seen[12, 1] < seen[6, 1] < seen[4, 1]
    stored = json.loads((comparison / "comparison.json").read_text())["aggregates"]
    detectable = next(one["detectable"] for one in stored if one["regime"] == "trained")
    assert seen[6, 1] == pytest.approx(detectable, rel=0.25)  # components are cut at 0
    for needed in plan["pairs_needed"]:
        assert needed["pairs"] >= 7
        assert needed["simulated_power"] > 0.6
    plan_power(words)
    text = capsys.readouterr().out
    assert "a difference of 10 needs " in text
    assert "*" in text


def test_the_units_of_a_probe_are_its_sentence_forms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)

    def plan(forms: list[str]) -> str:
        runs = []
        for name in ("a", "b"):
            rows = [(float(margin), 0.0, 1, 0) for margin in rng.normal(size=8)]
            runs.append(
                str(write_probe(tmp_path / f"{name}{len(forms)}", {("field", 64, 256): rows}, forms=forms))
            )
        output = tmp_path / f"comparison{len(forms)}"
        compare(["--baseline", runs[0], "--treatment", runs[1], "--output", str(output)])
        capsys.readouterr()
        plan_power([str(output), "--only", "effect", "--examples", "1,2"])
        return capsys.readouterr().out

    by_form = plan(["x", "y", "z", "w"] * 2)
    assert "sentence forms x 2" in by_form
    assert "about other sentence forms only" in by_form
    assert "example" not in by_form
    by_item = plan([])
    assert "items x 2" in by_item
    assert "form" not in by_item


def test_from_the_differences_of_pilot_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    # The far margin of the miniature at alpha 0.15 (docs/miniature/results.json)
    plan_power(["--deltas=-0.042,0.249,0.428,0.144,0.526", "--effect", "0.26"])
    assert "a difference of 0.26 needs 9 seeds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the folder of a comparison, or --deltas"),
        (["x", "--deltas", "1,2"], "give the folder of a comparison, or --deltas"),
        (["--deltas", "1"], "1 differences of pilot seeds"),
        (["--deltas", "1,x"], "'1,x' is not a list of numbers"),
        (["--deltas", "1,2", "--power", "2"], "'2' is not a power"),
        (["--deltas", "1,2", "--simulations", "5"], "--simulations checks what --effect needs"),
        (["--deltas", "1,2", "--effect", "1", "--simulations", "5"], "--deltas has none"),
    ],
)
def test_what_cannot_be_planned(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_power(words)


def test_a_comparison_that_lost_its_results(comparison: Path) -> None:
    with pytest.raises(ValueError, match=r"--only nolima: there are ruler"):
        plan_power([str(comparison), "--only", "nolima"])
    path = comparison / "comparison.json"
    path.write_text(path.read_text().replace('"aggregates"', '"aggregate"'))
    with pytest.raises(ValueError, match=r"comparison\.json is not a comparison"):
        plan_power([str(comparison)])
