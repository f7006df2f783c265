"""The page and what it says about outcomes, from invented results."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.miniature.experiment import (
    ARMS,
    DISTANT,
    FAR,
    FULL,
    NEAR,
    NEARBY,
    SHIPPED_BASE,
    base_hashes,
    choose_arms,
    exact_arm,
)
from examples.miniature.page import (
    FIGURES,
    RESULTS,
    fill_in,
    page_text,
    require_settings_of_page,
    write_miniature_page,
)
from examples.miniature.results import (
    between_arms,
    direction,
    hull,
    marked,
    read_results_file,
    row_title,
    signed,
    student_interval,
    verdict,
    weighted_shares,
)
from megatron_exact.report.page import CodeBlock, Page, markdown_page

LABELS = ["0-7", "8-15", "16-31", "32-63", "64-127", "128-255", "256-512"]


def measure(delta: float, half: float = 0.5) -> dict[str, Any]:
    return {
        "baseline": 1.0,
        "treatment": 1.0 + delta,
        "delta": delta,
        "ci95": [delta - half, delta + half],
        "pair_deltas": [delta, delta],
    }


def loss(delta: float) -> dict[str, Any]:
    return {
        "baseline": 2.0,
        "treatment": 2.0 + delta,
        "delta": delta,
        "interval": [delta - 0.1, delta + 0.1],
    }


def arm_entry(arm: Any, delta: float) -> dict[str, Any]:
    measures = {name: measure(delta) for name in ("margin", "effect", "correct")}
    return {
        "name": arm.name,
        "title": arm.title,
        "rule": arm.rule,
        "alpha": arm.alpha,
        "length": arm.length,
        "mean_weight": 1.6 if arm.rule == "packed-position" else 1.2,
        "weights": [1.0] * 5 + [1.1, 1.3] if arm.rule == "exact" else None,
        "probe": {
            "pairing": {"verified": True, "statement": "paired"},
            "distances": [{"distance": place, "items": 4, **measures} for place in FULL.distances],
            "ranges": [{"distances": list(span), "items": 4, **measures} for span in (NEARBY, FAR)],
            "methods": {},
        },
        "losses": {
            "buckets": [loss(0.001 * place) for place in range(len(LABELS))],
            **{part: loss(0.002) for part in ("below", "tail", "all")},
        },
    }


def invented(deltas: dict[str, float]) -> dict[str, Any]:
    """Results in which the far margin of an arm differs from standard by `deltas` (0 where not named)."""
    exposure = {
        "lower": [0, 8, 16, 32, 64, 128, 256],
        "labels": LABELS,
        "tau": 128,
        "share": [0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.1],
        "targets": 1_000,
    }
    return {
        "format_version": 1,
        "settings": {
            "seeds": 5,
            "training": asdict(FULL.long),
            "corpora": {},
            "items_per_distance": 4,
            "resamples": 10,
            "model": {"num_layers": 2, "hidden_size": 128},
        },
        "base": [
            {"distance": place, "margin": 1.0, "effect": 1.0, "correct": 50.0} for place in FULL.distances
        ],
        "base_sha256": base_hashes(SHIPPED_BASE),
        "designs": {
            design: {
                "exposure": exposure,
                "questions": {"number": 4_000, "far_from": 192, "far_share": 0.075},
                "baseline": arms[0].name,
                "arms": [arm_entry(arm, deltas.get(f"{design} {arm.name}", 0.0)) for arm in arms[1:]],
            }
            for design, arms in ARMS.items()
        },
        "versions": {"torch": "2", "megatron-core": "0"},
        "git_commit": "0123abc",
        "machine": {"cpu": "a processor", "cores": 2, "system": "Linux"},
        "seconds": {"seconds": 60.0, "number": 2},
    }


def written(folder: Path, results: dict[str, Any]) -> str:
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    return write_miniature_page(path, folder).read_text(encoding="utf-8")


def test_words_follow_the_intervals(tmp_path: Path) -> None:
    page = written(
        tmp_path,
        invented({f"{DISTANT} exact-4": 3.0, f"{DISTANT} exact-1": -3.0, f"{NEAR} exact-1": -2.0}),
    )
    assert "Alpha 4: far margin +3.00 [+2.50, +3.50], above standard; far right answers +3.0" in page
    assert "Alpha 1: far margin -3.00 [-3.50, -2.50], below standard" in page
    assert "Alpha 0.15: far margin +0.00 [-0.50, +0.50], not significantly different from standard" in page
    assert "the far margin of EXACT, alpha 1 (exaggerated) lies below standard's" in page
    assert "the far margin of EXACT, alpha 0.15" not in page
    assert "is 1.20 for EXACT and 1.60 for packed position" in page
    assert "packed position has 3.0 times EXACT's extra mass" in page
    assert "7.5% of the 4,000 questions" in page
    assert "An arm reads 327,680 tokens of these rows" in page
    assert "change the far margin by +0.00 [-0.50, +0.50] nats, not significantly different" in page
    assert "standard, twice the steps minus EXACT, alpha 1: +3.00 [+3.00, +3.00], above it" in page
    assert "standard, twice the steps minus EXACT, alpha 4: -3.00 [-3.00, -3.00], below it" in page
    assert "uniform tail, alpha 1 minus EXACT, alpha 1: +3.00 [+3.00, +3.00], above it" in page
    order = re.search(r"By far margin minus standard: (.*)", page)
    assert order is not None
    assert order[1].index("random same-mass") < order[1].index("EXACT, alpha 1")
    for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG"), name


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    docs = Path(__file__).parents[3] / "docs"
    results, page = docs / FIGURES / RESULTS, docs / "miniature.md"
    assert results.exists() == page.exists()
    if page.exists():
        assert page.read_text(encoding="utf-8") == page_text(read_results_file(results))


def test_null_results_are_told() -> None:
    page = page_text(invented({}))
    assert page.count(", not significantly different from standard") == 7
    assert page.count("+0.00 [+0.00, +0.00], not significant.") == 7
    assert "No arm differs significantly from standard in any of these. That does not prove" in page


@pytest.mark.parametrize(("answers", "is_chance"), [(3.2, True), (65.0, False)])
def test_a_counter_case_at_chance_is_told(answers: float, is_chance: bool) -> None:
    results = invented({})
    for arm in results["designs"][NEAR]["arms"]:
        far_range = arm["probe"]["ranges"][1]
        assert far_range["distances"] == list(FAR)
        far_range["correct"] = {**far_range["correct"], "baseline": answers}
    page = page_text(results)
    assert f"far margin 1.00 and {answers:.1f} % right" in page
    assert "1.0 % right (the base model: 50.0 %)" in page
    assert ("Far away that is chance" in page) == is_chance
    assert ("nearby it loses part of what the base model had" in page) == is_chance


@pytest.mark.parametrize("what", ["seeds", "design", "arm"])
def test_a_page_of_half_an_experiment_is_refused(tmp_path: Path, what: str) -> None:
    results = invented({})
    if what == "seeds":
        results["settings"]["seeds"] = 1
    elif what == "design":
        del results["designs"][NEAR]
    else:
        results["designs"][DISTANT]["arms"].pop()
    with pytest.raises(ValueError, match="the page needs every arm over several seeds"):
        written(tmp_path, results)
    assert not (tmp_path / "miniature.md").exists()


def test_a_page_of_other_settings_is_refused(tmp_path: Path) -> None:
    results = invented({})
    results["settings"]["training"]["learning_rate"] = 5e-3
    with pytest.raises(ValueError, match=r"these were changed: learning_rate 0\.005;"):
        written(tmp_path, results)


def test_a_page_of_another_base_is_refused(tmp_path: Path) -> None:
    results = invented({})
    results["base_sha256"]["model.safetensors"] = "0" * 64
    with pytest.raises(ValueError, match=r"these results are of another one: run .* without --base"):
        written(tmp_path, results)
    del results["base_sha256"]
    with pytest.raises(ValueError, match="of another one"):
        written(tmp_path, results)


def test_what_no_page_could_be_written_of_is_refused_before_the_runs(tmp_path: Path) -> None:
    require_settings_of_page(FULL, SHIPPED_BASE)
    few = replace(FULL, arms=choose_arms(ARMS, designs=None, names="exact-1"))
    with pytest.raises(ValueError, match=r"missing: exact-0\.15, exact-4, exact-normalized"):
        require_settings_of_page(few, SHIPPED_BASE)
    half = replace(FULL, arms=choose_arms(ARMS, designs=DISTANT, names=None))
    with pytest.raises(ValueError, match="missing: near:"):
        require_settings_of_page(half, SHIPPED_BASE)
    with pytest.raises(ValueError, match="missing: seeds"):
        require_settings_of_page(replace(FULL, seeds=1), SHIPPED_BASE)
    with pytest.raises(ValueError, match=r"learning_rate 0\.004"):
        require_settings_of_page(replace(FULL, long=replace(FULL.long, learning_rate=4e-3)), SHIPPED_BASE)
    for name in base_hashes(SHIPPED_BASE):
        (tmp_path / name).write_bytes((SHIPPED_BASE / name).read_bytes())
    require_settings_of_page(FULL, tmp_path)  # the same files elsewhere
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="of another one"):
        require_settings_of_page(FULL, tmp_path)


def test_results_that_are_none_are_named(tmp_path: Path) -> None:
    other = tmp_path / "pyproject.toml"
    for content in (b"[project]\n", b"\xff\xfe"):
        other.write_bytes(content)
        with pytest.raises(ValueError, match=r"pyproject\.toml is not (JSON|UTF-8).*name a results\.json"):
            read_results_file(other)
    other.write_text("[]")
    with pytest.raises(ValueError, match=r"pyproject\.toml contains a list, not an object"):
        read_results_file(other)


def test_exaggerated_alphas_are_called_so() -> None:
    titles = [row_title(asdict(arm)) for arm in (*ARMS[DISTANT][1:3], *ARMS[DISTANT][-2:])]
    assert titles == [
        "EXACT, alpha 0.15",
        "EXACT, alpha 1 (exaggerated)",
        "normalized EXACT, alpha 1 (exaggerated)",
        "standard, twice the steps",
    ]
    assert row_title(asdict(exact_arm(4.0))) == "EXACT, alpha 4 (exaggerated)"


def test_readings() -> None:
    assert [direction(measure(delta)) for delta in (1.0, -1.0, 0.2)] == [1, -1, 0]
    assert verdict(measure(-1.0)) == "below standard"
    assert signed(measure(1.0)) == "+1.00 [+0.50, +1.50]"
    assert signed({"delta": 1.0, "interval": None}, 1) == "+1.0"
    assert weighted_shares([0.5, 0.5], [1.0, 3.0]) == [0.25, 0.75]


def test_a_bootstrap_over_few_seeds_does_not_decide_alone() -> None:
    narrow = {**measure(1.0), "pair_deltas": [0.1, 0.1, 0.1, 0.2, 4.5]}  # t: 1.0 +- 2.4
    assert narrow["ci95"] == [0.5, 1.5]
    assert direction(narrow) == 0
    assert marked(narrow) == "+1.00 [+0.50, +1.50] ?"
    low, high = hull(narrow)
    assert low < 0 < 1.5 < high
    assert hull(measure(1.0)) == (0.5, 1.5)  # both seeds alike: Student's interval is the point
    assert marked(measure(1.0)) == "+1.00 [+0.50, +1.50]"
    assert direction({**narrow, "pair_deltas": [0.8, 0.9, 1.0, 1.1, 1.2]}) == 1
    assert direction({**measure(-1.0), "pair_deltas": [-0.8, -0.9, -1.0, -1.1, -1.2]}) == -1
    assert direction({**narrow, "pair_deltas": [1.0]}) == 1  # one seed: its items are all there is


def test_two_arms_are_compared_seed_by_seed() -> None:
    before, after = ({"pair_deltas": values} for values in ([1.0, 2.0, 3.0], [2.0, 3.5, 3.5]))
    found = between_arms(before, after)
    half = 4.303 * 0.5 / np.sqrt(3)  # differences 1, 1.5, 0.5
    assert found["delta"] == pytest.approx(1.0)
    assert found["interval"] == pytest.approx([1 - half, 1 + half])


def test_student_interval_against_scipy_like_values() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    interval = student_interval(values)
    assert interval is not None
    half = 2.776 * np.sqrt(2.5) / np.sqrt(5)  # t of 4 degrees of freedom, standard deviation sqrt(2.5)
    assert interval == pytest.approx([3 - half, 3 + half])
    assert student_interval(values[:1]) is None


def test_a_template_is_filled_in_and_values_are_no_markup(tmp_path: Path) -> None:
    template = tmp_path / "page.md"
    template.write_text(
        "Text of `{name}` over\ntwo lines, {number:.1f}.\n\n## Of {table[key]}\n\n* one\n* two,\n  long\n\n"
        "![a\nfigure](a.png)\nIts caption.\n\n{block}\n\n{none}\n\n> A note.\n\n"
        "| head | number |\n| rows: {x} of {table[key]} | {n:.1f} |\nA caption\nof {number}.\n\n"
        "```\nmake it\n```\n"
    )
    values = {
        "name": "a {number} `b`",
        "number": 2.0,
        "table": {"key": "## *x* ![y](z)"},
        "block": [CodeBlock(text="{number}")],
        "none": [],
        "rows": [{"x": "a|b", "n": 1}, {"x": "{n}", "n": 2}],
    }
    page = markdown_page(Page(title="T", blocks=fill_in(template, values)))
    title, text, heading, *rest = page.split("\n\n")
    assert (title, text) == ("# T", "Text of `` a {number} `b` `` over two lines, 2.0.")
    assert heading == r"## Of ## \*x\* ![y\](z)"
    assert rest == [
        "* one\n* two, long",
        "![a figure](a.png)",
        "Its caption.",
        "```\n{number}\n```",
        "> A note.",
        "A caption of 2.0.",
        rest[-2],
        "```\nmake it\n```\n",
    ]
    table = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in rest[-2].splitlines()
    ]
    assert table[0] == ["head", "number"]
    assert table[2:] == [[r"a\|b of ## \*x\* ![y\](z)", "1.0"], [r"{n} of ## \*x\* ![y\](z)", "2.0"]]
