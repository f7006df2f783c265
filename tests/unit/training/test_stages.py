"""Chains of stages: the plan, what is refused, and what a restart does."""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from stage_runs import ARGUMENTS, make_pack, save_checkpoint

from megatron_exact.commands.train import Ranks, choose_ranks, split_words
from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.score_files import ScoreRecord
from megatron_exact.files import write_json
from megatron_exact.training.job_flags import flag_value
from megatron_exact.training.stages import StageRun, describe_plan, plan_chain, run_chain, train_command
from tests import forked


class Trainer:
    """Stands in for torchrun: leaves a checkpoint, or fails."""

    def __init__(self, fail_at: int | None = None, stop_at: int = 10) -> None:
        self.commands: list[Sequence[str]] = []
        self.fail_at = fail_at
        self.stop_at = stop_at

    def __call__(self, command: Sequence[str]) -> int:
        self.commands.append(command)
        if len(self.commands) == self.fail_at:
            return 3
        save_checkpoint(Path(flag_value(command, "--save") or ""), self.stop_at)
        return 0


def test_stages_follow_the_row_length_and_arms_stand_beside_each_other(
    runs: list[StageRun], packs: list[str], tmp_path: Path
) -> None:
    assert [run.name for run in runs] == ["64 none", "64 exact", "128 none", "128 exact"]
    base, out = tmp_path / "base", tmp_path / "out"
    assert [run.previous for run in runs] == [base, base, out / "none" / "64", out / "exact" / "64"]
    for run in runs:
        assert flag_value(run.arguments, "--load") == flag_value(run.arguments, "--save") == str(run.folder)
        assert flag_value(run.arguments, "--pretrained-checkpoint") == str(run.previous)
        assert flag_value(run.arguments, "--pack") == packs[0 if run.stage == "128" else 1]
        assert flag_value(run.arguments, "--token-weighting") == run.arm
        assert run.iterations == 10


def test_a_chain_runs_in_order_and_a_finished_one_runs_nothing(runs: list[StageRun]) -> None:
    trainer = Trainer()
    run_chain(runs, 2, call=trainer)
    saved = [flag_value(command, "--save") for command in trainer.commands]
    assert saved == [str(run.folder) for run in runs]
    assert flag_value(trainer.commands[0], "--nproc-per-node") == "2"
    again = Trainer()
    run_chain(runs, 2, call=again)
    assert again.commands == []
    assert all(line.endswith("finished at iteration 10") for line in describe_plan(runs, 2))


def test_a_failure_stops_the_chain_and_a_restart_goes_on(runs: list[StageRun]) -> None:
    with pytest.raises(ValueError, match="64 exact ended with exit code 3"):
        run_chain(runs, 1, call=Trainer(fail_at=2))
    rest = Trainer()
    run_chain(runs, 1, call=rest)
    assert [flag_value(command, "--save") for command in rest.commands] == [
        str(run.folder) for run in runs[1:]
    ]


def test_a_run_that_is_refused_ends_with_one_line(
    runs: list[StageRun], capfd: pytest.CaptureFixture[str]
) -> None:
    """A child is really started; its flags are refused before any rank is."""
    first = replace(runs[0], arguments=(*runs[0].arguments, "--no-such-flag"))
    with pytest.raises(ValueError, match="64 none ended with exit code 1, its message is above"):
        run_chain([first], 1)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--no-such-flag" in line


def test_a_run_that_stops_early_is_not_taken_for_finished(runs: list[StageRun]) -> None:
    with pytest.raises(ValueError, match="64 none ended at iteration 4 of 10"):
        run_chain(runs, 1, call=Trainer(stop_at=4))
    assert "# 64 none: resumes from iteration 4" in describe_plan(runs, 1)


def test_a_damaged_last_checkpoint_is_trained_again(runs: list[StageRun]) -> None:
    save_checkpoint(runs[0].folder, 5)
    save_checkpoint(runs[0].folder, 10)
    assert runs[0].is_finished()
    (runs[0].folder / "iter_0000010" / "__0_0.distcp").write_bytes(b"")
    assert runs[0].iteration() == 5
    assert not runs[0].is_finished()


def test_a_finished_stage_is_skipped_only_if_it_is_the_same_run(packs: list[str], tmp_path: Path) -> None:
    def plan(*flags: str) -> list[StageRun]:
        arguments = [*ARGUMENTS, "--bf16", "--seed", "7", *flags]
        return plan_chain(packs, tmp_path / "c", start=None, arms=["none"], arguments=arguments)

    (first, _) = plan("--lr", "1e-5")
    save_checkpoint(first.folder, 10)
    fingerprint = read_manifest(flag_value(first.arguments, "--pack") or "").fingerprint
    record = {
        "fingerprint": fingerprint,
        "schedule": {"lr": 1e-5, "train_iters": 10, "bf16": True, "qk_timing": None},
        "configuration": {"lr": 1e-5, "bf16": True, "clip_grad": 0.5, "log_interval": 1, "seed": 7},
        "environment": {},
    }
    write_json(first.folder / "run.json", record)
    assert plan("--lr", "1e-05", "--clip-grad", "0.50", "--log-interval", "5")[0].is_finished()
    for flags, words in (
        (("--lr", "2e-5"), "lr is 1e-05, not 2e-5"),
        (("--lr", "1e-5", "--clip-grad", "1.0"), "clip_grad is 0.5, not 1.0"),
    ):
        with pytest.raises(ValueError, match=f"is finished, and its {words}: give what it was begun with"):
            plan(*flags)
    write_json(first.folder / "run.json", {**record, "fingerprint": "0" * 64})
    with pytest.raises(ValueError, match="is finished, and its pack is 0000"):
        plan("--lr", "1e-5")


def test_dry_run_names_every_command(runs: list[StageRun]) -> None:
    lines = describe_plan(runs, 1)
    assert len(lines) == 2 * len(runs)
    assert lines[0].startswith("# 64 none: starts from")
    assert "-m megatron_exact train --standalone" in lines[1]
    assert " -- --pack" in lines[1]


def test_recipes_make_the_stages_of_the_paper(tmp_path: Path) -> None:
    packs = [make_pack(tmp_path / str(rows), rows) for rows in (4096, 8192)]

    def plan(packs: list[str], recipe: str, *arguments: str) -> list[StageRun]:
        out = tmp_path / "out"
        return plan_chain(packs, out, start=None, arms=["exact"], recipe=recipe, arguments=arguments)

    runs = plan(packs, "qwen2.5_1.5b_8k")
    assert [run.stage for run in runs] == ["4k", "8k"]
    assert [flag_value(run.arguments, "--recipe") for run in runs] == ["qwen2.5_1.5b_4k", "qwen2.5_1.5b_8k"]
    assert runs[0].iterations == 2048
    assert flag_value(train_command(runs[0]), "--nproc-per-node") == "8"
    longer = plan(
        packs, "qwen2.5_1.5b_8k", "--global-batch-size", "256", "--recipe-set", "budget_tokens=2G"
    )
    assert [run.iterations for run in longer] == [2048, 1024]
    with pytest.raises(ValueError, match=r"stage qwen2\.5_0\.5b_4k needs a pack with rows of 4096"):
        plan(packs[1:], "qwen2.5_0.5b_4k")
    with pytest.raises(ValueError, match=r"which no stage of qwen2\.5_0\.5b_4k has"):
        plan(packs, "qwen2.5_0.5b_4k")


def test_several_nodes_are_for_a_batch_system(runs: list[StageRun]) -> None:
    with pytest.raises(ValueError, match="--nproc-per-node is missing"):
        train_command(runs[0])


def test_a_recipe_of_several_nodes_can_be_tried_on_one_machine(runs: list[StageRun]) -> None:
    wide = replace(runs[0], nodes=2, gpus_per_node=8, arguments=("--recipe", "llama3.1_8b_16k_2nodes"))
    with pytest.raises(ValueError, match="asks for 2 nodes, and this starts processes on one"):
        train_command(wide)
    options, job = split_words(train_command(wide, 4)[4:])
    assert choose_ranks(options, job) == Ranks(nodes=1, per_node=4)


def test_what_does_not_fit_is_refused(packs: list[str], tmp_path: Path) -> None:
    def plan(
        packs: list[str], *arguments: str, arms: Sequence[str] = ("none",), start: str | None = None
    ) -> None:
        plan_chain(packs, tmp_path / "out", start=start, arms=arms, arguments=arguments)

    with pytest.raises(ValueError, match="both have rows of 64"):
        plan([packs[1], make_pack(tmp_path / "twin", 64)], *ARGUMENTS)
    other = [make_pack(tmp_path / "a", 32, "a"), make_pack(tmp_path / "b", 16, "b")]
    with pytest.raises(ValueError, match="different tokenizers"):
        plan(other, *ARGUMENTS)
    with pytest.raises(ValueError, match="arms: exakt"):
        plan(packs, *ARGUMENTS, arms=["exakt"])
    with pytest.raises(ValueError, match="name each once"):
        plan(packs, *ARGUMENTS, arms=["exact", "exact"])
    with pytest.raises(ValueError, match="--save: the chain decides it"):
        plan(packs, *ARGUMENTS, "--save=x")
    with pytest.raises(ValueError, match="--train-iters is missing"):
        plan(packs)
    with pytest.raises(ValueError, match="contains no checkpoint"):
        plan(packs, *ARGUMENTS, start=str(tmp_path / "typo"))


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run_tool(name, *arguments)


def test_the_tool_prints_the_plan_and_says_one_line_on_errors(packs: list[str], tmp_path: Path) -> None:
    options = ["--pack", *packs, "--output", str(tmp_path / "out"), "--nproc-per-node", "1", "--dry-run"]
    done = run_tool("run_stages.py", *options, *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert len(commands) == 4
    assert all("-m megatron_exact train --standalone" in line for line in commands)
    assert "--token-weighting exact" in commands[1]
    assert not (tmp_path / "out").exists()
    failed = run_tool("run_stages.py", *options)
    assert failed.returncode == 1
    assert failed.stderr.splitlines() == [
        "error: --train-iters is missing: name a --recipe, or say how long each stage is"
    ]


def test_the_preflight_needs_a_number_of_gpus() -> None:
    done = run_tool("preflight.py", "--pack", "p")
    assert done.returncode == 1
    assert done.stderr == "error: --world-size is missing: say on how many GPUs the run will be\n"


def test_tau_is_one_for_all_stages_or_one_a_stage(packs: list[str], tmp_path: Path) -> None:
    def taus(*given: float) -> list[str | None]:
        out = tmp_path / "out"
        runs = plan_chain(packs, out, start=None, arms=["exact"], taus=given, arguments=ARGUMENTS)
        return [flag_value(run.arguments, "--exact-tau") for run in runs]

    assert taus() == [None, None]
    assert taus(16) == ["16", "16"]
    assert taus(16, 64) == ["16", "64"]  # rows of 64, then of 128, in whatever order the packs are named
    with pytest.raises(ValueError, match="--exact-tau names 3 values for 2 stages"):
        taus(16, 32, 64)
    for given, row_tokens in (((16, 65), 128), ((64, 16), 64), ((33,), 64), ((16, float("nan")), 128)):
        with pytest.raises(ValueError, match=f"stage with rows of {row_tokens} tokens: choose a value in"):
            taus(*given)


def test_the_tool_takes_a_tau_a_stage(packs: list[str], tmp_path: Path) -> None:
    options = ["--pack", *packs, "--output", str(tmp_path / "out"), "--nproc-per-node", "1", "--dry-run"]
    done = run_tool("run_stages.py", *options, "--exact-tau", "16", "48", *ARGUMENTS)
    commands = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert ["--exact-tau 16" in line for line in commands] == [False, True, False, False], done.stderr
    assert ["--exact-tau 48" in line for line in commands] == [False, False, False, True]


def test_stored_scores_go_to_the_stage_of_their_pack_and_to_confidence_arms_alone(
    packs: list[str], tmp_path: Path
) -> None:
    def chain(*given: str, arms: list[str]) -> list[StageRun]:
        out = tmp_path / "out"
        return plan_chain(packs, out, start=None, arms=arms, scores=given, arguments=ARGUMENTS)

    scores = {pack: str(tmp_path / f"scores{number}") for number, pack in enumerate(packs)}
    for pack, folder in scores.items():
        record = ScoreRecord(
            format_version=1,
            fingerprint=read_manifest(pack).fingerprint,
            row_tokens=64,
            model={},
            dtype="float32",
            short_window=16,
            short_stride=12,
            shard_rows=4,
            rows={"train": 1},
            is_complete=True,
        )
        write_json(Path(folder) / "scores.json", asdict(record))
    for given in (list(scores.values()), list(scores.values())[::-1]):
        for run in chain(*given, arms=["exact", "ppmi"]):
            pack = flag_value(run.arguments, "--pack")
            expected = scores[str(pack)] if run.arm == "ppmi" else None
            assert flag_value(run.arguments, "--confidence-scores") == expected
    assert flag_value(chain(arms=["ppmi"])[0].arguments, "--confidence-scores") is None
    one, other = scores.values()
    for given in ([one], [other], [one, one]):
        with pytest.raises(ValueError, match="--confidence-scores needs one folder a pack"):
            chain(*given, arms=["ppmi"])
    with pytest.raises(ValueError, match="the arms are none, exact"):
        chain(one, other, arms=["none", "exact"])
    mixed = {**json.loads((Path(other) / "scores.json").read_text()), "short_border": "target"}
    write_json(Path(other) / "scores.json", mixed)
    with pytest.raises(ValueError, match=r"different borders.*scores0 input, .*scores1 target"):
        chain(one, other, arms=["ppmi"])


def test_stages_that_share_documents_are_named(tmp_path: Path) -> None:
    """Slices of one corpus are silent; whole corpora, equal slices and other seeds warn, unless meant."""
    make_pack(tmp_path / "a", 64)
    source = str(tmp_path / "a" / "docs")

    def chain(*changes: dict[str, Any], **options: Any) -> list[str]:
        packs = []
        for number, change in enumerate(changes):
            folder = tmp_path / f"pack{len(list(tmp_path.iterdir()))}"
            base = {"row_tokens": 32 << number, "policy": "best-fit", "seed": 0}
            pack_corpora([source], folder, PackOptions(**{**base, **change}))
            packs.append(str(folder))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan_chain(packs, tmp_path / "out", start=None, arms=["none"], arguments=ARGUMENTS, **options)
        return [str(warning.message) for warning in caught]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert chain({"corpus_slice": "1/2"}, {"corpus_slice": "2/2"}) == []
        assert chain({"corpus_slice": "1/2"}, {"corpus_slice": "3/3"}) == []
        for changes in (
            ({}, {}),
            ({"corpus_slice": "1/2"}, {"corpus_slice": "1/2"}),
            ({"corpus_slice": "1/2"}, {"corpus_slice": "2/3"}),
            ({"corpus_slice": "1/2"}, {"corpus_slice": "2/2", "seed": 1}),
        ):
            (message,) = chain(*changes)
            assert "stages 32 and 64 may read the same documents of ../a/docs" in message
            assert "--corpus-slice 1/2 to 2/2" in message
            assert chain(*changes, same_documents=True) == []
