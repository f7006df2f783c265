"""What a resume may change, what the arms of a pair may differ in, and the chain of trainings."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from megatron_exact.lineage import (
    can_change_numbers,
    changes_at_resume,
    compares_whole_configuration,
    configuration_page,
    first_difference,
    is_place,
    may_differ,
    refused_at_resume,
    trained_corpora,
    trainings,
)


def record(resumes: tuple[dict[str, Any], ...] = (), **settings: Any) -> dict[str, Any]:
    """run.json of a run with these settings beside the usual ones; None: a setting left at its default."""
    configuration = {"lr": 1e-3, "train_iters": 10, "world_size": 2, "bf16": True, **settings}
    environment = {name: configuration.pop(name) for name in list(configuration) if name.isupper()}
    return {
        "fingerprint": "f",
        "seed": 1,
        "start_checkpoint": {"iteration": 5, "sha256": "5" * 64},
        "schedule": {"lr": 1e-3, "train_iters": 10, "eval_iters": 3},
        "layout": {"world_size": 2},
        "configuration": {name: value for name, value in configuration.items() if value is not None},
        "environment": environment,
        "resumes": [*resumes],
    }


def resume(iteration: int, **changes: Any) -> dict[str, Any]:
    return {"iteration": iteration, "schedule": {}, "layout": {}, "changes": changes}


@pytest.mark.parametrize(
    "setting",
    [
        {"decoupled_lr": 1e-2},
        {"iterations_to_skip": [2]},
        {"weight_decay_incr_style": "linear", "end_weight_decay": 0.5},
        {"a_flag_of_a_new_version": True},
        {"NVTE_FUSED_ATTN": "0"},
        {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        {"world_size": 4},
        {"train_iters": 20},
        {"bf16": None},
    ],
)
def test_arms_that_differ_in_a_setting_are_no_pair(setting: dict[str, Any]) -> None:
    name = next(iter(setting))
    for one, other in ((record(), record(**setting)), (record(**setting), record())):
        difference = first_difference(one, other)
        assert difference is not None
        assert f"{name} is" in difference
    assert first_difference(record(**setting), record(**setting)) is None


def test_arms_may_differ_in_what_the_table_names() -> None:
    other = record(log_interval=1, save_interval=50, eval_iters=7, num_workers=0, exact_alpha=0.5)
    assert first_difference(record(), other) is None
    assert refused_at_resume(record(), other) == {}
    assert changes_at_resume(record(), other) == {}


def test_several_differences_are_named_at_once() -> None:
    other = record(a=1, b=2, c=3, d=4, e=5, f=6)
    difference = first_difference(record(), other)
    assert difference is not None
    assert difference.startswith(
        "configuration.a is the default and 1, configuration.b is the default and 2"
    )
    assert difference.endswith("configuration.d is the default and 4, and 2 more settings differ")


@pytest.mark.parametrize("name", ["lr", "decoupled_lr", "seed", "a_flag_of_a_new_version", "NVTE_QKV"])
def test_a_resume_may_not_change_what_is_trained(name: str) -> None:
    assert refused_at_resume(record(), record(**{name: 7})) == {
        name: (record()["configuration"].get(name), 7)
    }
    assert refused_at_resume(record(**{name: 7}), record(**{name: 7})) == {}


def test_a_resume_may_be_longer_and_elsewhere_and_says_so() -> None:
    longer = record(train_iters=20, world_size=4, log_interval=1)
    assert refused_at_resume(record(), longer) == {}
    assert changes_at_resume(record(), longer) == {"train_iters": 20, "world_size": 4}
    assert changes_at_resume(record(NCCL_ALGO="Ring"), record()) == {"NCCL_ALGO": None}


def test_what_a_start_loads_counts_at_each_resume_that_gives_it() -> None:
    fresh = record(finetune=True)  # the beginning took its weights from elsewhere
    assert refused_at_resume(fresh, record(no_load_optim=True)) == {}
    assert changes_at_resume(fresh, record()) == {}
    assert changes_at_resume(fresh, record(no_load_optim=True)) == {"no_load_optim": True}
    given_always = record(no_load_optim=True)
    assert changes_at_resume(given_always, given_always) == {"no_load_optim": True}
    reset = resume(4, no_load_optim=True)
    assert "no_load_optim to true" in str(first_difference(record((resume(4),)), record((reset,))))
    assert first_difference(record((reset,)), record((reset,))) is None
    twice = record((reset, resume(6, no_load_optim=True)))
    assert "of the other: at iteration 6" in str(first_difference(record((reset,)), twice))
    assert first_difference(record((reset, resume(6))), record((reset,))) is None


def test_a_resume_matters_only_if_it_changed_something() -> None:
    plain, longer = resume(4), resume(4, train_iters=20)
    assert first_difference(record(), record((plain, resume(6)))) is None
    assert first_difference(record((longer,)), record((longer, resume(6, train_iters=20)))) is None
    difference = first_difference(record(), record((longer,)))
    assert difference == (
        "a resume changed the configuration of one: nothing; of the other: at iteration 4 "
        "configuration.train_iters to 20"
    )
    back = record((longer, resume(6)))
    assert "at iteration 6 back to the beginning" in str(first_difference(record((longer,)), back))


def test_a_course_that_was_given_up_does_not_count() -> None:
    """A resume at iteration 6 was followed by one from iteration 4: nothing of it is in the weights."""
    given_up = record((resume(6, world_size=4), resume(4)))
    assert first_difference(record(), given_up) is None
    assert first_difference(record(), record((resume(6, world_size=4), resume(8)))) is not None


def test_records_of_an_earlier_version_are_compared_as_before() -> None:
    old, new = record(), record(decoupled_lr=1e-2)
    for key in ("configuration", "environment"):
        del old[key]
    assert first_difference(old, new) is None
    assert refused_at_resume(old, new) == {}
    assert not compares_whole_configuration(old, new)
    assert compares_whole_configuration(new, new)
    faster = copy.deepcopy(new)
    faster["schedule"]["lr"] = 2e-3
    assert first_difference(old, faster) == "schedule.lr is 0.001 and 0.002"
    assert refused_at_resume(old, faster) == {"lr": (1e-3, 2e-3)}


def test_the_trainings_before_are_asked_too() -> None:
    def stage(earlier: dict[str, Any], digest: str) -> dict[str, Any]:
        start = {"iteration": 10, "sha256": digest * 64, "run": earlier}
        return {**record(), "start_checkpoint": start}

    old = record()
    del old["configuration"]
    assert compares_whole_configuration(stage(record(), "1"), stage(record(), "2"))
    assert not compares_whole_configuration(stage(record(), "1"), stage(old, "2"))
    difference = first_difference(stage(record(), "1"), stage(record(decoupled_lr=1.0), "2"))
    assert difference == "in the training before, configuration.decoupled_lr is the default and 1.0"


def test_names() -> None:
    assert may_differ("world_size", at_resume=True)
    assert not may_differ("world_size", at_resume=False)
    assert is_place("save")
    assert not is_place("lr")
    assert can_change_numbers("NVTE_ALLOW_NONDETERMINISTIC_ALGO")
    assert not can_change_numbers("NCCL_SOCKET_IFNAME")
    assert not can_change_numbers("PATH")


def test_the_page_names_every_row() -> None:
    page = configuration_page()
    assert "| what a start loads | yes | no |" in page
    assert "`--no-load-optim`" in page
    assert "`NVTE_FUSED_ATTN`" in page


FIRST: dict[str, Any] = {"seed": 1, "corpora": [{"name": "web", "licence": None}], "start_checkpoint": None}
SECOND: dict[str, Any] = {
    "seed": 2,
    "corpora": [{"name": "books", "licence": "mit"}, {"name": "web", "licence": "odc-by"}],
    "start_checkpoint": {"sha256": "a", "run": FIRST},
}
LAST: dict[str, Any] = {
    "seed": 3,
    "corpora": [{"name": "books", "licence": "mit"}],
    "start_checkpoint": {"sha256": "b", "run": SECOND},
}


def test_trainings_come_first_one_first() -> None:
    assert [record["seed"] for record in trainings(LAST)] == [1, 2, 3]
    assert trainings(FIRST) == [FIRST]


@pytest.mark.parametrize("run", [None, {}, "run", []])
def test_an_import_has_none(run: Any) -> None:
    assert trainings(run) == trained_corpora(run) == []


@pytest.mark.parametrize("start", [None, "somewhere", {}, {"sha256": "a"}, {"run": None}, {"run": {}}])
def test_a_start_without_a_record_ends_the_walk(start: Any) -> None:
    assert [record["seed"] for record in trainings({"seed": 4, "start_checkpoint": start})] == [4]


def test_corpora_are_united_and_no_licence_hides_another() -> None:
    assert trained_corpora(LAST) == [
        {"name": "web", "licence": None},
        {"name": "books", "licence": "mit"},
        {"name": "web", "licence": "odc-by"},
    ]
