from __future__ import annotations

import pytest

from megatron_exact.training.arguments import build_parser


def test_our_options_and_megatrons_are_told_apart() -> None:
    options, rest = build_parser().parse_known_args(["--pack", "p", "--lr", "1", "--exact-tau", "64"])
    assert (options.pack, options.exact_tau, options.token_weighting) == ("p", 64.0, "none")
    assert rest == ["--lr", "1"]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "torchrun --nproc-per-node" in text
    for rule in ("none", "exact", "exact-normalized"):
        assert rule in text


def test_bucket_weights_are_pairs() -> None:
    options, _ = build_parser().parse_known_args(["--exact-bucket-weights", "0:0,8:1.25"])
    assert options.exact_bucket_weights == ((0, 0.0), (8, 1.25))
    assert build_parser().parse_known_args([])[0].exact_bucket_weights == ()


@pytest.mark.parametrize("text", ["", "8", "8:", "a:1", "0:1:2", "0:1,,8:1"])
def test_bucket_weights_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"does not name buckets and weights, such as 0:1\.1,8:1\.05"):
        build_parser().parse_known_args(["--exact-bucket-weights", text])
