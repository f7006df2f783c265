"""Which trainings are one pair: what is verified, what is refused, what cannot be known."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from written_results import RUN, provenance, read_new

from megatron_exact.evaluation.pairing import check_training_pair, pairing

EXACT = {"rule": "exact", "parameters": {"alpha": 0.15}}


def check(tmp_path: Path, before: dict[str, Any] | None, after: dict[str, Any] | None) -> str | None:
    return check_training_pair(
        read_new(tmp_path / "a", provenance=before), read_new(tmp_path / "b", provenance=after)
    )


def test_runs_that_differ_in_their_weighting_alone_are_a_pair(tmp_path: Path) -> None:
    assert check(tmp_path, provenance(), provenance(weighting=EXACT, git_commit="def")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 64}, "fingerprint is"),
        ({"seed": 2}, "seed is 1 and 2"),
        ({"model": {"num_layers": 3}}, "model is"),
        ({"row_tokens": 8192}, "row_tokens is 4096 and 8192"),
        ({"schedule": {**RUN["schedule"], "lr": 2e-4}}, "schedule.lr is 0.0001 and 0.0002"),
        ({"layout": {"tensor_model_parallel_size": 2}}, "layout.tensor_model_parallel_size is 1 and 2"),
        ({"start_checkpoint": {"iteration": None, "sha256": "6" * 64}}, "start_checkpoint is"),
        ({"start_checkpoint": {"iteration": 5, "sha256": "5" * 64}}, "start_checkpoint is"),
        ({"start_checkpoint": None}, "start_checkpoint is"),
    ],
)
def test_records_that_disagree_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="were not trained as a pair") as error:
        check(tmp_path, provenance(), provenance(**change))
    assert message in str(error.value)
    with pytest.raises(ValueError, match="were not trained as a pair"):
        check(tmp_path, provenance(**change), provenance())


def test_the_whole_configuration_is_compared_where_both_exports_carry_it(tmp_path: Path) -> None:
    def trained(**settings: Any) -> dict[str, Any]:
        return provenance(configuration={"lr": 1e-4, **settings}, environment={})

    assert check(tmp_path, trained(), trained(log_interval=1)) is None
    with pytest.raises(ValueError, match=r"pair: configuration\.decoupled_lr is the default and 0\.01;"):
        check(tmp_path, trained(), trained(decoupled_lr=0.01))
    other = trained()
    other["run"]["environment"] = {"NVTE_X": "1"}
    with pytest.raises(ValueError, match=r"environment\.NVTE_X is not set and \"1\";"):
        check(tmp_path, trained(), other)
    assert check(tmp_path, provenance(), trained(decoupled_lr=0.01)) is None  # an earlier version's record
    before, after = (read_new(tmp_path / "ab"[side], provenance=trained()) for side in (0, 1))
    statement = pairing([before], [after])["statement"]
    assert statement.endswith("pack, start checkpoint, seed and configuration agree")


def test_another_iteration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="export_iteration is 10 and 20"):
        check(tmp_path, provenance(), {**provenance(), "iteration": 20})


def test_what_does_not_enter_the_weights_may_differ(tmp_path: Path) -> None:
    schedule = {**RUN["schedule"], "eval_iters": 7, "new_option": False}
    start = {**RUN["start_checkpoint"], "verified": False}
    assert check(tmp_path, provenance(), provenance(schedule=schedule, start_checkpoint=start)) is None


def test_a_resume_matters_only_if_it_changed_something(tmp_path: Path) -> None:
    plain = {"iteration": 4, "schedule": {**RUN["schedule"], "finetune": False}, "layout": RUN["layout"]}
    longer = {**plain, "schedule": {**plain["schedule"], "train_iters": 20}}
    assert check(tmp_path, provenance(), provenance(resumes=[plain, {**plain, "iteration": 6}])) is None
    assert check(tmp_path, provenance(resumes=[longer]), provenance(resumes=[plain, longer])) is None
    with pytest.raises(ValueError, match="their schedule was changed at other iterations"):
        check(tmp_path, provenance(), provenance(resumes=[longer]))
    with pytest.raises(ValueError, match="their schedule was changed at other iterations"):
        check(tmp_path, provenance(resumes=[longer]), provenance(resumes=[{**longer, "iteration": 6}]))


@pytest.mark.parametrize("missing", [None, {}, {"iteration": None, "run": None}])
def test_without_a_record_nothing_is_verified(tmp_path: Path, missing: dict[str, Any] | None) -> None:
    reason = check(tmp_path, provenance(), missing)
    assert reason == f"{tmp_path / 'b'} carries no record of a training"
    both = check(tmp_path, missing, missing)
    assert both == f"{tmp_path / 'a'} and {tmp_path / 'b'} carry no record of a training"


def test_a_record_with_gaps_verifies_nothing(tmp_path: Path) -> None:
    part = {"iteration": 10, "run": {"fingerprint": RUN["fingerprint"], "seed": 1}}
    reason = check(tmp_path, provenance(), part)
    assert reason is not None
    assert reason.endswith("do not both name start_checkpoint, schedule")
    unhashed = {"iteration": None, "sha256": None}
    reason = check(tmp_path, provenance(start_checkpoint=unhashed), provenance(start_checkpoint=unhashed))
    assert reason == "their start checkpoints have no hash"


def test_random_weights_of_one_seed_are_one_start(tmp_path: Path) -> None:
    assert check(tmp_path, provenance(start_checkpoint=None), provenance(start_checkpoint=None)) is None


def tuned(earlier: dict[str, Any], digest: str, **changes: Any) -> dict[str, Any]:
    """Provenance of instruction tuning that went on from the end of an earlier run."""
    start = {"iteration": 10, "sha256": digest * 64, "run": earlier}
    return provenance(**{"fingerprint": "e" * 64, "start_checkpoint": start, **changes})


def test_a_later_stage_is_paired_back_to_the_common_start(tmp_path: Path) -> None:
    standard, exact = copy.deepcopy(RUN), {**copy.deepcopy(RUN), "weighting": EXACT}
    assert check(tmp_path, tuned(standard, "1"), tuned(exact, "2")) is None
    with pytest.raises(ValueError, match="in the training before, seed is 1 and 2"):
        check(tmp_path, tuned(standard, "1"), tuned({**exact, "seed": 2}, "2"))
    with pytest.raises(ValueError, match="start_checkpoint is"):
        check(tmp_path, tuned({}, "1"), tuned(exact, "2"))
    with pytest.raises(ValueError, match="seed is 1 and 3"):
        check(tmp_path, tuned(standard, "1"), tuned(exact, "2", seed=3))
    short = {key: value for key, value in exact.items() if key != "schedule"}
    reason = check(tmp_path, tuned(standard, "1"), tuned(short, "2"))
    assert reason == "the records of the training before are not complete"
