from __future__ import annotations

from megatron_exact.training.job_flags import flag_value, has_flag, without_flags

ARGV = ["--lr", "1e-3", "--save=runs/a", "--swiglu", "--load", "base", "--lr", "2e-3"]


def test_flag_value_is_the_last_one_given() -> None:
    assert flag_value(ARGV, "--lr") == "2e-3"
    assert flag_value(ARGV, "--save") == "runs/a"
    assert flag_value(ARGV, "--seed") is None
    assert flag_value(["--save"], "--save") is None


def test_has_flag_does_not_take_a_prefix_for_the_flag() -> None:
    assert has_flag(ARGV, "--swiglu")
    assert has_flag(ARGV, "--save")
    assert not has_flag(["--save-interval", "3"], "--save")


def test_without_flags_takes_values_along() -> None:
    assert without_flags(ARGV, {"--lr", "--save"}) == ["--swiglu", "--load", "base"]
    assert without_flags(["--save-interval", "3"], {"--save"}) == ["--save-interval", "3"]
