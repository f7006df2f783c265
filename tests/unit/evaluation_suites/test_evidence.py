"""Edited, mixed, thinned and copied results are named; answers in the formats of the authors' scorers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

from megatron_exact.commands.evaluations import export_predictions, verify_results
from megatron_exact.evaluation.comparison import compare_runs, write_comparison
from megatron_exact.evaluation.evaluate import Evaluation
from megatron_exact.evaluation.result_folders import text_sha256
from megatron_exact.evaluation.suites.ruler import Ruler
from megatron_exact.files import sha256_file
from megatron_exact.report.compared import check_comparison
from tests.unit.evaluation_suites.small_evaluation import (
    NEEDLES,
    AnsweringModel,
    needle_oracle,
    ruler_oracle,
    suite_options,
    write_small_model,
)

CELL = "ruler/niah_single_1/512"


def evaluate(model: Path, folder: Path, answer: Callable[[str], str], **changes: Any) -> Path:
    """RULER's first task and one NoLiMa set, four examples each, with their prompts."""
    for options in (
        suite_options("ruler", tasks=("niah_single_1",), lengths=(512,), samples=4, **changes),
        suite_options(
            "nolima", tasks=("needle_set",), lengths=(250,), samples=4, nolima_data=NEEDLES, **changes
        ),
    ):
        oracle = AnsweringModel(answer)
        evaluation = Evaluation(
            model,
            folder,
            options,
            cache=folder.parent / "cache",
            keep_prompts=True,
            load=lambda *_, oracle=oracle: oracle,
        )
        evaluation.run()
    return folder


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two models; half of the first one's answers are wrong."""
    folder = tmp_path_factory.mktemp("evidence")
    calls: list[str] = []

    def unsure(prompt: str) -> str:
        calls.append(prompt)
        return "nothing" if len(calls) % 2 else right(prompt)

    evaluate(model, folder / "standard", unsure)
    evaluate(write_small_model(folder / "other"), folder / "exact", right)
    return folder


def right(prompt: str) -> str:
    return ruler_oracle(prompt) if "special magic" in prompt else needle_oracle(prompt)


@pytest.fixture
def folders(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    for name in ("standard", "exact"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def compare(folders: Path) -> dict[str, Any]:
    return compare_runs([folders / "standard"], [folders / "exact"])


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{CELL}.jsonl").read_text().splitlines()]


def write(folder: Path, lines: list[dict[str, Any]], *, sign: bool = False) -> None:
    path = folder / f"{CELL}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if sign:  # the hash is brought up to date, the binding is not
        change(folder, lambda content: content["cells"].update({CELL: sha256_file(path)}))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "results.json").read_text())
    edit(content)
    (folder / "results.json").write_text(json.dumps(content))


def without_record(folder: Path) -> None:
    """As if nobody had written hashes."""
    change(folder, lambda content: [content.pop(name) for name in ("cells", "bindings")])


def test_untouched_results_are_verified(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_comparison(folders / "comparison", compare(folders))
    words = [str(folders / name) for name in ("standard", "exact")]
    assert verify_results([*words, "--comparison", str(folders / "comparison")]) == 0
    said = capsys.readouterr().out
    assert f"{CELL}, 4 examples: ok (hash, model, protocol and code, scores, prompts)" in said
    assert "all 10 verified" in said  # 4 cells, and 3 files of each side


def edited_score(folder: Path) -> None:
    lines = lines_of(folder)
    assert lines[0]["score"] == 0
    lines[0]["score"] = 1.0
    write(folder, lines)


def edited_score_without_hashes(folder: Path) -> None:
    edited_score(folder)
    without_record(folder)


def edited_and_signed(folder: Path) -> None:
    lines = lines_of(folder)
    lines[0] |= {"score": 1.0, "prediction": lines[0]["references"][0]}
    write(folder, lines, sign=True)


def thinned(folder: Path) -> None:
    write(folder, lines_of(folder)[:2])


def thinned_and_signed(folder: Path) -> None:
    write(folder, lines_of(folder)[:2], sign=True)


def copied(folder: Path) -> None:
    shutil.copy(folder.parent / "exact" / f"{CELL}.jsonl", folder / f"{CELL}.jsonl")


def copied_with_its_record(folder: Path) -> None:
    copied(folder)
    theirs = json.loads((folder.parent / "exact" / "results.json").read_text())
    for name in ("cells", "bindings"):
        change(folder, lambda content, name=name: content[name].update({CELL: theirs[name][CELL]}))


def other_protocol(folder: Path) -> None:
    change(folder, lambda content: content["suites"]["ruler"]["options"].update(protocol="lm-eval"))


def other_model(folder: Path) -> None:
    change(folder, lambda content: content["model"].update(config_sha256="0" * 64))


def other_prompt(folder: Path) -> None:
    lines = lines_of(folder)
    lines[1]["prompts"] = ["Another question?"]
    write(folder, lines)
    without_record(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edited_score, r"512\.jsonl has changed since megatron-exact evaluate wrote it"),
        (
            edited_score_without_hashes,
            r"id niah_single_1-0000: the score is 1, but its answer 'nothing' has 0 by the metric",
        ),
        (edited_and_signed, r"512\.jsonl was not made with the model, template and options"),
        (thinned, r"512\.jsonl has changed since"),
        (thinned_and_signed, r"512\.jsonl was not made with the model, template and options"),
        (copied, r"512\.jsonl has changed since megatron-exact evaluate wrote it, or is of another model"),
        (copied_with_its_record, r"512\.jsonl was not made with the model, template and options"),
        (other_protocol, r"512\.jsonl was not made with the model, template and options"),
        (other_model, "was not made with the model, template and options"),
        (
            other_prompt,
            "line 2 is not an example of this cell .prompt_sha256 is not the hash of its prompts",
        ),
    ],
)
def test_what_was_changed_is_named(
    folders: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
) -> None:
    assert compare(folders)["cells"]
    damage(folders / "standard")
    with pytest.raises(ValueError, match=message):
        compare(folders)
    assert verify_results([str(folders / "standard")]) == 1
    assert "FAILED: " in capsys.readouterr().out


def test_a_cell_of_fewer_examples_than_its_binding_counts_is_named(folders: Path) -> None:
    """Also where the hash was brought up to date, and the binding made again for the old number."""
    from megatron_exact.evaluation.result_folders import cell_binding

    folder = folders / "standard"
    thinned_and_signed(folder)

    def bind(content: dict[str, Any]) -> None:
        bound = content["bindings"][CELL]
        bound["sha256"] = cell_binding(
            content, CELL, sha256=content["cells"][CELL], examples=bound["examples"], code=bound["code"]
        )

    change(folder, bind)
    with pytest.raises(ValueError, match=r"512\.jsonl has 2 of the 4 examples that were evaluated"):
        compare(folders)


def test_a_cell_that_nobody_recorded_is_evaluated_again(folders: Path, model: Path) -> None:
    """A cell of another model that lies in an unfinished folder must not be taken for one's own."""
    folder = folders / "standard"
    own = (folder / f"{CELL}.jsonl").read_bytes()
    copied(folder)
    change(folder, lambda content: [content[name].pop(CELL) for name in ("cells", "bindings")])
    with pytest.raises(ValueError, match=r"512\.jsonl lies there and is not in results\.json"):
        compare(folders)
    wrong = [json.loads(line)["score"] == 0 for line in own.splitlines()]
    answers = iter(wrong)
    with pytest.warns(UserWarning, match=r"512\.jsonl is not in results\.json: .*evaluated again"):
        evaluate(model, folder, lambda prompt: "nothing" if next(answers) else right(prompt))
    assert (folder / f"{CELL}.jsonl").read_bytes() == own
    assert compare(folders)["cells"]


def test_what_a_folder_of_an_older_version_cannot_show_is_said(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders / "standard"
    assert not any("bindings" in note for note in compare(folders)["notes"])
    change(folder, lambda content: content.pop("bindings"))
    (note,) = [note for note in compare(folders)["notes"] if "bindings" in note]
    assert note.startswith(f"{folder}: its results.json has no bindings (an older version")
    assert verify_results([str(folder), str(folders / "exact")]) == 0
    said = capsys.readouterr().out
    assert said.count("not verified as this model's: its results.json has no bindings") == 2
    assert "all 4 verified, 2 of them without a binding to their model" in said
    change(folder, lambda content: content.pop("cells"))
    assert any("has no hashes and bindings" in note for note in compare(folders)["notes"])


def test_checks_that_were_not_made_are_not_named(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A right choice has no known score; and prompts may have been kept by one share alone."""
    folder = folders / "standard"
    without_record(folder)
    lines = lines_of(folder)
    del lines[-1]["prompts"]
    write(folder, lines)
    piqa = folder / "qa" / "piqa" / "0.jsonl"
    piqa.parent.mkdir(parents=True)
    line = {"id": "piqa-00000", "task": "piqa", "length": 0, "prompt_sha256": "0" * 64, "score": 1.0}
    piqa.write_text(json.dumps({**line, "prediction": "a", "references": ["a"]}) + "\n")
    change(folder, lambda content: content["suites"].update(qa={"options": {}}))
    assert verify_results([str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"{CELL}, 4 examples: ok (scores)" in said
    assert "qa/piqa/0, 1 examples: ok (readable)" in said


def test_a_comparison_names_what_it_compared(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_comparison(folders / "comparison", compare(folders))
    content = json.loads(path.read_text())
    files = content["runs"][0]["baseline"]["files"]
    assert set(files) == {"results.json", f"{CELL}.jsonl", "nolima/needle_set/250.jsonl"}
    assert files[f"{CELL}.jsonl"] == sha256_file(folders / "standard" / f"{CELL}.jsonl")
    check_comparison(path, content)
    content["aggregates"][0]["examples"] += 1  # numbers that contradict nothing
    with pytest.raises(ValueError, match="it has changed since megatron-exact compare wrote it"):
        check_comparison(path, content)
    write(folders / "exact", lines_of(folders / "exact")[:3])
    assert verify_results([str(folders / "standard"), "--comparison", str(folders / "comparison")]) == 1
    said = capsys.readouterr().out
    assert f"exact/{CELL}.jsonl has changed since it was compared" in said
    assert "1 of 8 failed" in said


@pytest.mark.parametrize("answer", ["A, b\x07c and 12.", "", "  B\n", "a a a"])
def test_ruler_s_metric_is_that_of_its_scorer(answer: str) -> None:
    for references in (["a"], ["A", "B", "C"], ["12", "x"], ["b\nc", "q"]):
        expected = string_match_all(postprocess_pred([answer]), [references])
        assert Ruler().score(answer, references) == expected


def test_answers_are_exported_for_the_authors_scorers(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folders / "exported"
    export_predictions([str(folders / "standard"), "--output", str(out)])
    assert "files, first" in capsys.readouterr().out
    path = out / "ruler" / "512" / "niah_single_1.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keys = {"index", "pred", "input", "outputs", "others", "truncation", "length"}
    assert [set(row) for row in rows] == [keys] * 4
    lines = lines_of(folders / "standard")
    assert [text_sha256(row["input"]) for row in rows] == [line["prompt_sha256"] for line in lines]
    # NVIDIA's metric, in percent and rounded
    scored = string_match_all(
        postprocess_pred([row["pred"] for row in rows]), [row["outputs"] for row in rows]
    )
    assert scored == sum(line["score"] for line in lines) / 4 == 0.5
    found = [json.loads(file.read_text()) for file in sorted((out / "nolima").rglob("*.json"))]
    results = [result for content in found for result in content["results"]]
    assert sum(result["metric"] for result in results) == 2
    for content in found:  # what their notebook deletes and sums
        del content["result_dir"]
        assert content["context_length"] == 250
        for result in content["results"]:
            assert result["prompt_tokens"] + result["completion_tokens"] > 250
            assert result["metric"] == any(gold in result["response"] for gold in result["gold_answers"])
    shutil.rmtree(folders / "standard" / "ruler")
    shutil.rmtree(folders / "standard" / "nolima")
    with pytest.raises(ValueError, match=r"results\.json"):
        export_predictions([str(folders / "standard"), "--output", str(out)])
