"""`make demo` in small: interrupted in the middle, called again, and its report against its files."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.demo_calls import ROOT, members_of, output_of

LIMIT_SECONDS = 900
ARMS = ("standard", "exact-1")


def command(output: Path) -> list[str]:
    return [
        sys.executable,
        "tools/run_miniature_demo.py",
        "--quick",
        "--jobs",
        "1",
        "--output",
        str(output),
    ]


def run_demo(output: Path) -> str:
    return output_of(command(output), LIMIT_SECONDS)


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT_SECONDS)
def test_interrupted_continued_and_repeated(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    finished = output / "work" / "distant-1-standard" / "step.json"
    with open(tmp_path / "first.txt", "wb") as log:
        first = subprocess.Popen(
            command(output), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        deadline = time.monotonic() + LIMIT_SECONDS
        while not (finished.exists() and json.loads(finished.read_text())["finished"]):
            assert first.poll() is None, (tmp_path / "first.txt").read_text()
            assert time.monotonic() < deadline, (tmp_path / "first.txt").read_text()
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
        code = first.wait(LIMIT_SECONDS)
    assert code == 130, (tmp_path / "first.txt").read_text()
    assert members_of(output) == []
    assert not (output / "report.md").exists()

    said = run_demo(output)
    assert "distant-1-standard: nothing changed, using what was made before" in said
    check_report(output)
    check_runs(output)
    report = (output / "report.md").read_text(encoding="utf-8")

    said = run_demo(output)
    assert said.count("nothing changed, using what was made before") == 2 + len(ARMS)
    assert (output / "report.md").read_text(encoding="utf-8") == report


def check_report(output: Path) -> None:
    """Figures are there, and the tables say what results.json says."""
    report = (output / "report.md").read_text(encoding="utf-8")
    figures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", report)
    assert {"exposure.png", "margin.png", "losses.png"} <= set(figures)
    for name in figures:
        assert (output / name).read_bytes().startswith(b"\x89PNG"), name
    assert 'src="data:image/png;base64,' in (output / "report.html").read_text(encoding="utf-8")
    results = json.loads((output / "results.json").read_text())
    arms = results["designs"]["distant"]["arms"]
    assert [arm["name"] for arm in arms] == list(ARMS[1:])
    for arm in arms:
        record = json.loads((output / "work" / f"distant-1-{arm['name']}" / "run" / "run.json").read_text())
        assert arm["weights"] == record["weighting"]["weights"]
        assert max(arm["weights"]) > 1
        assert arm["probe"]["pairing"]["verified"]
        assert f"{arm['losses']['all']['delta']:+.4f}" in report
    assert "This is the quick demo" in report
    commands = report[report.index("## Commands") :]
    assert commands.index("tools/import_hf.py") < commands.index("--pretrained-checkpoint")


def check_runs(output: Path) -> None:
    """The arms are one pair each with standard: first losses equal, then they part."""
    work = output / "work"
    runs = {arm: work / f"distant-1-{arm}" / "run" for arm in ARMS}
    records = {arm: json.loads((run / "run.json").read_text()) for arm, run in runs.items()}
    losses = {
        arm: [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]
        for arm, run in runs.items()
    }
    assert len({record["fingerprint"] for record in records.values()}) == 1
    assert records["exact-1"]["weighting"]["parameters"]["alpha"] == 1
    assert losses["standard"][0]["loss"] == pytest.approx(losses["exact-1"][0]["loss"], rel=1e-6)
    assert losses["standard"][-1]["loss"] != losses["exact-1"][-1]["loss"]
    # the weighted objective is sum(N_b w_b l_b) / sum(N_b): recomputed from the sums by bucket
    first, weights = losses["exact-1"][0], records["exact-1"]["weighting"]["weights"]
    objective = (
        sum(w * s for w, s in zip(weights, first["bucket_loss_sums"], strict=True)) / first["targets"]
    )
    assert first["weighted_loss"] == pytest.approx(objective, rel=1e-6)
