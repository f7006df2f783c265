"""A suite is one file: `throwaway/echo.py` is evaluated, compared and reported by the public tools."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_exact.commands import evaluations
from megatron_exact.evaluation import comparison, evaluate, suites
from megatron_exact.evaluation.prompts import Prompts
from megatron_exact.evaluation.suites import suite as suite_module
from megatron_exact.evaluation.suites.suite import SuiteOptions, find_suite, register, registered
from tests.unit.evaluation_suites.small_evaluation import ROOT, AnsweringModel, write_small_model

THROWAWAY = Path(__file__).parent / "throwaway"


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The suite's file, as if it lay in the folder of suites."""
    monkeypatch.setattr(suites, "__path__", [*suites.__path__, str(THROWAWAY)])
    yield
    suite_module._REGISTERED.pop("echo", None)
    sys.modules.pop(f"{suites.__name__}.echo", None)
    suite_module._import_files.cache_clear()


def call(verb: Callable[..., None], *arguments: object) -> None:
    verb([*map(str, arguments)])


def answering(answer: Callable[[str], str]) -> Callable[..., AnsweringModel]:
    """In the place of `engine.load_model`: a model of lm-eval that answers by a function."""

    def load(model: Path, prompts: Prompts, *_: object) -> AnsweringModel:
        loaded = AnsweringModel(answer)
        loaded.tokenizer = prompts.tokenizer
        return loaded

    return load


def says_the_word(prompt: str) -> str:
    found = re.search(r"The word is (\w+)\.", prompt)
    assert found is not None
    return found.group(1)


def says_every_other(prompt: str) -> str:
    """Right about three of the six words."""
    word = says_the_word(prompt)
    return word if word[0] in "ace" else "nothing"


def evaluated(
    folder: Path, model: Path, answer: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Results of a model that answers so, by the tool."""
    with monkeypatch.context() as patch:
        patch.setitem(evaluate.Evaluation.__init__.__kwdefaults__, "load", answering(answer))
        call(
            evaluations.evaluate, "--model", model, "--suite", "echo", "--lengths", "125,250",
            "--echo-times", 4, "--output", folder, "--example-cache", folder.parent / "cache",
            "--cpt-window", 125,
        )  # fmt: skip
    return folder


@pytest.mark.usefixtures("echo")
def test_one_file_is_evaluated_compared_and_reported(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_small_model(tmp_path / "other")
    for path in model.glob("token*"):
        (other / path.name).write_bytes(path.read_bytes())
    before = evaluated(tmp_path / "before", model, says_every_other, monkeypatch)
    after = evaluated(tmp_path / "after", other, says_the_word, monkeypatch)

    info = json.loads((after / "results.json").read_text())
    assert info["suites"]["echo"]["options"] == {"samples": 8, "seed": 0, "times": 4}
    assert set(info["cells"]) == {f"echo/{task}/{n}" for task in ("repeat", "practice") for n in (125, 250)}
    with open(before / "summary.csv", encoding="utf-8") as stream:
        rows = [
            (row["benchmark"], row["regime"], row["score"], row["cells"]) for row in csv.DictReader(stream)
        ]
    assert rows == [("echo", "trained", "50.00", "1"), ("echo", "extrapolated", "50.00", "1")]

    call(
        evaluations.compare, "--baseline", before, "--treatment", after, "--output", tmp_path / "c",
        "--trained-lengths", "0.125K", "--extrapolated-lengths", "0.25K", "--resamples", 400,
    )  # fmt: skip
    content = json.loads((tmp_path / "c" / comparison.COMPARISON).read_text())
    assert content["options"]["echo_k_tokens"] == 1000
    found = {entry["regime"]: entry for entry in content["aggregates"]}
    assert set(found) == {"trained", "extrapolated", "all"}
    assert {(entry["cells"], entry["delta"]) for entry in (found["trained"], found["extrapolated"])} == {
        (1, 50)
    }
    assert {entry["task"] for entry in content["cells"]} == {
        "repeat",
        "practice",
    }  # it is told, not averaged
    # two words of four questions each, at both lengths: two units in all, of which one differs
    assert {entry["ci95_reason"] for entry in found.values()} == {"only 1 of 2 differ"}
    assert "of echo: each unit drawn together" in content["methods"]["ci95"]

    call(evaluations.report, "--comparison", tmp_path / "c", "--output", tmp_path / "report")
    page = (tmp_path / "report" / "report.md").read_text()
    section = page.partition("## Suites that the paper does not have")[2].partition("\n## ")[0]
    (row,) = [line for line in section.splitlines() if "Echo (throw-away) trained" in line]
    assert "+50.00 - (only 1 of 2 differ)" in row
    assert "Echo (throw-away)" in page[page.index("Figure 4") :]  # its windows are a panel of the heat map


@pytest.mark.usefixtures("echo")
def test_its_options_are_its_own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SuiteOptions(suite="echo", lengths=(64,))["echo_times"] == 2
    with pytest.raises(ValueError, match="--echo-times has no meaning for ruler, only for echo"):
        SuiteOptions(suite="ruler", lengths=(512,), own={"echo_times": 3})
    with pytest.raises(ValueError, match="--shots has no meaning for echo, only for qa"):
        SuiteOptions(suite="echo", lengths=(64,), own={"shots": 3})
    with pytest.raises(ValueError, match="no suite has the option 'echo'"):
        SuiteOptions(suite="echo", lengths=(64,), own={"echo": 3})
    assert "--echo-times" in evaluations.evaluate_parser().format_help()
    assert "1000 like a clerk" in evaluations.compare_parser().format_help()


def test_results_of_a_suite_that_is_not_here_are_compared_under_their_folders_name() -> None:
    assert "echo" not in registered()
    unknown = find_suite("echo")
    assert (unknown.title, unknown.weight("repeat"), unknown.drawn_with("a-1")) == ("echo", 1, "a-1")
    with pytest.raises(ValueError, match="'echo' is not a suite: choose one of nolima, qa, ruler"):
        SuiteOptions(suite="echo", lengths=(64,))


def test_a_name_belongs_to_one_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(type(find_suite("qa"))):  # type: ignore[misc]
        pass

    with pytest.raises(ValueError, match="StandardQA and Other are both called 'qa'"):
        register(Other())


def test_no_other_file_names_a_suite() -> None:
    """Evaluation, comparison and report take every suite from its own file."""
    named = re.compile(
        r"""["'](ruler|nolima|qa)["']|\b(ruler|nolima)_|suites(\.| import )(ruler|nolima|qa)\b"""
    )
    allowed = {
        "evidence.py",  # formats of RULER's and NoLiMa's scorers
        "paper_numbers.py",  # tables of the paper
        "probe_items.py",  # the probe reads NoLiMa's needle sets
    }
    package = ROOT / "megatron_exact"
    for path in [*package.glob("evaluation/*.py"), *package.glob("report/*.py")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert path.name in allowed or not [line for line in lines if named.search(line)], path
    assert named.search((package / "evaluation" / "suites" / "qa.py").read_text(encoding="utf-8"))
