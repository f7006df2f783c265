"""`--print-arguments`: Megatron's parser knows every flag; neither pack nor world size is looked at."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import ranks


def test_a_recipe_is_printed_and_an_unknown_flag_refused(tmp_path: Path) -> None:
    argv = ["--recipe", "llama3.1_8b_16k_4nodes", "--pack", "nowhere", "--print-arguments"]
    printed = ranks.train(1, argv, tmp_path / "printed").check().outputs[0]
    command = printed[printed.index("torchrun ") :]
    assert "--pack nowhere" in command
    assert "    --tensor-model-parallel-size 4 \\\n" in command
    assert "--num-layers 32" in command
    assert "--print-arguments" not in command
    wrong = ranks.train(1, [*argv, "--lrr", "1"], tmp_path / "wrong")
    assert wrong.codes == [1]
    assert "error: unrecognized arguments: --lrr 1" in wrong.outputs[0]
    assert "torchrun" not in wrong.outputs[0]


def test_a_changed_rotary_base_is_that_of_the_printed_flags(tmp_path: Path) -> None:
    """The printed command must not contradict itself."""
    argv = ["--recipe", "llama3.1_8b_16k", "--change-rotary-base", "8000000", "--print-arguments"]
    printed = ranks.train(1, argv, tmp_path / "printed").check().outputs[0]
    assert "    --change-rotary-base 8000000 \\\n" in printed
    assert "    --rotary-base 8000000 \\\n" in printed
    assert "500000" not in printed
