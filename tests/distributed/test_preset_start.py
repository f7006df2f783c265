"""A random start from `--preset`: nothing else says what the model is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.model import families
from megatron_exact.model.hf_folder import read_hf_folder
from tests.distributed import hf_models, jobs, ranks

TINY = replace(
    families.PRESETS["llama-3.2-1b"],
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=hf_models.VOCABULARY,
)


def add_tiny_preset() -> None:
    families.PRESETS["tiny"] = TINY


def command(pack: Path, run: Path, *extra: Any) -> list[Any]:
    job = ("--pack", pack, "--load", run, "--save", run, "--save-interval", 1, "--train-iters", 2)
    return [*job, *jobs.SCHEDULE, *extra]


def test_a_preset_describes_the_whole_model(pack: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = command(pack, run, "--preset", "tiny", "--exit-interval", 1)
    ended = ranks.train(1, first, tmp_path / "o1", add_tiny_preset).check()
    assert "the model is that of --preset tiny" in ended.outputs[0]
    assert read_hf_folder(run / "hf").shape == TINY
    # The run knows its model from now on
    ended = ranks.train(1, command(pack, run), tmp_path / "o2").check()
    assert "resuming from iter_0000001" in ended.outputs[0]
    assert len(ranks.read_jsonl(run / "losses.jsonl")) == 2
    ended = ranks.train(1, command(pack, run, "--preset", "llama-3.2-1b"), tmp_path / "o3")
    assert ended.codes == [1]
    assert "is not --preset llama-3.2-1b: num_layers is 2, expected 16; hidden_size" in ended.outputs[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--preset", "tiny", "--num-layers", 3), "--num-layers 3 is given but the model has 2"),
        (("--preset", "large"), "preset 'large' is unknown: choose one of qwen2.5-0.5b"),
        (
            ("--preset", "tiny", "--rotary-interleaved"),
            "--rotary-interleaved is not supported: no supported model family",
        ),
    ],
)
def test_contradictions_are_refused(flags: tuple[Any, ...], words: str, pack: Path, tmp_path: Path) -> None:
    ended = ranks.train(1, command(pack, tmp_path / "run", *flags), tmp_path / "output", add_tiny_preset)
    assert ended.codes == [1]
    (error,) = (line for line in ended.outputs[0].splitlines() if line.startswith("error: "))
    assert words in error
    assert not (tmp_path / "run").exists()


def test_rows_that_ranks_cannot_share(pack: Path, tmp_path: Path) -> None:
    """Four ranks cannot share 102 rows evenly: refused, because padding would change the loss."""

    def patch() -> None:
        families.PRESETS["tiny"] = replace(TINY, vocab_size=102, num_query_groups=4)

    argv = command(pack, tmp_path / "run", "--preset", "tiny", "--tensor-model-parallel-size", 4)
    ended = ranks.train(4, argv, tmp_path / "output", patch)
    assert all(ended.codes)
    assert "a vocabulary of 102 does not divide by --tensor-model-parallel-size 4" in ended.outputs[0]


NORMS_AFTER = (*jobs.MODEL, "--qk-layernorm", "--post-norm")


def test_norms_after_the_layers_from_flags(pack: Path, tmp_path: Path) -> None:
    """The run knows it from then on; without the option it is another model, and so is a Llama with it."""
    run = tmp_path / "run"
    ranks.train(1, command(pack, run, *NORMS_AFTER, "--exit-interval", 1), tmp_path / "o1").check()
    shape = read_hf_folder(run / "hf").shape
    assert (shape.architecture, shape.post_norm) == ("olmo2", True)
    ranks.train(1, command(pack, run), tmp_path / "o2").check()
    assert len(ranks.read_jsonl(run / "losses.jsonl")) == 2
    argv = command(pack, tmp_path / "no", "--preset", "tiny", "--post-norm")
    ended = ranks.train(1, argv, tmp_path / "o3", add_tiny_preset)
    assert ended.codes == [1]
    assert "--post-norm is given but the model has none, says --preset tiny: drop it" in ended.outputs[0]
