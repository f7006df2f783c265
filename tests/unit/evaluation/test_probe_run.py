"""From a model folder to probe.json and its items: the contract, going on, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from probe_models import write_model

from megatron_exact.evaluation import probe
from megatron_exact.evaluation.engine import Backend
from megatron_exact.evaluation.probe import Probe
from megatron_exact.evaluation.probe_items import ProbeOptions, read_items
from megatron_exact.evaluation.result_folders import merged_info

TOOL = Path(__file__).resolve().parents[3] / "tools" / "probe_evidence.py"
CPU = Backend(device="cpu")  # whatever other tests of this process made torch say about GPUs
OPTIONS = ProbeOptions(kinds=("answer-position", "field-lookup"), distances=(64, 80), items_per_cell=2)
ITEM = {
    "id": "a",
    "kind": "own-kind",
    "distance": 3,
    "context": 9,
    "prompt": " The object is the mirror. The object is the",
    "prompt_ablated": " The object is the river. The object is the",
    "gold": " mirror",
    "candidates": [" candle", " mirror"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written into."""
    folder = write_model(tmp_path_factory.mktemp("models") / "small")
    (folder / "megatron_exact.json").write_text('{"format_version": 1, "run": {"seed": 7}}')
    return folder


def files_of(results: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(results)): path.read_bytes() for path in results.rglob("*") if path.is_file()
    }


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing was left to score")


def stop_after(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the run when so many cells are scored."""
    right, done = probe.score_items, Counter[str]()

    def counted(*arguments: Any, **named: Any) -> Any:
        if done["cells"] == cells:
            raise KeyboardInterrupt
        done["cells"] += 1
        return right(*arguments, **named)

    monkeypatch.setattr(probe, "score_items", counted)


def test_what_is_written(model: Path, tmp_path: Path) -> None:
    summaries = Probe(model, tmp_path / "r", OPTIONS, backend=CPU).run()
    assert set(files_of(tmp_path / "r")) == {
        "probe.json",
        "probe/answer-position.jsonl",
        "probe/field-lookup.jsonl",
    }
    record = json.loads((tmp_path / "r" / "probe.json").read_text())
    assert record["finished"] is True
    assert set(record["model"]) == {"name", "config_sha256", "tokenizer_sha256", "weights_sha256"}
    assert record["provenance"] == {"format_version": 1, "run": {"seed": 7}}
    assert record["items"]["kinds"] == {"answer-position": 4, "field-lookup": 4}
    assert record["options"]["distances"] == [64, 80]
    assert record["dtype"] == "float32"  # what `auto` came to
    assert record["backend"]["device"] == "cpu"
    lines = (tmp_path / "r" / "probe" / "field-lookup.jsonl").read_text().splitlines()
    assert [json.loads(line)["distance"] for line in lines] == [64, 64, 80, 80]
    for content in map(json.loads, lines):
        assert content["context"] == content["prompt_tokens"] == content["distance"] + 96
        assert content["effect"] == content["margin"] - content["margin_ablated"]
        place = content["candidates"].index(content["gold"])
        other = content["candidates"].index(content["competitor"])
        assert content["margin"] == content["scores"][place] - content["scores"][other]
        assert content["correct"] == int(max(content["scores"]) == content["scores"][place])
    assert [(str(one.cell), one.items, one.is_new) for one in summaries][:2] == [
        ("answer-position/64/160", 2, True),
        ("answer-position/80/176", 2, True),
    ]


def test_a_probe_that_was_interrupted_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Probe(model, tmp_path / "whole", OPTIONS, backend=CPU).run()
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            Probe(model, tmp_path / "parts", OPTIONS, backend=CPU).run()
    assert json.loads((tmp_path / "parts" / "probe.json").read_text())["finished"] is False
    summaries = Probe(model, tmp_path / "parts", OPTIONS, backend=CPU).run()
    assert [one.is_new for one in summaries] == [False, False, False, True]
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    monkeypatch.setattr(probe, "score_items", never)
    assert not any(one.is_new for one in Probe(model, tmp_path / "parts", OPTIONS, backend=CPU).run())


def test_a_folder_belongs_to_one_probe(model: Path, tmp_path: Path) -> None:
    Probe(model, tmp_path / "r", OPTIONS, backend=CPU).run()
    before = files_of(tmp_path / "r")
    other = write_model(tmp_path / "other", seed=1)
    for folder, options, backend, reason in [
        (other, OPTIONS, None, "another model: name"),
        (model, ProbeOptions(**{**vars(OPTIONS), "seed": 1}), None, "another options: seed"),
        (model, OPTIONS, Backend(dtype="bfloat16"), "another dtype"),
    ]:
        with pytest.raises(ValueError, match=reason):
            Probe(folder, tmp_path / "r", options, backend=backend)
    assert files_of(tmp_path / "r") == before
    (tmp_path / "r" / "probe" / "field-lookup.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match="line 1 is no result of the probe"):
        Probe(model, tmp_path / "r", OPTIONS, backend=CPU).run()
    (tmp_path / "r" / "probe.json").unlink()
    with pytest.raises(ValueError, match="exists without a probe"):
        Probe(model, tmp_path / "r", OPTIONS)


def test_suites_may_be_evaluated_into_the_folder_of_a_probe(tmp_path: Path) -> None:
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe.json").write_text("{}")
    record = {"options": {}, "template": None, "sources": {}}
    about = {"model": 1, "backend": {"name": "hf", "dtype": "float32", "calls": []}}
    (tmp_path / ".results.json.partial-1-ab").write_text("")  # another call is writing
    assert merged_info(tmp_path, about, "ruler", record)["suites"] == {"ruler": record}
    (tmp_path / "something").write_text("")
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        merged_info(tmp_path, about, "ruler", record)


def test_items_beyond_the_model_are_refused(model: Path, tmp_path: Path) -> None:
    far = ProbeOptions(kinds=("answer-position",), distances=(500,), items_per_cell=1)
    with pytest.raises(ValueError, match=r"takes 596 positions.*--allow-beyond-positions"):
        Probe(model, tmp_path / "r", far)
    assert not (tmp_path / "r").exists()
    (summary,) = Probe(model, tmp_path / "r", far, backend=CPU, allow_beyond_positions=True).run()
    assert (summary.cell.context, summary.items) == (596, 1)


def test_options_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    for name, value in (("contexts", (512,)), ("needles", tmp_path)):
        with pytest.raises(ValueError, match=rf"--{name} is read by evidence-field alone"):
            ProbeOptions(**{**vars(OPTIONS), name: value})
    with pytest.raises(ValueError, match="--items brings its own kinds"):
        ProbeOptions(items=tmp_path, kinds=("field-lookup",))


def test_a_device_that_is_not_there_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--device cuda:99: torch finds"):
        Probe(model, tmp_path / "r", OPTIONS, backend=Backend(device="cuda:99"))
    assert not (tmp_path / "r").exists()


def run_tool_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    spec = importlib.util.spec_from_file_location("probe_evidence", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["probe_evidence.py", *map(str, arguments)])
    module.main()


def test_the_tool_scores_items_of_a_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(ITEM) + "\n" + json.dumps({**ITEM, "id": "b", "gold": " candle"}) + "\n")
    command = ["--model", model, "--items", path, "--output", tmp_path / "r", "--device", "cpu"]
    run_tool_main(monkeypatch, *command)
    assert capsys.readouterr().out.startswith("own-kind/3/9: margin ")
    lines = (tmp_path / "r" / "probe" / "own-kind.jsonl").read_text().splitlines()
    one, other = map(json.loads, lines)
    assert one["margin"] == -other["margin"]
    assert {one["correct"], other["correct"]} == {0, 1}
    assert one["gold"] == " mirror"
    run_tool_main(monkeypatch, *command)
    assert "(finished before)" in capsys.readouterr().out
    path.write_text(json.dumps({**ITEM, "prompt": " A"}) + "\n")
    with pytest.raises(ValueError, match="another options: items"):
        run_tool_main(monkeypatch, *command)
    assert read_items(path)[0].prompt == " A"
