"""Comparisons are read, named by model and rule, and refused where a row would be ambiguous."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.report.compared import Compared, read_compared, signed, token_label, window_tokens
from tests.unit.report.small_comparisons import comparison, estimate, side, write_comparison


def read(folder: Path, content: dict[str, Any], label: str = "") -> Compared:
    write_comparison(folder, content)
    return read_compared([f"{label}{folder}"])[0]


def test_a_preset_is_the_paper_s_model_and_tuning_is_no_rule(tmp_path: Path) -> None:
    found = read(tmp_path, comparison(preset="llama-3.2-3b"))
    assert (found.label, found.paper_model) == ("LLaMA-3.2-3B", "LLaMA-3.2-3B")
    assert (found.baseline_rule, found.treatment_rule) == ("none", "exact")
    assert found.is_exact


def test_a_label_goes_before_what_the_models_say(tmp_path: Path) -> None:
    assert read(tmp_path / "a", comparison(), "mine=").label == "mine"
    assert read(tmp_path / "a=b", comparison()).label == "Qwen2.5-0.5B"
    assert read(tmp_path / "c", comparison(preset=None, name="tiny")).label == "tiny"
    bare = comparison(preset=None)
    bare["runs"] = [{"baseline": {"model": None}, "treatment": {"model": None}}]
    found = read(tmp_path / "folder", bare)
    assert (found.label, found.treatment_rule, found.treatment_name) == ("folder", None, "rule unknown")
    assert found.is_exact


@pytest.mark.parametrize(
    ("rule", "parameters", "name"),
    [
        ("exact", {"alpha": 0.15, "gamma": 0.5, "tau": 1024.0}, "EXACT"),
        ("exact", {"alpha": 1.0, "gamma": 0.5, "tau": 1024.0}, "EXACT (alpha 1)"),
        ("exact", {"alpha": 0.15, "gamma": 0.0, "tau": 512.0}, "EXACT (gamma 0, tau 512)"),
        ("exact", {"alpha": 0.15, "cap": 2.0}, "EXACT (cap 2)"),
        ("uniform-tail", {"alpha": 0.15, "gamma": 0.5}, "Uniform effective-context boost"),
        ("exact-normalized", {}, "Normalized EXACT"),
        ("longce", {"confidence_cap": 5.0}, "longce (confidence_cap 5)"),
    ],
)
def test_rules_are_named_with_what_is_not_the_paper_s(
    tmp_path: Path, rule: str, parameters: dict[str, float], name: str
) -> None:
    found = read(tmp_path, comparison(rule, parameters=parameters))
    assert found.treatment_name == name
    assert found.is_exact is (name == "EXACT")


def test_a_comparison_against_another_rule_is_not_table_1(tmp_path: Path) -> None:
    content = comparison("exact")
    content["runs"][0]["baseline"] = side("uniform-tail")
    assert not read(tmp_path, content).is_exact


def test_stages_of_several_rules_are_all_named(tmp_path: Path) -> None:
    content = comparison("exact")
    content["runs"][0]["treatment"]["training"].insert(
        0, {"rule": "uniform-tail", "parameters": {}, "row_tokens": 1024}
    )
    found = read(tmp_path, content)
    assert found.treatment_name == "Uniform effective-context boost then EXACT"
    assert not found.is_exact


def test_seeds_of_different_rules_are_refused(tmp_path: Path) -> None:
    content = comparison("exact")
    content["runs"] += comparison("uniform-tail")["runs"]
    with pytest.raises(ValueError, match="mixes runs of EXACT and Uniform effective-context boost"):
        read(tmp_path, content)


def test_two_comparisons_of_one_place_are_refused(tmp_path: Path) -> None:
    one, other = (str(write_comparison(tmp_path / name, comparison())) for name in "ab")
    with pytest.raises(ValueError, match=r"are both EXACT of Qwen2\.5-0\.5B: give one of them a label"):
        read_compared([one, other])
    assert len(read_compared([one, f"again={other}"])) == 2
    probe_only = {**comparison(has_probe=True), "aggregates": [], "lengths": [], "cells": []}
    assert len(read_compared([one, str(write_comparison(tmp_path / "c", probe_only))])) == 2


def test_windows(tmp_path: Path) -> None:
    content = comparison()
    content["options"]["nolima_k_tokens"] = 1000
    content["lengths"].append({"suite": "nolima", "length": 1000, **estimate(1, 1)})
    found = read(tmp_path, content)
    assert found.windows("ruler") == [1024, 2048, 4096]
    assert found.windows("qa") == []
    assert found.regime_windows("ruler", "trained") == [1024, 2048]
    assert found.regime_windows("nolima", "trained") == [1000]
    assert [window_tokens("1.5K"), window_tokens("1.5K", 1000), window_tokens("512")] == [1536, 1500, 512]
    assert [token_label(n) for n in (512, 1536, 65536, 1000, 256, 0)] == [
        "0.5K",
        "1.5K",
        "64K",
        "1,000",
        "256",
        "0",
    ]


@pytest.mark.parametrize(
    "damage",
    [
        {"runs": []},
        {"pairing": {}},
        {"aggregates": [], "lengths": [], "cells": []},
        {"aggregates": [{"suite": "ruler", "regime": "all"}]},
        {"lengths": [{"suite": 1, **estimate(1, 1)}]},
    ],
)
def test_damaged_comparisons_are_named(tmp_path: Path, damage: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"comparison\.json is not a comparison .*run megatron-exact compare again"
    ):
        read(tmp_path, {**comparison(), **damage})


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_other_files_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(
        ValueError,
        match=r"comparison\.json (is not JSON|contains .*, not an object).*megatron-exact compare again",
    ):
        read_compared([str(tmp_path)])


def test_missing_folders_and_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no comparison\.json: give a folder"):
        read_compared([str(tmp_path)])
    with pytest.raises(ValueError, match="write DIR or LABEL=DIR"):
        read_compared(["=x"])
    assert json.loads(json.dumps(comparison())) == comparison()


def test_what_rounds_to_0_has_no_minus() -> None:
    assert [signed(value, 2) for value in (-0.004, 0.0, 1.256, -0.3)] == [
        "+0.00",
        "+0.00",
        "+1.26",
        "-0.30",
    ]
