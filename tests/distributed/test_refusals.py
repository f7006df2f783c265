"""The names we compare and record are upstream's own: a typo would refuse or record nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_exact import lineage
from megatron_exact.training import run_record
from megatron_exact.training.layout_faults import has_uneven_parts, refuse_layout
from megatron_exact.training.options import build_parser
from megatron_exact.training.refusals import REFUSED, check_context_parallel, refuse_flags


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron's namespace of a job without any flag, but for the one default of ours that differs."""
    from megatron.training.arguments import parse_args

    monkeypatch.setattr("sys.argv", ["job", "--rerun-mode", "disabled"])
    return parse_args()


def test_what_is_refused_exists_and_is_off_by_default(namespace: Any) -> None:
    refuse_flags(namespace)
    for name, only, reason in REFUSED:
        assert hasattr(namespace, name), name
        assert getattr(namespace, name) in (None, only), name
        assert reason


@pytest.mark.parametrize(("name", "only", "reason"), REFUSED)
def test_each_row_refuses(name: str, only: Any, reason: str, namespace: Any) -> None:
    setattr(namespace, name, True if only is False else "something else")
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} .* is refused: "):
        refuse_flags(namespace)


def test_context_parallelism_that_does_not_fit(namespace: Any) -> None:
    namespace.seq_length = 24
    namespace.transformer_impl = "transformer_engine"
    check_context_parallel(namespace)  # one rank holds the whole row
    namespace.context_parallel_size = 2
    with pytest.raises(ValueError, match="--transformer-impl local"):
        check_context_parallel(namespace)
    namespace.transformer_impl = "local"
    check_context_parallel(namespace)
    namespace.tensor_model_parallel_size = 8
    check_context_parallel(namespace)
    namespace.sequence_parallel = True
    with pytest.raises(ValueError, match=r"the 12 tokens of a row .* --tensor-model-parallel-size 8"):
        check_context_parallel(namespace)


def test_layouts_are_read_from_megatrons_namespace(namespace: Any) -> None:
    namespace.num_layers, namespace.num_attention_heads, namespace.seq_length = 4, 4, 64
    namespace.micro_batch_size, namespace.world_size = 1, 2
    refuse_layout(namespace)
    namespace.pipeline_model_parallel_size = 2
    for listed, words in (
        ("Et|tttL", None),
        ("Et|t|t|tL", None),
        ("Et*2|t|tL", "has 3 parts, which do not divide by --pipeline-model-parallel-size 2"),
        ("Ett|tL", "Ett|tL lists 3 layers, the model has 4"),
    ):
        namespace.pipeline_model_parallel_layout = listed
        assert has_uneven_parts(namespace)
        if words is None:
            refuse_layout(namespace)
            continue
        with pytest.raises(ValueError, match=re.escape(words)):
            refuse_layout(namespace)


def test_our_options_do_not_collide_with_megatrons(namespace: Any) -> None:
    ours = {action.dest for action in build_parser()._actions} - {"help"}
    assert not ours & set(vars(namespace))


def test_what_run_json_records_exists(namespace: Any) -> None:
    derived = {
        "data_parallel_size",
        "virtual_pipeline_model_parallel_size",
    }  # set by validation
    names = {
        *run_record.LAYOUT_ARGUMENTS,
        *run_record.SCHEDULE_ARGUMENTS,
        *run_record.MODEL_ARGUMENTS,
    }
    assert names - set(vars(namespace)) <= derived


def test_what_may_differ_exists_once() -> None:
    """A flag that a new version renames would be compared again, and its successor with it."""
    names = [name for freedom in lineage.FREEDOMS for name in freedom.names]
    assert len(names) == len(set(names))
    known = {*run_record._flags(), *run_record.DERIVED_ARGUMENTS, "virtual_pipeline_model_parallel_size"}
    variables = {name for name in names if name.isupper()}
    assert set(names) - variables - known == {"command_line"}  # the words themselves
    assert all(lineage.can_change_numbers(name) for name in variables - {"CPU_THREADS"})
    assert all(freedom.reason and freedom.at_resume for freedom in lineage.FREEDOMS)


def test_flags_that_decide_what_is_trained_are_not_in_the_table() -> None:
    """Chosen by hand: a slip in the table of freedoms shows here."""
    for name in (
        *("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "weight_decay", "start_weight_decay"),
        *("end_weight_decay", "weight_decay_incr_style", "clip_grad", "adam_beta2", "optimizer", "seed"),
        *("bf16", "fp16", "fp8", "loss_scale", "hidden_dropout", "global_batch_size", "rampup_batch_size"),
        *("num_layers", "rotary_base", "init_method_std", "qk_timing", "carry_optimizer", "swiglu"),
        *("NVTE_APPLY_QK_LAYER_SCALING", "CUBLAS_WORKSPACE_CONFIG", "a_flag_of_a_new_version"),
    ):
        assert not lineage.may_differ(name, at_resume=True), name
        assert not lineage.may_differ(name, at_resume=False), name


def test_megatrons_help_is_printed_in_spite_of_its_bare_percent_signs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_exact.training.megatron_help import show_megatron_help

    monkeypatch.setattr("sys.argv", ["job"])
    with pytest.raises(SystemExit) as ended:
        show_megatron_help()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--tensor-model-parallel-size" in text
    assert "--rope-scaling-factor" in text
