"""`--change-rotary-base`: one option changes a model's RoPE, and record, next stage and export know it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.lineage import first_difference
from megatron_exact.model.hf_folder import read_hf_folder
from tests.distributed import hf_models, jobs, ranks
from tests.distributed.test_hf_parity import LOGITS_BOUND, keep_logits, long_document

LLAMA = "llama tied, factor 32, 2 groups"
BASE, CHANGED = 500_000, 8_000_000


def train(pack: Path, start: Path, run: Path, *extra: Any) -> ranks.Ended:
    """A run of one step that is too small to move a weight; `run/../logits.pt` gets its logits."""
    argv = [
        *("--pack", pack, "--load", run, "--save", run, "--pretrained-checkpoint", start),
        *jobs.SCHEDULE,
        *("--lr", "1e-30", "--train-iters", 1, "--save-interval", 1, "--rank-timeout-seconds", 0),
        *extra,
    ]
    run.parent.mkdir(exist_ok=True)
    return ranks.train(1, argv, run.parent / f"o-{run.name}", keep_logits(run.parent))


def export(run: Path) -> Path:
    export_hf(run, run.parent / "hf")
    return run.parent / "hf"


def logits_of_export(folder: Path) -> torch.Tensor:
    """What transformers computes from an exported folder."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return hf_models.document_logits(model.eval(), long_document())


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rotary")
    import_hf(hf_models.save_model(LLAMA, folder / "hf"), folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def changed(imported: Path, pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another base than its start."""
    run = tmp_path_factory.mktemp("changed") / "run"
    ended = train(pack, imported, run, "--change-rotary-base", CHANGED).check()
    assert f"with a rotary base of 8e+06 instead of {BASE}" in ended.outputs[0]
    return run


def test_record_and_config_have_the_change_and_the_start_stays(changed: Path, imported: Path) -> None:
    record = json.loads((changed / "run.json").read_text())
    assert record["model_changes"] == {"rope_theta": {"from": float(BASE), "to": float(CHANGED)}}
    assert record["model"]["rotary_base"] == record["configuration"]["change_rotary_base"] == CHANGED
    shape, old = read_hf_folder(changed / "hf").shape, read_hf_folder(imported / "hf").shape
    assert (shape.rope_theta, old.rope_theta) == (CHANGED, BASE)
    assert shape.rope_scaling == old.rope_scaling


def test_transformers_computes_the_exported_model_only_with_its_base(changed: Path) -> None:
    folder = export(changed)
    ours = torch.load(changed.parent / "logits.pt", weights_only=True)
    assert (logits_of_export(folder) - ours).abs().max() <= LOGITS_BOUND
    card = (folder / "README.md").read_text()
    assert f"| rotary base | {CHANGED}, changed from {BASE} |" in card
    # the negative control: the same weights with the base that was not exported
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config).replace(f"{float(CHANGED)}", f"{float(BASE)}")
    (folder / "config.json").write_text(text)
    assert (logits_of_export(folder) - ours).abs().max() > 100 * LOGITS_BOUND


def test_the_next_stage_keeps_it_and_a_resume_needs_the_same_option(
    changed: Path, imported: Path, pack: Path, tmp_path: Path
) -> None:
    longer = ("--train-iters", 2)
    ended = train(pack, imported, changed, *longer)
    assert ended.codes == [1]
    assert f"--change-rotary-base {CHANGED} (now not set" in ended.outputs[0]
    train(pack, imported, changed, *longer, "--change-rotary-base", CHANGED).check()
    record = json.loads((changed / "run.json").read_text())
    assert record["model_changes"]["rope_theta"]["from"] == BASE
    assert [resume["iteration"] for resume in record["resumes"]] == [1]
    train(pack, changed, tmp_path / "next" / "run").check()
    following = json.loads((tmp_path / "next" / "run" / "run.json").read_text())
    assert following["model"]["rotary_base"] == CHANGED
    assert "model_changes" not in following
    assert following["start_checkpoint"]["run"]["model_changes"] == record["model_changes"]


def test_arms_that_differ_in_it_are_no_pair(
    changed: Path, imported: Path, pack: Path, tmp_path: Path
) -> None:
    train(pack, imported, tmp_path / "plain" / "run").check()
    arms = [json.loads((run / "run.json").read_text()) for run in (tmp_path / "plain" / "run", changed)]
    assert "model" in (first_difference(arms[0], arms[1]) or "")
    # a later stage of each arm, with equal flags
    stages = [
        {"fingerprint": "long", "start_checkpoint": {"iteration": 1, "sha256": str(arm), "run": record}}
        for arm, record in enumerate(arms)
    ]
    assert "in the training before" in (first_difference(*stages) or "")
    assert first_difference(arms[1], arms[1]) is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--rotary-base", CHANGED),
            f"--rotary-base {CHANGED} is given but the model has {BASE}, says .*: drop these flags, or "
            f"change the model on purpose with --change-rotary-base {CHANGED}",
        ),
        (("--change-rotary-base", "8M"), "'8M' is not a whole number of 2 to"),
        (("--change-rotary-base", 1), "'1' is not a whole number of 2 to"),
        (
            ("--change-rotary-base", CHANGED, "--rotary-base", BASE),
            f"--rotary-base {BASE} is given but the model has {CHANGED}",
        ),
    ],
)
def test_another_base_by_accident_is_an_error(
    flags: tuple[Any, ...], words: str, imported: Path, pack: Path, tmp_path: Path
) -> None:
    ended = train(pack, imported, tmp_path / "accident" / "run", *flags)
    assert ended.codes[0] != 0
    assert re.search(words, ended.outputs[0])
    assert not (tmp_path / "accident" / "run").exists()
