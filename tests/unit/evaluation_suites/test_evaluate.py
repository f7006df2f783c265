"""Whole evaluations: the contract of the files, restarts, and lm-eval's traps."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from megatron_exact.commands import evaluations
from megatron_exact.evaluation.engine import Backend, load_model, load_tokenizer, resolve
from megatron_exact.evaluation.evaluate import Evaluation, summary_rows
from megatron_exact.evaluation.prompts import Prompts, Template
from megatron_exact.evaluation.result_folders import Cell, read_cell, read_result_folder
from megatron_exact.evaluation.suites import ruler
from megatron_exact.evaluation.suites.suite import SuiteOptions
from tests.unit.evaluation_suites.small_evaluation import (
    BOOK,
    NEEDLES,
    AnsweringModel,
    needle_oracle,
    ruler_oracle,
    suite_options,
    write_small_model,
)
from tools import evaluate_model

TEMPLATE = (
    "{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)


def nolima_options(**changes: Any) -> SuiteOptions:
    options: dict[str, Any] = {
        "suite": "nolima",
        "lengths": (512,),
        "tasks": ("needle_set",),
        "samples": 4,
        "nolima_data": NEEDLES,
        "nolima_protocol": "window",
    }
    return suite_options(**{**options, **changes})


class Runs:
    """Evaluations of the small model into one folder, by an oracle."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder, self.results = model, folder, folder / "results"
        self.oracle = AnsweringModel(needle_oracle)

    def __call__(
        self,
        options: SuiteOptions,
        answer: Callable[[str], str] = needle_oracle,
        model: Path | None = None,
        backend: Backend | None = None,
    ) -> Evaluation:
        self.oracle = AnsweringModel(answer)
        return Evaluation(
            model or self.model,
            self.results,
            options,
            backend=backend,
            cache=self.folder / "cache",
            load=self.load,
        )

    def load(self, model: Path, prompts: Prompts, *_: object) -> AnsweringModel:
        self.oracle.tokenizer = prompts.tokenizer
        return self.oracle


@pytest.fixture
def runs(model: Path, tmp_path: Path) -> Runs:
    return Runs(model, tmp_path)


def test_ruler_from_generator_to_files(runs: Runs) -> None:
    options = suite_options(suite="ruler", lengths=(1536,), samples=3, essays=BOOK)
    found = runs(options, ruler_oracle).run()
    assert [(result.score, result.examples, result.is_new) for result in found] == [(1.0, 3, True)] * 11
    folder = read_result_folder(runs.results)
    assert [cell.task for cell in folder.files] == sorted(ruler.TASKS)
    for cell in folder.files:
        examples = read_cell(folder, cell)
        hashes = {hashlib.sha256(prompt.encode()).hexdigest() for prompt in runs.oracle.prompts}
        assert set(examples.prompts) <= hashes
        assert len(set(examples.ids)) == 3
    line = json.loads(folder.files[Cell(suite="ruler", task="vt", length=1536)].read_text().split("\n")[0])
    assert set(line) == {
        "id", "task", "length", "prompt_sha256", "prompt_tokens", "prediction", "references", "score",
    }  # fmt: skip
    assert folder.info["suites"]["ruler"]["options"]["samples"] == 3
    assert folder.info["lm_eval"]
    assert folder.info["provenance"] is None
    assert set(folder.info["suites"]["ruler"]["sources"]) == {"essays"}


def test_an_answer_that_is_wrong_scores_nothing(runs: Runs) -> None:
    options = suite_options(suite="ruler", lengths=(512,), tasks=("niah_single_1",), samples=3)
    assert [result.score for result in runs(options, lambda _: "nothing").run()] == [0.0]


def test_finished_cells_are_skipped(runs: Runs) -> None:
    assert [r.is_new for r in runs(nolima_options()).run()] == [True]
    before = {path: path.read_bytes() for path in runs.results.rglob("*.jsonl")}
    found = runs(nolima_options(lengths=(512, 640), tasks=("needle_set", "needle_set_hard"))).run()
    assert [result.is_new for result in found] == [False, True, True, True]
    assert len(runs.oracle.prompts) == 12
    assert {path: path.read_bytes() for path in before} == before
    sources = read_result_folder(runs.results).info["suites"]["nolima"]["sources"]
    assert {"needlesets/needle_set.json", "needlesets/needle_set_hard.json"} <= set(sources)


def test_a_damaged_cell_is_named(runs: Runs) -> None:
    runs(nolima_options()).run()
    path = runs.results / "nolima" / "needle_set" / "512.jsonl"
    for text, message in (('{"id": 1', "line 1 is not JSON"), ("", "is empty")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"512\.jsonl.*{message}.*evaluate the cell again"):
            runs(nolima_options()).run()


def test_an_interrupted_cell_is_made_again(runs: Runs) -> None:
    def stop(prompt: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs(nolima_options(), stop).run()
    assert not list(runs.results.rglob("*.jsonl"))
    assert [result.is_new for result in runs(nolima_options()).run()] == [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "options of nolima: seed '0' there, '1' now"),
        ({"samples": 5}, "options of nolima: samples"),
        ({"template": "FILE"}, "template of nolima"),
    ],
)
def test_other_options_do_not_mix(runs: Runs, changes: dict[str, Any], message: str) -> None:
    runs(nolima_options()).run()
    if "template" in changes:
        path = runs.folder / "sft.jinja"
        path.write_text(TEMPLATE)
        changes = {"template": str(path)}
    with pytest.raises(ValueError, match=message):
        runs(nolima_options(**changes))


def test_other_number_types_do_not_mix(runs: Runs) -> None:
    backend = Backend(device="cpu", batch_size=2)
    runs(nolima_options(), backend=backend).run()
    with pytest.raises(ValueError, match="another backend: dtype: 'float32' there, 'bfloat16' now"):
        runs(nolima_options(lengths=(640,)), backend=Backend(device="cpu", dtype="bfloat16"))
    runs(nolima_options(), backend=Backend(device="cpu", dtype="float32")).run()
    runs(nolima_options(), backend=backend).run()
    recorded = read_result_folder(runs.results).info["backend"]
    assert (recorded["name"], recorded["dtype"]) == ("hf", "float32")
    assert [(call["device"], call["batch_size"]) for call in recorded["calls"]] == [("cpu", 2), ("cpu", 1)]
    assert set(recorded["calls"][0]["versions"]) == {"torch", "transformers"}


def test_a_folder_that_does_not_say_how_it_was_made_is_not_filled_further(runs: Runs) -> None:
    runs(nolima_options()).run()
    path = runs.results / "results.json"
    content = json.loads(path.read_text())
    del content["backend"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"did not record backend and dtype.*choose another --output"):
        runs(nolima_options())


def test_suites_that_are_begun_together_both_stay(runs: Runs) -> None:
    one = runs(nolima_options(samples=1))
    other = runs(suite_options(suite="ruler", lengths=(512,), tasks=("niah_single_1",), samples=1))
    one.run()
    other.run()
    assert set(read_result_folder(runs.results).info["suites"]) == {"nolima", "ruler"}
    assert set(other.info["suites"]) == {"nolima", "ruler"}


def test_a_device_that_is_not_there_is_refused(runs: Runs) -> None:
    with pytest.raises(ValueError, match=r"--device cuda:99: torch finds"):
        runs(nolima_options(), backend=Backend(device="cuda:99"))
    assert not runs.results.exists()


def test_another_model_does_not_mix(runs: Runs, tmp_path: Path) -> None:
    runs(nolima_options()).run()
    other = write_small_model(tmp_path / "other")
    with pytest.raises(ValueError, match="another model"):
        runs(nolima_options(), model=other)


@pytest.mark.parametrize(("protocol", "space"), [("official", " "), ("lm-eval", "")])
def test_the_template_stands_in_prompts_and_results(runs: Runs, protocol: str, space: str) -> None:
    """Officially the start of the answer keeps its space, which a template may strip."""
    path = runs.folder / "sft.jinja"
    path.write_text(TEMPLATE)
    options = suite_options(
        suite="ruler",
        lengths=(640,),
        tasks=("niah_single_1",),
        samples=2,
        template=str(path),
        ruler_protocol=protocol,
    )
    assert [result.score for result in runs(options, ruler_oracle).run()] == [1.0]
    for prompt in runs.oracle.prompts:
        assert prompt.startswith("### user\n")
        answer = prompt.partition("\n### assistant\n")[2]
        assert answer.startswith(f"{space}The special magic number for ")
        assert answer.endswith(" is")
    assert read_result_folder(runs.results).info["suites"]["ruler"]["options"]["protocol"] == protocol
    record = read_result_folder(runs.results).info["suites"]["ruler"]["template"]
    assert record["text"] == TEMPLATE
    assert record["sha256"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()


def test_a_model_without_a_template_says_so(runs: Runs) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        runs(nolima_options(template="model"))


def test_a_prompt_that_does_not_fit_is_an_error_not_a_cut(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = runs(nolima_options())
    made = evaluation.suite.make_examples("needle_set", 512, evaluation.options, evaluation.prompts)
    longer = [{**document, "input": "one more " + document["input"]} for document in made]
    monkeypatch.setattr(evaluation.suite, "make_examples", lambda *_: longer)
    with pytest.raises(ValueError, match=r"192 generated ones do not fit into 512"):
        evaluation.run()
    assert not runs.oracle.prompts


def test_windows_beyond_the_positions_need_a_word(runs: Runs) -> None:
    with pytest.raises(ValueError, match="max_position_embeddings 4,096"):
        runs(nolima_options(lengths=(8192,)))
    runs(nolima_options(lengths=(8192,), allow_beyond_positions=True))


def exported(model: Path, copy: Path, record: dict[str, Any]) -> Path:
    """A model with this megatron_exact.json."""
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "megatron_exact.json").write_text(json.dumps(record))
    return copy


def test_a_tuned_model_needs_a_word_about_its_template(runs: Runs, model: Path) -> None:
    record = {"run": {"supervision": {"targets": "answers", "template_sha256": "0"}}}
    tuned = exported(model, runs.folder / "tuned", record)
    with pytest.raises(ValueError, match=r"was tuned on questions.*--template model.*--template none"):
        runs(nolima_options(), model=tuned)
    assert runs(nolima_options(template="none"), model=tuned).prompts.template.kind == "none"
    base = exported(model, runs.folder / "base", {"run": {"supervision": None}})
    assert runs(nolima_options(), model=base).prompts.template.kind == "none"


def test_windows_of_the_summary_count_k_as_their_suite_does() -> None:
    cells = {
        Cell(suite="nolima", task="needle_set", length=length): [1.0] for length in (250, 32000, 32768)
    }
    (official,) = summary_rows("m", None, cells, {"nolima": 1000})
    (window,) = summary_rows("m", None, cells, {"nolima": 1024})
    assert official["evaluation_windows"] == "0.25K,32K,32768"
    assert window["evaluation_windows"] == "250,31.25K,32K"


def test_provenance_and_the_summary_in_the_layout_of_table_1(runs: Runs, model: Path) -> None:
    tuning = {"row_tokens": 384, "seed": 1, "start_checkpoint": {"run": {"row_tokens": 512}}}
    record = {"format_version": 1, "run": tuning}
    copy = exported(model, runs.folder / "exported", record)
    answer = {True: needle_oracle, False: lambda _: "nobody"}
    evaluation = runs(
        nolima_options(lengths=(512, 640, 768), samples=2),
        lambda prompt: answer[len(prompt) < 2000](prompt),
        model=copy,
    )
    found = {result.cell.length: result.score for result in evaluation.run()}
    assert read_result_folder(runs.results).provenance == record
    path = evaluation.write_summary("Small-1", None)
    with open(path, encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [list(row.values()) for row in rows] == [
        ["Small-1", "0.5K", "nolima", "trained", "0.5K", f"{100 * found[512]:.2f}", "1", "2"],
        [
            "Small-1", "0.5K", "nolima", "extrapolated", "640,0.75K",
            f"{50 * (found[640] + found[768]):.2f}", "2", "4",
        ],
    ]  # fmt: skip


def test_the_tool_on_a_real_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "evaluate_model.py", "--model", str(model), "--suite", "nolima", "--nolima-data", str(NEEDLES),
        "--nolima-protocol", "window",
        "--lengths", "0.375K", "--samples", "2", "--tasks", "needle_set_hard", "--device", "cpu",
        "--batch-size", "2", "--output", str(tmp_path / "results"),
        "--example-cache", str(tmp_path / "cache"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    evaluate_model.main()
    assert "nolima/needle_set_hard/384: 0.00 over 2 examples" in capsys.readouterr().out
    folder = read_result_folder(tmp_path / "results")
    (cell,) = folder.files
    lines = [json.loads(line) for line in folder.files[cell].read_text().splitlines()]
    assert [line["id"].rpartition("@")[2] for line in lines] == ["0", "64"]
    assert [(line["book"], line["question"]) for line in lines] == [
        ("rand_book_1.txt", line["id"].partition("@")[0]) for line in lines
    ]
    assert all(line["prediction"] for line in lines)
    assert all(line["prompt_tokens"] + 192 <= 384 for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "longbench"}, "not a suite"),
        ({"tasks": ("niah_single_1",)}, "no task 'niah_single_1'"),
        ({"lengths": ()}, "--lengths is needed"),
        ({"lengths": (512, 512)}, "each length once"),
        ({"nolima_data": None}, "--nolima-data is needed"),
        ({"nolima_template": BOOK}, "--nolima-template is for --nolima-protocol official"),
        ({"suite": "qa", "tasks": ()}, "--lengths has no meaning for qa"),
        ({"essays": BOOK}, "--essays has no meaning for nolima, only for ruler"),
        ({"shots": 4}, "--shots has no meaning for nolima, only for qa"),
        ({"qa_data": NEEDLES}, "--qa-data has no meaning for nolima, only for qa"),
        (
            {"suite": "ruler", "tasks": (), "nolima_protocol": "official"},
            "--nolima-data has no meaning for ruler, only for nolima",
        ),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nolima_options(**changes)


def test_the_official_protocol_and_its_digest(runs: Runs) -> None:
    path = runs.folder / "chat.jinja"
    path.write_text(TEMPLATE)
    options = nolima_options(lengths=(250, 500), nolima_protocol="official", samples=8, template=str(path))
    evaluation = runs(options)
    assert [result.score for result in evaluation.run()] == [1.0, 1.0]
    start = "### system\nYou are a helpful assistant\n### user\nYou will read part of a chronicle."
    assert all(prompt.startswith(start) for prompt in runs.oracle.prompts)
    digest = evaluation.write_digest()
    assert digest is not None
    found = json.loads(digest.read_text())["needle_set"]
    assert (found["base_score"], found["effective_length"], found["base_lengths"]) == (100, 500, [250, 500])
    record = read_result_folder(runs.results).info["suites"]["nolima"]["options"]
    assert record["protocol"] == "official"
    with pytest.raises(ValueError, match="options of nolima: protocol 'official' there, 'window' now"):
        runs(nolima_options(template=str(path)))
    path.write_text("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}")
    runs.results = runs.folder / "other"
    with pytest.raises(ValueError, match="leaves out the system message"):
        runs(options)
    runs(nolima_options(template=str(path)))


def test_prompts_alone_need_a_tokenizer_and_no_weights(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for path in model.glob("*token*"):
        (tokenizer / path.name).write_bytes(path.read_bytes())
    output = tmp_path / "prompts.jsonl"
    nolima = ["--suite", "nolima", "--nolima-data", str(NEEDLES), "--lengths", "0.25K", "--samples", "5"]
    usual = ["--model", str(tokenizer), "--prompts-only", str(output)]
    evaluations.evaluate([*usual, *nolima, "--tasks", "needle_set,needle_set_hard"])
    assert "10 prompts" in capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    keys = {"id", "prompt", "system", "suite", "task", "length", "depth", "book", "references"}
    assert {(row["suite"], row["task"], row["length"], row["system"]) for row in rows} == {
        ("nolima", task, 250, "You are a helpful assistant") for task in ("needle_set", "needle_set_hard")
    }
    assert all(keys <= set(row) and needle_oracle(row["prompt"]) == row["references"][0] for row in rows)
    ruler = ["--suite", "ruler", "--lengths", "512", "--samples", "2", "--tasks", "niah_single_1"]
    evaluations.evaluate([*usual, *ruler])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [ruler_oracle(row["prompt"].replace(row["prefix"], "")) for row in rows] == [
        row["references"][0] for row in rows
    ]
    assert {row["depth"] for row in rows} == {None}
    with pytest.raises(ValueError, match="give --output RESULTS to evaluate, or --prompts-only FILE"):
        evaluations.evaluate(["--model", str(tokenizer), *ruler])
    for shared in (["--shard", "0/2"], ["--processes", "2"]):
        with pytest.raises(ValueError, match="--prompts-only writes all prompts to one file: leave out"):
            evaluations.evaluate([*usual, *ruler, *shared])


def test_answers_are_greedy_whatever_the_folder_says(tmp_path: Path) -> None:
    """Against a loop of argmax; the control keeps the folder's repetition_penalty: another text."""
    torch.manual_seed(0)  # of the weights
    folder = write_small_model(tmp_path / "model")
    path = folder / "generation_config.json"
    settings = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 0.7, "bos_token_id": 0}
    path.write_text(json.dumps({**settings, "eos_token_id": [1, 2]}))
    prompts = Prompts(load_tokenizer(folder), Template(kind="none", text=None))
    backend = resolve(Backend(device="cpu"), folder)
    model = load_model(folder, prompts, backend, 256).model
    assert model.generation_config.eos_token_id == [1, 2]
    start = torch.tensor([prompts.tokenizer.encode("The chronicle says that the river")])
    plain = start
    for _ in range(24):
        logits = model(plain).logits[:, -1:]
        logits[..., [1, 2]] = -torch.inf  # the ends, which `min_new_tokens` rules out
        plain = torch.cat([plain, logits.argmax(-1)], dim=1)
    length = {"max_new_tokens": 24, "min_new_tokens": 24}
    assert torch.equal(model.generate(start, **length), plain)
    stored = GenerationConfig.from_pretrained(folder, do_sample=False)
    assert not torch.equal(model.generate(start, generation_config=stored, **length), plain)
    assert backend.record()["calls"][0]["generation"]["repetition_penalty"] == 1


def test_bad_folders(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json"):
        runs(nolima_options(), model=tmp_path)
    runs.results.mkdir()
    (runs.results / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"has no results.json"):
        runs(nolima_options())
    (runs.results / "results.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        runs(nolima_options())
