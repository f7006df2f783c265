"""QA-SFT of both arms: what is planned, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from stage_runs import make_pack, save_checkpoint

from megatron_exact.data.corpus_record import AnswersRecord, read_corpus_record, write_corpus_record
from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.qa_pack import write_answers
from megatron_exact.files import write_json
from megatron_exact.integrity import content_digest, read_integrity, write_integrity
from megatron_exact.training.fine_tuning import parse_arm, plan_fine_tuning
from megatron_exact.training.job import prepare_job
from megatron_exact.training.job_flags import flag_value, has_flag
from megatron_exact.training.stages import check_pairs, describe_plan, run_chain, train_command
from tests.unit.data.small_corpora import ended_documents, random_documents, write_corpus
from tests.unit.evaluation.written_results import RUN

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records whose answers begin at token 3."""
    folder = tmp_path_factory.mktemp("qa")
    documents = ended_documents(random_documents([9, 12, 20, 31, 7] * 4))
    prefix = folder / "records"
    write_corpus(prefix, documents, tokenizer_sha256="a" * 64)
    record = read_corpus_record(prefix)
    assert record is not None
    answers = AnswersRecord(
        sha256=write_answers(prefix, [3] * len(documents)),
        template="{{ messages }}",
        template_sha256="b" * 64,
        context_place="before",
        left_out_records=0,
    )
    write_corpus_record(prefix, replace(record, answers=asdict(answers)))
    options = PackOptions(row_tokens=64, policy="best-fit", seed=1, mask_cross_document_targets=True)
    pack_corpora([str(prefix)], folder / "pack", options)
    return folder / "pack"


def make_start(folder: Path, **changes: Any) -> Path:
    """A run of continued pretraining, as far as its records go."""
    save_checkpoint(folder, 10)
    write_json(folder / "run.json", copy.deepcopy({**RUN, **changes}))
    return folder


@pytest.fixture
def arms(tmp_path: Path) -> list[tuple[str, Path]]:
    rules = {"standard": "none", "exact": "exact"}
    return [
        (arm, make_start(tmp_path / "cpt" / rule, weighting={"rule": rule})) for arm, rule in rules.items()
    ]


def test_the_arms_differ_in_their_start_and_place_alone(
    pack: Path, arms: list[tuple[str, Path]], tmp_path: Path
) -> None:
    runs = plan_fine_tuning(str(pack), arms, tmp_path / "out", arguments=["--lr", "2e-5"])
    assert [run.name for run in runs] == ["qa standard", "qa exact"]
    places = ("--save", "--load", "--pretrained-checkpoint")
    rest = []
    for run, (arm, checkpoint) in zip(runs, arms, strict=True):
        folder = tmp_path / "out" / arm
        found = [flag_value(run.arguments, flag) for flag in places]
        assert found == [str(folder), str(folder), str(checkpoint)]
        assert run.iterations == 600
        rest.append([word for word in run.arguments if word not in found])
    assert rest[0] == rest[1]
    assert flag_value(rest[0], "--token-weighting") == "none"
    assert flag_value(rest[0], "--train-iters") == "600"
    assert rest[0].count("--lr") == 1
    assert flag_value(rest[0], "--lr") == "2e-5"
    shorter = plan_fine_tuning(str(pack), arms, tmp_path / "out", arguments=["--train-iters", "7"])
    assert shorter[0].iterations == 7
    assert describe_plan(shorter, 1)[0].startswith("# qa standard: starts from")


def test_the_layout_of_a_recipe(pack: Path, arms: list[tuple[str, Path]], tmp_path: Path) -> None:
    (run, _) = plan_fine_tuning(str(pack), arms, tmp_path / "out", layout_of="llama3.1_8b_16k")
    assert flag_value(run.arguments, "--tensor-model-parallel-size") == "4"
    assert has_flag(run.arguments, "--bf16")
    assert flag_value(train_command(run), "--nproc-per-node") == "8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "seed is 1 and 2"),
        ({"fingerprint": "e" * 64}, "fingerprint is"),
        ({"schedule": {**RUN["schedule"], "lr": 1e-5}}, r"schedule\.lr is"),
        ({"start_checkpoint": {"iteration": None, "sha256": "6" * 64}}, "start_checkpoint is"),
        ({"start_checkpoint": {"iteration": None, "sha256": None}}, "start_checkpoint is"),
    ],
)
def test_starts_that_are_no_pair_are_refused(
    pack: Path, arms: list[tuple[str, Path]], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    other = make_start(tmp_path / "other", **changes)
    with pytest.raises(ValueError, match=f"were not trained as a pair: {message}"):
        plan_fine_tuning(str(pack), [arms[0], ("exact", other)], tmp_path / "out")


def test_starts_at_different_iterations_or_without_a_record_are_refused(
    pack: Path, arms: list[tuple[str, Path]], tmp_path: Path
) -> None:
    later = make_start(tmp_path / "later")
    save_checkpoint(later, 20)
    with pytest.raises(ValueError, match="export_iteration is 10 and 20"):
        plan_fine_tuning(str(pack), [arms[0], ("exact", later)], tmp_path / "out")
    save_checkpoint(tmp_path / "bare", 10)
    with pytest.raises(ValueError, match=r"no run\.json there"):
        plan_fine_tuning(str(pack), [arms[0], ("exact", tmp_path / "bare")], tmp_path / "out")
    with pytest.raises(ValueError, match="needed twice at least"):
        plan_fine_tuning(str(pack), arms[:1], tmp_path / "out")
    with pytest.raises(ValueError, match="a name of its own"):
        plan_fine_tuning(str(pack), [arms[0], arms[0]], tmp_path / "out")


def test_an_ordinary_pack_and_decided_flags_are_refused(
    pack: Path, arms: list[tuple[str, Path]], tmp_path: Path
) -> None:
    ordinary = make_pack(tmp_path / "text", 64)
    with pytest.raises(ValueError, match="is not a pack of question-answer records"):
        plan_fine_tuning(ordinary, arms, tmp_path / "out")
    with pytest.raises(ValueError, match="--token-weighting: this tool decides it"):
        plan_fine_tuning(str(pack), arms, tmp_path / "out", arguments=["--token-weighting", "exact"])
    with pytest.raises(ValueError, match="write NAME=CHECKPOINT"):
        parse_arm("../exact=runs/exact")
    assert parse_arm("exact=runs/a=b") == ("exact", Path("runs/a=b"))


def tune(starts: dict[str, Path], seed: int, lr: float = 1e-5) -> Any:
    """Stands in for torchrun: leaves what a run leaves."""

    def call(command: Sequence[str]) -> int:
        folder = Path(flag_value(command, "--save") or "")
        checkpoint = Path(flag_value(command, "--pretrained-checkpoint") or "") / "iter_0000010"
        files = read_integrity(checkpoint)
        assert files is not None
        start = {
            "iteration": 10,
            "sha256": content_digest(files),
            "run": copy.deepcopy({**RUN, "weighting": {"rule": folder.name}}),
        }
        fingerprint = read_manifest(flag_value(command, "--pack") or "").fingerprint
        schedule = {"train_iters": 600, "lr": lr}
        make_start(folder, seed=seed, fingerprint=fingerprint, schedule=schedule, start_checkpoint=start)
        save_checkpoint(folder, 600)
        return 0

    return call


def test_a_finished_arm_is_skipped_only_if_it_is_the_same_run(
    pack: Path, arms: list[tuple[str, Path]], tmp_path: Path
) -> None:
    starts = dict(arms)
    for checkpoint in starts.values():  # as after real training, the weights of the arms differ
        names = (".metadata", "metadata.json", "__0_0.distcp")
        write_integrity(checkpoint / "iter_0000010", dict.fromkeys(names, checkpoint.name))
    runs = plan_fine_tuning(str(pack), arms, tmp_path / "out")
    run_chain(runs[:1], 1, call=tune(starts, 1234))
    again = plan_fine_tuning(str(pack), arms, tmp_path / "out")
    assert [run.is_finished() for run in again] == [True, False]
    with pytest.raises(ValueError, match="contains a run whose seed is 1234, not 1"):
        plan_fine_tuning(str(pack), arms, tmp_path / "out", arguments=["--seed", "1"])
    with pytest.raises(ValueError, match="lr is 1e-05, not 2e-5: all arms need one configuration"):
        plan_fine_tuning(str(pack), arms, tmp_path / "out", arguments=["--lr", "2e-5"])
    swapped = [("standard", starts["exact"]), ("exact", starts["standard"])]
    with pytest.raises(ValueError, match="contains a run whose start checkpoint is"):
        plan_fine_tuning(str(pack), swapped, tmp_path / "out")


def test_arms_that_were_tuned_differently_are_found(
    pack: Path, arms: list[tuple[str, Path]], tmp_path: Path
) -> None:
    runs = plan_fine_tuning(str(pack), arms, tmp_path / "out")
    run_chain(runs[:1], 1, call=tune(dict(arms), 1234))
    with pytest.raises(ValueError, match=r"run\.json is missing"):
        check_pairs(runs)
    run_chain(runs[1:], 1, call=tune(dict(arms), 1234))
    check_pairs(runs)
    write_json(
        runs[1].folder / "run.json",
        {**RUN, "fingerprint": read_manifest(pack).fingerprint, "seed": 1234, "schedule": {"lr": 1.0}},
    )
    with pytest.raises(ValueError, match="were not trained alike"):
        check_pairs(runs)


@pytest.mark.parametrize("rule", ["exact", "uniform-tail", "constant"])
def test_answers_are_never_weighted(pack: Path, rule: str) -> None:
    with pytest.raises(
        ValueError, match=f"--token-weighting {rule} is not supported on a pack of question-answer"
    ):
        prepare_job(["--pack", str(pack), "--token-weighting", rule], choose_runtime=lambda _: ())


def test_the_help_shows_the_schedule_and_what_the_paper_leaves_open() -> None:
    command = [sys.executable, str(ROOT / "tools" / "fine_tune_qa.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "iterations = 600: Steps (stated)." in text
    assert text.count("ot stated in the paper") >= 9
