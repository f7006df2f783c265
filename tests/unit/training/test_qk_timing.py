from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_exact.training.arguments import add_options
from megatron_exact.training.distributed_optimizer import check_states_load
from megatron_exact.training.qk_timing import (
    QkTiming,
    qk_timing_of,
    qk_timing_record,
    settle_separate_qkv,
    timed_layers,
)


def options(*words: str) -> argparse.Namespace:
    return add_options(argparse.ArgumentParser()).parse_args(words)


def namespace(*words: str, **changes: Any) -> Any:
    """Our options beside what is read of Megatron's."""
    megatron = {
        "num_layers": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "num_attention_heads": 8,
        "tensor_model_parallel_size": 1,
        "use_checkpoint_opt_param_scheduler": False,
    }
    return SimpleNamespace(**{**vars(options(*words)), **megatron, **changes})


def test_the_papers_window() -> None:
    window = QkTiming().window(1000)
    assert (window.factor, window.hold_samples, window.return_samples) == (0.25, 40, 10)
    assert [window.multiplier(at) for at in (0, 39, 40, 45, 50, 51, 999)] == [
        *(0.25, 0.25, 0.25, 0.625, 1.0, 1.0, 1.0)
    ]


@given(
    st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 0.5), st.integers(1, 10**6), st.integers(0, 2 * 10**6)
)
def test_it_rises_once_from_the_factor_to_one(
    factor: float, fraction: float, back: float, samples: int, at: int
) -> None:
    window = QkTiming(factor=factor, fraction=fraction, return_fraction=back).window(samples)
    here, after = window.multiplier(at), window.multiplier(at + 1)
    assert factor <= here <= after <= 1 or here == pytest.approx(after, rel=1e-12)
    if at < round(fraction * samples):
        assert here == factor
    if at >= round(fraction * samples) + round(back * samples):
        assert here == 1


@pytest.mark.parametrize(
    ("num_layers", "upper"), [(1, []), (2, [2]), (4, [3, 4]), (5, [4, 5]), (28, list(range(15, 29)))]
)
def test_the_upper_half(num_layers: int, upper: list[int]) -> None:
    assert list(timed_layers(num_layers)) == upper


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--qk-timing", "--qk-timing-factor", "1.5"), r"--qk-timing-factor 1.5 is not in \[0, 1\]"),
        (("--qk-timing", "--qk-timing-factor", "nan"), r"--qk-timing-factor nan is not in"),
        (("--qk-timing", "--qk-timing-fraction", "4"), r"--qk-timing-fraction 4.0 is not in"),
        (
            ("--qk-timing", "--qk-timing-fraction", ".6", "--qk-timing-return", ".5"),
            "longer than the training",
        ),
        (("--qk-timing-factor", "0.5"), "given without --qk-timing: add it"),
    ],
)
def test_what_is_out_of_range_or_of_no_effect_is_refused(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        qk_timing_of(options(*words))


def test_the_timing_implies_separate_projections_and_is_recorded() -> None:
    for words, is_separate in (((), False), (("--separate-qkv",), True), (("--qk-timing",), True)):
        args = namespace(*words)
        settle_separate_qkv(args)
        assert args.separate_qkv is is_separate
    assert qk_timing_record(options()) is None
    assert qk_timing_record(options("--separate-qkv")) is None
    found = qk_timing_record(options("--qk-timing", "--qk-timing-factor", "0.5"))
    assert found == {"factor": 0.5, "fraction": 0.04, "return_fraction": 0.01}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"tensor_model_parallel_size": 4},
            "2 key/value heads do not divide by --tensor-model-parallel-size 4",
        ),
        ({"use_checkpoint_opt_param_scheduler": True}, "the window follows from this job's flags"),
    ],
)
def test_what_separate_projections_cannot_do_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        settle_separate_qkv(namespace("--qk-timing", **changes))
    settle_separate_qkv(namespace(**changes))  # without the option it is no concern of ours


def test_a_model_of_one_layer_has_no_upper_half() -> None:
    settle_separate_qkv(namespace("--qk-timing", num_layers=2))
    settle_separate_qkv(namespace("--separate-qkv", num_layers=1))
    with pytest.raises(
        ValueError, match=r"--qk-timing with --num-layers 1: .* nothing would be timed; drop"
    ):
        settle_separate_qkv(namespace("--qk-timing", num_layers=1))


SAVED = {
    "use_distributed_optimizer": False,
    "no_save_optim": False,
    "separate_qkv": True,
    "qk_timing": True,
    "qk_timing_factor": 0.25,
}
JOB = {**SAVED, "finetune": False, "no_load_optim": False, "carry_optimizer": False}


@pytest.mark.parametrize(
    ("saved", "job", "complaint"),
    [
        ({}, {}, None),
        ({}, {"qk_timing_factor": 0.5}, "--qk-timing-factor 0.25, this job has 0.5"),
        ({}, {"qk_timing": False}, "--qk-timing True, this job has False"),
        ({}, {"qk_timing": False, "separate_qkv": False}, "--separate-qkv True, this job has False"),
        ({}, {"qk_timing": False, "separate_qkv": False, "no_load_optim": True}, None),
        ({"qk_timing": False, "separate_qkv": False}, {}, "--separate-qkv False, this job has True"),
    ],
)
def test_optimizer_states_of_other_groups_are_refused(
    saved: dict[str, Any], job: dict[str, Any], complaint: str | None
) -> None:
    there, here = SimpleNamespace(**{**SAVED, **saved}), SimpleNamespace(**{**JOB, **job})
    if complaint is None:
        check_states_load(here, there, None)
        return
    with pytest.raises(ValueError, match=f"{complaint}.*--no-load-optim"):
        check_states_load(here, there, None)


def test_states_of_a_checkpoint_that_knows_no_such_options_load_without_them() -> None:
    old = SimpleNamespace(use_distributed_optimizer=False, no_save_optim=False)
    here = SimpleNamespace(**{**JOB, "separate_qkv": False, "qk_timing": False})
    check_states_load(here, old, None)
