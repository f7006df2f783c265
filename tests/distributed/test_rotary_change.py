"""`--change-rotary-base`, `--change-rope-yarn`: a model's RoPE changes, and record and export know it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.conversion.verify_checkpoint import verify_checkpoint
from megatron_exact.lineage import first_difference
from megatron_exact.model.hf_folder import read_hf_folder
from tests.distributed import hf_models, jobs, ranks
from tests.distributed.test_hf_parity import LOGITS_BOUND, LOSS_BOUND, keep_logits, long_document

LLAMA, QWEN = "llama tied, factor 32, 2 groups", "qwen2 tied, 2 groups"
BASE, CHANGED = 500_000, 8_000_000
YARN = "4,256"
"""The long document has 1,500 tokens, in which the pairs below the ramp turn far."""


def train(pack: Path, start: Path, run: Path, *extra: Any, world: int = 1) -> ranks.Ended:
    """A run of one step that is too small to move a weight; `run/../logits.pt` gets its logits."""
    argv = [
        *("--pack", pack, "--load", run, "--save", run, "--pretrained-checkpoint", start),
        *jobs.SCHEDULE,
        *("--lr", "1e-30", "--train-iters", 1, "--save-interval", 1, "--rank-timeout-seconds", 0),
        *extra,
    ]
    run.parent.mkdir(exist_ok=True)
    patch = keep_logits(run.parent) if world == 1 else None
    return ranks.train(world, argv, run.parent / f"o-{run.name}", *([patch] if patch else []))


def logits_of_export(folder: Path) -> torch.Tensor:
    """What transformers computes from an exported folder."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return hf_models.document_logits(model.eval(), long_document())


def check_export(run: Path, *controls: tuple[tuple[str, ...], Any]) -> str:
    """Compare an export with the run in logits; with each control in its config they must differ.

    Args:
        run: the run, `run/../logits.pt` its logits.
        controls: keys that lead to a value of config.json, and another value.

    Returns:
        The model card.
    """
    folder = run.parent / "hf"
    export_hf(run, folder)
    ours = torch.load(run.parent / "logits.pt", weights_only=True)
    assert (logits_of_export(folder) - ours).abs().max() <= LOGITS_BOUND
    checks = list(verify_checkpoint(run, hf=folder))
    assert checks
    assert [check.name for check in checks if not check.passed] == []
    text = (folder / "config.json").read_text()
    for keys, value in controls:
        config = json.loads(text)
        inner = config
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))
        assert (logits_of_export(folder) - ours).abs().max() > 20 * LOGITS_BOUND, keys
    return (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint of each model."""
    folder = tmp_path_factory.mktemp("rotary")
    found = {}
    for name in (LLAMA, QWEN):
        found[name] = folder / name[:5]
        import_hf(hf_models.save_model(name, folder / f"hf {name[:5]}"), found[name])
    return found


@pytest.fixture(scope="module")
def changed(imported: dict[str, Path], pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another base than its start."""
    run = tmp_path_factory.mktemp("changed") / "run"
    ended = train(pack, imported[LLAMA], run, "--change-rotary-base", CHANGED).check()
    assert f"with rope_theta {float(CHANGED)} instead of {float(BASE)}" in ended.outputs[0]
    return run


def test_record_and_config_have_the_base_and_the_start_stays(
    changed: Path, imported: dict[str, Path]
) -> None:
    record = json.loads((changed / "run.json").read_text())
    assert record["model_changes"] == {"rope_theta": {"from": float(BASE), "to": float(CHANGED)}}
    assert record["model"]["rotary_base"] == record["configuration"]["change_rotary_base"] == CHANGED
    shape, old = read_hf_folder(changed / "hf").shape, read_hf_folder(imported[LLAMA] / "hf").shape
    assert (shape.rope_theta, old.rope_theta) == (CHANGED, BASE)
    assert shape.rope_scaling == old.rope_scaling


def test_transformers_computes_the_exported_model_only_with_its_base(changed: Path) -> None:
    config = json.loads((changed / "hf" / "config.json").read_text())
    (place,) = (key for key in ("rope_parameters", "rope_scaling") if config.get(key))
    card = check_export(changed, ((place, "rope_theta"), float(BASE)))
    assert f"| rotary base, scaling | {CHANGED}, changed from {BASE}, Llama 3's scaling by " in card


def test_the_next_stage_keeps_it_and_a_resume_needs_the_same_option(
    changed: Path, imported: dict[str, Path], pack: Path, tmp_path: Path
) -> None:
    longer = ("--train-iters", 2)
    ended = train(pack, imported[LLAMA], changed, *longer)
    assert ended.codes == [1]
    assert f"--change-rotary-base {CHANGED} (now not set" in ended.outputs[0]
    train(pack, imported[LLAMA], changed, *longer, "--change-rotary-base", CHANGED).check()
    record = json.loads((changed / "run.json").read_text())
    assert record["model_changes"]["rope_theta"]["from"] == BASE
    assert [resume["iteration"] for resume in record["resumes"]] == [1]
    train(pack, changed, tmp_path / "next" / "run").check()
    following = json.loads((tmp_path / "next" / "run" / "run.json").read_text())
    assert following["model"]["rotary_base"] == CHANGED
    assert "model_changes" not in following
    assert following["start_checkpoint"]["run"]["model_changes"] == record["model_changes"]


def test_arms_that_differ_in_it_are_no_pair(
    changed: Path, imported: dict[str, Path], pack: Path, tmp_path: Path
) -> None:
    train(pack, imported[LLAMA], tmp_path / "plain" / "run").check()
    arms = [json.loads((run / "run.json").read_text()) for run in (tmp_path / "plain" / "run", changed)]
    assert "model" in (first_difference(arms[0], arms[1]) or "")
    # a later stage of each arm, with equal flags
    stages = [
        {"fingerprint": "long", "start_checkpoint": {"iteration": 1, "sha256": str(arm), "run": record}}
        for arm, record in enumerate(arms)
    ]
    assert "in the training before" in (first_difference(*stages) or "")
    assert first_difference(arms[1], arms[1]) is None


def test_yarn_is_that_of_transformers(imported: dict[str, Path], pack: Path, tmp_path: Path) -> None:
    """Frequencies and factor of attention each show; a later stage keeps both, on other ranks too."""
    run = tmp_path / "yarn" / "run"
    train(pack, imported[QWEN], run, "--change-rope-yarn", YARN).check()
    record = json.loads((run / "run.json").read_text())
    assert record["configuration"]["change_rope_yarn"] == YARN
    assert record["model"]["yarn"] == record["model_changes"]["rope_scaling"]["to"]
    assert record["model_changes"]["rope_scaling"]["from"] is None
    config = json.loads((run / "hf" / "config.json").read_text())
    place = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    card = check_export(
        run,
        ((place, "rope_type"), "default"),
        ((place, "attention_factor"), 1.0),
        ((place, "factor"), 8.0),
    )
    assert "| rotary base, scaling | 1000000, YaRN 4 x 256 from here on |" in card
    loss = ranks.read_jsonl(run / "losses.jsonl")[0]["loss"]
    for flags, words in (
        ((), f'--change-rope-yarn "{YARN}" (now not set)'),
        (
            ("--change-rope-yarn", "8,256"),
            "with the given change of RoPE: rope_scaling.factor is 4.0, expected",
        ),
    ):
        ended = train(pack, imported[QWEN], run, "--train-iters", 2, *flags)
        assert ended.codes == [1]
        assert words in ended.outputs[0]
    train(pack, imported[QWEN], run, "--train-iters", 2, "--change-rope-yarn", YARN).check()
    assert [step["iteration"] for step in ranks.read_jsonl(run / "losses.jsonl")] == [1, 2]
    for other in ("--context-parallel-size", "--pipeline-model-parallel-size"):
        following = tmp_path / other / "run"
        layout = ("--tensor-model-parallel-size", 2, other, 2)
        train(pack, run, following, *layout, world=4).check()
        its = json.loads((following / "run.json").read_text())
        assert its["model"]["yarn"] == record["model"]["yarn"]
        again = ranks.read_jsonl(following / "losses.jsonl")[0]["loss"]
        assert again == pytest.approx(loss, rel=LOSS_BOUND)
    plain = train(pack, imported[QWEN], tmp_path / "plain" / "run").check()
    assert "with rope" not in plain.outputs[0]
    without = ranks.read_jsonl(tmp_path / "plain" / "run" / "losses.jsonl")[0]["loss"]
    assert abs(without - loss) > 100 * LOSS_BOUND * loss
    records = [json.loads((tmp_path / name / "run" / "run.json").read_text()) for name in ("plain", "yarn")]
    assert first_difference(*records) is not None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--rotary-base", CHANGED),
            f"--rotary-base {CHANGED} is given but the model has {BASE}, says .*: drop these flags, or "
            f"change the model on purpose with --change-rotary-base {CHANGED}",
        ),
        (("--change-rotary-base", "8M"), "'8M' is not a whole number of 2 to"),
        (
            ("--change-rotary-base", CHANGED, "--rotary-base", BASE),
            f"--rotary-base {BASE} is given but the model has {CHANGED}",
        ),
        (("--change-rope-yarn", "4"), "'4' is not FACTOR,ORIGINAL, such as 4,32768"),
        (("--change-rope-yarn", "1,4096"), "'1,4096' has a factor that is not above 1"),
        (("--change-rope-yarn", YARN), f"--change-rope-yarn {YARN} would replace Llama 3's scaling"),
        (
            ("--position-embedding-type", "yarn"),
            "--position-embedding-type yarn is not supported: .*--change-rope-yarn",
        ),
    ],
)
def test_other_frequencies_by_accident_are_an_error(
    flags: tuple[Any, ...], words: str, imported: dict[str, Path], pack: Path, tmp_path: Path
) -> None:
    ended = train(pack, imported[LLAMA], tmp_path / "accident" / "run", *flags)
    assert ended.codes[0] != 0
    assert re.search(words, ended.outputs[0])
    assert not (tmp_path / "accident" / "run").exists()
