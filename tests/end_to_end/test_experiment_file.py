"""An experiment from one file, for real: the miniature's model with a small corpus, interrupted once."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_exact.data.manifest import read_manifest
from megatron_exact.exposure import build_weighting

ROOT = Path(__file__).resolve().parents[2]


def quick_file(folder: Path) -> Path:
    """Write the shipped miniature with one seed, two arms, few steps and questions."""
    text = (ROOT / "examples" / "experiments" / "miniature.toml").read_text()
    head, *arms = text.split("[[arms]]\n")
    last, tail = arms.pop().split("[probe]")
    kept = [arm for arm in (*arms, last) if re.search(r'name = "(standard|position-1)"', arm)]
    text = "[[arms]]\n".join([head, *kept]) + "[probe]" + tail
    for before, after in (
        ("seeds = [1, 2, 3, 4, 5, 6, 7, 8, 9]", "seeds = [1]"),
        ('also_against = ["exact-1"]', "also_against = []"),
        ('"1200000"', '"120000", "--questions", "8"'),
        ('"--train-iters", "160"', '"--train-iters", "12"'),
        ('"160"', '"12"'),
        ('"--eval-iters", "16"', '"--eval-iters", "4"'),
    ):
        assert before in text
        text = text.replace(before, after)
    path = folder / "quick.toml"
    path.write_text(text)
    return path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_a_file_to_a_table(tmp_path: Path) -> None:
    file, output = quick_file(tmp_path), tmp_path / "out"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/run_experiment.py", str(file), "--output", str(output), *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    first = run("--only", "import,corpus,pack")
    assert first.returncode == 0, first.stderr
    assert not (output / "table1.csv").exists()
    done = run()
    assert done.returncode == 0, done.stderr
    assert "] import" not in done.stdout  # finished before
    assert done.stdout.count("train:seed-1/") == 2
    with (output / "table1.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["arm"] for row in rows} == {"position-1"}
    suites = [row for row in rows if row["benchmark"] in ("nolima", "ruler", "qa")]
    assert len(suites) == 5
    assert all(row["state"] == "not run" and not row["delta"] for row in suites)
    probes = [row for row in rows if row["benchmark"].startswith("probe")]
    compared = json.loads((output / "comparisons/position-1-probe/comparison.json").read_text())
    for row, kind in zip(probes, compared["probe"]["kinds"], strict=True):
        effect = kind["measures"]["effect"]
        assert float(row["delta"]) == pytest.approx(effect["delta"], abs=5e-4)
    weighting = json.loads((output / "runs/seed-1/position-1/packed-position/512/run.json").read_text())[
        "weighting"
    ]
    exposure = read_manifest(output / "packs/seed-1/512").splits["train"].exposure
    exact = build_weighting("exact", exposure.counts, exposure.lower, 512, alpha=1.0).table
    assert exact is not None
    assert weighting["mean_weight"] == pytest.approx(exact.mean_weight, rel=1e-12)
    assert weighting["parameters"]["mass_scale"] < 1
    ledger = json.loads((output / "ledger.json").read_text())
    assert {step["state"] for step in ledger["steps"].values()} == {"finished"}
    assert "<html" in (output / "report.html").read_text()
    again = run()
    assert again.returncode == 0, again.stderr
    assert [line for line in again.stdout.splitlines() if line.startswith("[")] == [
        line for line in again.stdout.splitlines() if "] table" in line or "] report" in line
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_trained_arm_scores_the_packs_of_another(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "experiments" / "miniature_evidence.toml").read_text()
    for before, after in (
        ("seeds = [1, 2, 3, 4]", "seeds = [1]"),
        ('"400000"', '"60000", "--questions", "4"'),
        ('"160"', '"6"'),
        ('"--lr-warmup-iters", "8"', '"--lr-warmup-iters", "2"'),
        ('"--eval-iters", "8"', '"--eval-iters", "2"'),
    ):
        assert before in text
        text = text.replace(before, after)
    file, output = tmp_path / "quick.toml", tmp_path / "out"
    file.write_text(text)
    command = [sys.executable, "tools/run_experiment.py", str(file), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = output / "runs/seed-1"
    ours = json.loads((runs / "evidence-1/exact-evidence/512/run.json").read_text())["weighting"]
    exact = json.loads((runs / "exact-1/exact/512/run.json").read_text())["weighting"]
    assert ours["rule"] == "exact-evidence"
    assert ours["mean_weight"] == pytest.approx(exact["mean_weight"], rel=1e-6)
    page = (output / "report.md").read_text()
    assert "EXACT with evidence (ours) (alpha 1) against EXACT (alpha 1)" in page
    assert "## Loss by effective context" in page
