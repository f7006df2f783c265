"""Figures 1, 3, 4 and 5 and what stands around them, from result files alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_exact.exposure import build_weighting
from megatron_exact.report.compared import Compared, difference_cell, estimate_of, read_compared
from megatron_exact.report.experiment import (
    comparison_blocks,
    field_blocks,
    licence_blocks,
    lift_blocks,
    lift_fields,
    probe_blocks,
)
from megatron_exact.report.exposure_figure import as_trained, exposure_blocks, read_exposure, read_pack
from megatron_exact.report.figures import Axis, Field, Panel, is_beyond
from megatron_exact.report.page import Block, Bullets, Details, Figure, Note, Table, plain_text
from megatron_exact.report.summary import cost_blocks, loss_blocks, read_ledger, read_losses, summary_blocks
from tests.unit.report.small_comparisons import comparison, estimate, side, write_comparison, write_pack
from tests.unit.report.small_runs import write_run


def read(folder: Path, *contents: dict[str, Any]) -> list[Compared]:
    return read_compared(
        [str(write_comparison(folder / f"in{number}", content)) for number, content in enumerate(contents)]
    )


def flat(blocks: Sequence[Block]) -> Iterator[Block]:
    for block in blocks:
        yield block
        if isinstance(block, Details):
            yield from flat(block.blocks)


def found[Kind](blocks: Sequence[Block], kind: type[Kind]) -> list[Kind]:
    return [block for block in flat(blocks) if isinstance(block, kind)]


def rows(table: Table) -> list[list[str]]:
    return [[plain_text(cell) for cell in cells] for cells in table.body]


@pytest.mark.parametrize("function", [field_blocks, probe_blocks, lift_blocks, exposure_blocks])
def test_without_results_a_figure_says_not_run_and_nothing_is_drawn(function: Any, tmp_path: Path) -> None:
    blocks = function(tmp_path, [])
    assert plain_text(found(blocks, Note)[-1].text).lower().count("not run") == 1
    assert found(blocks, Figure) == []
    assert list(tmp_path.iterdir()) == []


def lines_of(blocks: Sequence[Block]) -> dict[str, str]:
    """The bullets of the summary by their first words."""
    texts = [plain_text(item) for bullets in found(blocks, Bullets) for item in bullets.items]
    return dict(text.split(": ", 1) for text in texts)


def test_what_could_have_been_seen(tmp_path: Path) -> None:
    content = comparison("packed-position", parameters={"mass_scale": 0.4}, has_probe=True)
    (table,) = found(summary_blocks(read(tmp_path / "old", content), [], None), Table)
    assert {row[-1] for row in rows(table)} == {"not known"}  # an older version does not record it
    for entry in content["aggregates"]:
        entry["detectable"] = 1.25 if entry["suite"] == "ruler" else None
    for kind in content["probe"]["kinds"]:
        kind["measures"]["effect"]["detectable"] = 0.5
    (table,) = found(summary_blocks(read(tmp_path / "new", content), [], None), Table)
    shown = {row[1]: row for row in rows(table)}
    assert shown["RULER trained, points"][-1] == "1.25"
    assert shown["NoLiMa trained, points"][-1] == "not known"
    assert "RULER, points" not in shown
    assert shown["RULER trained, points"][0] == "Packed-position (mass of EXACT)"
    assert any(name.startswith("probe ") and row[-1] == "0.50" for name, row in shown.items())
    content["aggregates"][0]["detectable"] = float("inf")
    with pytest.raises(ValueError, match=r"Infinity|detectable is inf"):
        read(tmp_path / "damaged", content)


def test_the_summary_says_what_a_reader_needs(tmp_path: Path) -> None:
    content = comparison(gain=2.0, has_probe=True)
    ruler = next(one for one in content["aggregates"] if one["suite"] == "ruler")
    ruler |= {"treatment": 17.0, "delta": -3.0, "ci95": [-4.0, -2.0], "relative_lift_percent": -15.0}
    window = content["lengths"][0]
    window |= {"treatment": 15.0, "delta": -5.0, "ci95": [-6.0, -4.0], "relative_lift_percent": -25.0}
    control = comparison("constant", gain=0.1)
    control["pairing"]["verified"] = False
    for entry in control["aggregates"]:
        entry["detectable"] = 1.4
    blocks = summary_blocks(read(tmp_path, content, control), [], {"steps": {"train:a": {"seconds": 120}}})
    says = lines_of(blocks)
    assert (
        says["Compared"]
        == "Qwen2.5-0.5B: EXACT, Constant, same mean against Standard CPT, 1 pair of runs each."
    )
    assert says["Paired"] == "not verified for 1 of 2 comparisons (Qwen2.5-0.5B, Constant, same mean)."
    assert "EXACT: NoLiMa trained +2.00 [+1.00, +3.00] points;" in says["Above the baseline"]
    assert says["Below the baseline"] == "EXACT: RULER trained -3.00 [-4.00, -2.00] points."
    assert "with 80 % power they would have shown 1.40 points" in says["Not decided"]
    assert says["Where it hurts"].startswith("EXACT: NoLiMa at 1K -5.00 [-6.00, -4.00] points")
    assert says["Cost"] == "2 minutes of steps, 2 of them training."
    assert "one in 20 excludes 0 by chance" in plain_text(found(blocks, Note)[0].text)
    assert summary_blocks([], [], None) == []


def test_of_many_comparisons_the_summary_counts(tmp_path: Path) -> None:
    """A reader has one minute: with five arms every difference in full would be a page of prose."""
    helped = comparison("exact", gain=2.0)
    window = helped["lengths"][0]
    window |= {"treatment": 15.0, "delta": -5.0, "ci95": [-6.0, -4.0], "relative_lift_percent": -25.0}
    others = [comparison(rule, gain=0.1) for rule in ("constant", "random-same-mass", "uniform-tail")]
    says = lines_of(summary_blocks(read(tmp_path / "four", helped, *others), [], None))
    above = sum(entry["ci95"][0] > 0 for entry in helped["aggregates"] if entry["regime"] != "all")
    assert says["Above the baseline"].startswith(f"EXACT ({above} of 5). In brackets:")
    assert above > 1
    assert says["Below the baseline"] == "no average."
    assert says["Where it hurts"] == "EXACT: NoLiMa at 1K -5.00 [-6.00, -4.00] points."
    other = helped["lengths"][1]
    other |= {"treatment": other["baseline"] - 4.0, "delta": -4.0, "ci95": [-5.0, -3.0]}
    other["relative_lift_percent"] = -400.0 / other["baseline"]
    says = lines_of(summary_blocks(read(tmp_path / "more", helped, *others), [], None))
    assert says["Where it hurts"] == "EXACT: NoLiMa at 1K -5.00 [-6.00, -4.00] points and 1 more."
    says = lines_of(summary_blocks(read(tmp_path / "three", helped, *others[:2]), [], None))
    assert "EXACT: NoLiMa trained +2.00 [+1.00, +3.00] points;" in says["Above the baseline"]


def test_losses_by_bucket_are_those_of_every_pair(tmp_path: Path) -> None:
    shifts = [0.01, 0.02, 0.04, 0.03]
    base = [str(write_run(tmp_path / f"base-{seed}")) for seed in range(4)]
    arm = [str(write_run(tmp_path / f"arm-{seed}", shift=shift)) for seed, shift in enumerate(shifts)]
    losses = read_losses([("exact", *pair) for pair in zip(base, arm, strict=True)])
    (table,) = found(loss_blocks(losses), Table)
    by_context = {row[0]: row for row in rows(table)}
    assert list(by_context) == ["0-7", "8-15", "16-31", "32-64", "below the tail", "tail", "all"]
    # mean 25 thousandths, standard error sqrt(166.67 / 4) = 6.455, t with 3 degrees of freedom 3.1824
    assert {row[2] for row in by_context.values()} == {"+25.0 [+4.5, +45.5]"}
    says = lines_of(summary_blocks(read(tmp_path, comparison("constant")), losses, None))
    assert "arm exact: loss of contexts of 0-7 +25.0 [+4.5, +45.5]" in says["Where it hurts"]
    assert "; loss below the tail +25.0 [+4.5, +45.5]" in says["Where it hurts"]
    fewer = read_losses([("constant", base[0], arm[1])])  # an arm of which one seed is trained by now
    captions = [table.caption for table in found(loss_blocks([*losses, *fewer]), Table)]
    assert captions == ["Loss minus the baseline's, 4 seeds", "Loss minus the baseline's, 1 seed"]
    (table,) = found(loss_blocks(read_losses([("exact", base[0], arm[0])])), Table)
    assert rows(table)[0][2] == "+10.0 - (only 1 pair of runs)"
    with pytest.raises(ValueError, match="differ in their targets"):
        read_losses([("exact", base[0], str(write_run(tmp_path / "longer", iterations=6)))])
    assert loss_blocks([]) == []


def test_cost_is_that_of_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    steps = {
        "train:seed-1/exact": {"state": "finished", "seconds": 90.0},
        "train:seed-1/standard": {"state": "failed", "seconds": 30.0},
        "import": {"state": "finished"},
        "report": {"state": "started"},
    }
    path.write_text(json.dumps({"steps": steps}))
    (table,) = found(cost_blocks(read_ledger(path)), Table)
    assert rows(table) == [["train", "2", "1", "2.0"], ["import", "1", "1", "0.0"]]
    assert cost_blocks(None) == []
    submitted = {"state": "waiting", "seconds": 3.0, "commands": ["megatron-exact stages --sbatch=-plong"]}
    ledger = {"steps": {"train:seed-1/exact": submitted}}
    says = lines_of(summary_blocks(read(tmp_path, comparison("constant")), [], ledger))
    assert says["Cost"].endswith("; jobs of a batch system count only until they were submitted.")
    path.write_text(json.dumps({"steps": {"import": {"seconds": 1}}}))
    with pytest.raises(ValueError, match=r"ledger\.json is not a ledger"):
        read_ledger(path)


def test_figure_1_is_weighted_as_training_weighs(tmp_path: Path) -> None:
    pack = read_pack(write_pack(tmp_path / "web-pack"))
    assert (pack.name, pack.row_tokens, pack.tau, pack.sources) == (
        "web-pack",
        64,
        16.0,
        (("web", "odc-by"),),
    )
    weights = build_weighting("exact", [400, 300, 200, 100], [0, 8, 16, 32], 64).bucket_weights
    assert [row["weight"] for row in pack.table] == pytest.approx(weights.tolist())
    (tmp_path / "out").mkdir()
    blocks = exposure_blocks(tmp_path / "out", [pack])
    (figure,), (table,) = found(blocks, Figure), found(blocks, Table)
    assert (tmp_path / "out" / figure.file).read_bytes().startswith(b"\x89PNG")
    assert figure.caption == (
        "Of 1,000 targets 30.0% have an effective context of 16 tokens or more; after weighting these "
        "carry 33.0% of the signal. Weights: EXACT with alpha 0.15, gamma 0.5, tau 16, the paper's; "
        "no training on this pack was given."
    )  # 0.3 * 1.15 / (0.7 + 0.3 * 1.15)
    assert rows(table)[2][:3] == ["16-31, tail", "200", "20.00%"]


def test_figure_1_from_what_inspect_pack_printed(tmp_path: Path) -> None:
    pack = read_pack(write_pack(tmp_path / "pack"))
    file = tmp_path / "alpha-1.json"
    file.write_text(json.dumps({"row_tokens": 64, "buckets": pack.table, "tail": {"tau": 16.0}}))
    again = read_exposure(file)
    assert (again.name, again.table, again.tau) == ("alpha-1", pack.table, 16.0)
    assert again.weights == "EXACT with tau 16, as given to megatron-exact inspect"
    content = json.loads(file.read_text()) | {"parameters": {"alpha": 1.0, "gamma": 0.5, "tau": 16.0}}
    file.write_text(json.dumps(content))
    assert (
        read_exposure(file).weights
        == "EXACT with alpha 1, gamma 0.5, tau 16, as given to megatron-exact inspect"
    )


def trained(folder: Path, rule: str, parameters: dict[str, Any], **stage: Any) -> list[Compared]:
    """A comparison whose treatment had one training, on rows of 64 tokens."""
    content = comparison(rule)
    run = content["runs"][0]["treatment"]
    run["training"] = [{"rule": rule, "parameters": parameters, "row_tokens": 64} | stage]
    return read(folder, content)


def test_figure_1_shows_the_weights_of_the_treatment(tmp_path: Path) -> None:
    pack = read_pack(write_pack(tmp_path / "pack"))
    compared = trained(tmp_path, "exact", {"alpha": 1.0, "gamma": 0.0, "tau": 32.0})
    compared[0].content["runs"][0]["treatment"]["fingerprint"] = None
    (shown,) = as_trained(pack, compared)
    assert [row["weight"] for row in shown.table] == pytest.approx([1, 1, 1, 2])
    assert (shown.tau, pack.tau) == (32.0, 16.0)
    (tmp_path / "out").mkdir()
    (figure,) = found(exposure_blocks(tmp_path / "out", [shown]), Figure)
    assert figure.caption.endswith(
        "Weights: EXACT with alpha 1, gamma 0, tau 32, as in the training record of Qwen2.5-0.5B."
    )
    # The same with the paper's parameters is another picture.
    (tmp_path / "paper").mkdir()
    (usual,) = found(exposure_blocks(tmp_path / "paper", [pack]), Figure)
    assert (tmp_path / "out" / figure.file).read_bytes() != (tmp_path / "paper" / usual.file).read_bytes()


def test_figure_1_shows_caps_and_weights_set_by_hand(tmp_path: Path) -> None:
    pack = read_pack(write_pack(tmp_path / "pack"))
    recorded = {"alpha": 1.0, "gamma": 0.0, "tau": 32.0, "cap": 1.5, "weight_from_8": 1.25}
    compared = trained(tmp_path, "exact", recorded)
    compared[0].content["runs"][0]["treatment"]["fingerprint"] = None
    (shown,) = as_trained(pack, compared)
    assert [row["weight"] for row in shown.table] == pytest.approx([1, 1.25, 1, 1.5])
    assert "cap 1.5, weight 1.25 from 8 tokens" in shown.weights


def test_figure_1_of_a_tuned_model_takes_the_weighted_stage(tmp_path: Path) -> None:
    """Answers were tuned on another pack afterwards, so the comparison names that one's fingerprint."""
    pack = read_pack(write_pack(tmp_path / "pack"))
    content = comparison("exact", parameters={"alpha": 0.5})
    for stage in content["runs"][0]["treatment"]["training"]:
        stage["row_tokens"] = 64
    (shown,) = as_trained(pack, read(tmp_path, content))
    assert shown.weights.startswith("EXACT with alpha 0.5, gamma 0.5, tau 16, as in the training record")


def test_figure_1_has_one_picture_for_each_set_of_weights(tmp_path: Path) -> None:
    pack = read_pack(write_pack(tmp_path / "pack"))
    compared = [
        one
        for number, alpha in enumerate((0.15, 1.0, 1.0))
        for one in trained(tmp_path / str(number), "exact", {"alpha": alpha})
    ]
    for one in compared:
        one.content["runs"][0]["treatment"]["fingerprint"] = None
    shown = as_trained(pack, compared)
    assert [one.weights.split(",")[0] for one in shown] == ["EXACT with alpha 0.15", "EXACT with alpha 1"]
    (tmp_path / "out").mkdir()
    figures = found(exposure_blocks(tmp_path / "out", shown), Figure)
    assert [figure.file for figure in figures] == ["exposure-1.png", "exposure-2.png"]


@pytest.mark.parametrize(
    ("rule", "stage", "fingerprint"),
    [
        ("exact", {"row_tokens": 4096}, None),  # rows of another length
        ("exact", {}, "f" * 64),  # another pack
        ("packed-position", {}, None),  # no weight of an effective context
        ("none", {}, None),
    ],
)
def test_figure_1_says_where_no_training_fits(
    tmp_path: Path, rule: str, stage: dict[str, Any], fingerprint: str | None
) -> None:
    pack = read_pack(write_pack(tmp_path / "pack"))
    compared = trained(tmp_path, rule, {"alpha": 1.0}, **stage)
    compared[0].content["runs"][0]["treatment"]["fingerprint"] = fingerprint
    assert as_trained(pack, compared) == [pack]
    assert "no training on this pack was given" in pack.weights


@pytest.mark.parametrize("value", ["much", True, 1e999, -1, None])
def test_recorded_parameters_that_are_no_numbers_are_an_error(tmp_path: Path, value: Any) -> None:
    pack = read_pack(write_pack(tmp_path / "pack"))
    compared = trained(tmp_path, "exact", {})
    run = compared[0].content["runs"][0]["treatment"]
    run["fingerprint"], run["training"][0]["parameters"] = None, {"alpha": value}
    with pytest.raises(
        ValueError, match=r"Qwen2\.5-0\.5B records weights that do not fit the pack pack \(alpha"
    ):
        as_trained(pack, compared)


@pytest.mark.parametrize("text", ["{", "[]", '{"row_tokens": 64, "buckets": [], "tail": {"tau": 1}}'])
def test_damaged_packs_and_exposures_are_named(tmp_path: Path, text: str) -> None:
    for name in ("manifest.json", "exposure.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json .*pack the corpus again"):
        read_pack(tmp_path)
    with pytest.raises(ValueError, match=r"exposure\.json .*print it again"):
        read_exposure(tmp_path / "exposure.json")
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        read_pack(tmp_path / "elsewhere")


def test_figure_4_has_a_row_a_model_and_marks_what_is_not_certain(tmp_path: Path) -> None:
    content = comparison(preset="qwen2.5-3b", gain=1.0)
    content["lengths"][2] |= {
        "baseline": 0.0,
        "treatment": 3.0,
        "relative_lift_percent": None,
    }  # nolima at 4K
    compared = read(tmp_path, content, comparison("random-same-mass"))
    fields, columns = lift_fields([one for one in compared if one.is_exact])
    assert columns == [1024, 2048, 4096]
    nolima, ruler = fields
    assert nolima.row_names == ["Qwen2.5-3B"]
    assert np.asarray(nolima.values)[0].tolist() == [5, 13, 0]  # as its texts
    assert nolima.texts == [["(+5)", "+13", "base 0"]]  # 1 +- 1 includes 0, 2 +- 1 does not
    assert list(nolima.steps) == [2]
    assert ruler.texts[0][0] == "(+2)"
    out = tmp_path / "out"
    out.mkdir()
    blocks = lift_blocks(out, compared)
    (figure,), (table, others) = found(blocks, Figure), found(blocks, Table)
    assert (out / figure.file).exists()
    assert "NoLiMa, 500 examples a cell; Qwen2.5-3B: 1K (+5), 2K +13, 4K base 0" in figure.alt
    assert nolima.scale == ruler.scale == 15
    assert "one colour scale, -15 to +15 %" in plain_text(figure.caption)
    assert "base 0: standard continued pretraining scores 0" in plain_text(figure.caption)
    assert "Bold" not in plain_text(figure.caption)
    by_model = {row[0]: row[1:] for row in rows(table)}
    assert by_model["Qwen2.5-3B"][:4] == ["+30.4", "+5.0", "+23.7", "+7.5"]
    assert {row[0]: row[2] for row in rows(others)}["Qwen2.5-7B"] == "not run"
    assert by_model["mean of the paper's 7"][::2] == ["+39.1", "+58.1", "+9.2", "+7.7"]


def test_what_lies_beyond_the_scale_of_figure_4_is_marked(tmp_path: Path) -> None:
    content = comparison(gain=1.0)
    content["lengths"][2] |= estimate(1, 3)  # nolima at 4K, +300 %
    (one,) = read(tmp_path, content)
    fields, _ = lift_fields([one])
    assert [field.scale for field in fields] == [100, 100]
    assert is_beyond(fields[0].values, 100).tolist() == [[False, False, True]]
    out = tmp_path / "out"
    out.mkdir()
    (figure,) = found(lift_blocks(out, [one]), Figure)
    assert "Bold: beyond the colour scale." in plain_text(figure.caption)


def test_few_examples_stand_at_the_number() -> None:
    few = difference_cell(estimate_of({**estimate(20, 1), "examples": 4}))
    assert plain_text(few) == "+1.00 [+0.00, +2.00] includes 0, only 4 examples"
    none = {**estimate(20, 3), "ci95": None, "ci95_reason": "too few", "examples": 44}
    assert plain_text(difference_cell(estimate_of(none))) == "+3.00 - (too few) only 44 examples"
    assert "example" not in plain_text(difference_cell(estimate_of(estimate(20, 1))))


def probed(tmp_path: Path, **change: Any) -> Compared:
    """A comparison with a probe whose entries have this effect."""
    content = comparison(has_probe=True)
    for entry in [*content["probe"]["cells"], *content["probe"]["distances"]]:
        entry["measures"]["effect"] |= change
    return read(tmp_path, content)[0]


def test_colours_of_figure_3_have_the_sign_of_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Field] = []
    monkeypatch.setattr(
        "megatron_exact.report.experiment.plot_fields", lambda path, fields, **_: drawn.extend(fields)
    )
    small = {"baseline": 4.0, "treatment": 3.997, "delta": -0.003, "ci95": [-0.1, 0.1]}
    (figure, *_) = found(field_blocks(tmp_path, [probed(tmp_path, **small)]), Figure)
    before, after, difference = drawn
    assert {text for row in before.texts for text in row} == {"", "+4.0"}
    assert {text for row in difference.texts for text in row} == {"", "(-0.0030)"}
    assert before.scale == after.scale == 4.0
    assert difference.scale == 0.01
    assert "20 items a cell" in before.title
    assert "-4 to +4 for both sides, -0.01 to +0.01 for their difference" in plain_text(figure.caption)
    drawn.clear()
    far = {"baseline": 4.0, "treatment": 4.0, "delta": -0.0003, "ci95": [-0.1, 0.1]}
    far["baseline"] = 4.0003
    found(field_blocks(tmp_path, [probed(tmp_path / "b", **far)]), Figure)
    assert {text for row in drawn[2].texts for text in row} == {"", "(-0.0003)"}


def test_figure_5_shows_n_and_names_intervals_only_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[Panel], Axis]] = []
    monkeypatch.setattr(
        "megatron_exact.report.experiment.plot_lines",
        lambda path, panels, axis, **_: drawn.append((panels, axis)),
    )
    (figure, *_) = found(probe_blocks(tmp_path, [probed(tmp_path)]), Figure)
    panels, axis = drawn[0]
    assert axis.names[0] == "64\nn=20"
    assert axis.is_log
    assert panels[1].lines[0].name == "difference, 95 % interval"
    assert "bars below are those of the paired difference" in plain_text(figure.caption)
    drawn.clear()
    without = {"ci95": None, "ci95_reason": "three pairs of runs"}
    (figure, *_) = found(probe_blocks(tmp_path, [probed(tmp_path / "b", **without)]), Figure)
    assert drawn[0][0][1].lines[0].name == "difference, no interval"
    assert "There are no 95 % intervals: three pairs of runs." in plain_text(figure.caption)


def test_figure_3_and_5_take_their_own_kinds(tmp_path: Path) -> None:
    compared = read(tmp_path, comparison(has_probe=True), comparison(preset="qwen2.5-3b"))
    out = tmp_path / "out"
    out.mkdir()
    fields, lines = field_blocks(out, compared), probe_blocks(out, compared)
    assert [figure.file for figure in found(fields, Figure)] == [
        "field-1-qwen2.5-0.5b-exact-evidence-field.png"
    ]
    assert len(found(lines, Figure)) == 2
    assert len(list(out.iterdir())) == 3
    (numbers,) = found(fields, Table)
    assert rows(numbers)[0][:5] == ["64", "128", "20", "+1.360", "+1.438"]
    ranges, by_distance, *_ = found(lines, Table)
    assert rows(ranges)[1] == [
        "4K to 64K", "+0.150 [+0.050, +0.250]", "+0.177", "+1.50 [+0.50, +2.50]", "+2.20", "80"
    ]  # fmt: skip
    assert rows(ranges)[0][2] == "-"  # the paper has other distances
    assert rows(by_distance)[3][:4] == ["65,536", "20", "+0.000", "+0.600"]


def test_what_was_compared(tmp_path: Path) -> None:
    blocks = comparison_blocks(read(tmp_path, comparison(), comparison(None, preset=None)))
    (table,) = found(blocks, Table)
    assert rows(table)[0] == [
        "Qwen2.5-0.5B", "EXACT", "none at 4,096, then none at 2,048", "exact at 4,096, then none at 2,048",
        "1", "yes",
    ]  # fmt: skip
    assert rows(table)[1][1:4] == ["rule unknown", "unknown", "unknown"]
    assert "Nothing" in plain_text(found(comparison_blocks([]), Note)[0].text)


def test_licences_are_gathered_and_unknown_where_unknown(tmp_path: Path) -> None:
    licences = {
        "model": "apache-2.0",
        "corpora": [{"name": "web", "licence": "mit"}, {"name": "books", "licence": None}],
    }
    content = comparison()
    content["runs"][0]["baseline"] = side("none", preset="qwen2.5-0.5b", licences=licences)
    packs = [read_pack(write_pack(tmp_path / "a")), read_pack(write_pack(tmp_path / "b", None))]
    table, paper = found(licence_blocks(read(tmp_path, content), packs), Table)
    assert rows(table) == [
        ["web", "corpus", "odc-by; mit"],
        ["Qwen2.5-0.5B", "model that training started from", "apache-2.0"],
        ["books", "corpus", "unknown"],
    ]
    assert len(paper.body) == 3
    assert len(found(licence_blocks([], []), Note)) == 1
