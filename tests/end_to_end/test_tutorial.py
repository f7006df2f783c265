"""The commands of docs/tutorial.md, typed from first to last in a new folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.demo_calls import ROOT

LIMIT_SECONDS = 1800
SOURCES = ("tools", "examples", "megatron_exact")


def chain() -> str:
    """All shell blocks of the page, in their order, as one script; blocks of `text` show output."""
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(code for kind, code in blocks if kind != "text")


def test_the_page_has_the_whole_chain() -> None:
    script = chain()
    for step in ("tokenize_corpus", "pack_corpus", "training.pretrain", "export_hf", "compare_runs"):
        assert step in script
    assert "..." not in script, "a command with an ellipsis cannot be typed"
    assert "fingerprint 2dea" not in script, "what the commands print is no command"


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS + 60)
def test_the_chain_runs_with_what_it_made_itself(tmp_path: Path) -> None:
    for name in SOURCES:
        (tmp_path / name).symlink_to(ROOT / name)
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", chain()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    comparison = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert comparison["probe"], "the probe of both arms was compared"
    assert "EXACT" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    fingerprint = json.loads((tmp_path / "packs" / "long" / "manifest.json").read_text())["fingerprint"]
    assert f"fingerprint {fingerprint[:16]}\n" in page, "the page shows the pack that its commands make"
    for arm in ("standard", "exact"):
        lines = (tmp_path / "runs" / arm / "losses.jsonl").read_text().splitlines()
        assert len(lines) == 160
