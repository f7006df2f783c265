"""`make demo-text` in small: the whole chain, an interruption in the middle, and the call that goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.demo_calls import ROOT, members_of

LIMIT_SECONDS = 400


def demo_command(output: Path, text: Path) -> list[str]:
    return [sys.executable, "tools/run_demo.py", "--quick", "--output", str(output), "--text", str(text)]


def run_demo(output: Path, text: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        demo_command(output, text),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents, short and long ones, of this interpreter's own sources."""
    folder = tmp_path_factory.mktemp("texts")
    sources = sorted(Path(json.__file__).parents[1].glob("*.py"))[:60]
    assert len(sources) == 60
    for source in sources:
        (folder / f"{source.stem}.txt").write_bytes(source.read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT_SECONDS)
def test_interrupted_continued_and_repeated(tmp_path: Path, text: Path) -> None:
    output = tmp_path / "demo"
    tracker = output / "work" / "standard" / "run" / "latest_checkpointed_iteration.txt"

    # Interrupted once the first arm has a checkpoint: nothing is left running, no report stands there.
    with open(tmp_path / "first.txt", "wb") as log:
        first = subprocess.Popen(
            demo_command(output, text), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        deadline = time.monotonic() + LIMIT_SECONDS
        while not tracker.exists() and first.poll() is None:
            assert time.monotonic() < deadline, (tmp_path / "first.txt").read_text()
            time.sleep(0.1)
        first.send_signal(signal.SIGINT)
        code = first.wait(60)
    if code == 0:
        pytest.skip("the arm ended before the signal came")
    assert code == 130, (tmp_path / "first.txt").read_text()
    assert members_of(output) == []
    assert not (output / "report.md").exists()

    # The second call uses what was finished, continues the arm and writes the report.
    second = run_demo(output, text)
    assert second.returncode == 0, second.stdout[-3000:]
    assert "base: nothing changed, using what was made before" in second.stdout
    assert "standard: continuing where an earlier run stopped" in second.stdout
    run = json.loads((output / "work" / "standard" / "run" / "run.json").read_text())
    assert [resume["iteration"] for resume in run["resumes"]] != []
    check_results(output)
    report = (output / "report.md").read_text(encoding="utf-8")

    # The third has nothing to do but the report.
    started = time.monotonic()
    third = run_demo(output, text)
    assert third.returncode == 0, third.stdout[-3000:]
    assert third.stdout.count("nothing changed, using what was made before") == 9
    assert time.monotonic() - started < 60
    assert without_times((output / "report.md").read_text(encoding="utf-8")) == without_times(report)


def check_results(output: Path) -> None:
    """The report, its figures, and the pairing of the two arms."""
    report = (output / "report.md").read_text(encoding="utf-8")
    for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", report):
        assert (output / name).read_bytes().startswith(b"\x89PNG"), name
    arms = {}
    for arm in ("standard", "exact"):
        folder = output / "work" / arm / "run"
        lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
        arms[arm] = (json.loads((folder / "run.json").read_text()), lines)
    (standard, standard_lines), (exact, exact_lines) = arms["standard"], arms["exact"]
    assert standard["fingerprint"] == exact["fingerprint"]
    assert standard["start_checkpoint"]["sha256"] == exact["start_checkpoint"]["sha256"]
    assert [line["bucket_targets"] for line in standard_lines] == [
        line["bucket_targets"] for line in exact_lines
    ]
    # The first loss is that of the shared checkpoint on the same rows; later the arms part.
    assert standard_lines[0]["loss"] == pytest.approx(exact_lines[0]["loss"], rel=1e-6)
    assert standard_lines[0]["weighted_loss"] == standard_lines[0]["loss"]
    assert exact_lines[0]["weighted_loss"] > exact_lines[0]["loss"]
    assert standard_lines[-1]["loss"] != exact_lines[-1]["loss"]


def without_times(report: str) -> str:
    """A report without its table of wall times."""
    return re.sub(r"## Wall time\n.*?(?=\n## )", "", report, flags=re.DOTALL)


def test_too_little_text_is_one_line_and_leaves_no_report(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("too short\n")
    done = run_demo(tmp_path / "demo", tmp_path / "texts")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("error: ")
    assert "too little; the demo needs 20 documents" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "demo" / "report.md").exists()
    assert os.listdir(tmp_path / "demo" / "work" / "corpus") == ["step.json"]
