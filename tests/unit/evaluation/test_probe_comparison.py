"""Two sides of probes: means by hand, intervals against plain loops, and what is not a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special
from written_results import RUN, Cell, Rows, provenance, write_probe, write_results

from megatron_exact.evaluation.comparison import compare_runs
from megatron_exact.evaluation.probe_comparison import compare_probes
from megatron_exact.evaluation.statistics import Sampling, average_units, cell_units, student_interval
from megatron_exact.report.comparison_page import comparison_page

FEW = Sampling(resamples=500)
BEFORE: dict[Cell, Rows] = {
    ("field", 64, 256): [(1.0, 0.5, 1, 0), (2.0, 1.0, 1, 1)],
    ("field", 64, 512): [(0.0, 0.0, 0, 0), (0.0, 0.0, 0, 0)],
    ("field", 128, 512): [(4.0, 0.0, 1, 0)],
}
AFTER: dict[Cell, Rows] = {
    ("field", 64, 256): [(2.0, 0.5, 1, 0), (4.0, 1.0, 1, 0)],
    ("field", 64, 512): [(1.0, 0.0, 1, 0), (0.0, 0.0, 0, 0)],
    ("field", 128, 512): [(4.0, 1.0, 1, 0)],
}


def test_means_by_hand(tmp_path: Path) -> None:
    one, other = write_probe(tmp_path / "a", BEFORE), write_probe(tmp_path / "b", AFTER)
    content = compare_probes([one], [other], sampling=FEW, ranges=[(100, 200)])
    assert content["pairing"]["verified"] is False
    assert content["items_shared"] is True
    first = content["cells"][0]
    assert (first["kind"], first["distance"], first["context"], first["items"]) == ("field", 64, 256, 2)
    assert first["measures"]["margin"]["baseline"] == 1.5
    assert first["measures"]["margin"]["treatment"] == 3.0
    assert first["measures"]["effect"]["delta"] == pytest.approx(1.5)
    assert first["measures"]["correct"]["delta"] == 0
    assert first["measures"]["answer_effect"]["delta"] == 50  # one of two was right without evidence, too
    near, far = content["distances"]
    assert (near["distance"], near["cells"], near["items"]) == (64, 2, 4)
    assert near["measures"]["margin"]["delta"] == pytest.approx((1.5 + 0.5) / 2)
    assert (far["distance"], far["cells"]) == (128, 1)
    everything, spanned = content["kinds"]
    assert (everything["distances"], everything["cells"], everything["items"]) == ([64, 128], 3, 5)
    assert everything["measures"]["margin"]["delta"] == pytest.approx((1.5 + 0.5 + 0) / 3)
    assert everything["measures"]["effect"]["delta"] == pytest.approx((1.5 + 0.5 - 1) / 3)
    assert everything["measures"]["correct"]["pair_deltas"] == pytest.approx([50 / 3])
    assert (spanned["distances"], spanned["cells"]) == ([100, 200], 1)
    assert spanned["measures"]["effect"] == far["measures"]["effect"]
    with pytest.raises(ValueError, match="no distance from 200 to 300"):
        compare_probes([one], [other], sampling=FEW, ranges=[(200, 300)])


def simulated(folder: Path, seed: int, lift: float, salt: str = "") -> Path:
    """30 items in two cells; what is hard is so for every seed of training."""
    items, run = np.random.default_rng(0), np.random.default_rng(seed)
    cells: dict[Cell, Rows] = {}
    for distance in (64, 128):
        margins = items.normal(1, 2, 30) * (1 + lift) + run.normal(lift, 0.5, 30) + run.normal(0, 0.3)
        cells["k", distance, 256] = [
            (float(margin), 0.1 * number, int(margin > 0), 0) for number, margin in enumerate(margins)
        ]
    return write_probe(folder, cells, salt=salt)


def margins(folder: Path) -> Any:
    """[cells, items]."""
    lines = [json.loads(line) for line in (folder / "probe" / "k.jsonl").read_text().splitlines()]
    return np.array([line["margin"] for line in lines]).reshape(2, 30)


@pytest.mark.parametrize("salts", [("", "", ""), ("x", "y", "z")])
def test_intervals_equal_plain_loops(tmp_path: Path, salts: tuple[str, ...]) -> None:
    before = [simulated(tmp_path / f"a{seed}", seed, 0.0, salt) for seed, salt in enumerate(salts)]
    after = [simulated(tmp_path / f"b{seed}", 50 + seed, 0.4, salt) for seed, salt in enumerate(salts)]
    content = compare_probes(before, after, sampling=Sampling(resamples=20_000, kind="cells"))
    assert content["items_shared"] is (len(set(salts)) == 1)
    differences = np.array([margins(b) - margins(a) for a, b in zip(before, after, strict=True)])
    rng, means = np.random.default_rng(1), []
    for _ in range(3000):
        cells = []
        for cell in range(2):
            if content["items_shared"]:
                drawn = np.tile(rng.integers(0, 30, 30), (3, 1))
            else:
                drawn = rng.integers(0, 30, (3, 30))
            cells.append([differences[pair, cell, drawn[pair]].mean() for pair in range(3)])
        means.append(np.mean(cells, axis=0)[rng.integers(0, 3, 3)].mean())
    plain = np.quantile(means, [0.025, 0.975])
    entry = content["kinds"][0]["measures"]["margin"]
    assert entry["delta"] == pytest.approx(differences.mean())
    np.testing.assert_allclose(entry["ci95"], plain, atol=0.04)
    assert np.ptp(plain) > 0.3
    assert len(entry["pair_deltas"]) == 3


def test_the_numbers_depend_on_the_seed_alone(tmp_path: Path) -> None:
    one, other = simulated(tmp_path / "a", 1, 0), simulated(tmp_path / "b", 2, 0.1)
    first = compare_probes([one], [other], sampling=FEW)
    assert compare_probes([one], [other], sampling=FEW) == first
    assert compare_probes([one], [other], sampling=Sampling(resamples=500, seed=1)) == first
    drawn = [
        compare_probes([one], [other], sampling=Sampling(resamples=500, seed=seed, kind="cells"))["kinds"][
            0
        ]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0]["measures"]["margin"]["ci95"] != drawn[2]["measures"]["margin"]["ci95"]


def test_intervals_are_over_items_and_seeds(tmp_path: Path) -> None:
    from scipy import stats

    one, other = simulated(tmp_path / "a", 1, 0), simulated(tmp_path / "b", 2, 0.1)
    entry = compare_probes([one], [other], sampling=FEW)["kinds"][0]["measures"]
    differences = margins(other) - margins(one)
    half = stats.t.ppf(0.975, 57) * np.sqrt(differences.var(axis=1, ddof=1).sum() / 30) / 2
    ends = entry["margin"]["ci95"]
    assert (ends[1] - ends[0]) / 2 == pytest.approx(half, rel=0.02)  # cells of one size: 58 degrees less 1
    assert entry["margin_ablated"] == {
        **{"baseline": 1.45, "treatment": 1.45, "delta": 0, "pair_deltas": [0]},
        **{"ci95": None, "ci95_reason": "only 0 of 60 differ", "detectable": None},
    }
    before = [simulated(tmp_path / f"c{seed}", seed, 0.0) for seed in range(3)]
    after = [simulated(tmp_path / f"d{seed}", 50 + seed, 0.4) for seed in range(3)]
    few = compare_probes(before, after, sampling=FEW)["kinds"][0]["measures"]["margin"]
    assert (few["ci95"], few["ci95_reason"]) == (None, "only 3 pairs of runs")
    assert few["ci95_these_seeds"][0] < few["delta"] < few["ci95_these_seeds"][1]


def test_order_of_lines_does_not_matter(tmp_path: Path) -> None:
    one, other = simulated(tmp_path / "a", 1, 0), simulated(tmp_path / "b", 2, 0.1)
    first = compare_probes([one], [other], sampling=FEW)
    path = other / "probe" / "k.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert compare_probes([one], [other], sampling=FEW) == first


def test_what_is_no_comparison(tmp_path: Path) -> None:
    one = write_probe(tmp_path / "a", BEFORE)
    few = {cell: rows for cell, rows in AFTER.items() if cell[1] == 64}
    fewer = {**AFTER, ("field", 64, 256): [(1.0, 1.0, 1, 1)]}
    trained = write_probe(tmp_path / "p", BEFORE, provenance=provenance())
    reseeded = provenance(seed=RUN["seed"] + 1)
    for before, after, reason in [
        (
            one,
            write_probe(tmp_path / "b", AFTER, salt="x"),
            "items of field/64/256: the prompt of id '64-256-0' differs",
        ),
        (one, write_probe(tmp_path / "c", few), "has the cell field/128/512 and"),
        (one, write_probe(tmp_path / "d", fewer), "2 and 1 examples"),
        (one, write_probe(tmp_path / "e", AFTER, finished=False), "is not finished"),
        (one, write_probe(tmp_path / "f", AFTER, items={"kinds": {"field": 9}}), "has 5 results of field"),
        (trained, write_probe(tmp_path / "g", AFTER, provenance=reseeded), "seed is 1 and 2"),
        (one, write_probe(tmp_path / "h", AFTER, dtype="bfloat16"), "in dtype None, .* in bfloat16"),
        (one, tmp_path, r"has no probe\.json"),
    ]:
        with pytest.raises(ValueError, match=reason):
            compare_probes([before], [after], sampling=FEW)


def test_how_probes_ran_is_told(tmp_path: Path) -> None:
    one = write_probe(tmp_path / "a", BEFORE, dtype="auto", versions={"torch": "2.13.0"})
    other = write_probe(tmp_path / "b", AFTER, dtype="auto", versions={"torch": "2.14.0"})
    notes = "\n".join(compare_runs([one], [other], sampling=FEW)["notes"])
    assert "ran in the types of their exports and do not record which" in notes
    assert "ran under {'torch': '2.13.0'} and {'torch': '2.14.0'}" in notes
    assert "differ in" not in notes


def test_compare_runs_takes_the_probe_along(tmp_path: Path) -> None:
    cells = {("ruler", "vt", 1024): [1.0, 0.0]}
    one, other = write_results(tmp_path / "a", cells), write_results(tmp_path / "b", cells)
    plain = compare_runs([one], [other], sampling=FEW)
    assert "probe" not in plain
    with pytest.raises(ValueError, match="no folder has a probe"):
        compare_runs([one], [other], sampling=FEW, probe_ranges=[(1, 2)])
    write_probe(one, BEFORE)
    half = compare_runs([one], [other], sampling=FEW)
    assert "probe" not in half
    assert half["notes"][-1] == f"{other} without an evidence probe: it is left out"
    write_probe(other, AFTER)
    content = compare_runs([one], [other], sampling=FEW, probe_ranges=[(64, 64)])
    alone = compare_probes([one], [other], sampling=FEW, ranges=[(64, 64)])
    probe = content.pop("probe")
    assert probe["cells"][0]["measures"]["margin"]["ci95_reason"] == "only 1 of 2 differ"
    for side in ("baseline", "treatment"):  # the probe's files were compared as well
        before, now = (one["runs"][0][side].pop("files") for one in (plain, content))
        assert before.items() < now.items()
        assert all(name.startswith("probe") for name in now.keys() - before.keys())
    assert content == plain
    assert probe == {key: value for key, value in alone.items() if key != "pairing"}
    (one / "results.json").unlink()
    with pytest.raises(ValueError, match="lacks 1 of the 1 cells"):
        compare_runs([one], [other], sampling=FEW)
    (other / "results.json").unlink()
    only = compare_runs([one], [other], sampling=FEW, probe_ranges=[(64, 64)])
    assert (only["probe"], only["aggregates"], only["cells"], only["methods"]) == (probe, [], [], {})
    page = " ".join(comparison_page(only).split())
    assert "| field | 64 to 128 | effect | 5 | 1.583 | 1.917 | +0.333 |" in page
    assert "Macro averages" not in page
    write_results(one, cells), write_results(other, cells)
    write_probe(other, AFTER, model={"weights_sha256": {"model.safetensors": "0"}})
    with pytest.raises(ValueError, match="the probe of one model and the suites of another"):
        compare_runs([one], [other], sampling=FEW)


def test_an_interval_over_forms_is_students_over_their_means(tmp_path: Path) -> None:
    """24 forms in two cells of 48 items: the spread is that of the forms' means, not of 96 items."""
    draw = np.random.default_rng(5)
    forms = np.arange(48) % 24
    easy = draw.normal(0, 1, 24)[forms]
    cells = [("field", 64, 256), ("field", 128, 256)]
    values = [easy + draw.normal(0, 0.5, 48) for _ in cells]

    def probes(**more: Any) -> dict[str, Any]:
        folders = []
        for side, sign in enumerate((0.0, 1.0)):
            rows = {
                cell: [(float(sign * value), 0.0, 0, 0) for value in one]
                for cell, one in zip(cells, values, strict=True)
            }
            folders.append(write_probe(tmp_path / f"{side}-{len(more)}", rows, **more))
        return compare_probes(folders[:1], folders[1:], sampling=FEW)

    content = probes(forms=[f"form {form}" for form in forms])
    interval = content["kinds"][0]["measures"]["margin"]["ci95"]
    means = np.array([np.mean([one[forms == form].mean() for one in values]) for form in range(24)])
    half = float(special.stdtrit(23, 0.975)) * means.std(ddof=1) / np.sqrt(24)
    assert (interval[1] - interval[0]) / 2 == pytest.approx(half)
    assert "sentence form" in content["methods"]["ci95"]
    # The control: the same numbers without forms give an interval as if 96 items were independent.
    alone = probes()["kinds"][0]["measures"]["margin"]["ci95"]
    assert alone[1] - alone[0] < 0.75 * (interval[1] - interval[0])


def test_intervals_over_forms_cover_and_those_over_items_do_not() -> None:
    """400 experiments without a difference: wordings differ by as much as items do."""
    draw, trials, misses = np.random.default_rng(9), 400, {"forms": 0, "items": 0}
    forms = np.arange(96) % 24
    for _ in range(trials):
        of_form = draw.normal(0, 1, 24)[forms]
        cells = [of_form + draw.normal(0, 1, 96) for _ in range(2)]
        for name in misses:
            units = [
                cell_units(
                    [values],
                    [
                        [
                            f"{form}" if name == "forms" else f"{cell}-{item}"
                            for item, form in enumerate(forms)
                        ]
                    ],
                    is_shared=True,
                )
                for cell, values in enumerate(cells)
            ]
            joined = average_units([(1.0, one) for one in units], across_cells=name == "forms")
            ends = student_interval(joined).ends
            assert ends is not None
            misses[name] += not ends[0] <= 0 <= ends[1]
    assert 0.93 <= 1 - misses["forms"] / trials <= 0.975
    assert 1 - misses["items"] / trials < 0.75
