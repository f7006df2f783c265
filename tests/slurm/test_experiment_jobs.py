"""`run_experiment.py` with `kind = "slurm"` on a real Slurm: training and a suite as jobs."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import CHECKOUT
from tests.unit.evaluation_suites.small_evaluation import NEEDLES, write_small_model

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]
MINUTES = 60.0
FILE = """
name = "small"
seeds = [1]

[model]
hf = "{model}"

[[corpora]]
name = "texts"
input = ["{texts}"]
arguments = ["--workers", "1"]

[packing]
policy = "best-fit"
validation_fraction = 0.2

[[stages]]
row_tokens = 64

[training]
arguments = [
    "--cpu", "--train-iters", "4", "--global-batch-size", "2", "--micro-batch-size", "1", "--lr", "1e-3",
    "--eval-iters", "1", "--save-interval", "4",
]

[[arms]]
name = "standard"
rule = "none"

[[arms]]
name = "exact"
rule = "exact"

[[suites]]
name = "nolima"
lengths = ["512"]
samples = 4
tasks = ["needle_set"]
arguments = ["--nolima-data", "{needles}", "--example-cache", "{cache}"]

[machine]
kind = "slurm"
processes = 1
device = "cpu"
sbatch = "--output={logs}/%j.out"
evaluation_nodes = 2
"""


def states(output: Path) -> dict[str, str]:
    """State of each step in the ledger."""
    steps = json.loads((output / "ledger.json").read_text())["steps"]
    return {name: step["state"] for name, step in steps.items()}


def wait_for_jobs(cluster: Cluster, logs: Path) -> None:
    cluster.wait_until(lambda: not cluster.run("squeue", "--noheader").strip(), 25 * MINUTES, "jobs run on")
    printed = "\n".join(path.read_text()[-2000:] for path in sorted(logs.glob("*.out")))
    assert not re.search("^error: ", printed, re.MULTILINE), printed


def test_an_experiment_in_a_queue(cluster: Cluster, tmp_path: Path) -> None:
    texts, logs, output = tmp_path / "texts.jsonl", tmp_path / "logs", tmp_path / "out"
    logs.mkdir()
    lines = [
        json.dumps({"text": f"The book of tale {n} is on the table. " * (1 + n % 9)}) for n in range(80)
    ]
    texts.write_text("\n".join(lines) + "\n")
    model = write_small_model(tmp_path / "model")
    file = tmp_path / "small.toml"
    values = {"model": model, "texts": texts, "needles": NEEDLES, "logs": logs, "cache": tmp_path / "cache"}
    file.write_text(FILE.format(**values))

    def call() -> str:
        command = [sys.executable, "tools/run_experiment.py", str(file), "--output", str(output)]
        ours = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GPUS_PER_NODE": "1"}
        done = subprocess.run(
            command,
            cwd=CHECKOUT,
            env={**cluster.environment, **ours},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    assert "steps wait for jobs, first train:seed-1/standard" in call()
    assert states(output)["train:seed-1/exact"] == "waiting"
    assert states(output)["evaluate:seed-1/exact/nolima"] == "not run"
    wait_for_jobs(cluster, logs)
    assert "steps wait for jobs, first evaluate:seed-1/standard/nolima" in call()
    assert states(output)["train:seed-1/exact"] == states(output)["export:seed-1/exact"] == "finished"
    wait_for_jobs(cluster, logs)
    assert "steps wait" not in call()
    assert set(states(output).values()) == {"finished"}
    with (output / "table1.csv").open() as stream:
        rows = {(row["benchmark"], row["regime"]): row for row in csv.DictReader(stream)}
    found = rows["nolima", "extrapolated"]  # 512 tokens are beyond rows of 64
    assert found["state"].startswith("run")
    assert float(found["standard_cpt"]) >= 0
    assert rows["ruler", "trained"]["state"] == "not run"
