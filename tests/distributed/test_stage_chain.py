"""A chain of two stages in both arms, really trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_exact.lineage import first_difference
from megatron_exact.training.stages import plan_chain, run_chain
from tests.distributed import jobs, ranks


def test_each_stage_starts_from_the_one_before_and_a_kill_costs_one_run(
    corpus: Path, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    longer = jobs.make_pack(corpus, "concat", "long", row_tokens=2 * jobs.ROW_TOKENS)
    arguments = [
        str(word) for word in (*jobs.MODEL, *jobs.SCHEDULE, "--train-iters", 2, "--save-interval", 1)
    ]
    runs = plan_chain(
        [str(longer), str(pack)],
        tmp_path,
        start=str(checkpoint),
        arms=["none", "exact"],
        arguments=arguments,
    )
    started = []

    def train(command: Sequence[str], *extra: str) -> int:
        argv = command[list(command).index("--") + 1 :]
        started.append(argv)
        ended = ranks.train(1, [*argv, *extra], tmp_path / f"output{len(started)}")
        return max(map(abs, ended.codes))

    # the first run is stopped after one of its two iterations
    with pytest.raises(ValueError, match="64 none ended at iteration 1 of 2"):
        run_chain(runs, 1, call=lambda command: train(command, "--exit-interval", "1"))
    run_chain(runs, 1, call=train)
    assert len(started) == 1 + len(runs)
    start = {}
    for run in runs:
        record = json.loads((run.folder / "run.json").read_text())
        start[run.name] = record["start_checkpoint"]
        assert record["row_tokens"] == (64 if run.stage == "64" else 128)
        assert record["weighting"]["rule"] == run.arm
        if run.arm == "exact":
            assert record["weighting"]["parameters"]["tau"] == record["row_tokens"] / 4
        losses = ranks.read_jsonl(run.folder / "losses.jsonl")
        assert [line["iteration"] for line in losses] == [1, 2]
    # one start for both arms, then each arm goes on from itself
    assert start["64 none"]["sha256"] == start["64 exact"]["sha256"]
    assert start["128 none"]["path"] == str(tmp_path / "none" / "64" / "iter_0000002")
    assert start["128 exact"]["path"] == str(tmp_path / "exact" / "64" / "iter_0000002")
    assert start["128 none"]["sha256"] != start["128 exact"]["sha256"]
    # a pair can be followed back: each arm names the run that it starts from
    earlier = {arm: start[f"128 {arm}"]["run"] for arm in ("none", "exact")}
    for arm, record in earlier.items():
        assert record == json.loads((tmp_path / arm / "64" / "run.json").read_text())
    both = [{"start_checkpoint": start[f"128 {arm}"], "fingerprint": "long"} for arm in ("none", "exact")]
    assert first_difference(*both) is None
    earlier["exact"]["seed"] += 1
    assert "in the training before" in (first_difference(*both) or "")
