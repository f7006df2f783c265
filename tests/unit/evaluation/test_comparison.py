"""From result folders to comparison.json: the contract, by hand and against plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written_results import provenance, write_results

from megatron_exact.evaluation.comparison import compare_runs, content_sha256, write_comparison
from megatron_exact.evaluation.pairing import Regimes
from megatron_exact.evaluation.statistics import Sampling
from megatron_exact.evaluation.suites.suite import token_lengths

Cells = dict[tuple[str, str, int], list[float]]
REGIMES = Regimes(trained=token_lengths("1K"), extrapolated=token_lengths("2K"))
FEW = Sampling(resamples=500)
BEFORE: Cells = {
    ("ruler", "vt", 1024): [0, 0, 1, 1],
    ("ruler", "vt", 2048): [0, 0],
    ("ruler", "cwe", 1024): [0.5, 0.5],
    ("ruler", "cwe", 2048): [0.1, 0.3],
    ("qa", "piqa", 0): [1, 0],
}
AFTER: Cells = {
    ("ruler", "vt", 1024): [1, 0, 1, 1],
    ("ruler", "vt", 2048): [0, 0],
    ("ruler", "cwe", 1024): [0.75, 0.25],
    ("ruler", "cwe", 2048): [0.3, 0.3],
    ("qa", "piqa", 0): [1, 0],
}


def simulated(folder: Path, seed: int, lift: float, salt: str = "", **info: Any) -> Path:
    """A model that answers 2 tasks x 2 lengths; seeds of one number share what is easy."""
    rng, easy = np.random.default_rng(seed), np.random.default_rng(0)
    cells = {}
    for task in ("vt", "cwe"):
        for length in (1024, 2048):
            chance = np.clip(easy.random(40) + lift, 0, 1)
            cells["ruler", task, length] = (rng.random(40) < chance).astype(float).tolist()
    return write_results(folder, cells, salt=salt, **info)


def compare_small(tmp_path: Path, **options: Any) -> dict[str, Any]:
    one = write_results(tmp_path / "a", BEFORE)
    return compare_runs([one], [write_results(tmp_path / "b", AFTER)], **{"sampling": FEW, **options})


def test_aggregates_by_hand(tmp_path: Path) -> None:
    content = compare_small(tmp_path, regimes=REGIMES)
    entries = {(entry["suite"], entry["regime"]): entry for entry in content["aggregates"]}
    assert list(entries) == [
        ("qa", "all"),
        ("ruler", "trained"),
        ("ruler", "extrapolated"),
        ("ruler", "all"),
    ]
    trained = entries["ruler", "trained"]
    assert (trained["cells"], trained["examples"]) == (2, 6)
    assert trained["baseline"] == pytest.approx(50)  # (50 + 50) / 2
    assert trained["treatment"] == pytest.approx(62.5)  # (75 + 50) / 2: cells, not examples, weigh the same
    assert trained["delta"] == pytest.approx(12.5)
    assert trained["relative_lift_percent"] == pytest.approx(25)
    assert trained["example_signs"] == {"wins": 2, "losses": 1, "ties": 3}
    assert trained["cell_signs"] == {"wins": 1, "losses": 0, "ties": 1}
    both = entries["ruler", "all"]
    assert (both["cells"], both["examples"]) == (4, 10)
    assert both["baseline"] == pytest.approx((50 + 0 + 50 + 20) / 4)
    assert both["delta"] == pytest.approx((25 + 0 + 0 + 10) / 4)
    none = entries["qa", "all"]
    assert (none["delta"], none["ci95"], none["p_value"], none["p_holm"]) == (0, None, 1, 1)
    assert none["ci95_reason"] == "only 0 of 2 differ"
    lengths = [(entry["suite"], entry["length"]) for entry in content["lengths"]]
    assert lengths == [("qa", 0), ("ruler", 1024), ("ruler", 2048)]
    cell = content["cells"][1]
    assert (cell["task"], cell["length"], cell["baseline"], cell["delta"]) == ("cwe", 1024, 50, 0)
    assert (len(content["cells"]), "p_value" in cell) == (5, False)


def test_without_lengths_there_is_one_regime(tmp_path: Path) -> None:
    content = compare_small(tmp_path)
    assert [entry["regime"] for entry in content["aggregates"]] == ["all", "all"]
    assert {entry["ci95"] is None for entry in content["cells"]} == {True}  # from so few there is none
    assert content["pairing"]["statement"].startswith("training not verifiably paired: ")


def test_cells_are_resampled_on_request_as_plain_loops_do(tmp_path: Path) -> None:
    one, other = simulated(tmp_path / "a", 1, 0), simulated(tmp_path / "b", 2, 0.1)
    content = compare_runs([one], [other], sampling=Sampling(resamples=20_000, kind="cells"))
    entry = content["aggregates"][0]
    assert any("intervals of the paper's kind" in note for note in content["notes"])
    rng, means = np.random.default_rng(9), []
    for file in sorted(one.glob("*/*/*.jsonl")):
        sides = [
            [json.loads(line)["score"] for line in (side / file.relative_to(one)).read_text().splitlines()]
            for side in (one, other)
        ]
        difference = np.subtract(sides[1], sides[0])
        means.append(difference[rng.integers(0, 40, (20_000, 40))].mean(axis=1))
    plain = np.quantile(100 * np.mean(means, axis=0), [0.025, 0.975])
    np.testing.assert_allclose(entry["ci95"], plain, atol=0.7)
    assert entry["ci95"][0] < entry["delta"] < entry["ci95"][1]


def test_the_numbers_depend_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    one, other = simulated(tmp_path / "a", 1, 0), simulated(tmp_path / "b", 2, 0.1)
    first = compare_runs([one], [other], sampling=FEW)
    assert compare_runs([one], [other], sampling=FEW) == first
    reseeded = compare_runs([one], [other], sampling=Sampling(resamples=500, seed=1))
    assert reseeded["cells"][0]["ci95"] == first["cells"][0]["ci95"]
    assert reseeded["aggregates"][0]["p_value"] != first["aggregates"][0]["p_value"]
    drawn = [
        compare_runs([one], [other], sampling=Sampling(resamples=500, seed=seed, kind="cells"))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0]["cells"][0]["ci95"] != drawn[2]["cells"][0]["ci95"]
    for side in (one, other):  # another suite beside it changes nothing of the first
        write_results(side, {("nolima", "hard", 1024): [0.0, 1.0]})
    more = compare_runs([one], [other], sampling=FEW)
    assert [entry for entry in more["cells"] if entry["suite"] == "ruler"] == first["cells"]


def seeds(tmp_path: Path, number: int, salts: str = "") -> tuple[list[Path], list[Path]]:
    salt = salts or "x" * number
    before = [simulated(tmp_path / f"a{seed}", seed, 0, salt[seed]) for seed in range(number)]
    after = [simulated(tmp_path / f"b{seed}", 100 + seed, 0.15, salt[seed]) for seed in range(number)]
    return before, after


def test_several_seeds_are_a_second_level(tmp_path: Path) -> None:
    before, after = seeds(tmp_path, 3)
    content = compare_runs(before, after, sampling=Sampling(resamples=4000))
    entry = content["aggregates"][0]
    single = [
        compare_runs([one], [other], sampling=FEW)["aggregates"][0]["delta"]
        for one, other in zip(before, after, strict=True)
    ]
    assert entry["pair_deltas"] == pytest.approx(single)
    assert entry["delta"] == pytest.approx(np.mean(single))
    assert (entry["examples"], entry["cells"]) == (160, 4)
    assert sum(entry["example_signs"].values()) == 3 * 160
    assert entry["pair_level_p_value"] == 0.25
    assert (entry["p_value"], entry["p_holm"]) == (0.25, 0.25)
    assert entry["p_value_these_seeds"] < 0.05  # and no more is claimed from it
    assert (entry["ci95"], entry["ci95_reason"]) == (None, "only 3 pairs of runs")
    assert entry["ci95_these_seeds"][0] > 0
    assert any("a test over seeds cannot give less than p = 0.25" in note for note in content["notes"])
    assert "none with fewer than 4 pairs" in content["methods"]["ci95"]


def test_four_seeds_have_an_interval_over_seeds(tmp_path: Path) -> None:
    content = compare_runs(*seeds(tmp_path, 4), sampling=FEW)
    entry = content["aggregates"][0]
    assert entry["ci95"][0] < entry["delta"] < entry["ci95"][1]
    widths = [high - low for low, high in (entry["ci95"], entry["ci95_these_seeds"])]
    assert widths[0] > widths[1]
    assert entry["p_value"] >= 0.125


def test_a_question_of_nolima_is_one_unit_over_depths_lengths_and_sets(tmp_path: Path) -> None:
    """Twenty questions, each at 6 depths, 3 lengths, in 2 sets; all examples of a question agree."""
    rng = np.random.default_rng(4)
    gains = rng.choice([-1.0, 0.0, 1.0], size=20, p=[0.25, 0.4, 0.35])
    cells = [("nolima", task, length) for task in ("needle_set", "hard") for length in (1024, 2048, 4096)]
    sides = []
    for name, better in (("a", 0), ("b", 1)):
        scores = [float(gain > 0 if better else gain < 0) for gain in gains for _ in range(6)]
        side = write_results(tmp_path / name, dict.fromkeys(cells, scores))
        for path in side.glob("nolima/*/*.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for number, line in enumerate(lines):
                line["id"] = f"0401_T{number // 6:02}_onehop-{4 * (number % 6):g}"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sides.append(side)
    content = compare_runs([sides[0]], [sides[1]], sampling=FEW)
    entry = content["aggregates"][0]
    assert (entry["cells"], entry["examples"]) == (6, 720)
    single = content["cells"][0]
    assert entry["ci95"] == pytest.approx(single["ci95"])  # more cells of the same questions add nothing
    assert "of nolima: each unit drawn together" in content["methods"]["ci95"]
    cells_kind = compare_runs([sides[0]], [sides[1]], sampling=Sampling(resamples=500, kind="cells"))
    low, high = cells_kind["aggregates"][0]["ci95"]
    assert entry["ci95"][1] - entry["ci95"][0] > 4 * (high - low)  # the paper's kind counts 720


def test_seeds_with_examples_of_their_own_are_said_so(tmp_path: Path) -> None:
    content = compare_runs(*seeds(tmp_path, 2, "xy"), sampling=FEW)
    assert any("answered different examples" in note for note in content["notes"])


def test_what_is_said_beside_the_numbers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"options": {"ruler": {"max_new_tokens": 30}}, "lm_eval": "0.4.13"}
    options["model"] = {"weights_sha256": {"model.safetensors": "0"}}
    one = write_results(tmp_path / "a", BEFORE, provenance=provenance(), **options)
    options["options"]["ruler"]["max_new_tokens"] = 128
    exact = provenance(weighting={"rule": "exact"}, git_commit="def")
    other = write_results(tmp_path / "b", AFTER, provenance=exact, **options)
    for side in (one, other):
        (side / "ruler/vt/2048.jsonl").unlink()
    content = compare_runs([one], [other], sampling=FEW)
    assert content["pairing"] == {
        "verified": True,
        "statement": "training verified as paired: pack, start checkpoint, seed, schedule and layout "
        "agree; a record of an earlier version names no other flags",
    }
    notes = "\n".join(content["notes"])
    assert "1 cells were evaluated on neither side, the first being ruler/vt/2048" in notes
    assert "differ in options.ruler.max_new_tokens (30 and 128)" in notes
    assert "were trained by different git_commit" in notes
    assert "b are the same weights" in notes
    run = content["runs"][0]
    assert (run["baseline"]["token_weighting"], run["treatment"]["token_weighting"]) == ("none", "exact")
    assert run["treatment"]["iteration"] == 10


def backend(**changes: Any) -> dict[str, Any]:
    calls = [{"versions": {"torch": "2.13.0"}, "device": "cpu", "batch_size": 1}]
    return {"name": "hf", "dtype": "float32", "calls": calls, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, r"a was evaluated in dtype float32, .*b in dtype bfloat16: evaluate both"),
        ({"name": "vllm"}, r"a was evaluated on the backend hf, .*b on the backend vllm: evaluate both"),
    ],
)
def test_sides_that_ran_in_other_ways_are_refused(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    one = write_results(tmp_path / "a", BEFORE, backend=backend())
    other = write_results(tmp_path / "b", AFTER, backend=backend(**change))
    with pytest.raises(ValueError, match=message):
        compare_runs([one], [other], sampling=FEW)


def test_sides_that_generated_in_other_ways_are_refused(tmp_path: Path) -> None:
    """A folder of an older version followed the model's generation_config.json."""
    old, greedy = backend(), backend()
    greedy["calls"] = [{**old["calls"][0], "generation": {"repetition_penalty": 1.0}}]
    one = write_results(tmp_path / "a", BEFORE, backend=old)
    other = write_results(tmp_path / "b", AFTER, backend=greedy)
    mixed = write_results(tmp_path / "c", AFTER, backend=backend(calls=old["calls"] + greedy["calls"]))
    for side in (other, mixed):
        with pytest.raises(ValueError, match=r"generation of an earlier version, .*penalty.*evaluate both"):
            compare_runs([one], [side], sampling=FEW)


def test_versions_are_told_and_device_and_batch_size_are_not(tmp_path: Path) -> None:
    one = write_results(tmp_path / "a", BEFORE, backend=backend())
    other_call = {"versions": {"torch": "2.13.0"}, "device": "cuda", "batch_size": 8}
    same = write_results(tmp_path / "b", AFTER, backend=backend(calls=[other_call]))
    assert not any("ran under" in note for note in compare_runs([one], [same], sampling=FEW)["notes"])
    newer = [{**other_call, "versions": {"torch": "2.14.0"}}, other_call]
    mixed = write_results(tmp_path / "c", AFTER, backend=backend(calls=newer))
    notes = "\n".join(compare_runs([one], [mixed], sampling=FEW)["notes"])
    assert f"{one} ran under torch 2.13.0, {mixed} under torch 2.13.0 and torch 2.14.0" in notes


@pytest.mark.parametrize(
    ("window", "trained", "extrapolated", "told"),
    [
        (2048, "1K,2K", "", None),
        (1024, "1K", "2K", None),
        (2048, "1K", "2K", "2,048 tokens are given as extrapolated, but"),
        (1024, "1K,2K", "", "2,048 tokens are given as trained, but"),
        (1024, "", "1K,2K", "1,024 tokens are given as extrapolated, but"),
    ],
)
def test_lengths_that_contradict_the_rows_of_training_are_told(
    tmp_path: Path, window: int, trained: str, extrapolated: str, told: str | None
) -> None:
    tuned = provenance(row_tokens=512, start_checkpoint={"sha256": "a", "run": {"row_tokens": window}})
    one = write_results(tmp_path / "a", BEFORE, provenance=tuned)
    other = write_results(tmp_path / "b", AFTER, provenance=tuned)
    sides = [token_lengths(side) if side else () for side in (trained, extrapolated)]
    regimes = Regimes(trained=sides[0], extrapolated=sides[1])
    notes = compare_runs([one], [other], regimes=regimes, sampling=FEW)["notes"]
    found = [note for note in notes if f"was trained on rows of up to {window:,}" in note]
    assert len(found) == (0 if told is None else 2)
    assert all(note.startswith(told or "") for note in found)


def test_results_that_do_not_say_how_they_ran_are_told(tmp_path: Path) -> None:
    one = write_results(tmp_path / "a", BEFORE, backend=backend(dtype="bfloat16"))
    other = write_results(tmp_path / "b", AFTER)
    notes = [note for note in compare_runs([one], [other], sampling=FEW)["notes"] if "record" in note]
    assert len(notes) == 1
    assert notes[0].startswith(f"{other} does not record backend and dtype of its suites")


def test_sides_that_do_not_pair_are_refused(tmp_path: Path) -> None:
    one, other = write_results(tmp_path / "a", BEFORE), write_results(tmp_path / "b", AFTER)
    for sides in (([one, other], [one]), ([], []), ([], [one])):
        with pytest.raises(ValueError, match="runs pair in order, give as many on each side"):
            compare_runs(*sides)
    with pytest.raises(ValueError, match="is given twice on one side"):
        compare_runs([one, one], [other, one])
    copies = [write_results(tmp_path / f"c{n}", BEFORE, model={"weights_sha256": "0"}) for n in (1, 2)]
    with pytest.raises(ValueError, match=r"c1 and .*c2 are the same weights"):
        compare_runs(copies, [one, other])
    with pytest.raises(ValueError, match="no suite was evaluated at the trained length 8K"):
        compare_runs([one], [other], regimes=Regimes(trained=token_lengths("8K")))
    with pytest.raises(ValueError, match="give at least 1, and a seed of at least 0"):
        Sampling(resamples=0)
    with pytest.raises(ValueError, match="choose one of units, cells"):
        Sampling(kind="rows")


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    content = compare_small(tmp_path, regimes=REGIMES)
    path = write_comparison(tmp_path / "new" / "folder", content)
    written = json.loads(path.read_text())
    assert written.pop("content_sha256") == content_sha256(content)
    assert written == content
    assert path.name == "comparison.json"
