"""The commands of `make evaluate-demo`, before anything runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from examples.evaluate_demo import ARMS, FULL, QUICK, STEPS, EvaluateSettings, run_steps
from examples.miniature.pipeline import NAME, ROOT, Pipeline


def test_steps_name_earlier_steps_only() -> None:
    made = {"inputs"}
    for name, (_, *commands) in STEPS.items():
        named = {field for command in commands for field in NAME.findall(command)}
        assert not named & (set(STEPS) - made), name
        made.add(name)


@pytest.mark.parametrize("settings", [FULL, QUICK])
def test_every_command_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: EvaluateSettings
) -> None:
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(Pipeline, "call", lambda self, words, *_, **__: called.append(words))
    monkeypatch.setattr("examples.evaluate_demo.write_model", lambda *_: None)
    pipeline = Pipeline(folder=tmp_path / "a folder")
    made = run_steps(pipeline, settings)
    assert [step.name for step in pipeline.finished] == list(made) == ["inputs", *STEPS]
    assert len(called) == sum(len(commands) for _, *commands in STEPS.values()) == 18
    for words in called:
        assert words[0] == sys.executable
        assert (ROOT / "tools" / Path(words[1]).name).is_file()
        assert not any("{" in word or "None" in word for word in words)
        assert all(str(pipeline.folder) in word for word in words if str(tmp_path) in word)
    (tune,) = [words for words in called if "fine_tune_qa.py" in words[1]]
    starts = [tune[place + 1] for place, word in enumerate(tune) if word == "--arm"]
    assert starts == [f"{arm}={made['pretraining']}/runs/{rule}/2k" for arm, rule in ARMS.items()]
    evaluated = [words[words.index("--suite") + 1] for words in called if "--suite" in words]
    assert evaluated == 2 * ["ruler", "nolima", "qa"]
