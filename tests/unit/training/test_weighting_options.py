"""A weighting flag that the rule does not read is refused; our own tools pass only what is read."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from stage_runs import ARGUMENTS

from megatron_exact.exposure import (
    RULES,
    RuleParameters,
    bucket_lower_bounds,
    build_weighting,
    find_rule,
    readers,
)
from megatron_exact.exposure.rules import Rule
from megatron_exact.training.arguments import build_parser
from megatron_exact.training.fine_tuning import plan_fine_tuning
from megatron_exact.training.job import expand_recipe, prepare_job
from megatron_exact.training.job_flags import flag_value, has_flag
from megatron_exact.training.megatron_parse import print_arguments
from megatron_exact.training.stages import plan_chain
from megatron_exact.training.weighting_options import PARAMETER_OF, refuse_unread, unread_flags

EXACT_RULES = (
    "exact, exact-normalized, uniform-tail, packed-position, random-same-mass, constant, exact-evidence"
)


def test_every_parameter_has_its_flag() -> None:
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert set(PARAMETER_OF) <= known
    assert list(PARAMETER_OF.values()) == [field.name for field in fields(RuleParameters)]
    spelled = [flag for flag in known if re.match(r"--(exact|confidence|short)-", flag)]
    assert set(spelled) - set(PARAMETER_OF) == {"--confidence-scores"}  # refused where it is read


@pytest.mark.parametrize("rule", RULES)
def test_a_flag_is_refused_unless_the_rule_reads_it(rule: str) -> None:
    for flag, parameter in PARAMETER_OF.items():
        for words in ([flag, "1"], [f"{flag}=1"]):
            argv = ["--lr", "1", *words]
            if parameter in RULES[rule].parameters:
                refuse_unread(argv, [rule])
                continue
            match = re.escape(f"--token-weighting {rule} does not read {flag} 1 (read by ")
            with pytest.raises(ValueError, match=match):
                refuse_unread(argv, [rule])


def test_the_message_names_rule_flags_values_and_readers() -> None:
    with pytest.raises(ValueError, match=r"; drop what is not read, or choose") as refused:
        refuse_unread(["--exact-alpha", "0.5", "--short-window=16"], ["none"])
    assert f"none does not read --exact-alpha 0.5 (read by {EXACT_RULES})" in str(refused.value)
    assert "and --short-window 16 (read by dense, sparse, longce, ppmi, npmi, " in str(refused.value)
    assert "\n" not in str(refused.value)
    refuse_unread(["--exact-alpha", "0.5"], ["none", "exact"])  # one of several arms reads it
    with pytest.raises(ValueError, match=r"the arms none, dense do not read --exact-alpha 0\.5"):
        refuse_unread(["--exact-alpha", "0.5"], ["none", "dense"])
    with pytest.raises(ValueError, match="unknown token weighting 'exactly'"):
        refuse_unread([], ["exactly"])


def test_the_table_of_rules_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    none = RULES["none"]
    monkeypatch.setitem(RULES, "none", replace(none, parameters=("alpha",)))
    refuse_unread(["--exact-alpha", "0.5"], ["none"])
    assert readers("alpha")[0] == "none"
    assert isinstance(find_rule("none"), Rule)


@pytest.mark.parametrize("rule", ["none", "exact", "exact-normalized", "uniform-tail", "constant"])
def test_what_the_table_calls_unread_changes_no_weight(rule: str) -> None:
    """The table itself, against the weights: an unread parameter has no effect."""
    bounds = bucket_lower_bounds(256)
    counts = np.arange(1, len(bounds) + 1)[::-1] ** 3

    def weights(**parameters: object) -> list[float]:
        return build_weighting(rule, counts, bounds, 256, **parameters).bucket_weights.tolist()

    changes = {"alpha": 0.7, "gamma": 1.5, "tau": 16.0, "cap": 1.05, "bucket_weights": ((8, 1.3),)}
    for name, value in changes.items():
        is_read = name in RULES[rule].parameters
        if not is_read:
            assert weights(**{name: value}) == weights()
        elif (rule, name) != ("constant", "gamma"):  # the mean alone is alpha's, but for a cap
            assert weights(**{name: value}) != weights()
    if rule == "constant":
        assert weights(cap=1.05, gamma=1.5) != weights(cap=1.05)


def test_a_job_is_refused_before_its_pack_is_read() -> None:
    argv = ["--pack", "nowhere", "--token-weighting", "none", "--exact-alpha", "0.5"]
    with pytest.raises(ValueError, match=r"none does not read --exact-alpha 0\.5"):
        prepare_job(argv)
    with pytest.raises(ValueError, match=r"none does not read --exact-tau 64"):
        prepare_job(["--pack", "nowhere", "--exact-tau", "64"])  # no rule is none
    with pytest.raises(FileNotFoundError):
        prepare_job([*argv, "--token-weighting", "exact"])  # the later rule counts
    with pytest.raises(ValueError, match=r"dense does not read --exact-alpha 0\.5"):
        print_arguments(["--token-weighting", "dense", "--exact-alpha", "0.5"])


def test_a_recipe_gives_tau_to_the_rules_that_read_it() -> None:
    argv = ["--recipe", "qwen2.5_0.5b_4k"]
    for rule in ("none", "constant", "ppmi"):
        words = expand_recipe([*argv, "--token-weighting", rule])
        reads = "tau" in RULES[rule].parameters
        assert flag_value(words, "--exact-tau") == ("1024" if reads else None)
        refuse_unread(words, [rule])
    assert not has_flag(expand_recipe(argv), "--exact-tau")
    given = expand_recipe([*argv, "--exact-tau", "512"])
    with pytest.raises(ValueError, match=r"none does not read --exact-tau 512"):
        refuse_unread(given, ["none"])


def test_a_chain_gives_each_arm_what_it_reads(packs: list[str], tmp_path: Path) -> None:
    def chain(arms: list[str], *more: str, taus: tuple[float, ...] = ()) -> list[tuple[str, ...]]:
        runs = plan_chain(
            packs, tmp_path / "out", start=None, arms=arms, taus=taus, arguments=[*ARGUMENTS, *more]
        )
        return [run.arguments for run in runs]

    arms = ["none", "exact", "uniform-tail"]
    for words, arm in zip(
        chain(arms, "--exact-alpha", "1", "--exact-gamma=0", taus=(16,)), arms * 2, strict=True
    ):
        assert flag_value(words, "--token-weighting") == arm
        given = [has_flag(words, f"--exact-{name}") for name in ("alpha", "gamma", "tau")]
        assert given == [arm != "none", arm == "exact", arm != "none"]
        assert not any(has_flag(words, flag) for flag in unread_flags(arm))
        assert flag_value(words, "--train-iters") == "10"
    with pytest.raises(ValueError, match="the arms none, uniform-tail do not read --exact-gamma 0"):
        chain(["none", "uniform-tail"], "--exact-gamma=0")
    with pytest.raises(ValueError, match="--token-weighting none does not read --exact-tau 16 48"):
        chain(["none"], taus=(16, 48))
    with pytest.raises(ValueError, match="--token-weighting none does not read --exact-alpha 1"):
        plan_fine_tuning("nowhere", [], tmp_path, arguments=["--exact-alpha", "1"])
