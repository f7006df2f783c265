"""What pairs: examples by id, lengths by regime, trainings by their records."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from written_results import RUN, example_lines, provenance, read_new, write_lines, write_results

from megatron_exact.evaluation.comparison import compare_runs
from megatron_exact.evaluation.pairing import (
    Regimes,
    check_training_pair,
    common_cells,
    is_tuned_on_answers,
    missing_from_grid,
    pairing,
    read_matched,
    require_same_protocol,
    trained_window,
    training_history,
)
from megatron_exact.evaluation.result_folders import Cell, read_result_folder
from megatron_exact.evaluation.suites.suite import token_lengths

CELL = Cell(suite="ruler", task="vt", length=1024)
NAME = ("ruler", "vt", 1024)


def test_examples_are_matched_by_id(tmp_path: Path) -> None:
    before = write_results(tmp_path / "a", {NAME: [0, 0.25, 1]})
    after = write_results(tmp_path / "b", {NAME: []})
    write_lines(after / "ruler/vt/1024.jsonl", example_lines("vt", 1024, [1, 0.5, 0])[::-1])
    scores = read_matched(CELL, [read_result_folder(before)], [read_result_folder(after)])
    assert scores.is_shared
    assert [values.tolist() for values in scores.differences] == [[1, 0.25, -1]]


def test_a_second_pair_follows_the_order_of_the_first(tmp_path: Path) -> None:
    names = ("a1", "b1", "a2", "b2")
    one, other, again, last = (write_results(tmp_path / name, {NAME: [0, 0.5]}) for name in names)
    write_lines(again / "ruler/vt/1024.jsonl", example_lines("vt", 1024, [0, 1])[::-1])
    before = [read_result_folder(one), read_result_folder(again)]
    after = [read_result_folder(other), read_result_folder(last)]
    scores = read_matched(CELL, before, after)
    assert scores.is_shared
    assert [values.tolist() for values in scores.baseline] == [[0, 0.5], [0, 1]]
    assert [values.tolist() for values in scores.differences] == [[0, 0], [0, -0.5]]


def test_pairs_may_have_examples_of_their_own(tmp_path: Path) -> None:
    before = [write_results(tmp_path / f"a{salt}", {NAME: [0, 1]}, salt=salt) for salt in "xy"]
    after = [write_results(tmp_path / f"b{salt}", {NAME: [1, 1]}, salt=salt) for salt in "xy"]
    scores = read_matched(CELL, list(map(read_result_folder, before)), list(map(read_result_folder, after)))
    assert not scores.is_shared
    assert [values.tolist() for values in scores.differences] == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_sha256": "0"}, "the prompt of id '1' differs"),
        ({"id": "one"}, "id '1' is in the first only"),
        ({"references": ["8"]}, "the references of id '1' differ"),
        (None, "2 and 1 examples"),
    ],
)
def test_other_examples_are_refused(tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    before = read_result_folder(write_results(tmp_path / "a", {NAME: [0, 1]}))
    lines = example_lines("vt", 1024, [0, 1])
    lines = lines[:1] if change is None else [lines[0], {**lines[1], **change}]
    after = write_results(tmp_path / "b", {NAME: [0, 1]})
    write_lines(after / "ruler/vt/1024.jsonl", lines)
    with pytest.raises(ValueError, match="are not the same examples") as error:
        read_matched(CELL, [before], [read_result_folder(after)])
    assert message in str(error.value)
    assert "evaluate both models with the same options" in str(error.value)


def test_a_cell_on_one_side_only_is_refused(tmp_path: Path) -> None:
    rich = read_result_folder(write_results(tmp_path / "a", {NAME: [0], ("qa", "piqa", 0): [1]}))
    poor = read_result_folder(write_results(tmp_path / "b", {NAME: [0]}))
    for folders in ([rich, poor], [poor, rich], [rich, rich, poor]):
        with pytest.raises(ValueError, match=r"b lacks 1 of the 2 cells of .*a, the first being qa/piqa/0"):
            common_cells(folders)
    assert common_cells([poor, poor]) == [CELL]


def test_holes_of_the_grid_are_found() -> None:
    names = [("vt", 1024), ("vt", 2048), ("cwe", 2048)]
    cells = [Cell(suite="ruler", task=task, length=length) for task, length in names]
    cells.append(Cell(suite="qa", task="piqa", length=0))
    assert missing_from_grid(cells) == [Cell(suite="ruler", task="cwe", length=1024)]
    assert missing_from_grid(cells[1:]) == []


def test_k_of_nolima_follows_the_protocol_and_two_protocols_never_pair(tmp_path: Path) -> None:
    lengths = token_lengths("1K")
    folders = {}
    for protocol, k_tokens in (("official", 1000), ("window", 1024), (None, 1024)):
        record = {} if protocol is None else {"nolima": {"options": {"protocol": protocol}}}
        cells = {("nolima", "needle_set", k_tokens): [1.0]}
        path = write_results(tmp_path / str(protocol), cells, suites=record)
        folders[protocol] = read_result_folder(path)
        regimes = Regimes(trained=lengths).for_folders([folders[protocol]])
        assert regimes.tokens("trained", "nolima") == (k_tokens,)
        assert regimes.of("nolima", k_tokens) == ("trained", "all")
    told = Regimes(trained=lengths, k_tokens={"nolima": 1000}).for_folders([folders["window"]])
    assert told.tokens("trained", "nolima") == (1000,)
    require_same_protocol([folders["window"], folders["window"]])
    for other in ("window", None):
        with pytest.raises(ValueError, match="official has nolima by the protocol official"):
            require_same_protocol([folders["official"], folders[other]])


def test_k_is_1024_tokens_and_officially_1000_for_nolima() -> None:
    lengths = token_lengths("0.5K,1k,1.5K,4096")
    assert [length.tokens(1024) for length in lengths] == [512, 1024, 1536, 4096]
    assert [str(length) for length in lengths] == ["0.5K", "1K", "1.5K", "4096"]
    regimes = Regimes(trained=lengths, k_tokens={"nolima": 1000})
    assert regimes.tokens("trained", "ruler") == (512, 1024, 1536, 4096)
    assert regimes.tokens("trained", "nolima") == (500, 1000, 1500, 4096)
    assert regimes.of("ruler", 1024) == regimes.of("nolima", 1000) == ("trained", "all")
    assert regimes.of("ruler", 1000) == regimes.of("nolima", 1024) == ("all",)
    assert Regimes(extrapolated=lengths).of("nolima", 500) == ("extrapolated", "all")


def test_a_length_may_be_whole_for_one_meaning_of_k_alone() -> None:
    (length,) = token_lengths("1.3K")
    assert length.tokens(1000) == 1300
    with pytest.raises(ValueError, match=r"1\.3K is not a whole number of tokens where K means 1,024"):
        length.tokens(1024)


@pytest.mark.parametrize("text", ["", "1K,", "K", "0", "-1K", "1.5", "0.0003K", "1/0", "nan", "4M", "KK"])
def test_what_is_no_length(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a length such as 1024 or 1\.5K"):
        token_lengths(text)


def test_a_length_is_in_one_regime() -> None:
    with pytest.raises(ValueError, match="1,024 tokens are among the trained and the extrapolated lengths"):
        Regimes(trained=token_lengths("1K"), extrapolated=token_lengths("1024,2K"))
    with pytest.raises(ValueError, match="1,000 tokens are among"):
        Regimes(trained=token_lengths("1K"), extrapolated=token_lengths("1000"), k_tokens={"nolima": 1000})


def test_a_length_that_was_never_evaluated_is_refused() -> None:
    regimes = Regimes(trained=token_lengths("512,1K"), extrapolated=token_lengths("8K"))
    there = {("ruler", 1024), ("nolima", 512), ("nolima", 1024), ("ruler", 8192), ("nolima", 8192)}
    regimes.require_evaluated(there)
    with pytest.raises(
        ValueError, match=r"evaluated at the extrapolated length 8K, only at 512, 1024 tokens"
    ):
        regimes.require_evaluated({cell for cell in there if cell[1] < 8192})


def test_lengths_have_no_meaning_without_a_suite() -> None:
    Regimes().require_evaluated(set())
    with pytest.raises(ValueError, match=r"length 1K: the folders have no suite, only an evidence probe"):
        Regimes(extrapolated=token_lengths("1K")).require_evaluated(set())


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


FIRST: dict[str, Any] = {
    "weighting": {"rule": "exact", "parameters": {"alpha": 0.15}},
    "row_tokens": 4096,
    "corpora": [{"name": "web", "licence": "odc-by"}, {"name": "books", "licence": None}],
    "start_checkpoint": {"sha256": "a", "run": None},
}
TUNING: dict[str, Any] = {
    "weighting": {"rule": "none"},
    "row_tokens": 2048,
    "corpora": [{"name": "dolly", "licence": "cc-by-sa-3.0"}],
    "start_checkpoint": {"sha256": "b", "run": FIRST},
}


def test_trainings_come_in_order_with_all_their_corpora() -> None:
    record = {"preset": "qwen2.5-0.5b", "import": {"licence": "apache-2.0"}, "run": TUNING}
    assert training_history(record) == {
        "preset": "qwen2.5-0.5b",
        "training": [
            {"rule": "exact", "parameters": {"alpha": 0.15}, "row_tokens": 4096},
            {"rule": "none", "parameters": {}, "row_tokens": 2048},
        ],
        "licences": {
            "model": "apache-2.0",
            "corpora": [
                {"name": "web", "licence": "odc-by"},
                {"name": "books", "licence": None},
                {"name": "dolly", "licence": "cc-by-sa-3.0"},
            ],
        },
    }


def test_a_model_without_a_record_has_no_history() -> None:
    empty = {"preset": None, "training": [], "licences": {"model": None, "corpora": []}}
    assert training_history(None) == empty
    assert training_history({"run": None, "import": None}) == empty


def test_the_window_of_a_tuned_model_is_that_of_its_longest_training() -> None:
    assert trained_window({"run": TUNING}) == 4096
    assert trained_window({"run": FIRST}) == 4096
    assert (
        trained_window({"run": {**FIRST, "row_tokens": 1024, "start_checkpoint": {"run": TUNING}}}) == 4096
    )
    for nothing in (None, {}, {"run": None}, {"run": {"seed": 1}}):
        assert trained_window(nothing) is None


def test_a_record_tells_whether_answers_were_supervised() -> None:
    tuned = {**TUNING, "supervision": {"targets": "answers", "template_sha256": "c"}}
    assert is_tuned_on_answers({"run": tuned})
    assert is_tuned_on_answers({"run": {**FIRST, "start_checkpoint": {"run": tuned}}})
    for nothing in (None, {"run": None}, {"run": TUNING}, {"run": {**FIRST, "supervision": None}}):
        assert not is_tuned_on_answers(nothing)


def test_a_comparison_carries_it(tmp_path: Path) -> None:
    cells = {("ruler", "vt", 1024): [0.0, 1.0]}
    sides = [
        write_results(tmp_path / rule, cells, provenance=provenance(weighting={"rule": rule}))
        for rule in ("none", "exact")
    ]
    content = compare_runs([sides[0]], [sides[1]])
    rules = [content["runs"][0][side]["training"][0]["rule"] for side in ("baseline", "treatment")]
    assert rules == ["none", "exact"]
