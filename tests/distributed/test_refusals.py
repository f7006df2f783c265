"""The names we compare and record are upstream's own: a typo would refuse or record nothing."""

from __future__ import annotations

import argparse
import enum
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_exact import lineage
from megatron_exact.training import run_record
from megatron_exact.training.arguments import build_parser
from megatron_exact.training.flag_classes import (
    HARMLESS,
    MegatronFlag,
    megatron_flags_by_spelling,
    read_flags,
    refuse_flags,
)
from megatron_exact.training.layout import has_uneven_parts, refuse_layout
from megatron_exact.training.refusals import check_context_parallel

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    """Megatron's own."""
    from megatron.training.arguments import add_megatron_arguments

    found = argparse.ArgumentParser(allow_abbrev=False)
    return add_megatron_arguments(found)  # type: ignore[no-any-return]


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron's namespace of a job without any flag, but for the one default of ours that differs."""
    from megatron.training.arguments import parse_args

    monkeypatch.setattr("sys.argv", ["job", "--rerun-mode", "disabled"])
    return parse_args()


def test_every_flag_of_megatrons_parser_has_a_class(parser: argparse.ArgumentParser) -> None:
    """A flag that a new version brings, drops, spells or reads otherwise fails here."""
    table = megatron_flags_by_spelling()
    actions = [action for action in parser._actions if action.dest != "help"]
    assert {spelling for action in actions for spelling in action.option_strings} == set(table)
    for action in actions:
        flag = table[action.option_strings[0]]
        assert flag.spellings == tuple(action.option_strings)
        is_switch = action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction)
        assert flag.nargs == (0 if is_switch else action.nargs), flag.name
        assert flag.why
        if flag.choices and action.choices and not isinstance(next(iter(action.choices)), enum.Enum):
            assert set(flag.choices) <= set(map(str, action.choices)), flag.name


def test_kinds_of_values_are_megatrons(parser: argparse.ArgumentParser) -> None:
    types = {"count": int, "int": int, "number": float, "share": float}
    for action in parser._actions:
        flag = megatron_flags_by_spelling().get(action.option_strings[0])
        if flag is not None and flag.kind == "supported" and flag.values.rstrip("+") in types:
            assert action.type is types[flag.values.rstrip("+")], flag.name


def test_what_is_supported_is_shown_by_a_test() -> None:
    for flag in dict.fromkeys(megatron_flags_by_spelling().values()):
        if flag.kind != "supported":
            continue
        path = ROOT / flag.why
        assert path.is_file(), f"{flag.name}: {flag.why} does not exist"
        text = path.read_text()
        assert any(f'"{spelling}"' in text or f"{spelling} " in text for spelling in flag.spellings), (
            flag.name
        )


def test_values_that_ask_for_nothing_are_megatrons_defaults(namespace: Any) -> None:
    table = megatron_flags_by_spelling()
    ours = {
        "--attention-dropout",
        "--normalization",
        "--rerun-mode",
    }  # Megatron's default is what is refused
    for name, words in HARMLESS.items():
        assert table[name].kind == "refused"
        if name in ours:
            continue
        default = getattr(namespace, name.removeprefix("--").replace("-", "_"))
        default = default[0] if isinstance(default, list) else default
        assert default is None or str(getattr(default, "name", default)) in words, name


REFUSED_FLAGS = [
    flag for flag in dict.fromkeys(megatron_flags_by_spelling().values()) if flag.kind == "refused"
]


@pytest.mark.parametrize("flag", REFUSED_FLAGS, ids=lambda flag: flag.name)
def test_each_refused_flag_is_refused_with_its_reason(flag: MegatronFlag) -> None:
    words = {0: (), None: ("7",), 3: ("7", "7", "7")}.get(flag.nargs, ("7", "8"))
    with pytest.raises(ValueError, match=f"^{re.escape(flag.name)}") as refused:
        refuse_flags(read_flags([flag.spellings[-1], *words]))
    assert flag.why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_harmless_values_and_ordinary_flags_are_not_refused() -> None:
    refuse_flags(
        read_flags(["--ckpt-format", "torch_dist", "--cp-comm-type", "p2p", "--bf16", "--lr=1e-3"])
    )
    with pytest.raises(ValueError, match="--cp-comm-type p2p a2a is not supported"):
        refuse_flags(read_flags(["--cp-comm-type", "p2p", "a2a"]))


def test_context_parallelism_that_does_not_fit(namespace: Any) -> None:
    namespace.seq_length = 24
    check_context_parallel(namespace)  # one rank holds the whole row
    namespace.context_parallel_size = 2
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
    from megatron_exact.training.arguments import show_megatron_help

    monkeypatch.setattr("sys.argv", ["job"])
    with pytest.raises(SystemExit) as ended:
        show_megatron_help()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--tensor-model-parallel-size" in text
    assert "--rope-scaling-factor" in text
